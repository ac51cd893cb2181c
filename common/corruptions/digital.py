"""Elastic transform, pixelate, JPEG."""

import functools

import numpy as np
import torch
import torch.nn.functional as F

from common.corruptions.filters import _bilinear, _finish, _smoother, _unit

_ELASTIC = {  # by image side: shift, standard deviation of its smoothing, affine jitter, in sides
    32: ((0, 0.05, 0.08, 0.1, 0.1), (0, 0.2, 0.06, 0.04, 0.03), (0.08, 0.07, 0.06, 0.05, 0.03)),
    64: ((0, 0.05, 0.1, 0.1, 0.16), (0, 0.3, 0.08, 0.03, 0.03), (0.08, 0.06, 0.06, 0.03, 0.02)),
    244: ((2, 2, 0.05, 0.07, 0.12), (0.7, 0.08, 0.01, 0.01, 0.01), (0.1, 0.2, 0.02, 0.02, 0.02)),
}  # 244 for 224 is the authors' slip, kept

ELASTIC_TRANSFORM = {
    min(side, 224): [tuple(side * v for v in row) for row in zip(*columns, strict=True)]
    for side, columns in _ELASTIC.items()
}


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
    """Pillow's box filter from `size` to `side` pixels, and each one's source on the way back.

    The filter is (size,side) float64 of 22-bit integers. Boxes take whole pixels only."""
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
