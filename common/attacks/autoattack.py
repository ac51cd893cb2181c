"""The attacks that an evaluation needs: AutoAttack's four, their relatives, and a check in fp32.

    accuracy, x_adv = autoattack(model, x, y, eps=8)                 # all of AutoAttack
    x_adv, fooled, facts = attack(model, x, y, "apgd-t", eps=8)      # one attack

Sources: AutoAttack, Croce & Hein 2020 (arXiv 2003.01690); MIM, Dong et al. 2018; CW-inf, Carlini &
Wagner 2017; the order of the targets of apgd-malt, Melamed et al. 2024 (arXiv 2407.02240). The
attacks stand in pgd.py, apgd.py, fab.py and square.py.

APGD and Square stop at an image as soon as it is misclassified, and go on with the others alone.
FAB stops as soon as it is so within eps. Random numbers belong to (seed, attack, index of the
image): a result depends neither on the batch size nor on which other images are attacked. The
network may compute in bf16. In the end the unmodified network decides in fp32 what is
misclassified, and logits that are NaN classify nothing correctly.
"""

import contextlib
import copy
import re

import torch

from common import run
from common.attacks import fastnet, network
from common.attacks.apgd import apgd, mim
from common.attacks.fab import fab
from common.attacks.pgd import (
    LOSSES,
    check_arguments,
    check_values,
    dlr_loss,
    pgd,
    pick,
    unit_noise,
    whole,
    without,
)
from common.attacks.rows import draw, per_image, start_noise
from common.attacks.square import square
from common.run import UserError

STANDARD = ("apgd-ce", "apgd-t", "fab-t", "square")
FAST = ("apgd-ce", "apgd-malt")
STEPS = {  # attack: its gradient steps, or queries, where the name does not end in another number
    "fgsm": 1,
    "bim": 10,
    "pgd": 20,
    "pgd-t": 20,
    "mim": 10,
    "cw": 20,
    "apgd-ce": 100,
    "apgd-dlr": 100,
    "apgd-t": 100,
    "apgd-malt": 100,
    "fab-t": 100,
    "square": 5000,
}
PLAIN = ("fgsm", "bim", "pgd", "pgd-t", "cw")  # settings of `pgd`
CLASSES = {"apgd-dlr": 3, "apgd-t": 4, "apgd-malt": 4}  # that an attack's loss needs, else 2
TARGETS = 9  # classes that pgd-t, APGD-T and FAB-T aim at, the likeliest first
MALT_TARGETS = 5  # classes that apgd-malt aims at, the nearest first
# Lead of a wrong class, of the largest logit: the last bits depend on the batch, on a GPU (not
# measured) on the algorithm too that is chosen for it.
CLEAR = {"cpu": 1e-5, "cuda": 1e-4, "mps": 1e-4, "xpu": 1e-4}
CHUNK = 1 << 18  # numbers per piece of a batch on a CPU, so that its activations stay in the cache


def parse(name):
    """(kind, steps, restarts) of an attack's name: pgd-20, square, apgd-ce-50, pgd-50-10 (50 steps
    from each of 10 starts). Raises UserError."""
    kinds = "|".join(sorted(STEPS, key=len, reverse=True))
    match = re.fullmatch(rf"({kinds})(?:-(\d+))?(?:-(\d+))?", name)
    kind, steps, restarts = match.groups() if match else (None, None, None)
    steps = STEPS.get(kind, 0) if steps is None else int(steps)
    again = restarts is not None
    restarts = int(restarts) if again else 1
    named = name != kind
    if not steps or not restarts or (kind == "fgsm" and named):
        known = ", ".join(STEPS)
        raise UserError(f"there is no attack {name!r}: choose from {known}; steps as in pgd-20")
    if again and kind not in ("pgd", "cw"):
        raise UserError(f"{name!r}: only pgd and cw have restarts, as in pgd-50-10")
    return kind, steps, restarts


# --- the network under attack ---------------------------------------------------------------------


@contextlib.contextmanager
def algorithms(benchmark=False, deterministic=False, tf32=False):
    """Inside, cuDNN chooses its algorithms so. It is without effect on a CPU.

    Attacks drop images as they fall, so batches have many sizes. With `benchmark` each size would
    be timed anew.
    """
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    before = cudnn.benchmark, cudnn.deterministic, cudnn.allow_tf32, matmul.allow_tf32
    try:
        cudnn.benchmark, cudnn.deterministic = benchmark, deterministic
        cudnn.allow_tf32 = matmul.allow_tf32 = tf32
        yield
    finally:
        cudnn.benchmark, cudnn.deterministic, cudnn.allow_tf32, matmul.allow_tf32 = before


class Victim:
    """Logits and input gradients of a prepared network for images (N,...) fp32, piece by piece."""

    def __init__(self, net, x):
        self.net = net
        self.classes, self.layout, self.dtype = net.classes, net.layout, net.dtype
        self.chunk = chunk_of(x)
        self.clear = CLEAR[x.device.type] if net.dtype == torch.float32 else 0.01
        self.zero = 0  # images whose first gradient was zero
        self.forward = 0  # images that passed the network
        self.backward = 0

    def logits(self, x):
        self.forward += len(x)
        return torch.cat([self.net(part) for part in x.split(self.chunk)])

    def gradient(self, x, loss, *labels):
        """(logits (N,K), loss (N,), gradient like x) of loss(logits, *labels) -> (N,)."""
        pieces = []
        self.forward += len(x)
        self.backward += len(x)
        for begin in range(0, len(x), self.chunk):
            rows = slice(begin, begin + self.chunk)
            part = x[rows].detach().requires_grad_()
            with torch.enable_grad():
                logits = self.net(part)
                value = loss(logits, *(None if v is None else v[rows] for v in labels))
                (grad,) = torch.autograd.grad(value.sum() * self.net.scale, part)
            grad = grad.nan_to_num(0, 0, 0).div_(self.net.scale)
            pieces.append((logits.detach(), value.detach(), grad))
        return tuple(torch.cat(p) for p in zip(*pieces, strict=True))

    def count_zero(self, grad):
        """Take note of the images without a gradient; `grad` is the first of an attack."""
        self.zero += int((grad.flatten(1).abs().amax(1) == 0).sum())

    def fooled(self, logits, y):
        """(N,) bool: another class than the label leads by more than rounding."""
        lead, scale = lead_of_wrong(logits, y)
        return lead > self.clear * scale


def chunk_of(x):
    """Images per piece of a batch like x."""
    return max(8, CHUNK // x[0].numel()) if x.device.type == "cpu" else 1 << 30


def as_fp32(model):
    """The model, or its copy in fp32 where it is of another dtype."""
    same = all(p.dtype == torch.float32 for p in model.parameters() if p.is_floating_point())
    return model if same else copy.deepcopy(model).float()


@contextlib.contextmanager
def victim(model, x, precision=None, eot=1):
    """The network of `model`, prepared for images like x, as a Victim; afterwards it is as it
    was. eot: passes of a random network, of which the mean is attacked."""
    tf32 = getattr(precision, "name", None) == "tf32"
    model = as_fp32(network.unwrap(model))
    with algorithms(tf32=tf32), fastnet.prepared(model, x, precision, eot=eot) as net:
        yield Victim(net, x)


def lead_of_wrong(logits, y):
    """By how much the label trails the best other class, (N,), above 0 is misclassified, and the
    largest logit, (N,), the measure of rounding. Where logits are NaN, or infinite beside one
    another, no class leads and none is right: infinity and 0."""
    lead, scale = without(logits, y).amax(1) - pick(logits, y), logits.abs().amax(1)
    return lead.nan_to_num(torch.inf, torch.inf, -torch.inf), scale.nan_to_num(0, 0, 0)


@torch.inference_mode()
def logits_in_fp32(model, x, batch_size=500, eot=1):
    """Logits (N,K) of images x (N,...), uint8 or float, by the network as it is, in eval mode.

    fp32, and on a GPU the same algorithms at every batch size. eot: the mean of so many passes.
    """
    net = as_fp32(network.unwrap(model))
    fp32 = torch.autocast(x.device.type, enabled=False)
    with run.eval_mode(net), fp32, algorithms(deterministic=True):
        parts = []
        for part in x.split(batch_size):
            images = run.to_float(part)
            total = fastnet.logits_of(net(images))
            for _ in range(eot - 1):
                total = total + fastnet.logits_of(net(images))
            parts.append(total / eot if eot > 1 else total)
        return torch.cat(parts)


def judge(model, x, y, batch_size=500, eot=1):
    """`lead_of_wrong` of images (N,...) to the network as it is, in fp32."""
    return lead_of_wrong(logits_in_fp32(model, x, batch_size, eot), whole(y))


# --- targets --------------------------------------------------------------------------------------


def likeliest(net, x, y, count):
    """The wrong classes of the highest logits, (N,count)."""
    return without(net.logits(x), y).topk(count, dim=1).indices


def nearest_classes(net, x, y, count):
    """The wrong classes that a linear network would reach by the shortest step, (N,count), as MALT:
    by (z_y - z_t) / ||d(z_y - z_t)/dx||_1 of the 9 likeliest."""
    order = likeliest(net, x, y, min(TARGETS, net.classes - 1))
    ratio = []
    for k in range(order.shape[1]):
        _, lead, grad = net.gradient(x, lambda z, a, b: pick(z, a) - pick(z, b), y, order[:, k])
        ratio.append(lead / grad.flatten(1).abs().sum(1).clamp(min=1e-30))
    first = torch.stack(ratio, 1).topk(count, dim=1, largest=False).indices
    return order.gather(1, first)


def towards_each(net, x, y, attempt, tick=None, ranked=likeliest, most=TARGETS):
    """Run attempt(rows, target, k, tick) -> (x_adv, fooled) for one target after the other.

    The first target is the likeliest wrong class of the clean image, the second the next. Each is
    tried on the rows still standing."""
    count = min(most, net.classes - 1)
    order = ranked(net, x, y, count)
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
    eot=1,
):
    """Attack images x (N,C,H,W), uint8 or floating point in [0,1], with labels y (N,).

    model: a module or a function from images to logits (N,K), a tuple or a dict with them.
    name: an attack of STEPS, its steps or queries at the end: "pgd-20", "apgd-ce", "square-1000".
    eps: radius in units of 1/255, for both norms. alpha: step size of bim, pgd and cw, likewise.
    seed, index: of the random numbers; index (N,) is 0..N-1 if not given.
    precision: run.Precision of the network during the attack; None is fp32.
    tick: function of the share of the work done, called at every step.
    eot: passes of a random network, whose mean logits are attacked and judged.

    Returns (x_adv, fooled, facts). x_adv (N,C,H,W) fp32 is in the ball and in [0,1]; fooled (N,):
    misclassified by the unmodified network in fp32 by more than rounding (CLEAR). facts: "zero",
    images whose first gradient was zero; "lost", images that only the faster arithmetic saw
    misclassified; "broken", images fooled by logits that are not finite; "forward" and "backward",
    passes of one image through the network. Raises UserError as pgd.py, and for a name that does
    not exist.
    """
    kind, steps, restarts = parse(name)
    x = run.to_float(x).float()
    index = (torch.arange(len(x)) if index is None else index).to(x.device)
    check_arguments(x, y, eps, alpha, steps, norm, "ce", None, 1, random_start=True, mode="eval")
    y = whole(y)
    model = as_fp32(network.unwrap(model))
    facts = {"zero": 0, "lost": 0, "broken": 0, "forward": 0, "backward": 0}
    if not len(x):
        return x.clone(), torch.zeros(0, dtype=torch.bool, device=x.device), facts
    with victim(model, x, precision, eot) as net:
        loss = "dlr" if kind in CLASSES else "ce"
        check_values(x, y, loss, y if CLASSES.get(kind) == 4 else None, net.classes)
        x = network.normal(x).contiguous(memory_format=net.layout)
        y = network.normal(y)
        if kind not in PLAIN:
            adv, claimed = search(net, x, y, kind, steps, eps / 255, norm, seed, index, tick)
            facts["zero"] = net.zero
            facts["forward"] = net.forward * eot
            facts["backward"] = net.backward * eot
    if kind in PLAIN:
        tf32 = getattr(precision, "name", None) == "tf32"
        with algorithms(tf32=tf32):
            settings = {"eps": eps, "norm": norm, "steps": steps, "precision": precision}
            settings |= {"alpha": None if kind == "fgsm" else alpha, "eot": eot}
            adv = plain(model, x, y, kind, restarts, settings, seed, index, facts, tick)
        claimed = None
    lead, scale = judge(model, adv, y, eot=eot)
    fooled = lead > CLEAR[x.device.type] * scale
    facts["broken"] = int((lead == torch.inf).sum())
    facts["lost"] = 0 if claimed is None else int((claimed & ~fooled).sum())
    return adv, fooled, facts


def plain(model, x, y, kind, restarts, settings, seed, index, facts, tick):
    """Attacks that are settings of `pgd`: x_adv. `facts` takes their counts."""

    def ball(shape, generator):
        return unit_noise((1, *shape), settings["norm"], generator)[0]

    noise = None
    if kind not in ("fgsm", "bim"):
        keys = [(kind,), *((kind, r) for r in range(1, restarts))]
        noise = torch.stack([draw(ball, x.shape[1:], seed, index, *key) for key in keys])
    loss = "cw" if kind in ("cw", "pgd-t") else "ce"
    steps = settings["steps"]

    def climb(rows, target=None, tick=None):
        """The attack on the images `rows` (N,), piece by piece: (x_adv, images left still)."""
        parts, still, size = [], 0, chunk_of(x)
        for part in rows.split(size):
            adv, stats = pgd(
                model, x[part], y[part], loss=loss, restarts=restarts, check=False,
                target=None if target is None else target[part],
                noise=None if noise is None else noise[:, part],
                random_start=noise is not None, return_stats=True, **settings,
            )  # fmt: skip
            parts.append(adv)
            still += int(stats["still"].sum())
            passes = len(part) * steps * restarts * settings["eot"]
            facts["forward"] += passes
            facts["backward"] += passes
            if tick:
                tick(min(1, (len(parts) * size) / len(rows)))
        return torch.cat(parts), still

    every = torch.arange(len(x), device=x.device)
    if kind != "pgd-t":
        adv, facts["zero"] = climb(every, tick=tick)
        return adv
    with victim(model, x, settings["precision"], settings["eot"]) as net:
        order = likeliest(net, x, y, min(TARGETS, net.classes - 1))
    out, standing = x.clone(), every
    for k in range(order.shape[1]):
        adv, still = climb(standing, order[:, k])
        out[standing] = adv
        facts["zero"] = still if not k else facts["zero"]
        lead, scale = judge(model, adv, y[standing], eot=settings["eot"])
        standing = standing[lead <= CLEAR[x.device.type] * scale]
        if tick:
            tick((k + 1) / order.shape[1])
        if not len(standing):
            break
    return out


def search(net, x, y, kind, steps, eps, norm, seed, index, tick):
    """The attacks that drop images as they fall: (x_adv, fooled)."""
    if kind == "mim":
        return mim(net, x, y, eps, norm, steps, tick=tick)
    if kind == "square":
        return square(net, x, y, eps, norm, steps, seed, index, tick)
    if kind in ("apgd-ce", "apgd-dlr"):
        loss = LOSSES[kind.removeprefix("apgd-")]
        noise = start_noise(x, norm, seed, index, kind)
        return apgd(net, x, y, eps, norm, steps, loss, noise, tick=tick)

    def attempt(rows, target, k, tick):
        if kind == "fab-t":
            adv, size = fab(net, x[rows], y[rows], eps, norm, steps, target, tick)
            return torch.where(per_image(size <= eps, x), adv, x[rows]), size <= eps
        noise = start_noise(x[rows], norm, seed, index[rows], kind, k)
        return apgd(net, x[rows], y[rows], eps, norm, steps, dlr_loss, noise, target, tick)

    if kind == "apgd-malt":
        return towards_each(net, x, y, attempt, tick, nearest_classes, MALT_TARGETS)
    return towards_each(net, x, y, attempt, tick)


# --- all of them ----------------------------------------------------------------------------------


def autoattack(model, x, y, eps=8.0, norm="linf", attacks=STANDARD, batch_size=250, **settings):
    """Robust accuracy (%) of a model and adversarial images, by AutoAttack.

    >>> net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 8 * 8, 10))
    >>> x, y = torch.rand(4, 3, 8, 8), torch.arange(4)
    >>> accuracy, x_adv = autoattack(net, x, y, eps=8)
    >>> x_adv.shape, float((x_adv - x).abs().max()) <= 8 / 255
    (torch.Size([4, 3, 8, 8]), True)

    model: a module in any mode, or a function, of images in [0,1]. It returns logits (N,K), a tuple
    that begins with them, or a dict with the key "logits". x: (N,C,H,W) uint8, or floating point
    in [0,1]. y: (N,) labels of any integer type. eps: in units of 1/255 for both norms. attacks:
    their names, each attacks what those before left standing. settings: seed, precision, alpha,
    eot as in `attack`.

    The images (N,C,H,W), fp32, are the adversarial ones where one was found, else those given.
    Raises UserError as `attack`; the standard attacks need 4 classes.
    """
    x = run.to_float(x).float()
    y = whole(y).to(x.device)
    x_adv, standing = x.clone(), torch.zeros(0, dtype=torch.int64, device=x.device)
    if len(x):
        lead, _ = judge(model, x, y, batch_size, settings.get("eot", 1))
        standing = (lead <= 0).nonzero()[:, 0]
    for name in attacks:
        left = []
        for rows in standing.split(batch_size) if len(standing) else ():
            adv, fooled, _ = attack(
                model, x[rows], y[rows], name, eps, norm, index=rows, **settings
            )
            x_adv[rows[fooled]] = adv[fooled]
            left.append(rows[~fooled])
        standing = torch.cat(left) if left else standing
    return 100 * len(standing) / max(len(x), 1), x_adv
