"""What a loop knows of its steps: their means, whether all is finite, when a checkpoint is due."""

import math
import time

import torch

from common.run.device import mean
from common.run.errors import Diverged, check_finite

NOTICED = 0.25  # seconds: a checkpoint that takes longer is not written after every epoch
RARELY = 50  # times its own seconds that must lie between two such: 2 % of the time
FP16_LEAST = 2.0**-10  # a loss scale below this means that fp16 has failed; it starts at 65536


class Means:
    """Means of 0-d tensors over steps; they stay on their device until `take`.

    batch_size: images of a step, for the speed. state: where a run that was stopped stood.
    """

    def __init__(self, batch_size, state=None):
        self.batch_size = batch_size
        self.names, self.sums, self.count = state or ([], None, 0)
        self.start()

    def state(self):
        """For a checkpoint. Of several processes it is that of the one that writes."""
        return (self.names, self.sums, self.count) if self.count else None

    def start(self):
        """Start the clock, for what comes before is no training."""
        self.began = time.perf_counter()
        self.timed = 0

    def add(self, values):
        """Add a step's {name: 0-d tensor}; the names are those of the step before."""
        self.names = list(values)
        row = torch.stack([v.detach().float() for v in values.values()])
        self.sums = row if self.sums is None else self.sums.to(row.device) + row
        self.count += 1
        self.timed += 1

    def take(self):
        """{name: mean over steps and processes} and images_per_s; begins anew. A sync point."""
        means = mean(self.sums / self.count).tolist()
        seconds = time.perf_counter() - self.began
        found = dict(zip(self.names, means, strict=True))
        found["images_per_s"] = self.timed * self.batch_size / seconds
        self.sums = None
        self.count = 0
        self.start()
        return found


class Saving:
    """When a checkpoint is due, by the options save_every (epochs) and save_minutes.

    Without save_every it is due after every epoch, but rarely where writing takes long.
    `with saving:` stands around the writing and measures it.
    """

    def __init__(self, options, per_epoch):
        self.steps = (options["save_every"] or 1) * per_epoch
        self.thins = options["save_every"] is None
        self.seconds = 60 * (options["save_minutes"] or math.inf)
        self.cost = 0.0
        self.last = time.monotonic()

    def due(self, done):
        """Whether a checkpoint is due after so many steps."""
        passed = time.monotonic() - self.last
        by_epochs = done % self.steps == 0
        if self.thins and self.cost > NOTICED:
            by_epochs = by_epochs and passed > RARELY * self.cost
        return by_epochs or passed > self.seconds

    def __enter__(self):
        self.began = time.monotonic()

    def __exit__(self, *error):
        self.last = time.monotonic()
        self.cost = self.last - self.began


class Watch:
    """Collects loss and gradient norm of each step, and looks at many of them at once.

    A GPU is waited for only when `check` is called. scaler: the GradScaler of the training.
    """

    def __init__(self, scaler):
        self.scaler = scaler
        self.steps = []

    def add(self, step, lr, loss, norm):
        """Remember a step's loss and gradient norm, 0-d tensors; lr is named in an error.

        With fp16 the norm may be infinite: the scaler leaves such a step out."""
        if self.scaler.is_enabled():
            norm = torch.zeros_like(norm)
        self.steps.append((step, lr, torch.stack([loss.float(), norm.float()])))

    def check(self, together=True):
        """Raise Diverged if a step since the last check was not finite. A sync point.

        together: all processes call it, and all of them raise if one must.
        """
        if not self.steps:
            return
        if self.scaler.is_enabled() and self.scaler.get_scale() < FP16_LEAST:
            raise Diverged(
                "fp16: no gradient was finite for many steps, however small the loss was scaled; "
                "take --precision bf16 or fp32, or lower --lr",
                self.steps[-1][0],
            )
        values = torch.stack([v for *_, v in self.steps])
        values = (mean(values) if together else values).tolist()
        for (step, lr, _), (loss, norm) in zip(self.steps, values, strict=True):
            check_finite(loss, step, lr, norm)
        if together:
            self.steps = []
