"""Cutout and AugMix: Pillow's operations, the papers' definitions, a function of (seed, step)."""

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from common import data, run
from common.data import augment

SIDE = 32


@pytest.fixture(scope="module")
def images():
    """100 pictures uint8 (100,3,32,32); the first have odd histograms."""
    x = data.shapes.make(100, seed=1)[0].clone()
    x[0] = 7
    x[1, 0] = 3
    x[2] = torch.randint(100, 103, (3, SIDE, SIDE), dtype=torch.uint8)
    x[3, 1] = 255 * (torch.arange(SIDE * SIDE) % 2).view(SIDE, SIDE)
    x[4:20] = torch.randint(256, (16, 3, SIDE, SIDE), dtype=torch.uint8)
    return x


def by_pillow(picture, name, level, sign):
    """An operation as the AugMix paper's code defines it, on a PIL image."""
    if name in ("autocontrast", "equalize"):
        return getattr(ImageOps, name)(picture)
    if name == "posterize":
        return ImageOps.posterize(picture, 4 - int(level * 4 / 10))
    if name == "solarize":
        return ImageOps.solarize(picture, 256 - int(level * 256 / 10))
    if name == "rotate":
        return picture.rotate(sign * int(level * 30 / 10), resample=Image.BILINEAR)
    shear, shift = sign * level * 0.3 / 10, sign * int(level * (SIDE / 3) / 10)
    rows = {
        "shear_x": (1, shear, 0, 0, 1, 0), "shear_y": (1, 0, 0, shear, 1, 0),
        "translate_x": (1, 0, shift, 0, 1, 0), "translate_y": (1, 0, 0, 0, 1, shift),
    }  # fmt: skip
    return picture.transform((SIDE, SIDE), Image.AFFINE, rows[name], resample=Image.BILINEAR)


@pytest.mark.parametrize("name", augment.OPERATIONS)
def test_operations_are_pillows(images, name):
    """The tables of grey levels exactly; the rest within one level at one pixel in 500."""
    n = len(images)
    level = 0.1 + 9.8 * torch.rand(n, dtype=torch.float64)
    sign = 2.0 * torch.randint(2, (n,)) - 1
    kind = torch.full((n,), augment.OPERATIONS.index(name))
    found = augment.operate(images, kind, level, sign)
    wanted = []
    for picture, strength, side in zip(images, level.tolist(), sign.tolist(), strict=True):
        picture = Image.fromarray(picture.permute(1, 2, 0).numpy())
        wanted.append(np.array(by_pillow(picture, name, strength, side)))
    wanted = torch.from_numpy(np.stack(wanted)).permute(0, 3, 1, 2)
    apart = (found.int() - wanted.int()).abs()
    if name in augment.TABLES or name.startswith("translate"):
        assert torch.equal(found, wanted)
    else:
        assert apart.max() <= 1 and (apart > 0).double().mean() < 1 / 500
    assert not torch.equal(found, images)


def test_augmix_is_its_definition(images):
    """Against a loop over single images, chains and operations."""
    x = images[:6]
    draws = augment.draw(len(x), run.generator(0, "test"))
    views = augment.augmix(x, draws).view(augment.VIEWS, *x.shape)
    for v, i in np.ndindex(augment.VIEWS, len(x)):
        mixed = torch.zeros(3, SIDE, SIDE)
        for c in range(augment.CHAINS):
            picture = x[i : i + 1]
            for d in range(draws.depth[v, c, i]):
                own = (part[v, c, d, i].view(1) for part in draws[:3])
                picture = augment.operate(picture, *own)
            mixed += draws.weight[v, c, i] * picture[0]
        share = draws.share[v, i]
        wanted = ((1 - share) * x[i] + share * mixed) / 255
        assert torch.allclose(views[v, i], wanted, atol=1e-5)


def test_what_augmix_draws():
    draws = augment.draw(4000, run.generator(0, "test"))
    assert torch.allclose(draws.weight.sum(1), torch.ones(augment.VIEWS, 4000), atol=1e-5)
    assert (draws.depth.flatten().bincount()[1:] / draws.depth.numel() - 1 / 3).abs().max() < 0.01
    assert (draws.kind.flatten().bincount() / draws.kind.numel() - 1 / 9).abs().max() < 0.005
    assert 0.1 <= draws.level.min() and draws.level.max() <= 3
    assert abs(draws.sign.mean()) < 0.01 and set(draws.sign.unique().tolist()) == {-1, 1}
    assert abs(draws.share.mean() - 0.5) < 0.02 and abs(draws.share.var() - 1 / 12) < 0.005
    first = draws.weight[:, 0]  # Dirichlet(1, 1, 1): Beta(1, 2), variance 1/18
    assert abs(first.mean() - 1 / 3) < 0.02 and abs(first.var() - 1 / 18) < 0.005


def test_jsd_by_hand():
    p = torch.tensor([[[0.5, 0.5]], [[0.9, 0.1]], [[0.2, 0.8]]])  # of an image and two views
    middle = p.mean(0)
    wanted = (p * (p / middle).log()).sum(2).mean()
    assert torch.allclose(data.jsd(p.log().flatten(0, 1), 1), wanted)
    both = torch.cat([p, p.flip(2)], 1)
    assert torch.allclose(data.jsd(both.log().flatten(0, 1), 2), wanted)
    assert data.jsd(torch.randn(4, 5).repeat(3, 1), 4).abs() < 1e-6
    extreme = torch.tensor([[100.0, 0], [0, 100.0], [100.0, 0]]).requires_grad_()
    data.jsd(extreme, 1).backward()
    assert extreme.grad.isfinite().all()


def test_cutout_by_hand():
    x = torch.full((2, 3, 32, 32), 0.25)
    out = augment.cutout(x, torch.tensor([16, 0]), torch.tensor([20, 31]), (0.1, 0.2, 0.3))
    changed = out != x
    assert changed[0].sum() == 3 * 16 * 16 and changed[0, :, 8:24, 12:28].all()
    assert changed[1].sum() == 3 * 8 * 9 and changed[1, :, :8, 23:].all()
    assert out[0, :, 16, 20].tolist() == pytest.approx([0.1, 0.2, 0.3])


@pytest.mark.parametrize("policy", ["cutout", "augmix"])
def test_a_function_of_seed_and_step(images, policy, monkeypatch):
    """Any step can be asked for first; two processes together get the rows of one."""

    def made(seed=0):
        source = data.Images(images, torch.arange(len(images)))
        return data.augmented(data.Batches(source, 8, seed), policy, (0.5, 0.4, 0.3))

    batches = made()
    x, y = batches(5)
    assert torch.equal(made()(5)[0], x) and not torch.equal(made(seed=1)(5)[0], x)
    assert x.is_contiguous(memory_format=torch.channels_last)
    assert 0 <= x.min() and x.max() <= 1 and x.dtype == torch.float32
    plain = batches.batches(5)[0]
    assert len(x) == (3 if policy == "augmix" else 1) * len(plain)
    if policy == "augmix":
        assert torch.equal(x[: len(plain)], plain)
    views = x.unflatten(0, (-1, len(y)))
    for rank in (0, 1):
        own = slice(4 * rank, 4 * rank + 4)
        monkeypatch.setattr(run, "rows", lambda count, own=own: own)
        part, labels = made()(5)
        assert torch.equal(labels, y[own])
        assert torch.allclose(part.unflatten(0, (-1, 4)), views[:, own], atol=1e-6)


def test_none_is_the_batches_themselves(images):
    batches = data.Batches(data.Images(images, torch.arange(len(images))), 8, 0)
    assert data.augmented(batches, "none", (0, 0, 0)) is batches
