"""The task of the deep linear network: Gaussian inputs and a linear map of them, in one batch."""

import torch

from common import run


class Gaussian:
    """x ~ N(0, I) (1000,10) and y = A x with a Gaussian matrix A, in double precision.

    It stands for a data set, which has no images to hold out, and for its batches. There are no
    epochs; `per_epoch` counts the steps between two checkpoints.
    """

    per_epoch = 1000
    batch_size = 1000
    classes = ()
    model_kwargs = {}  # noqa: RUF012 - never changed
    val = test = None

    def __init__(self, seed, device, width=10, samples=1000):
        self.seed = seed
        rng = run.generator(seed, "gaussian")
        a = torch.randn(width, width, generator=rng, dtype=torch.float64)
        x = torch.randn(samples, width, generator=rng, dtype=torch.float64)
        self.x = x.to(device)
        self.y = (x @ a.T).to(device)

    def __call__(self, step):
        return self.x, self.y
