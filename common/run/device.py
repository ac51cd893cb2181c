"""Device, processes, precision and seeds."""

import datetime
import hashlib
import os
import warnings

import torch
import torch.distributed as dist
from torch import nn

from common.run.errors import UserError

LONG = 20_000  # steps after which a compiled network has won back the time of its compilation


def world():
    """Number of processes of this job; 1 without torchrun."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank():
    """Number of this process, from 0 on; 0 writes."""
    return dist.get_rank() if dist.is_initialized() else 0


def rows(count):
    """This process's slice of `count` rows; all slices together are every row once."""
    return slice(count * rank() // world(), count * (rank() + 1) // world())


def share(*tensors):
    """This process's rows of tensors that hold the global batch. Random numbers drawn from now on
    (dropout) are this process's own; those before are the same everywhere, whatever `world()`."""
    if len(tensors[0]) % world():
        raise UserError(f"a batch of {len(tensors[0])} does not divide among {world()} processes")
    if rank():
        torch.manual_seed(seed_key(torch.initial_seed(), rank()))
    return tuple(tensor[rows(len(tensor))] for tensor in tensors)


def upload(x, device):
    """A CPU tensor on the device; the host does not wait for a GPU."""
    if torch.device(device).type != "cuda":
        return x.to(device)
    return x.pin_memory().to(device, non_blocking=True)


def can_compile(device):
    """Whether torch.compile can make kernels for a device: on a GPU it needs Triton."""
    from torch.utils._triton import has_triton

    return device.type != "cuda" or has_triton()


def device_name(device):
    """What the numbers were made on: "cpu", or the name of the GPU."""
    return torch.cuda.get_device_name(device) if device and device.type == "cuda" else "cpu"


def wants_compiled(options, device, steps):
    """Whether a network is compiled: by --compile, else in a training of LONG steps on a GPU.

    Not beside attacks that are CUDA graphs (--capture): such runs ended in a launch failure."""
    wish = options.get("compile")
    if wish is None:
        captured = options.get("capture", False)
        return device.type == "cuda" and steps >= LONG and not captured and can_compile(device)
    return wish


def refuse_graphs_twice(options, device):
    """UserError for --compile beside --capture on a GPU."""
    if options.get("compile") and options.get("capture") and device.type == "cuda":
        raise UserError("--compile and --capture: not both on a GPU; add --no-capture")


def compiled(model, device):
    """The model, compiled to one graph. On a GPU its kernels are launched all at once.

    The launch of small kernels takes the host longer than the kernels take the GPU. Under torchrun
    each kernel is launched by itself, between the exchanges of gradients.
    """
    together = device.type == "cuda" and world() == 1
    warnings.filterwarnings("ignore", message="TensorFloat32 tensor cores")  # fp32 is meant
    return torch.compile(model, mode="reduce-overhead" if together else None)


def wait():
    """Until every process is here."""
    if world() > 1:
        dist.barrier()


def summed(x):
    """Sum of a tensor over the processes."""
    if world() > 1:
        x = x.clone()
        dist.all_reduce(x)
    return x


def gathered(x):
    """The tensors (...) of all processes, (world, ...), in the order of their ranks."""
    if world() == 1:
        return x[None]
    parts = [torch.empty_like(x) for _ in range(world())]
    dist.all_gather(parts, x)
    return torch.stack(parts)


def mean(x):
    """Mean of a floating tensor over the processes."""
    return summed(x) / world()


def check_processes(model):
    """Raise UserError for a model that several processes cannot train."""
    if world() > 1 and any(getattr(m, "single_process", False) for m in model.modules()):
        raise UserError(f"norm {model.spec['norm']}: its statistics need one process (no torchrun)")


def spread(model):
    """The model for training on a share of the global batch: gradients are the mean over the
    processes. With one process: the model itself."""
    if world() == 1:
        return model
    check_processes(model)
    device = next(model.parameters()).device
    ids = [device] if device.type == "cuda" else None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of the new name of broadcast_buffers
        return nn.parallel.DistributedDataParallel(
            model,
            device_ids=ids,
            broadcast_buffers=False,
            gradient_as_bucket_view=True,  # gradients stay where they were exchanged: no copy back
        )


def environment_number(name, default):
    """A whole number from 0 on in the environment; an empty variable counts as none.

    Raises UserError for any other text."""
    text = os.environ.get(name, "").strip()
    if text and not (text.isascii() and text.isdigit()):
        raise UserError(f"environment: {name}={text[:40]!r} is no number from 0 on; unset it")
    return int(text) if text else default


def get_device(name):
    """`auto` is the GPU if there is one. Raises UserError for a device that is not there. Under
    torchrun each process takes the GPU of its local rank, and joins the others."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    many = environment_number("WORLD_SIZE", 1) > 1 and "MASTER_ADDR" in os.environ
    if many and name == "cuda":
        name = f"cuda:{environment_number('LOCAL_RANK', 0)}"
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError):
        raise UserError(f"--device {name}: not available here (try --device cpu)") from None
    if device.type == "cuda":
        warnings.filterwarnings("ignore", message="Attempting to run cuBLAS")  # it makes a context
        torch.backends.cudnn.benchmark = True
        torch.backends.cudnn.allow_tf32 = False  # fp32 means fp32; speed is bf16's part
        torch.backends.cuda.matmul.allow_tf32 = False  # an environment variable may have set it
        if device.index is not None:
            torch.cuda.set_device(device)  # streams and graphs are those of the current one
    if many and not dist.is_initialized():
        # torchrun keeps one store over its restarts; what dead processes left must not be read
        try:
            store, number, count = next(dist.rendezvous("env://"))
        except ValueError as error:  # a variable that is missing, or no number
            raise UserError(f"{str(error).splitlines()[0]}; start with torchrun") from None
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        store = dist.PrefixStore(f"attempt {attempt}", store)
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        # A batch of AutoAttack on one process outlasts NCCL's 10 minutes.
        patience = datetime.timedelta(hours=2)
        dist.init_process_group(
            backend, timeout=patience, store=store, rank=number, world_size=count
        )
    return device


def has_bf16(device):
    """True where bf16 matrix products run in hardware."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    supported = getattr(torch.cpu, "_is_avx512_bf16_supported", None)
    return device.type == "cpu" and supported is not None and supported()


class Precision:
    """The one precision path: an autocast context and a gradient scaler, both with a switch.

    name: fp32, bf16, fp16 or auto (bf16 where the device has it, else fp16 on a GPU, else fp32).
    tf32 is fp32 whose products an attack may round on a GPU (attacks/autoattack.py).
    """

    def __init__(self, name="auto", device="cpu"):
        self.device = torch.device(device)
        if name == "auto":
            bf16 = has_bf16(self.device)
            name = "bf16" if bf16 else "fp16" if self.device.type == "cuda" else "fp32"
        self.name = name
        low = {"bf16": torch.bfloat16, "fp16": torch.float16}
        self.dtype = low.get(name, torch.float32)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=name == "fp16")

    def autocast(self):
        """The context for forward passes."""
        enabled = self.dtype != torch.float32
        return torch.autocast(self.device.type, dtype=self.dtype, enabled=enabled)


def seed_key(*key):
    """A 63-bit seed that depends on ints and strings in `key`, the same on every machine."""
    digest = hashlib.sha256(repr(key).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def generator(*key, device="cpu"):
    """A torch.Generator for this key: `generator(seed, "order", epoch)`."""
    return torch.Generator(device).manual_seed(seed_key(*key))
