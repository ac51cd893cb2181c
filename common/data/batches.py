"""Augmented training batches that are a function of the step."""

from common import run
from common.run import UserError


class Batches:
    """Shuffled batches for training; `batches(step)` depends on (seed, step) alone.

    images: Images or Files. The rows of an epoch's order that fill no batch are left out.
    augment: images in memory get a random crop after zero padding by an eighth of the side. These
    are 4 pixels at 32, as in He et al. 2016. Files get a random resized crop. With `flip` both are
    mirrored at random. Order and draws are made for the global batch of `batch_size`. Each process
    gets its own rows of it, or all of them with `whole`.
    """

    def __init__(self, images, batch_size, seed, augment=True, flip=True, whole=False):
        if batch_size > len(images):
            raise UserError(f"--batch-size {batch_size}: there are only {len(images)} images")
        self.batch_size, self.seed = batch_size, seed
        self.per_epoch = len(images) // batch_size
        part = slice(0, batch_size) if whole else run.rows(batch_size)
        self.read = images.shuffled(batch_size, seed, augment, flip, part)

    def __call__(self, step):
        """(x, y) of this process: float in [0,1] (B,3,S,S) channels_last, int64 (B,)."""
        x, y = self.read(step)
        return run.to_float(x), y
