"""What a run prints while it trains: a moving line on a terminal, and rows that stay."""

import contextlib
import os
import shutil
import sys
import time

from common.run.device import rank


class Lasting:
    """A text stream that outlives its reader. `| head`, a closed terminal or a full device never
    end a run: what cannot be written is dropped, and so is all that follows. `lost` tells."""

    def __init__(self, stream):
        self._stream = stream
        self.lost = False
        with contextlib.suppress(AttributeError, ValueError, OSError):
            stream.reconfigure(errors="backslashreplace")  # terminals that are not UTF-8

    def __getattr__(self, name):
        return getattr(self._stream, name)

    def write(self, text):
        try:
            return self._stream.write(text)
        except (OSError, ValueError):
            self._drop()
            return len(text)

    def flush(self):
        try:
            self._stream.flush()
        except (OSError, ValueError):
            self._drop()

    def _drop(self):
        self.lost = True
        with contextlib.suppress(Exception):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())
            os.close(nowhere)


def clock(seconds):
    """h:mm:ss of a number of seconds."""
    seconds = int(seconds)
    return f"{seconds // 3600:d}:{seconds // 60 % 60:02d}:{seconds % 60:02d}"


class Progress:
    """The moving line goes to stderr of a terminal, at most five times a second and cut to its
    width. Lines that stay go to stdout, so that `| tee log` keeps them."""

    def __init__(self):
        self._moves = sys.stderr.isatty() and not rank()
        self._shown = 0.0
        self._open = False

    def moving(self, text):
        now = time.monotonic()
        if not self._moves or now - self._shown < 0.2:
            return
        self._shown = now
        self._open = True
        width = shutil.get_terminal_size().columns - 1
        print("\r\033[K" + text[:width], end="", file=sys.stderr, flush=True)

    def line(self, text):
        self.clear()
        if not rank():
            print(text, flush=True)

    def clear(self):
        """Remove the moving line, so that what follows stands at the start of its own."""
        if self._open:
            print("\r\033[K", end="", file=sys.stderr, flush=True)
            self._open = False


def window():
    """Characters in a line of the terminal that stdout goes to; None for a file or a pipe."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else None


SHOWN = {"loss": ("loss", ".3f"), "accuracy": ("train %", ".1f"), "images_per_s": ("img/s", ".0f")}


def shown(means, epoch, epochs):
    """{heading: text} of a step: its epoch, and those means over the last steps that are shown."""
    longest = f"{epochs:.1f}/{round(epochs, 1):g}"
    text = f"{epoch:.1f}/{round(epochs, 1):g}".rjust(len(longest))
    means = {SHOWN[k][0]: format(v, SHOWN[k][1]) for k, v in means.items() if k in SHOWN}
    return {"epoch": text, **means}


class Rows:
    """The rows of a growing table. Its headings stand again above a new network or column."""

    SPARE = ("img/s", "train_accuracy", "eta")  # the moving line and `train %` have them too
    LEAST = 5  # characters of a column, so that rows stay in line as numbers grow

    def __init__(self):
        self._network = None
        self._widths = {}

    def text(self, network, numbers, width=None):
        """What to print for {heading: text}, whose last heading stays last. Where a window of
        `width` characters is too narrow for all, the spare columns are left out."""
        *others, last = numbers
        names = dict.fromkeys([*(k for k in self._widths if k != last), *others, last])
        new = network != self._network or names.keys() != self._widths.keys()
        cells = {k: max(self.LEAST, len(k), len(numbers.get(k, ""))) for k in names}
        self._network = network
        self._widths = {k: max(own, self._widths.get(k, 0)) for k, own in cells.items()}
        first = max(len("network"), len(network))
        columns = dict(self._widths)
        for name in self.SPARE:
            if width and first + sum(2 + own for own in columns.values()) > width:
                columns.pop(name, None)
        rows = [("network", {k: k for k in columns})] if new else []
        return "\n".join(
            name.ljust(first) + "".join(f"  {own.get(k, ''):>{w}}" for k, w in columns.items())
            for name, own in [*rows, (network, numbers)]
        )


class Remaining:
    """Seconds that a job still takes, from the epochs of its stages and the speed of this one.

    plan: {stage: epochs}, in order; a stage that is not in it counts by itself.
    """

    def __init__(self):
        self.plan = {}
        self._planned = False

    @property
    def over(self):
        """Whether every training of the plan has ended."""
        return self._planned and not self.plan

    def set(self, plan):
        self._planned = True
        self.plan = {stage: epochs for stage, epochs in plan.items() if epochs}

    def begin(self, stage, done, total, per_epoch):
        self._stage = stage
        self._first = (done, time.monotonic())
        self._total = total
        self._per_epoch = per_epoch

    def end(self, stage):
        self.plan.pop(stage, None)

    def text(self, done):
        first, began = self._first
        if done <= first:
            return "-"
        later = sum(epochs for stage, epochs in self.plan.items() if stage != self._stage)
        steps = self._total - done + later * self._per_epoch
        return clock((time.monotonic() - began) / (done - first) * steps)
