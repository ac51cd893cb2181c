"""Auto-PGD (Croce & Hein 2020, arXiv 2003.01690), and the momentum method (Dong et al. 2018).

APGD follows the paper where its code does not: checkpoints at ceil(p_j steps), the same for 100
steps; condition 1 is "fewer rises than rho", theirs "at most"; condition 2 counts from the first
checkpoint, theirs from the second; after a halving the next rise is measured from the point gone
back to, theirs from the one left.
"""

import torch

from common.attacks.pgd import ce_loss
from common.attacks.rows import Ball, Rows, per_image


def checkpoints(steps):
    """Iterations w_1 < w_2 < ... after which APGD reconsiders its step size (section 3.1):
    w_j = ceil(p_j steps), p_1 = 0.22, p_(j+1) = p_j + max(p_j - p_(j-1) - 0.03, 0.06)."""
    marks, p, period = [], 22, 22  # in hundredths: exact
    while p <= 100:
        marks.append(-(-p * steps // 100))
        period = max(period - 3, 6)
        p += period
    return marks


def apgd(net, x, y, eps, norm, steps, loss, noise, target=None, tick=None, rho=0.75, alpha=0.75):
    """Auto-PGD on the loss. Returns (x_adv, fooled): of a fooled image the first adversarial
    point, of another the one of the highest loss."""
    out, fooled = x.clone(), torch.zeros(len(x), dtype=torch.bool, device=x.device)
    ball = Ball(x, eps, norm)
    adv = ball.project(x + eps * noise)
    logits, value, grad = net.gradient(adv, loss, y, target)
    net.count_zero(grad)
    step = torch.full_like(value, 2 * eps)
    s = Rows(
        row=torch.arange(len(x), device=x.device), ball=ball, y=y, target=target, step=step,
        adv=adv, before=adv, grad=grad, value=value, best=adv.clone(), best_grad=grad.clone(),
        best_value=value.clone(), last_best=value.clone(), rises=torch.zeros_like(value),
        reduced=torch.zeros_like(value, dtype=torch.bool),
    )  # fmt: skip

    def retire(logits):
        """Take the rows that are misclassified out of the attack; False when none is left."""
        now = net.fooled(logits, s.y)
        if now.any():
            out[s.row[now]], fooled[s.row[now]] = s.adv[now], True
            s.keep(~now)
        return len(s.row) > 0

    marks, last = checkpoints(steps), 0
    going = retire(logits)
    for i in range(1, steps + 1):
        if not going:
            break
        new = s.ball.project(s.adv + per_image(s.step, x) * s.ball.direction(s.grad))
        if i > 1:  # the momentum of eq. 1
            new.sub_(s.adv).mul_(alpha).add_(s.adv).add_(s.adv - s.before, alpha=1 - alpha)
            s.ball.project(new)
        s.before, s.adv = s.adv, new
        logits, value, s.grad = net.gradient(s.adv, loss, s.y, s.target)
        s.rises += value > s.value
        s.value = value
        better = value > s.best_value
        s.best_value = torch.where(better, value, s.best_value)
        s.best = torch.where(per_image(better, x), s.adv, s.best)
        s.best_grad = torch.where(per_image(better, x), s.grad, s.best_grad)
        going = retire(logits)
        if going and i in marks:
            few = s.rises < rho * (i - last)  # condition 1
            stuck = ~s.reduced & (s.best_value <= s.last_best)  # condition 2
            s.reduced = few | stuck
            back = per_image(s.reduced, x)
            s.step = torch.where(s.reduced, s.step / 2, s.step)
            s.adv = torch.where(back, s.best, s.adv)
            s.grad = torch.where(back, s.best_grad, s.grad)
            s.value = torch.where(s.reduced, s.best_value, s.value)
            s.last_best, last = s.best_value.clone(), i
            s.rises.zero_()
        if tick:
            tick(i / steps)
    if len(s.row):
        out[s.row] = s.best
    return out, fooled


def mim(net, x, y, eps, norm, steps, decay=1.0, tick=None):
    """The momentum iterative method: steps of eps / steps along the running sum of gradients, each
    divided by its L1 norm. Starts at the image. Returns (x_adv, fooled)."""
    ball = Ball(x, eps, norm)
    adv, velocity = ball.project(x.clone()), torch.zeros_like(x)
    for i in range(steps):
        grad = net.gradient(adv, ce_loss, y, None)[2]
        if not i:
            net.count_zero(grad)
        size = grad.flatten(1).abs().sum(1).clamp_(min=1e-30)
        velocity = decay * velocity + grad / per_image(size, grad)
        adv = ball.project(adv + eps / steps * ball.direction(velocity))
        if tick:
            tick((i + 1) / steps)
    return adv, net.fooled(net.logits(adv), y)
