"""A pretended GPU for tests: a script runs with --device cuda on a machine that has none.

    python tests/fake_cuda.py REPORT.json SCRIPT --device cuda ... [-- SCRIPT ...]

The report is a list with one {"waits": [[what, where, count], ...], "kernels": n} a script.

A `Pretended` tensor says that it is on cuda:0 and holds its numbers in a CPU tensor. It has CUDA's
dispatch keys, so CUDA's autocast lists hold. `Device` sees every operator below autograd, in the
forward pass, the backward pass and the optimizer. It computes on the CPU tensors, so the control
flow is that of a real run.

Where CUDA would raise, it raises RuntimeError:
    tensors of both devices in one operator (0-d CPU tensors may join pointwise operators)
    a generator of another device than the result
    a CPU tensor indexed by a tensor on the GPU; `.numpy()` of a tensor on the GPU

Where the host would wait for the GPU, it counts a wait:
    item     .item(), float(tensor), `if tensor:`
    to cpu   .cpu(), .tolist(), torch.save; not a non_blocking copy into pinned memory
    to cuda  a copy from the CPU; only a non_blocking copy from pinned memory does not wait
    shape    results whose size depends on values: nonzero, a mask as an index, equal, unique
    api      torch.cuda.synchronize

CUDA divides by a number as a product with its reciprocal; that is imitated.

Not seen: streams, memory, CUDA graphs (a graph runs its body, a replay does nothing), kernels that
CUDA lacks, other rounding, several processes. A process that pretended keeps its false accelerator,
so run this in a process of its own. Private functions of torch are used: made with torch 2.14.
"""

import contextlib
import json
import os
import runpy
import sys
import traceback
from collections import Counter
from pathlib import Path
from unittest import mock

import torch
import torch._dynamo  # it copies tables of torch's functions, so before any of them is replaced
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

ROOT = Path(__file__).resolve().parent.parent
CUDA = torch.device("cuda", 0)
# Operators by what the host does. The size of a result of SHAPE depends on values.
SHAPE = {"nonzero", "masked_select", "equal", "_unique2", "unique_dim", "unique_consecutive",
         "bincount", "histc", "repeat_interleave", "is_nonzero"}  # fmt: skip
INDEX = {"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index"}
COPY = {"copy_", "_to_copy", "_foreach_copy_"}
TAKES_0D = {"where", "masked_fill", "masked_fill_", "fill", "fill_", "lerp", "lerp_"}
NO_KERNEL = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"}


class Pretended(torch.Tensor):
    """A tensor on cuda:0; `held` is the CPU tensor with its numbers."""

    @staticmethod
    def __new__(cls, held):
        meta = torch.empty_strided(held.shape, held.stride(), dtype=held.dtype, device="meta")
        options = {"dispatch_device": True, "device_for_backend_keys": CUDA}
        made = torch.Tensor._make_subclass(cls, meta, require_grad=False, **options)
        made.held = held
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return Device.current.run(func, args, kwargs or {})

    device = property(lambda self: CUDA)
    is_cuda = property(lambda self: True)
    is_cpu = property(lambda self: False)
    is_meta = property(lambda self: False)

    def get_device(self):
        return 0

    def data_ptr(self):
        return self.held.data_ptr()

    def record_stream(self, stream):
        pass

    def tolist(self):
        Device.current.wait("to cpu: tolist")
        return self.held.tolist()

    def numpy(self, *args, **kwargs):
        raise TypeError("can't convert cuda:0 device type tensor to numpy; use Tensor.cpu() first")

    __array__ = numpy

    def new_tensor(self, data, *, dtype=None, device=None, requires_grad=False):
        made = torch.tensor(data, dtype=dtype or self.dtype, device=device or CUDA)
        return made.requires_grad_(requires_grad)

    def __deepcopy__(self, memo):
        if id(self) not in memo:
            copy = Pretended(self.held.detach().clone())
            if getattr(self, "_is_param", False):
                copy._is_param = True
            memo[id(self)] = copy.requires_grad_(self.requires_grad)
        return memo[id(self)]

    def __reduce_ex__(self, protocol):  # a checkpoint holds plain tensors
        Device.current.wait("to cpu: save")
        return self.held.__reduce_ex__(protocol)


class Generator(torch.Generator):
    """A CPU generator that says which device it is for. Operators see its C++ object alone, so
    `devices` remembers it by address."""

    devices = {}  # noqa: RUF012

    def __new__(cls, device="cpu"):
        made = super().__new__(cls)
        cls.devices[made._cdata] = torch.device(device).type
        return made

    device = property(lambda self: torch.device(Generator.devices[self._cdata]))


def on_gpu(device):
    """Whether a device in a call means the GPU. C++ takes pretended tensors for "meta" ones."""
    return device is not None and torch.device(device).type in ("cuda", "meta")


def is_view(func):
    return any(r.alias_info and not r.alias_info.is_write for r in func._schema.returns)


def unwrapped(tree):
    return tree_map(lambda t: t.held if isinstance(t, Pretended) else t, tree)


class Device(TorchDispatchMode):
    """Runs every operator on the numbers held, checks the devices, and counts.

    waits: Counter of (what, "file:line function < file:line function < ..."). kernels: how many
    operators launched one.
    """

    current = None

    def __init__(self):
        super().__init__()
        self.waits = Counter()
        self.kernels = 0
        self.in_backward = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return self.run(func, args, kwargs or {})

    def wait(self, what):
        """Count a wait of the host, with the lines of this project that led to it."""
        lines = []
        for frame in reversed(traceback.extract_stack()):
            path = Path(frame.filename)
            if path.is_absolute() and path != Path(__file__) and not path.is_relative_to(TORCH):
                lines.append(f"{path.name}:{frame.lineno} {frame.name}")
        self.waits[what, " < ".join(lines[:5])] += 1

    def run(self, func, args, kwargs):
        """One operator: its device found, checked, computed on the CPU, its results wrapped."""
        if func is torch.ops.prim.device.default:  # asked by autocast and by autograd's engine
            return torch.device("cpu") if self.in_backward else args[0].device
        name = func.overloadpacket.__name__
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        ours = [t for t in tensors if isinstance(t, Pretended)]
        if self.in_backward and not tensors and kwargs.get("device") is not None:
            kwargs = kwargs | {"device": CUDA}  # C++ asked a gradient where it is
        target = kwargs.get("device")
        if not ours and not on_gpu(target):
            return func(*args, **kwargs)
        to_gpu = target is None or on_gpu(target)
        self.check(func, name, args, kwargs, tensors, to_gpu)
        if name not in NO_KERNEL and not is_view(func):
            self.kernels += 1
        plain = unwrapped(kwargs)
        if target is not None:
            plain["device"] = torch.device("cpu")
        plain.pop("pin_memory", None)
        result = compute(func, name, args, plain)
        return self.wrapped(func, result, tensors, to_gpu)

    def wrapped(self, func, result, tensors, to_gpu):
        """The results as tensors on the GPU. Those of in-place operators are the arguments."""
        known = {id(unwrapped(t)): t for t in tensors} if func._schema.is_mutable else {}

        def wrap(value):
            if id(value) in known:
                return known[id(value)]
            return Pretended(value) if to_gpu and isinstance(value, torch.Tensor) else value

        outside = tensors and not tensors[0].is_inference()
        if torch.is_inference_mode_enabled() and is_view(func) and outside:
            with torch.inference_mode(mode=False):  # a view of a normal tensor is a normal tensor
                return tree_map(wrap, result)
        return tree_map(wrap, result)

    # --- what CUDA would refuse, and what it would wait for -------------------------------------

    def check(self, func, name, args, kwargs, tensors, to_gpu):
        self.check_generator(name, kwargs.get("generator"), to_gpu)
        foreign = [t for t in tensors if not isinstance(t, Pretended)]
        if name == "_local_scalar_dense":
            self.wait("item")
        elif name in SHAPE:
            self.wait(f"shape: {name}")
        elif name in COPY:
            self.check_copy(name, args, kwargs, foreign, to_gpu)
            return
        elif name in INDEX:
            self.check_index(name, args)
            foreign = [t for t in args[2:3] if not isinstance(t, Pretended) and t.dim()]
        if not foreign or not to_gpu or name.endswith("_like") or name == "lift_fresh":
            return
        pointwise = torch.Tag.pointwise in func.tags or name.startswith("_foreach")
        if any(t.dim() for t in foreign) or not (pointwise or name in TAKES_0D):
            found = ", ".join(f"{t.device.type} {tuple(t.shape)}" for t in tensors)
            raise RuntimeError(f"{name}: Expected all tensors to be on the same device: {found}")

    def check_generator(self, name, generator, to_gpu):
        if generator is None:
            return
        where = Generator.devices.get(generator._cdata, "cpu")
        if where != ("cuda" if to_gpu else "cpu"):
            raise RuntimeError(f"{name}: Expected a generator of the result's device, got {where}")

    def check_copy(self, name, args, kwargs, foreign, to_gpu):
        """A copy between the devices waits, unless it is non_blocking and from pinned memory."""
        source = args[0] if name == "_to_copy" else args[1]
        from_gpu = any(isinstance(t, Pretended) for t in tree_leaves(source))
        if name != "_to_copy":
            to_gpu = isinstance(tree_leaves(args[0])[0], Pretended)
        if from_gpu == to_gpu:
            return
        free = kwargs.get("non_blocking") or (name == "copy_" and len(args) > 2 and args[2])
        if not (free and all(getattr(t, "pinned", False) for t in foreign)):
            self.wait(f"to {'cuda' if to_gpu else 'cpu'}: {name}")

    def check_index(self, name, args):
        indices = [i for i in args[1] if i is not None]
        if not isinstance(args[0], Pretended):
            raise RuntimeError(f"{name}: a CPU tensor with indices on cuda")
        if any(i.dtype in (torch.bool, torch.uint8) for i in indices):
            self.wait(f"shape: {name} by a mask")
        if not all(isinstance(i, Pretended) for i in indices):
            self.wait(f"to cuda: {name} by indices on the CPU")


def compute(func, name, args, plain):
    """The operator on CPU tensors. `plain`: its keyword arguments, without pretended tensors."""
    aten = torch.ops.aten
    by_number = len(args) == 2 and not isinstance(args[1], Pretended)  # or by a 0-d CPU tensor
    args = unwrapped(args)
    if name == "cudnn_batch_norm":  # cuDNN's operators become torch's own
        training = args[5]
        out, mean, inverse = aten.native_batch_norm(*args)
        if not training:
            mean = inverse = args[0].new_empty(0, dtype=torch.float32)
        return out, mean, inverse, torch.empty(0, dtype=torch.uint8)
    if name == "cudnn_batch_norm_backward":
        x, grad, weight, running_mean, running_var, mean, inverse, eps, _ = args
        rest = running_mean, running_var, mean, inverse, True, eps, [True] * 3
        return aten.native_batch_norm_backward(grad, x, weight, *rest)
    if by_number and name in ("div", "div_") and args[0].dtype in (torch.float32, torch.float64):
        x, number = args
        inverse = torch.ones((), dtype=x.dtype) / number
        return x.mul_(inverse) if name == "div_" else x * inverse
    return func(*args, **plain)


class Calls(TorchFunctionMode):
    """Replaces calls that would ask the driver: "cuda" gets its number, pinning is noted."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        def numbered(value):
            if isinstance(value, (str, torch.device)) and str(value) == "cuda":
                return CUDA
            return value

        args = [numbered(value) for value in args]
        kwargs = {key: numbered(value) for key, value in (kwargs or {}).items()}
        if func is torch.Tensor.cuda:
            return args[0].to(CUDA)
        if func is torch.Tensor.pin_memory:
            args[0].pinned = True
            return args[0]
        if func in (torch.tensor, torch.as_tensor) and kwargs.get("device") == CUDA:
            del kwargs["device"]  # made on the CPU, then copied, as torch does
            grad = kwargs.pop("requires_grad", False)
            return func(*args, **kwargs).to(CUDA).requires_grad_(grad)
        pinned = kwargs.pop("pin_memory", False)
        result = func(*args, **kwargs)
        if pinned:
            result.pinned = True
        return result


# --- the process ----------------------------------------------------------------------------------

TORCH = Path(torch.__file__).resolve().parent.parent


class Stream(contextlib.nullcontext):
    device = CUDA

    def __init__(self, *args, **kwargs):
        super().__init__(self)

    def wait_stream(self, other):
        pass

    def synchronize(self):
        Device.current.wait("api: Stream.synchronize")


class Graph:
    def replay(self):
        Device.current.kernels += 1


def false_accelerator():
    """A device guard and an accelerator that need no driver: autograd's engine asks them for the
    streams of CUDA tensors. For the whole process."""
    from torch.utils import backend_registration

    class Module(backend_registration._DummyBackendModule):
        get_rng_state = staticmethod(lambda *args: torch.get_rng_state())
        set_rng_state = staticmethod(lambda state, *args: torch.set_rng_state(state))

    torch._C._ensureCUDADeviceGuardSet()
    backend_registration._setup_privateuseone_for_python_backend("pretended", Module())


def replacements(device):
    """{module: {name: what stands for it}} while the GPU is pretended."""
    import torch.nn.utils.clip_grad as clip_grad
    import torch.optim.optimizer as optimizer
    import torch.utils._foreach_utils as foreach

    read, engine = torch.load, torch.autograd.graph._engine_run_backward

    def load(file, map_location=None, **kwargs):
        found = read(file, map_location="cpu", **kwargs)
        if not on_gpu(map_location):
            return found
        return tree_map(lambda t: t.to(CUDA) if isinstance(t, torch.Tensor) else t, found)

    def backward(roots, *args, **kwargs):
        if not any(isinstance(t, Pretended) for t in roots):
            return engine(roots, *args, **kwargs)
        device.in_backward += 1
        try:
            with torch.autograd.set_multithreading_enabled(False):
                return engine(roots, *args, **kwargs)
        finally:
            device.in_backward -= 1

    def groups(tensors, with_indices=False):
        found = torch._C._group_tensors_by_device_and_dtype(tensors, with_indices)
        return {(CUDA if d.type == "meta" else d, t): v for (d, t), v in found.items()}

    cuda = {
        "is_available": lambda: True,
        "_lazy_init": lambda: None,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "set_device": lambda device: None,
        "get_device_name": lambda *args: "a pretended GPU",
        "is_bf16_supported": lambda *args, **kwargs: True,
        "manual_seed_all": lambda seed: None,
        "get_rng_state": lambda *args: torch.get_rng_state(),
        "set_rng_state": lambda state, *args: torch.set_rng_state(state),
        "synchronize": lambda *args: device.wait("api: synchronize"),
        "Stream": Stream,
        "current_stream": lambda *args: Stream(),
        "stream": lambda stream: contextlib.nullcontext(),
        "CUDAGraph": Graph,
        "graph": lambda *args, **kwargs: contextlib.nullcontext(),
    }
    group = {"_group_tensors_by_device_and_dtype": groups}
    return {
        torch.cuda: cuda,
        torch: {"Generator": Generator, "load": load},
        torch.autograd: {"_engine_run_backward": backward},
        torch.autograd.graph: {"_engine_run_backward": backward},
        foreach: group,
        clip_grad: group,
        optimizer: group,
    }


@contextlib.contextmanager
def pretended():
    """Inside, there is a GPU. Yields the `Device`, which counts."""
    import torch.optim.optimizer as optimizer
    import torch.utils._foreach_utils as foreach

    if Device.current is None:
        false_accelerator()
    device = Device.current = Device()
    with contextlib.ExitStack() as stack:
        for module, names in replacements(device).items():
            for name, value in names.items():
                stack.enter_context(mock.patch.object(module, name, value))
        for kinds in (foreach._foreach_supported_types, optimizer._foreach_supported_types):
            kinds.append(Pretended)
            stack.callback(kinds.remove, Pretended)
        # Module.to makes new parameters, for `.data` cannot hold a subclass.
        overwrite = torch.__future__.get_overwrite_module_params_on_conversion()
        stack.callback(torch.__future__.set_overwrite_module_params_on_conversion, overwrite)
        torch.__future__.set_overwrite_module_params_on_conversion(True)
        stack.enter_context(device)
        stack.enter_context(Calls())
        yield device


def run_script(command):
    """Run one script as `python SCRIPT ...` would; its report. Raises what the script raises."""
    script = Path(command[0]).resolve()
    sys.argv = [str(script), *command[1:]]
    with pretended() as device:
        try:
            runpy.run_path(str(script), run_name="__main__")
        except SystemExit as end:
            if end.code:
                raise
    waits = [[what, where, count] for (what, where), count in device.waits.items()]
    return {"waits": waits, "kernels": device.kernels}


def main(report, *words):
    """Run the scripts, separated by "--", one after another."""
    sys.path[0] = str(ROOT)
    commands = [[]]
    for word in words:
        if word == "--":
            commands.append([])
        else:
            commands[-1].append(word)
    Path(report).write_text(json.dumps([run_script(command) for command in commands]))


if __name__ == "__main__":
    sys.modules["fake_cuda"] = sys.modules["__main__"]
    os.chdir(ROOT)
    main(*sys.argv[1:])
