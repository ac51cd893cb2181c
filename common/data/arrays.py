"""Data sets in arrays: CIFAR, SVHN and their .npz form, and the released corrupted test sets.

Every array is checked against its contract once, when it is read.
"""

import json
import shutil
import tempfile
import urllib.error
from pathlib import Path

import numpy as np
import torch

from common.data import trees
from common.data.images import Images
from common.data.splits import shuffled
from common.data.table import SETS
from common.run import UserError


def cifar_class(name):
    """torchvision's class of CIFAR-10 or CIFAR-100."""
    from torchvision import datasets

    return {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}[name]


def cifar_place(name, data_dir):
    """Where CIFAR-10 or CIFAR-100 lies: torchvision's folder, else <name>.npz, else None."""
    folder, npz = Path(data_dir) / cifar_class(name).base_folder, Path(data_dir) / f"{name}.npz"
    if folder.is_dir():
        return folder
    return npz if npz.is_file() else None


def read_cifar(name, data_dir):
    """(train, test, classes) from torchvision's files, else <name>.npz, else by download."""
    cls = cifar_class(name)
    place = cifar_place(name, data_dir)
    if place is None:
        download(cls, name, data_dir)
    elif place.is_file():
        return read_npz(place)
    try:
        parts = [cls(str(data_dir), train=train) for train in (True, False)]
    except RuntimeError:  # torchvision's word for a missing file or another MD5
        raise UserError(
            f"{data_dir / cls.base_folder}: a file is missing, truncated or altered (MD5); delete "
            "the folder and run again to download it, or put an intact copy there"
        ) from None
    images = [Images(torch.from_numpy(p.data).permute(0, 3, 1, 2).contiguous(),
                     torch.tensor(p.targets)) for p in parts]  # fmt: skip
    return *images, parts[0].classes


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
    seen = [set(p.y.unique().tolist()) for p in parts]
    if "classes" not in arrays and len(seen[0] | seen[1]) < count:  # as of the sentinel 255
        raise UserError(
            f"{path}: labels up to {count - 1} but only {len(seen[0] | seen[1])} classes have "
            "images; number the classes without gaps, or add an array `classes` of all names"
        )
    for k, split in enumerate(("train", "test")):
        if alone := sorted(seen[k] - seen[1 - k]):
            some = ", ".join(map(str, alone[:5])) + (", ..." if len(alone) > 5 else "")
            trees.note(f"{path}: only {split} has images of {len(alone)} classes: {some}")
    classes = arrays.get("classes", np.arange(count))
    if classes.ndim != 1:
        raise UserError(f"{path}: classes must be names (K,), is {classes.dtype} {classes.shape}")
    classes = [str(name) for name in classes]
    if len(classes) < count:
        raise UserError(f"{path}: {len(classes)} class names for labels up to {count - 1}")
    return *parts, classes


def read_cifar101(data_dir):
    """Test set of Recht et al. 2018, classes as in CIFAR-10: version 6 (2,000), else 4 (2,021)."""
    for version, count in reversed(SETS["cifar10.1"].counts.items()):
        path = data_dir / f"cifar10.1_{version}_data.npy"
        if path.is_file():
            x = read_array(path, "uint8", (count, 32, 32, 3))
            y = read_array(path.with_name(f"cifar10.1_{version}_labels.npy"), "i u", (count,))
            x = torch.from_numpy(np.array(x)).permute(0, 3, 1, 2).contiguous()
            return Images(x, as_labels(y, path.with_name(f"cifar10.1_{version}_labels.npy"), 10))
    raise trees.missing("cifar10.1", data_dir / "cifar10.1_v6_data.npy")


def corrupted_dir(name, data_dir="data"):
    """The folder of the released CIFAR-10-C or CIFAR-100-C arrays, or None where there is none."""
    folder = Path(data_dir) / {"cifar10": "CIFAR-10-C", "cifar100": "CIFAR-100-C"}.get(name, "-")
    return folder if (folder / "labels.npy").is_file() else None


def read_manifest(folder):
    """manifest.json of a corrupted set that eval/export.py wrote, or None where there is none."""
    path = Path(folder) / "manifest.json"
    if not path.is_file():
        return None
    try:
        manifest = json.loads(path.read_text())
    except ValueError:
        raise UserError(f"{path}: not JSON; delete the folder and export again") from None
    if not isinstance(manifest, dict) or not {"seed", "frost", "sha256"} <= manifest.keys():
        raise UserError(f"{path}: has no seed, frost or sha256; delete the folder and export again")
    return manifest


def corrupted_labels(folder, classes=100):
    """Labels int64 (N,) of the N test images; labels.npy repeats them for the five severities."""
    path = Path(folder) / "labels.npy"
    y = read_array(path, "i u", (None,))
    blocks = y.reshape(5, -1) if len(y) % 5 == 0 and len(y) else None
    if blocks is None or not (blocks == blocks[0]).all():
        raise UserError(f"{path}: not five equal blocks of labels")
    return as_labels(blocks[0], path, classes)


def as_labels(y, path, classes):
    """Labels int64 (N,) of an integer array. Raises UserError where one is none of `classes`."""
    y = torch.from_numpy(np.array(y).astype(np.int64))
    if int(y.min()) < 0 or int(y.max()) >= classes:
        raise UserError(
            f"{path}: the labels are {int(y.min())} to {int(y.max())}, where {classes} classes are "
            "numbered from 0; take an intact copy"
        )
    return y


def read_corrupted(folder, corruption, severity, rows, size=None):
    """Images uint8 (len(rows),3,S,S) of one file of the official layout.

    The file is uint8 (5N,S,S,3): N rows for each severity, in the order of the test set. size: S,
    where it is known."""
    count = len(corrupted_labels(folder))
    path = Path(folder) / f"{corruption}.npy"
    array = read_array(path, "uint8", (5 * count, None, None, 3))
    if size and array.shape[1:3] != (size, size):
        raise UserError(
            f"{path}: is {array.dtype} {array.shape}, the test images have {size} pixels"
        )
    block = array[(severity - 1) * count : severity * count]
    return torch.from_numpy(block[rows.numpy()]).permute(0, 3, 1, 2).contiguous()


def read_array(path, dtype, shape):
    """A memory-mapped .npy file of this shape; None in `shape` is any size. dtype: a dtype's name,
    or the letters of the kinds that are allowed."""
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except FileNotFoundError:
        raise UserError(f"{path}: missing; complete the folder, or use --generate") from None
    except Exception as error:  # EOFError, ValueError: what mmap and header parsing raise
        raise UserError(f"{path}: truncated or not a .npy array ({error})") from None
    fits = len(array.shape) == len(shape) and all(
        want in (None, have) for have, want in zip(array.shape, shape, strict=True)
    )
    if not fits or (array.dtype.name != dtype and array.dtype.kind not in dtype.split()):
        raise UserError(f"{path}: is {array.dtype} {array.shape}, expected {dtype} {shape}")
    return array
