"""What several corruptions are made of: rounding, smoothing, zooming, gathering, hues."""

import functools
import math

import numpy as np
import torch
import torch.nn.functional as F


def _divide(y, c):
    """y / c in place, correctly rounded: on a GPU, a Python number would be inverted first."""
    return y.div_(torch.full((), c, dtype=y.dtype, device=y.device))


def _unit(x):
    """uint8 to float64 in [0, 1]."""
    return _divide(x.double(), 255)


def _finish(y):
    """Clip to [0, 1], scale, truncate. In place."""
    return y.clamp_(0, 1).mul_(255).to(torch.uint8)


def _normalised(weights):
    """A list of weights divided by its sum, as NumPy does it."""
    weights = np.array(weights)
    return (weights / weights.sum()).tolist()


def _gaussian_weights(sigma, truncate=4):
    """scipy's, with the C library's exp. The last bit of NumPy's depends on the machine, and it
    decides about grey levels of flat images."""
    radius = int(truncate * sigma + 0.5)
    return _normalised([math.exp(-0.5 / sigma**2 * k**2) for k in range(-radius, radius + 1)])


def _gaussian(y, sigma):
    """Gaussian blur of (n,C,S,S), replicated edge: rows first, summed like scipy.ndimage does
    (centre, then pairs from the outside in), in float64, and kept in y's dtype."""
    weights, size = _gaussian_weights(sigma), y.shape[-1]
    r = len(weights) // 2
    for dim, pad in ((2, (0, 0, r, r)), (3, (r, r, 0, 0))) if r else ():
        padded = F.pad(y.double(), pad, mode="replicate")
        out = padded.narrow(dim, r, size) * weights[r]
        pair = torch.empty_like(out)
        for j in range(r):
            a, b = padded.narrow(dim, j, size), padded.narrow(dim, 2 * r - j, size)
            out += torch.add(a, b, out=pair).mul_(weights[j])
        y = out.to(y.dtype)
    return y


def _folded(p, size, repeat):
    """Whole numbers in float64 to 0..size-1 by reflection at the border.

    This is d c b | a b c d | c b a. With repeat=1 it is d c b a | a b c d | d c b a."""
    period = 2 * size - 2 + 2 * repeat
    p = p - _divide(p.clone(), period).floor_().mul_(period)
    return torch.minimum(p, period - repeat - p)


def _zoom(y, factor):
    """The original's clipped_zoom of (1,K,S,S), channels_last: crop, bilinear with aligned
    corners, trim to S x S. Not centred: whole pixels only, rounded down."""
    size = y.shape[-1]
    crop = math.ceil(size / factor)
    side, top = round(crop * factor), (size - crop) // 2
    if side == crop:
        return y
    y = y[:, :, top : top + crop, top : top + crop]
    y = F.interpolate(y, size=(side, side), mode="bilinear", align_corners=True)
    trim = (side - size) // 2
    return y[:, :, trim : trim + size, trim : trim + size]


def _planes(x):
    """(n,C,S,S) as (1,n*C,S,S) in channels_last: the batch is innermost, so _zoom vectorises."""
    return x.reshape(1, -1, *x.shape[2:]).contiguous(memory_format=torch.channels_last)


def _windows(canvas, which, row, col, size):
    """canvas (K,C,H,W) -> (n,C,size,size): canvas[which[i], :, row[i]:, col[i]:]."""
    view = canvas.unfold(2, size, 1).unfold(3, size, 1)
    return view[which, :, row, col]


def _gather(x, pixel):
    """x (n,C,S,S), pixel (n,...) int64 in 0..S*S-1 -> (n,C,...)."""
    n, channels, size, _ = x.shape
    plane = torch.arange(n * channels, device=x.device).view(n, channels, 1) * size**2
    where = plane + pixel.reshape(n, 1, -1)
    return x.reshape(-1).index_select(0, where.view(-1)).view(n, channels, *pixel.shape[1:])


# channel R, G, B of sector 0..5 of the hue: 0 is v, 1 is t, 2 is p, 3 is q
_SECTORS = ((0, 3, 2, 2, 1, 0), (1, 0, 0, 3, 2, 2), (2, 2, 1, 0, 0, 3))


def _hsv(x, change):
    """uint8 to HSV and back in scikit-image's order of operations; `change(s, v)` in between."""
    n, _, size, _ = x.shape
    r, g, b = _unit(x).unbind(1)
    v = torch.maximum(torch.maximum(r, g), b)
    delta = v - torch.minimum(torch.minimum(r, g), b)
    grey = delta == 0
    s = delta / v.clamp_min(1e-300)
    delta = delta.clamp_min_(1e-300)
    h = (g - b) / delta
    h = torch.where(g == v, (b - r).div_(delta).add_(2), h)
    h = torch.where(b == v, (r - g).div_(delta).add_(4), h)
    h = _divide(h, 6).remainder_(1).masked_fill_(grey, 0)  # greys get hue 0: red, if saturated
    s, v = change(s, v)
    h.mul_(6)
    sector = h.floor()
    f = h.sub_(sector)
    p, q = v * (1 - s), v * (1 - f * s)
    t = v * (1 - (1 - f) * s)
    values = torch.stack([_finish(y) for y in (v, t, p, q)], 1).view(-1)
    table = torch.tensor(_SECTORS, device=x.device) * size**2
    table = torch.cat([table, table[:, :1]], 1)  # a hue of 1 is a hue of 0
    where = table.index_select(1, sector.long().view(-1)).view(3, n, size * size)
    where += torch.arange(n, device=x.device)[:, None] * (4 * size**2)
    where += torch.arange(size * size, device=x.device)
    return values.index_select(0, where.transpose(0, 1).reshape(-1)).view(x.shape)


@functools.lru_cache
def _smoother(sigma, size, device):
    """Gaussian smoothing with a half-sample symmetric border, truncated at 3, as (size,size)."""
    out = np.zeros((size, size))
    weights = _gaussian_weights(sigma, truncate=3)
    at = np.arange(size)
    for k, weight in enumerate(weights):
        source = (at + k - len(weights) // 2) % (2 * size)
        np.add.at(out, (at, np.minimum(source, 2 * size - 1 - source)), weight)
    return torch.tensor(out, device=device)


def _bilinear(x, row, col, repeat):
    """Sample x (n,3,S,S) at rows and columns (n,S,S), each a pair (whole number in float64,
    fraction in x's dtype); borders as in `_folded`."""
    size = x.shape[-1]
    (y, fy), (z, fx) = row, col
    rows = [(_folded(y + d, size, repeat) * size, w) for d, w in ((0, 1 - fy), (1, fy))]
    cols = [(_folded(z + d, size, repeat), w) for d, w in ((0, 1 - fx), (1, fx))]
    out = None
    for line, wy in rows:
        for place, wx in cols:
            part = _gather(x, (line + place).long()).mul_((wy * wx)[:, None])
            out = part if out is None else out.add_(part)
    return out
