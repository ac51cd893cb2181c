"""The forms in which images come: tensors and arrays, bytes and floats, one or many."""

import numpy as np
import torch

from common.run import InputError


def as_batch(x):
    """(uint8 tensor (N,3,S,S), a function that gives such a batch the form of x).

    x: a tensor or a NumPy array, (N,3,S,S), (3,S,S), (N,S,S,3) or (S,S,3), of uint8 or of floats
    in [0,1]. Floats are rounded to the nearest grey level, as an image file would hold them.
    Raises InputError for anything else.
    """
    if isinstance(x, torch.Tensor):
        batch, restore = x, _identity
    elif isinstance(x, np.ndarray):
        batch = torch.from_numpy(np.array(x, order="C")) if x.dtype in _ARRAYS else None
        restore = torch.Tensor.numpy
    else:
        raise InputError(
            f"corruptions take a tensor or a NumPy array, got {type(x).__name__}; "
            "corruptions.Corrupt takes PIL images"
        )
    if batch is None or batch.dtype not in (torch.uint8, *_FLOATS):
        raise InputError(
            f"corruptions take images of uint8 0..255 or of floats in [0,1], got {x.dtype}"
        )
    shape = tuple(x.shape)
    if batch.dim() not in (3, 4) or 3 not in (shape[-3], shape[-1]):
        raise InputError(
            f"corruptions take images (N,3,S,S), (3,S,S), (N,S,S,3) or (S,S,3), got {shape}"
        )
    last = shape[-3] != 3
    height, width = shape[-3:-1] if last else shape[-2:]
    if height != width:
        raise InputError(
            f"corruptions take square images, got {height}x{width}: crop or resize them"
        )
    batch = batch.reshape(-1, *shape[-3:])
    if last:
        batch = batch.permute(0, 3, 1, 2)
    dtype = batch.dtype

    def back(y):
        y = y.permute(0, 2, 3, 1).contiguous() if last else y
        return restore(_from_levels(y, dtype).reshape(shape))

    return _to_levels(batch), back


_ARRAYS = (np.uint8, np.float16, np.float32, np.float64)
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def _identity(y):
    return y


def _to_levels(x):
    """Floats in [0,1] to uint8; uint8 as it is. The test of the range is a sync point."""
    if x.dtype == torch.uint8:
        return x
    if x.numel():
        low, high = (v.item() for v in x.aminmax())
        if not (low >= 0 and high <= 1):  # also where one is NaN
            raise InputError(
                f"corruptions take floats in [0,1], got {low:.4g} to {high:.4g}; corrupt before "
                "a normalisation, and give levels 0..255 as uint8"
            )
    return x.float().mul(255).round_().to(torch.uint8)


def _from_levels(y, dtype):
    if dtype == torch.uint8:
        return y
    return y.float().div_(torch.full((), 255.0, device=y.device)).to(dtype)
