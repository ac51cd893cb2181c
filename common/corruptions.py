"""The 19 common corruptions of CIFAR-C and ImageNet-C, batched, in torch, equal to the originals.

Hendrycks & Dietterich, "Benchmarking Neural Network Robustness to Common Corruptions and
Perturbations" (ICLR 2019); reference: ImageNet-C/create_c/make_cifar_c.py (32 pixels),
make_tinyimagenet_c.py (64) and make_imagenet_c.py (224) of hendrycks/robustness, Apache-2.0.

    y = corrupt(x, "fog", severity=3, seed=0, index=index)     # uint8 (N,3,S,S) -> the same

`draw` makes the random numbers of a batch and `apply` uses them, so that a test can hand over the
draws of the original code and compare. Image i depends on (seed, name, severity, index[i]) alone:
not on the batch, its order, its split into chunks, the process or the device.

The originals compute in float64 (float32 where noted), clip, and truncate to uint8. So does this
module, in their order of operations wherever a result can be an integer in exact arithmetic (a
constant patch, above all), because one unit in the last place then costs a grey level. Sums in
another order (matrix products, FFT) stay where an integer cannot come out. Nothing is rounded to
nearest unless the original does it. Nothing here normalises images.

Frost needs six photographs that are not part of this project: see `frost_textures`.
"""

import functools
import hashlib
import importlib.util
import math
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from common import run

NAMES = (
    "gaussian_noise shot_noise impulse_noise defocus_blur glass_blur motion_blur zoom_blur snow "
    "frost fog brightness contrast elastic_transform pixelate jpeg_compression"
).split()  # the 15 of the benchmark, in its order
EXTRA = ["speckle_noise", "gaussian_blur", "spatter", "saturate"]  # never part of a mean
SEVERITIES = (1, 2, 3, 4, 5)
SIZES = (32, 64, 224)  # each has its own constants; they are no function of the size

# --- random numbers -------------------------------------------------------------------------------


def _signed(word):
    return word - (1 << 64) if word >> 63 else word


_GAMMA, _MIX1, _MIX2 = map(
    _signed, (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
)  # splitmix64 (Steele, Lea, Flood, OOPSLA 2014)


def _mix(z):
    """The finaliser of splitmix64 on int64, in place. `>>` keeps the sign, hence the masks."""
    t = torch.empty_like(z)
    for shift, factor in ((30, _MIX1), (27, _MIX2), (31, None)):
        torch.bitwise_right_shift(z, shift, out=t)
        z.bitwise_xor_(t.bitwise_and_((1 << (64 - shift)) - 1))
        if factor is not None:
            z.mul_(factor)
    return z


class _Stream:
    """Random numbers for the images `index` (n,): hashes of (key of the image, counter).

    Integer operations only, so CPU and GPU give the same bits; 32 bits per number.
    """

    def __init__(self, key, index):
        digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
        base = int.from_bytes(digest, "little", signed=True)
        self.key = _mix(index * _GAMMA + base)[:, None]
        self.used = 0

    def _words(self, count):
        """(n, count) float64: signed 32-bit words times 2^-32, so in [-1/2, 1/2)."""
        half = (count + 1) // 2
        counter = torch.arange(self.used + 1, self.used + 1 + half, device=self.key.device)
        self.used += half
        words = _mix(self.key + counter * _GAMMA).view(torch.int32)[:, :count]
        return words.double().mul_(2.0**-32)

    def uniform(self, *shape):
        """(n, *shape) in [0, 1)."""
        return self._words(math.prod(shape)).add_(0.5).view(-1, *shape)

    def normal(self, *shape):
        """(n, *shape), standard normal, by Box and Muller."""
        count = math.prod(shape)
        half = (count + 1) // 2
        radius, angle = self._words(2 * half).split(half, 1)
        radius = torch.rsub(radius, 0.5).log_().mul_(-2).sqrt_()
        angle = angle * (2 * math.pi)
        out = torch.empty(len(angle), 2 * half, dtype=angle.dtype, device=angle.device)
        for part, function in zip(out.split(half, 1), (torch.cos, torch.sin), strict=True):
            function(angle, out=part).mul_(radius)
        return out[:, :count].reshape(-1, *shape)


# --- building blocks ------------------------------------------------------------------------------


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
    """scipy's, with the C library's exp: the last bit of NumPy's depends on the machine."""
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
    """Whole numbers in float64 to 0..size-1 by reflection at the border: d c b | a b c d | c b a,
    or d c b a | a b c d | d c b a with repeat=1."""
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


# --- noise ----------------------------------------------------------------------------------------

GAUSSIAN_NOISE = {  # standard deviation
    32: (0.04, 0.06, 0.08, 0.09, 0.10),
    64: (0.04, 0.08, 0.12, 0.15, 0.18),
    224: (0.08, 0.12, 0.18, 0.26, 0.38),
}


def _gaussian_noise(x, c, z):
    """z (n,3,S,S): standard normal."""
    return _finish(_unit(x).add_(z * c))


SPECKLE_NOISE = {
    32: (0.06, 0.1, 0.12, 0.16, 0.2),
    64: (0.15, 0.2, 0.25, 0.3, 0.35),
    224: (0.15, 0.2, 0.35, 0.45, 0.6),
}


def _speckle_noise(x, c, z):
    """z (n,3,S,S): standard normal."""
    x = _unit(x)
    return _finish((z * c).mul_(x).add_(x))


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


# --- blur -----------------------------------------------------------------------------------------

GAUSSIAN_BLUR = {  # standard deviation
    32: (0.4, 0.6, 0.7, 0.8, 1),
    64: (0.5, 0.75, 1, 1.25, 1.5),
    224: (1, 2, 3, 4, 6),
}


def _gaussian_blur(x, c):
    return _finish(_gaussian(_unit(x), c))


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


# --- weather --------------------------------------------------------------------------------------

SNOW = {  # mean, standard deviation, zoom, threshold, radius, sigma, share of the image kept
    32: (
        (0.1, 0.2, 1, 0.6, 8, 3, 0.95),
        (0.1, 0.2, 1, 0.5, 10, 4, 0.9),
        (0.15, 0.3, 1.75, 0.55, 10, 4, 0.9),
        (0.25, 0.3, 2.25, 0.6, 12, 6, 0.85),
        (0.3, 0.3, 1.25, 0.65, 14, 12, 0.8),
    ),
    64: (
        (0.1, 0.2, 1, 0.6, 8, 3, 0.8),
        (0.1, 0.2, 1, 0.5, 10, 4, 0.8),
        (0.15, 0.3, 1.75, 0.55, 10, 4, 0.7),
        (0.25, 0.3, 2.25, 0.6, 12, 6, 0.65),
        (0.3, 0.3, 1.25, 0.65, 14, 12, 0.6),
    ),
    224: (
        (0.1, 0.3, 3, 0.5, 10, 4, 0.8),
        (0.2, 0.3, 2, 0.5, 12, 4, 0.7),
        (0.55, 0.3, 4, 0.9, 12, 8, 0.7),
        (0.55, 0.3, 4.5, 0.85, 12, 8, 0.65),
        (0.55, 0.3, 2.5, 0.85, 12, 12, 0.55),
    ),
}


def _grey(x):
    """Luma (n,1,S,S) of float32 (n,3,S,S), with OpenCV's fused multiply-adds (float64 products of
    float32 numbers are exact)."""
    r, g, b = x.double().split(1, 1)
    kr, kg, kb = np.float32([0.299, 0.587, 0.114]).tolist()
    return (b * kb + (r * kr + (g * kg).float()).float()).float()


def _snow(x, c, z, u):
    """z (n,S,S): standard normal; u (n,1): uniform. The layer is added twice, the second time
    turned by 180 degrees."""
    mean, sd, zoom, threshold, radius, sigma, keep = c
    layer = _zoom(_planes((z * sd).add_(mean)[:, None]), zoom)
    layer = layer.reshape(len(x), 1, *x.shape[2:])
    layer = layer * (layer >= threshold)
    layer = _unit(_motion(_finish(layer), radius, sigma, -135 + 90 * u[:, 0]))
    x = _unit(x).float()
    x = keep * x + (1 - keep) * torch.maximum(x, _grey(x) * 1.5 + 0.5)
    return _finish(x.double().add_(layer).add_(layer.flip(2, 3)))


FROST = {  # weight of the image, weight of the texture
    32: ((1, 0.2), (1, 0.3), (0.9, 0.4), (0.85, 0.4), (0.75, 0.45)),
    64: ((1, 0.3), (0.9, 0.4), (0.8, 0.45), (0.75, 0.5), (0.7, 0.55)),
    224: ((1, 0.4), (0.8, 0.6), (0.7, 0.7), (0.65, 0.7), (0.6, 0.75)),
}
FROST_FILES = "frost1.png frost2.png frost3.png frost4.jpg frost5.jpg".split()  # 6 is never drawn
FROST_ZOOM = {32: 0.2, 64: 0.3, 224: 1}


def _resize(texture, factor):
    """OpenCV's bilinear resize of uint8 (H,W,3): 11-bit weights, low bits dropped on the way."""

    def axis(length):
        at = (np.arange(round(length * factor)) + 0.5) * (1 / factor) - 0.5
        low = np.floor(at.astype(np.float32)).astype(int)
        high = at.astype(np.float32) - low
        weights = np.rint((1 - high) * 2048).astype(int), np.rint(high * 2048).astype(int)
        return (low, np.minimum(low + 1, length - 1)), weights

    t = texture.astype(int)
    (y0, y1), (a0, a1) = axis(t.shape[0])
    (x0, x1), (b0, b1) = axis(t.shape[1])
    t = (t[:, x0] * b0[:, None] + t[:, x1] * b1[:, None]) >> 4
    t = ((t[y0] * a0[:, None, None]) >> 16) + ((t[y1] * a1[:, None, None]) >> 16)
    return ((t + 2) >> 2).astype(np.uint8)


def frost_textures(frost_dir=None, data_dir="data"):
    """Where the frost textures come from: (folder or None, "official" or "procedural").

    Looks into `frost_dir`, <data_dir>/frost and an installed `imagecorruptions` package for the
    original's frost1.png .. frost5.jpg. Without them frost is another corruption, drawn by this
    module; a table that contains it has to say "frost: procedural". Raises UserError if frost_dir
    is given and lacks a file.
    """
    if frost_dir is not None:
        missing = [name for name in FROST_FILES if not (Path(frost_dir) / name).is_file()]
        if missing:
            raise run.UserError(
                f"frost textures: {frost_dir} has no {missing[0]}; put the original's "
                f"{', '.join(FROST_FILES)} there, or leave the option out for procedural frost"
            )
        return Path(frost_dir), "official"
    folders = [Path(data_dir) / "frost"]
    package = importlib.util.find_spec("imagecorruptions")
    if package is not None and package.origin:
        folders.append(Path(package.origin).parent / "frost")
    for folder in folders:
        if all((folder / name).is_file() for name in FROST_FILES):
            return folder, "official"
    return None, "procedural"


@functools.lru_cache
def _frost_canvas(folder, scale, device):
    """The five textures at this scale, (5,3,H,W) uint8, padded to one size, and their sizes."""
    if folder is not None:
        from PIL import Image

        textures = [np.array(Image.open(folder / name).convert("RGB")) for name in FROST_FILES]
    else:
        textures = _procedural_frost()
    if FROST_ZOOM[scale] != 1:
        textures = [_resize(texture, FROST_ZOOM[scale]) for texture in textures]
    sizes = torch.tensor([t.shape[:2] for t in textures])
    canvas = torch.zeros(len(textures), 3, *sizes.amax(0).tolist(), dtype=torch.uint8)
    for out, texture in zip(canvas, textures, strict=True):
        out[:, : texture.shape[0], : texture.shape[1]] = torch.from_numpy(texture).permute(2, 0, 1)
    return canvas.to(device), sizes.to(device), int(sizes.min())


def _procedural_frost():
    """Five 512x512 textures: clouds and ridges with the originals' mean colours and contrasts."""
    colours = [(78, 149, 166), (201, 205, 214), (201, 205, 214), (138, 153, 165), (112, 123, 135)]
    contrast = torch.tensor([30.0, 22, 22, 30, 42], dtype=torch.float64)[:, None, None, None]
    stream = _Stream(("frost textures",), torch.arange(5))
    clouds = _plasma(stream.uniform(512 * 512 - 1), 512, 1.9)
    ridges = 1 - (2 * _plasma(stream.uniform(512 * 512 - 1), 512, 1.6) - 1).abs()
    layer = (clouds + ridges**4)[:, None]
    layer = layer - layer.mean((2, 3), keepdim=True)
    layer = layer / layer.std((2, 3), keepdim=True) * contrast
    layer = layer + torch.tensor(colours, dtype=torch.float64)[:, :, None, None]
    return list(layer.clamp_(0, 255).to(torch.uint8).permute(0, 2, 3, 1).numpy())


def _frost(x, c, u, canvas, sizes, smallest):
    """u (n,3): uniform, for texture, row and column."""
    size = x.shape[-1]
    if smallest <= size:
        raise run.UserError(
            f"frost: the smallest texture is {smallest} pixels high at this scale, too small for "
            f"images of {size}; give a larger scale="
        )
    which = (u[:, 0] * len(canvas)).long()
    corner = (u[:, 1:] * (sizes[which] - size)).long()
    texture = _windows(canvas, which, corner[:, 0], corner[:, 1], size)
    out = texture.double().mul_(c[1]).add_(x.double().mul_(c[0]))
    return out.clamp_(0, 255).to(torch.uint8)


FOG = {  # weight of the fog, decay of its roughness
    32: ((0.2, 3), (0.5, 3), (0.75, 2.5), (1, 2), (1.5, 1.75)),
    64: ((0.4, 3), (0.7, 3), (1, 2.5), (1.5, 2), (2, 1.75)),
    224: ((1.5, 2), (2, 2), (2.5, 1.7), (2.5, 1.5), (3, 1.4)),
}


def _map_size(size):
    """Side of the fog map: the next power of two."""
    return 1 << (size - 1).bit_length()


def _plasma(u, side, decay):
    """Diamond-square map (n,side,side) in [0,1] of u (n, side^2 - 1) uniform, on a torus."""
    n, pos, amplitude = len(u), 0, 100.0
    grid = u.new_zeros(n, 1, 1)  # the points known so far

    def wobble(total):
        nonlocal pos
        k = total.shape[1]
        noise = u[:, pos : pos + k * k].view(n, k, k)
        pos += k * k
        noise = (noise * (2 * amplitude)).add_(-amplitude).mul_(amplitude)  # amplitude enters twice
        return total.div_(4).add_(noise)

    while grid.shape[1] < side:
        k = grid.shape[1]
        square = grid + grid.roll(-1, 1)
        square = wobble(square.add_(square.roll(-1, 2)))
        above = wobble(square + square.roll(1, 1) + (grid + grid.roll(-1, 2)))
        left = wobble(square + square.roll(1, 2) + (grid + grid.roll(-1, 1)))
        finer = grid.new_empty(n, 2 * k, 2 * k)
        finer[:, ::2, ::2], finer[:, 1::2, 1::2] = grid, square
        finer[:, ::2, 1::2], finer[:, 1::2, ::2] = above, left
        grid, amplitude = finer, amplitude / decay
    grid = grid - grid.amin((1, 2), keepdim=True)
    return grid.div_(grid.amax((1, 2), keepdim=True))


def _fog(x, c, u):
    """u (n, M^2 - 1), M the next power of two: uniform."""
    weight, decay = c
    size = x.shape[-1]
    fog = _plasma(u, _map_size(size), decay)[:, None, :size, :size]
    top = _unit(x.amax((1, 2, 3), keepdim=True))  # of the whole image, all channels
    return _finish(_unit(x).add_(weight * fog).mul_(top).div_(top + weight))


BRIGHTNESS = {  # added to the V of HSV
    32: (0.05, 0.1, 0.15, 0.2, 0.3),
    64: (0.1, 0.2, 0.3, 0.4, 0.5),
    224: (0.1, 0.2, 0.3, 0.4, 0.5),
}
SATURATE = {  # factor and addend of the S of HSV
    32: ((0.3, 0), (0.1, 0), (1.5, 0), (2, 0.1), (2.5, 0.2)),
    64: ((0.3, 0), (0.1, 0), (2, 0), (5, 0.1), (30, 0.2)),
    224: ((0.3, 0), (0.1, 0), (2, 0), (5, 0.1), (20, 0.2)),
}
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


def _brightness(x, c):
    return _hsv(x, lambda s, v: (s, (v + c).clamp_(0, 1)))


def _saturate(x, c):
    return _hsv(x, lambda s, v: ((s * c[0] + c[1]).clamp_(0, 1), v))


CONTRAST = {
    32: (0.75, 0.5, 0.4, 0.3, 0.15),
    64: (0.4, 0.3, 0.2, 0.1, 0.05),
    224: (0.4, 0.3, 0.2, 0.1, 0.05),
}


def _contrast(x, c):
    x = _unit(x)
    # NumPy adds the pixels one after the other; so does cumsum, on the CPU
    mean = x.flatten(2).cpu().cumsum(2)[..., -1].to(x.device)
    mean = _divide(mean, x.shape[-1] ** 2)[:, :, None, None]
    return _finish(x.sub_(mean).mul_(c).add_(mean))


# --- digital --------------------------------------------------------------------------------------

_ELASTIC = {  # by image side: shift, standard deviation of its smoothing, affine jitter, in sides
    32: ((0, 0.05, 0.08, 0.1, 0.1), (0, 0.2, 0.06, 0.04, 0.03), (0.08, 0.07, 0.06, 0.05, 0.03)),
    64: ((0, 0.05, 0.1, 0.1, 0.16), (0, 0.3, 0.08, 0.03, 0.03), (0.08, 0.06, 0.06, 0.03, 0.02)),
    244: ((2, 2, 0.05, 0.07, 0.12), (0.7, 0.08, 0.01, 0.01, 0.01), (0.1, 0.2, 0.02, 0.02, 0.02)),
}  # 244 for 224 is the authors' slip, kept
ELASTIC_TRANSFORM = {
    min(side, 224): [tuple(side * v for v in row) for row in zip(*columns, strict=True)]
    for side, columns in _ELASTIC.items()
}


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


def _elastic_transform(x, c, jitter, field):
    """jitter (n,3,2), field (n,2,S,S), shifts in x and in y: uniform in [0,1)."""
    alpha, sigma, affine = c
    n, _, size, _ = x.shape
    device = x.device
    # the inverse of the affine map that takes three points (x,y) to jittered ones
    centre, arm = size // 2, size // 3
    jitter = (jitter * (2 * affine) - affine).float()
    corner = torch.tensor([[1, 1], [1, -1], [-1, -1]], device=device) * arm + centre
    p = (corner + jitter).double()
    by = (p[:, 0] - p[:, 1]) / (2 * arm)
    bx = (p[:, 1] - p[:, 2]) / (2 * arm)
    b = p[:, 0] - (bx + by) * (centre + arm)
    det = bx[:, 0] * by[:, 1] - bx[:, 1] * by[:, 0]
    det = torch.where(det == 0, 0.0, 1 / det)
    m = torch.stack([by[:, 1], -by[:, 0], -bx[:, 1], bx[:, 0]], 1) * det[:, None]
    m = m.view(n, 2, 2)
    b = -(m * b[:, None]).sum(2)
    # OpenCV's warpAffine rounds positions to 1/32 of a pixel
    at = torch.arange(size, dtype=torch.float64, device=device)
    along_x = (m[:, :, :1] * at * 1024).round_()
    along_y = ((m[:, :, 1:] * at + b[:, :, None]) * 1024).round_()
    where = (along_y[:, :, :, None] + along_x[:, :, None, :]).add_(16).mul_(1 / 32).floor_()
    where = where.clamp_(-(2.0**26), 2.0**26)  # of a map that collapses to a line, infinity
    whole = (where * (1 / 32)).floor_()
    fraction = where.sub_(whole * 32).mul_(1 / 32).float()
    (col, row), (fx, fy) = whole.unbind(1), fraction.unbind(1)
    image = _bilinear(_unit(x).float(), (row, fy), (col, fx), repeat=0)
    if alpha:  # the shift is kept in float32, the position in float64
        smooth = _smoother(sigma, size, device)
        field = (smooth @ (field * 2 - 1) @ smooth.T * alpha).float().double()
        col, row = field[:, 0] + at, field[:, 1] + at[:, None]
        y, z = row.floor(), col.floor()
        image = _bilinear(image.double(), (y, row - y), (z, col - z), repeat=1).float()
    return _finish(image)


PIXELATE = {  # share of the side that is left
    32: (0.95, 0.9, 0.85, 0.75, 0.65),
    64: (0.9, 0.8, 0.7, 0.6, 0.5),
    224: (0.6, 0.5, 0.4, 0.3, 0.25),
}


@functools.lru_cache
def _box(size, side, device):
    """Pillow's box filter from `size` to `side` pixels as (size,side) float64 of 22-bit integers,
    and the one source pixel of each pixel on the way back. Boxes take whole pixels only."""
    out = np.zeros((size, side))
    step = size / side
    for k in range(side):
        centre = (k + 0.5) * step
        first, last = int(centre - step / 2 + 0.5), min(int(centre + step / 2 + 0.5), size)
        inside = [i for i in range(first, last) if -0.5 < (i - centre + 0.5) / step <= 0.5]
        out[inside, k] = int(0.5 + 2**22 / len(inside))
    back = np.minimum(((np.arange(size) + 0.5) / step).astype(int), side - 1)
    return torch.tensor(out, device=device), torch.tensor(back, device=device)


def _pixelate(x, c):
    box, back = _box(x.shape[-1], int(x.shape[-1] * c), x.device)

    def rounded(y):  # products and sums of integers below 2^53: exact
        return y.add_(2.0**21).mul_(2.0**-22).floor_()

    small = rounded(box.T @ rounded(x.double() @ box)).to(torch.uint8)
    return small.index_select(2, back).index_select(3, back)


JPEG_COMPRESSION = {  # quality
    32: (80, 65, 58, 50, 40),
    64: (65, 58, 50, 40, 25),
    224: (25, 18, 15, 10, 7),
}
_LUMA = """
    16 11 10 16 24 40 51 61  12 12 14 19 26 58 60 55  14 13 16 24 40 57 69 56
    14 17 22 29 51 87 80 62  18 22 37 56 68 109 103 77  24 35 55 64 81 104 113 92
    49 64 78 87 103 121 120 101  72 92 95 98 112 100 103 99"""
_CHROMA = "17 18 24 47 99 99 99 99  18 21 26 66 99 99 99 99  24 26 56 99 99 99 99 99  47 66"
_CHROMA += 38 * " 99"
_DCT = (  # left half of libjpeg's integer 8-point DCT times 2^13; rows are even or odd in turn
    (8192, 8192, 8192, 8192),
    (11363, 9633, 6437, 2260),
    (10703, 4433, -4433, -10703),
    (9633, -2259, -11362, -6436),
    (8192, -8192, -8192, 8192),
    (6437, -11362, 2261, 9633),
    (4433, -10704, 10704, -4433),
    (2260, -6436, 9633, -11363),
)


def _shift(y, bits):
    """Whole numbers in float64: add half, shift right. In place, exact."""
    return y.add_(2.0 ** (bits - 1)).mul_(2.0**-bits).floor_()


def _jpeg_plane(p, table, quality):
    """One plane (n,C,H,W) of levels through quantised 8x8 blocks and back: libjpeg's "islow"."""
    scale = 5000 // quality if quality < 50 else 200 - 2 * quality
    table = [min(max((int(q) * scale + 50) // 100, 1), 255) for q in table.split()]
    table = torch.tensor(table, dtype=torch.float64, device=p.device).view(8, 1, 8)
    half = torch.tensor(_DCT, dtype=torch.float64, device=p.device)
    sign = torch.tensor([1.0, -1] * 4, dtype=torch.float64, device=p.device)[:, None]
    dct = torch.cat([half, half.flip(1) * sign], 1)
    width = p.shape[-1]
    y = _shift((p - 128).view(-1, 8) @ dct.T, 11)  # rows keep two bits more
    y = _shift(dct @ y.view(-1, 8, width), 15).view(-1, 8, width // 8, 8)
    level = y.abs().add_(4 * table).div_(8 * table).floor_()
    y = level.mul_(table).mul_(y.sign_())
    y = _shift(dct.T @ y.view(-1, 8, width), 11)
    y = _shift(y.view(-1, 8) @ dct, 18)
    return y.view(p.shape).add_(128).clamp_(0, 255)


def _jpeg_compression(x, quality):
    """Baseline JPEG 4:2:0 there and back as Pillow with libjpeg-turbo does it, bit for bit: the
    same integer arithmetic, held in float64."""
    n, _, size, _ = x.shape
    half, rest = (size + 1) // 2, -size % 16
    r, g, b = F.pad(x.double(), (0, rest, 0, rest), mode="replicate").unbind(1)
    luma = _shift(r * 19595 + g * 38470 + b * 7471, 16)
    blue = r * -11059 + g * -21709 + b * 32768
    red = r * 32768 + g * -27439 + b * -5329
    chroma = _shift(torch.stack([blue, red], 1).sub_(1), 16)
    rows = chroma[:, :, ::2] + chroma[:, :, 1::2]
    bias = torch.tensor([1.0, 2], dtype=torch.float64, device=x.device)
    bias = bias.repeat((size + rest) // 4)
    chroma = (rows[..., ::2] + rows[..., 1::2]).add_(bias).mul_(0.25).floor_().add_(128)
    if rest:  # below the image libjpeg repeats the last row of chroma, beside it the last column
        chroma = F.pad(chroma[:, :, :half], (0, 0, 0, (size + rest) // 2 - half), mode="replicate")
    luma = _jpeg_plane(luma, _LUMA, quality)[:, :size, :size]
    chroma = _jpeg_plane(chroma, _CHROMA, quality)[:, :, :half, :half].sub_(128)
    # chroma back to full size: 3/4 of the nearer sample, 1/4 of the farther one, edge replicated
    padded = F.pad(chroma, (1, 1, 1, 1), mode="replicate")
    near = padded[:, :, 1:-1] * 3
    rows = torch.stack([near + padded[:, :, :-2], near + padded[:, :, 2:]], 3)
    rows = rows.view(n, 2, 2 * half, half + 2)[:, :, :size]
    near = rows[..., 1:-1] * 3
    left = (near + rows[..., :-2]).add_(8)
    right = (near + rows[..., 2:]).add_(7)
    chroma = torch.stack([left, right], 4).mul_(1 / 16).floor_().view(n, 2, size, 2 * half)
    blue, red = chroma[..., :size].unbind(1)
    out = torch.stack(
        [
            _shift(red * 91881, 16).add_(luma),
            _shift(blue * -22554 + red * -46802, 16).add_(luma),
            _shift(blue * 116130, 16).add_(luma),
        ],
        1,
    )
    return out.clamp_(0, 255).to(torch.uint8)


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
    """Distance to the nearest edge, at most `cap`, in OpenCV's 5x5 chamfer metric of 16 bits."""
    steps = {(0, 1): 65536, (1, 1): 91750, (1, 2): 143976}
    size = edges.shape[-1]
    top = float(cap * 65536)
    distance = (~edges).float() * top  # whole numbers below 2^24: exact in float32
    while True:
        padded = F.pad(distance, (2,) * 4, value=top)
        nearer = distance
        for i in range(-2, 3):
            for j in range(-2, 3):
                step = steps.get((min(abs(i), abs(j)), max(abs(i), abs(j))))
                if step:
                    there = padded[:, :, 2 + i : 2 + i + size, 2 + j : 2 + j + size]
                    nearer = torch.minimum(nearer, there + step)
        if torch.equal(nearer, distance):
            return distance.double() / 65536
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
    distance = _stencil(_chamfer(_canny(layer, 50, 150), 20), box, "reflect").mul_(1 / 9).float()
    distance = _equalise(distance.floor().double())
    distance = _stencil(distance, ((-2, -1, 0), (-1, 1, 1), (0, 1, 2)), "reflect").clamp_(0, 255)
    distance = _stencil(distance, box, "reflect").div_(9).round_()
    mask = (layer * distance).float()
    mask = mask / mask.amax((1, 2, 3), keepdim=True).clamp_min(1) * strength
    colour = torch.tensor([175.0, 238, 238], dtype=torch.float64, device=x.device)
    return _finish(x + mask * _divide(colour, 255).float()[:, None, None])


# --- the engine -----------------------------------------------------------------------------------

_TABLE = {  # name: constants, draws from a stream for (constants, size), function
    "gaussian_noise": (GAUSSIAN_NOISE, lambda r, c, s: [r.normal(3, s, s)], _gaussian_noise),
    "shot_noise": (SHOT_NOISE, lambda r, c, s: [r.uniform(3, s, s)], _shot_noise),
    "impulse_noise": (
        IMPULSE_NOISE,
        lambda r, c, s: [r.uniform(3, s, s), r.uniform(3, s, s)],
        _impulse_noise,
    ),
    "defocus_blur": (DEFOCUS_BLUR, None, _defocus_blur),
    "glass_blur": (
        GLASS_BLUR,
        lambda r, c, s: [r.uniform(c[2], s - 2 * c[1], s - 2 * c[1], 2)],
        _glass_blur,
    ),
    "motion_blur": (MOTION_BLUR, lambda r, c, s: [r.uniform(1)], _motion_blur),
    "zoom_blur": (ZOOM_BLUR, None, _zoom_blur),
    "snow": (SNOW, lambda r, c, s: [r.normal(s, s), r.uniform(1)], _snow),
    "frost": (FROST, lambda r, c, s: [r.uniform(3)], _frost),
    "fog": (FOG, lambda r, c, s: [r.uniform(_map_size(s) ** 2 - 1)], _fog),
    "brightness": (BRIGHTNESS, None, _brightness),
    "contrast": (CONTRAST, None, _contrast),
    "elastic_transform": (
        ELASTIC_TRANSFORM,
        lambda r, c, s: [r.uniform(3, 2), r.uniform(2, s, s)],
        _elastic_transform,
    ),
    "pixelate": (PIXELATE, None, _pixelate),
    "jpeg_compression": (JPEG_COMPRESSION, None, _jpeg_compression),
    "speckle_noise": (SPECKLE_NOISE, lambda r, c, s: [r.normal(3, s, s)], _speckle_noise),
    "gaussian_blur": (GAUSSIAN_BLUR, None, _gaussian_blur),
    "spatter": (SPATTER, lambda r, c, s: [r.normal(s, s)], _spatter),
    "saturate": (SATURATE, None, _saturate),
}


def _constants(name, severity, size, scale):
    """The constants of one corruption and the scale they belong to; UserError if there are none."""
    if name not in _TABLE:
        raise run.UserError(f"unknown corruption {name!r}; known: {', '.join(_TABLE)}")
    if severity not in SEVERITIES:
        raise run.UserError(f"severity {severity!r}: choose one of 1, 2, 3, 4, 5")
    if scale is None and size not in SIZES:
        raise run.UserError(
            f"images of {size} pixels: the corruptions are defined at 32, 64 and 224 pixels; "
            "resize the images, or choose the constants of one size with scale=32, 64 or 224"
        )
    if scale is not None and scale not in SIZES:
        raise run.UserError(f"scale={scale!r}: choose 32, 64 or 224")
    if size < 24:  # the widest reflected border is 10, the smallest texture of frost 63
        raise run.UserError(f"images of {size} pixels: the corruptions need at least 24")
    scale = scale or size
    return _TABLE[name][0][scale][severity - 1], scale


def draw(name, severity, size, seed=0, index=None, scale=None):
    """The random numbers of the images `index` (n,) int64: a list of tensors (n, ...), float64,
    standard normal or uniform in [0,1), on the device of `index`; none for some corruptions."""
    constants, _ = _constants(name, severity, size, scale)
    make = _TABLE[name][1]
    if make is None:
        return []
    return make(_Stream((int(seed), name, severity), index), constants, size)


def apply(x, name, severity, draws, scale=None, frost_dir=None, data_dir="data"):
    """Corrupt uint8 (n,3,S,S) with these draws; what they mean is said at each corruption."""
    constants, scale = _constants(name, severity, x.shape[-1], scale)
    if name == "frost":
        folder, _ = frost_textures(frost_dir, data_dir)
        draws = [*draws, *_frost_canvas(folder, scale, x.device)]
    return _TABLE[name][2](x.contiguous(), constants, *draws)


def corrupt(
    x,
    name,
    severity,
    seed=0,
    index=None,
    generator=None,
    frost_dir=None,
    data_dir="data",
    scale=None,
    chunk=None,
):
    """Corrupt a batch of images.

    x: uint8 (N,3,S,S), S = 32, 64 or 224, on any device; other sizes take the constants of
        `scale`, since the constants are no function of the size.
    name, severity: one of NAMES or EXTRA, 1 to 5.
    seed, index: image i is a pure function of (seed, name, severity, index[i], x[i]); index is
        int64 (N,), by default 0..N-1. A `generator` (torch.Generator) draws the seed instead.
    frost_dir, data_dir: see `frost_textures`.
    chunk: images at a time; bounds the memory in use, changes nothing else.

    Returns uint8 (N,3,S,S) on the device of x. Raises UserError for bad input.
    """
    _check(x)
    size, device = x.shape[-1], x.device
    _constants(name, severity, size, scale)
    if index is None:
        index = torch.arange(len(x), device=device)
    if index.dtype != torch.int64 or index.shape != x.shape[:1]:
        raise run.UserError(
            f"index: one int64 number for each of the {len(x)} images, "
            f"got {index.dtype} {tuple(index.shape)}"
        )
    if generator is not None:
        seed = torch.randint(1 << 62, (), generator=generator, device=generator.device).item()
    if chunk is not None and chunk < 1:
        raise run.UserError(f"chunk={chunk}: at least one image at a time")
    if chunk is None:
        chunk = max(1, (CHUNK if device.type == "cpu" else 64 * CHUNK) // size**2)
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    for start in range(0, len(x), chunk):
        part = slice(start, start + chunk)
        draws = draw(name, severity, size, seed, index[part].to(device), scale)
        out[part] = apply(x[part], name, severity, draws, scale, frost_dir, data_dir)
    return out


CHUNK = 1 << 16  # pixels at a time by default on a CPU: the work of a chunk stays in its cache


def _check(x):
    if not isinstance(x, torch.Tensor) or x.dtype != torch.uint8:
        what = f"{x.dtype} tensor" if isinstance(x, torch.Tensor) else type(x).__name__
        raise run.UserError(
            f"corruptions take uint8 images 0..255, got a {what}; convert floats in [0,1] with "
            "x.mul(255).round().to(torch.uint8)"
        )
    if x.dim() != 4 or x.shape[1] != 3:
        raise run.UserError(f"corruptions take images (N,3,S,S), got {tuple(x.shape)}")
    if x.shape[2] != x.shape[3]:
        raise run.UserError(
            f"corruptions take square images, got {x.shape[2]}x{x.shape[3]}: crop or resize them"
        )


def corruption_errors(networks, images, precision=None, data_dir="data", scale=None):
    """{name: mean error (%)} over the 15 corruptions and 5 severities, generated with seed 0."""
    sums, part = dict.fromkeys(networks, 0.0), run.rows(len(images.y))
    index, mine = torch.arange(len(images.y), device=images.x.device)[part], images.take(part)
    for name in NAMES:
        for severity in range(1, 6):
            options = {"index": index, "data_dir": data_dir, "scale": scale}
            x = corrupt(mine.x, name, severity, **options)
            for key, model in networks.items():
                sums[key] += run.evaluate(model, x, mine.y, precision, mine=True)["error"]
    return {key: value / 75 for key, value in sums.items()}
