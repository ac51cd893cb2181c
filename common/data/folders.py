"""Trees of image files, listed once.

    listing = scan("data/imagenet/train")
    listing.path(0)                            # of the first file
    names, which = listing.part(0)             # the class folders, and which one each file is in

A listing is three arrays, about 40 bytes a file, and no list of paths. Files of other kinds and
hidden ones are not listed. A link to a folder above itself is not followed.
"""

import contextlib
import hashlib
import json
import os
import time
from pathlib import Path

import numpy as np
import torch

from common.run import UserError

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".ppm", ".tif", ".tiff")
CACHED = 20_000  # files from which on a listing is kept on disk


class Listing:
    """The image files under `root`, sorted by folder and name. len() is their number N.

    folders: the relative folders, sorted. folder int32 (N,): which of them holds a file.
    names uint8 (bytes,): the file names, one after the other. ends int64 (N,): where each ends.
    others: (number, an example) of files that are no images.
    loops: folders not entered because they lead back.
    """

    def __init__(self, root, folders, folder, names, ends, others=(0, ""), loops=()):
        self.root, self.folders, self.folder = str(root), list(folders), folder
        self.names, self.ends, self.others, self.loops = names, ends, tuple(others), list(loops)

    def __len__(self):
        return len(self.ends)

    def name(self, row):
        """File name of one row, as bytes."""
        return self.names[self.ends[row - 1] if row else 0 : self.ends[row]].tobytes()

    def path(self, row):
        """Path of one row."""
        return os.path.join(self.root, self.folders[self.folder[row]], os.fsdecode(self.name(row)))

    def part(self, depth):
        """(names, int64 (N,)): the `depth`-th components of the folders, sorted, and the number of
        each file's own. It is -1 for files that lie higher."""
        parts = [f.split("/") if f else [] for f in self.folders]
        found = sorted({p[depth] for p in parts if len(p) > depth})
        index = {name: k for k, name in enumerate(found)}
        which = [index[p[depth]] if len(p) > depth else -1 for p in parts]
        return found, np.array(which, np.int64)[self.folder]


def scan(root, cache=True):
    """The Listing of a tree, by one pass over its folders.

    From CACHED files on it is kept in `.<name>.listing.npz` beside the tree, or in torch's cache
    folder where that cannot be written. It is used again while no folder in the tree has changed.
    To know that takes a stat per folder. Raises UserError where there is no folder or nothing in
    it.
    """
    root = os.path.abspath(root)
    if not os.path.isdir(root):
        raise UserError(f"{root}: no such folder")
    places = [Path(root).parent / f".{Path(root).name}.listing.npz"]
    digest = hashlib.sha256(os.fsencode(os.path.realpath(root))).hexdigest()[:16]
    places.append(Path(torch.hub.get_dir()).parent / "listings" / f"{digest}.npz")
    for place in places if cache else ():
        listing = _load(place, root)
        if listing is not None:
            return listing
    began = time.time_ns()
    listing, folders, stamps = _walk(root)
    # A folder changed in the last seconds could change again within the tick of its clock.
    if cache and len(listing) >= CACHED and max(stamps) < began - 2 * 10**9:
        for place in places:
            if _save(place, listing, folders, stamps):
                break
    return listing


def _walk(root):
    """(Listing, folders, stamps): the relative folders entered and when each last changed, ns."""
    found, entered, stamps, others, loops = {}, [], [], [0, ""], []
    stack = [("", ())]
    while stack:
        folder, above = stack.pop()
        path = os.path.join(root, folder)
        try:
            status = os.stat(path)
            if (status.st_dev, status.st_ino) in above:
                loops.append(folder)
                continue
            names = []
            with os.scandir(path) as entries:
                for entry in entries:
                    if entry.name.startswith("."):
                        continue
                    if entry.name.lower().endswith(SUFFIXES):
                        names.append(os.fsencode(entry.name))
                    elif _is_folder(entry):
                        inside = f"{folder}/{entry.name}" if folder else entry.name
                        stack.append((inside, (*above, (status.st_dev, status.st_ino))))
                    else:
                        others = [others[0] + 1, others[1] or os.path.join(folder, entry.name)]
        except OSError as error:
            raise UserError(f"{path}: cannot be listed ({error.strerror})") from None
        entered.append(folder)
        stamps.append(status.st_mtime_ns)
        if names:
            names.sort()
            found[folder] = b"".join(names), np.array([len(n) for n in names], np.int64)
    folders = sorted(found)
    sizes = [found[f][1] for f in folders] or [np.zeros(0, np.int64)]
    listing = Listing(
        root, folders, np.repeat(np.arange(len(folders), dtype=np.int32), [len(s) for s in sizes])
        if folders else np.zeros(0, np.int32),
        np.frombuffer(b"".join(found[f][0] for f in folders), np.uint8),
        np.concatenate(sizes).cumsum(), others, loops,
    )  # fmt: skip
    return listing, entered, stamps


def _is_folder(entry):
    with contextlib.suppress(OSError):  # a link to itself
        return entry.is_dir()
    return False


def _save(place, listing, folders, stamps):
    """Write a cached listing; False where it cannot be written."""
    facts = {"root": listing.root, "others": listing.others, "loops": listing.loops}
    facts |= {"entered": folders, "folders": listing.folders}
    part = place.with_name(f"{place.name}.{os.getpid()}")
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        with open(part, "wb") as file:
            np.savez(
                file, facts=np.array(json.dumps(facts)), stamps=np.array(stamps, np.int64),
                folder=listing.folder, names=listing.names, ends=listing.ends,
            )  # fmt: skip
        os.replace(part, place)
    except OSError:
        return False
    finally:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)
    return True


def _load(place, root):
    """A cached listing, or None where there is none, it is broken, or a folder has changed."""
    try:
        with np.load(place, allow_pickle=False) as file:
            facts, arrays = json.loads(str(file["facts"])), {k: file[k] for k in file.files}
        if facts["root"] != root:
            return None
        for folder, stamp in zip(facts["entered"], arrays["stamps"].tolist(), strict=True):
            if os.stat(os.path.join(root, folder)).st_mtime_ns != stamp:
                return None
        keys = ("folder", "names", "ends")
        rest = facts["others"], facts["loops"]
        return Listing(root, facts["folders"], *(arrays[k] for k in keys), *rest)
    except Exception:  # missing, truncated, of another version: it is only a cache
        return None
