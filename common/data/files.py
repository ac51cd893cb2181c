"""Images in files with their labels, decoded when read. `images.Images` has the same names.

    files = Files(scan("data/imagenet/train"), y, size=224)
    for x, y in files.batches(250):            # uint8 (n,3,224,224), int64 (n,), in order
    few = files.take(slice(0, 8))              # decoded: Images

Decoding is Pillow's, in the processes of a DataLoader. No image is held for longer than a batch.

A file that cannot be decoded is named on stderr, counted in `Files.bad` and left out. A training
batch takes the next readable file in its place. `strict` stops with its name instead.
"""

import copy
import functools
import multiprocessing
import os
import random
import signal
import sys
import threading
import traceback

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from common import run
from common.data.decode import Unreadable, augmented, decode, fitted
from common.data.images import Images
from common.run import UserError

NAMED = 20  # unreadable files named on stderr before only their number is
TRIES = 100  # files tried in the place of one that cannot be read


class Reader(Dataset):
    """Decodes batches in the loader's processes.

    reader[epoch, positions, augment] is (x uint8 (n,3,S,S), positions held (n,), [(row, reason)] of
    the unreadable files). In an evaluation epoch is None. An error is returned as its text.
    """

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
    """An iterator of the loader, whose workers start with the signals blocked.

    Raises UserError where the machine has no more files, processes or memory for them."""
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
    """Make a worker ignore the signals that a scheduler or Ctrl-C sends to all processes.

    The trainer answers them, and still needs batches to finish its step. A SIGTERM ends the worker
    only when the trainer sent it."""
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


class Files:
    """Image files of a listing and their labels y int64 (N,).

    rows: their rows in the listing; None for all. size, fit: see `decode.fitted`. device: of what
    is read. workers: processes that decode. strict: stop at a file that cannot be read.
    bad: {row of the listing: reason} of the unreadable files, one dict for all subsets.
    """

    in_memory = False

    def __init__(
        self, listing, y, rows=None, size=224, fit="crop", device="cpu", workers=None, strict=False
    ):
        self.listing, self.size, self.fit = listing, size, fit
        self.rows = np.arange(len(listing)) if rows is None else np.asarray(rows, np.int64)
        self.device, self.strict, self.bad = torch.device(device), strict, {}
        self.y = torch.as_tensor(y).to(self.device)
        self.workers = default_workers() if workers is None else workers
        self.scale = (0.08, 1.0)  # share of a picture that a training crop covers
        self.only = None  # classes that an evaluation restricts the logits to; None for all

    def __len__(self):
        return len(self.rows)

    @property
    def unreadable(self):
        """Positions of those among these files that were found unreadable so far."""
        return np.flatnonzero(np.isin(self.rows, np.fromiter(self.bad, np.int64)))

    def subset(self, rows):
        """These files, undecoded, by index tensor or slice."""
        part = copy.copy(self)
        part.rows = self.rows[rows.cpu().numpy() if isinstance(rows, torch.Tensor) else rows]
        part.y = self.y[rows.to(self.device) if isinstance(rows, torch.Tensor) else rows]
        return part

    def cropped(self, scale):
        """The same files; a training crop covers a share of a picture within `scale`."""
        part = copy.copy(self)
        part.scale = scale
        return part

    def among(self, classes):
        """The same files; an evaluation restricts the logits to these class numbers, int64."""
        part = copy.copy(self)
        part.only = torch.as_tensor(classes)
        return part

    def to(self, device):
        """The same files, read to another device."""
        part = copy.copy(self)
        part.device = torch.device(device)
        part.y = self.y.to(device)
        return part

    def numbered(self, batch_size):
        """Yield (x uint8 (n,3,S,S), y (n,), row int64 (n,) in the listing) in order.

        Unreadable files are left out, so n may be below batch_size."""
        rows = torch.from_numpy(self.rows).to(self.device)
        starts = range(0, len(self), batch_size)
        batches = [(None, range(k, min(k + batch_size, len(self))), False) for k in starts]
        for x, held in self.load(batches):
            if len(x):
                yield x, self.y[held], rows[held]

    def batches(self, batch_size):
        """Yield (x, y) in order, see `numbered`."""
        for x, y, _ in self.numbered(batch_size):
            yield x, y

    def take(self, rows, complete=False):
        """The decoded Images of an index tensor or slice, without the unreadable ones.

        complete: raise UserError for an unreadable one instead, where its row must not be lost."""
        part = self.subset(rows)
        x = torch.empty(len(part), 3, self.size, self.size, dtype=torch.uint8, device=self.device)
        y = torch.empty(len(part), dtype=torch.int64, device=self.device)
        count = 0
        for images, labels in part.batches(64):
            x[count : count + len(labels)] = images
            y[count : count + len(labels)] = labels
            count += len(labels)
        if complete and count < len(part):
            row = int(part.rows[part.unreadable[0]])
            raise UserError(f"{self.listing.path(row)}: {self.bad[row]}; delete or replace it")
        return Images(x[:count], y[:count])

    def shuffled(self, batch_size, seed, augment, flip, part):
        """A function of the step that returns a training batch, see `Batches`."""
        return Stream(self, batch_size, seed, augment, flip, part)

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
            except (RuntimeError, OSError) as error:  # a process was killed, /dev/shm is full
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


@functools.cache
def default_workers():
    """Processes that decode: the cores this process may use, 16 at most."""
    return min(16, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 4)


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
    """Training batches of files: (x uint8 (B,3,S,S), y (B,)) of a step.

    Steps in order are read ahead. Any other step starts the reading anew there, which decodes
    nothing before it. The last two batches are kept, for who asks twice. part: slice of each batch
    that this process reads.
    """

    def __init__(self, files, batch_size, seed, augment, flip, part):
        self.files, self.batch_size, self.seed = files, batch_size, seed
        self.augment, self.flip, self.part = augment, flip, part
        self.following, self.batches, self.recent = None, None, {}

    def __call__(self, step):
        if step not in self.recent:
            if step != self.following:
                settings = self.batch_size, self.seed, self.augment, step, self.part
                schedule = Schedule(len(self.files), *settings)
                self.batches = self.files.load(schedule, self.seed, self.flip)
            x, held = next(self.batches)
            self.recent = dict([*self.recent.items(), (step, (x, self.files.y[held]))][-2:])
            self.following = step + 1
        return self.recent[step]
