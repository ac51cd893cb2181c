"""Defocus, glass, motion and zoom blur."""

import functools
import math

import numpy as np
import torch
import torch.nn.functional as F

from common.corruptions.filters import (
    _divide,
    _finish,
    _gather,
    _gaussian,
    _normalised,
    _planes,
    _unit,
    _zoom,
)

DEFOCUS_BLUR = {  # radius of the disk, standard deviation of its smoothing
    32: ((0.3, 0.4), (0.4, 0.5), (0.5, 0.6), (1, 0.2), (1.5, 0.1)),
    64: ((0.5, 0.6), (1, 0.1), (1.5, 0.1), (2.5, 0.01), (3, 0.1)),
    224: ((3, 0.1), (4, 0.5), (6, 0.5), (8, 0.5), (10, 0.5)),
}


@functools.lru_cache
def _disk(radius, alias):
    """The original's kernel (K,K), float32 as OpenCV computes it. Where the disk touches the rim
    (radius 8 and 10) it sums to 1.013 and 1.011: kept."""
    rim, r = (8, 1) if radius <= 8 else (radius, 2)
    square = np.arange(-rim, rim + 1) ** 2
    disk = (square + square[:, None] <= radius**2).astype(np.float32)
    disk /= disk.sum()
    weights = np.float32(_normalised([math.exp(-0.5 / alias**2 * k**2) for k in range(-r, r + 1)]))
    for order in ((1, 0, 2), (0, 1, 2)):  # rows, columns: each has its order of multiply-adds
        padded = np.pad(disk, ((0, 0), (r, r)), "reflect")
        at = [padded[:, k : k + 2 * rim + 1] for k in range(2 * r + 1)]
        terms = [at[r]] + [at[r - k] + at[r + k] for k in range(1, r + 1)]
        disk = np.float32(0)
        for k in order[: r + 1]:  # fused: rounded once (float64 holds the product exactly)
            disk = np.float32(terms[k].astype(np.float64) * float(weights[r + k]) + disk)
        disk = disk.T
    return disk.astype(np.float64)


def _defocus_blur(x, c):
    kernel, size = _disk(*c), x.shape[-1]
    taps = [(i, j, kernel[i, j]) for i, j in np.argwhere(kernel > 1e-18).tolist()]
    reach = max(abs(k - len(kernel) // 2) for tap in taps for k in tap[:2])
    off = len(kernel) // 2 - reach
    x = F.pad(_unit(x), (reach,) * 4, mode="reflect")
    if len(taps) <= 32:
        out = x.new_zeros(*x.shape[:2], size, size)
        for i, j, weight in taps:
            out.add_(x[:, :, i - off :, j - off :][:, :, :size, :size], alpha=weight)
    else:
        kernel = torch.from_numpy(kernel[off : len(kernel) - off, off : len(kernel) - off]).to(x)
        kernel = torch.fft.rfft2(kernel, s=x.shape[2:]).conj()
        out = torch.fft.irfft2(torch.fft.rfft2(x).mul_(kernel), s=x.shape[2:])
        out = out[:, :, :size, :size]
    return _finish(out)


GLASS_BLUR = {  # standard deviation, farthest shift, passes
    32: ((0.05, 1, 1), (0.25, 1, 1), (0.4, 1, 1), (0.25, 1, 2), (0.4, 1, 2)),
    64: ((0.1, 1, 1), (0.5, 1, 1), (0.6, 1, 2), (0.7, 2, 1), (0.9, 2, 2)),
    224: ((0.7, 1, 2), (0.9, 2, 1), (1, 2, 3), (1.1, 3, 2), (1.5, 4, 2)),
}


def _glass_blur(x, c, u):
    """u (n,passes,B,B,2), B = S - 2d: uniform; [..., 0] is the shift in x, [..., 1] in y, for
    rows and columns d+1..S-d counted downwards, as the original visits them.

    The original's swap copies the neighbour and leaves it as it was. A neighbour visited earlier
    in the pass has been overwritten by then, so the source is followed to its own source.
    """
    sigma, d, passes = c
    n, size, device = len(x), x.shape[-1], x.device
    count = size**2
    shift = (u * (2 * d)).floor_().sub_(d)
    shift = (shift[..., 1] * size).add_(shift[..., 0]).long().flip(2, 3)
    place = torch.arange(count, device=device)
    visited = torch.zeros(size, size, dtype=torch.bool, device=device)
    visited[d + 1 : size - d + 1, d + 1 : size - d + 1] = True
    visited = visited.view(-1)
    offset = torch.arange(n, device=device)[:, None] * (2 * count)
    total = place.expand(n, count)
    for k in range(passes):
        source = place.repeat(n, 1)
        source.view(n, size, size)[:, d + 1 : size - d + 1, d + 1 : size - d + 1] += shift[:, k]
        if d > 1:
            done = ~(visited[source] & (source > place))
            # nodes 0..count-1: the new value of a pixel; count..2*count-1: its old value
            source = source + count * done
            old = (place + count).expand(n, count)
            for _ in range(7):  # chains of up to 128 links; one of 40 has probability 1e-16
                both = torch.cat([source, old], 1).view(-1)
                source = both.index_select(0, (source + offset).view(-1)).view(n, count)
            source = source - count
        total = total.gather(1, source)
    x = _finish(_gaussian(_unit(x), sigma))
    return _finish(_gaussian(_unit(_gather(x, total).view_as(x)), sigma))


MOTION_BLUR = {  # radius, standard deviation
    32: ((6, 1), (6, 1.5), (6, 2), (8, 2), (9, 2.5)),
    64: ((10, 1), (10, 1.5), (10, 2), (10, 2.5), (12, 3)),
    224: ((10, 3), (15, 5), (15, 8), (15, 12), (20, 15)),
}


def _motion(x, radius, sigma, angle):
    """ImageMagick's motion blur of uint8 (n,C,S,S), angle (n,) in degrees: taps on one side, at
    whole pixels, the edge replicated. Quantum 16 bits: rounds v to 1/257, then truncates."""
    n, channels, size, _ = x.shape
    width = 2 * math.ceil(radius) + 1
    weights = _normalised([math.exp(-(k**2) / (2 * sigma**2)) for k in range(width)])
    weights = torch.tensor([w for w in weights if w > 1e-18], dtype=torch.float64, device=x.device)
    taps = len(weights)
    tap = torch.arange(taps, device=x.device)
    angle = torch.deg2rad(angle)[:, None]
    dx = torch.ceil(tap * angle.cos() - 0.5).long()
    dy = torch.ceil(tap * angle.sin() - 0.5).long()
    # out[plane, row, :] = sum_k w_k padded[plane, row + dy_k, reach + dx_k :]: a bag of embeddings
    # whose table holds every run of S neighbours of a row (overlapping, so nothing is copied)
    reach = taps - 1
    padded = F.pad(x.double(), (reach, reach, 0, 0), mode="replicate")
    pitch = size + 2 * reach
    table = padded.as_strided((padded.numel() - size + 1, size), (1, 1))
    row = torch.arange(size, device=x.device)[:, None] + dy[:, None, None, :]
    plane = torch.arange(n * channels, device=x.device).view(n, channels, 1, 1) * size
    bags = (plane + row.clamp_(0, size - 1)) * pitch + (reach + dx)[:, None, None, :]
    out = F.embedding_bag(
        bags.view(-1, taps),
        table,
        mode="sum",
        per_sample_weights=weights.repeat(n * channels * size, 1),
    )
    return out.add_(0.5 / 257).to(torch.uint8).view_as(x)


def _motion_blur(x, c, u):
    """u (n,1): uniform."""
    return _motion(x, *c, -45 + 90 * u[:, 0])


ZOOM_BLUR = {  # arguments of NumPy's arange
    32: ((1, 1.06, 0.01), (1, 1.11, 0.01), (1, 1.16, 0.01), (1, 1.21, 0.01), (1, 1.26, 0.01)),
    64: ((1, 1.06, 0.01), (1, 1.11, 0.01), (1, 1.16, 0.01), (1, 1.21, 0.01), (1, 1.26, 0.01)),
    224: ((1, 1.11, 0.01), (1, 1.16, 0.01), (1, 1.21, 0.02), (1, 1.26, 0.02), (1, 1.31, 0.03)),
}


def _zoom_blur(x, c):
    factors = np.arange(*c).tolist()
    y = _unit(_planes(x)).float()  # interpolated in float64, summed in float32
    wide, total = y.double(), torch.zeros_like(y)
    for factor in factors:
        total += _zoom(wide, factor).float()
    total = _divide(total.add_(y), len(factors) + 1)
    return _finish(total).reshape(x.shape).contiguous()
