"""Everything around a method: errors, seeds, precision, evaluation, checkpoints, the run directory.

Nothing here knows a method. A script reads

    args = parse_args()                      # its own options + add_arguments(parser)
    device = get_device(args.device)         # under torchrun: joins the other processes
    record = Run(args, __file__)             # runs/<name>: events, log.jsonl, args.json, the script
    guard = Guard(record, "last.pt", model, optimizer, precision, per_epoch, total)
    for step in range(guard.start, total):   # goes on from the checkpoint
        x, y = share(*batches(step))         # this process's part of the global batch
        ... guard.net(x) ...
        if guard.fine(step, lr, loss, norm): # no update from a loss or gradient that is not finite
            optimizer.step()
        guard.save(step + 1, metrics=...)    # when due; at a signal it saves and exits
    record.close(metrics)
"""

import argparse
import contextlib
import datetime
import functools
import hashlib
import html
import json
import math
import os
import platform
import re
import shlex
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

FORMAT = 1  # of checkpoints; raised when a reader would misunderstand an older file
ROOT = Path(__file__).resolve().parent.parent
FP16_LEAST = 2.0**-10  # scale of the loss below which fp16 has failed, from 65536 on
AGREE = 10  # steps between the questions of torchrun's processes whether one was told to stop
# Normalisers whose statistics of a batch are not those of the global batch when it is spread.
NOT_SPREAD = ("bn-population", "bn-aux", "noise", "l1", "l2", "linf")


class UserError(Exception):
    """A mistake of the user's: one line that says what is wrong and what to do."""


class Diverged(UserError):
    """The loss, its gradient or a weight is not finite any more, since step `step`."""

    def __init__(self, message, step):
        super().__init__(message)
        self.step = step


def cli(main, parse_args):
    """Last line of every script. A `UserError` ends in one line on stderr and exit status 2; the
    first SIGTERM, SIGUSR1 or Ctrl-C in a run ends in a checkpoint and exit status 0."""
    own = int(os.environ.get("RANK", 0))
    if own:
        sys.stdout = open(os.devnull, "w")  # one process prints
    for name in ("SIGTERM", "SIGUSR1", "SIGINT"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), on_signal)
    try:
        main(parse_args())
    except UserError as error:
        print(f"error: {error}" if not own else f"process {own}: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        sys.exit(130)
    except RuntimeError as error:
        # What is left of a job whose other process died: torchrun starts all of them again.
        if world() == 1 or not re.search("gloo|nccl|peer|closed|timed out", str(error), re.I):
            raise
        stopped = Run.current and Run.current.stop
        reason = str(error).strip().split("\n")[0][:100]
        print(f"process {own}: lost the other processes ({reason})", file=sys.stderr, flush=True)
        os._exit(0 if stopped else 1)  # tearing down a broken group may hang
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def on_signal(number, frame):
    """Within a training loop, ask it to stop after its step; outside of one all is saved."""
    name, record = signal.Signals(number).name, Run.current
    if record and record.training:
        if record.stop and number == signal.SIGINT:
            raise KeyboardInterrupt  # the second Ctrl-C
        record.stop = name
    elif record:
        record.leave(name)
    elif number == signal.SIGINT:
        raise KeyboardInterrupt
    else:
        sys.exit(128 + number)


# --- options --------------------------------------------------------------------------------------


def positive(kind):
    """argparse type: an int or float above zero."""

    def parse(text):
        value = kind(text)
        if not value > 0 or value == float("inf"):
            raise argparse.ArgumentTypeError(f"must be a finite number above 0, got {text}")
        return value

    parse.__name__ = kind.__name__
    return parse


def nonnegative(kind):
    """argparse type: an int or float of at least zero."""

    def parse(text):
        value = kind(text)
        if not value >= 0 or value == float("inf"):
            raise argparse.ArgumentTypeError(f"must be a finite number of at least 0, got {text}")
        return value

    parse.__name__ = kind.__name__
    return parse


def fraction(text):
    """argparse type: a float of at least 0 and below 1."""
    value = float(text)
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 0 and below 1, got {text}")
    return value


def listed(kind):
    """argparse type: values of `kind` with commas between them, as a list."""

    def parse(text):
        return [kind(part) for part in text.split(",")]

    parse.__name__ = f"list of {kind.__name__}"
    return parse


class Parser(argparse.ArgumentParser):
    """Shows defaults in --help and answers a wrong option with one line, exit status 2."""

    def __init__(self, script, doc):
        name, form = Path(script).name, argparse.ArgumentDefaultsHelpFormatter
        super().__init__(name, description=doc.split("\n")[0], formatter_class=form)

    def error(self, message):
        raise UserError(f"{message} ({self.prog} --help lists the options)")


def add_arguments(parser):
    """Add the options of every run, as the group "run"."""
    group = parser.add_argument_group("run")
    group.add_argument("--out", help="run directory (default: runs/<script>-<data>-<arch>-s<seed>)")
    group.add_argument("--overwrite", action="store_true", help="replace what is in --out")
    group.add_argument(
        "--resume", metavar="RUN", help="go on with this run directory; auto: with --out's, if any"
    )
    group.add_argument("--seed", type=nonnegative(int), default=0)
    group.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")
    group.add_argument("--precision", default="auto", choices=["auto", "fp32", "bf16", "fp16"])
    group.add_argument("--compile", action=argparse.BooleanOptionalAction, default=False)
    group.add_argument("--log-every", type=positive(int), default=50, help="steps between scalars")
    group.add_argument("--save-every", type=positive(int), default=1, help="epochs between saves")
    group.add_argument(
        "--save-minutes", type=positive(float), metavar="M", help="save as often too"
    )
    group.add_argument(
        "--keep", type=positive(int), default=2, help="checkpoints kept of each name"
    )
    group.add_argument(
        "--max-skips", type=nonnegative(int), default=0, metavar="N",
        help="steps left out because loss or gradient were not finite, before the run stops",
    )  # fmt: skip


def parse(parser, argv=None):
    """Parse `argv`; with `--resume RUN` the options saved there are the defaults.

    `--resume auto` is `--resume OUT` where a run is in `--out`, or in the directory that `Run`
    chooses, and nothing where none is. What torchrun starts again resumes so by itself.
    """
    args = parser.parse_args(argv)
    folder = args.resume
    if not folder and int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)):
        folder = "auto"
    if folder == "auto" and args.out and (Path(args.out) / "args.json").is_file():
        folder = args.out
    if folder and folder != "auto":
        file = Path(folder) / "args.json"
        if not file.is_file():
            raise UserError(f"--resume {folder}: no args.json there, so it is no run directory")
        try:
            saved = json.loads(file.read_text())
        except ValueError:
            raise UserError(f"{file}: not JSON; give the options and --overwrite") from None
        known = {k: v for k, v in saved.items() if k in vars(args)}
        parser.set_defaults(**known | {"out": folder, "overwrite": False})
        args = parser.parse_args(argv)
        args.out = folder
    args.resume = folder
    return args


# --- processes ------------------------------------------------------------------------------------


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


def mean(x):
    """Mean of a floating tensor over the processes."""
    return summed(x) / world()


def spread(model):
    """The model for training on a share of the global batch: gradients are the mean over the
    processes, BatchNorm's statistics those of the global batch. `model` itself is changed so, and
    keeps the names of its state. With one process: the model."""
    if world() == 1:
        return model
    if model.spec["norm"] in NOT_SPREAD:
        raise UserError(f"norm {model.spec['norm']}: its statistics need one process (no torchrun)")
    device = next(model.parameters()).device
    base = nn.SyncBatchNorm if device.type == "cuda" else SyncBatchNorm
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and not isinstance(module, base):
            kind = type(module)
            module.__class__ = type(f"Sync{kind.__name__}", (kind, base), {"process_group": None})
    ids = [device] if device.type == "cuda" else None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of the new name of broadcast_buffers
        return nn.parallel.DistributedDataParallel(model, device_ids=ids, broadcast_buffers=False)


class Sum(torch.autograd.Function):
    """`summed` with a gradient: each summand's is the sum of those that the processes have."""

    @staticmethod
    def forward(ctx, x):
        return summed(x)

    @staticmethod
    def backward(ctx, grad):
        return summed(grad.contiguous())


class SyncBatchNorm(nn.modules.batchnorm._BatchNorm):
    """torch's SyncBatchNorm runs on GPUs only; this one anywhere. Equal shares are assumed."""

    def forward(self, x):
        if not self.training:
            return super().forward(x)
        axes, view = [0, *range(2, x.dim())], (-1,) + (1,) * (x.dim() - 2)
        a, count = x.to(self.weight.dtype), x.numel() // x.shape[1] * world()
        mean = Sum.apply(a.sum(axes)) / count
        centred = a - mean.view(view)
        var = Sum.apply(centred.square().sum(axes)) / count
        with torch.no_grad():
            self.num_batches_tracked += 1
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(var * (count / (count - 1)), self.momentum)
        scale = (self.weight * (var + self.eps).rsqrt()).view(view)
        return (centred * scale + self.bias.view(view)).to(x.dtype)


# --- device, precision, randomness ----------------------------------------------------------------


def get_device(name):
    """`auto` is the GPU if there is one. Raises UserError for a device that is not there. Under
    torchrun each process takes the GPU of its local rank, and joins the others."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    many = int(os.environ.get("WORLD_SIZE", 1)) > 1 and "MASTER_ADDR" in os.environ
    if many and name == "cuda":
        name = f"cuda:{os.environ['LOCAL_RANK']}"
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError):
        raise UserError(f"--device {name}: not available here (try --device cpu)") from None
    if device.type == "cuda":
        torch.backends.cudnn.benchmark = True
        torch.backends.cudnn.allow_tf32 = False  # fp32 means fp32; speed is bf16's part
        torch.backends.cuda.matmul.allow_tf32 = False  # an environment variable may have set it
        if device.index is not None:
            torch.cuda.set_device(device)  # streams and graphs are those of the current one
    if many and not dist.is_initialized():
        # torchrun keeps one store over its restarts; what dead processes left must not be read
        store, number, count = next(dist.rendezvous("env://"))
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
    """

    def __init__(self, name="auto", device="cpu"):
        self.device = torch.device(device)
        if name == "auto":
            bf16 = has_bf16(self.device)
            name = "bf16" if bf16 else "fp16" if self.device.type == "cuda" else "fp32"
        self.name = name
        self.dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[name]
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=name == "fp16")

    def autocast(self):
        """The context for forward passes."""
        enabled = self.name != "fp32"
        return torch.autocast(self.device.type, dtype=self.dtype, enabled=enabled)


def seed_key(*key):
    """A 63-bit seed that depends on ints and strings in `key`, the same on every machine."""
    digest = hashlib.sha256(repr(key).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def generator(*key, device="cpu"):
    """A torch.Generator for this key: `generator(seed, "order", epoch)`."""
    return torch.Generator(device).manual_seed(seed_key(*key))


# --- evaluation -----------------------------------------------------------------------------------


def to_float(x):
    """uint8 images (N,C,H,W) to float in [0,1], channels_last; floats pass unchanged."""
    if x.dtype == torch.uint8:
        x = x.to(torch.float32, memory_format=torch.channels_last).div_(255)
    return x


@contextlib.contextmanager
def eval_mode(model):
    """Evaluation mode inside; afterwards every submodule has the mode it had."""
    modes = [(m, m.training) for m in model.modules()]
    model.eval()
    try:
        yield model
    finally:
        for module, training in modes:
            module.training = training


@torch.inference_mode()
def predict(model, x, precision=None, batch_size=500):
    """Logits (N,K), fp32, of images x (N,3,H,W), uint8 or float in [0,1], in eval mode."""
    precision = precision or Precision("fp32", x.device)
    with eval_mode(model), precision.autocast():
        return torch.cat([model(to_float(part)).float() for part in x.split(batch_size)])


def counts(logits, y, bins=15):
    """What `metrics` divides, fp64 (3 + bins,): images, wrong ones, cross-entropy, and per bin of
    confidence its sum less the number right. Counts of parts add up to those of the whole."""
    confidence, predicted = logits.softmax(1).max(1)
    wrong = (predicted != y).double()
    which = (confidence * bins).long().clamp(max=bins - 1)
    result = torch.zeros(3 + bins, dtype=torch.float64, device=y.device)
    result[0], result[1] = len(y), wrong.sum()
    result[2] = F.cross_entropy(logits, y, reduction="none").double().sum()
    return result.index_add_(0, 3 + which, confidence.double() - (1 - wrong))


def metrics_of(counts):
    """error (%), loss (nats), ece (%): expected calibration error over equal bins."""
    n, wrong, loss, *gaps = counts.tolist()
    return {"error": 100 * wrong / n, "loss": loss / n, "ece": 100 * sum(map(abs, gaps)) / n}


def metrics(logits, y, bins=15):
    """error (%), loss (nats), ece (%) of logits (N,K)."""
    return metrics_of(counts(logits, y, bins))


def evaluate(model, x, y, precision=None, batch_size=500, mine=False):
    """`metrics` of the model on images x (N,3,H,W) with labels y (N,). Percent and nats.

    All processes call it and get the same; each takes a share of the images. mine: x and y are this
    process's share already (`rows`).
    """
    if not mine:
        part = rows(len(y))
        x, y = x[part], y[part]
    if len(y):
        logits = predict(model, x, precision, batch_size)
        if not isinstance(
            x, torch.Tensor
        ):  # folders.Files: what was skipped, and a subset of the classes
            logits, y = x.scored(logits, y)
        found = counts(logits, y)
    else:
        found = torch.zeros(18, dtype=torch.float64, device=y.device)
    return metrics_of(summed(found))


# --- checkpoints ----------------------------------------------------------------------------------


def git_hash():
    """Commit of the checkout, with "+" when tracked files differ from it; "" outside git."""

    def git(*command):
        done = subprocess.run(["git", "-C", str(ROOT), *command], capture_output=True, text=True)
        return done.stdout.strip() if done.returncode == 0 else ""

    try:
        head = git("rev-parse", "--short=12", "HEAD")
        return head + ("+" if head and git("status", "--porcelain", "-uno") else "")
    except OSError:
        return ""


@functools.cache
def versions():
    """What a number depends on besides its command."""
    import numpy
    import torchvision

    return {
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "torchvision": str(torchvision.__version__),
        "numpy": str(numpy.__version__),
        "git": git_hash(),
    }


def older(path, age):
    """The name that the checkpoint `path` has when `age` others were written after it."""
    return path.with_name(f"{path.stem}.{age}{path.suffix}") if age else path


def save_checkpoint(path, checkpoint, keep=1):
    """Write a dict of tensors, numbers, strings, lists and dicts; the name appears when all is
    on disk. Raises UserError where the file cannot be written; an older file then stays.

    keep: of the files written under this name, as many stay: last.pt, last.1.pt (the one before).
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(temporary, "wb") as file:
            torch.save({"format": FORMAT, **checkpoint}, file)
            file.flush()
            os.fsync(file.fileno())
        if path.exists():
            for age in range(keep - 1, 1, -1):
                if older(path, age - 1).exists():
                    os.replace(older(path, age - 1), older(path, age))
            if keep > 1:
                older(path, 1).unlink(missing_ok=True)
                try:
                    os.link(path, older(path, 1))  # so that `path` is there at every moment
                except OSError:  # a file system without links
                    os.replace(path, older(path, 1))
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # RuntimeError: what torch.save makes of a full disk
        reason = getattr(error, "strerror", None) or str(error).strip().split("\n")[0][:100]
        left = "; the one before it is whole" if path.exists() else ""
        raise UserError(f"cannot write {path}: {reason}{left}") from None
    finally:
        temporary.unlink(missing_ok=True)


def load_checkpoint(path, device="cpu", foreign=False):
    """Read a checkpoint without executing anything in it (weights_only).

    foreign=True returns any such file's content, for state_dicts of other projects.
    """
    path = Path(path)
    if path.is_dir():
        path = path / "last.pt"
    if not path.is_file():
        raise UserError(f"{path}: no such checkpoint")
    try:
        checkpoint = torch.load(path, map_location=device, weights_only=True)
    except Exception as error:  # torch raises half a dozen types for broken files
        reason = str(error).strip().split("\n")[0][:100] or type(error).__name__
        raise UserError(
            f"{path}: truncated, or not a file of plain tensors; refused ({reason})"
        ) from None
    if foreign:
        return checkpoint
    if not isinstance(checkpoint, dict) or not {"format", "arch", "model"} <= checkpoint.keys():
        raise UserError(
            f"{path}: not a checkpoint of this project; for the state_dict of another one give "
            "--arch, --dataset, --mean and --std to an eval script"
        )
    if checkpoint["format"] > FORMAT:
        raise UserError(f"{path}: written by a newer version (format {checkpoint['format']})")
    return checkpoint


# --- the run directory ----------------------------------------------------------------------------


def table(rows, header, floats=".2f"):
    """Text table: first column to the left, the others to the right. Floats get `floats`."""
    cells = [[format(c, floats) if isinstance(c, float) else str(c) for c in r] for r in rows]
    cells.insert(0, list(header))
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = []
    for row in cells:
        rest = [c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True)]
        lines.append("  ".join([row[0].ljust(widths[0]), *rest]).rstrip())
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


class Nothing:
    """Takes every call and does nothing: the writer of processes that do not write."""

    def __getattr__(self, name):
        return self

    def __call__(self, *args, **kwargs):
        return self


LOCKS = {}  # run directory -> its locked file, which the kernel releases when the process ends


def lock(folder):
    """Claim a run directory for this process. Raises UserError where another one has it."""
    with contextlib.suppress(ImportError):  # no fcntl, no lock: Windows
        import fcntl

        if folder.resolve() in LOCKS:
            return
        file = open(folder / ".lock", "w")
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            file.close()
            raise UserError(
                f"{folder}: another process is training in it; wait for it or choose another --out"
            ) from None
        LOCKS[folder.resolve()] = file


def open_log(path):
    """log.jsonl for appending, without the torn line that a kill may have left at its end."""
    text = path.read_bytes() if path.exists() else b""
    end = text.rfind(b"\n") + 1
    if end < len(text):
        os.truncate(path, end)
    return open(path, "a")


class Run:
    """A run directory: one TensorBoard event file, log.jsonl, args.json, the script's source.

    args: the script's options (needs .out .overwrite .resume .seed .dataset .arch).
    script: the script's __file__; its name is the name of the method.
    hparam_metrics: tags shown in TensorBoard's HPARAMS tab; `close(metrics)` fills them.
    Of several processes only number 0 writes; `resumed` says whether a run was there to go on with.
    """

    current = None  # the run that a signal concerns
    again = None  # the command that goes on, where it is not --resume with the run's directory

    def __init__(self, args, script, hparam_metrics=()):
        self.script = script
        self.method = Path(script).stem
        name = f"{self.method}-{args.dataset}-{args.arch}-s{args.seed}"
        self.dir = Path(args.out or Path("runs") / name)
        self.options = {k: v for k, v in vars(args).items() if k not in ("resume", "overwrite")}
        self.resumed, self.training, self.stop = bool(args.resume), False, None
        if args.resume == "auto":
            self.resumed = (self.dir / "args.json").is_file()
        batch = self.options.get("batch_size", 0)
        if batch % world():
            raise UserError(
                f"--batch-size {batch}: does not divide among {world()} processes; it is the size "
                "of the global batch"
            )
        self.writer = Nothing()
        if rank() == 0:
            try:
                self._create(args.overwrite, hparam_metrics)
            except OSError as error:
                raise UserError(
                    f"cannot write the run directory {self.dir}: {error.strerror}"
                ) from None
        wait()
        self._tty = sys.stderr.isatty()
        self._began = self._shown = time.perf_counter()
        self._first = None
        Run.current = self
        print(f"run directory: {self.dir}")

    def _create(self, overwrite, hparam_metrics):
        from torch.utils.tensorboard import SummaryWriter

        if not self.resumed and not overwrite and (self.dir / "log.jsonl").exists():
            raise UserError(
                f"{self.dir} holds a run already: choose another --out, --resume {self.dir} to go "
                "on with it, or --overwrite to replace it"
            )
        self.dir.mkdir(parents=True, exist_ok=True)
        lock(self.dir)
        old = [*self.dir.glob(".*.pt.*")]  # what a kill left of a checkpoint half written
        if not self.resumed:
            old += [*self.dir.glob("events.out.*"), *self.dir.glob("*.pt")] if overwrite else []
        for file in old:
            file.unlink()
        if not self.resumed:
            (self.dir / "log.jsonl").unlink(missing_ok=True)
            source = Path(self.script)
            (self.dir / source.name).write_text(source.read_text())
            self.keep_options()
        self._log = open_log(self.dir / "log.jsonl")
        self.writer = SummaryWriter(str(self.dir), flush_secs=10)
        if not self.resumed:
            self._hparams(hparam_metrics)
        event = "resume" if self.resumed else "start"
        self.record(event=event, command=" ".join(sys.argv), **versions())

    def keep_options(self):
        """Write the options to go on with: at the start, and of a resumed run, whose options may
        have changed, as soon as its checkpoint has turned out to fit them."""
        (self.dir / ".args.json").write_text(json.dumps(self.options, indent=1) + "\n")
        os.replace(self.dir / ".args.json", self.dir / "args.json")

    def _hparams(self, names):
        """Options as a table (TEXT) and in HPARAMS, within this event file: `add_hparams` would
        open a second run directory."""
        from torch.utils.tensorboard.summary import hparams

        rows = "\n".join(f"| {k} | {v} |" for k, v in sorted(self.options.items()))
        self.writer.add_text("arguments", f"| option | value |\n|---|---|\n{rows}")
        simple = {k: v for k, v in self.options.items() if isinstance(v, (bool, int, float, str))}
        for summary in hparams(simple, dict.fromkeys(names, math.nan)):
            self.writer.file_writer.add_summary(summary)

    def scalars(self, step, values):
        """Write {tag: number or 0-d tensor}; a tensor on the GPU makes this a sync point."""
        for tag, value in values.items():
            self.writer.add_scalar(tag, float(value), step)

    def record(self, **fields):
        """Append one JSON line to log.jsonl, flushed."""
        if rank():
            return
        try:
            self._log.write(json.dumps(fields) + "\n")
            self._log.flush()
        except OSError as error:
            raise UserError(f"cannot write {self.dir}/log.jsonl: {error.strerror}") from None

    def progress(self, step, total, text="", done=False):
        """One line on a terminal, rewritten five times a second; in a pipe only `done` prints."""
        now = time.perf_counter()
        if self._first is None or step <= self._first[0]:
            self._first = (step, now)
        if rank() or (not done and (not self._tty or now - self._shown < 0.2)):
            return
        self._shown = now
        seconds = (now - self._first[1]) / max(step - self._first[0], 1) * (total - step)
        eta = f"{int(seconds) // 3600:d}:{int(seconds) // 60 % 60:02d}:{int(seconds) % 60:02d}"
        line = f"step {step}/{total}  {text}  eta {eta}"
        if self._tty:
            print("\r\033[K" + line, end="\n" if done else "", file=sys.stderr, flush=True)
        else:
            print(line, flush=True)

    def save(self, name, checkpoint):
        """Write a checkpoint of this run under its directory. Raises Diverged instead of writing
        weights or an optimizer that are not finite."""
        if rank():
            return
        states = checkpoint.get("optimizer", {}).get("state", {}).values()
        values = [*checkpoint["model"].values(), *(v for state in states for v in state.values())]
        values = [v.isfinite().all() for v in values if isinstance(v, torch.Tensor)]
        if values and not torch.stack([v.cpu() for v in values]).all():
            step = checkpoint.get("step")
            raise Diverged(f"{name}: weights not finite after {step} steps; not written", step)
        extra = {"method": self.method, "args": self.options, "versions": versions()}
        save_checkpoint(self.dir / name, {**extra, **checkpoint}, self.options.get("keep", 1))
        self.writer.flush()

    def newest(self, name, device):
        """(file name, content) of the newest checkpoint `name` that loads; (None, None) where none
        is. Says which do not load; UserError where none of several does."""
        path = self.dir / name
        files = [file for age in range(1000) if (file := older(path, age)).exists()]
        for file in files:
            try:
                return file.name, load_checkpoint(file, device)
            except UserError as error:
                print(f"warning: {error}", file=sys.stderr)
        if files:
            raise UserError(f"{path}: no older one loads either; delete them to begin {name} anew")
        return None, None

    def leave(self, reason):
        """End the process with status 0 and a line that tells how to go on."""
        start = "torchrun ..." if world() > 1 else "python"
        command = shlex.join(map(str, self.again or [sys.argv[0], "--resume", self.dir]))
        print(f"{reason}: stopped; go on with {start} {command}", flush=True)
        self.record(event="stop", reason=reason)
        self._end()
        sys.exit(0)

    def close(self, metrics, step=0):
        """Record the final metrics {tag: number} and close the files."""
        self.scalars(step, metrics)
        seconds = round(time.perf_counter() - self._began, 1)
        self.record(event="end", seconds=seconds, **metrics)
        self._end()

    def _end(self):
        Run.current = None
        self.writer.close()
        if rank() == 0:
            self._log.close()
            if held := LOCKS.pop(self.dir.resolve(), None):
                held.close()


class Guard:
    """What a training loop needs to survive: it goes on from its checkpoint, makes no update from a
    loss or gradient that is not finite, saves when due, and stops in order when told to.

    record: the Run. file: the name of the loop's checkpoint. model, optimizer, precision: whose
    states it holds; they are loaded. per_epoch, total: steps.

    start: the step to begin with, 0 without a checkpoint. state: the checkpoint's content, else {}.
    net: what to call in the loop: the model, spread over the processes and compiled if asked for.
    """

    def __init__(self, record, file, model, optimizer, precision, per_epoch, total):
        self.record, self.file, self.per_epoch, self.total = record, file, per_epoch, total
        self.model, self.optimizer, self.scaler = model, optimizer, precision.scaler
        options = {"max_skips": 0, "save_minutes": None, "save_every": 1} | record.options
        self.max_skips, self.save_every = options["max_skips"], options["save_every"]
        self.seconds = 60 * (options["save_minutes"] or math.inf)
        self.state = self._restore(next(model.parameters()).device)
        self.start, self.skipped = self.state.get("step", 0), self.state.get("skipped", 0)
        self.net = spread(model)
        if options.get("compile"):
            self.net = torch.compile(self.net)
        self.seen, self.buffers, self.saved = [], self._buffers(), time.monotonic()
        record.training = self.start < total

    def _restore(self, device):
        found = [None, None]
        if rank() == 0 and self.record.resumed:
            found = self.record.newest(self.file, device)
        if world() > 1:
            name = [found[0]]
            dist.broadcast_object_list(name)
            if rank():
                found = name[0], name[0] and load_checkpoint(self.record.dir / name[0], device)
        state = found[1] or {}
        if state:
            own = [{k: v for k, v in g.items() if k != "params"}
                   for g in self.optimizer.param_groups]  # fmt: skip
            try:
                self.model.load_state_dict(state["model"])
                self.optimizer.load_state_dict(state["optimizer"])
                for group, options in zip(self.optimizer.param_groups, own, strict=True):
                    group.update(options)  # these may have been changed for the rest of the run
                if state.get("scaler"):
                    self.scaler.load_state_dict(state["scaler"])
            except (RuntimeError, ValueError, KeyError) as error:
                reason = str(error).strip().split("\n")[0][:100]
                path = self.record.dir / found[0]
                raise UserError(f"{path}: does not fit these options ({reason})") from None
            if rank() == 0:
                self.record.keep_options()
        return {k: v for k, v in state.items() if k not in ("model", "optimizer")}

    def _buffers(self):
        return [b.clone() for b in self.model.buffers()] if self.max_skips else []

    def fine(self, step, lr, loss, norm):
        """Whether the update of this step may be made, from its loss and gradient norm (0-d).

        Without --max-skips the answer is True and the values are looked at by `check`, which
        every checkpoint asks first: no sync point here. With it they are looked at now, and a step
        left out leaves buffers as they were before it.
        """
        # under fp16 the scaler leaves out, and repeats, steps whose scaled gradient overflowed
        norm = torch.zeros_like(norm) if self.scaler.is_enabled() else norm
        self.seen.append((step, lr, torch.stack([loss.detach().float(), norm.float()])))
        if not self.max_skips:
            return True
        try:
            self.check()
        except Diverged as error:
            self.skipped += 1
            if self.skipped > self.max_skips:
                raise
            self.record.record(event="skip", step=step, reason=str(error).split(":")[0])
            print(f"step {step} left out, {self.skipped} of {self.max_skips}: {error}")
            for buffer, before in zip(self.model.buffers(), self.buffers, strict=True):
                buffer.copy_(before)
            self.record.training = True
            return False
        self.buffers = self._buffers()
        return True

    def check(self, together=True):
        """Raise Diverged if a step since the last call was not finite. A sync point, of all
        processes."""
        if not self.seen:
            return
        if self.scaler.is_enabled() and self.scaler.get_scale() < FP16_LEAST:
            self.record.training = False
            raise Diverged(
                "fp16: no gradient was finite for many steps, however small the loss was scaled; "
                "take --precision bf16 or fp32, or lower --lr",
                self.seen[-1][0],
            )
        values = torch.stack([v for *_, v in self.seen])
        values = (mean(values) if together else values).tolist()
        for (step, lr, _), (loss, norm) in zip(self.seen, values, strict=True):
            if not math.isfinite(loss + norm):
                self.seen, self.record.training = [], False
            check_finite(loss, step, lr, norm)
        if together:
            self.seen = []

    def save(self, done, **state):
        """After each step, `done` counting it: save if due, with `state` in the checkpoint; if a
        signal came, save and end the process."""
        last, record, stop = done == self.total, self.record, self._stop(done)
        due = done % (self.per_epoch * self.save_every) == 0
        if last or stop or due or time.monotonic() - self.saved > self.seconds:
            self.check(together=False)
            content = {"step": done, "skipped": self.skipped, "scaler": self.scaler.state_dict()}
            content |= {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}
            record.save(self.file, self.model.spec | content | state)
            self.saved = time.monotonic()
        if last:
            record.training = False
        if stop:
            record.leave(f"{record.stop or 'signal'} after step {done}")

    def _stop(self, done):
        """Whether a signal came; the processes agree, for all must stop after the same step."""
        if world() == 1:
            return self.record.stop is not None
        if done % AGREE and done != self.total:
            return False
        flag = torch.tensor(float(self.record.stop is not None))
        return bool(summed(flag))


def check_finite(loss, step, lr, grad_norm=0.0):
    """Raise Diverged when the loss or the gradient's norm is NaN or infinite: nothing of it may
    reach a checkpoint."""
    if not math.isfinite(loss) or not math.isfinite(grad_norm):
        raise Diverged(
            f"loss {loss} at step {step} (lr {lr:.4g}, gradient norm {float(grad_norm):.4g}): "
            "stopped; the last checkpoint is from before. Lower --lr, raise --warmup, or --clip",
            step,
        )


# --- charts -------------------------------------------------------------------------------------

COLOURS = ("#1b6ca8", "#d1495b", "#2e8b57", "#8e5ea2", "#c98a00", "#444444", "#00a0a0", "#e377c2")


def line_chart(path, title, curves, log=False):
    """Write an SVG line chart. curves: {label: [(x, value, low, high), ...]}, x from 0; where low
    and high differ, a band is drawn. What a logarithmic value axis cannot show is left out."""
    curves = {k: [p for p in c if not log or p[2] > 0] for k, c in curves.items()}
    points = [p for c in curves.values() for p in c]
    if not points:
        return
    scale = math.log10 if log else float
    left, top, width, height = 72, 28, 440, 280
    low, high = scale(min(p[2] for p in points)), scale(max(p[3] for p in points))
    low, high = (low, high) if high > low else (low - 0.5, low + 0.5)
    last = max(p[0] for p in points) or 1

    def xy(x, value):
        y = top + height * (high - scale(value)) / (high - low)
        return f"{left + width * x / last:.1f} {y:.1f}"

    parts = [f'<text x="{left}" y="18" font-weight="bold">{html.escape(title)}</text>']
    for k in range(5):
        x, y, value = left + width * k / 4, top + height * k / 4, high - (high - low) * k / 4
        label = f"{10**value if log else value:.3g}"
        parts.append(f'<path d="M{left} {y:.1f}h{width}" stroke="#ddd"/>')
        parts.append(f'<text x="{left - 6}" y="{y + 4:.1f}" text-anchor="end">{label}</text>')
        place = f'x="{x:.1f}" y="{top + height + 16}" text-anchor="middle"'
        parts.append(f"<text {place}>{last * k / 4:.4g}</text>")
    for i, (label, curve) in enumerate(curves.items()):
        colour = COLOURS[i % len(COLOURS)]
        if any(p[2] < p[3] for p in curve):
            edge = [xy(p[0], p[3]) for p in curve] + [xy(p[0], p[2]) for p in curve[::-1]]
            parts.append(f'<path d="M{"L".join(edge)}Z" fill="{colour}" fill-opacity="0.25"/>')
        if curve:
            line = "L".join(xy(*p[:2]) for p in curve)
            parts.append(f'<path d="M{line}" fill="none" stroke="{colour}" stroke-width="1.4"/>')
        place = f'x="{left + width + 8}" y="{top + 14 + 16 * i}" fill="{colour}"'
        parts.append(f"<text {place}>{html.escape(label)}</text>")
    size = f'width="{left + width + 150}" height="{top + height + 26}"'
    parts.insert(0, f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-size="12">')
    Path(path).write_text("\n".join([*parts, "</svg>\n"]))


def custom_scalars(writer, charts):
    """Lay out TensorBoard's CUSTOM SCALARS. charts: {title: list of tags, all in one chart}, or
    {title: (tags,)} for margins between the scalars "<tag>/low" and "<tag>/high"."""
    from tensorboard.compat.proto.summary_pb2 import Summary, SummaryMetadata
    from tensorboard.compat.proto.tensor_pb2 import TensorProto
    from tensorboard.plugins.custom_scalar import layout_pb2

    layout = layout_pb2.Layout()
    category = layout.category.add(title="charts")
    for title, tags in charts.items():
        chart = category.chart.add(title=title)
        if isinstance(tags, tuple):
            for tag in tags[0]:
                chart.margin.series.add(value=tag, lower=f"{tag}/low", upper=f"{tag}/high")
        else:
            chart.multiline.tag.extend(f"^{re.escape(tag)}$" for tag in tags)
    data = SummaryMetadata.PluginData(plugin_name="custom_scalars")
    tensor = TensorProto(dtype="DT_STRING", string_val=[layout.SerializeToString()])
    value = Summary.Value(
        tag="custom_scalars__config__", tensor=tensor, metadata=SummaryMetadata(plugin_data=data)
    )
    writer.file_writer.add_summary(Summary(value=[value]))
