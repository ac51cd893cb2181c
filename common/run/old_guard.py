"""What a training loop needs to survive."""

import math
import time

import torch
import torch.distributed as dist

from common.run.checkpoint import load_checkpoint
from common.run.device import mean, rank, spread, summed, world
from common.run.errors import Diverged, UserError, check_finite

FP16_LEAST = 2.0**-10  # scale of the loss below which fp16 has failed, from 65536 on
AGREE = 10  # steps between the questions of torchrun's processes whether one was told to stop


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
