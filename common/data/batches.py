"""Augmented training batches that are a function of the step."""

import torch
import torch.nn.functional as F

from common import run
from common.data import folders
from common.run import UserError


class Batches:
    """Shuffled batches for training; `batches(step)` depends on (seed, step) alone.

    images: Images; the rows of an epoch's order that fill no batch are left out.
    augment: for tensors a random crop after zero padding by an eighth of the side (4 pixels at 32,
    as He et al. 2016) and, with `flip`, horizontal flip; for files what `folders.Stream` does. The
    draws of an epoch come from a CPU generator, so they are the same on every device, and go to the
    device in one transfer. They are made for the global batch of `batch_size`, of which each
    process gets its own rows, or all of them with `whole`.
    """

    def __init__(self, images, batch_size, seed, augment=True, flip=True, whole=False):
        if batch_size > len(images.y):
            raise UserError(f"--batch-size {batch_size}: there are only {len(images.y)} images")
        self.images, self.batch_size, self.seed, self.augment = images, batch_size, seed, augment
        self.per_epoch = len(images.y) // batch_size
        self.pad, self.mirror = images.x.shape[-1] // 8, flip
        self.own = slice(0, batch_size) if whole else run.rows(batch_size)
        self.epoch = self.stream = None
        if isinstance(images.x, folders.Files):
            self.stream = folders.Stream(*images, batch_size, seed, augment, flip, not whole)

    def _draw(self, epoch):
        rng = run.generator(self.seed, "epoch", epoch)
        n, device = len(self.images.y), self.images.x.device
        self.order = torch.randperm(n, generator=rng).to(device)
        self.shift = torch.randint(2 * self.pad + 1, (2, n), generator=rng).to(device)
        self.flip = (torch.rand(n, generator=rng) < 0.5 * self.mirror).to(device)
        self.epoch = epoch

    def __call__(self, step):
        """(x, y) of this process: float in [0,1] (B,3,S,S) channels_last, int64 (B,)."""
        if self.stream:
            return self.stream(step)
        epoch, i = divmod(step, self.per_epoch)
        if epoch != self.epoch:
            self._draw(epoch)
        first = i * self.batch_size
        rows = slice(first + self.own.start, first + self.own.stop)
        x, y = self.images.take(self.order[rows])
        if self.augment:
            x = crop_flip(x, *self.shift[:, rows], self.flip[rows], self.pad)
        return run.to_float(x), y


def crop_flip(x, dy, dx, flip, pad):
    """Shift x (N,C,S,S) by (dy, dx) in 0..2*pad after zero padding; mirror the rows of `flip`."""
    size = x.shape[-1]
    windows = F.pad(x, (pad,) * 4).unfold(2, size, 1).unfold(3, size, 1)
    x = windows[torch.arange(len(x), device=x.device), :, dy, dx]
    return torch.where(flip.view(-1, 1, 1, 1), x.flip(3), x)
