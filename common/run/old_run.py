"""The run directory: events, log.jsonl, args.json, the script, checkpoints and their lock."""

import contextlib
import json
import math
import os
import shlex
import signal
import sys
import time
from pathlib import Path

import torch

from common.run.checkpoint import load_checkpoint, older, save_checkpoint, versions
from common.run.device import rank, wait, world
from common.run.errors import Diverged, UserError


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
