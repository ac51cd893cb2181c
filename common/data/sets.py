"""Data sets by name: reading, checking, splitting."""

import json
import shutil
import tempfile
import urllib.error
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from common import run
from common.data import shapes, shortcut, trees
from common.data.files import Files
from common.data.images import Images
from common.data.table import DOMAINS, NAMES, SETS
from common.run import UserError

HELD_OUT = 0.2  # of every training domain, for model selection (DomainBed)
SHAPES_SIZES = {"train": 10_000, "test": 2_000}


@dataclass
class DataSet:
    """A data set as `load` reads it."""

    name: str
    train: Images | Files
    val: Images | Files | None  # held out of train by `val_size` or for `test_domain`; else None
    test: Images | Files
    classes: list = field(repr=False)
    mean: tuple = (0.5, 0.5, 0.5)
    std: tuple = (0.5, 0.5, 0.5)
    # test images "without" the shortcut and with another class's ("swapped"), see shortcut.py
    shortcut_tests: dict = field(default_factory=dict, repr=False)

    @property
    def image_size(self):
        """Pixels of a side."""
        return self.test.size

    @property
    def flip(self):
        """Whether a mirrored image keeps its class; for `Batches`."""
        return SETS[self.name].flip

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
        help="test on this domain, train on the others; ct.py: all, one after the other",
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
    group.add_argument(
        "--augment", action=run.Flag, default=True, help="crop and flip the training images"
    )
    group.add_argument(
        "--shortcut", type=shortcut.levels, metavar="LEVELS",
        help="add a class-dependent grating of so many grey levels to training and test images of "
        "a small data set; 0: none (default: 3 for shapes-shortcut, else 0)",
    )  # fmt: skip


# --- reading --------------------------------------------------------------------------------------


def load(
    name, data_dir="data", val_size=0, limit=0, seed=0, device="cpu", image_size=None,
    test_domain=None, workers=None, strict=False, shortcut_levels=None,
):  # fmt: skip
    """Read a data set. Raises UserError where files are missing, truncated or of another shape.

    val_size, limit: images of the stratified validation split and training subset (0: none, all);
    `seed` chooses them. The validation split does not depend on `limit`.
    test_domain: leave this domain out. Test is all of it, train and val are 80 and 20 % of each of
    the others. Without it a domain set is trained on 80 % and tested on 20 % of every domain.
    camelyon17 then has its official splits, val hospital 1 and test hospital 2.
    shortcut_levels: see shortcut.py. None is 3 for shapes-shortcut and 0 for the others.
    image_size: of a tree, or of shapes. workers, strict: see `Files`.
    """
    title = name
    if shortcut_levels is None:
        shortcut_levels = shapes.SHORTCUT if name == "shapes-shortcut" else 0
    name = name.removesuffix("-shortcut")
    if name not in SETS:
        raise UserError(f"--dataset {name}: unknown; there are {', '.join(NAMES)}")
    row = SETS[name]
    if shortcut_levels and (row.files or name == "tiny-imagenet"):
        raise UserError(f"--shortcut: for small data sets held as tensors, not for {name}")
    options = {"device": device, "workers": workers, "strict": strict}
    if image_size and not row.sized:
        raise UserError(f"--image-size {image_size}: {name} has {row.size} pixels")
    size = image_size or row.size
    if test_domain and name not in DOMAINS:
        raise UserError(f"--test-domain: {name} has no domains; {', '.join(DOMAINS)} have")
    if test_domain == "all":
        raise UserError("--test-domain all: ct.py trains one network for each; here name one")
    if test_domain and val_size:
        raise UserError("--val-size: with --test-domain it is 20 % of every training domain")
    data_dir, val = Path(data_dir), None
    if name in DOMAINS and (test_domain or name != "shapes"):
        train, val, test, classes = read_domains(name, data_dir, seed, test_domain, size, options)
    elif name == "shapes":
        train = Images(*shapes.make(SHAPES_SIZES["train"], seed=0, split="train", size=size))
        test = Images(*shapes.make(SHAPES_SIZES["test"], seed=0, split="test", size=size))
        classes = list(shapes.CLASSES)
    elif name == "svhn":
        train, test, classes = read_svhn(data_dir / "svhn.npz")
    elif not row.sized:
        train, test, classes = read_cifar(name.removesuffix(".1"), data_dir)
        test = read_cifar101(data_dir) if name == "cifar10.1" else test
    elif name == "tiny-imagenet":
        train, test, classes = trees.read_tiny_imagenet(data_dir, size, options)
    else:
        train, test, classes = trees.read_tree(name, data_dir, size, options)
    stats = row.stats or channel_stats(train.x)
    whole = row.counts
    if "test" in whole and {"train": len(train), "test": len(test)} != whole:
        trees.note(
            f"{name}: {len(train)} and {len(test)} images; the whole set has {whole['train']} and "
            f"{whole['test']}"
        )
    if val_size:
        if val_size >= len(train.y):
            raise UserError(f"--val-size {val_size}: there are only {len(train.y)} training images")
        rest, held_out = stratified_split(train.y, val_size, seed, "--val-size")
        train, val = train.subset(rest), train.subset(held_out[shuffled(len(held_out))])
    if limit:
        train = train.subset(stratified_split(train.y, limit, seed, "--limit")[1])
    tests = {}
    if shortcut_levels:
        grating = shortcut.patterns(len(classes), train.x.shape[-1], shortcut_levels)
        tests = {"without": test, "swapped": shortcut.add(test, grating, swap=True)}
        train, val, test = (p and shortcut.add(p, grating) for p in (train, val, test))
    parts = [p and p.to(device) for p in (train, val, test)]
    tests = {k: p.to(device) for k, p in tests.items()}
    return DataSet(title, *parts, classes, *stats, tests)


def from_args(args, device, **change):
    """The data set of a script's options (`add_arguments`); `change` overrides some."""
    keys = ("data_dir", "val_size", "limit", "seed", "image_size", "test_domain", "workers")
    options = {k: getattr(args, k) for k in (*keys, "strict")} | change
    options["shortcut_levels"] = getattr(args, "shortcut", None)
    return load(args.dataset, device=device, **options)


def channel_stats(x):
    """Mean and standard deviation per channel of uint8 images, as tuples in [0,1]."""
    x = x.transpose(0, 1).flatten(1).double() / 255
    return tuple(x.mean(1).tolist()), tuple(x.std(1).tolist())


def shuffled(n):
    """A fixed order of n held-out rows, so that the first few of them are a sample of all."""
    return torch.randperm(n, generator=run.generator(0, "test order"))


def stratified_split(y, size, seed, option):
    """Indices (rest, chosen), both ascending. `chosen` has `size` rows, as evenly per class as the
    counts allow. `seed` draws them, and the classes that get one more. Raises UserError naming
    `option` when there are too few rows."""
    if size > len(y):
        raise UserError(f"{option} {size}: there are only {len(y)} images")
    order = torch.randperm(len(y), generator=run.generator(seed, "split"))
    # Rank of every row within its class, in random order; the lowest ranks are chosen.
    by_class = order[y[order].argsort(stable=True)]
    counts = torch.bincount(y)
    turn = torch.randperm(len(counts), generator=run.generator(seed, "split classes"))
    label = y[by_class]
    rank = torch.arange(len(y)) - (counts.cumsum(0) - counts)[label]
    chosen = by_class[(rank * len(counts) + turn[label]).argsort()[:size]].sort().values
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
    sizes = [p.x.shape[-1] for p in parts]
    if sizes[0] != sizes[1]:
        raise UserError(f"{path}: x_train has {sizes[0]} pixels a side and x_test {sizes[1]}")
    if (parts[1].y.diff() >= 0).all():  # by class
        parts[1] = parts[1].take(shuffled(len(parts[1].y)))
    count = int(max(p.y.max() for p in parts)) + 1
    first = int(min(p.y.min() for p in parts))
    if first < 0:
        raise UserError(f"{path}: negative labels")
    if first > 0:
        raise UserError(
            f"{path}: the labels are {first} to {count - 1}; number the classes from 0 (in SVHN's "
            ".mat files the digit 0 is 10: take y % 10)"
        )
    seen = len(torch.cat([p.y for p in parts]).unique())
    if "classes" not in arrays and count > 2 * seen:  # a sentinel, as 255, or not numbered from 0
        raise UserError(
            f"{path}: labels up to {count - 1} but only {seen} classes have images; number the "
            "classes without gaps, or add an array `classes` of all names"
        )
    classes = arrays.get("classes", np.arange(count))
    if classes.ndim != 1:
        raise UserError(f"{path}: classes must be names (K,), is {classes.dtype} {classes.shape}")
    classes = [str(name) for name in classes]
    if len(classes) < count:
        raise UserError(f"{path}: {len(classes)} class names for labels up to {count - 1}")
    return *parts, classes


def domain_names(name, data_dir="data"):
    """The domains of a set that are there, for `test_domain`."""
    if name not in DOMAINS:
        raise UserError(f"--test-domain: {name} has no domains; {', '.join(DOMAINS)} have")
    return list(shapes.STYLES) if name == "shapes" else trees.domain_names(name, Path(data_dir))


def read_domains(name, data_dir, seed, test_domain, size, options):
    """(train, val, test, classes), see `load`. Domains and classes that are missing are named."""
    if name == "camelyon17":
        images, domain, names, classes, split = trees.read_camelyon17(data_dir, size, options)
    elif name == "shapes":
        names, classes, split = list(shapes.STYLES), list(shapes.CLASSES), None
        count = SHAPES_SIZES["train"] // len(names)
        parts = [shapes.make(count, split="train", style=s, size=size) for s in names]
        images = Images(*(torch.cat(part) for part in zip(*parts, strict=True)))
        domain = torch.arange(len(names)).repeat_interleave(count)
    else:
        images, domain, names, classes = trees.read_domain_tree(name, data_dir, size, options)
        split = None
    if test_domain and test_domain not in names:
        raise UserError(f"--test-domain {test_domain}: {name} has {', '.join(names)} here")
    if split is not None and not test_domain:  # 0 train, 1 its validation, 2 test, 3 validation
        rows = [(split == k).nonzero().flatten() for k in (0, 3, 2)]
        held = (images.subset(r[shuffled(len(r))]) for r in rows[1:])
        return images.subset(rows[0]), *held, classes
    train, val, test = [], [], []
    for k, own in enumerate(names):
        rows = (domain == k).nonzero().flatten()
        if not len(rows):  # named by the reader
            if own == test_domain:
                raise UserError(f"--test-domain {own}: no images of it in {data_dir}")
            continue
        if own == test_domain:
            test.append(rows)
            continue
        held = max(round(HELD_OUT * len(rows)), min(1, len(rows) - 1))
        rest, held = stratified_split(images.y[rows], held, f"{seed}-{own}", f"{name} {own}: 20 %")
        train.append(rows[rest])
        (val if test_domain else test).append(rows[held])
    parts = [torch.cat(rows) if rows else None for rows in (train, val, test)]
    if any(p is not None and not len(p) for p in parts):
        raise UserError(
            f"{name}: {len(images.y)} images in {data_dir} are too few to hold some out"
        )
    val, test = (p if p is None else images.subset(p[shuffled(len(p))]) for p in parts[1:])
    return images.subset(parts[0]), val, test, classes


def read_cifar101(data_dir):
    """Test set of Recht et al. 2018, classes as in CIFAR-10: version 6 (2,000), else 4 (2,021)."""
    for version, count in reversed(SETS["cifar10.1"].counts.items()):
        path = data_dir / f"cifar10.1_{version}_data.npy"
        if path.is_file():
            x = read_array(path, "u", (count, 32, 32, 3))
            y = read_array(path.with_name(f"cifar10.1_{version}_labels.npy"), "iu", (count,))
            x = torch.from_numpy(np.array(x)).permute(0, 3, 1, 2).contiguous()
            return Images(x, torch.from_numpy(y.astype(np.int64)))
    raise trees.missing("cifar10.1", data_dir / "cifar10.1_v6_data.npy")


def test_options(name, networks):
    """Options of `load` that give the test set of networks (label, model, facts).

    Of a domain set these are the images that they were not trained on. Raises UserError where these
    differ."""
    if name not in DOMAINS:
        return {}
    found = []
    for _, _, facts in networks:
        options = facts.get("options", {})
        own = {"test_domain": options.get("test_domain")}
        if name in ("vlcs", "pacs", "domains") and not own["test_domain"]:
            own["seed"] = options.get("seed", 0)  # chose the 20 % of every domain
        found.append(own)
    if any(own != found[0] for own in found):
        raise UserError(
            f"{name}: the networks have different test images ({found}): evaluate them apart"
        )
    return found[0]


class Restricted(torch.nn.Module):
    """A network whose logits are those of some classes alone."""

    def __init__(self, model, classes):
        super().__init__()
        self.model, self.spec = model, model.spec | {"num_classes": len(classes)}
        self.register_buffer("classes", classes)

    def forward(self, x):
        return self.model(x)[:, self.classes]


def for_evaluation(name, networks, data_dir, limit):
    """(x uint8, y, rows of the test set, its size) of a data set for networks (label, model,
    facts).

    The tensors are on the CPU. limit: so many images, the same number of each class. For imagenet-a
    and -r the networks in the list become `Restricted`, and y numbers the classes left. Raises
    UserError where a network has another number of classes or cannot take the images."""
    size = networks[0][1].spec["image_size"]
    if networks[0][2]["method"] == "torchvision":  # their 1000 classes need no training images
        folder = Path(data_dir)
        classes = trees.imagenet_classes(folder)
        options = {"device": "cpu", "workers": None, "strict": True}
        test = trees.read_imagenet_test(name, folder, classes, size, options)
    else:
        options = test_options(name, networks)
        dataset = load(name, data_dir, image_size=size if SETS[name].sized else None, **options)
        test, classes = dataset.test, dataset.classes
    for _, model, facts in networks:
        if model.spec["num_classes"] != len(classes):
            raise UserError(
                f"{name} has {len(classes)} classes, {Path(facts['checkpoint']).name} "
                f"{model.spec['num_classes']}"
            )
        if model.spec["image_size"] != size:
            raise UserError(
                f"the networks take images of {size} and {model.spec['image_size']} pixels: "
                "evaluate them apart"
            )
    rows = torch.arange(len(test.y))
    if limit:
        rows = stratified_split(test.y, limit, 0, "--limit")[1]
    x, y = test.take(rows)
    if len(x) < len(rows):
        raise UserError(f"{name}: {len(rows) - len(x)} images cannot be read")
    only = test.only
    if only is not None:
        y = torch.searchsorted(only, y)
        for k, (label, model, facts) in enumerate(networks):
            device = next(model.parameters()).device
            networks[k] = label, Restricted(model, only.to(device)).eval(), facts
    return x, y, rows, len(test.y)


def corrupted_dir(name, data_dir="data"):
    """The folder of the released CIFAR-10-C or CIFAR-100-C arrays, or None where there is none."""
    folder = Path(data_dir) / {"cifar10": "CIFAR-10-C", "cifar100": "CIFAR-100-C"}.get(name, "-")
    return folder if (folder / "labels.npy").is_file() else None


def read_manifest(folder):
    """manifest.json of a corrupted set that eval/export.py wrote, or None where there is none."""
    path = Path(folder) / "manifest.json"
    try:
        return json.loads(path.read_text()) if path.is_file() else None
    except ValueError:
        raise UserError(f"{path}: not JSON; delete the folder and export again") from None


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
    """Images uint8 (len(rows),3,S,S) of one file of the official layout.

    The file is uint8 (5N,S,S,3): N rows for each severity, in the order of the test set."""
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
