"""Projected gradient descent (PGD) on images in [0,1], in mixed precision.

    x_adv = pgd(model, x, y, eps=8, steps=10, precision=run.Precision("bf16", device))

Sources: FGSM, Goodfellow et al. 2015; PGD, Madry et al. 2018; the random single step ("fast FGSM"),
Wong et al. 2020; the CW loss, Carlini & Wagner 2017; the DLR loss, Croce & Hein 2020.

The arithmetic of the attack (perturbation, projection, loss) is fp32 whatever the precision of the
network. The images lie inside the ball and inside [0,1] in exact arithmetic, not only up to
rounding. `ascend` is the loop. fastnet.py makes it fast and leaves the network as it was found.
"""

import torch
import torch.nn.functional as F

from common.attacks import fastnet, network
from common.run import UserError

CW_CONFIDENCE = 50.0  # logit margin beyond which the CW loss stops pushing, as NoFrost's

# --- losses to maximise: logits (N,K), labels (N,), targets (N,) or None -> (N,) ------------------


def without(logits, label):
    """The logits with the entry `label` (N,) of each row at minus infinity."""
    return logits.scatter(1, label[:, None], -torch.inf)


def pick(logits, label):
    """The logit `label` (N,) of each row, (N,)."""
    return logits.gather(1, label[:, None])[:, 0]


def ce_loss(logits, y, target=None):
    """Cross-entropy of the label, or minus that of the target."""
    if target is not None:
        return -F.cross_entropy(logits, target, reduction="none")
    return F.cross_entropy(logits, y, reduction="none")


def cw_loss(logits, y, target=None):
    """Margin of Carlini & Wagner: the best wrong logit minus the label's, at most CW_CONFIDENCE
    (targeted: the target's minus the best other)."""
    if target is not None:
        margin = pick(logits, target) - without(logits, target).amax(1)
    else:
        margin = without(logits, y).amax(1) - pick(logits, y)
    return margin.clamp(max=CW_CONFIDENCE)


def kl_loss(logits, clean, target=None):
    """KL(clean || adversarial) per image (N,), of log-probabilities `clean` and logits (N,K).

    TRADES (Zhang et al. 2019) climbs and trains on it."""
    return F.kl_div(F.log_softmax(logits, 1), clean, reduction="none", log_target=True).sum(1)


def dlr_loss(logits, y, target=None):
    """Difference of logits ratio, invariant to their scale (Croce & Hein 2020, eq. 6 and 7)."""
    top = logits.topk(3 if target is None else 4, dim=1).values
    if target is not None:
        spread = top[:, 0] - (top[:, 2] + top[:, 3]) / 2
        return (pick(logits, target) - pick(logits, y)) / (spread + 1e-12)
    margin = without(logits, y).amax(1) - pick(logits, y)
    return margin / (top[:, 0] - top[:, 2] + 1e-12)


LOSSES = {"ce": ce_loss, "cw": cw_loss, "dlr": dlr_loss}

# --- the ball -------------------------------------------------------------------------------------


def default_alpha(eps, steps):
    """Step size in pixel units, min(1.25 eps, eps + 4) / steps, as NoFrost's code."""
    return min(1.25 * eps, eps + 4) / steps


def unit_noise(shape, norm="linf", generator=None, device="cpu"):
    """Points uniform in the unit ball, fp32 (N,...), on the generator's device if there is one.

    Drawn for a global batch and sliced, they do not depend on the number of processes.
    """
    device = device if generator is None else generator.device
    if norm == "linf":
        return torch.rand(shape, generator=generator, device=device).mul_(2).sub_(1)
    noise = torch.randn(shape, generator=generator, device=device).flatten(1)
    radius = torch.rand(len(noise), 1, generator=generator, device=device)
    noise *= radius.pow(1 / noise.shape[1]) / noise.norm(dim=1, keepdim=True)
    return noise.view(shape)


def below(value):
    """The largest fp32 number that is not above `value`, as a float."""
    single = torch.tensor(value, dtype=torch.float32)
    if single.item() > value:
        single = torch.nextafter(single, torch.tensor(0.0))
    return single.item()


class Linf:
    """Box |x_adv - x| <= eps, cut with [0,1]. Where rounding took a bound out of the box it is one
    step of fp32 nearer. So the bounds hold exactly: fp64 holds the difference of two of fp32."""

    def __init__(self, x, eps, alpha):
        self.x, self.eps, self.alpha = x, below(eps), alpha
        self.low, self.high = self.bound(-self.eps), self.bound(self.eps)

    def bound(self, eps):
        """x + eps, moved into the box and into [0,1]."""
        bound = torch.add(self.x, eps)
        outside = (bound.double() - self.x).abs_() > self.eps
        return torch.where(outside, torch.nextafter(bound, self.x), bound).clamp_(0, 1)

    def start(self, noise):
        """The images, or the points at noise (N,...) of the unit ball."""
        if noise is None:
            return self.x.clone().clamp_(0, 1)
        noise = noise.to(self.x)
        adv = torch.add(self.x, noise, alpha=self.eps, out=torch.empty_like(self.x))
        return adv.clamp_(self.low, self.high)

    def step(self, adv, grad):
        """`adv` moved in place along the gradient's sign; a NaN has the sign 0."""
        return adv.add_(grad.sign_(), alpha=self.alpha).clamp_(self.low, self.high)


class L2:
    """Ball ||x_adv - x||_2 <= eps, cut with [0,1]. Norms are summed in fp64, and every entry is
    rounded towards x, so the bound holds exactly."""

    def __init__(self, x, eps, alpha):
        self.x, self.eps, self.alpha = x, eps * (1 - 1e-6), alpha
        self.dims = tuple(range(1, x.ndim))

    def length(self, delta):
        return torch.linalg.vector_norm(delta, dim=self.dims, keepdim=True, dtype=torch.float64)

    def project(self, adv, delta):
        """Writes x + delta into `adv`, drawn into the ball and cut with [0,1]."""
        shrink = (self.eps / self.length(delta)).clamp_(max=1).float()
        return torch.nextafter(delta.mul_(shrink).add_(self.x), self.x, out=adv).clamp_(0, 1)

    def start(self, noise):
        """The images, or the points at noise (N,...) of the unit ball."""
        if noise is None:
            return self.x.clone().clamp_(0, 1)
        return self.project(torch.empty_like(self.x), noise.to(self.x) * self.eps)

    def step(self, adv, grad):
        """`adv` moved in place along the gradient, and projected; a NaN counts as 0."""
        grad.nan_to_num_(0, 0, 0)
        move = grad * (self.alpha / self.length(grad).clamp_(min=1e-30)).float()
        return self.project(adv, move.add_(adv).sub_(self.x))


BALLS = {"linf": Linf, "l2": L2}

# --- the loop -------------------------------------------------------------------------------------


def ascend(net, ball, noise, y, target, loss, steps):
    """PGD from one start. Returns (adv, mean loss at the last gradient, flat (N,)): `flat` counts
    the entries of each image's gradients that were zero or NaN."""
    flat = 0
    adv = ball.start(noise)
    for _ in range(steps):
        adv.requires_grad_()
        with torch.enable_grad():
            value = loss(net(adv), y, target).sum()
            (grad,) = torch.autograd.grad(value * net.scale, adv)
        adv = ball.step(adv.detach(), grad)
        flat = flat + grad[0].numel() - grad.flatten(1).count_nonzero(1)
    return adv, value.detach() / len(adv), flat


def pgd(
    model,
    x,
    y,
    eps=8.0,
    alpha=None,
    steps=10,
    norm="linf",
    loss="ce",
    target=None,
    random_start=True,
    restarts=1,
    noise=None,
    generator=None,
    precision=None,
    mode="eval",
    capture=None,
    check=True,
    return_stats=False,
    eot=1,
):
    """Adversarial images by projected gradient ascent on the loss, a tensor like x.

    model: a module or a function from images in [0,1] to logits (N,K), a tuple that begins with
        them, or a dict with the key "logits". x: (N,...) float32 in [0,1]. y: (N,) labels.
    eps, alpha: in units of 1/255 for both norms (norm "l2" with eps 128 is a radius of 0.502).
        alpha None is min(1.25 eps, eps + 4) / steps.
    steps: gradients taken. One step without a random start is FGSM.
    loss: ce, cw, dlr, or a function (logits, y, target) -> (N,), to be maximised.
    target: (N,) classes to be predicted instead of y (targeted attack).
    random_start: begin at a point drawn uniformly from the ball, cut with [0,1].
    restarts: attacks from different starts. Of each image the worst is kept: one classified as its
        target before a misclassified one before a correct one, then by loss, judged in fp32.
    noise: (N,...), or (restarts,N,...), points in the unit ball (`unit_noise`) to start from.
    generator: for the starts where no noise is given; without it torch's global one.
    precision: object with autocast() (run.Precision) for the network; None is fp32.
    mode: "eval", or "train" for BatchNorm with statistics of the attacked batch (and dropout).
    capture: a `Graphs`, to run the network as CUDA graphs on a GPU in eval mode.
    check: look at the values of x, y and target, which is a host sync before the loop.
    return_stats: also return {"zero_grad": share of the gradient's entries, over all steps, that
        were zero or NaN; "loss": mean loss at the last gradient}, 0-d tensors, and "still": (N,)
        bool, images without any gradient at any step, which never left their starts.
    eot: passes of a random network, whose mean logits are attacked.

    Raises UserError for arguments out of range, images outside [0,1], labels beyond the logits.
    """
    check_arguments(x, y, eps, alpha, steps, norm, loss, target, restarts, random_start, mode)
    if not len(x):
        return (x.clone(), {}) if return_stats else x.clone()
    alpha = default_alpha(eps, steps) if alpha is None else alpha
    objective = LOSSES[loss] if isinstance(loss, str) else loss
    y, target = whole(y), whole(target)
    if noise is not None:
        if noise.numel() != restarts * x.numel():
            raise UserError(f"noise {tuple(noise.shape)} is not {restarts} times {tuple(x.shape)}")
        noise = noise.reshape(restarts, *x.shape)
    with fastnet.prepared(model, x, precision, mode, capture, eot) as net:
        if check:
            check_values(x, y, loss, target, net.classes)
        x = network.normal(x).detach().contiguous(memory_format=net.layout)
        y, target = network.normal(y), network.normal(target)
        ball = BALLS[norm](x, eps / 255, alpha / 255)
        best, flat = None, 0
        for i in range(restarts):
            if noise is not None:
                begin = noise[i]
            else:
                begin = unit_noise(x.shape, norm, generator, x.device) if random_start else None
            adv, value, entries = ascend(net, ball, begin, y, target, objective, steps)
            flat = flat + entries
            if restarts > 1:
                with net.exact() as judge:
                    found = severity(judge(adv), y, target, objective)
                best = worse(best, (adv, *found))
        x_adv = adv if best is None else best[0]
        gradients = steps * restarts
        stats = {
            "zero_grad": flat.sum() / (x.numel() * gradients),
            "still": flat == x[0].numel() * gradients,
            "loss": value,
        }
    return (x_adv, stats) if return_stats else x_adv


# --- restarts -------------------------------------------------------------------------------------


def severity(logits, y, target, loss):
    """Rank (N,) and loss (N,) of adversarial images: 2 classified as the target, 1 misclassified,
    0 correct (all 0 where y is no label: a loss function of the caller's)."""
    predicted = logits.argmax(1)
    rank = torch.zeros_like(predicted)
    if y.shape == predicted.shape and not y.is_floating_point():
        rank += predicted != y
    if target is not None:
        rank += predicted == target
    return rank, loss(logits, y, target)


def worse(best, new):
    """Of two (x_adv, rank, loss) the higher in (rank, loss), image by image. best may be None."""
    if best is None:
        return tuple(tensor.clone() for tensor in new)
    better = (new[1] > best[1]) | ((new[1] == best[1]) & (new[2] > best[2]))
    return tuple(
        torch.where(better.view(-1, *[1] * (a.ndim - 1)), b, a)
        for a, b in zip(best, new, strict=True)
    )


# --- arguments ------------------------------------------------------------------------------------


def whole(label):
    """Labels as int64, which indexing needs; what is no label unchanged."""
    if label is None or label.is_floating_point():
        return label
    return label.long()


def check_radius(eps, norm, count):
    """UserError for a radius that is not above 0, or reaches beyond the box of images.

    eps: in units of 1/255. count: numbers of an image."""
    most = 255.0 if norm == "linf" else 255.0 * count**0.5  # across the whole box
    if not 0 < eps <= most:
        raise UserError(f"eps {eps} is not in (0, {most:.5g}]: it is given in pixel units of 1/255")


def check_eps(eps, norm="linf", alpha=None):
    """A warning where eps or alpha is clearly given in units of the whole range, else None.

    Raises UserError for a Linf radius above that range.

    8/255 is 0.0314. Radii in units of 1/255 below 0.5 (Linf) are smaller than a grey level, and
    below 8 (L2) they are smaller than 1/32. Steps below a hundredth of eps do not cross the ball.
    """
    if norm == "linf" and eps > 255:
        check_radius(eps, norm, 1)
    least = 0.5 if norm == "linf" else 8
    if 0 < eps < least:
        return (
            f"eps {eps:g} is in units of 1/255, so this {norm} radius is {eps / 255:.2g}: if you "
            f"meant {eps:g} of the range [0,1], give --eps {255 * eps:g}"
        )
    if alpha is not None and 0 < alpha < eps / 100:
        return (
            f"alpha {alpha:g} is in units of 1/255 and too small for eps {eps:g}: if you meant "
            f"{alpha:g} of the range [0,1], give --alpha {255 * alpha:g}"
        )
    return None


def check_arguments(x, y, eps, alpha, steps, norm, loss, target, restarts, random_start, mode):
    """Raise UserError for settings that make no attack. Looks at types and shapes, not values."""
    for name, value, known in (
        ("norm", norm, BALLS),
        ("loss", loss, LOSSES),
        ("mode", mode, ("eval", "train")),
    ):
        if value not in known and not (name == "loss" and callable(value)):
            raise UserError(f"unknown {name} {value!r}: choose from {', '.join(known)}")
    if x.dtype != torch.float32:
        raise UserError(
            f"images to attack must be float32 in [0,1], got {str(x.dtype)[6:]}: uint8 images are "
            "divided by 255, half precision belongs in `precision`"
        )
    check_radius(eps, norm, x.shape[1:].numel())
    if alpha is not None and not 0 < alpha < float("inf"):
        raise UserError(f"alpha {alpha}: the step size must be above 0, in pixel units of 1/255")
    for name, count in (("steps", steps), ("restarts", restarts)):
        if not isinstance(count, int) or count < 1:
            raise UserError(f"{name} {count}: give a whole number, at least 1")
    if restarts > 1 and not random_start:
        raise UserError("restarts without a random start repeat one attack: leave one of them out")
    for name, label in (("y", y), ("target", target)):
        if label is None or (name == "y" and callable(loss)):
            continue
        if label.shape != x.shape[:1] or label.is_floating_point():
            raise UserError(f"{name} must be {len(x)} whole numbers, one per image")


def check_values(x, y, loss, target, classes):
    """Raise UserError for images outside [0,1] and labels beyond the logits. A host sync."""
    least, largest = (float(v) for v in x.aminmax())
    if not (least >= -1e-6 and largest <= 1 + 1e-6):  # NaN fails too
        raise UserError(
            f"images range from {least:.4g} to {largest:.4g}, not within [0,1]: normalisation "
            "belongs in the model's first layer"
        )
    if callable(loss):
        return
    needed = (3 if target is None else 4) if loss == "dlr" else 2
    if classes < needed:
        raise UserError(f"loss {loss} needs {needed} classes or more, the model has {classes}")
    for name, label in (("y", y), ("target", target)):
        if label is not None and not (label.min() >= 0 and label.max() < classes):
            span = f"{int(label.min())}..{int(label.max())}"
            raise UserError(f"{name} has classes {span}, the model {classes} (0..{classes - 1})")
