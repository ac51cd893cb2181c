"""Streams of augmented images beside the clean ones, for NoFrost* (Wang et al. 2022)."""

from pathlib import Path

import torch

from common import run
from common.data import trees
from common.data.batches import Batches
from common.data.files import Files
from common.run import UserError

STREAMS = ("clean", "deepaug", "tda", "adv")


class Streams:
    """Batches of the streams that are read: clean, deepaug and tda, as far as `names` has them.

    clean: the Batches of the training set. streams(step, x, y) is ({stream: images}, {stream:
    labels}) of a step, in the order of STREAMS. Among them are x, y of clean(step). "adv" is not
    here, for an attack makes it. Raises UserError for names and sizes that do not fit.
    """

    def __init__(self, names, dataset, batch_size, seed, augment, deepaug_dir=None, strict=False):
        if "deepaug" in names and not deepaug_dir:
            raise UserError(
                "--streams deepaug: its images cannot be shipped; give --deepaug-dir, a folder "
                "with one folder of images per class (made by the DeepAugment code of imagenet-r)"
            )
        given = [name for name in names if name != "adv"]
        size = batch_size // len(given)
        if size < 1 or size % run.world():
            raise UserError(
                f"--batch-size {batch_size}: {size} images for each of {len(given)} streams, "
                f"which must divide among {run.world()} processes"
            )
        self.seed = seed
        self.more = {}
        for name in given:
            images = stream_images(name, dataset, deepaug_dir, strict)
            key = seed if name == "clean" else run.seed_key(seed, name)
            self.more[name] = Batches(images, size, key, augment, dataset.flip, whole=name == "tda")
        self.clean = self.more.pop("clean")

    def __call__(self, step, x, y):
        images = {"clean": x}
        labels = {"clean": y}
        for name, batches in self.more.items():
            images[name], labels[name] = batches(step)
        if "tda" in images:  # its draws are those of the global batch
            rng = run.generator(self.seed, "tda", step)
            own = run.rows(len(images["tda"]))
            images["tda"] = debias_texture(images["tda"], rng)[own]
            labels["tda"] = labels["tda"][own]
        return images, labels


def check_streams(names):
    """The names in the order of STREAMS. UserError where they are not clean and others, once."""
    if set(names) - set(STREAMS) or "clean" not in names or len(set(names)) < len(names):
        raise UserError(
            f"--streams {','.join(names)}: clean, and any of {', '.join(STREAMS[1:])}, once"
        )
    return sorted(names, key=STREAMS.index)


def stream_images(name, dataset, deepaug_dir=None, strict=False):
    """Images of a stream: the training set, for deepaug the files of `deepaug_dir` (in memory
    where the training set is). Crops of photographs take 64 % and more for tda (else 8 %)."""
    images = dataset.train
    if name == "deepaug":
        listing = trees.listed(Path(deepaug_dir))
        labels = trees.labels_of(listing, dataset.classes)
        files = Files(listing, labels, size=dataset.image_size, strict=strict)
        files = files.take(slice(None)) if images.in_memory else files
        return files.to(images.device)
    return images.cropped((0.64, 1.0)) if name == "tda" else images


def grey(x):
    """Luma (N,1,H,W) of RGB images, as torchvision's rgb_to_grayscale."""
    r, g, b = x.unbind(1)
    return (0.2989 * r + 0.587 * g + 0.114 * b).unsqueeze(1)


def turn_hue(x, turns):
    """RGB images (N,3,H,W) in [0,1] with the hue of HSV moved by `turns` (N,1,1) of a circle."""
    high, least = x.amax(1), x.amin(1)
    chroma, (r, g, b) = high - least, x.unbind(1)
    safe = chroma.clamp_min(1e-8)
    hue = torch.where(high == r, (g - b) / safe % 6, (b - r) / safe + 2)
    hue = torch.where((high == b) & (high != r) & (high != g), (r - g) / safe + 4, hue)
    hue = hue + 6 * turns
    k = [(n + hue) % 6 for n in (5, 3, 1)]
    return torch.stack([high - chroma * torch.minimum(i, 4 - i).clamp(0, 1) for i in k], 1)


def debias_texture(x, generator):
    """Texture-debiasing augmentation of images x (N,3,H,W) in [0,1], after the authors' code.

    Half of the images change. Of these 80 % get colour jitter: brightness, contrast, saturation 0.8
    and hue 0.2, in an order drawn for the batch. Then 20 % turn grey. Crop and flip are the
    loader's."""

    def draw(count):
        return torch.rand(count, len(x), generator=generator, device=generator.device)

    jitter = draw(4)
    order = torch.randperm(4, generator=generator, device=generator.device).tolist()
    drawn = run.upload(torch.cat([jitter, draw(3)]), x.device).view(7, -1, 1, 1, 1)
    factors = 0.2 + 1.6 * drawn[:3]
    turns = -0.2 + 0.4 * drawn[3, :, 0]
    chosen, jittered, to_grey = drawn[4] < 0.5, drawn[5] < 0.8, drawn[6] < 0.2

    def blend(a, b, factor):
        return torch.lerp(b, a, factor).clamp_(0, 1)

    steps = [
        lambda z: blend(z, torch.zeros_like(z), factors[0]),
        lambda z: blend(z, grey(z).mean((2, 3), keepdim=True).expand_as(z), factors[1]),
        lambda z: blend(z, grey(z).expand_as(z), factors[2]),
        lambda z: turn_hue(z, turns),
    ]
    out = x
    for i in order:
        out = steps[i](out)
    out = torch.where(jittered, out, x)
    out = torch.where(to_grey, grey(out).expand_as(out), out)
    return torch.where(chosen, out, x)
