"""What makes an attack fast: the network is frozen, folded, cast and laid out once per attack.

    with fastnet.prepared(model, x, precision) as net:
        logits = net(adv)                      # fp32, with a gradient towards adv

BatchNorm is affine in eval mode, so it is folded into the convolution before it. Weights are cast
and laid out in channels_last once per attack, not once per step. Standardised convolutions (the
norm-free networks) are standardised once. On a GPU a `Graphs` replays the forward and the backward
pass as CUDA graphs.

Afterwards the network is as it was found: the mode of every submodule, `requires_grad` flags and
buffers. No parameter has a new `.grad`.
"""

import contextlib
import functools
import weakref
from collections import Counter, OrderedDict

import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from common import models
from common.attacks.network import frozen
from common.run import UserError, eval_mode, logits_of

FP16_SCALE = 256.0  # of the loss under fp16: smaller gradients would underflow to a sign of 0


# --- one look at the network ----------------------------------------------------------------------


class Uses(TorchFunctionMode):
    """Counts the torch functions that made a tensor out of each tensor in `watched`."""

    def __init__(self):
        super().__init__()
        self.watched = {}  # id -> tensor, held so that ids stay unique
        self.count = Counter()

    def __torch_function__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if any(isinstance(leaf, torch.Tensor) for leaf in tree_leaves(result)):
            for leaf in tree_leaves((args, kwargs)):
                if id(leaf) in self.watched:
                    self.count[id(leaf)] += 1
        return result


def is_plain(module):
    """True for a module whose forward no hook and no patch takes part in."""
    return not (module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module))


def is_convolution(module):
    """True for a convolution that can run with prepared weights."""
    kinds = nn.Conv2d, models.ScaledStdConv2d
    return type(module) in kinds and is_plain(module) and module.padding_mode == "zeros"


def is_norm(module):
    """True for a BatchNorm with running statistics, whatever its class adds for training."""
    kind = nn.modules.batchnorm._BatchNorm
    return isinstance(module, kind) and is_plain(module) and module.running_var is not None


# In eval mode these are nn.BatchNorm2d, whatever the numbers in them are.
AFFINE = nn.BatchNorm2d, nn.SyncBatchNorm, models.BatchNorm, models.NoisyBatchNorm


def is_affine(norm, x, out):
    """True where the output `out` is that of nn.BatchNorm2d in eval mode for the input x.

    Classes that are not known are asked by value: in eval mode most of them do what BatchNorm does.
    On a GPU the host waits for the answer.
    """
    if type(norm) in AFFINE:
        return True
    statistics = norm.running_mean, norm.running_var, norm.weight, norm.bias
    return torch.equal(out, F.batch_norm(x, *statistics, training=False, eps=norm.eps))


SEEN = weakref.WeakKeyDictionary()  # network -> (what a look depends on, what it found)


def state_of(net):
    """The modules of a network: their classes, which tensors they hold, numbers, names and flags.

    None for a network whose look depends on more: on hooks, on patches, on the values in a norm.
    """
    plain = bool, int, float, str, type(None)
    modules = list(net.modules())
    if any(not is_plain(m) or (is_norm(m) and type(m) not in AFFINE) for m in modules):
        return None
    state = []
    for m in modules:
        tensors = [*m._parameters.items(), *m._buffers.items()]
        held = [(name, tensor is not None) for name, tensor in tensors]
        values = [item for item in vars(m).items() if type(item[1]) in plain]
        state.append((weakref.ref(m), type(m), held, values))
    return state


def probe(net, x):
    """What `look` finds, from the memory where network and kind of image are as they were."""
    state = state_of(net)
    if state is None:
        return look(net, x)
    key = x.shape[1:], x.dtype, x.device, state
    if net not in SEEN or SEEN[net][0] != key:
        SEEN[net] = key, look(net, x)
    return SEEN[net][1]


def look(net, x):
    """Run one image x (1,...) and look at it. Returns (classes, plan, layout).

    plan: {conv: (norm, layout)} for the plain convolutions called once. `norm` is the BatchNorm
    that alone reads the output, or None. layout: channels_last, unless the network cannot take it
    (it may call `view`).
    """
    convs = [module for module in net.modules() if is_convolution(module)]
    norms = [module for module in net.modules() if is_norm(module)]
    calls, outs, read, uses = Counter(), {}, {}, Uses()

    def after_conv(conv, args, out):
        calls[conv] += 1
        outs[id(out)] = conv
        uses.watched[id(out)] = out

    def after_norm(norm, args, out):
        calls[norm] += 1
        if id(args[0]) in outs:  # asked now: the id of a tensor that is not held is used again
            used = uses.count[id(args[0])]
            if is_affine(norm, args[0], out):
                read[norm] = id(args[0])
            uses.count[id(args[0])] = used  # the question is no use

    hooks = [module.register_forward_hook(after_conv) for module in convs]
    hooks += [module.register_forward_hook(after_norm) for module in norms]
    layout = torch.channels_last if x.ndim == 4 else torch.contiguous_format
    try:
        with eval_mode(net), torch.no_grad(), uses:
            try:
                logits = logits_of(net(x.contiguous(memory_format=layout)))
            except RuntimeError as error:
                if "view" not in str(error):
                    raise
                layout = torch.contiguous_format
                for seen in (calls, outs, read):
                    seen.clear()
                logits = logits_of(net(x.contiguous()))
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


# --- the plan carried out -------------------------------------------------------------------------


def folded(conv, norm):
    """Weight and bias, fp32, of the convolution that equals `conv` followed by `norm` in eval."""
    standardised = isinstance(conv, models.ScaledStdConv2d)
    weight = (conv.standardized() if standardised else conv.weight).detach()
    bias = None if conv.bias is None else conv.bias.detach()
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


def loose(module, plan):
    """The BatchNorms of a network in eval mode that no convolution of `plan` takes in."""
    taken = {norm for norm, _ in plan.values()}
    return [m for m in module.modules() if is_norm(m) and type(m) in AFFINE and m not in taken]


def affine(norm):
    """Scale and shift (C,), fp32, of a BatchNorm in eval mode."""
    scale = (norm.running_var + norm.eps).rsqrt()
    if norm.weight is not None:
        scale = scale * norm.weight.detach()
    shift = -norm.running_mean * scale
    return scale, shift if norm.bias is None else shift + norm.bias.detach()


@contextlib.contextmanager
def patched(plan, dtype):
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


@contextlib.contextmanager
def as_affine(norms, dtype):
    """Inside, these BatchNorms, in eval mode, run as x * scale + shift.

    That keeps the layout of the gradient. The gradient of cuDNN's BatchNorm in eval mode is NCHW,
    and each one costs two relayouts. Yields a function that writes the present parameters into
    scale and shift.
    """
    used = {}

    def patch(norm):
        scale, shift = used[norm] = tuple(part.to(dtype) for part in affine(norm))

        def forward(x):
            view = (-1,) + (1,) * (x.ndim - 2)
            return torch.addcmul(shift.to(x.dtype).view(view), x, scale.to(x.dtype).view(view))

        norm.forward = forward

    def refresh():
        for norm in norms:
            for old, new in zip(used[norm], affine(norm), strict=True):
                old.copy_(new)

    try:
        for norm in norms:
            patch(norm)
        yield refresh
    finally:
        for norm in norms:
            vars(norm).pop("forward", None)


class Net:
    """A network under attack: `net(x)` is logits (N,K), fp32, of images x (N,...) in [0,1]."""

    def __init__(self, module, x, autocast, mode="eval", eot=1):
        self.module = module
        self.autocast = autocast
        self.eot = eot  # passes of a random network, whose mean logits count
        self.classes, self.plan, self.layout = probe(module, x[:1])
        if mode == "train":  # BatchNorm's statistics are those of the attacked batch
            self.plan = {}
        self.norms = loose(module, self.plan) if x.is_cuda and mode == "eval" else []
        self.device = x.device.type
        with autocast():
            low = torch.is_autocast_enabled(self.device)
            self.dtype = torch.get_autocast_dtype(self.device) if low else torch.float32
        self.scale = FP16_SCALE if self.dtype == torch.float16 else 1.0

    def __call__(self, x):
        x = x.contiguous(memory_format=self.layout)
        with self.autocast():
            logits = logits_of(self.module(x))
            if self.eot > 1:
                passes = [logits, *(logits_of(self.module(x)) for _ in range(self.eot - 1))]
                logits = torch.stack(passes).mean(0)
        if x.requires_grad and not logits.requires_grad:
            raise UserError("nothing to attack: the model detaches its output from its input")
        return logits

    @contextlib.contextmanager
    def ready(self):
        """Inside, its layers run as they are prepared. Yields a function that writes the present
        parameters into what they use."""
        with patched(self.plan, self.dtype) as convs, as_affine(self.norms, self.dtype) as norms:
            yield lambda: (convs(), norms())

    @contextlib.contextmanager
    def exact(self):
        """Inside, the network's layers run as they are, in fp32. Yields a function like `net`."""
        own = {}
        for module in self.module.modules():
            if "forward" in vars(module):
                own[module] = vars(module).pop("forward")
        try:
            yield lambda x: logits_of(self.module(x.contiguous(memory_format=self.layout)))
        finally:
            for module, forward in own.items():
                module.forward = forward


# --- CUDA graphs ----------------------------------------------------------------------------------


def record(function, stream):
    """Run `function`, capture it, and return the function that replays it; all on one side stream.

    Autograd remembers the stream on which the images first met the network, and waits for it. That
    must be the stream of the capture.
    """
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        function()  # cuDNN chooses its kernels before the capture
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    try:
        # A thread that pins memory for the loader may work meanwhile: only this thread is watched.
        with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
            function()
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        first = (str(error).strip() or repr(error)).splitlines()[0]
        raise UserError(f"no CUDA graph of this network ({first}): use --no-capture") from error
    return graph.replay


class Replay(torch.autograd.Function):
    """The captured forward pass, and the captured gradient towards the images."""

    @staticmethod
    def forward(ctx, x, net):
        ctx.net = net
        net.x.detach().copy_(x)
        net.run_forward()
        return net.logits.clone()

    @staticmethod
    def backward(ctx, grad):
        ctx.net.towards.copy_(grad)
        ctx.net.run_backward()
        return ctx.net.grad.clone(), None


class Captured(Net):
    """A network whose forward and backward passes on batches like x are CUDA graphs.

    The graphs read the weights where they lay at the capture. `refresh` writes the present ones
    there.
    """

    def __init__(self, module, x, autocast):
        super().__init__(module, x, autocast)
        self.x = torch.empty_like(x).contiguous(memory_format=self.layout)
        self.x.copy_(x).requires_grad_()
        with self.ready() as self.refresh, torch.enable_grad():
            self.record_passes()

    def record_passes(self):
        """Capture both passes. The one after the other, for the second reads what the first
        keeps."""

        def forward():
            self.logits = super(Captured, self).__call__(self.x)

        def backward():
            (self.grad,) = torch.autograd.grad(self.logits, self.x, self.towards, retain_graph=True)

        stream = torch.cuda.Stream()
        self.run_forward = record(forward, stream)
        self.towards = torch.ones_like(self.logits)
        self.run_backward = record(backward, stream)

    def __call__(self, x):
        return Replay.apply(x, self)


class Graphs:
    """The captured networks of the last few attacks: `pgd(..., capture=graphs)`.

    A graph belongs to a shape of batch, a precision and a state of the network: where its tensors
    lie, the classes of its modules, and the numbers and names that they hold (the statistics in use
    of "dual-bn"). A network with hooks or patches has none: a replay would leave them out.
    """

    def __init__(self, most=3):
        self.most = most
        self.kept = OrderedDict()

    @staticmethod
    def key(module, x, dtype):
        tensors = [*module.parameters(), *module.buffers()]
        plain = bool, int, float, str, type(None)
        state = [
            (type(part), *(item for item in vars(part).items() if isinstance(item[1], plain)))
            for part in module.modules()
        ]
        places = [tensor.data_ptr() for tensor in tensors]
        return tuple(x.shape), dtype, tuple(places), tuple(state)

    def get(self, module, x, autocast, dtype):
        """The captured network of this key, with the present weights."""
        key = self.key(module, x, dtype)
        if key not in self.kept:
            self.kept[key] = Captured(module, x, autocast)
        self.kept.move_to_end(key)
        while len(self.kept) > self.most:
            self.kept.popitem(last=False)
        self.kept[key].refresh()
        return self.kept[key]


# --- the door -------------------------------------------------------------------------------------


@contextlib.contextmanager
def prepared(model, x, precision=None, mode="eval", capture=None, eot=1):
    """The network of `model`, frozen and made fast for images like x (N,...), as a `Net`.

    precision: an object with autocast() (run.Precision); None is fp32.
    mode: "eval", or "train" for BatchNorm with the statistics of each batch, without folding.
    capture: a `Graphs`, to replay CUDA graphs on a GPU in eval mode.
    eot: passes of a random network whose mean logits are the network's.
    """
    fp32 = functools.partial(torch.autocast, x.device.type, enabled=False)
    autocast = fp32 if precision is None else precision.autocast
    with torch.inference_mode(mode=False), torch.no_grad(), fp32(), frozen(model, mode) as module:
        captures = capture is not None and x.is_cuda and mode == "eval" and eot == 1
        if captures and all(map(is_plain, module.modules())):
            yield capture.get(module, x, autocast, getattr(precision, "dtype", None))
            return
        net = Net(module, x, autocast, mode, eot)
        with net.ready():
            yield net
