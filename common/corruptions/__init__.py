"""The 19 common corruptions of CIFAR-C and ImageNet-C, batched, in torch, equal to the originals.

Hendrycks & Dietterich, "Benchmarking Neural Network Robustness to Common Corruptions and
Perturbations" (ICLR 2019); reference: ImageNet-C/create_c/make_cifar_c.py (32 pixels),
make_tinyimagenet_c.py (64) and make_imagenet_c.py (224) of hendrycks/robustness, Apache-2.0.

    y = corrupt(x, "fog", severity=3, seed=0, index=index)     # uint8 (N,3,S,S) -> the same

`draw` makes the random numbers of a batch and `apply` uses them. So a test can hand over the draws
of the original code and compare. Image i depends on (seed, name, severity, index[i]) alone:
not on the batch, its order, its split into chunks, the process or the device.

The originals compute in float64 (float32 where noted), clip, and truncate to uint8. So does this
module. It keeps their order of operations wherever a result can be an integer in exact arithmetic,
as in a constant patch. There one unit in the last place costs a grey level. Sums in another order
(matrix products, FFT) stay where an integer cannot come out. Nothing is rounded to
nearest unless the original does it. Nothing here normalises images.

Frost needs six photographs that are not part of this project: see `frost_textures`.
"""

from common.corruptions.engine import CHUNK, apply, corrupt, draw
from common.corruptions.measure import corruption_errors, corruption_table, describe, show
from common.corruptions.names import (
    EVERY,
    EXTRA,
    NAMES,
    SEVERITIES,
    SIZES,
    add_arguments,
    listed_names,
    listed_severities,
)
from common.corruptions.transform import Corrupt
from common.corruptions.weather import FROST_FILES, frost_textures

__all__ = [
    "CHUNK",
    "EVERY",
    "EXTRA",
    "FROST_FILES",
    "NAMES",
    "SEVERITIES",
    "SIZES",
    "Corrupt",
    "add_arguments",
    "apply",
    "corrupt",
    "corruption_errors",
    "corruption_table",
    "describe",
    "draw",
    "frost_textures",
    "listed_names",
    "listed_severities",
    "show",
]  # fmt: skip
