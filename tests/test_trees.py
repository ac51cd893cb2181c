"""The named trees in the layouts they are released in, small; what is missing is said."""

import csv
import re
import shutil

import numpy as np
import pictures
import pytest
import torch

from common import data, run
from common.data import trees
from common.run import UserError

JPEG = pictures.encoded(torch.randint(256, (3, 24, 24), dtype=torch.uint8), "JPEG")
WNIDS = [f"n{k:08d}" for k in range(1000, 2000)]


def put(root, *names, content=JPEG):
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)


def load(name, root, **options):
    return data.load(name, root, **{"image_size": 16, "workers": 0} | options)


@pytest.fixture(scope="module")
def imagenet(tmp_path_factory):
    """One training image of each of 1000 classes, two validation images in a flat folder."""
    root = tmp_path_factory.mktemp("data")
    put(root / "imagenet/train", *(f"{w}/{w}_1.JPEG" for w in WNIDS))
    put(root / "imagenet/val", *(f"ILSVRC2012_val_0000000{k}.JPEG" for k in (1, 2)))
    return root


# --- ImageNet -------------------------------------------------------------------------------------


def test_imagenet_val_without_class_folders(imagenet, tmp_path, capsys):
    truth = imagenet / "imagenet" / "LOC_val_solution.csv"
    with pytest.raises(UserError, match=r"no class folders, and no LOC_val_solution\.csv or val"):
        load("imagenet", imagenet)
    lines = [f"ILSVRC2012_val_00000002,{WNIDS[7]} 1 2 3 4 {WNIDS[7]} 5 6 7 8"]
    truth.write_text("\n".join(["ImageId,PredictionString", *lines]))
    with pytest.raises(UserError, match="no label for 1 files, as ILSVRC2012_val_00000001"):
        load("imagenet", imagenet)
    lines.append(f"ILSVRC2012_val_00000001,{WNIDS[999]} 1 2 3 4")
    truth.write_text("\n".join(["ImageId,PredictionString", *lines]))
    loaded = load("imagenet", imagenet)
    names = [loaded.test.listing.name(r).decode() for r in loaded.test.rows]
    assert dict(zip(names, loaded.test.y.tolist(), strict=True)) == {
        "ILSVRC2012_val_00000001.JPEG": 999, "ILSVRC2012_val_00000002.JPEG": 7,
    }  # fmt: skip
    assert loaded.classes == WNIDS and loaded.train.y.tolist() == list(range(1000))
    err = capsys.readouterr().err
    assert "imagenet train: 1000 images; the whole set has 1281167" in err
    truth.unlink()
    caffe = imagenet / "imagenet" / "val.txt"
    caffe.write_text("ILSVRC2012_val_00000001.JPEG 65\nILSVRC2012_val_00000002.JPEG 970\n")
    assert sorted(load("imagenet", imagenet).test.y.tolist()) == [65, 970]
    caffe.unlink()


def test_imagenet_needs_all_classes(tmp_path):
    put(tmp_path / "imagenet/train", *(f"{w}/a.JPEG" for w in WNIDS[:10]))
    with pytest.raises(UserError, match=r"10 class folders, ImageNet has 1000.*--dataset folder"):
        load("imagenet", tmp_path)
    with pytest.raises(UserError, match=r"imagenet: no .*comes from image-net\.org"):
        load("imagenet", tmp_path / "nothing")


def test_imagenet_a_is_scored_among_its_classes(imagenet, capsys):
    own = [WNIDS[k] for k in (3, 500, 998)]
    put(imagenet / "imagenet-a", *(f"{w}/{k}.jpg" for w in own for k in range(2)), "README.txt")
    loaded = load("imagenet-a", imagenet)
    assert loaded.test.only.tolist() == [3, 500, 998] and len(loaded.classes) == 1000
    assert torch.bincount(loaded.test.y).nonzero().flatten().tolist() == [3, 500, 998]
    err = capsys.readouterr().err
    assert "3 classes; the whole set has 200" in err and "6 images; the whole set has 7500" in err
    logits = torch.zeros(6, 1000)
    logits[:, 4] = 9.0  # a class that the subset does not have
    logits[torch.arange(6), loaded.test.y] = 1.0
    assert run.evaluate(Given(logits), loaded.test)["error"] == 0


def test_imagenet_r_with_an_unknown_class(imagenet):
    put(imagenet / "imagenet-r", "n99999999/a.jpg")
    with pytest.raises(UserError, match="1 class folders are not among the 1000 classes: n9999"):
        load("imagenet-r", imagenet)


def test_classes_without_the_training_tree(tmp_path, imagenet):
    with pytest.raises(UserError, match="1000 WordNet ids are needed"):
        trees.imagenet_classes(tmp_path)
    assert trees.imagenet_classes(imagenet) == WNIDS
    lines = [f"{w} a name, another" for w in reversed(WNIDS)]
    (tmp_path / "LOC_synset_mapping.txt").write_text("\n".join(lines))
    assert trees.imagenet_classes(tmp_path) == WNIDS
    (tmp_path / "LOC_synset_mapping.txt").write_text("\n".join(lines[1:]))
    with pytest.raises(UserError, match="not 1000 lines"):
        trees.imagenet_classes(tmp_path)


@pytest.mark.parametrize("group", ["", "weather/"])
def test_imagenet_c_pools_its_sets(imagenet, tmp_path, group):
    """With and without the folders of its archives; the files as they are, never cropped again."""
    (tmp_path / "imagenet").symlink_to(imagenet / "imagenet")
    kinds = [f"{group}{c}/{s}/{WNIDS[9]}/a.JPEG" for c in ("fog", "snow") for s in (1, 5)]
    picture = torch.randint(256, (3, 224, 224), dtype=torch.uint8)
    put(tmp_path / "imagenet-c", *kinds, content=pictures.encoded(picture, "PNG"))
    loaded = load("imagenet-c", tmp_path, image_size=None)
    assert loaded.test.y.tolist() == [9] * 4
    assert torch.equal(loaded.test.take(slice(0, 1)).x[0], picture)
    with pytest.raises(UserError, match="its files have 224 pixels, not 16"):
        load("imagenet-c", tmp_path)
    put(tmp_path / "imagenet-c", kinds[0])
    with pytest.raises(UserError, match="24x24 pixels, where 224x224 are expected"):
        load("imagenet-c", tmp_path, image_size=None).test.take(slice(None))


class Given(torch.nn.Module):
    """A network that has its logits."""

    def __init__(self, logits):
        super().__init__()
        self.logits = logits

    def forward(self, x):
        return self.logits


class Fixed(torch.nn.Module):
    """Logits that rise with the number of the class, as a network of an evaluation."""

    def __init__(self, classes, size=16):
        super().__init__()
        self.spec = {"num_classes": classes, "image_size": size}
        self.scale = torch.nn.Parameter(torch.ones(()))

    def forward(self, x):
        return torch.arange(self.spec["num_classes"]).expand(len(x), -1) * self.scale


def networks(classes, *options):
    facts = {"method": "ct", "checkpoint": "x"}
    return [(str(k), Fixed(classes), facts | {"options": o}) for k, o in enumerate(options)]


def test_attacked_networks_are_restricted_to_the_subset(imagenet, tmp_path):
    """imagenet-r has 200 of the classes; an attack may not move an image to another one."""
    (tmp_path / "imagenet").symlink_to(imagenet / "imagenet")
    put(tmp_path / "imagenet-r", *(f"{WNIDS[k]}/{k}.jpg" for k in (3, 70, 500)))
    found = networks(1000, {})
    x, y, _, _ = data.for_evaluation("imagenet-r", found, tmp_path, 0)
    (_, model, _) = found[0]
    assert sorted(y.tolist()) == [0, 1, 2] and model.spec["num_classes"] == 3
    assert model(x.float()).tolist() == [[3, 70, 500]] * 3


def test_networks_are_tested_on_what_they_did_not_see(shared):
    """Pooled domains: the 20 % that the network's own seed held out, not those of seed 0."""
    root = shared / "data" / "samples"
    for options in ({"seed": 1}, {"seed": 1, "test_domain": "sketch"}):
        own = load("pacs", root, **options)
        found = networks(7, options, options)
        x, y, _, total = data.for_evaluation("pacs", found, root, 0)
        assert total == len(own.test.y) and torch.equal(y, own.test.y)
        assert torch.equal(x, own.test.take(slice(None)).x)
    with pytest.raises(UserError, match="different test images"):
        data.for_evaluation("pacs", networks(7, {"seed": 0}, {"seed": 1}), root, 0)
    same = networks(10, {"seed": 0}, {"seed": 1})
    assert data.test_options("shapes", same) == {"test_domain": None}


def test_tiny_imagenet(tmp_path):
    root = tmp_path / "tiny-imagenet-200"
    put(root, *(f"train/{w}/images/{w}_{k}.JPEG" for w in WNIDS[:3] for k in range(4)))
    put(root, *(f"val/images/val_{k}.JPEG" for k in range(3)), "test/images/test_0.JPEG")
    (root / "wnids.txt").write_text("\n".join(reversed(WNIDS[:3])))
    with pytest.raises(UserError, match=r"tiny-imagenet: no .*val_annotations\.txt"):
        load("tiny-imagenet", tmp_path)
    lines = [f"val_{k}.JPEG\t{WNIDS[2 - k]}\t0\t0\t62\t62" for k in range(3)]
    (root / "val" / "val_annotations.txt").write_text("\n".join(lines))
    loaded = load("tiny-imagenet", tmp_path)
    assert loaded.train.x.shape == (12, 3, 16, 16) and loaded.train.x.dtype == torch.uint8
    assert torch.bincount(loaded.train.y).tolist() == [4] * 3
    assert sorted(loaded.test.y.tolist()) == [0, 1, 2]
    with pytest.raises(UserError, match="24x24 pixels, where 64x64 are expected"):
        load("tiny-imagenet", tmp_path, image_size=None)
    annotations = root / "val" / "val_annotations.txt"
    annotations.write_text("\n".join([*lines, "", ""]))
    assert len(load("tiny-imagenet", tmp_path).test.y) == 3
    annotations.write_text("\n".join([*lines, f"x.JPEG {WNIDS[9]}"]))
    with pytest.raises(UserError, match=rf"{WNIDS[9]} of x\.JPEG is not in wnids\.txt"):
        load("tiny-imagenet", tmp_path)
    annotations.write_text("\n".join(lines))
    shutil.rmtree(root / "train" / WNIDS[1])
    with pytest.raises(UserError, match=f"{WNIDS[1]}: a class without images"):
        load("tiny-imagenet", tmp_path)


# --- others ---------------------------------------------------------------------------------------


def test_backgrounds_challenge(tmp_path):
    names = trees.IN9
    root = tmp_path / "bg_challenge"
    put(root, *(f"original/val/{n}/a.JPEG" for n in names))
    with pytest.raises(UserError, match=r"in9: no .*original/train.*backgrounds_challenge"):
        load("in9", tmp_path)
    put(root, *(f"original/train/{n}/{k}.JPEG" for n in names[1:] for k in range(2)))
    put(root, "original/val/00_dog/b.JPEG")
    with pytest.raises(UserError, match="00_dog"):
        load("in9", tmp_path)
    put(root, *(f"original/train/{names[0]}/{k}.JPEG" for k in range(2)))
    (root / "original/val/00_dog/b.JPEG").unlink()
    assert load("in9", tmp_path).test.y.sort().values.tolist() == list(range(9))
    with pytest.raises(UserError, match=r"in9-mixed-rand: no .*mixed_rand/val"):
        load("in9-mixed-rand", tmp_path)
    put(root, *(f"mixed_rand/val/{n}/a.JPEG" for n in names))
    assert len(load("in9-mixed-rand", tmp_path).train) == 18


def test_cifar101(tmp_path):
    rng = np.random.default_rng(0)
    x, y = rng.integers(256, size=(60, 32, 32, 3), dtype=np.uint8), np.arange(60) % 10
    np.savez(tmp_path / "cifar10.npz", x_train=x, y_train=y, x_test=x, y_test=y)
    with pytest.raises(UserError, match=r"cifar10\.1: no .*modestyachts"):
        data.load("cifar10.1", tmp_path)
    for version, count in (("v4", 2021), ("v6", 2000)):
        images = rng.integers(256, size=(count, 32, 32, 3), dtype=np.uint8)
        np.save(tmp_path / f"cifar10.1_{version}_data.npy", images)
        np.save(tmp_path / f"cifar10.1_{version}_labels.npy", np.arange(count) % 10)
        loaded = data.load("cifar10.1", tmp_path)
        assert len(loaded.test) == count and len(loaded.train.y) == 60
    for bad in (255, -1, 10):
        np.save(tmp_path / "cifar10.1_v6_labels.npy", np.where(np.arange(2000) == 7, bad, 1))
        with pytest.raises(UserError, match=r"v6_labels.npy: the labels are .* 10 classes"):
            data.load("cifar10.1", tmp_path)
    np.save(tmp_path / "cifar10.1_v6_labels.npy", np.arange(5))
    with pytest.raises(UserError, match="labels"):
        data.load("cifar10.1", tmp_path)


# --- domains --------------------------------------------------------------------------------------


def test_vlcs_sample_names_its_holes(shared, capsys):
    root = shared / "data" / "samples"
    loaded = load("vlcs", root, test_domain="SUN09")
    err = capsys.readouterr().err
    assert "VOC2007 is missing" in err and "LabelMe has no images of person" in err
    assert "SUN09 has 55 images; the whole set has 3282" in err
    assert loaded.classes == ["bird", "car", "chair", "dog", "person"]
    assert (len(loaded.train.y), len(loaded.val.y), len(loaded.test.y)) == (106, 26, 55)
    assert torch.bincount(loaded.test.y).tolist() == [8, 9, 4, 19, 15]
    with pytest.raises(UserError, match="--test-domain VOC2007: vlcs has Caltech101, LabelMe, SUN"):
        load("vlcs", root, test_domain="VOC2007")
    assert data.domain_names("vlcs", root) == ["Caltech101", "LabelMe", "SUN09"]


def test_left_out_domain_is_not_trained_on(shared):
    root = shared / "data" / "samples"
    seen = {}
    for part in ("train", "val", "test"):
        files = getattr(load("pacs", root, test_domain="sketch"), part)
        seen[part] = {files.listing.path(row) for row in files.rows}
    assert len(seen["test"]) == 112 and all("/sketch/" in p for p in seen["test"])
    assert not any("/sketch/" in p for p in seen["train"] | seen["val"])
    assert not seen["train"] & seen["val"] and len(seen["train"] | seen["val"]) == 336
    for domain in ("art_painting", "cartoon", "photo"):  # 20 % of each, not of the pool
        assert sum(f"/{domain}/" in p for p in seen["val"]) == 22
    other = load("pacs", root, test_domain="sketch", seed=1)
    assert {other.val.listing.path(r) for r in other.val.rows} != seen["val"]


def test_pooled_domains(shared):
    loaded = load("pacs", shared / "data" / "samples")
    assert (len(loaded.train.y), loaded.val, len(loaded.test.y)) == (360, None, 88)


def test_own_domains(tmp_path):
    names = [f"{d}/{c}/{k}.jpg" for d in ("day", "night") for c in "ab" for k in range(5)]
    put(tmp_path, *names, "night/c/0.jpg")
    loaded = load("domains", tmp_path, test_domain="night")
    assert loaded.classes == ["a", "b", "c"] and torch.bincount(loaded.test.y).tolist() == [5, 5, 1]
    assert len(loaded.train.y) == 8 and len(loaded.val.y) == 2
    with pytest.raises(UserError, match="two domains or more"):
        load("domains", tmp_path / "day" / "a")


def test_shapes_styles(monkeypatch):
    monkeypatch.setattr(data.sets, "SHAPES_SIZES", {"train": 400, "test": 40})
    loaded = data.load("shapes", test_domain="outline")
    assert (len(loaded.train.y), len(loaded.val.y), len(loaded.test.y)) == (240, 60, 100)
    with pytest.raises(UserError, match="--test-domain dotted: shapes has filled, outline"):
        data.load("shapes", test_domain="dotted")


@pytest.fixture
def camelyon(tmp_path):
    """Two patches of each hospital, labels 0 and 1; the column's split is wrong for 1 and 2."""
    root = tmp_path / "camelyon17_v1.0"
    header = ["", "patient", "node", "x_coord", "y_coord", "tumor", "slide", "center", "split"]
    rows = []
    for center in range(5):
        for tumor in range(2):
            patient, split = f"{center:03d}", int(center == 4 and tumor)
            rows.append([len(rows), patient, 1, 10, 20 + tumor, tumor, center, center, split])
            x = torch.full((3, 96, 96), 40 * center + tumor, dtype=torch.uint8)
            name = f"patient_{patient}_node_1/patch_patient_{patient}_node_1_x_10_y_{20 + tumor}"
            put(root / "patches", f"{name}.png", content=pictures.encoded(x, "PNG"))
    with open(root / "metadata.csv", "w", newline="") as file:
        csv.writer(file).writerows([header, *rows])
    return tmp_path


def values(images):
    return sorted(images.take(slice(None)).x[:, 0, 0, 0].tolist())


def test_camelyon17_official_splits(camelyon, capsys):
    loaded = load("camelyon17", camelyon, image_size=None)
    assert loaded.image_size == 96 and loaded.classes == ["normal", "tumor"]
    assert values(loaded.train) == [0, 1, 120, 121, 160]  # hospitals 0, 3, 4 without id_val
    assert values(loaded.val) == [40, 41] and values(loaded.test) == [80, 81]
    few = loaded.test.take(slice(None))
    assert (few.x[:, 0, 0, 0] % 2).tolist() == few.y.tolist()
    assert "10 patches; the whole set has 455954" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("column", "value", "text"),
    [
        (5, 255, "tumor is '255', expected 0 to 1"), (5, -1, "tumor is '-1'"), (5, "", "tumor is"),
        (7, 5, "center is '5', expected 0 to 4"), (8, "x", "split is 'x', expected 0 to 3"),
        (None, None, "is there twice"),
    ],
)  # fmt: skip
def test_camelyon17_table_that_is_damaged(camelyon, column, value, text):
    """Sentinels, what is no number, and a patch that would count twice."""
    path = camelyon / "camelyon17_v1.0" / "metadata.csv"
    rows = list(csv.reader(path.read_text().splitlines()))
    if column is None:
        rows.append(rows[3])
    else:
        rows[3][column] = value
    with open(path, "w", newline="") as file:
        csv.writer(file).writerows(rows)
    with pytest.raises(UserError, match=text):
        load("camelyon17", camelyon)


def test_camelyon17_held_out_parts_are_mixed(camelyon, monkeypatch):
    plain = load("camelyon17", camelyon, image_size=None)
    monkeypatch.setattr(data.sets, "shuffled", lambda n: torch.arange(n).flip(0))
    turned = load("camelyon17", camelyon, image_size=None)
    for part in ("val", "test"):
        a, b = (getattr(d, part) for d in (plain, turned))
        assert values(a) == values(b) and b.rows.tolist() == sorted(b.rows)[::-1]


def test_camelyon17_without_a_hospital(camelyon):
    root = camelyon / "camelyon17_v1.0"
    for patch in (root / "patches").rglob("*patient_004*.png"):
        patch.unlink()
    loaded = load("camelyon17", camelyon, test_domain="hospital3")
    assert len(loaded.train.y) + len(loaded.val.y) == 6
    with pytest.raises(UserError, match="--test-domain hospital4: no images of it in"):
        load("camelyon17", camelyon, test_domain="hospital4")


def test_camelyon17_leave_one_out(camelyon):
    loaded = load("camelyon17", camelyon, test_domain="hospital3")
    assert values(loaded.test) == [120, 121] and len(loaded.train.y) + len(loaded.val.y) == 8


def test_camelyon17_missing_parts(camelyon, capsys):
    root = camelyon / "camelyon17_v1.0"
    patch = next((root / "patches").rglob("*x_10_y_21.png"))
    patch.unlink()
    load("camelyon17", camelyon)
    assert re.search(rf"1 patches are missing, as {patch.name}", capsys.readouterr().err)
    table = (root / "metadata.csv").read_text().replace("center", "hospital")
    (root / "metadata.csv").write_text(table)
    with pytest.raises(UserError, match="no column center"):
        load("camelyon17", camelyon)


@pytest.mark.parametrize(
    "name", [n for n in data.NAMES if data.SETS[n].files and data.SETS[n].source]
)
def test_absent_sets_say_where_they_come_from(tmp_path, name, imagenet):
    if name != "imagenet":
        (tmp_path / "imagenet").symlink_to(imagenet / "imagenet")
    with pytest.raises(UserError, match=r"it comes from .*, unpacked there"):
        load(name, tmp_path)


def test_options_that_do_not_fit(tmp_path):
    with pytest.raises(UserError, match="cifar10 has 32 pixels"):
        data.load("cifar10", tmp_path, image_size=64)
    with pytest.raises(UserError, match="cifar10 has no domains; shapes, vlcs"):
        data.load("cifar10", tmp_path, test_domain="x")
    with pytest.raises(UserError, match="with --test-domain it is 20 %"):
        data.load("shapes", tmp_path, test_domain="filled", val_size=3)
    with pytest.raises(UserError, match=r"all: ct\.py trains one network for each"):
        data.load("shapes", tmp_path, test_domain="all")
