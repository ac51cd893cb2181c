"""A shortcut: a faint class-dependent grating on every picture of a small data set.

Its variance is tiny, it predicts the class perfectly, and noise, blur or JPEG destroy it. So it is
a low-variance feature that is specific to the training domain. Networks with BatchNorm are said to
lean on such features (Taghanaki et al. 2022).

    grating = patterns(num_classes=10, size=32, levels=3)
    images = add(images, grating)                  # of the picture's own class
    images = add(images, grating, swap=True)       # of another class, drawn at random
"""

import argparse
import itertools
import math

import torch

from common import run
from common.data.images import Images
from common.data.shapes import FREQUENCIES

MOST = 16  # grey levels
# Test sets beside the usual one, and their columns in tables.
SHORTCUT_TESTS = {"without": "shortcut removed", "swapped": "shortcut swapped"}
# Cycles per pixel beyond those of `shapes`: all periods below six pixels, for up to 200 classes.
MORE = (
    1 / 2, 1 / 3, 1 / 4, 1 / 5, 2 / 5, 2 / 7, 3 / 7, 3 / 8, 2 / 9, 4 / 9, 3 / 10, 3 / 11, 4 / 11,
    5 / 11,
)  # fmt: skip


def levels(text):
    """argparse type: 0, or a number above 0 and at most 16."""
    value = float(text)
    if not 0 <= value <= MOST:
        raise argparse.ArgumentTypeError(f"must be from 0 (none) to {MOST} grey levels, got {text}")
    return value


def frequencies(count):
    """(vertical, horizontal) cycles per pixel of `count` classes, all different."""
    pairs = itertools.product((*MORE, 0), repeat=2)
    more = [pair for pair in pairs if any(pair) and pair not in FREQUENCIES]
    found = [*FREQUENCIES, *more][:count]
    if len(found) < count:
        raise run.UserError(f"--shortcut: for at most {len(found)} classes, not {count}")
    return found


def wave(frequency, at):
    """Cosine at positions `at`; pi/4 keeps those of period 3, 4, ... off their zeros."""
    return torch.cos(2 * math.pi * frequency * at + (math.pi / 4 if frequency % 0.5 else 0))


def patterns(num_classes, size, levels):
    """The gratings, int16 (K,size,size), in [-levels, levels] grey levels.

    A whole number of levels is rounded. A fraction is dithered: it is rounded up where it is above
    a threshold drawn once per pixel. So its mean over pixels is that of the fraction.
    """
    at = torch.arange(size, dtype=torch.float64)
    thresholds = torch.full((size, size), 0.5, dtype=torch.float64)
    if levels != round(levels):
        rng = run.generator("shortcut", "thresholds", size)
        thresholds = torch.rand(size, size, generator=rng, dtype=torch.float64)
    planes = []
    for vertical, horizontal in frequencies(num_classes):
        plane = wave(vertical, at)[:, None] * wave(horizontal, at)
        plane = levels * plane / plane.abs().max()
        planes.append(plane.round() if levels == round(levels) else (plane + thresholds).floor())
    return torch.stack(planes).to(torch.int16)


def add(images, grating, swap=False):
    """Images (N,3,S,S) uint8 with the grating of their class, or of another one with `swap`."""
    shown = images.y
    if swap:
        rng = run.generator("shortcut", "swap", len(images.y))
        shown = (shown + torch.randint(1, len(grating), shown.shape, generator=rng)) % len(grating)
    x = torch.empty_like(images.x)
    for k in range(0, len(x), 1000):  # little memory beside the images
        part = slice(k, k + 1000)
        x[part] = (images.x[part] + grating[shown[part], None]).clamp_(0, 255).to(torch.uint8)
    return Images(x, images.y)
