"""Images in memory with their labels. `files.Files` answers to the same names for image files.

for x, y in images.batches(250):           # uint8 (n,3,S,S), int64 (n,), in order
few = images.take(rows)                    # these rows as tensors
part = images.subset(rows)                 # these rows, of the same kind
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from common import run


@dataclass(frozen=True)
class Images:
    """x uint8 (N,3,S,S), y int64 (N,), both on one device. `x, y = images` takes them apart."""

    x: torch.Tensor
    y: torch.Tensor

    in_memory = True
    only = None  # the classes that an evaluation restricts the logits to; None for all
    unreadable = ()  # positions of the images that could not be read

    def __len__(self):
        return len(self.y)

    def __iter__(self):
        yield from (self.x, self.y)

    def changed(self, x):
        """Other images with the same labels."""
        return Images(x, self.y)

    @property
    def size(self):
        """Pixels of a side."""
        return self.x.shape[-1]

    @property
    def device(self):
        """Where both tensors are."""
        return self.x.device

    def batches(self, batch_size):
        """Yield (x, y) of `batch_size` images in order; the last batch may have fewer."""
        yield from zip(self.x.split(batch_size), self.y.split(batch_size), strict=True)

    def take(self, rows, complete=False):
        """The Images of an index tensor or slice. `complete` matters to files alone."""
        return Images(self.x[rows], self.y[rows])

    def subset(self, rows):
        """The same as `take`: images in memory are decoded."""
        return Images(self.x[rows], self.y[rows])

    def cropped(self, scale):
        """These images. `scale` is for crops of photographs; small images are shifted instead."""
        return self

    def to(self, device):
        """The same images on another device."""
        return Images(self.x.to(device), self.y.to(device))

    def shuffled(self, batch_size, seed, augment, flip, part):
        """A function of the step that returns a training batch, see `Batches`."""
        return Shuffled(self, batch_size, seed, augment, flip, part)


class Shuffled:
    """Training batches of images in memory: (x uint8 (B,3,S,S), y (B,)) of a step.

    The draws of an epoch come from a CPU generator, so they are the same on every device. They go
    to the device in one transfer. part: slice of each batch that this process gets.
    """

    def __init__(self, images, batch_size, seed, augment, flip, part):
        self.images, self.batch_size, self.seed = images, batch_size, seed
        self.augment, self.mirror, self.part = augment, flip, part
        self.pad = images.size // 8
        self.epoch = None

    def _draw(self, epoch):
        rng = run.generator(self.seed, "epoch", epoch)
        n, device = len(self.images), self.images.device
        self.order = torch.randperm(n, generator=rng).to(device)
        self.shift = torch.randint(2 * self.pad + 1, (2, n), generator=rng).to(device)
        self.flip = (torch.rand(n, generator=rng) < 0.5 * self.mirror).to(device)
        self.epoch = epoch

    def __call__(self, step):
        epoch, i = divmod(step, len(self.images) // self.batch_size)
        if epoch != self.epoch:
            self._draw(epoch)
        first = i * self.batch_size
        rows = slice(first + self.part.start, first + self.part.stop)
        x, y = self.images.take(self.order[rows])
        if self.augment:
            x = crop_flip(x, *self.shift[:, rows], self.flip[rows], self.pad)
        return x, y


def crop_flip(x, dy, dx, flip, pad):
    """Shift x (N,C,S,S) by (dy, dx) in 0..2*pad after zero padding; mirror the rows of `flip`."""
    size = x.shape[-1]
    windows = F.pad(x, (pad,) * 4).unfold(2, size, 1).unfold(3, size, 1)
    x = windows[torch.arange(len(x), device=x.device), :, dy, dx]
    return torch.where(flip.view(-1, 1, 1, 1), x.flip(3), x)
