"""Corruptions by name: drawing apart from applying."""

import difflib

import torch

from common import run
from common.corruptions.blur import (
    DEFOCUS_BLUR,
    GLASS_BLUR,
    MOTION_BLUR,
    ZOOM_BLUR,
    _defocus_blur,
    _glass_blur,
    _motion_blur,
    _zoom_blur,
)
from common.corruptions.digital import (
    ELASTIC_TRANSFORM,
    JPEG_COMPRESSION,
    PIXELATE,
    _elastic_transform,
    _jpeg_compression,
    _pixelate,
)
from common.corruptions.draws import _Stream
from common.corruptions.extra import (
    GAUSSIAN_BLUR,
    SATURATE,
    SPATTER,
    SPECKLE_NOISE,
    _gaussian_blur,
    _saturate,
    _spatter,
    _speckle_noise,
)
from common.corruptions.images import as_batch
from common.corruptions.names import SEVERITIES, SIZES
from common.corruptions.noise import (
    GAUSSIAN_NOISE,
    IMPULSE_NOISE,
    SHOT_NOISE,
    _gaussian_noise,
    _impulse_noise,
    _shot_noise,
)
from common.corruptions.weather import (
    BRIGHTNESS,
    CONTRAST,
    FOG,
    FROST,
    SNOW,
    _brightness,
    _contrast,
    _fog,
    _frost,
    _frost_canvas,
    _map_size,
    _snow,
    frost_textures,
)

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


def _check_name(name):
    if name not in _TABLE:
        near = difflib.get_close_matches(str(name), _TABLE, 1)
        guess = f"; did you mean {near[0]!r}? " if near else "; "
        raise run.InputError(f"unknown corruption {name!r}{guess}known: {', '.join(_TABLE)}")


def _constants(name, severity, size, scale):
    """The constants of one corruption and the scale that they belong to. Raises InputError."""
    _check_name(name)
    if severity not in SEVERITIES:
        raise run.InputError(f"severity {severity!r}: choose one of 1, 2, 3, 4, 5")
    if scale is None and size not in SIZES:
        raise run.InputError(
            f"images of {size} pixels: the corruptions are defined at 32, 64 and 224 pixels; "
            "resize the images, or choose the constants of one size with scale=32, 64 or 224"
        )
    if scale is not None and scale not in SIZES:
        raise run.InputError(f"scale={scale!r}: choose 32, 64 or 224")
    if size < 24:  # the widest reflected border is 10, the smallest texture of frost 63
        raise run.InputError(f"images of {size} pixels: the corruptions need at least 24")
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
    seed=None,
    index=None,
    generator=None,
    frost_dir=None,
    data_dir="data",
    scale=None,
    chunk=None,
):
    """Corrupt one image or a batch of them.

    x: a tensor on any device or a NumPy array, of uint8 or of floats in [0,1]: (N,3,S,S), one
        image (3,S,S), (N,S,S,3) or (S,S,3). S is 32, 64 or 224; other sizes take the constants of
        `scale`, since the constants are no function of the size. Floats are first rounded to grey
        levels.
    name: one of NAMES or EXTRA.
    severity: 1 to 5, or N of them in a tensor, an array or a list, one for each image.
    seed, index: image i is a pure function of (seed, name, severity, index[i], x[i]); index is
        int64 (N,), by default 0..N-1. seed is by default 0 where an index is given. Without any of
        them torch's generator, or `generator`, draws the seed: every call makes other noise.
    frost_dir, data_dir: see `frost_textures`.
    chunk: images at a time; bounds the memory in use, changes nothing else.

    Returns what x is: the same type, shape, layout, dtype and device. Raises run.InputError, a
    ValueError, for bad input.

    >>> import numpy as np
    >>> image = torch.full((3, 32, 32), 0.5)
    >>> corrupt(image, "brightness", 3).shape
    torch.Size([3, 32, 32])
    >>> batch = np.zeros((2, 32, 32, 3), np.uint8)
    >>> corrupt(batch, "fog", severity=[1, 5], seed=0).shape
    (2, 32, 32, 3)
    """
    x, restore = as_batch(x)
    size, device = x.shape[-1], x.device
    severity = _severities(severity, len(x))
    _constants(name, 1, size, scale)
    if generator is not None:
        seed = torch.randint(1 << 62, (), generator=generator, device=generator.device).item()
    elif seed is None:
        seed = 0 if index is not None else torch.randint(1 << 62, ()).item()
    if index is None:
        index = torch.arange(len(x), device=device)
    if index.dtype != torch.int64 or index.shape != x.shape[:1]:
        raise run.InputError(
            f"index: one int64 number for each of the {len(x)} images, "
            f"got {index.dtype} {tuple(index.shape)}"
        )
    if chunk is not None and chunk < 1:
        raise run.InputError(f"chunk={chunk}: at least one image at a time")
    if chunk is None:
        chunk = max(1, (CHUNK if device.type == "cpu" else 64 * CHUNK) // size**2)
    index = index.to(device)
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    for each, part in _parts(severity, len(x), chunk, device):
        draws = draw(name, each, size, seed, index[part], scale)
        out[part] = apply(x[part], name, each, draws, scale, frost_dir, data_dir)
    return restore(out)


CHUNK = 1 << 16  # pixels at a time by default on a CPU: the work of a chunk stays in its cache


def _severities(severity, count):
    """An int for all images, or int64 (count,) on the CPU. InputError unless they are 1 to 5."""
    try:
        found = torch.as_tensor(severity).cpu()
    except (TypeError, ValueError, RuntimeError):
        found = torch.tensor(0.5)
    if found.is_floating_point() or found.dtype == torch.bool:
        raise run.InputError(f"severity {severity!r}: give whole numbers, 1 to 5")
    for each in {found.item()} if found.dim() == 0 else found.unique().tolist():
        if each not in SEVERITIES:
            raise run.InputError(f"severity {each}: choose one of 1, 2, 3, 4, 5")
    if found.dim() == 0:
        return found.item()
    if found.shape != (count,):
        raise run.InputError(
            f"severity: one number, or one for each of the {count} images, got {tuple(found.shape)}"
        )
    return found.long()


def _parts(severity, count, chunk, device):
    """(severity, rows) of all images, at most `chunk` rows each. Slices, which copy nothing, where
    one severity is for all."""
    if isinstance(severity, int):
        for start in range(0, count, chunk):
            yield severity, slice(start, start + chunk)
        return
    for each in severity.unique().tolist():
        for rows in (severity == each).nonzero()[:, 0].to(device).split(chunk):
            yield each, rows
