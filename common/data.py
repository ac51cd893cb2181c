"""Data sets by name, and augmented batches that are a function of the step.

    data = load("cifar10", data_dir="data", val_size=5000, device=device)
    batches = Batches(data.train, batch_size=128, seed=0)
    x, y = batches(step)        # float in [0,1] (B,3,S,S), int64 (B,)

Small sets are uint8 tensors on the device; trees of photographs are `folders.Files`, which stand
where such a tensor would and decode what is asked for (hence the import, the one besides shapes).
Images are never normalised here: the model's first layer does that, with data.mean and data.std.
"""

import argparse
import csv
import shutil
import sys
import tempfile
import urllib.error
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from common import folders, run, shapes
from common.run import UserError

# Per-channel mean and standard deviation of the training images in [0,1].
STATS = {
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "cifar10.1": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "cifar100": ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
    "svhn": ((0.4377, 0.4438, 0.4728), (0.1980, 0.2010, 0.1970)),
}
IMAGENET_STATS = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))  # of every set of photographs
SHAPES_SIZES = {"train": 10_000, "test": 2_000}
# Domain sets: domains and classes; None: the folders decide.
DOMAINS = {
    "vlcs": (("Caltech101", "LabelMe", "SUN09", "VOC2007"),
             ("bird", "car", "chair", "dog", "person")),
    "pacs": (("art_painting", "cartoon", "photo", "sketch"),
             ("dog", "elephant", "giraffe", "guitar", "horse", "house", "person")),
    "camelyon17": (tuple(f"hospital{k}" for k in range(5)), ("normal", "tumor")),
    "domains": (None, None),
    "shapes": (shapes.STYLES, shapes.CLASSES),
}  # fmt: skip
HELD_OUT = 0.2  # of every training domain, for model selection (DomainBed)
# Test sets of the networks that a training set yields: (training set, folders it may lie in).
IMAGENET_TESTS = {
    "imagenet-a": ("imagenet-a", "ImageNet-A"),
    "imagenet-r": ("imagenet-r", "ImageNet-R"),
    "imagenet-sketch": ("sketch", "imagenet-sketch", "ImageNet-Sketch"),
    "imagenet-c": ("imagenet-c", "ImageNet-C"),
}
IN9_TESTS = {"in9": "original", "in9-mixed-same": "mixed_same", "in9-mixed-rand": "mixed_rand"}
IN9 = ("00_dog", "01_bird", "02_wheeled vehicle", "03_reptile", "04_carnivore", "05_insect",
       "06_musical instrument", "07_primate", "08_fish")  # fmt: skip
NAMES = (*STATS, "tiny-imagenet", "imagenet", *IMAGENET_TESTS, *IN9_TESTS, *DOMAINS, "folder")
# Images in the whole of each set, for what is said about an incomplete one.
COUNTS = {
    "cifar10.1": {"v4": 2_021, "v6": 2_000},
    "tiny-imagenet": {"train": 100_000, "val": 10_000},
    "imagenet": {"train": 1_281_167, "val": 50_000},
    "imagenet-a": {"": 7_500}, "imagenet-r": {"": 30_000}, "imagenet-sketch": {"": 50_889},
    "vlcs": {"Caltech101": 1_415, "LabelMe": 2_656, "SUN09": 3_282, "VOC2007": 3_376},
    "pacs": {"art_painting": 2_048, "cartoon": 2_344, "photo": 1_670, "sketch": 3_929},
    "camelyon17": {"": 455_954},
}  # fmt: skip
SOURCES = {  # where a set that is not there comes from; none of these is fetched
    "cifar10.1": "github.com/modestyachts/CIFAR-10.1, datasets/cifar10.1_v6_{data,labels}.npy",
    "tiny-imagenet": "cs231n.stanford.edu/tiny-imagenet-200.zip",
    "imagenet": "image-net.org (ILSVRC 2012, after registration), as train/ and val/",
    "imagenet-a": "people.eecs.berkeley.edu/~hendrycks/imagenet-a.tar",
    "imagenet-r": "people.eecs.berkeley.edu/~hendrycks/imagenet-r.tar",
    "imagenet-sketch": "github.com/HaohanWang/ImageNet-Sketch (a personal drive)",
    "imagenet-c": "zenodo.org/record/2235448, its five archives unpacked into one folder",
    "vlcs": "the script domainbed/scripts/download.py of DomainBed (a personal drive)",
    "pacs": "the script domainbed/scripts/download.py of DomainBed (a personal drive)",
    "camelyon17": "wilds.stanford.edu, camelyon17_v1.0",
    "in9": "the releases of github.com/MadryLab/backgrounds_challenge",
}


class Images(NamedTuple):
    """x uint8 (N,3,S,S), a tensor or folders.Files; y int64 (N,)."""

    x: torch.Tensor
    y: torch.Tensor

    def take(self, rows):
        """Tensors of an index or slice; files are decoded, without the unreadable ones."""
        if isinstance(self.x, folders.Files):
            x, held = self.x.read(rows)
            return Images(x, self.y[rows][held])
        return Images(self.x[rows], self.y[rows])

    def subset(self, rows):
        """The same with files that stay undecoded."""
        x = self.x.subset(rows) if isinstance(self.x, folders.Files) else self.x[rows]
        return Images(x, self.y[rows])

    def to(self, device):
        return Images(self.x.to(device), self.y.to(device))


@dataclass
class DataSet:
    name: str
    train: Images
    val: Images | None  # held out of train by `val_size` or for `test_domain`; else None
    test: Images
    classes: list = field(repr=False)
    mean: tuple = (0.5, 0.5, 0.5)
    std: tuple = (0.5, 0.5, 0.5)

    @property
    def image_size(self):
        return self.test.x.shape[-1]

    @property
    def flip(self):
        """Whether a mirrored image keeps its class; for `Batches`."""
        return self.name != "svhn"

    @property
    def scale(self):
        """The size whose constants `corruptions.corrupt` takes for these images."""
        return min((32, 64, 224), key=lambda size: abs(size - self.image_size))

    @property
    def model_kwargs(self):
        """What `models.build` wants to know of the data."""
        keys = {"num_classes": len(self.classes), "image_size": self.image_size}
        return keys | {"mean": self.mean, "std": self.std}


def add_arguments(parser):
    """Add the options of every data set, as the group "data"."""
    group = parser.add_argument_group("data")
    group.add_argument("--dataset", default="shapes", choices=NAMES)
    group.add_argument("--data-dir", default="data", help="where the files are, or go")
    group.add_argument(
        "--image-size", type=run.positive(int), metavar="S",
        help="of trees and shapes; default: 224, camelyon17 96, tiny-imagenet 64, shapes 32",
    )  # fmt: skip
    group.add_argument(
        "--test-domain", metavar="NAME",
        help="test on this domain, train on the others (vlcs, pacs, camelyon17, domains, shapes)",
    )  # fmt: skip
    group.add_argument("--workers", type=run.nonnegative(int), help="that decode; default: cores")
    group.add_argument("--strict", action="store_true", help="stop at a file that is no image")
    group.add_argument(
        "--val-size", type=run.nonnegative(int), default=0, metavar="N",
        help="hold out N training images, the same number of each class",
    )  # fmt: skip
    group.add_argument(
        "--limit", type=run.nonnegative(int), default=0, metavar="N",
        help="train on N images only, the same number of each class (0: all)",
    )  # fmt: skip
    group.add_argument("--augment", action=argparse.BooleanOptionalAction, default=True)


# --- reading --------------------------------------------------------------------------------------


def load(
    name, data_dir="data", val_size=0, limit=0, seed=0, device="cpu", image_size=None,
    test_domain=None, workers=None, strict=False,
):  # fmt: skip
    """Read a data set. Raises UserError where files are missing, truncated or of another shape.

    val_size, limit: images of the stratified validation split and training subset (0: none, all);
    `seed` chooses them. The validation split does not depend on `limit`.
    test_domain: leave this domain out: test is all of it, train and val are 80 and 20 % of each of
    the others. Without it a domain set is trained on 80 % and tested on 20 % of every domain,
    camelyon17 with its official splits (val: hospital 1, test: hospital 2).
    image_size: of a tree, or of shapes; workers, strict: of `folders.Files`.
    """
    options = {"device": device, "workers": workers, "strict": strict}
    sized = name in ("shapes", "tiny-imagenet") or name not in STATS
    if image_size and not sized:
        raise UserError(f"--image-size {image_size}: {name} has 32 pixels")
    if test_domain and name not in DOMAINS:
        raise UserError(f"--test-domain: {name} has no domains; {', '.join(DOMAINS)} have")
    if test_domain and val_size:
        raise UserError("--val-size: with --test-domain it is 20 % of every training domain")
    data_dir, val, stats = Path(data_dir), None, IMAGENET_STATS
    if name in DOMAINS and (test_domain or name != "shapes"):
        train, val, test, classes = read_domains(
            name, data_dir, seed, test_domain, image_size, options
        )
        stats = channel_stats(train.x) if name == "shapes" else stats
    elif name == "shapes":
        size = image_size or 32
        train = Images(*shapes.make(SHAPES_SIZES["train"], seed=0, split="train", size=size))
        test = Images(*shapes.make(SHAPES_SIZES["test"], seed=0, split="test", size=size))
        classes, stats = list(shapes.CLASSES), channel_stats(train.x)
    elif name == "svhn":
        train, test, classes = read_svhn(data_dir / "svhn.npz")
        stats = STATS[name]
    elif name in STATS:
        train, test, classes = read_cifar(name.removesuffix(".1"), data_dir)
        test = read_cifar101(data_dir) if name == "cifar10.1" else test
        stats = STATS[name]
    elif name == "tiny-imagenet":
        train, test, classes = read_tiny_imagenet(data_dir, image_size or 64, options)
    elif name in NAMES:
        train, test, classes = read_tree(name, data_dir, image_size or 224, options)
    else:
        raise UserError(f"--dataset {name}: unknown; there are {', '.join(NAMES)}")
    if val_size:
        rest, held_out = stratified_split(train.y, val_size, seed, "--val-size")
        train, val = train.subset(rest), train.subset(held_out)
    if limit:
        train = train.subset(stratified_split(train.y, limit, seed, "--limit")[1])
    parts = [p and p.to(device) for p in (train, val, test)]
    return DataSet(name, *parts, classes, *stats)


def from_args(args, device, **change):
    """The data set of a script's options (`add_arguments`); `change` overrides some."""
    keys = ("data_dir", "val_size", "limit", "seed", "image_size", "test_domain", "workers")
    options = {k: getattr(args, k) for k in (*keys, "strict")} | change
    return load(args.dataset, device=device, **options)


def channel_stats(x):
    """Mean and standard deviation per channel of uint8 images, as tuples in [0,1]."""
    x = x.transpose(0, 1).flatten(1).double() / 255
    return tuple(x.mean(1).tolist()), tuple(x.std(1).tolist())


def stratified_split(y, size, seed, option):
    """Indices (rest, chosen), both ascending: `chosen` has `size` rows, as evenly per class as
    the counts allow. Raises UserError naming `option` when there are too few rows."""
    if size >= len(y):
        raise UserError(f"{option} {size}: there are only {len(y)} training images")
    order = torch.randperm(len(y), generator=run.generator(seed, "split"))
    # Rank of every row within its class, in random order; the lowest ranks are chosen.
    by_class = order[y[order].argsort(stable=True)]
    counts = torch.bincount(y)
    rank = torch.arange(len(y)) - (counts.cumsum(0) - counts)[y[by_class]]
    chosen = by_class[rank.argsort(stable=True)[:size]].sort().values
    rest = torch.ones(len(y), dtype=torch.bool)
    rest[chosen] = False
    return rest.nonzero().flatten(), chosen


def read_cifar(name, data_dir):
    """(train, test, classes) from torchvision's files, else <name>.npz, else by download."""
    from torchvision import datasets

    cls = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}[name]
    folder, npz = data_dir / cls.base_folder, data_dir / f"{name}.npz"
    if not folder.is_dir():
        if npz.is_file():
            return read_npz(npz)
        download(cls, name, data_dir)
    try:
        parts = [cls(str(data_dir), train=train) for train in (True, False)]
    except RuntimeError:  # torchvision's word for a missing file or another MD5
        raise UserError(
            f"{folder}: a file is missing, truncated or altered (MD5); delete the folder and run "
            "again to download it, or put an intact copy there"
        ) from None
    images = [Images(torch.from_numpy(p.data).permute(0, 3, 1, 2).contiguous(),
                     torch.tensor(p.targets)) for p in parts]  # fmt: skip
    return *images, parts[0].classes


def read_svhn(path):
    """(train, test, classes) of the 32x32 digits, 73,257 + 26,032 ("extra" is not used)."""
    if not path.is_file():
        raise UserError(
            f"{path}: missing; SVHN is read from an .npz (x_train, x_test uint8 (N,32,32,3), "
            "y_train, y_test 0 to 9), for reading its .mat files takes scipy: convert them once"
        )
    return read_npz(path)


def read_npz(path):
    """Arrays x_train, x_test uint8 (N,S,S,3), y_train, y_test integer (N,), optional classes."""
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {key: file[key] for key in file.files}
    except Exception as error:  # zipfile, zlib, ValueError: all mean the same to the user
        raise UserError(f"{path}: truncated or not an .npz of plain arrays ({error})") from None
    parts = []
    for split in ("train", "test"):
        try:
            x, y = arrays[f"x_{split}"], arrays[f"y_{split}"]
        except KeyError as error:
            raise UserError(f"{path}: has no array {error}, only {', '.join(arrays)}") from None
        if x.dtype != np.uint8 or x.ndim != 4 or x.shape[3] != 3 or x.shape[1] != x.shape[2]:
            raise UserError(f"{path}: x_{split} must be uint8 (N,S,S,3), is {x.dtype} {x.shape}")
        if y.shape != x.shape[:1] or y.dtype.kind not in "iu" or len(y) == 0:
            raise UserError(
                f"{path}: y_{split} must be integers ({len(x)},), is {y.dtype} {y.shape}"
            )
        x = torch.from_numpy(x).permute(0, 3, 1, 2).contiguous()
        parts.append(Images(x, torch.from_numpy(y.astype(np.int64))))
    count = int(max(p.y.max() for p in parts)) + 1
    if min(p.y.min() for p in parts) < 0:
        raise UserError(f"{path}: negative labels")
    classes = [str(c) for c in arrays.get("classes", range(count))]
    if len(classes) < count:
        raise UserError(f"{path}: {len(classes)} class names for labels up to {count - 1}")
    return *parts, classes


def read_cifar101(data_dir):
    """Test set of Recht et al. 2018, classes as in CIFAR-10: version 6 (2,000), else 4 (2,021)."""
    for version, count in reversed(COUNTS["cifar10.1"].items()):
        path = data_dir / f"cifar10.1_{version}_data.npy"
        if path.is_file():
            x = read_array(path, "u", (count, 32, 32, 3))
            y = read_array(path.with_name(f"cifar10.1_{version}_labels.npy"), "iu", (count,))
            x = torch.from_numpy(np.array(x)).permute(0, 3, 1, 2).contiguous()
            return Images(x, torch.from_numpy(y.astype(np.int64)))
    raise missing("cifar10.1", data_dir / "cifar10.1_v6_data.npy")


# --- trees of files -------------------------------------------------------------------------------


def missing(name, what):
    """The UserError of a set that is not there: what was looked for, and where it comes from."""
    name = "in9" if name in IN9_TESTS else name
    source = f"; it comes from {SOURCES[name]}, unpacked there" if name in SOURCES else ""
    return UserError(f"{name}: no {what}{source}")


def note(text):
    """What is missing in a set that can be used all the same: one line on stderr."""
    print(f"note: {text}", file=sys.stderr)


def find(name, data_dir, names, marks):
    """The first of data_dir/<names> and data_dir itself that has one of the entries `marks`."""
    for place in [data_dir / n for n in names] + [data_dir]:
        if any((place / mark).exists() for mark in marks):
            return place
    raise missing(name, f"{data_dir / names[0]} (with {marks[0]}) and no {data_dir / marks[0]}")


def listed(root, count=None, title=None):
    """scan() with what is to be said about it: other files, loops, an incomplete set."""
    listing, title = folders.scan(root), title or str(root)
    others, example = listing.others
    if others:
        note(f"{title}: {others} files are no images, as {example}: left out")
    for loop in listing.loops:
        note(f"{title}: {loop} links to a folder above it: left out")
    if not len(listing):
        raise UserError(f"{root}: no images {root}/<class>/*.jpg there")
    if count and len(listing) != count:
        note(f"{title}: {len(listing)} images; the whole set has {count}")
    return listing


def class_folders(root):
    """Names of the folders in `root`, empty ones too, sorted; hidden ones do not count."""
    return sorted(p.name for p in root.iterdir() if p.is_dir() and not p.name.startswith("."))


def labels_of(listing, classes, depth=0):
    """Class numbers int64 (N,) by folder; UserError for a folder that is no class."""
    found, which = listing.part(depth)
    unknown = [name for name in found if name not in set(classes)]
    if unknown:
        text = ", ".join(unknown[:3]) + (" ..." if len(unknown) > 3 else "")
        raise UserError(
            f"{listing.root}: {len(unknown)} class folders are not among the {len(classes)} "
            f"classes: {text}"
        )
    if len(which) and which.min() < 0:
        row = int(which.argmin())
        raise UserError(f"{listing.path(row)}: lies in no class folder")
    number = {name: k for k, name in enumerate(classes)}
    return np.array([number[name] for name in found], np.int64)[which]


def in_order(files, labels, seed=0):
    """Images in a fixed random order: the first N of a test set are then a sample of it."""
    order = torch.randperm(len(files), generator=run.generator(seed, "test order"))
    return Images(files.subset(order), torch.from_numpy(labels)[order])


def train_and_test(name, root, test_root, classes, size, options, scale=(0.08, 1.0)):
    """(train, test, classes) of two class trees; the training folders are the classes."""
    counts = COUNTS.get(name, {})
    train = listed(root, counts.get("train"), f"{name} {root.name}")
    names = class_folders(root)
    empty = sorted(set(names) - set(train.part(0)[0]))
    if empty:
        raise UserError(f"{root / empty[0]}: a class without images; fill it or remove the folder")
    if classes and names != list(classes):
        absent = [c for c in classes if c not in names]
        raise UserError(f"{root}: {len(names)} classes, not the {len(classes)}: no {absent[:3]}")
    files = folders.Files(train, size=size, scale=scale, **options)
    images = Images(files, torch.from_numpy(labels_of(train, names)))
    return images, read_test(name, test_root, names, size, options, counts.get("val")), names


def read_test(name, root, classes, size, options, count=None, fit="crop"):
    """Test images of a class tree; classes of `classes` that it lacks are named."""
    listing = listed(root, count, f"{name} {root.name}")
    labels = labels_of(listing, classes)
    absent = [c for k, c in enumerate(classes) if k not in set(np.unique(labels).tolist())]
    only = np.unique(labels) if name in ("imagenet-a", "imagenet-r") else None
    if absent and only is None:
        more = ", ..." if len(absent) > 3 else ""
        note(f"{name} {root.name}: no images of {', '.join(absent[:3])}{more} ({len(absent)})")
    if only is not None and len(only) != 200:
        note(f"{name}: {len(only)} classes; the whole set has 200")
    return in_order(folders.Files(listing, size=size, fit=fit, only=only, **options), labels)


def read_tree(name, data_dir, size, options):
    """(train, test, classes) of folder, imagenet and its test sets, and the IN-9 sets."""
    if name == "folder":
        held = next((d for d in ("val", "test") if (data_dir / d).is_dir()), None)
        if not (data_dir / "train").is_dir() or held is None:
            raise UserError(
                f"folder: no {data_dir}/train/<class>/* with {data_dir}/val/<class>/* (or test)"
            )
        return train_and_test(name, data_dir / "train", data_dir / held, None, size, options)
    if name in IN9_TESTS:
        names = ("backgrounds_challenge", "bg_challenge", "in9")
        root = find(name, data_dir, names, ["original"])
        train = next((d for d in ("in9l", "original") if (root / d / "train").is_dir()), None)
        if train is None:
            raise missing(name, f"{root}/original/train (IN-9) or {root}/in9l/train (IN-9L)")
        test = root / IN9_TESTS[name] / "val"
        if not test.is_dir():
            raise missing(name, test)
        return train_and_test(name, root / train / "train", test, IN9, size, options)
    root = find("imagenet", data_dir, ("imagenet", "ILSVRC/Data/CLS-LOC"), ["train"])
    train = listed(root / "train", COUNTS["imagenet"]["train"], "imagenet train")
    classes = train.part(0)[0]
    if len(classes) != 1000 or not all(is_wnid(c) for c in classes):
        raise UserError(
            f"{root / 'train'}: {len(classes)} class folders, ImageNet has 1000 named n01440764 "
            "...; a part of it, or another tree, is --dataset folder"
        )
    images = folders.Files(train, size=size, **options)
    images = Images(images, torch.from_numpy(labels_of(train, classes)))
    return images, read_imagenet_test(name, data_dir, classes, size, options), classes


def is_wnid(name):
    """Whether a name is a WordNet id, as n01440764."""
    return len(name) == 9 and name[0] == "n" and name[1:].isdigit()


def imagenet_classes(data_dir):
    """The 1000 WordNet ids in the order of the logits (sorted): of the folders in imagenet/train
    or imagenet/val, else of LOC_synset_mapping.txt or classes.txt (a line starts with the id)."""
    places = [data_dir / "imagenet", data_dir / "ILSVRC/Data/CLS-LOC", data_dir]
    for tree in [place / split for place in places for split in ("train", "val")]:
        names = [n for n in class_folders(tree) if is_wnid(n)] if tree.is_dir() else []
        if len(names) == 1000:
            return names
    for path in [p / f for p in places for f in ("LOC_synset_mapping.txt", "classes.txt")]:
        if path.is_file():
            names = sorted(line.split()[0] for line in path.read_text().splitlines() if line)
            if len(names) == len(set(names)) == 1000 and all(is_wnid(n) for n in names):
                return names
            raise UserError(f"{path}: not 1000 lines that start with a WordNet id, as n01440764")
    raise UserError(
        f"ImageNet's 1000 WordNet ids are needed and not in {data_dir}: put imagenet/train there, "
        "or LOC_synset_mapping.txt (of Kaggle's ILSVRC copy), or classes.txt with one id a line"
    )


def read_imagenet_test(name, data_dir, classes, size, options, fit="crop"):
    """Test images of imagenet or one of its test sets, labelled by their place in `classes`."""
    if name == "imagenet":
        root = find(name, data_dir, ("imagenet", "ILSVRC/Data/CLS-LOC"), ["val"]) / "val"
        if not class_folders(root):
            return read_flat_imagenet(root, data_dir, classes, size, options)
        return read_test(name, root, classes, size, options, COUNTS[name]["val"])
    root = next((data_dir / n for n in IMAGENET_TESTS[name] if (data_dir / n).is_dir()), None)
    if root is None:
        raise missing(name, data_dir / IMAGENET_TESTS[name][0])
    if name == "imagenet-c":  # <corruption>/<severity>/<wnid>: all 75 sets in one
        listing = listed(root, title=name)
        files = folders.Files(listing, size=size, fit=fit, **options)
        return in_order(files, labels_of(listing, classes, depth=2))
    return read_test(name, root, classes, size, options, COUNTS[name][""])


def read_flat_imagenet(root, data_dir, classes, size, options):
    """imagenet/val without class folders. The labels are Kaggle's LOC_val_solution.csv ("name,wnid
    ...") or Caffe's val.txt ("name index"; the index counts the sorted WordNet ids)."""
    number, truth = {c: k for k, c in enumerate(classes)}, {}
    places = [p for p in (root.parent, data_dir, *root.parents[:4]) if p.is_dir()]
    for path in [p / f for p in places for f in ("LOC_val_solution.csv", "val.txt")]:
        if not path.is_file():
            continue
        for line in path.read_text().splitlines():
            file, _, label = line.replace(",", " ", 1).strip().partition(" ")
            label = label.split()[0] if label else ""
            if label in number:
                truth[file.split(".")[0].encode()] = number[label]
            elif label.isdigit() and int(label) < len(classes):
                truth[file.split(".")[0].encode()] = int(label)
        break
    else:
        raise UserError(
            f"{root}: no class folders, and no LOC_val_solution.csv or val.txt beside it to give "
            "the labels (the development kit's ground truth numbers its classes otherwise)"
        )
    listing = listed(root, COUNTS["imagenet"]["val"], "imagenet val")
    keys = [listing.name(row).split(b".")[0] for row in range(len(listing))]
    unknown = [key for key in keys if key not in truth]
    if unknown:
        raise UserError(f"{path}: no label for {len(unknown)} files, as {unknown[0].decode()}")
    labels = np.array([truth[key] for key in keys], np.int64)
    return in_order(folders.Files(listing, size=size, **options), labels)


def read_tiny_imagenet(data_dir, size, options):
    """(train, test, classes), decoded into memory: train/<wnid>/images/*, val/images/* with
    val_annotations.txt ("name wnid x y w h"); the official test images have no labels."""
    root = find("tiny-imagenet", data_dir, ("tiny-imagenet-200", "tiny-imagenet"), ["wnids.txt"])
    classes = sorted((root / "wnids.txt").read_text().split())
    truth, counts = {}, COUNTS["tiny-imagenet"]
    annotations = root / "val" / "val_annotations.txt"
    if not annotations.is_file():
        raise missing("tiny-imagenet", annotations)
    for line in annotations.read_text().splitlines():
        file, wnid = line.split()[:2]
        truth[file.encode()] = classes.index(wnid)
    train = listed(root / "train", counts["train"], "tiny-imagenet train")
    test = listed(root / "val" / "images", counts["val"], "tiny-imagenet val")
    names = [test.name(row) for row in range(len(test))]
    unknown = [n for n in names if n not in truth]
    if unknown:
        raise UserError(f"{annotations}: no line for {unknown[0].decode()}")
    parts = []
    for listing, labels in (
        (train, labels_of(train, classes)),
        (test, np.array([truth[n] for n in names], np.int64)),
    ):
        files = folders.Files(listing, size=size, fit="squash", **options | {"device": "cpu"})
        fit = "exact" if size == 64 else "squash"
        files.fit = fit
        parts.append(Images(files, torch.from_numpy(labels)).take(slice(None)))
    order = torch.randperm(len(parts[1].y), generator=run.generator(0, "test order"))
    return parts[0], parts[1].take(order), classes


# --- domains --------------------------------------------------------------------------------------


def domain_names(name, data_dir):
    """The domains of a set; of `domains` the folders of data_dir."""
    if name not in DOMAINS:
        raise UserError(f"--test-domain: {name} has no domains; {', '.join(DOMAINS)} have")
    if DOMAINS[name][0]:
        return list(DOMAINS[name][0])
    names = class_folders(Path(data_dir)) if Path(data_dir).is_dir() else []
    if len(names) < 2:
        raise UserError(f"domains: no {data_dir}/<domain>/<class>/* with two domains or more")
    return names


def read_domains(name, data_dir, seed, test_domain, size, options):
    """(train, val, test, classes), see `load`. Domains and classes that are missing are named."""
    if name == "camelyon17":
        images, domain, names, classes, split = read_camelyon17(data_dir, size or 96, options)
    elif name == "shapes":
        names, classes, split = list(shapes.STYLES), list(shapes.CLASSES), None
        count = SHAPES_SIZES["train"] // len(names)
        parts = [shapes.make(count, split="train", style=s, size=size or 32) for s in names]
        images = Images(*(torch.cat(part) for part in zip(*parts, strict=True)))
        domain = torch.arange(len(names)).repeat_interleave(count)
    else:
        images, domain, names, classes = read_domain_tree(name, data_dir, size or 224, options)
        split = None
    if test_domain and test_domain not in names:
        raise UserError(f"--test-domain {test_domain}: {name} has {', '.join(names)} here")
    if split is not None and not test_domain:  # 0 train, 1 its validation, 2 test, 3 validation
        return *(images.subset((split == k).nonzero().flatten()) for k in (0, 3, 2)), classes
    train, val, test = [], [], []
    for k, own in enumerate(names):
        rows = (domain == k).nonzero().flatten()
        if own == test_domain:
            test.append(rows)
            continue
        held = round(HELD_OUT * len(rows))
        rest, held = stratified_split(images.y[rows], held, f"{seed}-{own}", f"{name} {own}: 20 %")
        train.append(rows[rest])
        (val if test_domain else test).append(rows[held])
    parts = [torch.cat(rows) if rows else None for rows in (train, val, test)]
    order = [p[torch.randperm(len(p), generator=run.generator(0, "test order"))]
             if p is not None else None for p in parts[1:]]  # fmt: skip
    val, test = (p if p is None else images.subset(p) for p in order)
    return images.subset(parts[0]), val, test, classes


def read_domain_tree(name, data_dir, size, options):
    """(Images of all domains, domain int64 (N,), names, classes) of <domain>/<class>/*. A domain
    may lack classes; one that is missing altogether is left out."""
    wanted, classes = DOMAINS[name]
    wanted = wanted or domain_names(name, data_dir)
    places = (name.upper(), name) if name != "domains" else ()
    root = find(name, data_dir, places, wanted) if places else data_dir
    listing = listed(root, title=name)
    found, domain = listing.part(0)
    names = [d for d in wanted if d in found]
    extra = [d for d in found if d not in wanted]
    if extra:
        raise UserError(f"{root}: {extra[0]} is no domain of {name} ({', '.join(wanted)})")
    if len(names) < 2:
        raise UserError(f"{root}: {name} needs two domains or more, has {', '.join(names)}")
    classes = list(classes or listing.part(1)[0])
    labels = labels_of(listing, classes, depth=1)
    domain = np.array([names.index(d) for d in found], np.int64)[domain]
    for d in wanted:
        count = int((domain == names.index(d)).sum()) if d in names else 0
        whole = COUNTS.get(name, {}).get(d)
        if d not in names:
            note(f"{name}: {d} is missing in {root}; it is left out")
            continue
        have = set(np.unique(labels[domain == names.index(d)]).tolist())
        absent = [c for k, c in enumerate(classes) if k not in have]
        if absent:
            note(f"{name}: {d} has no images of {', '.join(absent)}")
        if whole and count != whole:
            note(f"{name}: {d} has {count} images; the whole set has {whole}")
    files = folders.Files(listing, size=size, fit="squash", scale=(0.7, 1.0), **options)
    return Images(files, torch.from_numpy(labels)), torch.from_numpy(domain), names, classes


def read_camelyon17(data_dir, size, options):
    """(Images, domain, names, classes, split) of the WILDS layout: metadata.csv and patches/. The
    domain is the hospital (column center); split is 0 train, 1 id_val, 2 test, 3 val as in WILDS,
    where hospital 1 is val and 2 is test whatever the column says."""
    root = find("camelyon17", data_dir, ("camelyon17_v1.0", "camelyon17"), ["metadata.csv"])
    listing = listed(root / "patches", title="camelyon17 patches")
    place = {listing.name(row): row for row in range(len(listing))}
    rows, table, absent = [], [], []
    with open(root / "metadata.csv", newline="") as file:
        reader = csv.DictReader(file)
        wanted = ("patient", "node", "x_coord", "y_coord", "tumor", "center", "split")
        lacking = [c for c in wanted if c not in (reader.fieldnames or ())]
        if lacking:
            raise UserError(f"{root}/metadata.csv: no column {', '.join(lacking)}")
        for r in reader:
            key = "patch_patient_{patient}_node_{node}_x_{x_coord}_y_{y_coord}.png".format(**r)
            row = place.get(key.encode())
            if row is None:
                absent.append(key)
                continue
            rows.append(row)
            table.append((int(r["tumor"]), int(r["center"]), int(r["split"])))
    if not rows:
        raise UserError(f"{root}/patches: none of the patches of metadata.csv, as {absent[0]}")
    if absent:
        note(f"camelyon17: {len(absent)} patches are missing, as {absent[0]}")
    elif len(rows) != COUNTS["camelyon17"][""]:
        note(f"camelyon17: {len(rows)} patches; the whole set has {COUNTS['camelyon17']['']}")
    y, center, split = torch.tensor(table).T.contiguous()
    split[center == 1], split[center == 2] = 3, 2
    names, classes = (list(part) for part in DOMAINS["camelyon17"])
    files = folders.Files(listing, rows, size=size, fit="squash", scale=(0.7, 1.0), **options)
    return Images(files, y), center, names, classes, split


def corrupted_dir(name, data_dir="data"):
    """The folder of the released CIFAR-10-C or CIFAR-100-C arrays, or None where there is none."""
    folder = Path(data_dir) / {"cifar10": "CIFAR-10-C", "cifar100": "CIFAR-100-C"}.get(name, "-")
    return folder if (folder / "labels.npy").is_file() else None


def read_array(path, dtype, shape):
    """A memory-mapped .npy file of this dtype kind and shape; None in `shape` is any size."""
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except FileNotFoundError:
        raise UserError(f"{path}: missing; complete the folder, or use --generate") from None
    except Exception as error:  # EOFError, ValueError: what mmap and header parsing raise
        raise UserError(f"{path}: truncated or not a .npy array ({error})") from None
    fits = len(array.shape) == len(shape) and all(
        want in (None, have) for have, want in zip(array.shape, shape, strict=True)
    )
    if array.dtype.kind not in dtype or not fits:
        raise UserError(f"{path}: is {array.dtype} {array.shape}, expected {shape}")
    return array


def corrupted_labels(folder):
    """Labels int64 (N,) of the N test images; labels.npy repeats them for the five severities."""
    y = read_array(Path(folder) / "labels.npy", "iu", (None,))
    blocks = y.reshape(5, -1) if len(y) % 5 == 0 and len(y) else None
    if blocks is None or not (blocks == blocks[0]).all():
        raise UserError(f"{folder}/labels.npy: not five equal blocks of labels")
    return torch.from_numpy(blocks[0].astype(np.int64))


def read_corrupted(folder, corruption, severity, rows):
    """Images uint8 (len(rows),3,S,S) of one file of the official layout: (5N,S,S,3) uint8, rows
    (severity-1)N to severity N are that severity, in the order of the test set."""
    count = len(corrupted_labels(folder))
    array = read_array(Path(folder) / f"{corruption}.npy", "u", (5 * count, None, None, 3))
    block = array[(severity - 1) * count : severity * count]
    return torch.from_numpy(block[rows.numpy()]).permute(0, 3, 1, 2).contiguous()


def download(cls, name, data_dir):
    """Let torchvision fetch and check the archive in a temporary folder; the data set's folder
    appears under `data_dir` only when it is whole."""
    print(f"{name} is not in {data_dir}: downloading it")
    temporary = None
    try:
        data_dir.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=".download-", dir=data_dir))
        cls(str(temporary), train=True, download=True)
        (temporary / cls.base_folder).rename(data_dir / cls.base_folder)
    except (urllib.error.URLError, OSError, RuntimeError) as error:
        reason = str(error).split("\n")[0][:120]
        raise UserError(
            f"{name}: no {data_dir / cls.base_folder} and no {data_dir / (name + '.npz')}, and the "
            f"download failed ({reason}); put either there, or use --dataset shapes (no files)"
        ) from None
    finally:
        if temporary:
            shutil.rmtree(temporary, ignore_errors=True)


# --- batches --------------------------------------------------------------------------------------


class Batches:
    """Shuffled batches for training; `batches(step)` depends on (seed, step) alone.

    images: Images; the rows of an epoch's order that fill no batch are left out.
    augment: for tensors a random crop after zero padding by an eighth of the side (4 pixels at 32,
    as He et al. 2016) and, with `flip`, horizontal flip; for files what `folders.Stream` does. The
    draws of an epoch come from a CPU generator, so they are the same on every device, and go to
    the device in one transfer.
    """

    def __init__(self, images, batch_size, seed, augment=True, flip=True):
        if batch_size > len(images.y):
            raise UserError(f"--batch-size {batch_size}: there are only {len(images.y)} images")
        self.images, self.batch_size, self.seed, self.augment = images, batch_size, seed, augment
        self.per_epoch = len(images.y) // batch_size
        self.pad, self.mirror = images.x.shape[-1] // 8, flip
        self.epoch = self.stream = None
        if isinstance(images.x, folders.Files):
            self.stream = folders.Stream(*images, batch_size, seed, augment, flip)

    def _draw(self, epoch):
        rng = run.generator(self.seed, "epoch", epoch)
        n, device = len(self.images.y), self.images.x.device
        self.order = torch.randperm(n, generator=rng).to(device)
        self.shift = torch.randint(2 * self.pad + 1, (2, n), generator=rng).to(device)
        self.flip = (torch.rand(n, generator=rng) < 0.5 * self.mirror).to(device)
        self.epoch = epoch

    def __call__(self, step):
        """(x, y): float in [0,1] (B,3,S,S) channels_last, int64 (B,)."""
        if self.stream:
            return self.stream(step)
        epoch, i = divmod(step, self.per_epoch)
        if epoch != self.epoch:
            self._draw(epoch)
        rows = slice(i * self.batch_size, (i + 1) * self.batch_size)
        x, y = self.images.take(self.order[rows])
        if self.augment:
            x = crop_flip(x, *self.shift[:, rows], self.flip[rows], self.pad)
        return run.to_float(x), y


def crop_flip(x, dy, dx, flip, pad):
    """Shift x (N,C,S,S) by (dy, dx) in 0..2*pad after zero padding; mirror the rows of `flip`."""
    size = x.shape[-1]
    windows = F.pad(x, (pad,) * 4).unfold(2, size, 1).unfold(3, size, 1)
    x = windows[torch.arange(len(x), device=x.device), :, dy, dx]
    return torch.where(flip.view(-1, 1, 1, 1), x.flip(3), x)
