"""Everything around a method: errors, seeds, precision, evaluation, checkpoints, the run directory.

Nothing here knows a method. A script reads

    args = parse_args()                      # its own options + add_arguments(parser)
    run = Run(args, __file__)                # runs/<name>: events, log.jsonl, args.json, the script
    precision = Precision(args.precision, device)
    ...
    run.save("last.pt", {...}); run.close(metrics)
"""

import argparse
import contextlib
import hashlib
import html
import json
import math
import os
import platform
import re
import subprocess
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F

FORMAT = 1  # of checkpoints; raised when a reader would misunderstand an older file
ROOT = Path(__file__).resolve().parent.parent


class UserError(Exception):
    """A mistake of the user's: one line that says what is wrong and what to do."""


class Diverged(UserError):
    """The loss is not finite any more."""


def cli(main, parse_args):
    """Last line of every script. A `UserError` ends in one line on stderr and exit status 2."""
    try:
        main(parse_args())
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        sys.exit(130)


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
    group.add_argument("--resume", metavar="RUN", help="go on with this run directory")
    group.add_argument("--seed", type=nonnegative(int), default=0)
    group.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")
    group.add_argument("--precision", default="auto", choices=["auto", "fp32", "bf16", "fp16"])
    group.add_argument("--compile", action=argparse.BooleanOptionalAction, default=False)
    group.add_argument("--log-every", type=positive(int), default=50, help="steps between scalars")
    group.add_argument("--save-every", type=positive(int), default=1, help="epochs between saves")


def parse(parser, argv=None):
    """Parse `argv`; with `--resume RUN` the options saved there are the defaults."""
    args = parser.parse_args(argv)
    if args.resume:
        file = Path(args.resume) / "args.json"
        if not file.is_file():
            raise UserError(
                f"--resume {args.resume}: no args.json there, so it is no run directory"
            )
        saved = json.loads(file.read_text())
        known = {k: v for k, v in saved.items() if k in vars(args)}
        parser.set_defaults(**known | {"out": args.resume, "overwrite": False})
        args = parser.parse_args(argv)
        args.out = args.resume
    return args


# --- device, precision, randomness ----------------------------------------------------------------


def get_device(name):
    """`auto` is the GPU if there is one. Raises UserError for a device that is not there."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError):
        raise UserError(f"--device {name}: not available here (try --device cpu)") from None
    if device.type == "cuda":
        torch.backends.cudnn.benchmark = True
        torch.backends.cudnn.allow_tf32 = False  # fp32 means fp32; speed is bf16's part
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


def metrics(logits, y, bins=15):
    """error (%), loss (nats), ece (%): expected calibration error over `bins` equal bins."""
    confidence, predicted = logits.softmax(1).max(1)
    wrong = (predicted != y).double()
    which = (confidence * bins).long().clamp(max=bins - 1)
    gap = torch.zeros(bins, dtype=torch.float64, device=y.device)
    gap.index_add_(0, which, confidence.double() - (1 - wrong))
    return {
        "error": 100 * wrong.mean().item(),
        "loss": F.cross_entropy(logits, y).item(),
        "ece": 100 * (gap.abs().sum() / len(y)).item(),
    }


def evaluate(model, x, y, precision=None, batch_size=500):
    """`metrics` of the model on images x (N,3,H,W) with labels y (N,). Percent and nats."""
    return metrics(predict(model, x, precision, batch_size), y)


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


def save_checkpoint(path, checkpoint):
    """Write a dict of tensors, numbers, strings, lists and dicts; the name appears when all is
    on disk. Raises UserError where the file cannot be written; an older file then stays."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(temporary, "wb") as file:
            torch.save({"format": FORMAT, **checkpoint}, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from None
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


class Run:
    """A run directory: one TensorBoard event file, log.jsonl, args.json, the script's source.

    args: the script's options (needs .out .overwrite .resume .seed .dataset .arch).
    script: the script's __file__; its name is the name of the method.
    hparam_metrics: tags shown in TensorBoard's HPARAMS tab; `close(metrics)` fills them.
    """

    def __init__(self, args, script, hparam_metrics=()):
        from torch.utils.tensorboard import SummaryWriter

        self.method = Path(script).stem
        name = f"{self.method}-{args.dataset}-{args.arch}-s{args.seed}"
        self.dir = Path(args.out or Path("runs") / name)
        self.options = {k: v for k, v in vars(args).items() if k not in ("resume", "overwrite")}
        if not args.resume and not args.overwrite and (self.dir / "log.jsonl").exists():
            raise UserError(
                f"{self.dir} holds a run already: choose another --out, --resume {self.dir} to go "
                "on with it, or --overwrite to replace it"
            )
        try:
            self.dir.mkdir(parents=True, exist_ok=True)
            if args.overwrite and not args.resume:
                for old in [*self.dir.glob("events.out.*"), *self.dir.glob("*.pt")]:
                    old.unlink()
            self._log = open(self.dir / "log.jsonl", "a" if args.resume else "w")
            if not args.resume:
                (self.dir / "args.json").write_text(json.dumps(self.options, indent=1) + "\n")
                (self.dir / Path(script).name).write_text(Path(script).read_text())
            self.writer = SummaryWriter(str(self.dir))
        except OSError as error:
            raise UserError(
                f"cannot write the run directory {self.dir}: {error.strerror}"
            ) from None
        if not args.resume:
            self._hparams(hparam_metrics)
            self.record(event="start", command=" ".join(sys.argv), **versions())
        self._tty = sys.stderr.isatty()
        self._began = self._shown = time.perf_counter()
        self._first = None
        print(f"run directory: {self.dir}")

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
        self._log.write(json.dumps(fields) + "\n")
        self._log.flush()

    def progress(self, step, total, text="", done=False):
        """One line on a terminal, rewritten five times a second; in a pipe only `done` prints."""
        now = time.perf_counter()
        if self._first is None or step <= self._first[0]:
            self._first = (step, now)
        if not done and (not self._tty or now - self._shown < 0.2):
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
        """Write a checkpoint of this run under its directory."""
        extra = {"method": self.method, "args": self.options, "versions": versions()}
        save_checkpoint(self.dir / name, {**extra, **checkpoint})

    def close(self, metrics, step=0):
        """Record the final metrics {tag: number} and close the files."""
        self.scalars(step, metrics)
        seconds = round(time.perf_counter() - self._began, 1)
        self.record(event="end", seconds=seconds, **metrics)
        self.writer.close()
        self._log.close()


def check_finite(loss, step, lr, grad_norm=math.nan):
    """Raise Diverged when the loss is NaN or infinite: nothing of it may reach a checkpoint."""
    if not math.isfinite(loss):
        raise Diverged(
            f"loss {loss} at step {step} (lr {lr:.4g}, gradient norm {float(grad_norm):.4g}): "
            "stopped; the last checkpoint is from before. Lower --lr, raise --warmup, or --clip"
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
