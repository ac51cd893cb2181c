"""Gaussian, shot and impulse noise."""

import functools
import math

import numpy as np
import torch

from common.corruptions.filters import _divide, _finish, _unit

GAUSSIAN_NOISE = {  # standard deviation
    32: (0.04, 0.06, 0.08, 0.09, 0.10),
    64: (0.04, 0.08, 0.12, 0.15, 0.18),
    224: (0.08, 0.12, 0.18, 0.26, 0.38),
}


def _gaussian_noise(x, c, z):
    """z (n,3,S,S): standard normal."""
    return _finish(_unit(x).add_(z * c))


SHOT_NOISE = {  # photons at full intensity
    32: (500, 250, 100, 75, 50),
    64: (250, 100, 50, 30, 15),
    224: (60, 25, 12, 5, 3),
}


@functools.lru_cache
def _poisson_table(c, device):
    """Walker's alias tables of the output level of Poisson(v c / 255) / c, v = 0..255.

    Returns (threshold (256*256,) float64, level (256*256*2,) uint8): bin k of level v gives k
    below the threshold, else its alias.
    """
    counts = np.arange(2 * c + 60 + int(20 * math.sqrt(c)))  # the tail beyond is below 1e-20
    levels = (np.clip(counts / c, 0, 1) * 255).astype(np.uint8)
    log_factorial = np.cumsum(np.log(np.maximum(counts, 1)))
    threshold = np.ones((256, 256))
    alias = np.tile(np.arange(256), (256, 1))
    for v in range(1, 256):
        mean = v / 255 * c
        mass = np.bincount(levels, np.exp(counts * math.log(mean) - mean - log_factorial), 256)
        mass *= 256 / mass.sum()
        small, large = np.flatnonzero(mass < 1).tolist(), np.flatnonzero(mass >= 1).tolist()
        while small and large:
            i, j = small.pop(), large[-1]
            threshold[v, i], alias[v, i] = mass[i], j
            mass[j] -= 1 - mass[i]
            if mass[j] < 1:
                small.append(large.pop())
    threshold[0], alias[0] = 0, 0  # black stays black
    level = np.stack([np.tile(np.arange(256), (256, 1)), alias], -1).astype(np.uint8)
    return [torch.tensor(table.ravel(), device=device) for table in (threshold, level)]


def _shot_noise(x, c, u):
    """u (n,3,S,S): uniform in [0,1), float64, or int64 photon counts."""
    if not u.is_floating_point():
        return _finish(_divide(u.double(), c))
    threshold, level = _poisson_table(c, x.device)
    u = u.reshape(-1) * 256  # its top 8 bits choose the bin, the rest decides at the threshold
    bin = u.floor()
    place = x.view(-1).double().mul_(256).add_(bin).long()
    alias = u.sub_(bin) >= threshold.index_select(0, place)
    return level.index_select(0, place.mul_(2).add_(alias.long())).view_as(x)


IMPULSE_NOISE = {  # share of values replaced
    32: (0.01, 0.02, 0.03, 0.05, 0.07),
    64: (0.01, 0.02, 0.05, 0.08, 0.14),
    224: (0.03, 0.06, 0.09, 0.17, 0.27),
}


def _impulse_noise(x, c, u, v):
    """u, v (n,3,S,S): uniform. Per channel value; the two choices of scikit-image 0.18."""
    share = c / (c + (1 - c))  # NumPy's `choice` divides by the sum of its probabilities
    flipped = (u < share).view(torch.uint8).neg_()  # 255 where true
    salt = (v < 0.5).view(torch.uint8).neg_()
    return (x & ~flipped) | (salt & flipped)
