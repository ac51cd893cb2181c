"""The named trees of photographs: where they lie, what is in them, and what is missing.

Each reader returns undecoded `Files` and the class names. It prints what an incomplete set lacks
as a note on stderr. It raises UserError with the source of the data where a set cannot be used.
Nothing is downloaded.
"""

import csv
import sys

import numpy as np
import torch

from common import run
from common.data import folders
from common.data.files import Files
from common.data.table import IN9_TESTS, SETS
from common.run import UserError

IN9 = ("00_dog", "01_bird", "02_wheeled vehicle", "03_reptile", "04_carnivore", "05_insect",
       "06_musical instrument", "07_primate", "08_fish")  # fmt: skip
# Of ImageNet's 1000 classes, those that IN-9 joins into each of its nine; the others are none.
IN9_PARTS = (
    "151-170 173-268",
    "7-24 87-100 127-146",
    "407-408 428 436 444 468 511 547 555 561 565 569 573 586 603 609 612 627 656 661 665 670-671 "
    "675 690 705 717 734 751 757 791 802-803 817 820 829 847 864 866-867 870 880",
    "33-68",
    "269-280 286-299 356-362 387-388",
    "300-326",
    "401-402 420 432 486 494 513 541 546 558 566 577 579 593-594 641-642 683-684 687 699 776 822 "
    "875 881 889",
    "365-384",
    "0-6 389-397",
)

# --- looking --------------------------------------------------------------------------------------


def missing(name, what):
    """The UserError of a set that is not there: what was looked for, and where it comes from."""
    source = SETS[name].source
    more = f"; it comes from {source}, unpacked there" if source else ""
    return UserError(f"{name}: no {what}{more}")


def note(text):
    """What is missing in a set that can be used all the same: one line on stderr."""
    if run.rank() == 0:
        print(f"note: {text}", file=sys.stderr)


def find(name, data_dir, names, marks):
    """The first of data_dir/<names> and data_dir itself that has one of the entries `marks`."""
    for place in [data_dir / n for n in names] + [data_dir]:
        if any((place / mark).exists() for mark in marks):
            return place
    raise missing(name, f"{data_dir / names[0]} (with {marks[0]}) and no {data_dir / marks[0]}")


def listed(root, count=None, title=None):
    """scan() with what is to be said about it: other files, loops, an incomplete set."""
    if run.rank():  # the first process scans, the others find its cache
        run.wait()
    try:
        listing, title = folders.scan(root), title or str(root)
    finally:
        if not run.rank():
            run.wait()
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


def in_order(files, seed=0):
    """Files in a fixed random order: the first N of a test set are then a sample of it."""
    return files.subset(torch.randperm(len(files), generator=run.generator(seed, "test order")))


def train_and_test(name, root, test_root, size, options, fit="crop"):
    """(train, test, classes) of two class trees; the training folders are the classes."""
    counts = SETS[name].counts
    whole = None if root.parent.name == "in9l" else counts.get("train")  # IN-9L has more
    train = listed(root, whole, f"{name} {root.name}")
    names = class_folders(root)
    empty = sorted(set(names) - set(train.part(0)[0]))
    if empty:
        raise UserError(f"{root / empty[0]}: a class without images; fill it or remove the folder")
    images = Files(train, labels_of(train, names), size=size, **options)
    return images, read_test(name, test_root, names, size, options, counts.get("val"), fit), names


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
    files = Files(listing, labels, size=size, fit=fit, **options)
    return in_order(files if only is None else files.among(only))


def read_tree(name, data_dir, size, options):
    """(train, test, classes) of folder, imagenet and its test sets, and the IN-9 sets."""
    if name == "folder":
        held = next((d for d in ("val", "test") if (data_dir / d).is_dir()), None)
        if not (data_dir / "train").is_dir() or held is None:
            raise UserError(
                f"folder: no {data_dir}/train/<class>/* with {data_dir}/val/<class>/* (or test)"
            )
        return train_and_test(name, data_dir / "train", data_dir / held, size, options)
    if name in IN9_TESTS:
        root = find(name, data_dir, SETS[name].folders, ["original"])
        train = next((d for d in ("in9l", "original") if (root / d / "train").is_dir()), None)
        if train is None:
            raise missing(name, f"{root}/original/train (IN-9) or {root}/in9l/train (IN-9L)")
        test = root / SETS[name].test / "val"
        if not test.is_dir():
            raise missing(name, test)
        fit = "exact" if size == 224 else "squash"  # the released images have 224 pixels
        parts = train_and_test(name, root / train / "train", test, size, options, fit)
        if parts[2] != list(IN9):
            raise UserError(f"{root / train / 'train'}: not the nine classes {', '.join(IN9)}")
        return parts
    root = find("imagenet", data_dir, SETS["imagenet"].folders, ["train"])
    train = listed(root / "train", SETS["imagenet"].counts["train"], "imagenet train")
    classes = train.part(0)[0]
    if len(classes) != 1000 or not all(is_wnid(c) for c in classes):
        raise UserError(
            f"{root / 'train'}: {len(classes)} class folders, ImageNet has 1000 named n01440764 "
            "...; a part of it, or another tree, is --dataset folder"
        )
    images = Files(train, labels_of(train, classes), size=size, **options)
    return images, read_imagenet_test(name, data_dir, classes, size, options), classes


def read_in9_test(name, data_dir, size, options):
    """The test images of an IN-9 set alone, which is all that the release of the challenge has."""
    test = find(name, data_dir, SETS[name].folders, ["original"]) / SETS[name].test / "val"
    if not test.is_dir():
        raise missing(name, test)
    fit = "exact" if size == 224 else "squash"
    return read_test(name, test, list(IN9), size, options, SETS[name].counts["val"], fit)


def in9_of_imagenet():
    """int64 (1000,): the class of IN-9 that each of ImageNet's is a part of, 9 for the others."""
    found = torch.full((1000,), 9)
    for k, text in enumerate(IN9_PARTS):
        for part in text.split():
            first, _, last = part.partition("-")
            found[int(first) : int(last or first) + 1] = k
    return found


def is_wnid(name):
    """Whether a name is a WordNet id, as n01440764."""
    return len(name) == 9 and name[0] == "n" and name[1:].isdigit()


def imagenet_classes(data_dir):
    """The 1000 WordNet ids in the order of the logits, which is sorted.

    They are the folders in imagenet/train or imagenet/val. Else they are the first words of the
    lines of LOC_synset_mapping.txt or classes.txt."""
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


def read_imagenet_test(name, data_dir, classes, size, options):
    """Test images of imagenet or one of its test sets, labelled by their place in `classes`."""
    if name == "imagenet":
        root = find(name, data_dir, SETS[name].folders, ["val"]) / "val"
        if not class_folders(root):
            return read_flat_imagenet(root, data_dir, classes, size, options)
        return read_test(name, root, classes, size, options, SETS[name].counts["val"])
    root = next((data_dir / n for n in SETS[name].folders if (data_dir / n).is_dir()), None)
    if root is None:
        raise missing(name, data_dir / SETS[name].folders[0])
    if name == "imagenet-c":  # [<group>/]<corruption>/<severity>/<wnid>: all 75 sets in one
        if size != 224:
            raise UserError(f"imagenet-c: its files have 224 pixels, not {size}")
        listing = listed(root, title=name)
        depth = next((d for d in (2, 3) if any(is_wnid(n) for n in listing.part(d)[0])), 2)
        labels = labels_of(listing, classes, depth)
        return in_order(Files(listing, labels, size=size, fit="exact", **options))
    return read_test(name, root, classes, size, options, SETS[name].counts[""])


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
    listing = listed(root, SETS["imagenet"].counts["val"], "imagenet val")
    keys = [listing.name(row).split(b".")[0] for row in range(len(listing))]
    unknown = [key for key in keys if key not in truth]
    if unknown:
        raise UserError(f"{path}: no label for {len(unknown)} files, as {unknown[0].decode()}")
    labels = np.array([truth[key] for key in keys], np.int64)
    return in_order(Files(listing, labels, size=size, **options))


def read_tiny_imagenet(data_dir, size, options):
    """(train, test, classes), decoded into memory: train/<wnid>/images/*, val/images/* with
    val_annotations.txt ("name wnid x y w h"); the official test images have no labels."""
    root = find("tiny-imagenet", data_dir, SETS["tiny-imagenet"].folders, ["wnids.txt"])
    classes = sorted((root / "wnids.txt").read_text().split())
    truth, counts = {}, SETS["tiny-imagenet"].counts
    annotations = root / "val" / "val_annotations.txt"
    if not annotations.is_file():
        raise missing("tiny-imagenet", annotations)
    for line in annotations.read_text().splitlines():
        file, wnid, *_ = line.split() or ("", "")
        if file and wnid not in classes:
            raise UserError(f"{annotations}: {wnid} of {file} is not in wnids.txt")
        if file:
            truth[file.encode()] = classes.index(wnid)
    train = listed(root / "train", counts["train"], "tiny-imagenet train")
    test = listed(root / "val" / "images", counts["val"], "tiny-imagenet val")
    names = [test.name(row) for row in range(len(test))]
    unknown = [n for n in names if n not in truth]
    if unknown:
        raise UserError(f"{annotations}: no line for {unknown[0].decode()}")
    empty = sorted(set(classes) - set(train.part(0)[0]))
    if empty:
        raise UserError(f"{root / 'train' / empty[0]}: a class without images")
    fit = "exact" if size == 64 else "squash"
    parts = []
    for listing, labels in (
        (train, labels_of(train, classes)),
        (test, np.array([truth[n] for n in names], np.int64)),
    ):
        files = Files(listing, labels, size=size, fit=fit, **options | {"device": "cpu"})
        parts.append(files.take(slice(None)))
    order = torch.randperm(len(parts[1].y), generator=run.generator(0, "test order"))
    return parts[0], parts[1].take(order), classes


# --- domains --------------------------------------------------------------------------------------


def domain_root(name, data_dir):
    """The folder whose folders are the domains of vlcs, pacs or domains."""
    if name == "domains":
        return data_dir
    return find(name, data_dir, SETS[name].folders, SETS[name].domains)


def domain_names(name, data_dir):
    """The domains that are there."""
    if name == "camelyon17":
        return list(SETS[name].domains)
    root = domain_root(name, data_dir)
    there = class_folders(root) if root.is_dir() else []
    names = [d for d in SETS[name].domains or there if d in there]
    if len(names) < 2:
        raise UserError(f"{name}: no {root}/<domain>/<class>/* with two domains or more")
    return names


def read_domain_tree(name, data_dir, size, options):
    """(Files of all domains, domain int64 (N,), names, classes) of <domain>/<class>/*. A domain
    may lack classes; one that is missing altogether is left out."""
    root = domain_root(name, data_dir)
    wanted = SETS[name].domains or domain_names(name, data_dir)
    listing = listed(root, title=name)
    found, domain = listing.part(0)
    names = [d for d in wanted if d in found]
    extra = [d for d in found if d not in wanted]
    if extra:
        raise UserError(f"{root}: {extra[0]} is no domain of {name} ({', '.join(wanted)})")
    if len(names) < 2:
        raise UserError(f"{root}: {name} needs two domains or more, has {', '.join(names)}")
    classes = list(SETS[name].classes or listing.part(1)[0])
    labels = labels_of(listing, classes, depth=1)
    domain = np.array([names.index(d) for d in found], np.int64)[domain]
    for d in wanted:
        count = int((domain == names.index(d)).sum()) if d in names else 0
        whole = SETS[name].counts.get(d)
        if d not in names:
            note(f"{name}: {d} is missing in {root}; it is left out")
            continue
        have = set(np.unique(labels[domain == names.index(d)]).tolist())
        absent = [c for k, c in enumerate(classes) if k not in have]
        if absent:
            note(f"{name}: {d} has no images of {', '.join(absent)}")
        if whole and count != whole:
            note(f"{name}: {d} has {count} images; the whole set has {whole}")
    files = Files(listing, labels, size=size, fit="squash", **options).cropped((0.7, 1.0))
    return files, torch.from_numpy(domain), names, classes


def number_below(row, column, limit):
    """The number in a column of a row of metadata.csv. Raises UserError unless it is from 0 on and
    below the limit."""
    text = row[column] or ""
    if not (text.isascii() and text.isdigit() and int(text) < limit):
        raise UserError(
            f"metadata.csv: {column} is {text[:20]!r}, expected 0 to {limit - 1}; take an intact "
            "copy"
        )
    return int(text)


def read_camelyon17(data_dir, size, options):
    """(Files, domain, names, classes, split) of the WILDS layout: metadata.csv and patches/.

    The domain is the hospital, in the column center. split is 0 train, 1 id_val, 2 test, 3 val as
    in WILDS. There hospital 1 is val and 2 is test whatever the column says."""
    root = find("camelyon17", data_dir, SETS["camelyon17"].folders, ["metadata.csv"])
    listing = listed(root / "patches", title="camelyon17 patches")
    place = {listing.name(row): row for row in range(len(listing))}
    rows, table, absent, seen = [], [], [], set()
    with open(root / "metadata.csv", newline="", encoding="utf-8", errors="replace") as file:
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
            if row in seen:
                raise UserError(f"{root}/metadata.csv: {key} is there twice; take an intact copy")
            seen.add(row)
            rows.append(row)
            limits = {"tumor": 2, "center": 5, "split": 4}
            table.append([number_below(r, column, limit) for column, limit in limits.items()])
    if not rows:
        raise UserError(f"{root}/patches: none of the patches of metadata.csv, as {absent[0]}")
    if absent:
        note(f"camelyon17: {len(absent)} patches are missing, as {absent[0]}")
    elif len(rows) != SETS["camelyon17"].counts[""]:
        note(f"camelyon17: {len(rows)} patches; the whole set has {SETS['camelyon17'].counts['']}")
    y, center, split = torch.tensor(table).T.contiguous()
    split[center == 1], split[center == 2] = 3, 2
    names, classes = list(SETS["camelyon17"].domains), list(SETS["camelyon17"].classes)
    files = Files(listing, y, rows, size=size, fit="squash", **options).cropped((0.7, 1.0))
    return files, center, names, classes, split
