"""The four extra corruptions, which are never part of a mean."""

import torch
import torch.nn.functional as F

from common.corruptions.filters import _divide, _finish, _gaussian, _hsv, _unit

SPECKLE_NOISE = {
    32: (0.06, 0.1, 0.12, 0.16, 0.2),
    64: (0.15, 0.2, 0.25, 0.3, 0.35),
    224: (0.15, 0.2, 0.35, 0.45, 0.6),
}


def _speckle_noise(x, c, z):
    """z (n,3,S,S): standard normal."""
    x = _unit(x)
    return _finish((z * c).mul_(x).add_(x))


GAUSSIAN_BLUR = {  # standard deviation
    32: (0.4, 0.6, 0.7, 0.8, 1),
    64: (0.5, 0.75, 1, 1.25, 1.5),
    224: (1, 2, 3, 4, 6),
}


def _gaussian_blur(x, c):
    return _finish(_gaussian(_unit(x), c))


SATURATE = {  # factor and addend of the S of HSV
    32: ((0.3, 0), (0.1, 0), (1.5, 0), (2, 0.1), (2.5, 0.2)),
    64: ((0.3, 0), (0.1, 0), (2, 0), (5, 0.1), (30, 0.2)),
    224: ((0.3, 0), (0.1, 0), (2, 0), (5, 0.1), (20, 0.2)),
}


def _saturate(x, c):
    return _hsv(x, lambda s, v: ((s * c[0] + c[1]).clamp_(0, 1), v))


SPATTER = {  # mean, standard deviation, smoothing, threshold, strength or second smoothing, mud
    32: (
        (0.62, 0.1, 0.7, 0.7, 0.5, 0),
        (0.65, 0.1, 0.8, 0.7, 0.5, 0),
        (0.65, 0.3, 1, 0.69, 0.5, 0),
        (0.65, 0.1, 0.7, 0.69, 0.6, 1),
        (0.65, 0.1, 0.5, 0.68, 0.6, 1),
    ),
    64: (
        (0.62, 0.1, 0.7, 0.7, 0.6, 0),
        (0.65, 0.1, 0.8, 0.7, 0.6, 0),
        (0.65, 0.3, 1, 0.69, 0.6, 0),
        (0.65, 0.1, 0.7, 0.68, 0.6, 1),
        (0.65, 0.1, 0.5, 0.67, 0.6, 1),
    ),
    224: (
        (0.65, 0.3, 4, 0.69, 0.6, 0),
        (0.65, 0.3, 3, 0.68, 0.6, 0),
        (0.65, 0.3, 2, 0.68, 0.5, 0),
        (0.65, 0.3, 1, 0.65, 1.5, 1),
        (0.67, 0.4, 1, 0.65, 1.5, 1),
    ),
}


def _stencil(y, kernel, mode):
    """Correlation of (n,1,S,S) with a small kernel of numbers, same size."""
    r = len(kernel) // 2
    size = y.shape[-1]
    padded = F.pad(y, (r,) * 4, mode=mode)
    out = torch.zeros_like(y)
    for i, row in enumerate(kernel):
        for j, weight in enumerate(row):
            if weight:
                out.add_(padded[:, :, i : i + size, j : j + size], alpha=weight)
    return out


def _canny(y, low, high):
    """OpenCV's Canny edges, bool, of (n,1,S,S) whole numbers in float64."""
    gx = _stencil(y, ((-1, 0, 1), (-2, 0, 2), (-1, 0, 1)), "replicate")
    gy = _stencil(y, ((-1, -2, -1), (0, 0, 0), (1, 2, 1)), "replicate")
    size = y.shape[-1]
    magnitude = gx.abs() + gy.abs()
    padded = F.pad(magnitude, (1,) * 4)

    def at(dy, dx):
        return padded[:, :, 1 + dy : 1 + dy + size, 1 + dx : 1 + dx + size]

    ax, ay = gx.abs(), gy.abs() * 32768
    flat = ay < ax * 13573  # tan 22.5 degrees times 2^15
    steep = ay > ax * (13573 + 65536)
    falling = gx * gy < 0
    m = magnitude
    first = torch.where(falling, at(-1, 1), at(-1, -1))
    second = torch.where(falling, at(1, -1), at(1, 1))
    diagonal = (m > first) & (m > second)
    vertical = (m > at(-1, 0)) & (m >= at(1, 0))
    horizontal = (m > at(0, -1)) & (m >= at(0, 1))
    ridge = torch.where(flat, horizontal, torch.where(steep, vertical, diagonal)) & (m > low)
    edges = ridge & (m > high)
    while True:  # weak edges that touch strong ones; each test for an end is a sync point
        grown = (F.max_pool2d(edges.float(), 3, 1, 1) > 0) & ridge
        if torch.equal(grown, edges):
            return edges
        edges = grown


def _chamfer(edges, cap):
    """Distance (n,1,S,S) float32 to the nearest edge, at most `cap`: OpenCV's 5x5 chamfer metric.

    OpenCV's build for x86 adds the steps in float32, not in its own 16-bit fractions. The steps
    differ by 3e-6; where a mean of nine distances is a whole number, that costs a grey level.
    """
    steps = {(0, 1): 1.0, (1, 1): 1.4, (1, 2): 2.1969}
    size = edges.shape[-1]
    distance = (~edges).float() * cap
    while True:
        padded = F.pad(distance, (2,) * 4, value=float(cap))
        nearer = distance
        for i in range(-2, 3):
            for j in range(-2, 3):
                step = steps.get((min(abs(i), abs(j)), max(abs(i), abs(j))))
                if step:
                    there = padded[:, :, 2 + i : 2 + i + size, 2 + j : 2 + j + size]
                    nearer = torch.minimum(nearer, there + step)
        if torch.equal(nearer, distance):
            return distance
        distance = nearer


def _equalise(y):
    """OpenCV's equalizeHist of (n,1,S,S) whole numbers 0..255 in float64."""
    n, count = len(y), y[0].numel()
    level = y.long().view(n, -1)
    hist = torch.zeros(n, 256, dtype=torch.int64, device=y.device)
    hist.scatter_add_(1, level, torch.ones_like(level))
    first = (hist > 0).long().argmax(1, keepdim=True)
    base = hist.gather(1, first)
    scale = torch.full((), 255.0, device=y.device) / (count - base).clamp_min(1).float()
    lut = ((hist.cumsum(1) - base).float() * scale).round()
    lut = torch.where(base == count, first.float(), lut)  # one level only: unchanged
    return lut.gather(1, level).view_as(y).double()


def _spatter(x, c, z):
    """z (n,S,S): standard normal. Water for the lower severities, mud for the higher ones."""
    mean, sd, sigma, threshold, strength, mud = c
    layer = _gaussian((z * sd).add_(mean)[:, None], sigma)
    layer = layer * (layer >= threshold)
    x = _unit(x).float()
    if mud:
        mask = _gaussian((layer > threshold).float(), strength)
        mask = mask * (mask >= 0.8)
        colour = torch.tensor([63.0, 42, 20], dtype=torch.float64, device=x.device)
        colour = _divide(colour, 255).float()[:, None, None]
        return _finish(x * (1 - mask) + colour * mask)
    layer = ((layer * 255).to(torch.int32) & 255).double()  # wraps around, as the original's cast
    box = ((1.0,) * 3,) * 3
    distance = _chamfer(_canny(layer, 50, 150), 20).double()
    distance = _stencil(distance, box, "reflect").mul_(1 / 9).float()
    distance = _equalise(distance.floor().double())
    distance = _stencil(distance, ((-2, -1, 0), (-1, 1, 1), (0, 1, 2)), "reflect").clamp_(0, 255)
    distance = _stencil(distance, box, "reflect").div_(9).round_()
    mask = (layer * distance).float()
    mask = mask / mask.amax((1, 2, 3), keepdim=True).clamp_min(1) * strength
    colour = torch.tensor([175.0, 238, 238], dtype=torch.float64, device=x.device)
    return _finish(x + mask * _divide(colour, 255).float()[:, None, None])
