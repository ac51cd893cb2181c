"""Leave-one-domain-out from training to the table, on the four styles of shapes and on PACS."""

import json
import statistics
import sys
from pathlib import Path

import pictures
import pytest
import torch

import ct
from common import data, models, run
from common.data import trees
from common.run import UserError

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "eval"))
import domains

FAST = "--arch resnet8 --batch-size 32 --corrupted-images 0 --precision fp32 --device cpu".split()
FAST += "--dataset shapes --epochs 3 --teacher-epochs 1 --eval-every 1 --lam 0".split()


@pytest.fixture(scope="module", autouse=True)
def small_shapes():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data.sets, "SHAPES_SIZES", {"train": 160, "test": 40})
        yield


def train(out, *options):
    return ct.main(ct.parse_args([*FAST, "--out", str(out), *options]))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Every style left out once, two seeds."""
    out = tmp_path_factory.mktemp("domains")
    found = [train(out / str(s), "--test-domain", "all", "--seed", str(s)) for s in (0, 1)]
    return out, found


def tabulate(*paths, out):
    return domains.main(domains.parse_args([*map(str, paths), "--json", str(out)]))


def test_each_domain_is_left_out_once(finished):
    out, found = finished
    names = ["filled", "outline", "textured", "inverted"]
    assert set(found[0]) == {f"error/student/{n}" for n in names}
    assert sorted(p.name for p in (out / "0").iterdir()) == sorted(names)
    args = json.loads((out / "1" / "outline" / "args.json").read_text())
    assert args["test_domain"] == "outline" and args["seed"] == 1


def test_training_domains_choose_the_epoch(tmp_path):
    """best.pt has the least error on held-out images of the training domains, and its network is
    the one whose error on the domain left out is reported."""
    folder = tmp_path / "a"
    final = train(folder, "--test-domain", "textured", "--lam", "1")
    for stage, file in (("student", "best.pt"), ("baseline", "baseline-best.pt")):
        checkpoint = run.load_checkpoint(folder / file)
        lines = [json.loads(x) for x in (folder / "log.jsonl").read_text().splitlines()]
        evals = [x["eval"]["error"] for x in lines if x.get("stage") == stage]
        assert len(evals) == 3 and checkpoint["metrics"]["error"] == min(evals)
        assert checkpoint["step"] == (evals.index(min(evals)) + 1) * 3
        loaded = data.load("shapes", test_domain="textured")
        model = models.from_checkpoint(checkpoint)
        assert run.evaluate(model, loaded.val)["error"] == pytest.approx(min(evals))
        error = run.evaluate(model, loaded.test)["error"]
        assert final[f"error/{stage}"] == pytest.approx(error)


def test_table_averages_domains_then_seeds(finished, tmp_path):
    out, found = finished
    output = tabulate(out, out=tmp_path / "d.json")
    header, *rows = output["table"]
    assert header == ["accuracy %", "filled", "inverted", "outline", "textured", "average", "seeds"]
    assert [row[-1] for row in rows] == [2]
    row = rows[0]
    per_seed = [
        statistics.mean(100 - f[f"error/student/{name}"] for name in header[1:-2]) for f in found
    ]
    assert row[-2] == f"{statistics.mean(per_seed):.2f} +- {statistics.stdev(per_seed):.2f}"
    values = [100 - f["error/student/outline"] for f in found]
    assert row[3] == f"{statistics.mean(values):.2f} +- {statistics.stdev(values):.2f}"
    assert json.loads((tmp_path / "d.json").read_text())["table"] == output["table"]


def test_a_missing_run_leaves_its_seed_out_of_the_average(finished, tmp_path):
    out, found = finished
    runs = [out / "0", out / "1" / "outline"]
    _, row = tabulate(*runs, out=tmp_path / "d.json")["table"]
    mean = statistics.mean(100 - v for k, v in found[0].items() if k.startswith("error/student"))
    assert row[-2] == f"{mean:.2f}" and "+-" in row[3] and "+-" not in row[1]


def test_seeds_of_other_machines_and_versions_are_one_row():
    """As a table of eval/tables.py has them: by what was trained, not by how."""
    facts = dict.fromkeys(("trained_on", "method", "stage", "arch", "norm"), "x")
    facts |= {"dataset": "pacs", "accuracy": {"photo": 50.0}, "test_domain": "photo"}
    own = [{"compile": True, "policy": "none"}, {"compile": None, "probe_images": 5}, {"lr": 9}]
    entries = [facts | {"seed": i, "options": {"seed": i} | o} for i, o in enumerate(own)]
    _, rows = domains.tabulate(entries)
    assert [row[-1] for row in rows] == [2, 1]


def test_one_domain_and_resume(finished, tmp_path):
    """A single domain gives that domain's run; going on with a finished run changes nothing."""
    _, found = finished
    alone = train(tmp_path / "one", "--test-domain", "inverted")
    same = {k: found[0][f"{k}/inverted"] for k in alone}
    assert alone == pytest.approx(same)
    again = train(tmp_path / "one", "--resume", str(tmp_path / "one"))
    assert again == pytest.approx(alone)


def test_refused(finished, tmp_path):
    with pytest.raises(UserError, match="no checkpoints there"):
        tabulate(tmp_path, out=tmp_path / "d.json")
    train(tmp_path / "plain")
    with pytest.raises(UserError, match="left no domain out"):
        tabulate(tmp_path / "plain", out=tmp_path / "d.json")
    out, _ = finished
    with pytest.raises(UserError, match="a second result for outline"):
        copy = tmp_path / "copy.pt"
        copy.write_bytes((out / "0" / "outline" / "best.pt").read_bytes())
        tabulate(out / "0" / "outline", copy, out=tmp_path / "d.json")


def test_pacs_sample(shared, tmp_path):
    root = str(shared / "data" / "samples")
    options = ["--dataset", "pacs", "--data-dir", root, "--image-size", "32", "--workers", "0"]
    final = train(tmp_path / "p", *options, "--test-domain", "photo", "--epochs", "1")
    output = domains.main(
        domains.parse_args([str(tmp_path / "p"), "--data-dir", root, "--workers", "0"])
    )
    (entry,) = output["checkpoints"]
    assert entry["accuracy"]["photo"] == pytest.approx(100 - final["error/student"])
    assert entry["images"] == {"photo": 112}


# --- IN-9 -----------------------------------------------------------------------------------------


def test_groups_of_in9():
    """As many ImageNet classes in each as the challenge's list has, no class in two."""
    groups = trees.in9_of_imagenet()
    assert torch.bincount(groups).tolist() == [116, 52, 42, 36, 35, 27, 26, 20, 16, 630]
    for index, group in ((207, 0), (22, 1), (751, 2), (39, 3), (291, 4), (310, 5), (402, 6)):
        assert groups[index] == group  # retriever, eagle, racer, iguana, lion, beetle, guitar
    assert groups[[366, 0, 999, 281]].tolist() == [7, 8, 9, 9]  # gorilla, tench, paper, tabby


def test_imagenet_networks_on_in9(tmp_path, capsys):
    """Right is an answer among the classes joined; answers outside of all nine are wrong."""
    rng = torch.Generator().manual_seed(0)
    for name in ("original", "mixed_same", "mixed_rand"):
        for folder in trees.IN9:
            (tmp_path / "bg_challenge" / name / "val" / folder).mkdir(parents=True)
            x = torch.randint(256, (3, 32, 32), dtype=torch.uint8, generator=rng)
            pictures.write(x, tmp_path / "bg_challenge" / name / "val" / folder / "a.png")
    torch.manual_seed(0)
    model = models.build("resnet8", "bn", num_classes=1000).eval()
    with torch.no_grad():
        model.fc.weight *= 30
    state = model.spec | {"dataset": "imagenet", "model": model.state_dict(), "method": "ct"}
    run.save_checkpoint(tmp_path / "last.pt", state)
    options = ["--data-dir", str(tmp_path), "--workers", "0", "--device", "cpu"]
    output = domains.main(domains.parse_args([str(tmp_path / "last.pt"), *options]))
    (entry,) = output["checkpoints"]
    groups, found = trees.in9_of_imagenet(), []
    for name in ("in9", "in9-mixed-same", "in9-mixed-rand"):
        images = trees.read_in9_test(name, tmp_path, 32, {"workers": 0})
        x, y = images.take(slice(None))
        found.append(100 * (groups[run.predict(model, x).argmax(1)] == y).double().mean().item())
    values = [entry["accuracy"][k] for k in ("original", "mixed-same", "mixed-rand", "BG-gap")]
    assert values == pytest.approx([*found, found[1] - found[2]])
    assert entry["trained_on"] == "imagenet" and output["dataset"] == "in9"
    assert "9 images; the whole set has 4050" in capsys.readouterr().err


def test_in9_images_are_not_cropped(tmp_path):
    """The released files have 224 pixels and the authors' code takes them as they are."""
    folder = tmp_path / "bg_challenge/original/val/00_dog"
    folder.mkdir(parents=True)
    x = torch.randint(256, (3, 224, 224), dtype=torch.uint8)
    pictures.write(x, folder / "a.png")
    images = trees.read_in9_test("in9", tmp_path, 224, {"workers": 0})
    assert torch.equal(images.take(slice(None)).x[0], x)


# --- ImageNet weights -----------------------------------------------------------------------------


def imagenet_weights(path, arch="resnet18"):
    """A file as torchvision's, with statistics that are not those of a fresh network."""
    from torchvision.models import get_model

    torch.manual_seed(3)
    theirs = get_model(arch)
    with torch.no_grad():
        for name, value in theirs.state_dict().items():
            if "running_mean" in name or name.endswith("bias"):
                value.normal_(std=0.1)
            elif "running_var" in name or name.endswith(("bn1.weight", "bn2.weight")):
                value.uniform_(0.5, 1.5)
    torch.save(theirs.state_dict(), path)
    return theirs.eval()


@pytest.mark.parametrize("norm", ["bn", "none"])
def test_pretrained_backbone_equals_torchvisions(tmp_path, norm):
    theirs = imagenet_weights(tmp_path / "w.pth")
    model = models.build("resnet18", norm, 5, 96, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    head = model.fc.weight.clone()
    models.load_pretrained(model, tmp_path / "w.pth")
    theirs.fc = torch.nn.Identity()
    x = torch.rand(2, 3, 96, 96)
    model.eval()
    torch.testing.assert_close(model.features(x), theirs(model.normalize(x)), rtol=1e-4, atol=1e-5)
    assert torch.equal(model.fc.weight, head)


def test_pretrained_refusals(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(UserError, match=r"no .*resnet18.*\.pth; put https://.* there"):
        models.load_pretrained(models.build("resnet18", "bn", 5, 96), "torchvision")
    with pytest.raises(UserError, match="norm bn or none, not resnet8, bn"):
        models.load_pretrained(models.build("resnet8", "bn", 5, 96), "torchvision")
    imagenet_weights(tmp_path / "w.pth")
    with pytest.raises(UserError, match="resnet18 for this image size differs"):
        models.load_pretrained(models.build("resnet18", "bn", 5, 32), tmp_path / "w.pth")
