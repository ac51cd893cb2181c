"""The training loop around a method: what is not the method stands here.

    loop = Loop(rundir, "student", model, optimizer, precision, batches, args.epochs)
    for step in loop:                                   # goes on from the checkpoint
        x, y = batches(step)
        loss = F.cross_entropy(loop.net(x), y)
        loop.backward(loss)                             # gradients, unscaled
        loop.step(lr_at(step, loop.total), clip=1.0)    # the update
        loop.log(loss=loss)                             # means every --log-every steps
        if loop.evaluates:                              # every --eval-every epochs, and at the end
            loop.report(**evaluate(model, held_out))

The loop sets training mode and the seed before each step. After each step it saves when due, and
leaves in order when a signal came. The forward pass, the loss and the order of events stay in the
script.
"""

import math
import time

import torch

from common.run.checkpoint import load_checkpoint
from common.run.device import can_compile, compiled, mean, rank, seed_key, spread, summed, world
from common.run.errors import Diverged, check_finite

FP16_LEAST = 2.0**-10  # a loss scale below this means that fp16 has failed; it starts at 65536
SHOWN = {"loss": "loss {:.3f}", "accuracy": "train {:.1f} %", "images_per_s": "{:.0f} img/s"}
ASK_EVERY = 10  # steps between the checks whether any process got a signal


def wants_compiled(options, device):
    """Whether a network is compiled: by --compile; without a word from the user on a GPU."""
    wish = options.get("compile")
    return wish or (wish is None and device.type == "cuda" and can_compile(device))


class Loop:
    """Iterator over the steps of one network's training.

    stage: the network's name in the run ("teacher"); its TensorBoard sub-run and checkpoint.
    batches: gives per_epoch, batch_size and seed. epochs, or steps: the length.

    net: what to call in the loop: the model, spread over processes, compiled if asked for.
    total: steps in all. evaluates, ends_epoch: flags of the current step.
    metrics: what was reported last. best: the best score kept.
    """

    def __init__(
        self, rundir, stage, model, optimizer, precision, batches, epochs=None, steps=None
    ):  # fmt: skip
        self.rundir = rundir
        self.stage = stage
        self.model = model
        self.optimizer = optimizer
        self.scaler = precision.scaler
        self.device = precision.device
        self.batches = batches
        self.per_epoch = batches.per_epoch
        self.total = steps or epochs * batches.per_epoch
        options = rundir.options
        self.eval_every = options["eval_every"] * (1 if steps else batches.per_epoch)
        self.log_every = options["log_every"]
        self.save_steps = options["save_every"] * batches.per_epoch
        self.save_seconds = 60 * (options["save_minutes"] or math.inf)
        state = rundir.restore(stage, model, optimizer, precision.scaler)
        self.start = state.get("step", 0)
        self.metrics = state.get("metrics", {})
        self.best = state.get("best")
        self.net = spread(model)
        self.compiles = wants_compiled(options, precision.device)
        if self.compiles:
            torch.compiler.reset()  # torch compiles a class of networks only a few times
        self.net = self.fast(self.net)
        self.means = {}
        self.done = self.start
        self._seen = []
        self._sums = None
        self._count = 0
        self._fresh = {}
        self._loss = None
        self._norm = None
        self._lr = 0.0
        self._clock = time.perf_counter()
        self._saved = time.monotonic()

    def fast(self, model):
        """Another model for this loop, compiled as `net` is. None stays None."""
        return compiled(model, self.device) if self.compiles and model is not None else model

    def __iter__(self):
        self.rundir.begin(self.stage, self.start, self.total, self.per_epoch)
        self._clock = time.perf_counter()
        for step in range(self.start, self.total):
            self.done = step + 1
            self.model.train()
            if self.compiles:
                torch.compiler.cudagraph_mark_step_begin()  # the step before needs no result
            seed = seed_key(self.batches.seed, "step", step)  # dropout depends on (seed, step) only
            torch.manual_seed(seed_key(seed, rank()) if rank() else seed)
            yield step
            self._after()
        self.rundir.end(self.stage)
        self.model.eval()

    @property
    def ends_epoch(self):
        return self.done % self.per_epoch == 0

    @property
    def evaluates(self):
        return self.done % self.eval_every == 0 or self.done == self.total

    @property
    def logs(self):
        return self.done % self.log_every == 0 or self.ends_epoch or self.evaluates

    # --- the words of a script ------------------------------------------------------------------

    def backward(self, loss):
        """Gradients of the loss in `.grad`, unscaled."""
        self.optimizer.zero_grad(set_to_none=True)
        self.scaler.scale(loss).backward()
        self.scaler.unscale_(self.optimizer)
        self._loss = loss.detach()

    def step(self, lr, clip=0.0):
        """Update the weights at rate lr; clip: largest gradient norm, 0 for none."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group.get("lr_scale", 1.0)
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), clip or math.inf)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self._lr = lr
        self._norm = norm
        if self.scaler.is_enabled():  # the scaler skips and repeats steps that overflowed
            norm = torch.zeros_like(norm)
            self._norm = self._norm.nan_to_num(0, 0, 0)
        self._seen.append((self.done - 1, lr, torch.stack([self._loss.float(), norm.float()])))

    def log(self, **values):
        """Add 0-d tensors to the means that TensorBoard gets every --log-every steps."""
        row = torch.stack([v.detach().float() for v in (*values.values(), self._norm)])
        self._sums = row if self._sums is None else self._sums + row
        self._count += 1
        if not self.logs:
            self.rundir.moving(self.stage, self.done, self._text())
            return
        self.check()  # sync point
        means = mean(self._sums / self._count).tolist()
        self.means = dict(zip((*values, "grad_norm"), means, strict=True))
        seconds = time.perf_counter() - self._clock
        self.means["images_per_s"] = self._count * self.batches.batch_size / seconds
        self.rundir.scalars(self.stage, self.done, {**self.means, "lr": self._lr})
        self._sums = None
        self._count = 0
        self._clock = time.perf_counter()
        self.rundir.moving(self.stage, self.done, self._text())

    def report(self, **metrics):
        """Numbers of an evaluation: TensorBoard, log.jsonl and the checkpoint get them."""
        self.metrics = self.metrics | metrics
        self._fresh = self._fresh | metrics
        self.rundir.scalars(self.stage, self.done, metrics)
        self._clock = time.perf_counter()

    def keep_best(self, score):
        """Keep the weights of the highest score; `load_best` brings them back."""
        if self.best is None or score > self.best:
            self.best = score
            content = {"step": self.done, "metrics": self.metrics, "model": self.model.state_dict()}
            self.rundir.save_best(self.stage, self.model.spec | content)

    def load_best(self):
        path = self.rundir.dir / self.rundir.best_file(self.stage)
        device = next(self.model.parameters()).device
        self.model.load_state_dict(load_checkpoint(path, device)["model"])

    # --- after the step -------------------------------------------------------------------------

    def _text(self):
        length = f"{self.total / self.per_epoch:.1f}".removesuffix(".0")
        text = f"epoch {self.done / self.per_epoch:.1f}/{length}"
        parts = [SHOWN[k].format(v) for k, v in self.means.items() if k in SHOWN]
        return "  ".join([text, *parts])

    def _after(self):
        if self._fresh or self.ends_epoch or self.done == self.total:
            row = {"stage": self.stage, "epoch": self.done // self.per_epoch, "step": self.done}
            self.rundir.log(**row, **self.means, eval=self._fresh)
            shown = "".join(f"  {k} {v:.2f}" for k, v in self._fresh.items() if v is not None)
            self.rundir.line(self.stage, self.done, self._text() + shown)
            self._fresh = {}
        self._save()

    def check(self, together=True):
        """Raise Diverged if a step since the last call was not finite. A sync point."""
        if not self._seen:
            return
        last_step = self._seen[-1][0]
        if self.scaler.is_enabled() and self.scaler.get_scale() < FP16_LEAST:
            self.rundir.training = False
            raise Diverged(
                "fp16: no gradient was finite for many steps, however small the loss was scaled; "
                "take --precision bf16 or fp32, or lower --lr",
                last_step,
            )
        values = torch.stack([v for *_, v in self._seen])
        values = (mean(values) if together else values).tolist()
        if not all(math.isfinite(loss + norm) for loss, norm in values):
            self.rundir.training = False
        for (step, lr, _), (loss, norm) in zip(self._seen, values, strict=True):
            check_finite(loss, step, lr, norm)
        if together:
            self._seen = []

    def _save(self):
        last = self.done == self.total
        stop = self._told_to_stop()
        due = self.done % self.save_steps == 0
        if last or stop or due or time.monotonic() - self._saved > self.save_seconds:
            self.check(together=False)
            state = {"step": self.done, "total": self.total, "metrics": self.metrics}
            state |= {"best": self.best, "stage": self.stage, "scaler": self.scaler.state_dict()}
            state |= {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}
            self.rundir.save(self.rundir.file(self.stage), self.model.spec | state)
            self._saved = time.monotonic()
        if stop:
            self.rundir.leave(f"after step {self.done} of {self.total} of {self.stage}")

    def _told_to_stop(self):
        """Whether a signal came. The processes agree: all must stop after the same step."""
        if world() == 1:
            return self.rundir.signal is not None
        if self.done % ASK_EVERY and self.done != self.total:
            return False
        return bool(summed(torch.tensor(float(self.rundir.signal is not None))))
