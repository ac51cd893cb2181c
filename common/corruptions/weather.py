"""Snow, frost, fog, brightness; contrast stands here too, as in the original."""

import functools
import importlib.util
from pathlib import Path

import numpy as np
import torch

from common import run
from common.corruptions.blur import _motion
from common.corruptions.draws import _Stream
from common.corruptions.filters import _divide, _finish, _hsv, _planes, _unit, _windows, _zoom

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
        _read_frost(Path(frost_dir))
        return Path(frost_dir), "official"
    folders = [Path(data_dir) / "frost"]
    package = importlib.util.find_spec("imagecorruptions")
    if package is not None and package.origin:
        folders.append(Path(package.origin).parent / "frost")
    for folder in folders:
        if all((folder / name).is_file() for name in FROST_FILES):
            _read_frost(folder)
            return folder, "official"
    return None, "procedural"


@functools.lru_cache
def _read_frost(folder):
    """The five textures of a folder, uint8 (H,W,3). Raises UserError where one is damaged."""
    from PIL import Image

    textures = []
    for name in FROST_FILES:
        try:
            textures.append(np.array(Image.open(folder / name).convert("RGB")))
        except Exception as error:  # Pillow raises half a dozen types for broken files
            reason = str(error).splitlines()[0][:80]
            raise run.UserError(f"{folder / name}: no whole picture ({reason})") from None
    return textures


@functools.lru_cache
def _frost_canvas(folder, scale, device):
    """The five textures at this scale, (5,3,H,W) uint8, padded to one size, and their sizes."""
    textures = _procedural_frost() if folder is None else _read_frost(folder)
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


def _brightness(x, c):
    return _hsv(x, lambda s, v: (s, (v + c).clamp_(0, 1)))


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
