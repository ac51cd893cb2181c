"""Trees of image files: listed once, decoded when read, training batches a function of the step.

    files = Files(scan("data/imagenet/train"), size=224)
    x = files[:8]                              # uint8 (8,3,224,224), as of a tensor
    stream = Stream(files, y, batch_size=256, seed=0)
    x, y = stream(step)                        # float in [0,1], int64; RandomResizedCrop and flip

No list of paths and no image is held for longer than a batch: a listing is three arrays, about 40
bytes a file. Decoding is Pillow's, in the processes of a DataLoader.

What is no picture has one outcome each. Greyscale, palette, CMYK, transparent and 16-bit files
become 8-bit RGB; an animation is its first frame. A file that cannot be decoded is named on stderr,
counted in `Files.bad` and skipped: an evaluation goes without it, a training batch takes the next
readable file in its place; `strict` stops with its name instead. Files of other kinds and hidden
ones are not listed. A link to a folder above itself is not followed.
"""

import contextlib
import copy
import errno
import functools
import hashlib
import io
import json
import math
import multiprocessing
import os
import random
import signal
import stat
import sys
import threading
import time
import traceback
import warnings
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from common import run
from common.run import UserError

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".ppm", ".tif", ".tiff")
CACHED = 20_000  # files from which on a listing is kept on disk
NAMED = 20  # unreadable files named on stderr before only their number is
TRIES = 100  # files tried in the place of one that cannot be read

# --- listing --------------------------------------------------------------------------------------


class Listing:
    """The image files under `root`, sorted by folder and name. len() is their number N.

    folders: their relative folders, sorted; folder int32 (N,): which one; names uint8 (bytes,),
    ends int64 (N,): the file names, one after the other. others: (number, an example) of files
    that are no images; loops: folders not entered because they lead back.
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
        return os.path.join(self.root, self.folders[self.folder[row]], os.fsdecode(self.name(row)))

    def part(self, depth):
        """(names, int64 (N,)): the `depth`-th components of the folders, sorted, and which one each
        file is in; -1 for files that lie higher."""
        parts = [f.split("/") if f else [] for f in self.folders]
        found = sorted({p[depth] for p in parts if len(p) > depth})
        index = {name: k for k, name in enumerate(found)}
        which = [index[p[depth]] if len(p) > depth else -1 for p in parts]
        return found, np.array(which, np.int64)[self.folder]


def scan(root, cache=True):
    """The Listing of a tree, by one pass over its folders.

    From CACHED files on it is kept in `.<name>.listing.npz` beside the tree (in torch's cache
    folder where that cannot be written) and used again while no folder in the tree has changed,
    which takes a stat per folder. Raises UserError where there is no folder or nothing in it.
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


# --- decoding -------------------------------------------------------------------------------------


class Unreadable(Exception):
    """A file that is no whole picture; its text is the reason."""


# By content, whatever the name says. No other decoder of Pillow sees a file: some start programs.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "PPM", "TIFF")
FULL = (errno.EMFILE, errno.ENFILE)  # no more open files: no fault of the picture


def decode(path):
    """uint8 (3,H,W), RGB, of an image file. Raises Unreadable, whatever is wrong with the file.

    Pillow decodes, as for torchvision's ImageFolder: its decoders refuse damaged files, where those
    of torchvision may end the process (vision #3613, #4485). Like there, transparency is dropped
    and an animation is its first frame. No format is turned by an orientation in the EXIF data.
    Grey of more than 8 bits keeps its greys, see `_eight_bits`. A picture of over twice
    PIL.Image.MAX_IMAGE_PIXELS pixels is unreadable.
    """
    from PIL import Image, UnidentifiedImageError

    try:
        if not stat.S_ISREG(os.stat(path).st_mode):  # to open a pipe would wait for its writer
            raise Unreadable("no file but a folder, a pipe or a device")
        with open(path, "rb") as file:
            content = io.BytesIO(file.read())
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of damaged tags that the picture does not need
            with Image.open(content, formats=FORMATS) as image:
                image = _as_stored(image)
                if image.mode.startswith("I") or image.mode == "F":
                    grey = torch.from_numpy(_eight_bits(np.array(image)))
                    return grey.repeat(3, 1, 1)
                return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)
    except UnidentifiedImageError:
        raise Unreadable(
            "no image of a known format, or truncated" if content.getvalue() else "empty"
        ) from None
    except Unreadable:
        raise
    except Exception as error:  # Pillow's: OSError, SyntaxError, struct.error, ValueError, ...
        if isinstance(error, OSError) and error.errno in FULL:
            raise UserError(f"{error.strerror}; raise the limit (ulimit -n)") from None
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise Unreadable(reason.splitlines()[0][:100]) from None


def _as_stored(image):
    """The picture of a Pillow image as its file stores it. Pillow turns TIFF files alone by their
    orientation, which would treat one format unlike the others; this turns them back."""
    from PIL import Image

    if image.format != "TIFF":
        return image
    orientation = image.getexif().get(0x0112)
    image.load()  # turns the picture
    turn = Image.Transpose
    back = {
        2: turn.FLIP_LEFT_RIGHT, 3: turn.ROTATE_180, 4: turn.FLIP_TOP_BOTTOM, 5: turn.TRANSPOSE,
        6: turn.ROTATE_90, 7: turn.TRANSVERSE, 8: turn.ROTATE_270,
    }  # fmt: skip
    return image.transpose(back[orientation]) if orientation in back else image


def _eight_bits(grey):
    """uint8 (H,W) of integers or floats (H,W): white is 65535 of integers and 1 of floats, or the
    largest value where that is above. What is negative or not a number is black."""
    white = 1 if grey.dtype.kind == "f" else 65535
    grey = np.nan_to_num(grey.astype(np.float64), nan=0, posinf=0, neginf=0)
    white = max(white, grey.max(initial=0))
    return (grey.clip(0) / white * 255).round().astype(np.uint8)


def crop_box(height, width, scale, rng):
    """(top, left, height, width) of torchvision's RandomResizedCrop, ratio 3/4 to 4/3; rng:
    random.Random. The whole picture, cut to that ratio, when ten draws do not fit."""
    for _ in range(10):
        area = height * width * rng.uniform(*scale)
        ratio = math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            return rng.randint(0, height - h), rng.randint(0, width - w), h, w
    w, h = min(width, round(height * 4 / 3)), min(height, round(width * 4 / 3))
    return (height - h) // 2, (width - w) // 2, h, w


def augmented(image, size, scale, flip, rng):
    """uint8 (3,H,W) to (3,size,size): random resized crop and, with `flip`, mirrored at 1/2."""
    import torchvision.transforms.v2.functional as tf

    box = crop_box(*image.shape[1:], scale, rng)
    image = tf.resized_crop(image, *box, [size, size], antialias=True)
    return image.flip(2) if rng.random() < 0.5 * flip else image


def fitted(image, size, fit):
    """uint8 (3,H,W) to (3,size,size) without chance.

    fit: "crop": short side to 8/7 of the size, centre; "squash": both sides to the size; "exact":
    the file must have that size. Raises UserError where it has not.
    """
    import torchvision.transforms.v2.functional as tf

    height, width = image.shape[1:]
    if fit == "exact":
        if (height, width) != (size, size):
            raise UserError(f"is {width}x{height} pixels, where {size}x{size} are expected")
        return image
    if fit == "squash":
        return tf.resize(image, [size, size], antialias=True)
    return tf.center_crop(tf.resize(image, [round(size * 8 / 7)], antialias=True), [size, size])


class Reader(Dataset):
    """Decodes batches in the loader's processes. reader[epoch, positions, augment], epoch None for
    an evaluation, is (uint8 (n,3,S,S), the positions it holds, [(row, reason)] unreadable), or the
    text of a UserError."""

    def __init__(self, files, seed=0, flip=True):
        self.listing, self.rows = files.listing, files.rows
        self.size, self.fit, self.scale = files.size, files.fit, files.scale
        self.seed, self.flip = seed, flip

    def prepare(self, image, epoch, position):
        """The picture as the network gets it; in training the draws depend on this key alone."""
        if epoch is None:
            return fitted(image, self.size, self.fit)
        rng = random.Random(run.seed_key(self.seed, "augment", epoch, position))
        return augmented(image, self.size, self.scale, self.flip, rng)

    def __getitem__(self, batch):
        epoch, positions, augment = batch
        x = torch.empty(len(positions), 3, self.size, self.size, dtype=torch.uint8)
        held, bad = [], []
        for position in positions:
            tries = 1 if epoch is None else min(TRIES, len(self.rows))
            for k in range(tries):
                taken = (position + k) % len(self.rows)
                row = int(self.rows[taken])
                path = self.listing.path(row)
                try:
                    image = decode(path)
                    x[len(held)] = self.prepare(image, epoch if augment else None, position)
                except Unreadable as error:
                    bad.append((row, str(error)))
                except UserError as error:
                    return f"{path}: {error}"
                else:
                    held.append(taken)
                    break
            else:
                if epoch is not None:
                    return f"{path}: this file and the {tries - 1} before it cannot be read"
        return x[: len(held)], torch.tensor(held, dtype=torch.int64), bad


ANSWERED = ("SIGINT", "SIGTERM", "SIGUSR1")  # by `run.cli`; Windows has no SIGUSR1
SIGNALS = {getattr(signal, name) for name in ANSWERED if hasattr(signal, name)}


def started(loader):
    """An iterator of the loader, whose workers start with the signals blocked. Raises UserError
    where the machine has no more files, processes or memory for them."""
    try:
        return _started(loader)
    except OSError as error:
        for frame, _ in traceback.walk_tb(error.__traceback__):
            half = frame.f_locals.get("self")
            if hasattr(half, "_shutdown"):  # the unfinished iterator, whose end would fail loudly
                half._shutdown = True
        reason = error.strerror or error
        raise UserError(
            f"loader: {reason}; fewer --workers, or a higher ulimit, may help"
        ) from None


def _started(loader):
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        return iter(loader)
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        return iter(loader)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def leave_signals(worker):
    """In a worker: Ctrl-C and what a scheduler sends to all processes are the trainer's to answer,
    which still needs batches to finish its step; a SIGTERM counts from the trainer alone."""
    parent = multiprocessing.parent_process().pid
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "SIGUSR1"):
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        return
    if not hasattr(signal, "sigwaitinfo"):  # macOS
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
        return
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS - {signal.SIGTERM})
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})

    def wait():
        while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
            pass
        os._exit(0)

    threading.Thread(target=wait, daemon=True).start()


# --- files in the place of tensors ----------------------------------------------------------------


class Files:
    """Image files where a tensor uint8 (N,3,S,S) would be: `len`, `shape`, `device`, `split`; as in
    NumPy x[slice] is a view (of files undecoded), x[index tensor] is new: the images.

    size, fit: of `fitted`; scale: of `augmented`; only: class numbers to which the logits of an
    evaluation are restricted; bad: {row of the listing: reason} of the files found unreadable.
    """

    dtype = torch.uint8

    def __init__(
        self, listing, rows=None, size=224, fit="crop", scale=(0.08, 1.0), device="cpu",
        workers=None, strict=False, only=None,
    ):  # fmt: skip
        self.listing, self.size, self.fit, self.scale = listing, size, fit, scale
        self.rows = np.arange(len(listing)) if rows is None else np.asarray(rows, np.int64)
        self.device, self.strict, self.bad = torch.device(device), strict, {}
        self.workers = default_workers() if workers is None else workers
        self.only = None if only is None else torch.as_tensor(only)
        self.skipped = np.zeros(0, np.int64)  # positions left out by the last `split`

    def __len__(self):
        return len(self.rows)

    @property
    def shape(self):
        return torch.Size((len(self), 3, self.size, self.size))

    @property
    def unreadable(self):
        """Positions of those among these files that were found so. `bad` is one for all parts."""
        return np.flatnonzero(np.isin(self.rows, np.fromiter(self.bad, np.int64)))

    def subset(self, rows):
        """These files, by index tensor or slice."""
        part = copy.copy(self)
        rows = rows.cpu().numpy() if isinstance(rows, torch.Tensor) else rows
        part.rows, part.skipped = self.rows[rows], np.zeros(0, np.int64)
        return part

    def to(self, device):
        part = copy.copy(self)
        part.device = torch.device(device)
        return part

    def __getitem__(self, rows):
        """Files of a slice, or the decoded images of an index tensor. Raises UserError for one that
        is unreadable, since the labels beside could not follow; `read` leaves it out."""
        if isinstance(rows, slice):
            return self.subset(rows)
        x, held = self.read(rows)
        if len(held) < len(self.subset(rows)):
            row, reason = next(reversed(self.bad.items()))
            raise UserError(f"{self.listing.path(row)}: {reason}; delete or replace it")
        return x

    def read(self, rows):
        """(images, held): those of `rows` that can be read, and their positions among `rows`."""
        part = self.subset(rows)
        x = list(part.split(64))
        held = np.delete(np.arange(len(part)), part.skipped)
        x = torch.cat(x) if x else torch.empty(0, *self.shape[1:], dtype=torch.uint8)
        return x.to(self.device), torch.from_numpy(held).to(self.device)

    def split(self, batch_size):
        """Yield uint8 (n,3,S,S) in order, decoded ahead; unreadable files are left out, so that n
        may be below batch_size, and `skipped` has their positions in the end."""
        steps = range(0, len(self), batch_size)
        batches = [(None, range(k, min(k + batch_size, len(self))), False) for k in steps]
        skipped = []
        for (_, positions, _), (x, held) in zip(batches, self.load(batches), strict=True):
            skipped += sorted(set(positions) - set(held.tolist()))
            if len(x):
                yield x
        self.skipped = np.array(skipped, np.int64)

    def scored(self, logits, y):
        """(logits, labels) as a score takes them: without the labels of skipped files and, for a
        subset of the classes, among those classes alone."""
        keep = torch.ones(len(self), dtype=torch.bool)
        keep[torch.from_numpy(self.skipped)] = False
        y = y[keep.to(y.device)]
        if self.only is not None and logits.shape[1] > len(self.only):
            only = self.only.to(y.device)
            logits, y = logits[:, only], torch.searchsorted(only, y)
        return logits, y

    def load(self, batches, seed=0, flip=True):
        """Yield (x, positions held) on the device for an iterable of (epoch, positions, augment).
        The loader draws from a generator of its own: the global one belongs to the training."""
        import PIL.Image  # noqa: F401
        import torchvision.transforms.v2.functional  # noqa: F401 - once, before the workers fork

        pinned, workers = self.device.type == "cuda", self.workers
        if hasattr(batches, "__len__"):
            workers = min(workers, len(batches) if len(self) > 32 else 0)
        reader = Reader(self, seed, flip)
        loader = DataLoader(
            reader, sampler=batches, batch_size=None, num_workers=workers,
            pin_memory=pinned, prefetch_factor=4 if workers else None, generator=torch.Generator(),
            worker_init_fn=leave_signals,
        )  # fmt: skip
        side = torch.cuda.Stream(self.device) if pinned else None
        iterator = started(loader)
        while True:
            try:
                batch = next(iterator)
            except StopIteration:
                return
            except (
                RuntimeError,
                OSError,
            ) as error:  # a killed process, a full /dev/shm, no file left
                reason = (str(error) or type(error).__name__).splitlines()[0]
                raise UserError(f"loader: {reason}; fewer --workers may help") from None
            if isinstance(batch, str):
                raise UserError(batch)
            x, held, bad = batch
            self.report(bad)
            if pinned:
                with torch.cuda.stream(side):  # beside the step that still runs
                    x, held = (t.to(self.device, non_blocking=True) for t in (x, held))
                torch.cuda.current_stream(self.device).wait_stream(side)
                for t in (x, held):
                    t.record_stream(torch.cuda.current_stream(self.device))
            yield x.to(self.device), held.to(self.device)

    def report(self, bad):
        """Count and name unreadable files, each once; with `strict`, stop."""
        for row, reason in bad:
            if row in self.bad:
                continue
            self.bad[row] = reason
            path, count = self.listing.path(row), len(self.bad)
            if self.strict:
                raise UserError(f"{path}: {reason}; without --strict it would be skipped")
            if count <= NAMED or count % 1000 == 0:
                more = "; more are only counted" if count == NAMED else ""
                print(f"skipped {path}: {reason} ({count} unreadable so far{more})",
                      file=sys.stderr)  # fmt: skip


class Images(NamedTuple):
    """x uint8 (N,3,S,S), a tensor or Files; y int64 (N,)."""

    x: torch.Tensor
    y: torch.Tensor

    def __len__(self):
        return len(self.y)

    def take(self, rows):
        """Tensors of an index or slice; files are decoded, without the unreadable ones."""
        if isinstance(self.x, Files):
            x, held = self.x.read(rows)
            return Images(x, self.y[rows][held])
        return Images(self.x[rows], self.y[rows])

    def subset(self, rows):
        """The same with files that stay undecoded."""
        x = self.x.subset(rows) if isinstance(self.x, Files) else self.x[rows]
        return Images(x, self.y[rows])

    def to(self, device):
        return Images(self.x.to(device), self.y.to(device))


@functools.cache
def default_workers():
    """Processes that decode: the cores this process may use, 16 at most."""
    return min(16, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 4)


# --- training batches -----------------------------------------------------------------------------


class Schedule:
    """The batches from one step on, without end: (epoch, positions, augment). part: slice of each
    batch that is read."""

    def __init__(self, count, batch_size, seed, augment, first, part):
        self.count, self.size, self.seed = count, batch_size, seed
        self.augment, self.first, self.part = augment, first, part

    def __iter__(self):
        step, drawn = self.first, None
        while True:
            epoch, i = divmod(step, self.count // self.size)
            if epoch != drawn:
                rng = run.generator(self.seed, "epoch", epoch)
                order, drawn = torch.randperm(self.count, generator=rng), epoch
            rows = order[i * self.size : (i + 1) * self.size]
            yield epoch, rows[self.part].tolist(), self.augment
            step += 1


class Stream:
    """Shuffled, augmented training batches of files; `stream(step)` depends on (seed, step) alone.

    Steps in order are read ahead. Any other step starts the reading anew there, which decodes
    nothing before it; the last two batches are kept, for who asks twice. share: under torchrun
    read the rows of this process alone.
    """

    def __init__(self, files, y, batch_size, seed, augment=True, flip=True, share=False):
        self.files, self.y, self.batch_size, self.seed = files, y, batch_size, seed
        self.augment, self.flip = augment, flip
        self.part = run.rows(batch_size) if share else slice(0, batch_size)
        self.following, self.batches, self.recent = None, None, {}

    def __call__(self, step):
        """(x, y): float in [0,1] (B,3,S,S) channels_last, int64 (B,), on the device; with `share`
        this process's rows of the B."""
        if step not in self.recent:
            if step != self.following:
                settings = self.batch_size, self.seed, self.augment, step, self.part
                schedule = Schedule(len(self.files), *settings)
                self.batches = self.files.load(schedule, self.seed, self.flip)
            x, held = next(self.batches)
            self.recent = dict([*self.recent.items(), (step, (x, self.y[held]))][-2:])
            self.following = step + 1
        x, y = self.recent[step]
        return run.to_float(x), y
