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
leaves in order at a signal. Forward pass, loss and the order of events stay in the script.
"""

import torch

from common.run.average import Average
from common.run.checkpoint import load_checkpoint
from common.run.clipping import clip_gradients
from common.run.device import compiled, rank, seed_key, spread, summed, wants_compiled, world
from common.run.errors import Diverged
from common.run.progress import shown
from common.run.steps import Means, Saving, Watch

ASK_EVERY = 10  # steps between the checks whether any process got a signal


class Loop:
    """Iterator over the steps of one network's training.

    stage: the network's name in the run ("teacher"); its TensorBoard sub-run and checkpoint.
    batches: gives per_epoch, batch_size and seed. epochs, or steps: the length.
    net: what to call in the loop: the model, spread over processes, compiled if asked for.
    total: steps in all. evaluates, ends_epoch: flags of the current step.
    metrics: what was reported last. best: the best score kept. average.model: what to evaluate.
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
        self.eval_every = max(1, options["eval_every"] * (1 if steps else self.per_epoch))
        self.log_every = options["log_every"]
        self._saving = Saving(options, self.per_epoch)
        state = rundir.restore(stage, model, optimizer, precision.scaler)
        self.average = Average(model, options.get("ema", 0.0), state)
        self.start = state.get("step", 0)
        self.metrics = state.get("metrics", {})
        self.best = state.get("best")
        self.compiles = wants_compiled(options, precision.device, self.total)
        if self.compiles:
            torch.compiler.reset()  # torch compiles a class of networks only a few times
        self.net = self.compiled(spread(model))
        self.means = {}
        self.done = self.start
        self._watch = Watch(precision.scaler)
        self._means = Means(batches.batch_size, state.get("means"))
        self._fresh, self._loss, self._norm = {}, None, None

    def compiled(self, model):
        """Another model for this loop, compiled as `net` is. None stays None."""
        return compiled(model, self.device) if self.compiles and model is not None else model

    def __iter__(self):
        self.rundir.begin(self.stage, self.start, self.total, self.batches)
        self._means.start()
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
        nearest = round(round(self.done / self.eval_every) * self.eval_every)
        return self.done in (nearest, self.total)

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
        norm = clip_gradients(self.model, clip)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.average.update(self.done, self.total)
        self._watch.add(self.done - 1, lr, self._loss, norm)
        self._lr = lr
        self._norm = norm.nan_to_num(0, 0, 0) if self.scaler.is_enabled() else norm

    def log(self, **values):
        """Add 0-d tensors to the means that TensorBoard gets every --log-every steps."""
        self._means.add({**values, "grad_norm": self._norm})
        if self.logs:
            self.check()  # sync point
            self.means = self._means.take()
            self.rundir.scalars(self.stage, self.done, {**self.means, "lr": self._lr})
        self.rundir.moving(self.stage, self.done, self._numbers())

    def report(self, **metrics):
        """Numbers of an evaluation: TensorBoard, log.jsonl and the checkpoint get them."""
        self.metrics = self.metrics | metrics
        self._fresh = self._fresh | metrics
        self.rundir.scalars(self.stage, self.done, metrics)
        self._means.start()

    def keep_best(self, score):
        """Keep the weights of the highest score; `load_best` brings them back, if any."""
        if self.best is None or score > self.best:
            self.best = score
            content = {"step": self.done, "metrics": self.metrics} | self._options()
            self.rundir.save_best(self.stage, self.model.spec | content | self.average.state())

    def load_best(self):
        if self.best is not None:
            path = self.rundir.dir / self.rundir.best_file(self.stage)
            self.model.load_state_dict(load_checkpoint(path, self.device)["model"])

    # --- after the step -------------------------------------------------------------------------

    def _numbers(self):
        return shown(self.means, self.done / self.per_epoch, self.total / self.per_epoch)

    def _after(self):
        if self._fresh or self.ends_epoch or self.done == self.total:
            row = {"stage": self.stage, "epoch": self.done // self.per_epoch, "step": self.done}
            self.rundir.log(**row, **self.means, eval=self._fresh)
            fresh = {k: f"{v:.2f}" for k, v in self._fresh.items() if v is not None}
            if fresh or self.eval_every >= self.per_epoch:
                self.rundir.row(self.stage, self.done, {**self._numbers(), **fresh})
            self._fresh = {}
        self._save()

    def check(self, together=True):
        """Raise Diverged if a step since the last check was not finite. A sync point."""
        try:
            self._watch.check(together)
        except Diverged:
            self.rundir.stopped(self.stage)
            raise

    def _save(self):
        stop = self._told_to_stop()
        if stop or self.done == self.total or self._saving.due(self.done):
            self.check(together=False)
            state = {"step": self.done, "total": self.total, "metrics": self.metrics}
            state |= {"best": self.best, "stage": self.stage, "scaler": self.scaler.state_dict()}
            state |= {**self.average.state(), "optimizer": self.optimizer.state_dict()}
            state["means"] = self._means.state()
            state |= self._options()
            with self._saving:
                self.rundir.save(self.rundir.file(self.stage), self.model.spec | state)
        if stop:
            self.rundir.leave(f"after step {self.done} of {self.total} of {self.stage}")

    def _options(self):
        """The run's options, with the seed of this network, and what --tune chose for it."""
        own = self.rundir.tuned.get(self.stage.removesuffix(f"-s{self.batches.seed}"), {})
        return {"args": self.rundir.options | {"seed": self.batches.seed} | own}

    def _told_to_stop(self):
        """Whether a signal came. The processes agree: all must stop after the same step."""
        came = self.rundir.signal is not None
        if world() == 1 or (self.done % ASK_EVERY and self.done != self.total):
            return came and world() == 1
        return bool(summed(torch.tensor(float(came))))
