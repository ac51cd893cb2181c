"""Data sets by name: their options, reading and splitting."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch

from common import run
from common.data import shapes, shortcut, trees
from common.data.arrays import read_cifar, read_cifar101, read_svhn
from common.data.files import Files
from common.data.images import Images
from common.data.splits import shuffled, stratified_split
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


def add_arguments(parser, *others):
    """Add the options of every data set, as the group "data". others: further names of --dataset,
    of data that the script itself makes."""
    group = parser.add_argument_group("data")
    group.add_argument("--dataset", default="shapes", choices=(*NAMES, *others), help="data set")
    group.add_argument(
        "--data-dir", default="data", help="folder of the data sets; CIFAR is downloaded into it"
    )
    group.add_argument(
        "--image-size", type=run.positive(int), metavar="S",
        help="pixels of a side, of photographs and shapes; default: 224, camelyon17 96, "
        "tiny-imagenet 64, shapes 32",
    )  # fmt: skip
    group.add_argument(
        "--test-domain", metavar="NAME",
        help="test on this domain, train on the others; ct.py: all, one after the other",
    )  # fmt: skip
    group.add_argument(
        "--workers", type=run.nonnegative(int), help="processes that decode; default: cores"
    )
    group.add_argument("--strict", action="store_true", help="stop at a file that is no image")
    group.add_argument(
        "--val-size", type=run.nonnegative(int), default=0, metavar="N",
        help="hold out N training images, the same number of each class",
    )  # fmt: skip
    group.add_argument(
        "--limit", type=run.nonnegative(int), default=0, metavar="N",
        help="train on N images only, the same number of each class; 0: all",
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


class Choice(NamedTuple):
    """Which images of a data set are taken, and how they are read.

    val_size, limit: images of the stratified validation split and training subset (0: none, all).
    `seed` chooses them. The validation split does not depend on `limit`.
    image_size: pixels of a side, of a tree or of shapes; None is the size of the table.
    test_domain: leave this domain out. Test is all of it, train and val are 80 and 20 % of each of
    the others. Without it a domain set is trained on 80 % and tested on 20 % of every domain.
    camelyon17 then has its official splits, val hospital 1 and test hospital 2.
    workers, strict: see `Files`.
    shortcut_levels: see shortcut.py. None is 3 for shapes-shortcut and 0 for the others.
    """

    val_size: int = 0
    limit: int = 0
    seed: int = 0
    image_size: int | None = None
    test_domain: str | None = None
    workers: int | None = None
    strict: bool = False
    shortcut_levels: int | None = None


def load(name, data_dir="data", device="cpu", **choice):
    """Read a data set. Raises UserError where files are missing, truncated or of another shape.

    choice: the fields of `Choice`, by name.
    """
    choice = Choice(**choice)
    title = name
    levels = choice.shortcut_levels
    if levels is None:
        levels = shapes.SHORTCUT if name == "shapes-shortcut" else 0
    name = name.removesuffix("-shortcut")
    check_choice(name, choice, levels)
    train, val, test, classes = read(name, Path(data_dir), device, choice)
    stats = SETS[name].stats or channel_stats(train.x)
    if choice.val_size:
        if choice.val_size >= len(train.y):
            raise UserError(
                f"--val-size {choice.val_size}: there are only {len(train.y)} training images"
            )
        rest, held_out = stratified_split(train.y, choice.val_size, choice.seed, "--val-size")
        train, val = train.subset(rest), train.subset(held_out[shuffled(len(held_out))])
    if choice.limit:
        rows = stratified_split(train.y, choice.limit, choice.seed, "--limit")[1]
        train = train.subset(rows)
    tests = {}
    if levels:
        grating = shortcut.patterns(len(classes), train.x.shape[-1], levels)
        tests = {"without": test, "swapped": shortcut.add(test, grating, swap=True)}
        train, val, test = (p and shortcut.add(p, grating) for p in (train, val, test))
    parts = [p and p.to(device) for p in (train, val, test)]
    tests = {k: p.to(device) for k, p in tests.items()}
    return DataSet(title, *parts, classes, *stats, tests)


def check_choice(name, choice, levels):
    """Raise UserError for a data set that is not there, or a choice that it does not have."""
    if name not in SETS:
        raise UserError(f"--dataset {name}: unknown; there are {', '.join(NAMES)}")
    row = SETS[name]
    size, domain = choice.image_size, choice.test_domain
    wrong = {
        f"--shortcut: for small data sets held as tensors, not for {name}":
            levels > 0 and (row.files or name == "tiny-imagenet"),
        f"--image-size {size}: {name} has {row.size} pixels": bool(size) and not row.sized,
        f"--test-domain: {name} has no domains; {', '.join(DOMAINS)} have":
            bool(domain) and name not in DOMAINS,
        "--test-domain all: ct.py trains one network for each; here name one": domain == "all",
        "--val-size: with --test-domain it is 20 % of every training domain":
            bool(domain) and choice.val_size > 0,
    }  # fmt: skip
    run.refuse(wrong)


def read(name, data_dir, device, choice):
    """(train, val or None, test, classes) of a data set as its files have it, see `load`."""
    row = SETS[name]
    size = choice.image_size or row.size
    options = {"device": device, "workers": choice.workers, "strict": choice.strict}
    val = None
    if name in DOMAINS and (choice.test_domain or name != "shapes"):
        settings = choice.seed, choice.test_domain, size, options
        train, val, test, classes = read_domains(name, data_dir, *settings)
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
    whole = row.counts
    if "test" in whole and {"train": len(train), "test": len(test)} != whole:
        trees.note(
            f"{name}: {len(train)} and {len(test)} images; the whole set has {whole['train']} and "
            f"{whole['test']}"
        )
    return train, val, test, classes


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


def test_options(name, networks):
    """Options of `load` that give the test set of networks (label, model, facts).

    Of a domain set these are the images that they were not trained on. A network that was trained
    on the set with --shortcut is measured with that grating. Raises UserError where these differ,
    and for a data set without test images."""
    kind = name.removesuffix("-shortcut")
    if kind not in SETS:
        raise UserError(f"{name}: is no data set of images")
    found = []
    for _, _, facts in networks:
        options, own = facts.get("options", {}), {}
        if kind in DOMAINS:
            own["test_domain"] = options.get("test_domain")
        if kind in ("vlcs", "pacs", "domains") and not own["test_domain"]:
            own["seed"] = options.get("seed", 0)  # chose the 20 % of every domain
        if options.get("dataset") == name and options.get("shortcut") is not None:
            own["shortcut_levels"] = options["shortcut"]
        found.append(own)
    if any(own != found[0] for own in found):
        raise UserError(
            f"{name}: the networks have different test images ({found}): evaluate them apart"
        )
    return found[0]


def check_networks(name, networks, classes, size):
    """UserError where a network (label, model, facts) cannot take the images of a data set."""
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
    check_networks(name, networks, classes, size)
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
