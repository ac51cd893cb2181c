"""Data sets by name, and augmented batches that are a function of the step.

    dataset = load("cifar10", data_dir="data", val_size=5000, device=device)
    batches = Batches(dataset.train, batch_size=128, seed=0)
    x, y = batches(step)        # float in [0,1] (B,3,S,S), int64 (B,)

Small sets are `Images`, uint8 tensors on the device. Photographs are `Files`, decoded when they
are read. Both have the same methods. Images are never normalised here: the model's first layer does
that, with dataset.mean and dataset.std.
"""

from common.data import decode, files, folders, shapes, shortcut, trees
from common.data.arrays import (
    cifar_place,
    corrupted_dir,
    corrupted_labels,
    read_corrupted,
    read_manifest,
)
from common.data.augment import POLICIES, augmented, jsd
from common.data.batches import Batches
from common.data.files import Files
from common.data.gaussian import Gaussian
from common.data.images import Images, crop_flip
from common.data.mixup import mixup
from common.data.sets import (
    HELD_OUT,
    SHAPES_SIZES,
    DataSet,
    add_arguments,
    channel_stats,
    check_networks,
    domain_names,
    for_evaluation,
    from_args,
    load,
    test_options,
)
from common.data.shortcut import SHORTCUT_TESTS
from common.data.splits import shuffled, stratified_split
from common.data.streams import STREAMS, Streams, check_streams, debias_texture
from common.data.table import (
    DOMAINS,
    IMAGENET,
    IMAGENET_STATS,
    IN9_TESTS,
    NAMES,
    PHOTOGRAPHS,
    SETS,
)

__all__ = [
    "DOMAINS",
    "HELD_OUT",
    "IMAGENET",
    "IMAGENET_STATS",
    "IN9_TESTS",
    "NAMES",
    "PHOTOGRAPHS",
    "POLICIES",
    "SETS",
    "SHAPES_SIZES",
    "SHORTCUT_TESTS",
    "STREAMS",
    "Batches",
    "DataSet",
    "Files",
    "Gaussian",
    "Images",
    "Streams",
    "add_arguments",
    "augmented",
    "channel_stats",
    "check_networks",
    "check_streams",
    "cifar_place",
    "corrupted_dir",
    "corrupted_labels",
    "crop_flip",
    "debias_texture",
    "decode",
    "domain_names",
    "files",
    "folders",
    "for_evaluation",
    "from_args",
    "jsd",
    "load",
    "mixup",
    "read_corrupted",
    "read_manifest",
    "shapes",
    "shortcut",
    "shuffled",
    "stratified_split",
    "test_options",
    "trees",
]  # fmt: skip
