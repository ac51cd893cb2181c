"""The embedded data set: determinism, balance, the four styles, the shortcut."""

import time

import pytest
import torch

from common.data import shapes
from common.run import UserError


def test_types_and_shapes():
    x, y = shapes.make(130, size=24)
    assert x.shape == (130, 3, 24, 24) and x.dtype == torch.uint8
    assert y.shape == (130,) and y.dtype == torch.int64
    assert len(shapes.CLASSES) == len(shapes.FIGURES) == len(shapes.FREQUENCIES) == 10


@pytest.mark.parametrize("style", shapes.STYLES)
def test_picture_depends_on_its_index_only(style):
    x, y = shapes.make(320, seed=3, style=style)
    for start, num in ((0, 7), (95, 10), (210, 110), (319, 1)):
        part, labels = shapes.make(num, seed=3, style=style, start=start)
        assert torch.equal(part, x[start : start + num])
        assert torch.equal(labels, y[start : start + num])


def test_global_generator_is_left_alone():
    before = torch.get_rng_state()
    shapes.make(10)
    assert torch.equal(before, torch.get_rng_state())


def test_every_ten_pictures_hold_each_class_once():
    _, y = shapes.make(500, split="val")
    assert torch.equal(y.view(50, 10).sort(1).values, torch.arange(10).expand(50, 10))
    assert y[:10].tolist() != y[10:20].tolist()


def test_streams_differ():
    made = [
        shapes.make(20, seed=seed, split=split)[0] for seed in (0, 1) for split in shapes.SPLITS
    ]
    made += [shapes.make(20, style=style)[0] for style in shapes.STYLES[1:]]
    pictures = torch.cat(made).flatten(1)
    assert len(pictures.unique(dim=0)) == len(pictures)


def test_inverted_turns_the_contrast_round():
    means = {style: shapes.make(200, style=style)[0].float().mean() for style in shapes.STYLES}
    assert means["inverted"] > 140 > 110 > means["filled"]


def test_figures_fill_their_disc():
    """Each figure is inside near its centre or on its stroke, outside beyond 1.3 units, and its
    function grows about as fast as the distance does (which anti-aliasing relies on)."""
    at = torch.linspace(-1.6, 1.6, 321, dtype=torch.float64)
    x, y = at[None, :].expand(321, 321), at[:, None].expand(321, 321)
    for name, figure in zip(shapes.CLASSES, shapes.FIGURES, strict=True):
        d = figure(x, y)
        area = (d < 0).double().mean() * 3.2**2
        assert 0.6 < area < 2.4, (name, area)
        assert (d[torch.hypot(x, y) > 1.3] > 0).all(), name
        slope = torch.hypot(*torch.gradient(d, spacing=0.01))[(d.abs() < 0.05)]
        assert 0.6 < slope.median() < 1.4, (name, slope.median())


def test_shortcut_is_faint_additive_and_predictive():
    plain, y = shapes.make(400)
    own, labels = shapes.make(400, shortcut=True)
    other, labels2 = shapes.make(400, shortcut="permuted")
    assert torch.equal(y, labels) and torch.equal(y, labels2)
    patterns = shapes.patterns(32)
    added = own.int() - plain.int()
    assert torch.equal(added, patterns[y])
    assert added.abs().max() == shapes.SHORTCUT
    assert plain.double().var() > 100 * added.double().var()

    def decode(x):  # matched filter after removing the smooth part of the picture
        x = x.double()
        x = x - torch.nn.functional.avg_pool2d(x, 5, 1, 2, count_include_pad=False)
        p = patterns.double()
        p = p - torch.nn.functional.avg_pool2d(p, 5, 1, 2, count_include_pad=False)
        return (x.flatten(1) @ (p.flatten(1) / p.flatten(1).norm(dim=1, keepdim=True)).T).argmax(1)

    assert (decode(own) == y).double().mean() > 0.8
    assert (decode(other) == y).double().mean() < 0.1
    assert (decode(plain) == y).double().mean() < 0.3


def test_patterns_differ_after_flips_and_shifts():
    """Augmentation must not turn one class's pattern into another's."""

    def spectra(patterns):
        size = torch.fft.fft2(patterns[:, 0].double()).abs().flatten(1)
        return size / size.norm(dim=1, keepdim=True)

    patterns = shapes.patterns(60)  # 60 pixels hold whole periods of each
    similarity = spectra(patterns) @ spectra(patterns.roll((1, 2), (2, 3)).flip(3)).T
    assert similarity.diagonal().min() > 0.95
    assert (similarity - similarity.diagonal().diag()).max() < 0.4


def test_larger_pictures_show_the_same_scene():
    small, _ = shapes.make(40, size=32)
    large, _ = shapes.make(40, size=64)
    shrunk = torch.nn.functional.avg_pool2d(large.float(), 2)
    assert (shrunk - small.float()).abs().mean() < 4


def test_a_linear_classifier_fails_and_speed():
    began = time.process_time()
    x, y = shapes.make(2000)
    assert time.process_time() - began < 5
    x = x.float().flatten(1) / 255
    x = torch.cat([x - x.mean(0), torch.ones(len(x), 1)], 1)
    train, test = x[:1500], x[1500:]
    target = torch.eye(10)[y[:1500]]
    kernel = train @ train.T + 100 * torch.eye(1500)
    predicted = (test @ train.T @ torch.linalg.solve(kernel, target)).argmax(1)
    assert 0.4 < (predicted != y[1500:]).float().mean() < 0.9


@pytest.mark.parametrize(
    "wrong",
    [
        dict(num=0),
        dict(num=5, size=4),
        dict(num=5, start=-1),
        dict(num=5, split="dev"),
        dict(num=5, style="sketch"),
        dict(num=5, shortcut="yes"),
    ],
)
def test_bad_input(wrong):
    with pytest.raises(UserError, match="shapes"):
        shapes.make(**wrong)
