"""The run directory: what a run leaves on disk, and how it is left.

    runs/ct-shapes-wrn10-1-s0/
        args.json  log.jsonl  ct.py               options, numbers, the script that made them
        teacher.pt  baseline.pt  last.pt          a checkpoint per network
        teacher/  baseline/  student/             TensorBoard: a sub-run per network, equal tags

The first SIGTERM, SIGUSR1, SIGHUP or Ctrl-C ends a training after its step, with a checkpoint and
exit status 75 ("try again"). Under torchrun the status is 0, for 75 would be a failure there. Of
several processes only number 0 writes.
"""

import contextlib
import json
import math
import os
import re
import shlex
import signal
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist

from common.run.checkpoint import load_checkpoint, older, on_host, save_checkpoint, versions
from common.run.device import (
    device_name,
    environment_number,
    rank,
    refuse_graphs_twice,
    wait,
    world,
)
from common.run.errors import Diverged, UserError
from common.run.pictures import show_batch
from common.run.progress import Progress, Remaining, Rows, window

SIGNALS = [s for s in ("SIGTERM", "SIGUSR1", "SIGHUP", "SIGINT") if hasattr(signal, s)]
TRY_AGAIN = 75  # exit status of a run that was told to stop (EX_TEMPFAIL)
KEEP = 2  # checkpoints of a network while it trains: the newest and the one before
# What --resume may change. All else decides what the steps so far mean.
MAY_CHANGE = {
    "out", "device", "data_dir", "workers", "strict", "compile", "precision", "capture", "seeds",
    "log_every", "eval_every", "save_every", "save_minutes", "epochs", "steps", "lr", "momentum",
    "weight_decay", "clip", "warmup", "robust_images", "corrupted_images", "probe_images",
    "teacher_epochs", "teacher_lr", "teacher_clip", "baseline", "norms", "variants", "lrs",
    "measure_every",
}  # fmt: skip


class Nothing:
    """Takes every call and does nothing: the writer of processes that do not write."""

    def __getattr__(self, name):
        return self

    def __call__(self, *args, **kwargs):
        return self


def answered():
    """The signals that a run answers by leaving in order. Under nohup SIGHUP stays ignored."""
    numbers = [getattr(signal, name) for name in SIGNALS]
    ignored = [n for n in numbers if signal.getsignal(n) is signal.SIG_IGN]
    return [n for n in numbers if n not in ignored or n != getattr(signal, "SIGHUP", None)]


class RunDir:
    """args: the script's options (needs out, overwrite, resume, seed, dataset, arch).
    script: the script's __file__; its name is the method's. last: the network whose checkpoint is
    last.pt; the others are <stage>.pt. results: names of the final numbers, for HPARAMS.
    """

    def __init__(self, args, script, precision=None, last=None, results=()):
        self.script = Path(script)
        self.method = self.script.stem
        self.last = last
        self.results = results
        self.dir = Path(args.out or default_name(args, self.method)).expanduser()
        hidden = ("resume", "overwrite", "differs")
        self.options = {k: v for k, v in vars(args).items() if k not in hidden}
        self.tuned = {}  # {variant: {option: value}} that a search chose, "tuned" their names
        self.differs = dict(getattr(args, "differs", {}))
        self.resumed = bool(args.resume)
        if args.resume == "auto":
            self.resumed = (self.dir / "args.json").is_file()
        self.signal = None
        self.training = False
        self.progress = Progress()
        self.rows = Rows()
        self.remaining = Remaining()
        self._writers = {}
        self._steps = {}
        self._log = self._lock = None
        if precision:
            refuse_graphs_twice(self.options, precision.device)
        batch = self.options.get("batch_size", 0)
        if batch % world():
            raise UserError(
                f"--batch-size {batch}: does not divide among {world()} processes; it is the size "
                "of the global batch"
            )
        if rank() == 0:
            try:
                self._create(args.overwrite, device_name(precision and precision.device))
            except OSError as error:
                raise UserError(
                    f"cannot write the run directory {self.dir}: {error.strerror}"
                ) from None
        wait()
        self._began = time.perf_counter()
        self._handlers = {}
        for number in answered():
            with contextlib.suppress(ValueError):  # not the main thread: no signals here
                self._handlers[number] = signal.signal(number, self._on_signal)
        epochs = [f"{args.epochs} epochs"] if getattr(args, "epochs", None) else []
        where = [precision.name, str(precision.device)] if precision else []
        print(f"{self.method}: {', '.join([args.dataset, args.arch, *epochs, *where])}")
        print(f"run directory: {self.dir}")

    def _create(self, overwrite, device):
        if not self.resumed and not overwrite and (self.dir / "log.jsonl").exists():
            raise UserError(
                f"{self.dir} holds a run already: choose another --out, --resume {self.dir} to go "
                "on with it, or --overwrite to replace it"
            )
        teacher = self.options.get("teacher")
        if overwrite and teacher and self.dir.resolve() in Path(teacher).resolve().parents:
            raise UserError(f"--overwrite: {teacher} lies in {self.dir}, which is replaced")
        self.dir.mkdir(parents=True, exist_ok=True)
        self._lock = lock(self.dir)
        if self.resumed:
            self._check_options()
        old = [*self.dir.glob(".*.pt.*")]  # what a kill left of a checkpoint half written
        if not self.resumed and overwrite:
            old += [*self.dir.glob("*.pt"), *self._curves()]
        for file in old:
            file.unlink()
        if not self.resumed:
            (self.dir / "log.jsonl").unlink(missing_ok=True)
            (self.dir / self.script.name).write_bytes(self.script.read_bytes())
            self.keep_options()
        self._log = open_log(self.dir / "log.jsonl")
        event = "resume" if self.resumed else "start"
        self.log(event=event, command=shlex.join(sys.argv), device=device, **versions())

    def _curves(self):
        """The TensorBoard files of this run; not those of runs that lie in folders below."""
        for file in self.dir.glob("**/events.out.*"):
            below = file.parents[: file.parents.index(self.dir)]
            if not any((folder / "log.jsonl").exists() for folder in below):
                yield file

    def _check_options(self):
        """UserError where --resume changes what the steps so far were made with."""
        saved = read_options(self.dir)
        if saved.get("method", self.method) != self.method:
            raise UserError(f"--resume {self.dir}: is a run of {saved['method']}.py")
        for key, old in saved.items():
            new = json.loads(json.dumps(self.options.get(key, old)))
            if key not in MAY_CHANGE and new != old:
                raise UserError(
                    f"--resume {self.dir}: its --{key.replace('_', '-')} is {old}, not {new}; "
                    "leave the option out, or begin another run"
                )
        other = f"{self.last}.pt" if self.last else "last.pt"
        if (self.dir / other).exists():  # its network would be trained anew
            raise UserError(
                f"--resume {self.dir}: holds {other}, of a run of "
                f"{'several networks' if self.last else 'one network'}; begin another run"
            )

    def keep_options(self):
        """Write the options to go on with. A resumed run does so once its checkpoint fits them."""
        text = json.dumps({"method": self.method, **self.options}, indent=1)
        (self.dir / ".args.json").write_text(text + "\n")
        os.replace(self.dir / ".args.json", self.dir / "args.json")

    # --- numbers --------------------------------------------------------------------------------

    def writer(self, stage):
        """TensorBoard's writer of one network; it begins with the options."""
        if rank():
            return Nothing()
        if stage not in self._writers:
            from torch.utils.tensorboard import SummaryWriter

            fresh = not (self.dir / stage).is_dir()
            self._writers[stage] = SummaryWriter(str(self.dir / stage), flush_secs=10)
            if fresh:
                self._write_options(stage)
        return self._writers[stage]

    def _write_options(self, stage):
        """All options as a table (TEXT); those that differ from the default in HPARAMS."""
        from torch.utils.tensorboard.summary import hparams

        writer = self._writers[stage]
        rows = "\n".join(f"| {k} | {v} |" for k, v in sorted(self.options.items()))
        writer.add_text("arguments", f"| option | value |\n|---|---|\n{rows}")
        first = {"network": stage, **self.differs}
        simple = {k: v for k, v in first.items() if isinstance(v, (bool, int, float, str))}
        for summary in hparams(simple, {f"final/{name}": math.nan for name in self.results}):
            writer.file_writer.add_summary(summary)

    def scalars(self, stage, step, values):
        """Write {tag: number} at a step of a network."""
        self._steps[stage] = step
        for tag, value in values.items():
            if value is not None:
                self.writer(stage).add_scalar(tag, float(value), step)

    def step(self, stage):
        """The last step of a network that was written."""
        return self._steps.get(stage, 0)

    def log(self, **fields):
        """Append one JSON line to log.jsonl, flushed."""
        if rank():
            return
        try:
            self._log.write(json.dumps(fields) + "\n")
            self._log.flush()
        except OSError as error:
            raise UserError(f"cannot write {self.dir}/log.jsonl: {error.strerror}") from None

    def plan(self, **epochs):
        """Say how long each network trains, 0 for one that does not, for the time that is left."""
        self.remaining.set(epochs)

    def begin(self, stage, start, total, batches):
        """A training begins, or goes on from step `start`. TensorBoard gets its first batch."""
        if start > total:
            raise UserError(f"{stage} was trained for {start} steps, which is more than {total}")
        self.training = start < total
        self._steps[stage] = start
        self.remaining.begin(stage, start, total, batches.per_epoch)
        if start == 0:
            show_batch(self.writer(stage), batches(0)[0])
        if start and self.training:
            self.progress.line(f"going on: {stage} from step {start} of {total}")

    def stopped(self, stage):
        """A training is over, at its end or where it diverged."""
        self.training = False
        self.remaining.end(stage)

    def end(self, stage):
        self.stopped(stage)
        if not rank():
            for age in range(1, KEEP):
                older(self.dir / self.file(stage), age).unlink(missing_ok=True)

    def moving(self, stage, done, numbers):
        """Show {heading: text} of a network's step for a moment."""
        words = [f"{name} {text}" for name, text in numbers.items()]
        self.progress.moving("  ".join([stage, *words, f"eta {self.remaining.text(done)}"]))

    def row(self, stage, done, numbers):
        """Print {heading: text} of a network's step, and the time that is left."""
        numbers = {**numbers, "eta": self.remaining.text(done)}
        self.progress.line(self.rows.text(stage, numbers, window()))

    def close(self, final):
        """Record the final numbers {"<name>/<stage>": value} and close the files."""
        for key, value in final.items():
            name, _, stage = key.partition("/")
            if stage in self._writers or (self.dir / stage).is_dir():
                self.writer(stage).add_scalar(f"final/{name}", value, self.step(stage))
        seconds = round(time.perf_counter() - self._began, 1)
        self.log(event="end", seconds=seconds, **final)
        self._end()

    def _end(self):
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self._handlers = {}
        self.progress.clear()
        for writer in self._writers.values():
            writer.close()
        for file in (self._log, self._lock):
            if file:
                file.close()

    # --- checkpoints ----------------------------------------------------------------------------

    def file(self, stage):
        return "last.pt" if stage == self.last else f"{stage}.pt"

    def best_file(self, stage):
        return "best.pt" if stage == self.last else f"{stage}-best.pt"

    def kept(self, stage):
        """The Path of the weights to evaluate: the best that were kept, else the last."""
        best = self.dir / self.best_file(stage)
        return best if best.exists() else self.dir / self.file(stage)

    def save(self, name, state):
        """Write a checkpoint. Raises Diverged instead of writing numbers that are not finite."""
        if rank():
            return
        states = state.get("optimizer", {}).get("state", {}).values()
        values = [*state["model"].values(), *(v for own in states for v in own.values())]
        tensors = [v for v in values if isinstance(v, torch.Tensor)]
        finite = all(  # the host waits once for a device
            torch.stack([v.isfinite().all() for v in tensors if v.device == device]).all()
            for device in {v.device for v in tensors}
        )
        if not finite:
            step = state.get("step")
            raise Diverged(f"{name}: weights not finite after {step} steps; not written", step)
        extra = {"method": self.method, "args": self.options, "versions": versions()}
        extra["dataset"] = self.options["dataset"]
        save_checkpoint(self.dir / name, {**extra, **on_host(state)}, KEEP)
        for writer in self._writers.values():
            writer.flush()

    def save_best(self, stage, state):
        self.save(self.best_file(stage), {"stage": stage, **state})

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

    def restore(self, stage, model, optimizer, scaler):
        """The newest checkpoint's state, loaded into model and optimizer; {} without one."""
        device = next(model.parameters()).device
        name = state = None
        if rank() == 0 and self.resumed:
            name, state = self.newest(self.file(stage), device)
        if world() > 1:
            names = [name]
            dist.broadcast_object_list(names)
            name = names[0]
            if rank() and name:
                state = load_checkpoint(self.dir / name, device)
        if not state:
            return {}
        own = [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]
        try:
            model.load_state_dict(state["model"])
            optimizer.load_state_dict(state["optimizer"])
            for group, options in zip(optimizer.param_groups, own, strict=True):
                group.update(options)  # they may have been changed for the rest of the run
            if state.get("scaler"):
                scaler.load_state_dict(state["scaler"])
        except (RuntimeError, ValueError, LookupError, TypeError, AttributeError) as error:
            reason = str(error).strip().split("\n")[0][:100]
            path = self.dir / name
            raise UserError(f"{path}: does not fit these options ({reason})") from None
        if rank() == 0:
            self.keep_options()
        return state

    # --- leaving --------------------------------------------------------------------------------

    def _on_signal(self, number, frame):
        """While a network trains, ask its loop to stop after the step; else all is saved."""
        name = signal.Signals(number).name
        if not self.training:
            self.signal = name
            self.leave("in the final evaluation" if self.remaining.over else "between trainings")
        if self.signal and number == signal.SIGINT:
            raise KeyboardInterrupt  # the second Ctrl-C
        self.signal = name

    def leave(self, where):
        """End the process with status 75 and a line that tells how to go on.

        Under torchrun the status is 0: it would take 75 for a failure, and begin again."""
        reason = self.signal or "signal"
        self.log(event="stop", reason=f"{reason} {where}")
        self._end()
        status = TRY_AGAIN if world() == 1 else 0
        how = "" if status else ", not finished, exit status 0 as under torchrun"
        text = f"\n{reason}: stopped {where}{how}; go on with\n  {command_to_resume()}"
        print(text, flush=True)
        if getattr(sys.stdout, "lost", False):  # Ctrl-C ends a `| tee` too, and before this
            print(text, file=sys.stderr, flush=True)
        sys.exit(status)


def default_name(args, method):
    """runs/<script>-<data>-<arch>-<options that differ from the default>-s<seed>."""
    hidden = ("dataset", "arch", "seed", "seeds")
    words = [f"{k.replace('_', '-')}-{text(v)}" for k, v in args.differs.items() if k not in hidden]
    arch = re.split(r"[/\\]", args.arch)[-1].replace(".py:", "-")  # of FILE.py:NAME no path
    return Path("runs") / "-".join([method, args.dataset, arch, *words, f"s{args.seed}"])


def text(value):
    """A value as part of a file name."""
    if isinstance(value, (list, tuple)):
        return "+".join(map(text, value))
    return "".join(c if c.isalnum() or c in "._+" else "_" for c in str(value))[:40]


def command_to_resume():
    """The command line that goes on with this run, from any directory.

    Under torchrun it has the options that the environment tells. A job of several machines needs
    their meeting point too, which stands there as "...".
    """
    words = [w for w in sys.argv[1:] if w != "--overwrite"]
    if "--resume" not in words:
        words += ["--resume", "auto"]
    command = shlex.join([os.path.abspath(sys.argv[0]), *words])
    return f"cd {shlex.quote(os.getcwd())} && {launcher()} {command}"


def launcher():
    """What stands before the script on the command line: python, or torchrun and its options."""
    if world() == 1:
        return "python"
    each = environment_number("LOCAL_WORLD_SIZE", world())
    machines = world() // each
    words = ["torchrun", f"--nproc-per-node={each}"]
    words.insert(1, "--standalone" if machines == 1 else f"--nnodes={machines}")
    if restarts := environment_number("TORCHELASTIC_MAX_RESTARTS", 0):
        words.append(f"--max-restarts={restarts}")
    return " ".join(words if machines == 1 else [*words, "..."])


def read_options(folder):
    """The options of a run directory, from args.json."""
    file = Path(folder) / "args.json"
    if not file.is_file():
        raise UserError(f"--resume {folder}: no args.json there, so it is no run directory")
    try:
        options = json.loads(file.read_text())
    except ValueError:
        raise UserError(f"{file}: not JSON; give the options and --overwrite") from None
    if not isinstance(options, dict):
        raise UserError(f"{file}: holds no options; give the options and --overwrite")
    return options


def lock(folder):
    """A locked file, which the kernel releases when the process ends: one process to a run
    directory. Raises UserError where another one has it; None where files cannot be locked."""
    try:
        import fcntl
    except ImportError:  # Windows
        return None
    file = open(folder / ".lock", "w")
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        file.close()
        raise UserError(
            f"{folder}: another process is training in it; wait for it or choose another --out"
        ) from None
    return file


def open_log(path):
    """log.jsonl for appending, without the torn line that a kill may have left at its end."""
    if path.exists() and not path.is_file():  # to open a pipe would wait for its reader
        raise UserError(f"{path}: no file; move it away, or choose another --out")
    content = path.read_bytes() if path.exists() else b""
    end = content.rfind(b"\n") + 1
    if end < len(content):
        os.truncate(path, end)
    return open(path, "a")
