"""The one table of data sets: what each is, where it lies, what is in it, where it comes from."""

from typing import NamedTuple

from common.data import shapes

IMAGENET_STATS = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))  # of every set of photographs
CIFAR10_STATS = ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616))
CIFAR100_STATS = ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762))
SVHN_STATS = ((0.4377, 0.4438, 0.4728), (0.1980, 0.2010, 0.1970))


class Row(NamedTuple):
    """One data set.

    size: pixels of a side, the default where --image-size may change it (`sized`).
    stats: mean and standard deviation per channel in [0,1]; None: those of the training images.
    files: whether its images stay files until they are read. flip: whether a mirrored image keeps
    its class. counts: images of each part of the whole set. folders: where it may lie below
    --data-dir. source: where it comes from; nothing but CIFAR is fetched.
    domains, classes: names, () for "the folders decide" and None for a set without domains.
    test: the folder of an IN-9 set that holds its test images.
    """

    size: int
    stats: tuple | None
    sized: bool = True
    files: bool = False
    flip: bool = True
    counts: dict = {}  # noqa: RUF012 - never changed
    folders: tuple = ()
    source: str = ""
    domains: tuple | None = None
    classes: tuple = ()
    test: str = ""


def arrays(stats, counts, source="", flip=True):
    """A set of 32 pixels in arrays."""
    return Row(32, stats, sized=False, counts=counts, source=source, flip=flip)


def photographs(counts=None, folders=(), source="", size=224, **more):
    """A set of photographs in files."""
    counts = counts or {}
    return Row(
        size, IMAGENET_STATS, files=True, counts=counts, folders=folders, source=source, **more
    )


CIFAR = {"train": 50_000, "test": 10_000}
BERKELEY = "people.eecs.berkeley.edu/~hendrycks"
DOMAINBED = "the script domainbed/scripts/download.py of DomainBed (a personal drive)"
IN9_FOLDERS = ("backgrounds_challenge", "bg_challenge", "in9")
IN9 = {
    "counts": {"train": 45_405, "val": 4_050}, "folders": IN9_FOLDERS,
    "source": "the releases of github.com/MadryLab/backgrounds_challenge",
}  # fmt: skip
SETS = {
    "shapes": Row(32, None, domains=shapes.STYLES, classes=shapes.CLASSES),
    "shapes-shortcut": Row(32, None, classes=shapes.CLASSES),
    "cifar10": arrays(CIFAR10_STATS, CIFAR),
    "cifar10.1": arrays(
        CIFAR10_STATS, {"v4": 2_021, "v6": 2_000},
        "github.com/modestyachts/CIFAR-10.1, datasets/cifar10.1_v6_{data,labels}.npy",
    ),
    "cifar100": arrays(CIFAR100_STATS, CIFAR),
    "svhn": arrays(SVHN_STATS, {"train": 73_257, "test": 26_032}, flip=False),
    "tiny-imagenet": Row(
        64, IMAGENET_STATS, counts={"train": 100_000, "val": 10_000},
        folders=("tiny-imagenet-200", "tiny-imagenet"),
        source="cs231n.stanford.edu/tiny-imagenet-200.zip",
    ),
    "folder": photographs(),
    "imagenet": photographs(
        {"train": 1_281_167, "val": 50_000}, ("imagenet", "ILSVRC/Data/CLS-LOC"),
        "image-net.org (ILSVRC 2012, after registration), as train/ and val/",
    ),
    "imagenet-a": photographs(
        {"": 7_500}, ("imagenet-a", "ImageNet-A"), f"{BERKELEY}/imagenet-a.tar"
    ),
    "imagenet-r": photographs(
        {"": 30_000}, ("imagenet-r", "ImageNet-R"), f"{BERKELEY}/imagenet-r.tar"
    ),
    "imagenet-sketch": photographs(
        {"": 50_889}, ("sketch", "imagenet-sketch", "ImageNet-Sketch"),
        "github.com/HaohanWang/ImageNet-Sketch (a personal drive)",
    ),
    "imagenet-c": photographs(
        {}, ("imagenet-c", "ImageNet-C"),
        "zenodo.org/record/2235448, its five archives unpacked into one folder",
    ),
    "in9": photographs(**IN9, test="original"),
    "in9-mixed-same": photographs(**IN9, test="mixed_same"),
    "in9-mixed-rand": photographs(**IN9, test="mixed_rand"),
    "vlcs": photographs(
        {"Caltech101": 1_415, "LabelMe": 2_656, "SUN09": 3_282, "VOC2007": 3_376},
        ("VLCS", "vlcs"), DOMAINBED,
        domains=("Caltech101", "LabelMe", "SUN09", "VOC2007"),
        classes=("bird", "car", "chair", "dog", "person"),
    ),
    "pacs": photographs(
        {"art_painting": 2_048, "cartoon": 2_344, "photo": 1_670, "sketch": 3_929},
        ("PACS", "pacs"), DOMAINBED,
        domains=("art_painting", "cartoon", "photo", "sketch"),
        classes=("dog", "elephant", "giraffe", "guitar", "horse", "house", "person"),
    ),
    "camelyon17": photographs(
        {"": 455_954}, ("camelyon17_v1.0", "camelyon17"), "wilds.stanford.edu, camelyon17_v1.0",
        size=96, domains=tuple(f"hospital{k}" for k in range(5)), classes=("normal", "tumor"),
    ),
    "domains": photographs(domains=()),
}  # fmt: skip
NAMES = tuple(SETS)
PHOTOGRAPHS = tuple(name for name, row in SETS.items() if row.files)
DOMAINS = tuple(name for name, row in SETS.items() if row.domains is not None)
IMAGENET_TESTS = ("imagenet-a", "imagenet-r", "imagenet-sketch", "imagenet-c")
IMAGENET = ("imagenet", *IMAGENET_TESTS)
IN9_TESTS = tuple(name for name, row in SETS.items() if row.test)
