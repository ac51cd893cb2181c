"""Data sets by name, and augmented batches that are a function of the step.

    dataset = load("cifar10", data_dir="data", val_size=5000, device=device)
    batches = Batches(dataset.train, batch_size=128, seed=0)
    x, y = batches(step)        # float in [0,1] (B,3,S,S), int64 (B,)

Small sets are uint8 tensors on the device; trees of photographs are decoded on access. Images are
never normalised here: the model's first layer does that, with dataset.mean and dataset.std.
"""

from common.data import folders, shapes, shortcut, trees
from common.data.batches import Batches, crop_flip
from common.data.folders import Files, Images
from common.data.sets import (
    COUNTS,
    DOMAINS,
    HELD_OUT,
    IMAGENET_STATS,
    NAMES,
    PHOTOGRAPHS,
    SHAPES_SIZES,
    STATS,
    DataSet,
    add_arguments,
    channel_stats,
    corrupted_dir,
    corrupted_labels,
    domain_names,
    for_evaluation,
    from_args,
    load,
    read_corrupted,
    read_manifest,
    shuffled,
    stratified_split,
    test_options,
)
from common.data.shortcut import SHORTCUT_TESTS
from common.data.streams import STREAMS, Streams, check_streams, debias_texture

__all__ = [
    "COUNTS",
    "DOMAINS",
    "HELD_OUT",
    "IMAGENET_STATS",
    "NAMES",
    "PHOTOGRAPHS",
    "SHAPES_SIZES",
    "SHORTCUT_TESTS",
    "STATS",
    "STREAMS",
    "Batches",
    "DataSet",
    "Files",
    "Images",
    "Streams",
    "add_arguments",
    "channel_stats",
    "check_streams",
    "corrupted_dir",
    "corrupted_labels",
    "crop_flip",
    "debias_texture",
    "domain_names",
    "folders",
    "for_evaluation",
    "from_args",
    "load",
    "read_corrupted",
    "read_manifest",
    "shapes",
    "shortcut",
    "shuffled",
    "stratified_split",
    "test_options",
    "trees",
]  # fmt: skip
