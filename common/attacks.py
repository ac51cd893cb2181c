"""Projected gradient descent (PGD) on images in [0,1], in mixed precision.

    x_adv = pgd(model, x, y, eps=8, steps=10, precision=run.Precision("bf16", device))

Sources: FGSM, Goodfellow et al. 2015; PGD, Madry et al. 2018; the random single step ("fast FGSM"),
Wong et al. 2020; the CW loss, Carlini & Wagner 2017; the DLR loss, Croce & Hein 2020.

The arithmetic of the attack (perturbation, projection, loss) is fp32 whatever the precision of the
network. What is returned lies inside the ball and inside [0,1] in exact arithmetic, not only up to
rounding. The network is left as it was found: mode of every submodule, `requires_grad` flags,
buffers, no parameter has a new `.grad`.

Speed comes from asking for the gradient of the input alone, from channels_last, from converting
weights once per attack instead of once per step, and from folding BatchNorm, which is affine in
eval mode, into the convolution before it. On a GPU `capture=True` replays one CUDA graph per step.
"""

import contextlib
import functools
import weakref
from collections import Counter

import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from common.run import UserError, eval_mode

FP16_SCALE = 256.0  # of the loss under fp16: smaller gradients would underflow to a sign of 0
CW_CONFIDENCE = 50.0  # logit margin beyond which the CW loss stops pushing, as NoFrost's

# --- losses to maximise: logits (N,K), labels (N,), targets (N,) or None -> (N,) ------------------


def without(logits, label):
    """The logits with the entry `label` (N,) of each row at minus infinity."""
    return logits.scatter(1, label[:, None], -torch.inf)


def pick(logits, label):
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


def dlr_loss(logits, y, target=None):
    """Difference of logits ratio, invariant to their scale (Croce & Hein 2020, eq. 6 and 7)."""
    top = logits.topk(3 if target is None else 4, dim=1).values
    if target is not None:
        spread = top[:, 0] - (top[:, 2] + top[:, 3]) / 2
        return (pick(logits, target) - pick(logits, y)) / (spread + 1e-12)
    margin = without(logits, y).amax(1) - pick(logits, y)
    return margin / (top[:, 0] - top[:, 2] + 1e-12)


LOSSES = {"ce": ce_loss, "cw": cw_loss, "dlr": dlr_loss}

# --- the network during an attack -----------------------------------------------------------------


def unwrap(model):
    """The network inside DistributedDataParallel, DataParallel and torch.compile: an attack must
    not run the hooks of gradient exchange, nor recompile for eval mode."""
    while True:
        if isinstance(model, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
            model = model.module
        elif hasattr(model, "_orig_mod"):
            model = model._orig_mod
        else:
            return model


@contextlib.contextmanager
def frozen(model, mode="eval"):
    """The unwrapped network in `mode`, without parameter gradients; then everything as before.

    In train mode BatchNorm normalises by the batch and writes its running statistics; it is given
    copies to write, because restoring the values in place would count as a modification and break
    a backward pass that is still to come.
    """
    net = unwrap(model)
    modes = [(module, module.training) for module in net.modules()]
    flags = [(parameter, parameter.requires_grad) for parameter in net.parameters()]
    buffers = []
    try:
        net.train(mode == "train")
        for parameter, _ in flags:
            parameter.requires_grad_(False)
        if mode == "train":
            for module, _ in modes:
                for name, buffer in module._buffers.items():
                    if buffer is not None:
                        buffers.append((module, name, buffer))
                        module._buffers[name] = buffer.clone()
        yield net
    finally:
        for module, name, buffer in buffers:
            module._buffers[name] = buffer
        for module, training in modes:
            module.training = training
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


class Uses(TorchFunctionMode):
    """Counts the torch functions that made a tensor out of each tensor in `watched`."""

    def __init__(self):
        super().__init__()
        self.watched, self.count = {}, Counter()  # id -> tensor, held so that ids stay unique

    def __torch_function__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if any(isinstance(leaf, torch.Tensor) for leaf in tree_leaves(result)):
            for leaf in tree_leaves((args, kwargs)):
                if id(leaf) in self.watched:
                    self.count[id(leaf)] += 1
        return result


def is_plain(module, kind):
    """True for a layer of exactly this class whose forward nothing else takes part in."""
    hooked = module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module)
    return type(module) is kind and not hooked


def probe(net, x):
    """Run one image x (1,...) and look at it. Returns (classes, plan, layout).

    plan: {conv: (norm, layout)} for the plain convolutions called once; `norm` is the BatchNorm
    that alone reads the output, or None. layout: channels_last, unless the network cannot take it
    (it may call `view`).
    """
    convs = [m for m in net.modules() if is_plain(m, nn.Conv2d) and m.padding_mode == "zeros"]
    norms = [m for m in net.modules() if is_plain(m, nn.BatchNorm2d) and m.running_var is not None]
    calls, outs, read, uses = Counter(), {}, {}, Uses()

    def after_conv(conv, args, out):
        calls[conv] += 1
        outs[id(out)], uses.watched[id(out)] = conv, out

    def after_norm(norm, args, out):
        calls[norm] += 1
        if id(args[0]) in outs:  # asked now: of a tensor that is not held, the id is used again
            read[norm] = id(args[0])

    hooks = [m.register_forward_hook(after_conv) for m in convs]
    hooks += [m.register_forward_hook(after_norm) for m in norms]
    layout = torch.channels_last if x.ndim == 4 else torch.contiguous_format
    try:
        with eval_mode(net), torch.no_grad(), uses:
            try:
                logits = net(x.contiguous(memory_format=layout))
            except RuntimeError as error:
                if "view" not in str(error):
                    raise
                layout = torch.contiguous_format
                for seen in (calls, outs, read):
                    seen.clear()
                logits = net(x.contiguous())
    finally:
        for hook in hooks:
            hook.remove()
    plan = {}
    for out, conv in outs.items():
        if calls[conv] == 1:
            # oneDNN is up to 1.6 times faster on maps of 4x4 in its own blocked layout
            small = not x.is_cuda and uses.watched[out][0, 0].numel() <= 16
            plan[conv] = (None, torch.contiguous_format if small else layout)
    for norm, out in read.items():
        conv = outs[out]
        if conv in plan and calls[norm] == 1 and uses.count[out] == 1:
            plan[conv] = (norm, plan[conv][1])
    return logits.shape[1], plan, layout


def folded(conv, norm):
    """Weight and bias, fp32, of the convolution that equals `conv` followed by `norm` in eval."""
    weight, bias = conv.weight.detach(), None if conv.bias is None else conv.bias.detach()
    if norm is None:
        return weight, bias
    scale = (norm.running_var + norm.eps).rsqrt()
    if norm.weight is not None:
        scale = scale * norm.weight.detach()
    shift = -norm.running_mean if bias is None else bias - norm.running_mean
    shift = shift * scale
    if norm.bias is not None:
        shift = shift + norm.bias.detach()
    return weight * scale.view(-1, 1, 1, 1), shift


@contextlib.contextmanager
def prepared(plan, dtype):
    """Inside, the convolutions of `plan` run with weights folded, cast and laid out once.

    The one that reads the images stays fp32: in bf16 (steps of 1/256 below 1) they would be rounded
    more coarsely than a small perturbation moves them. It is 1% of the work.

    Yields a function that writes the present parameters into the weights in use.
    """
    used = {}

    def patch(conv, norm, layout):
        weight, bias = folded(conv, norm)
        inner = torch.float32 if conv.in_channels <= 4 else dtype
        weight = weight.to(inner).contiguous(memory_format=layout)
        bias = None if bias is None else bias.to(inner)
        used[conv] = weight, bias
        rest = conv.stride, conv.padding, conv.dilation, conv.groups

        def forward(x):
            x = x.contiguous(memory_format=layout)
            if inner == dtype:
                return F.conv2d(x, weight, bias, *rest)
            with torch.autocast(x.device.type, enabled=False):
                return F.conv2d(x.float(), weight, bias, *rest).to(dtype)

        conv.forward = forward
        if norm is not None:
            norm.forward = lambda x: x

    def refresh():
        for conv, (norm, _) in plan.items():
            for old, new in zip(used[conv], folded(conv, norm), strict=True):
                if old is not None:
                    old.copy_(new)

    try:
        for conv, (norm, layout) in plan.items():
            patch(conv, norm, layout)
        yield refresh
    finally:
        for conv, (norm, _) in plan.items():
            vars(conv).pop("forward", None)
            if norm is not None:
                vars(norm).pop("forward", None)


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
    step of fp32 nearer, so the bounds hold exactly (fp64 holds the difference of two of fp32)."""

    def __init__(self, x, eps, alpha):
        self.x, self.eps, self.alpha = x, below(eps), alpha
        self.low, self.high = torch.empty_like(x), torch.empty_like(x)

    def centre(self):
        """Take in new values of x."""
        for bound, eps in ((self.low, -self.eps), (self.high, self.eps)):
            torch.add(self.x, eps, out=bound)
            outside = (bound.double() - self.x).abs_() > self.eps
            bound.copy_(torch.where(outside, torch.nextafter(bound, self.x), bound)).clamp_(0, 1)

    def start(self, adv, noise):
        torch.add(self.x, noise, alpha=self.eps, out=adv).clamp_(self.low, self.high)

    def step(self, adv, grad):
        """Moves `adv` in place; returns how many entries of each image had no direction (zero,
        NaN), (N,)."""
        adv.add_(grad.sign_(), alpha=self.alpha).clamp_(self.low, self.high)
        return grad[0].numel() - grad.flatten(1).count_nonzero(1)


class L2:
    """Ball ||x_adv - x||_2 <= eps, cut with [0,1]. Norms are summed in fp64, and every entry is
    rounded towards x, so the bound holds exactly."""

    def __init__(self, x, eps, alpha):
        self.x, self.eps, self.alpha = x, eps * (1 - 1e-6), alpha
        self.dims = tuple(range(1, x.ndim))

    def centre(self):
        pass

    def length(self, delta):
        return torch.linalg.vector_norm(delta, dim=self.dims, keepdim=True, dtype=torch.float64)

    def project(self, adv, delta):
        shrink = (self.eps / self.length(delta)).clamp_(max=1).float()
        torch.nextafter(delta.mul_(shrink).add_(self.x), self.x, out=adv).clamp_(0, 1)

    def start(self, adv, noise):
        self.project(adv, noise * self.eps)

    def step(self, adv, grad):
        grad.nan_to_num_(0, 0, 0)
        nothing = grad[0].numel() - grad.flatten(1).count_nonzero(1)
        grad.mul_((self.alpha / self.length(grad).clamp_(min=1e-30)).float())
        self.project(adv, grad.add_(adv).sub_(self.x))
        return nothing


BALLS = {"linf": Linf, "l2": L2}

# --- the loop -------------------------------------------------------------------------------------


class Loop:
    """The tensors of one attack on a batch, and its step, which is free of host syncs."""

    def __init__(self, net, x, y, target, ball, loss, autocast):
        self.classes, self.plan, layout = probe(net, x[:1])
        self.x = torch.empty_like(x).contiguous(memory_format=layout)
        self.adv = torch.empty_like(self.x)
        self.ball, self.loss, self.autocast = ball(self.x), loss, autocast
        self.y, self.target = y.clone(), None if target is None else target.clone()
        self.total = torch.zeros((), device=x.device)  # loss at the last gradient, summed
        self.nothing = torch.zeros(len(x), dtype=torch.int64, device=x.device)
        with autocast():
            low = torch.is_autocast_enabled(x.device.type)
            self.dtype = torch.get_autocast_dtype(x.device.type) if low else torch.float32
        self.scale = FP16_SCALE if self.dtype == torch.float16 else 1.0

    def load(self, x, y, target):
        self.x.copy_(x)
        self.y.copy_(y)
        if target is not None:
            self.target.copy_(target)
        self.ball.centre()
        self.nothing.zero_()

    def start(self, noise):
        """Begin at the images, or at noise (N,...) in the unit ball."""
        if noise is None:
            self.adv.copy_(self.x).clamp_(0, 1)
        else:
            self.ball.start(self.adv, noise.to(self.adv))

    def step(self, net):
        self.adv.requires_grad_(True)
        with torch.enable_grad():
            with self.autocast():
                logits = net(self.adv)
            total = self.loss(logits.float(), self.y, self.target).sum()
            if not total.requires_grad:
                raise UserError("nothing to attack: the model detaches its output from its input")
            (grad,) = torch.autograd.grad(total * self.scale, self.adv)
        self.adv.requires_grad_(False)
        self.total.copy_(total)
        self.nothing += self.ball.step(self.adv, grad)

    def run(self, net, steps):
        with prepared(self.plan, self.dtype):
            for _ in range(steps):
                self.step(net)


GRAPHS = weakref.WeakKeyDictionary()  # network -> {key: Captured}


class Captured(Loop):
    """A loop whose step is one CUDA graph. The graph reads the parameters where they lay at its
    capture, so it is used again only while they still lie there (`key`)."""

    graph = None

    @staticmethod
    def key(net, *settings):
        tensors = [*net.parameters(), *net.buffers()]
        return (*settings, *(tensor.data_ptr() for tensor in tensors))

    def capture(self, net):
        begin = self.adv.clone()
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # cuDNN chooses its kernels before the capture
            for _ in range(3):
                self.step(net)
        torch.cuda.current_stream().wait_stream(side)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.step(net)
        self.adv.copy_(begin)
        self.nothing.zero_()

    def run(self, net, steps):
        if self.graph is None:
            with prepared(self.plan, self.dtype) as self.refresh:
                self.capture(net)
        self.refresh()
        for _ in range(steps):
            self.graph.replay()


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
    most = 255.0 if norm == "linf" else 255.0 * x[:1].numel() ** 0.5  # across the whole box
    if not 0 < eps <= most:
        raise UserError(f"eps {eps} is not in (0, {most:.5g}]: it is given in pixel units of 1/255")
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
    capture=False,
    check=True,
    return_stats=False,
):
    """Adversarial images by projected gradient ascent on the loss, a tensor like x.

    model: logits (N,K) of images in [0,1]. x: (N,...) float32 in [0,1]. y: (N,) labels.
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
    capture: on a GPU, in eval mode, run each step as a CUDA graph, kept for later calls.
    check: look at the values of x, y and target, which is a host sync before the loop.
    return_stats: also return {"zero_grad": share of the gradient's entries, over all steps, that
        were zero or NaN; "loss": mean loss at the last gradient}, 0-d tensors, and "still": (N,)
        bool, images without any gradient at any step, which never left their starts.

    Raises UserError for arguments out of range, images outside [0,1], labels beyond the logits.
    """
    check_arguments(x, y, eps, alpha, steps, norm, loss, target, restarts, random_start, mode)
    if not len(x):
        return (x.clone(), {}) if return_stats else x.clone()
    alpha = default_alpha(eps, steps) if alpha is None else alpha
    ball = functools.partial(BALLS[norm], eps=eps / 255, alpha=alpha / 255)
    objective = LOSSES[loss] if isinstance(loss, str) else loss
    fp32 = functools.partial(torch.autocast, x.device.type, enabled=False)
    autocast = fp32 if precision is None else precision.autocast
    if noise is not None and noise.numel() != restarts * x.numel():
        raise UserError(f"noise {tuple(noise.shape)} is not {restarts} times {tuple(x.shape)}")
    if noise is not None:
        noise = noise.reshape(restarts, *x.shape)
    with torch.inference_mode(False), torch.no_grad(), fp32(), frozen(model, mode) as net:
        kind, graphs, key = Loop, {}, None
        if capture and x.is_cuda and mode == "eval":
            kind, graphs = Captured, GRAPHS.setdefault(net, {})
            form = x.shape, y.shape, y.dtype, target is None
            key = Captured.key(net, form, norm, eps, alpha, loss, getattr(precision, "dtype", None))
        if key not in graphs:
            graphs[key] = kind(net, x.detach(), y, target, ball, objective, autocast)
        loop = graphs[key]
        if mode == "train":
            loop.plan = {}
        if check:
            check_values(x, y, loss, target, loop.classes)
        loop.load(x, y, target)
        best = None
        for i in range(restarts):
            if noise is not None:
                loop.start(noise[i])
            else:
                loop.start(unit_noise(x.shape, norm, generator, x.device) if random_start else None)
            loop.run(net, steps)
            if restarts > 1:
                found = severity(net(loop.adv), loop.y, loop.target, objective)
                best = worse(best, (loop.adv, *found))
        x_adv = loop.adv.clone() if best is None else best[0]
        stats = {
            "zero_grad": loop.nothing.sum() / (x.numel() * steps * restarts),
            "still": loop.nothing == x[0].numel() * steps * restarts,
            "loss": loop.total / len(x),
        }
    return (x_adv, stats) if return_stats else x_adv
