"""Fast adaptive boundary attack, FAB (Croce & Hein 2020, arXiv 1907.02044).

The projections are solved by Newton's method, not by sorting as in the authors' code.
"""

import torch

from common.attacks.pgd import pick
from common.attacks.rows import Rows, distance, lengths, per_image


def nearest(point, w, value, norm):
    """The smallest step d (N,D) from `point` (N,D) in [0,1] onto w.d + value = 0, within [0,1].

    With t the step length, entry i moves by min(t s_i, room_i), s_i = 1 (Linf) or |w_i| (L2). This
    lowers |value| by the sum of |w_i| times the moves, which is concave in t. So Newton's method
    from t = 0 climbs to the solution in a few steps. Where the box is too small every entry moves
    fully.
    """
    w = torch.where(value[:, None] > 0, -w, w)
    need, size = value.abs(), w.abs()
    room = torch.where(w > 0, 1 - point, point)
    speed = torch.ones_like(size) if norm == "linf" else size
    gain = size * speed
    t = need / gain.sum(1).clamp_(min=1e-30)
    for _ in range(50):
        wish = t[:, None] * speed
        short = need - (size * torch.minimum(wish, room)).sum(1)
        slope = (gain * (wish < room)).sum(1)
        rise = torch.where(slope > 0, short / slope.clamp(min=1e-30), 0).clamp_(min=0)
        t += rise
        if (rise <= 1e-6 * t).all():
            break
    return w.sign() * torch.minimum(t[:, None] * speed, room)


def lead_of_target(logits, y, target):
    return pick(logits, target) - pick(logits, y)


def fab(net, x, y, eps, norm, steps, target, tick=None, eta=1.05, beta=0.9, most=0.1):
    """Fast adaptive boundary attack towards `target` (N,). Returns (x_adv, distance): the nearest
    adversarial point found, or x and infinity. With an eps an image is left at the first point
    within it; eps None looks for the nearest throughout."""
    out, best = x.clone(), torch.full((len(x),), torch.inf, dtype=torch.float64, device=x.device)
    rows = torch.arange(len(x), device=x.device)
    s = Rows(row=rows, x=x, y=y, target=target, adv=x.clone())
    for i in range(steps):
        _, value, grad = net.gradient(s.adv, lead_of_target, s.y, s.target)
        if not i:
            net.count_zero(grad)
        w, flat, origin = grad.flatten(1), s.adv.flatten(1), s.x.flatten(1)
        step = nearest(flat, w, value, norm)
        home = nearest(origin, w, value + (w * (origin - flat)).sum(1), norm)
        near, far = (lengths(d, norm).clamp_(min=1e-8) for d in (step, home))
        share = (near / (near + far)).clamp_(max=most)[:, None].float()
        new = (flat + eta * step).lerp_(origin + eta * home, share).clamp_(0, 1)
        s.adv = new.view_as(s.x)
        hit = net.fooled(net.logits(s.adv), s.y)
        size = distance(s.adv, s.x, norm)
        closer = hit & (size < best[s.row])
        out[s.row[closer]], best[s.row[closer]] = s.adv[closer], size[closer]
        back = torch.where(hit, beta, 1.0)
        s.adv = s.x + per_image(back, x) * (s.adv - s.x)
        if eps is not None:
            inside = best[s.row] <= eps
            if inside.any():
                s.keep(~inside)
            if not len(s.row):
                break
        if tick:
            tick((i + 1) / steps)
    return out, best
