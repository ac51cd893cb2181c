"""Loaders on real and broken files; batches as a pure function of seed and step."""

import pickle

import numpy as np
import pytest
import torch

from common import data
from common.run import UserError


def images(n=40, size=32, classes=4):
    x = torch.randint(256, (n, 3, size, size), dtype=torch.uint8)
    return data.Images(x, torch.arange(n) % classes)


def npz(path, **change):
    rng = np.random.default_rng(0)
    arrays = {
        "x_train": rng.integers(256, size=(60, 32, 32, 3), dtype=np.uint8),
        "y_train": np.arange(60) % 3,
        "x_test": rng.integers(256, size=(9, 32, 32, 3), dtype=np.uint8),
        "y_test": np.arange(9) % 3,
    }
    arrays = {k: v for k, v in (arrays | change).items() if v is not None}
    np.savez(path, **arrays)
    return arrays


# --- reading ------------------------------------------------------------------------------------


def test_real_cifar10(cifar10_dir):
    loaded = data.load("cifar10", cifar10_dir)
    assert loaded.train.x.shape == (50_000, 3, 32, 32) and loaded.test.x.shape[0] == 10_000
    assert torch.bincount(loaded.train.y).tolist() == [5000] * 10
    assert loaded.classes[3] == "cat"
    mean, std = data.channel_stats(loaded.train.x)
    np.testing.assert_allclose(loaded.mean, mean, atol=5e-5)
    np.testing.assert_allclose(loaded.std, std, atol=5e-5)


def test_truncated_cifar10_is_named(cifar10_dir, tmp_path):
    (tmp_path / "cifar-10-batches-py").mkdir()
    for file in (cifar10_dir / "cifar-10-batches-py").iterdir():
        content = file.read_bytes()
        cut = 1000 if file.name == "data_batch_3" else 0
        (tmp_path / "cifar-10-batches-py" / file.name).write_bytes(content[: len(content) - cut])
    with pytest.raises(UserError, match="missing, truncated or altered"):
        data.load("cifar10", tmp_path)


def test_npz(tmp_path):
    arrays = npz(tmp_path / "cifar100.npz", classes=np.array(["a", "b", "c"]))
    loaded = data.load("cifar100", tmp_path)
    assert loaded.classes == ["a", "b", "c"] and loaded.image_size == 32
    assert np.array_equal(loaded.test.x.permute(0, 2, 3, 1).numpy(), arrays["x_test"])
    assert np.array_equal(loaded.train.y.numpy(), arrays["y_train"])


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"x_train": np.zeros((60, 32, 32, 3), np.float32)}, "must be uint8"),
        ({"x_test": np.zeros((9, 32, 31, 3), np.uint8)}, "must be uint8"),
        ({"y_test": np.zeros(8, np.int64)}, "must be integers"),
        ({"y_train": None}, "has no array 'y_train'"),
        ({"y_train": -np.ones(60, np.int64)}, "negative labels"),
        (
            {"y_train": np.arange(60) % 3 + 1, "y_test": np.arange(9) % 3 + 1},
            r"labels are 1 to 3; .*0",
        ),
        ({"y_test": np.array([0, 1, 2, 255] * 2 + [0])}, "labels up to 255 but only 4 classes"),
        ({"y_test": np.array([2**64 - 1] * 9, np.uint64)}, "negative labels"),
        ({"y_train": np.full(60, 2**40)}, "but only 4 classes"),
        ({"y_test": np.array([0, 1, 2, 4] * 2 + [0])}, "labels up to 4 but only 4 classes"),
        ({"x_test": np.zeros((9, 16, 16, 3), np.uint8)}, "32 pixels a side and x_test 16"),
        ({"classes": np.array([["a"], ["b"], ["c"]])}, r"must be names \(K,\)"),
        ({"classes": np.array(["a"])}, "1 class names for labels up to 2"),
        ({"x_train": np.array([None] * 60, object)}, "not an .npz of plain arrays"),
    ],
)
def test_bad_npz(tmp_path, change, text):
    npz(tmp_path / "cifar10.npz", **change)
    with pytest.raises(UserError, match=text):
        data.load("cifar10", tmp_path)


def test_a_class_of_one_split_is_named(tmp_path, capsys):
    """A sentinel beside the last class looks so; a sample without a class does too."""
    npz(tmp_path / "cifar10.npz", y_train=np.where(np.arange(60) == 7, 3, np.arange(60) % 3))
    data.load("cifar10", tmp_path)
    assert "only train has images of 1 classes: 3\n" in capsys.readouterr().err


def test_truncated_npz(tmp_path):
    npz(tmp_path / "cifar10.npz")
    content = (tmp_path / "cifar10.npz").read_bytes()
    (tmp_path / "cifar10.npz").write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError, match="truncated or not an"):
        data.load("cifar10", tmp_path)


def test_pickled_npz_is_not_executed(tmp_path):
    class Payload:
        def __reduce__(self):
            return (open, (str(tmp_path / "created"), "w"))

    (tmp_path / "cifar10.npz").write_bytes(pickle.dumps(Payload()))
    with pytest.raises(UserError):
        data.load("cifar10", tmp_path)
    assert not (tmp_path / "created").exists()


# --- download -----------------------------------------------------------------------------------


def test_offline_says_what_to_do(tmp_path, monkeypatch):
    def offline(*args, **kwargs):
        raise OSError("Network is unreachable")

    monkeypatch.setattr("urllib.request.urlopen", offline)
    with pytest.raises(UserError, match=r"cifar10\.npz.*put either there.*--dataset shapes"):
        data.load("cifar10", tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("error", [ConnectionResetError("reset"), KeyboardInterrupt()])
def test_interrupted_download_leaves_nothing(tmp_path, monkeypatch, error):
    """The connection breaks, or the user does, after some of the archive has been written."""

    class Response:
        status, length, headers, url = 200, 1000, {}, None
        sent = 0

        def read(self, size=-1):
            if self.sent:
                raise error
            self.sent = 1
            return b"x" * 100

        def __enter__(self):
            return self

        def __exit__(self, *rest):
            pass

    monkeypatch.setattr("urllib.request.urlopen", lambda *a, **k: Response())
    with pytest.raises((UserError, KeyboardInterrupt)):
        data.load("cifar10", tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_test_set_sorted_by_class_is_mixed(tmp_path):
    """The first images of cifar100.npz are otherwise those of a few classes."""
    x = np.arange(60, dtype=np.uint8).repeat(32 * 32 * 3).reshape(60, 32, 32, 3)
    npz(tmp_path / "cifar100.npz", x_test=x, y_test=np.arange(60) // 20)
    test = data.load("cifar100", tmp_path).test
    assert torch.bincount(test.y[:20], minlength=3).min() > 2
    assert torch.equal(test.x[:, 0, 0, 0].long() // 20, test.y)


# --- splits -------------------------------------------------------------------------------------


def test_a_sample_below_the_classes_is_of_all_of_them():
    """Who gets one more is drawn; a size that divides evenly does not depend on that draw."""
    y = torch.arange(100).repeat(5)
    draws = [y[data.stratified_split(y, 50, seed, "--limit")[1]] for seed in (0, 0, 1)]
    for found in draws:
        assert len(found.unique()) == 50 and 30 < found.double().mean() < 70
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])
    counts = torch.bincount(y[data.stratified_split(y, 250, 0, "--limit")[1]])
    assert counts.unique().tolist() == [2, 3] and counts[:50].sum() != 150
    rest, chosen = data.stratified_split(y, 500, 0, "--limit")
    assert len(rest) == 0 and torch.equal(chosen, torch.arange(500))
    with pytest.raises(UserError, match="--limit 501: there are only 500 images"):
        data.stratified_split(y, 501, 0, "--limit")


def test_splits_are_stratified_disjoint_and_seeded(tmp_path):
    npz(tmp_path / "cifar10.npz", y_train=np.sort(np.arange(60) % 3))  # sorted by class
    whole = data.load("cifar10", tmp_path).train
    a = data.load("cifar10", tmp_path, val_size=15, limit=21)
    assert torch.bincount(a.val.y).tolist() == [5, 5, 5]
    assert (a.val.y.diff() < 0).any()  # in no order: its first images are a sample of it
    assert torch.bincount(a.train.y).tolist() == [7, 7, 7]
    key = {row.numpy().tobytes() for row in a.val.x} | {row.numpy().tobytes() for row in a.train.x}
    assert len(key) == 36 and key <= {row.numpy().tobytes() for row in whole.x}
    b = data.load("cifar10", tmp_path, val_size=15)
    assert torch.equal(a.val.x, b.val.x)  # does not depend on the limit
    assert not torch.equal(a.val.x, data.load("cifar10", tmp_path, val_size=15, seed=1).val.x)


@pytest.mark.parametrize("option", ["val_size", "limit"])
def test_split_too_large(tmp_path, option):
    npz(tmp_path / "cifar10.npz")
    with pytest.raises(UserError, match=r"there are only 60 (training )?images"):
        data.load("cifar10", tmp_path, **{option: 60 if option == "val_size" else 61})


# --- batches ------------------------------------------------------------------------------------


def test_batch_depends_on_seed_and_step_alone():
    source = images()
    forward = data.Batches(source, 8, seed=3)
    seen = {step: forward(step) for step in range(12)}
    again = data.Batches(source, 8, seed=3)
    for step in (11, 2, 7):
        for a, b in zip(seen[step], again(step), strict=True):
            assert torch.equal(a, b)
    assert not torch.equal(seen[0][0], data.Batches(source, 8, seed=4)(0)[0])


def test_epoch_visits_every_image_once():
    source = images()
    batches = data.Batches(source, 8, seed=0, augment=False)
    for epoch in range(2):
        rows = torch.cat([batches(epoch * 5 + i)[0] for i in range(5)]).mul(255).round()
        same = (rows[:, None] == source.x[None]).flatten(2).all(2)
        assert same.sum(0).tolist() == same.sum(1).tolist() == [1] * 40


def test_crop_flip_is_pad_crop_mirror():
    x = torch.arange(2 * 3 * 8 * 8).view(2, 3, 8, 8).to(torch.uint8)
    out = data.crop_flip(
        x, torch.tensor([0, 2]), torch.tensor([1, 1]), torch.tensor([False, True]), 1
    )
    padded = torch.nn.functional.pad(x, (1,) * 4)
    assert torch.equal(out[0], padded[0, :, 0:8, 1:9])
    assert torch.equal(out[1], padded[1, :, 2:10, 1:9].flip(2))


def test_batch_too_large():
    with pytest.raises(UserError, match="only 40 images"):
        data.Batches(images(), 41, seed=0)


@pytest.mark.parametrize("text", ["[1]", "{}", "{", '{"seed": 1}'])
def test_a_manifest_that_is_none(tmp_path, text):
    assert data.read_manifest(tmp_path) is None
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(UserError, match=r"manifest.json: .*export again"):
        data.read_manifest(tmp_path)
