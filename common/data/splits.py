"""Which rows of a data set are held out, the same for every class."""

import torch

from common import run
from common.run import UserError


def shuffled(n):
    """A fixed order of n held-out rows, so that the first few of them are a sample of all."""
    return torch.randperm(n, generator=run.generator(0, "test order"))


def stratified_split(y, size, seed, option):
    """Indices (rest, chosen), both ascending. `chosen` has `size` rows, as evenly per class as the
    counts allow. `seed` draws them, and the classes that get one more. Raises UserError naming
    `option` when there are too few rows."""
    if size > len(y):
        raise UserError(f"{option} {size}: there are only {len(y)} images")
    order = torch.randperm(len(y), generator=run.generator(seed, "split"))
    # Rank of every row within its class, in random order; the lowest ranks are chosen.
    by_class = order[y[order].argsort(stable=True)]
    counts = torch.bincount(y)
    turn = torch.randperm(len(counts), generator=run.generator(seed, "split classes"))
    label = y[by_class]
    rank = torch.arange(len(y)) - (counts.cumsum(0) - counts)[label]
    chosen = by_class[(rank * len(counts) + turn[label]).argsort()[:size]].sort().values
    rest = torch.ones(len(y), dtype=torch.bool)
    rest[chosen] = False
    return rest.nonzero().flatten(), chosen
