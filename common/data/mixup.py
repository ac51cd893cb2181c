"""Mixup: every image is mixed with another one of its batch."""

import torch

from common import run


def mixup(x, y, alpha, seed, step):
    """Mix the images of a global batch; every process gets its own rows.

    x (N,3,H,W) and labels y (N,) are those of all processes. One share per batch is drawn from
    Beta(alpha, alpha), a function of (seed, step) alone (Zhang et al. 2018). Returns the mixed
    images, the labels, those of the partners, and the share of the first.
    """
    rng = run.generator(seed, "mixup", step)
    gammas = torch._standard_gamma(torch.full((2,), alpha, dtype=torch.float64), generator=rng)
    share = (gammas[0] / gammas.sum()).item()
    partner = run.upload(torch.randperm(len(y), generator=rng), y.device)
    mixed = share * x + (1 - share) * x[partner]
    own = run.rows(len(y))
    return mixed[own], y[own], y[partner][own], share
