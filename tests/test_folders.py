"""Trees of image files: every kind of bad input, the cached listing, batches as of a tensor."""

import errno
import io
import multiprocessing
import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pictures
import pytest
import torch
from PIL import Image

from common import data, run
from common.data import decode, files, folders, trees
from common.run import UserError


def picture(seed=0, height=40, width=40):
    rng = np.random.default_rng(seed)
    small = rng.integers(256, size=(3, 5, 5), dtype=np.uint8)
    return torch.from_numpy(small.repeat(height // 5, 1).repeat(width // 5, 2))


def make_tree(root, counts, start=0, **size):
    """JPEGs `root`/<class>/<number>.jpg, all different."""
    for name, count in counts.items():
        (root / name).mkdir(parents=True, exist_ok=True)
        for k in range(count):
            start += 1
            pictures.write(picture(start, **size), root / name / f"{k:03d}.jpg", 95)
    return root


def cut(path, share=0.5):
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])


@pytest.fixture
def tree(tmp_path):
    """train: cat 10, dog 10; val: cat 4, dog 4."""
    make_tree(tmp_path / "train", {"cat": 10, "dog": 10})
    make_tree(tmp_path / "val", {"cat": 4, "dog": 4}, start=100)
    return tmp_path


def load(tree, name="folder", **options):
    return data.load(name, tree, image_size=16, **{"workers": 0} | options)


class Constant(torch.nn.Module):
    """Logits that are the mean colour of an image: they tell images apart."""

    def forward(self, x):
        return x.mean((2, 3))


# --- what is decoded ------------------------------------------------------------------------------


def test_sizes_and_classes(tree):
    loaded = load(tree)
    assert loaded.classes == ["cat", "dog"] and loaded.image_size == 16 and loaded.val is None
    assert len(loaded.train) == 20 and loaded.train.size == 16 and len(loaded.test.y) == 8
    few = loaded.test.take(slice(0, 5))
    assert few.x.dtype == torch.uint8 and few.x.shape == (5, 3, 16, 16)
    # The test order is mixed, so that its beginning is a sample; the labels follow the files.
    names = [loaded.test.listing.path(row) for row in loaded.test.rows]
    assert names != sorted(names)
    assert [n.split("/")[-2] == "dog" for n in names] == loaded.test.y.bool().tolist()


KINDS = ["L", "LA", "P", "1", "CMYK", "RGBA", "I;16", "I;16 tiff", "bmp", "gif"]


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_becomes_rgb(tmp_path, kind):
    """Greyscale, palette, CMYK, transparent, 16-bit and other formats keep their colours."""
    original = Image.fromarray(picture(1).permute(1, 2, 0).numpy())
    suffix = {"CMYK": "jpg", "bmp": "bmp", "gif": "gif", "I;16 tiff": "tiff"}.get(kind, "png")
    path, expected = tmp_path / f"a.{suffix}", np.array(original)
    if kind.startswith("I;16"):
        wide = (np.array(original.convert("L")).astype(np.uint16)) * 257
        Image.fromarray(wide).save(path)
        expected = np.repeat(np.array(original.convert("L"))[..., None], 3, 2)
    elif kind in ("bmp", "gif"):
        original.save(path)
        expected = np.array(Image.open(path).convert("RGB"))
    else:
        options = {"quality": 100} if kind == "CMYK" else {}
        original.convert(kind).save(path, **options)
        expected = np.array(original.convert(kind).convert("RGB"))
    x = decode.decode(str(path))
    assert x.dtype == torch.uint8 and x.shape == (3, 40, 40)
    difference = np.abs(x.permute(1, 2, 0).numpy().astype(int) - expected.astype(int))
    assert difference.max() <= (8 if kind == "CMYK" else 0)  # JPEG loses a little


def test_grey_of_many_bits_keeps_its_range(tmp_path):
    """Integers: 65535 is white, or the largest where it is above; floats: 1, 255, 65535, or that.
    So a dark picture stays dark: its own largest value is not taken for white."""
    wide = np.array([[0, 257, 32896, 65535]])

    def greys(values, name="a.tiff"):
        Image.fromarray(values).save(tmp_path / name)
        x = decode.decode(str(tmp_path / name))
        assert x.shape == (3, 1, 4) and (x == x[:1]).all()
        return x[0, 0].tolist()

    for dtype, name in ((np.uint16, "a.png"), (np.uint16, "a.tiff"), (np.int32, "a.tiff")):
        assert greys(wide.astype(dtype), name) == [0, 1, 128, 255]
    assert greys((wide * 1000).astype(np.int32)) == [0, 1, 128, 255]
    assert greys(np.float32([[-1, 0.5, 1, np.nan]])) == [0, 128, 255, 0]
    assert greys(np.float32([[0, 100, 200, 50]])) == [0, 100, 200, 50]
    assert greys(np.float32([[0, 257, 32896, 514]])) == [0, 1, 128, 2]
    assert greys(np.float32([[0, 1e5, 2e5, 5e4]])) == [0, 128, 255, 64]
    (tmp_path / "a.ppm").write_bytes(b"P5 4 1 65535 " + wide.astype(">u2").tobytes())
    assert decode.decode(str(tmp_path / "a.ppm"))[0, 0].tolist() == [0, 1, 128, 255]


def test_exif_first_frame_and_bomb(tmp_path, monkeypatch):
    """The picture is as stored; one of too many pixels is refused before it takes the memory."""
    image = Image.fromarray(picture(1, 20, 40).permute(1, 2, 0).numpy())
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    image.save(tmp_path / "a.jpg", exif=exif)
    for orientation in range(1, 9):
        exif[0x0112] = orientation
        for name in ("a.png", "a.tiff", "a.webp"):
            options = {"lossless": True} if name == "a.webp" else {}
            image.save(tmp_path / name, exif=exif, **options)
            stored = decode.decode(str(tmp_path / name))
            assert torch.equal(stored, picture(1, 20, 40)), (name, orientation)
    assert decode.decode(str(tmp_path / "a.jpg")).shape == (3, 20, 40)
    red, blue = (Image.new("RGB", (8, 8), colour) for colour in ("red", "blue"))
    for name in ("a.gif", "a.webp", "a.tiff", "a.png"):
        options = {"lossless": True} if name == "a.webp" else {}
        red.save(tmp_path / name, save_all=True, append_images=[blue], **options)
        assert decode.decode(str(tmp_path / name))[:, 0, 0].tolist() == [255, 0, 0], name
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 300)
    with pytest.raises(decode.Unreadable, match="800 pixels"):
        decode.decode(str(tmp_path / "a.jpg"))


DAMAGE = """
import sys
from pathlib import Path
from common.data import decode
names = sorted(Path(sys.argv[1]).iterdir())
for name in names:
    try:
        assert decode.decode(str(name)).shape[0] == 3
    except decode.Unreadable as reason:
        assert str(reason)
        print(reason)
"""


def damaged(rng, folder, count):
    """`count` files of each of six formats in the folder, with bytes changed, put in or cut off."""
    image = Image.fromarray(rng.integers(256, size=(40, 40, 3), dtype=np.uint8))
    for suffix in ("jpg", "png", "gif", "webp", "bmp", "tiff"):
        whole = io.BytesIO()
        image.save(whole, {"jpg": "jpeg"}.get(suffix, suffix))
        for k in range(count):
            content = bytearray(whole.getvalue())
            for _ in range(rng.integers(1, 30)):
                content[rng.integers(len(content) if k % 2 else 60)] = rng.integers(256)
            if k % 5 == 0:
                del content[rng.integers(len(content)) :]
            (folder / f"{k}.{suffix}").write_bytes(content)


MANY = [20, pytest.param(500, marks=pytest.mark.slow)]


@pytest.mark.parametrize("count", MANY)
def test_damaged_files_do_not_end_the_process(tmp_path, count):
    """A damaged file is a picture or Unreadable, and no signal. Both outcomes occur."""
    damaged(np.random.default_rng(0), tmp_path, count)
    done = subprocess.run([sys.executable, "-c", DAMAGE, str(tmp_path)], capture_output=True,
                          text=True, cwd=Path(__file__).parents[1])  # fmt: skip
    assert done.returncode == 0, done.stderr[-500:]
    reasons = done.stdout.splitlines()
    assert count < len(reasons) < 6 * count


@pytest.mark.parametrize("count", MANY)
@pytest.mark.parametrize("workers", [0, 2])
def test_damaged_files_are_named_counted_and_left_out(tree, capfd, count, workers):
    """Of a tree whose validation set has 8 whole files and `count` damaged ones of six formats."""
    folder = tree / "val" / "cat"
    before = set(folder.iterdir())
    damaged(np.random.default_rng(1), folder, count)
    bad = set()
    for path in set(folder.iterdir()) - before:
        try:
            decode.decode(str(path))
        except decode.Unreadable:
            bad.add(str(path))
    assert count < len(bad) < 6 * count
    images = load(tree, workers=workers).test
    labels = torch.cat([y for _, y in images.batches(50)])
    assert len(images) == 8 + 6 * count and len(labels) == len(images) - len(bad)
    assert (labels == 1).sum() == 4  # of the folder without a damaged file
    assert {images.listing.path(row) for row in images.bad} == bad
    assert len(images.unreadable) == len(bad)
    lines = [line for line in capfd.readouterr().err.splitlines() if line.startswith("skipped")]
    assert len(lines) == min(len(bad), files.NAMED) + len(bad) // 1000
    assert "more are only counted" in lines[files.NAMED - 1]
    assert len(images.take(slice(None))) == len(labels)


def test_what_is_no_file_is_not_opened(tmp_path):
    """A pipe without a writer would be waited for without end."""
    os.mkfifo(tmp_path / "a.png")
    (tmp_path / "b.png").mkdir()
    for name in ("a.png", "b.png"):
        with pytest.raises(decode.Unreadable, match="no file but"):
            decode.decode(str(tmp_path / name))


def test_mixed_sizes(tmp_path):
    make_tree(tmp_path / "train", {"a": 3}, height=20, width=80)
    make_tree(tmp_path / "train", {"b": 3}, height=120, width=15)
    make_tree(tmp_path / "val", {"a": 2, "b": 2}, height=5, width=5)
    loaded = load(tmp_path)
    assert data.Batches(loaded.train, 6, seed=0)(0)[0].shape == (6, 3, 16, 16)
    assert loaded.test.take(slice(None)).x.shape == (4, 3, 16, 16)


def test_evaluation_crop_is_the_centre():
    x = torch.zeros(3, 80, 160, dtype=torch.uint8)
    x[:, 20:60, 60:100] = 255  # inside the 70 x 70 that remain of 80 x 80
    out = decode.fitted(x, 70, "crop")
    assert out.shape == (3, 70, 70) and out[:, 35, 35].eq(255).all()
    assert torch.equal(out, out.flip(1)) and torch.equal(out, out.flip(2))
    assert torch.equal(decode.fitted(out, 70, "exact"), out)
    with pytest.raises(UserError, match="80x80 pixels, where 70x70 are expected"):
        decode.fitted(x[:, :, :80], 70, "exact")


def test_crop_box_follows_torchvision():
    """Area and ratio of the boxes lie in the ranges and spread as RandomResizedCrop's do."""
    from torchvision.transforms import RandomResizedCrop

    image, rng = torch.zeros(3, 100, 130), random.Random(0)
    torch.manual_seed(0)
    theirs = [RandomResizedCrop.get_params(image, (0.08, 1), (3 / 4, 4 / 3)) for _ in range(3000)]
    ours = [decode.crop_box(100, 130, (0.08, 1), rng) for _ in range(3000)]
    for function in (lambda b: b[2] * b[3], lambda b: b[2] / b[3], lambda b: b[0], lambda b: b[1]):
        a, b = (np.array([function(box) for box in boxes]) for boxes in (ours, theirs))
        error = np.hypot(a.std(), b.std()) / 3000**0.5
        assert abs(a.mean() - b.mean()) < 4 * error
    for top, left, height, width in ours:
        assert 0 <= top <= 100 - height and 0 <= left <= 130 - width
    assert decode.crop_box(3, 300, (0.9, 1), rng) == (0, 148, 3, 4)  # no draw can fit


# --- what cannot be decoded -----------------------------------------------------------------------


def test_unreadable_files_are_skipped_counted_and_named(tree, capfd):
    """A truncated JPEG, a text file and an empty one: evaluation goes without them."""
    whole = load(tree)
    logits, _ = run.predict_all(Constant(), whole.test)
    files = [tree / "val" / "cat" / "001.jpg", tree / "val" / "dog" / "002.jpg"]
    files.append(tree / "val" / "dog" / "003.jpg")
    cut(files[0])
    files[1].write_text("not a picture")
    files[2].write_bytes(b"")
    broken = load(tree)
    found = run.evaluate(Constant(), broken.test, batch_size=3)
    names = [broken.test.listing.path(row) for row in broken.test.rows]
    keep = torch.tensor([name not in map(str, files) for name in names])
    expected = run.metrics(logits[keep], whole.test.y[keep])
    assert found == pytest.approx(expected, abs=1e-9)
    assert sorted(broken.test.listing.path(r) for r in broken.test.bad) == sorted(map(str, files))
    lines = [x for x in capfd.readouterr().err.splitlines() if x.startswith("skipped")]
    assert len(lines) == 3 and "3 unreadable so far" in lines[-1]
    assert any(str(files[0]) in x and "truncated" in x.lower() for x in lines)
    images = broken.test.take(slice(None))
    assert len(images.x) == len(images.y) == 5
    with pytest.raises(UserError, match="delete or replace it"):
        broken.test.take(torch.arange(8), complete=True)
    with pytest.raises(UserError, match=r"\.jpg: .*without --strict it would be skipped"):
        run.evaluate(Constant(), load(tree, strict=True).test)


def test_training_takes_the_next_readable_file(tree):
    for k in (2, 3):
        cut(tree / "train" / "cat" / f"00{k}.jpg")
    loaded = load(tree)
    batches = data.Batches(loaded.train, 20, seed=0, augment=False)
    x, y = batches(0)
    assert len(x) == 20 and y.tolist().count(0) == 10 and len(loaded.train.bad) == 2
    unique = {row.numpy().tobytes() for row in x}
    assert len(unique) == 18  # 004.jpg stands in for both
    with pytest.raises(UserError, match="without --strict"):
        data.Batches(load(tree, strict=True).train, 20, seed=0)(0)


def test_nothing_readable(tmp_path):
    make_tree(tmp_path / "train", {"a": 2})
    make_tree(tmp_path / "val", {"a": 1})
    for path in (tmp_path / "train" / "a").iterdir():
        cut(path)
    with pytest.raises(UserError, match="cannot be read"):
        data.Batches(load(tmp_path).train, 2, seed=0)(0)


# --- what the folders hold ------------------------------------------------------------------------


def test_other_files_and_loops_are_left_out_with_a_note(tree, capsys):
    (tree / "train" / "cat" / "notes.txt").write_text("x")
    (tree / "train" / "cat" / ".hidden.jpg").write_text("x")
    (tree / "train" / "cat" / "up").symlink_to(tree / "train")
    (tree / "train" / "self").symlink_to("self")  # a link to itself: no file, no folder
    loaded = load(tree)
    assert len(loaded.train.y) == 20
    err = capsys.readouterr().err
    assert "files are no images, as" in err and "cat/up links to a folder above it" in err


def test_deeper_folders_and_links_count(tree, tmp_path):
    make_tree(tree / "train" / "cat", {"more": 2}, start=50)
    elsewhere = make_tree(tmp_path / "elsewhere", {"bird": 3}, start=60)
    (tree / "train" / "bird").symlink_to(elsewhere / "bird")
    loaded = load(tree)
    assert loaded.classes == ["bird", "cat", "dog"]
    assert torch.bincount(loaded.train.y).tolist() == [3, 12, 10]


def test_class_folders_that_differ(tree, capsys):
    make_tree(tree / "train", {"newt": 2}, start=70)
    loaded = load(tree)  # a class that only training has: noted
    assert loaded.classes == ["cat", "dog", "newt"]
    assert "no images of newt (1)" in capsys.readouterr().err
    make_tree(tree / "val", {"owl": 1}, start=80)
    with pytest.raises(UserError, match="1 class folders are not among the 3 classes: owl"):
        load(tree)


def test_empty_class(tree, capsys):
    (tree / "val" / "fox").mkdir()  # without images it adds no label
    assert len(load(tree).test.y) == 8
    (tree / "train" / "fox").mkdir()
    with pytest.raises(UserError, match="fox: a class without images"):
        load(tree)


def test_files_outside_of_classes(tree):
    pictures.write(picture(1), tree / "train" / "stray.png")
    with pytest.raises(UserError, match=r"stray\.png: lies in no class folder"):
        load(tree)


def test_no_tree(tmp_path):
    with pytest.raises(UserError, match=r"folder: no .*/train"):
        load(tmp_path)
    (tmp_path / "train").mkdir()
    (tmp_path / "val").mkdir()
    with pytest.raises(UserError, match="no images"):
        load(tmp_path)


# --- listing --------------------------------------------------------------------------------------


@pytest.fixture
def cached(tree, monkeypatch):
    """A tree whose listing is kept, changed long enough ago."""
    monkeypatch.setattr(folders, "CACHED", 10)
    monkeypatch.setenv("TORCH_HOME", str(tree / "torch"))
    for folder, _, _ in os.walk(tree / "train"):
        os.utime(folder, (1e9, 1e9))
    return tree / "train"


def same(a, b):
    arrays = all(np.array_equal(getattr(a, k), getattr(b, k)) for k in ("folder", "names", "ends"))
    return arrays and a.folders == b.folders and a.root == b.root and a.others == b.others


def test_a_listing_is_made_once(cached, monkeypatch):
    first = folders.scan(cached)
    assert (cached.parent / ".train.listing.npz").is_file()
    monkeypatch.setattr(folders, "_walk", lambda root: pytest.fail("listed twice"))
    assert same(folders.scan(cached), first)
    assert first.path(10) == str(cached / "dog" / "000.jpg")


@pytest.mark.parametrize("change", ["add", "remove", "rename", "folder", "truncate", "moved"])
def test_a_cached_listing_is_not_trusted_when_the_tree_changed(cached, change):
    folders.scan(cached)
    place = cached.parent / ".train.listing.npz"
    if change == "add":
        pictures.write(picture(9), cached / "dog" / "new.jpg")
    elif change == "remove":
        (cached / "dog" / "004.jpg").unlink()
    elif change == "rename":
        (cached / "dog" / "004.jpg").rename(cached / "dog" / "zzz.jpg")
    elif change == "folder":
        make_tree(cached, {"ewe": 1})
    elif change == "truncate":
        cut(place)
    else:
        cached = cached.rename(cached.parent / "moved")
        place.rename(cached.parent / ".moved.listing.npz")
    assert same(folders.scan(cached), folders.scan(cached, cache=False))


def test_read_only_data(cached):
    """Where nothing can be written beside the tree, torch's cache folder takes the listing."""
    blocked = cached.parent / ".train.listing.npz"
    blocked.mkdir()  # holds for root as well, whom permissions do not stop
    first = folders.scan(cached)
    assert len(list((cached.parent / "torch" / "listings").glob("*.npz"))) == 1
    assert same(folders.scan(cached), first)


def test_no_place_for_a_listing(cached, monkeypatch):
    (cached.parent / ".train.listing.npz").mkdir()
    (cached.parent / "torch").write_text("a file where the folder would be")
    assert len(folders.scan(cached)) == 20


def test_a_listing_is_compact(tmp_path):
    """About the bytes of the names: a million files fit into some tens of megabytes."""
    (tmp_path / "a").mkdir()
    for k in range(2000):
        (tmp_path / "a" / f"n01440764_{k}.JPEG").touch()
    listing = folders.scan(tmp_path)
    held = listing.names.nbytes + listing.ends.nbytes + listing.folder.nbytes
    assert len(listing) == 2000 and held < 32 * 2000
    assert all(os.path.isfile(listing.path(row)) for row in range(0, 2000, 97))


# --- batches --------------------------------------------------------------------------------------


def test_batches_depend_on_seed_and_step_alone(tree):
    """In any order, with or without processes, and without touching the global generator."""
    forward = data.Batches(load(tree).train, 6, seed=3)
    assert forward.per_epoch == 3
    torch.manual_seed(5)
    state = torch.get_rng_state()
    seen = [forward(step) for step in range(5)]
    assert torch.equal(torch.get_rng_state(), state)
    again = data.Batches(load(tree, workers=2).train, 6, seed=3)
    for step in (4, 3, 0, 1):
        for a, b in zip(seen[step], again(step), strict=True):
            assert torch.equal(a, b)
    assert not torch.equal(seen[0][0], data.Batches(load(tree).train, 6, seed=4)(0)[0])
    assert not torch.equal(seen[0][0], seen[3][0])


def test_resume_decodes_nothing_before_its_step(tree, monkeypatch):
    decoded = []
    original = files.decode
    monkeypatch.setattr(files, "decode", lambda path: decoded.append(path) or original(path))
    batches = data.Batches(load(tree).train, 5, seed=0)
    batches(1003)
    assert len(decoded) == 5
    batches(1003), batches(1004), batches(1003), batches(1004)
    assert len(decoded) == 10  # the last two are kept


def test_an_epoch_visits_every_file_once(tree):
    batches = data.Batches(load(tree).train, 5, seed=0, augment=False)
    rows = torch.cat([batches(i)[0] for i in range(4)])
    assert len({row.numpy().tobytes() for row in rows}) == 20
    labels = torch.cat([batches(i)[1] for i in range(4)])
    assert torch.bincount(labels).tolist() == [10, 10]


def test_share_reads_this_processes_rows(tree, monkeypatch):
    whole = data.Batches(load(tree).train, 6, seed=0, whole=True)(2)
    monkeypatch.setattr(run, "rows", lambda count: slice(count // 2, count))
    x, y = data.Batches(load(tree).train, 6, seed=0)(2)
    assert torch.equal(x, whole[0][3:]) and torch.equal(y, whole[1][3:])


def test_predictions_equal_those_on_tensors(tree):
    images = load(tree, workers=2).test
    tensors = images.take(slice(None))
    for a, b in zip(
        run.predict_all(Constant(), images, batch_size=3),
        run.predict_all(Constant(), tensors),
        strict=True,
    ):
        assert torch.equal(a, b)
    rows = torch.tensor([5, 1, 1])
    for part in (slice(2, 5), rows):
        for kind in (images.subset(part), images.take(part)):
            (batch,) = kind.batches(9)
            assert torch.equal(batch[0], tensors.x[part]) and torch.equal(batch[1], tensors.y[part])


def test_validation_split_stays_undecoded(tree, monkeypatch):
    monkeypatch.setattr(files, "decode", lambda path: pytest.fail("decoded"))
    loaded = load(tree, val_size=6, limit=8)
    assert torch.bincount(loaded.val.y).tolist() == [3, 3]
    assert torch.bincount(loaded.train.y).tolist() == [4, 4]
    assert not set(loaded.val.rows) & set(loaded.train.rows)


def test_logits_are_restricted_to_the_classes_of_a_subset(tree):
    """Logits of 5 classes on images of the classes 1 and 4: class 0 leads and is no choice."""
    images = load(tree).test.among([1, 4])
    images.y = 1 + 3 * images.y

    class Always(torch.nn.Module):
        def forward(self, x):
            return torch.tensor([9.0, 1, 0, 0, 2]).expand(len(x), 5)

    logits, y = run.predict_all(Always(), images)
    assert logits.shape == (8, 2) and sorted(y.tolist()) == [0] * 4 + [1] * 4
    assert run.evaluate(Always(), images)["error"] == pytest.approx(50)


def test_unreadable_files_count_where_they_are(tree, capfd):
    """A broken test file is none of the training set's, though both are named from one record."""
    loaded = load(tree, "domains")  # train and val are its domains: 80 and 20 % of each
    row = int(loaded.test.rows[2])
    cut(Path(loaded.test.listing.path(row)))
    assert len(loaded.test.take(slice(None)).y) == len(loaded.test.y) - 1
    assert loaded.train.bad.keys() == {row} and not len(loaded.train.unreadable)
    assert loaded.test.unreadable.tolist() == [2]
    rest = np.delete(np.arange(len(loaded.test.y)), 2)
    assert not len(loaded.test.subset(torch.from_numpy(rest)).unreadable)


def test_workers_leave_signals_to_the_trainer(tree):
    """A scheduler signals every process: reading goes on, and still ends when the trainer says."""
    batches = data.Batches(load(tree, workers=2).train, 5, seed=0)
    whole = data.Batches(load(tree).train, 5, seed=0)
    batches(0)
    workers = multiprocessing.active_children()
    assert len(workers) == 2
    for name in ("TERM", "INT", "USR1", "TERM"):
        subprocess.run(["kill", f"-{name}", *(str(w.pid) for w in workers)], check=True)
    for step in range(1, 30):
        assert torch.equal(batches(step)[0], whole(step)[0])
    assert all(w.is_alive() for w in workers)
    for w in workers:
        w.terminate()
        w.join(5)
    assert [w.exitcode for w in workers] == [0, 0]


def test_dead_worker_is_one_line(tree, monkeypatch):
    monkeypatch.setattr(files, "decode", lambda path: os._exit(1))
    with pytest.raises(UserError, match=r"loader: .*fewer --workers"):
        data.Batches(load(tree, workers=1).train, 5, seed=0)(0)


def test_no_more_files_is_one_line(tree, monkeypatch):
    """Too low a limit of open files is named, when workers start and when a picture is opened."""
    path = load(tree).train.listing.path(0)

    def full(*args, **options):
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(files.DataLoader, "__iter__", full)
    with pytest.raises(UserError, match=r"loader: Too many open files; fewer --workers"):
        data.Batches(load(tree, workers=2).train, 5, seed=0)(0)
    monkeypatch.setattr("builtins.open", full)
    with pytest.raises(UserError, match="Too many open files; raise the limit"):
        decode.decode(path)


@pytest.mark.parametrize("count", [1, 2])
def test_domains_of_few_images(tmp_path, count):
    """One image of two is held out; where none can be, one line says so."""
    for name in ("d1", "d2"):
        make_tree(tmp_path / name, {"a": count})
    if count == 1:
        with pytest.raises(UserError, match=r"2 images .* too few to hold some out"):
            load(tmp_path, "domains")
    else:
        loaded = load(tmp_path, "domains")
        assert len(loaded.train.y) == len(loaded.test.y) == 2


def test_sample_trees(shared):
    """Real photographs: ten classes of ImageNet, 80 and 25 of each."""
    loaded = data.load("folder", shared / "data/samples/imagenette", image_size=64, workers=0)
    assert torch.bincount(loaded.train.y).tolist() == [80] * 10
    assert torch.bincount(loaded.test.y).tolist() == [25] * 10
    assert all(trees.is_wnid(name) for name in loaded.classes)
    x, _ = data.Batches(loaded.train, 8, seed=0)(0)
    assert x.shape == (8, 3, 64, 64) and 0.2 < x.mean() < 0.8 and x.std() > 0.1


def test_speed_of_the_loader(tree, capsys):
    from eval import speed

    options = "--arch resnet8 --image-size 32 --batch-size 4 --batches 2 --workers 0,1".split()
    command = ["data", "--tree", str(tree / "train"), "--device", "cpu", *options]
    found = speed.main(speed.parse_args(command))["data"]
    assert found["files"] == 20 and len(found["listing_s"]) == 2
    assert set(found["images_per_s"]) == {
        "loader, 0 workers", "loader, 1 workers", "training step, resnet8"
    }  # fmt: skip
    assert all(v > 0 for v in found["images_per_s"].values())
    assert "20 files listed" in capsys.readouterr().out
    with pytest.raises(UserError, match="is a folder"):
        speed.main(speed.parse_args([*command, "--json", str(tree)]))
    assert "files listed" not in capsys.readouterr().out
