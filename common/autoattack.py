"""The attacks that an evaluation needs: AutoAttack's four, their relatives, and a check in fp32.

    x_adv, fooled = attack(model, x, y, "apgd-t", eps=8)        # one attack
    for name in STANDARD: ...                                   # AutoAttack, eval/adversarial.py

Sources: APGD, the DLR loss and AutoAttack, Croce & Hein 2020 (arXiv 2003.01690); FAB, Croce & Hein
2020 (1907.02044); Square, Andriushchenko et al. 2020 (1912.00049); MIM, Dong et al. 2018; CW-inf,
Carlini & Wagner 2017. The ball, the losses and the prepared network are those of common/attacks.py.

APGD and Square stop at an image as soon as it is misclassified, FAB as soon as it is so within eps,
and go on with the others alone. Random numbers belong to (seed, attack, index of the image): a
result depends neither on the batch size nor on which other images are attacked. The network may
compute in bf16; what counts as misclassified in the end is the unmodified network in fp32, and
logits that are NaN classify nothing correctly.

Differences from the authors' code: Square draws a window per image, not per batch, and may place it
at the last row and column (as in the paper), and starts in L2 from bumps of one orientation. APGD
follows the paper where its code does not: checkpoints at ceil(p_j steps), the same for 100 steps;
condition 1 is "fewer rises than rho", theirs "at most"; condition 2 counts from the first
checkpoint, theirs from the second; after a halving the next rise is measured from the point gone
back to, theirs from the one left. FAB's projections are solved by Newton's method, not by sorting.
"""

import contextlib
import copy
import functools
import math

import torch

from common import run
from common.attacks import (  # the second half of one module, apart for its length
    BALLS,
    FP16_SCALE,
    ce_loss,
    check_arguments,
    check_values,
    dlr_loss,
    frozen,
    pgd,
    pick,
    prepared,
    probe,
    unit_noise,
    unwrap,
    without,
)
from common.run import UserError

STANDARD = ("apgd-ce", "apgd-t", "fab-t", "square")
STEPS = {  # attack: its gradient steps, or queries, where the name does not end in another number
    "fgsm": 1,
    "bim": 10,
    "pgd": 20,
    "mim": 10,
    "cw": 20,
    "apgd-ce": 100,
    "apgd-dlr": 100,
    "apgd-t": 100,
    "fab-t": 100,
    "square": 5000,
}
TARGETS = 9  # classes that APGD-T and FAB-T aim at, the likeliest first
# Lead of a wrong class, of the largest logit: the last bits depend on the batch, on a GPU (not
# measured) on the algorithm too that is chosen for it.
CLEAR = {"cpu": 1e-5, "cuda": 1e-4, "mps": 1e-4, "xpu": 1e-4}
CHUNK = 1 << 18  # numbers per piece of a batch on a CPU, so that its activations stay in the cache


def parse(name):
    """(kind, steps) of an attack's name: pgd-20, square, apgd-ce-50. Raises UserError."""
    kind, _, steps = name.rpartition("-")
    if not steps.isdigit():
        kind, steps = name, STEPS.get(name)
    if kind not in STEPS or not int(steps) or (kind == "fgsm" and name != "fgsm"):
        known = ", ".join(STEPS)
        raise UserError(f"there is no attack {name!r}: choose from {known}; steps as in pgd-20")
    return kind, int(steps)


# --- the network under attack ---------------------------------------------------------------------


class Victim:
    """Logits and input gradients of a network for images (N,...) fp32, piece by piece.

    Inside `prepared(victim.plan, victim.dtype)` they come fast and in the precision asked for;
    outside, from the network as it is, in fp32.
    """

    def __init__(self, net, x, precision):
        self.net = net
        self.classes, self.plan, self.layout = probe(net, x[:1])
        self.device = x.device.type
        self.dtype = torch.float32 if precision is None else precision.dtype
        self.chunk = max(8, CHUNK // x[0].numel()) if self.device == "cpu" else 1 << 30
        self.clear = CLEAR[self.device] if self.dtype == torch.float32 else 0.01
        self.scale = FP16_SCALE if self.dtype == torch.float16 else 1.0
        self.zero = 0  # images whose first gradient was zero

    def run(self, x):
        low = self.dtype != torch.float32
        with torch.autocast(self.device, dtype=self.dtype if low else None, enabled=low):
            return self.net(x.contiguous(memory_format=self.layout)).float()

    def logits(self, x):
        return torch.cat([self.run(part) for part in x.split(self.chunk)])

    def gradient(self, x, loss, *labels):
        """(logits (N,K), loss (N,), gradient like x) of loss(logits, *labels) -> (N,)."""
        pieces = []
        for begin in range(0, len(x), self.chunk):
            rows = slice(begin, begin + self.chunk)
            part = x[rows].detach().requires_grad_(True)
            with torch.enable_grad():
                logits = self.run(part)
                value = loss(logits, *(None if v is None else v[rows] for v in labels))
                total = value.sum()
                if not total.requires_grad:
                    raise UserError(
                        "nothing to attack: the model detaches its output from its input"
                    )
                (grad,) = torch.autograd.grad(total * self.scale, part)
            grad = grad.nan_to_num(0, 0, 0).div_(self.scale)
            pieces.append((logits.detach(), value.detach(), grad))
        return tuple(torch.cat(p) for p in zip(*pieces, strict=True))

    def count_zero(self, grad):
        """Take note of the images without a gradient; `grad` is the first of an attack."""
        self.zero += int((grad.flatten(1).abs().amax(1) == 0).sum())

    def fooled(self, logits, y):
        """(N,) bool: another class than the label leads by more than rounding."""
        lead, scale = lead_of_wrong(logits, y)
        return lead > self.clear * scale


def as_fp32(model):
    """The model, or its copy in fp32 where it is of another dtype."""
    same = all(p.dtype == torch.float32 for p in model.parameters() if p.is_floating_point())
    return model if same else copy.deepcopy(model).float()


@contextlib.contextmanager
def victim(model, x, precision=None):
    """The network of `model`, for images like x, as a Victim; afterwards it is as it was."""
    fp32 = functools.partial(torch.autocast, x.device.type, enabled=False)
    with torch.inference_mode(False), torch.no_grad(), fp32(), frozen(as_fp32(model)) as net:
        yield Victim(net, x, precision)


def lead_of_wrong(logits, y):
    """By how much the label trails the best other class, (N,), above 0 is misclassified, and the
    largest logit, (N,), the measure of rounding. Where logits are NaN, or infinite beside one
    another, no class leads and none is right: infinity and 0."""
    lead, scale = without(logits, y).amax(1) - pick(logits, y), logits.abs().amax(1)
    return lead.nan_to_num(torch.inf, torch.inf, -torch.inf), scale.nan_to_num(0, 0, 0)


def judge(model, x, y, batch_size=500):
    """`lead_of_wrong` of images (N,...) to the network as it is, in fp32."""
    return lead_of_wrong(run.predict(as_fp32(unwrap(model)), x, batch_size=batch_size), y)


# --- the ball, and rows of tensors ----------------------------------------------------------------


def per_image(values, like):
    """(N,) as (N,1,1,1), to multiply images with."""
    return values.view(-1, *[1] * (like.ndim - 1))


def lengths(delta, norm):
    """Norms (N,) fp64 of the rows of `delta`."""
    order = torch.inf if norm == "linf" else 2
    return torch.linalg.vector_norm(delta.flatten(1), order, dim=1, dtype=torch.float64)


def distance(x_adv, x, norm):
    """Distances (N,) in exact arithmetic: fp64 holds the difference of two fp32 numbers."""
    return lengths(x_adv.double() - x.double(), norm)


class Ball:
    """The ball of common/attacks.py around each of the images x, cut with [0,1]."""

    def __init__(self, x, eps, norm):
        self.ball, self.norm, self.eps, self.x = BALLS[norm](x, eps, eps), norm, eps, x
        self.ball.centre()

    def __getitem__(self, rows):
        part = copy.copy(self)
        part.ball, part.x = copy.copy(self.ball), self.x[rows]
        for name, value in vars(self.ball).items():
            if isinstance(value, torch.Tensor):
                setattr(part.ball, name, value[rows])
        return part

    def project(self, adv):
        """In place: into the ball and the box, exactly."""
        if self.norm == "linf":
            return adv.clamp_(self.ball.low, self.ball.high)
        self.ball.project(adv, adv - self.x)
        return adv

    def direction(self, grad):
        """The steepest step of length one."""
        if self.norm == "linf":
            return grad.sign()
        return grad * per_image(lengths(grad, "l2").clamp_(min=1e-30).reciprocal(), grad).float()


class Rows:
    """Named values with one row per image."""

    def __init__(self, **values):
        vars(self).update(values)

    def keep(self, mask):
        for name, value in vars(self).items():
            if value is not None:
                setattr(self, name, value[mask])


def draw(function, shape, seed, index, *key):
    """Random numbers (N,*shape) that belong to the images `index`, not to their batch."""
    rows = [function(shape, generator=run.generator(seed, *key, i)) for i in index.tolist()]
    return torch.stack(rows).to(index.device)


def start_noise(x, norm, seed, index, *key):
    """Starts of APGD: uniform in the box of Linf, uniform on the sphere of L2, both of size 1."""
    if norm == "linf":
        return draw(torch.rand, x.shape[1:], seed, index, *key).mul_(2).sub_(1)
    noise = draw(torch.randn, x.shape[1:], seed, index, *key)
    return noise / per_image(lengths(noise, "l2"), noise).float()


# --- APGD -----------------------------------------------------------------------------------------


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


def towards_each(net, x, y, attempt, tick=None):
    """Run attempt(rows, target, k, tick) -> (x_adv, fooled) with the likeliest wrong class of the
    clean image as target, then with the next, each on the rows still standing."""
    count = min(TARGETS, net.classes - 1)
    order = without(net.logits(x), y).topk(count, dim=1).indices
    out, fooled = x.clone(), torch.zeros(len(x), dtype=torch.bool, device=x.device)
    for k in range(count):
        rows = (~fooled).nonzero()[:, 0]
        if not len(rows):
            break
        report = tick and (lambda done, k=k: tick((k + done) / count))
        zero = net.zero
        adv, now = attempt(rows, order[rows, k], k, report)
        out[rows], fooled[rows] = adv, now
        net.zero = zero if k else net.zero  # an image counts once: by its first target
    return out, fooled


# --- FAB ------------------------------------------------------------------------------------------


def nearest(point, w, value, norm):
    """The smallest step d (N,D) from `point` (N,D) in [0,1] onto w.d + value = 0, within [0,1].

    With t the step length, entry i moves by min(t s_i, room_i), s_i = 1 (Linf) or |w_i| (L2), and
    lowers |value| by the sum of |w_i| times that: concave in t, so Newton's method from t = 0
    climbs to the solution, in a few steps. Where the box is too small every entry moves fully.
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


# --- Square ---------------------------------------------------------------------------------------

HALVINGS = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)  # queries after which p is halved


def side(query, height, width, norm, p=0.8):
    """Side of the window at a query (from 0): p times the area, p halved by the schedule that
    AutoAttack uses whatever the number of queries; odd and at least 3 for L2."""
    p /= 2 ** sum(query > h for h in HALVINGS)
    s = max(round(math.sqrt(p * height * width)), 1 if norm == "linf" else 3)
    if norm == "l2":
        s += 1 - s % 2
    return min(s, height, width)


def windows(place, s, length):
    """(N,length) bool: s entries from `place` (N,) on."""
    offset = torch.arange(length, device=place.device) - place[:, None]
    return (offset >= 0) & (offset < s)


def pyramid(height, width):
    """The bump of L2 Square: at Chebyshev distance d from the centre, the sum of 1/j^2, j > d."""
    top = max(height // 2, width // 2) + 1
    tail = torch.arange(1, top + 1).double().pow(-2).flip(0).cumsum(0).flip(0)
    rows, columns = torch.arange(height) - height // 2, torch.arange(width) - width // 2
    return tail[torch.maximum(rows.abs()[:, None], columns.abs()[None])]


@functools.lru_cache(64)
def bumps(s):
    """The pattern eta of side s, one bump up and one down, and its transpose: (2,s,s), norm 1."""
    upper, lower = (b / b.norm() for b in (pyramid(s // 2, s), pyramid(s - s // 2, s)))
    eta = torch.cat([upper, -lower])
    eta = (eta / eta.norm()).float()
    return torch.stack([eta, eta.T])


def square(net, x, y, eps, norm, queries, seed, index, tick=None):
    """Square Attack on the margin. Returns (x_adv, fooled)."""
    n, c, _, w = x.shape
    out, fooled = x.clone(), torch.zeros(n, dtype=torch.bool, device=x.device)
    dice = draw(torch.rand, (queries, 5 + c), seed, index, "square")
    ball = Ball(x, eps, norm)
    if norm == "linf":
        first = draw(torch.rand, (c, 1, w), seed, index, "square", "start") > 0.5
        adv = torch.where(first, ball.ball.high, ball.ball.low)
    else:
        adv = ball.project(x + tiles(x, seed, index) * eps)
    margin = torch.full((n,), torch.inf, device=x.device)
    s = Rows(
        row=torch.arange(n, device=x.device), x=x, y=y, ball=ball, best=adv, margin=margin,
        dice=dice,
    )  # fmt: skip
    propose = new_box if norm == "linf" else new_bump
    for query in range(queries):
        new = propose(s, query - 1, eps) if query else s.best
        logits = net.logits(new)
        margin = pick(logits, s.y) - without(logits, s.y).amax(1)
        better = margin < s.margin
        s.best = torch.where(per_image(better, x), new, s.best)
        s.margin = torch.where(better, margin, s.margin)
        now = better & net.fooled(logits, s.y)
        if now.any():
            out[s.row[now]], fooled[s.row[now]] = s.best[now], True
            s.keep(~now)
            if not len(s.row):
                break
        if tick:
            tick((query + 1) / queries)
    out[s.row] = s.best
    return out, fooled


def places(dice, s, length):
    return (dice * (length - s + 1)).long().clamp_(max=length - s)


def new_box(s, query, eps):
    """A window whose channels go to one end of the ball each."""
    h, w = s.x.shape[2:]
    size, dice = side(query, h, w, "linf"), s.dice[:, query]
    rows = windows(places(dice[:, 0], size, h), size, h)
    columns = windows(places(dice[:, 1], size, w), size, w)
    inside = rows[:, None, :, None] & columns[:, None, None, :]
    up = dice[:, 5:, None, None] > 0.5
    return torch.where(inside, torch.where(up, s.ball.ball.high, s.ball.ball.low), s.best)


def tiles(x, seed, index):
    """The start of L2 Square: a grid of 5 x 5 bumps of random signs, (N,C,H,W) of norm 1."""
    c, h, w = x.shape[1:]
    size = max(h // 5, 1)
    across, down = w // size, h // size
    sign = draw(torch.rand, (c, down, across), seed, index, "square", "start") > 0.5
    eta = bumps(size)[0].to(x.device) if size > 1 else torch.ones(1, 1, device=x.device)
    sign = (sign.float() * 2 - 1).repeat_interleave(size, 2).repeat_interleave(size, 3)
    delta = torch.zeros_like(x)
    top, left = (h - down * size) // 2, (w - across * size) // 2
    delta[:, :, top : top + down * size, left : left + across * size] = sign * eta.repeat(
        down, across
    )
    return delta / per_image(lengths(delta, "l2"), x).float()


def new_bump(s, query, eps):
    """Mass moved from one window to another, which takes the form of a bump (Algorithm 3)."""
    n, c, h, w = s.x.shape
    size, dice = side(query, h, w, "l2"), s.dice[:, query]
    where = [places(dice[:, k], size, (h, w)[k % 2]) for k in range(4)]
    span, first = torch.arange(size, device=s.x.device), torch.arange(n, device=s.x.device)

    def patch(top, left):
        rows, columns = top[:, None] + span, left[:, None] + span
        channels = torch.arange(c, device=s.x.device)[None, :, None, None]
        return first[:, None, None, None], channels, rows[:, None, :, None], columns[:, None, None]

    into, out_of = patch(*where[:2]), patch(*where[2:])
    delta = s.best - s.x
    norm = (2, 3)
    old = delta[into]
    both = [
        windows(top, size, h)[:, None, :, None] & windows(left, size, w)[:, None, None]
        for top, left in (where[:2], where[2:])
    ]
    there = (delta.square() * (both[0] | both[1])).sum(norm, keepdim=True)
    unused = (eps**2 - delta.square().sum((1, 2, 3), keepdim=True)).clamp_(min=0)
    eta = bumps(size).to(s.x.device)[(dice[:, 4] > 0.5).long()][:, None]
    sign = (dice[:, 5:, None, None] > 0.5).float() * 2 - 1
    bump = eta * sign + old / old.norm(dim=norm, keepdim=True).clamp_(min=1e-12)
    bump *= (there + unused / c).sqrt() / bump.norm(dim=norm, keepdim=True).clamp_(min=1e-12)
    delta[out_of] = 0
    delta[into] = bump
    return s.ball.project(s.x + delta * (eps / per_image(lengths(delta, "l2"), delta)).float())


# --- one attack, checked --------------------------------------------------------------------------


def attack(
    model,
    x,
    y,
    name,
    eps=8.0,
    norm="linf",
    seed=0,
    index=None,
    precision=None,
    alpha=None,
    tick=None,
):
    """Attack images x (N,C,H,W), uint8 or floating point in [0,1], with labels y (N,).

    name: an attack of STEPS, its steps or queries at the end: "pgd-20", "apgd-ce", "square-1000".
    eps: radius in units of 1/255, for both norms. alpha: step size of bim, pgd and cw, likewise.
    seed, index: of the random numbers; index (N,) is 0..N-1 if not given.
    precision: run.Precision of the network during the attack; None is fp32.
    tick: function of the share of the work done, called at every step.

    Returns (x_adv, fooled, facts). x_adv (N,C,H,W) fp32 is in the ball and in [0,1]; fooled (N,):
    misclassified by the unmodified network in fp32 by more than rounding (CLEAR). facts: "zero",
    images whose first gradient was zero; "lost", images that only the faster arithmetic saw
    misclassified; "broken", images fooled by logits that are not finite. Raises UserError as
    common/attacks.py, and for a name that does not exist.
    """
    kind, steps = parse(name)
    x = run.to_float(x).float()
    index = (torch.arange(len(x)) if index is None else index).to(x.device)
    check_arguments(x, y, eps, alpha, steps, norm, "ce", None, 1, True, "eval")
    model = as_fp32(unwrap(model))
    facts = {"zero": 0, "lost": 0, "broken": 0}
    if not len(x):
        return x.clone(), torch.zeros(0, dtype=torch.bool, device=x.device), facts
    with victim(model, x, precision) as net:
        loss = {"apgd-t": "dlr", "apgd-dlr": "dlr"}.get(kind, "ce")
        check_values(x, y, loss, y if kind == "apgd-t" else None, net.classes)
        x = x.contiguous(memory_format=net.layout)
        if kind in ("fgsm", "bim", "pgd", "cw"):
            settings = kind, steps, eps, alpha, norm, seed, index, precision
            adv, claimed = plain(model, x, y, *settings, net, tick), None
        else:
            with prepared(net.plan, net.dtype):
                adv, claimed = search(net, x, y, kind, steps, eps / 255, norm, seed, index, tick)
        facts["zero"] = net.zero
    lead, scale = judge(model, adv, y)
    fooled = lead > CLEAR[x.device.type] * scale
    facts["broken"] = int((lead == torch.inf).sum())
    facts["lost"] = 0 if claimed is None else int((claimed & ~fooled).sum())
    return adv, fooled, facts


def plain(model, x, y, kind, steps, eps, alpha, norm, seed, index, precision, net, tick):
    """Attacks that are settings of `pgd`: x_adv."""
    noise, alpha = None, None if kind == "fgsm" else alpha
    if kind in ("pgd", "cw"):

        def ball(shape, generator):
            return unit_noise((1, *shape), norm, generator)[0]

        noise = draw(ball, x.shape[1:], seed, index, kind)
    parts = []
    for begin in range(0, len(x), net.chunk):
        rows = slice(begin, begin + net.chunk)
        adv, stats = pgd(
            model, x[rows], y[rows], eps, alpha, steps, norm, "cw" if kind == "cw" else "ce",
            random_start=noise is not None, noise=None if noise is None else noise[rows],
            precision=precision, check=False, return_stats=True,
        )  # fmt: skip
        parts.append(adv)
        net.zero += int(stats["still"].sum())
        if tick:
            tick(min(1, (begin + net.chunk) / len(x)))
    return torch.cat(parts)


def search(net, x, y, kind, steps, eps, norm, seed, index, tick):
    """The attacks of this module: (x_adv, fooled)."""
    if kind == "mim":
        return mim(net, x, y, eps, norm, steps, tick=tick)
    if kind == "square":
        return square(net, x, y, eps, norm, steps, seed, index, tick)
    if kind in ("apgd-ce", "apgd-dlr"):
        loss = ce_loss if kind == "apgd-ce" else dlr_loss
        noise = start_noise(x, norm, seed, index, kind)
        return apgd(net, x, y, eps, norm, steps, loss, noise, tick=tick)

    def attempt(rows, target, k, tick):
        if kind == "apgd-t":
            noise = start_noise(x[rows], norm, seed, index[rows], kind, k)
            return apgd(net, x[rows], y[rows], eps, norm, steps, dlr_loss, noise, target, tick)
        adv, size = fab(net, x[rows], y[rows], eps, norm, steps, target, tick)
        return torch.where(per_image(size <= eps, x), adv, x[rows]), size <= eps

    return towards_each(net, x, y, attempt, tick)
