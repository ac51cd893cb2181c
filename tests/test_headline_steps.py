"""Every training of the headline tables, of both scales, makes a step on made-up data.

The networks, methods and options are those of the table. Images, batches and lengths are small.
"""

import csv

import numpy as np
import pictures
import pytest
import torch

from common import data
from common.data import trees
from eval import headline, headline_jobs, headline_numbers, headline_tables

SCALES = {(name, size): s for name, t in headline_tables.TABLES.items()
          for size, s in t.scales.items()}  # fmt: skip
RUNS = [(table, size, name) for (table, size), scale in SCALES.items() for name in scale.runs]
QUICK = [("question", "small", "nf"), ("nofrost", "small", "nofrost-nf-fgsm")]
EVERY = "--device cpu --workers 0 --log-every 1"
SMALL = {  # what the commands of a script get besides
    "ct.py": "--epochs 1 --teacher-epochs 1",
    "nofrost.py": "--epochs 1",
    "fixup_penalty.py": "--epochs 1 --seeds 1 --val-size 10 --corrupted-images 2",
    "bn_ablation.py": "--steps 2 --measure-every 1 --eval-every 2",
}
IMAGES = {  # {data set: its files, made up}
    "vlcs": [f"VLCS/{d}/{c}/{k}.jpg" for d in data.SETS["vlcs"].domains
             for c in data.SETS["vlcs"].classes for k in range(2)],
    "pacs": [f"PACS/{d}/{c}/{k}.jpg" for d in data.SETS["pacs"].domains
             for c in data.SETS["pacs"].classes for k in range(2)],
    "in9": [f"bg_challenge/original/{part}/{c}/{k}.JPEG" for part in ("train", "val")
            for c in trees.IN9 for k in range(2)],
    "imagenet": [f"imagenet/train/n{k:08d}/a.JPEG" for k in range(1000)]
                + [f"imagenet/val/n{k:08d}/a.JPEG" for k in range(10)],
}  # fmt: skip


def put(path, seed, side=36):
    picture = torch.randint(
        256, (3, side, side), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed)
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(pictures.encoded(picture, "JPEG"))


def make_cifar(path, classes):
    rng = np.random.default_rng(0)
    arrays = {"classes": np.array([f"class{k}" for k in range(classes)])}
    for split, count in (("train", 20), ("test", 10)):
        arrays[f"x_{split}"] = rng.integers(256, size=(count, 32, 32, 3), dtype=np.uint8)
        arrays[f"y_{split}"] = np.arange(count) % 10
    np.savez(path, **arrays)


def make_camelyon(root):
    """Six patches of each of five hospitals, as WILDS lays them out."""
    header = ["", "patient", "node", "x_coord", "y_coord", "tumor", "slide", "center", "split"]
    rows = []
    for center in range(5):
        for k in range(6):
            patient = f"{center:03d}"
            rows.append([len(rows), patient, 1, 10, k, k % 2, center, center, int(k == 5)])
            name = f"patient_{patient}_node_1/patch_patient_{patient}_node_1_x_10_y_{k}.png"
            put(root / "patches" / name, len(rows))
    with open(root / "metadata.csv", "w", newline="") as file:
        csv.writer(file).writerows([header, *rows])


@pytest.fixture(scope="module")
def made_up(tmp_path_factory):
    """A data directory with a few images of every data set of the tables."""
    root = tmp_path_factory.mktemp("data")
    make_cifar(root / "cifar10.npz", 10)
    make_cifar(root / "cifar100.npz", 100)
    make_camelyon(root / "camelyon17_v1.0")
    for names in IMAGES.values():
        for k, name in enumerate(names):
            put(root / name, k)
    return root


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """Stands for torchvision's ImageNet weights of ResNet-50."""
    from torchvision.models import resnet50

    path = tmp_path_factory.mktemp("weights") / "resnet50.pth"
    torch.save(resnet50().state_dict(), path)
    return str(path)


def shortened(job, dataset, weights):
    """The arguments of a training, with its images and its length made small."""
    words = [*job.words[1:], *SMALL[job.words[0]].split(), *EVERY.split()]
    words += ["--limit", "16" if dataset == "imagenet" else "0"]
    if "--val-size" in words:
        words += ["--val-size", "10"]
    if dataset == "gaussian":  # has one batch, of its own size
        return words
    words += ["--batch-size", "8"]
    if "--pretrained" in words:
        words.insert(words.index("--pretrained") + 1, weights)
        words += ["--image-size", "96"]  # smaller images have another first layer
    elif data.SETS[dataset].files:
        words += ["--image-size", "32"]
    return words


def train(job, scale, weights, monkeypatch):
    """Run a training, made short, in this process."""
    script = headline.script_of(job.words)
    if hasattr(script, "TUNED"):
        monkeypatch.setattr(script, "TUNED", {k: v[:1] for k, v in script.TUNED.items()})
    script.main(script.parse_args(shortened(job, scale.dataset, weights)))
    assert headline_jobs.finished(job)


@pytest.mark.parametrize(
    ("table", "size", "name"),
    [r if r in QUICK else pytest.param(*r, marks=pytest.mark.slow) for r in RUNS],
)
def test_a_step_of_every_training(table, size, name, made_up, weights, tmp_path, monkeypatch):
    """The table finds its numbers in what the training leaves."""
    scale = SCALES[table, size]
    args = headline.parse_args(
        [table, "--scale", size, "--runs", str(tmp_path), "--data-dir", str(made_up)]
    )
    job = headline_jobs.training(args, scale, name, 0)
    for need in job.needs:
        needed = headline_jobs.training(args, scale, need.removesuffix("-s0"), 0)
        train(needed, scale, weights, monkeypatch)
    train(job, scale, weights, monkeypatch)
    for row in scale.rows:
        if row.run == name:
            assert (job.product / row.file).is_file()
        for column, path in scale.columns.items():
            source = path[1] if path[0] == "100 -" else path[0]
            if source == f"run {name}" or (source == "run" and row.run == name):
                found = headline_numbers.number(args, scale, row, path, 0)
                assert found is not None, (row.title, column)


def test_every_data_set_of_the_tables_is_made_up():
    tried = {scale.dataset for scale in SCALES.values()}
    assert tried == {"cifar10", "cifar100", "camelyon17", "gaussian", *IMAGES}
