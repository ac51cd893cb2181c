"""eval/corruptions.py: from a checkpoint to a table, on generated and released images."""

import importlib.util
import json
import subprocess
import sys

import numpy as np
import pytest
import torch

from common import corruptions, data, models, run
from common.run import UserError

SCRIPT = run.ROOT / "eval" / "corruptions.py"


def load_script():
    spec = importlib.util.spec_from_file_location("eval_corruptions", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


script = load_script()


def checkpoint(path, seed=0, norm="bn", dataset="cifar10", classes=10, size=32, **options):
    torch.manual_seed(seed)
    model = models.build("resnet8", norm, num_classes=classes, image_size=size)
    state = model.spec | {"dataset": dataset, "model": model.state_dict()}
    path.parent.mkdir(parents=True, exist_ok=True)
    options = {"seed": seed, "dataset": dataset} | options
    run.save_checkpoint(path, state | {"method": "ct", "args": options})
    return model.eval()


@pytest.fixture
def folder(tmp_path):
    """A data directory with a small cifar10.npz."""
    rng = np.random.default_rng(0)
    x = rng.integers(256, size=(40, 32, 32, 3), dtype=np.uint8)
    y = np.arange(40) % 10
    np.savez(tmp_path / "cifar10.npz", x_train=x, y_train=y, x_test=x[:20], y_test=y[:20])
    return tmp_path


def evaluate(folder, *options):
    out = ["--data-dir", str(folder), "--json", str(folder / "out.json"), "--device", "cpu"]
    out.append("--overwrite")
    result = script.main(script.parse_args([*out, *map(str, options)]))
    assert json.loads((folder / "out.json").read_text()) == result
    return result


def test_numbers_are_those_of_the_parts(folder, capsys):
    """Errors equal run.evaluate on corruptions.corrupt; the mean is over the 15 and no other."""
    model = checkpoint(folder / "r" / "last.pt")
    result = evaluate(folder, folder / "r" / "last.pt")
    test = data.load("cifar10", folder).test
    entry = result["checkpoints"][0]
    assert entry["clean"] == run.evaluate(model, test)
    x = corruptions.corrupt(test.x, "fog", 4, seed=0, data_dir=str(folder))
    assert entry["error"]["fog"][3] == run.evaluate(model, test.changed(x))["error"]
    assert list(entry["error"]) == corruptions.NAMES + corruptions.EXTRA
    fifteen = [e for name in corruptions.NAMES for e in entry["error"][name]]
    assert len(fifteen) == 75
    assert entry["mean_corruption_error"] == pytest.approx(sum(fifteen) / 75)
    four = [e for name in corruptions.EXTRA for e in entry["error"][name]]
    assert entry["extra_error"] == pytest.approx(sum(four) / 20)
    text = capsys.readouterr().out
    assert "generated (seed 0), frost: procedural" in text and "mean (15 x 5)" in text
    assert "ECE mean (15 x 5)" in text
    assert "mCE" not in text and "nan" not in text


def test_side_by_side_and_subsets(folder, capsys):
    checkpoint(folder / "a" / "last.pt", 0)
    checkpoint(folder / "b" / "baseline.pt", 1, "none")
    options = ["--corruptions", "fog,contrast", "--severities", "5,1", "--limit", "10"]
    result = evaluate(folder, folder / "a", folder / "b" / "baseline.pt", *options)
    assert result["images"] == 10 and result["severities"] == [1, 5]
    assert [c["norm"] for c in result["checkpoints"]] == ["bn", "none"]
    assert set(result["checkpoints"][1]["error"]) == {"fog", "contrast"}
    header = capsys.readouterr().out.split("\n")[1].split()
    assert header == ["corruption", "a", "b/baseline"]


def test_limit_does_not_change_an_image(folder):
    """Corruption noise belongs to the image's index in the test set, not to the subset."""
    test = data.load("cifar10", folder).test
    rows = data.stratified_split(test.y, 10, 0, "--limit")[1]
    whole = corruptions.corrupt(test.x, "gaussian_noise", 2, seed=0)
    assert torch.equal(corruptions.corrupt(test.x[rows], "gaussian_noise", 2, index=rows),
                       whole[rows])  # fmt: skip


def release(folder, names, change=None):
    """The official layout, from the engine: (5N,32,32,3) and labels.npy."""
    test = data.load("cifar10", folder).test
    out = folder / "CIFAR-10-C"
    out.mkdir()
    for name in names:
        x = torch.cat([corruptions.corrupt(test.x, name, s, seed=7) for s in range(1, 6)])
        np.save(out / f"{name}.npy", x.permute(0, 2, 3, 1).numpy())
    np.save(out / "labels.npy", np.tile(test.y.numpy(), 5))
    return out


def test_released_arrays_are_read(folder, capsys):
    checkpoint(folder / "r" / "last.pt")
    out = release(folder, ["gaussian_noise"])
    options = ["--corruptions", "gaussian_noise"]
    released = evaluate(folder, folder / "r", *options)
    assert f"released arrays in {out}" in released["source"]
    generated = evaluate(folder, folder / "r", *options, "--generate", "--seed", "7")
    for key in ("error", "ece"):
        assert released["checkpoints"][0][key] == generated["checkpoints"][0][key]
    some = evaluate(folder, folder / "r", *options, "--limit", "10")
    assert some["images"] == 10


@pytest.mark.parametrize(
    ("damage", "text"),
    [
        (lambda p: (p / "fog.npy").unlink(), "no fog; complete it"),
        (lambda p: (p / "fog.npy").write_bytes((p / "fog.npy").read_bytes()[:900]), "truncated"),
        (lambda p: np.save(p / "fog.npy", np.zeros((100, 32, 32, 3))), "expected"),
        (lambda p: np.save(p / "fog.npy", np.zeros((99, 32, 32, 3), np.uint8)), "expected"),
        (lambda p: np.save(p / "fog.npy", np.zeros((100, 32, 32, 3), np.uint16)), "expected uint8"),
        (lambda p: np.save(p / "fog.npy", np.zeros((100, 64, 64, 3), np.uint8)), "32 pixels"),
        (lambda p: np.save(p / "fog.npy", np.zeros((100, 32, 31, 3), np.uint8)), "32 pixels"),
        (lambda p: np.save(p / "labels.npy", np.arange(100)), "five equal blocks"),
        (lambda p: np.save(p / "fog.npy", np.array([None])), "truncated or not a .npy array"),
        (lambda p: np.save(p / "labels.npy", np.full(100, -1)), "labels are -1 to -1, where 10"),
        (lambda p: np.save(p / "labels.npy", np.full(100, 255, np.uint8)), "labels are 255 to"),
        (lambda p: np.save(p / "labels.npy", np.full(100, 2**63, np.uint64)), "labels are -9"),
        (
            lambda p: [np.save(p / "labels.npy", np.zeros(50, int)),
                       np.save(p / "fog.npy", np.zeros((50, 32, 32, 3), np.uint8))],
            "of 10 test images, where .* has 20",
        ),
    ],
)  # fmt: skip
def test_damaged_release(folder, damage, text):
    checkpoint(folder / "r" / "last.pt")
    damage(release(folder, ["fog"]))
    with pytest.raises(UserError, match=text):
        evaluate(folder, folder / "r", "--corruptions", "fog")


def test_logits_that_are_not_finite(folder, capsys):
    """All are misclassified, and a line on stderr and one in the results says why."""
    model = checkpoint(folder / "r" / "last.pt")
    model.fc.bias.data.fill_(torch.nan)
    content = run.load_checkpoint(folder / "r" / "last.pt")
    run.save_checkpoint(folder / "r" / "last.pt", content | {"model": model.state_dict()})
    result = evaluate(folder, folder / "r", "--corruptions", "contrast", "--severities", "1,3")
    assert result["checkpoints"][0]["error"]["contrast"] == [100, 100]
    assert "are not finite" in result["checkpoints"][0]["warnings"][0]
    assert capsys.readouterr().err.count("warning: r: the logits of some images") == 1


def test_a_damaged_frost_texture(folder):
    """It is found before the first evaluation."""
    checkpoint(folder / "r" / "last.pt")
    (folder / "frost").mkdir()
    for name in corruptions.weather.FROST_FILES:
        (folder / "frost" / name).write_bytes(b"\x89PNG damaged")
    with pytest.raises(UserError, match=r"frost1.png: no whole picture"):
        evaluate(folder, folder / "r", "--corruptions", "frost")


def test_foreign_state_dict(folder):
    model = checkpoint(folder / "own.pt")
    state = {f"module.{k}": v for k, v in model.state_dict().items() if "normalize" not in k}
    torch.save({"state_dict": state}, folder / "theirs.th")
    foreign = ["--arch", "resnet8", "--dataset", "cifar10", "--mean", ".5,.5,.5", "--std"]
    options = ["--corruptions", "contrast", "--severities", "3"]
    theirs = evaluate(folder, folder / "theirs.th", *foreign, ".5,.5,.5", *options)
    own = evaluate(folder, folder / "own.pt", *options)
    assert theirs["checkpoints"][0]["error"] == own["checkpoints"][0]["error"]
    with pytest.raises(UserError, match="--arch goes with"):
        evaluate(folder, folder / "theirs.th", "--arch", "resnet8")
    with pytest.raises(UserError, match=r"not a checkpoint of this project; .*--arch"):
        evaluate(folder, folder / "theirs.th")


def test_tensorboard_grid(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    checkpoint(folder / "r" / "last.pt")
    evaluate(folder, folder / "r", "--corruptions", "fog,snow", "--severities", "1,5")
    events = EventAccumulator(str(folder / "corruptions" / "r")).Reload()
    picture = events.Images("corruptions")[0]
    assert (picture.width, picture.height) == (64, 64)
    assert [e.step for e in events.Scalars("error/fog")] == [1, 5]


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (["x.pt", "--corruptions", "rain"], "rain is not one of"),
        (["x.pt", "--severities", "0"], "severities are 1 to 5"),
        (["x.pt", "--adapt", "0"], "numbers of images above 0"),
        (["x.pt", "--adapt", "8,8"], "twice: name each once"),
        (["x.pt", "--gamma", "1.5"], "from 0 to 1"),
        (["x.pt", "--limit", "-1"], "at least 0"),
        (["x.pt", "--mean", "1,2"], "three numbers"),
    ],
)
def test_bad_options(options, text):
    with pytest.raises(UserError, match=text):
        script.parse_args(options)


@pytest.mark.parametrize(
    ("dataset", "options"),
    [
        ("shapes-shortcut", {"shortcut": None, "test_domain": None}),
        ("shapes-shortcut", {"shortcut": 6, "test_domain": None}),
        ("shapes", {"shortcut": 6, "test_domain": None}),
        ("shapes-shortcut", {"shortcut": None, "test_domain": "outline"}),
    ],
)
def test_the_images_are_those_of_the_training(dataset, options, folder, monkeypatch):
    """Its grating, and its domain; a network of another grating is evaluated apart."""
    monkeypatch.setattr(data.sets, "SHAPES_SIZES", {"train": 300, "test": 40})
    model = checkpoint(folder / "a.pt", dataset=dataset, size=24, **options)
    entry = evaluate(folder, folder / "a.pt", "--corruptions", "fog")["checkpoints"][0]
    choice = {"shortcut_levels": options["shortcut"], "test_domain": options["test_domain"]}
    test = data.load(dataset, image_size=24, **choice).test
    assert entry["clean"] == run.evaluate(model, test)
    other = options | {"shortcut": 2}
    checkpoint(folder / "b.pt", dataset=dataset, size=24, **other)
    with pytest.raises(UserError, match="different test images"):
        evaluate(folder, folder / "a.pt", folder / "b.pt")


def test_bad_checkpoints(folder):
    with pytest.raises(UserError, match="no such checkpoint"):
        evaluate(folder, folder / "none.pt")
    checkpoint(folder / "a.pt")
    checkpoint(folder / "b.pt", dataset="shapes")
    with pytest.raises(UserError, match="different data sets: cifar10, shapes"):
        evaluate(folder, folder / "a.pt", folder / "b.pt")
    checkpoint(folder / "c.pt", classes=7)
    with pytest.raises(UserError, match=r"has 10 classes, c\.pt 7"):
        evaluate(folder, folder / "c.pt")
    checkpoint(folder / "d.pt", size=48)
    with pytest.raises(UserError, match="take images of 32 and 48 pixels: evaluate them apart"):
        evaluate(folder, folder / "a.pt", folder / "d.pt")
    checkpoint(folder / "e.pt", dataset="gaussian")
    with pytest.raises(UserError, match="gaussian: is no data set of images"):
        evaluate(folder, folder / "e.pt")
    with pytest.raises(UserError, match=r"--json .*x.svg: a figure may be written there"):
        evaluate(folder, folder / "a.pt", "--json", folder / "x.svg")
    with pytest.raises(UserError, match="--limit 21: there are only 20"):
        evaluate(folder, folder / "a.pt", "--limit", "21")


def test_runs_from_any_directory(folder):
    checkpoint(folder / "r" / "last.pt")
    command = [sys.executable, str(SCRIPT), "r", "--data-dir", "."]
    command += ["--corruptions", "brightness", "--limit", "10"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (folder / "r" / "last.corruptions.json").is_file()


def test_a_corruption_named_twice_is_refused():
    """A table never averages a number with itself."""
    with pytest.raises(UserError, match="fog is named twice"):
        corruptions.listed_names("fog,snow,fog")


def test_a_missing_corruption_is_known_at_the_beginning(capsys):
    """The extra four may be missing; another one, or one asked for by name, is an error."""
    assert script.available(corruptions.EVERY, corruptions.EXTRA, "C") == list(corruptions.NAMES)
    assert "left out" in capsys.readouterr().out
    for chosen, missing in ((corruptions.EVERY, ["jpeg_compression"]), (["spatter"], ["spatter"])):
        with pytest.raises(UserError, match=f"C: no {missing[0]}; complete it"):
            script.available(chosen, missing, "C")


def batch_norm_by_hand(x, layer, source, count):
    """The formula of Schneider et al. for one layer, (N,C,H,W) float64."""
    mean, var = x.mean((0, 2, 3)), x.var((0, 2, 3))
    share = count / (count + source)
    mean = share * mean + (1 - share) * layer.running_mean.double()
    var = share * var + (1 - share) * layer.running_var.double()
    centred = (x - mean.view(-1, 1, 1)) / (var.view(-1, 1, 1) + layer.eps).sqrt()
    return centred * layer.weight.double().view(-1, 1, 1) + layer.bias.double().view(-1, 1, 1)


def two_layers():
    """A network of two convolutions, each with BatchNorm, with statistics of a training."""
    layers = [torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.ReLU()]
    layers += [torch.nn.Conv2d(4, 5, 3), torch.nn.BatchNorm2d(5), torch.nn.Flatten()]
    model = torch.nn.Sequential(*layers).eval()
    for layer in (model[1], model[4]):
        layer.running_mean.normal_()
        layer.running_var.uniform_(0.5, 2)
        torch.nn.init.normal_(layer.weight)
    return model


@pytest.mark.parametrize("source", [0, 16, 1000])
def test_adapted_statistics_follow_the_formula(source):
    """Every layer sees what the adapted layers before it make of the images."""
    model, x, other = two_layers(), torch.rand(8, 3, 9, 9), torch.rand(3, 3, 9, 9)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with torch.no_grad():
        first = torch.nn.functional.conv2d(x.double(), *(p.double() for p in model[0].parameters()))
        hidden = batch_norm_by_hand(first, model[1], source, 8).relu()
        second = torch.nn.functional.conv2d(hidden, *(p.double() for p in model[3].parameters()))
        expected = batch_norm_by_hand(second, model[4], source, 8).flatten(1)
        with models.adapted(model, [x], 8, source) as net:
            torch.testing.assert_close(net(x).double(), expected, rtol=1e-4, atol=1e-4)
            inside = net(other)
        assert not torch.equal(model(other), inside)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_batches_give_the_statistics_of_all():
    """The first layer's statistics do not depend on the batches; one image is no special case."""
    model, x = two_layers(), torch.rand(12, 3, 9, 9)
    found = []
    for size in (12, 5):
        with models.adapted(model, x.split(size), 12):
            found.append((model[1].running_mean.clone(), model[1].running_var.clone()))
    torch.testing.assert_close(found[0], found[1])
    point = torch.nn.Sequential(torch.nn.BatchNorm2d(3), torch.nn.Flatten()).eval()
    with models.adapted(point, [torch.rand(1, 3, 1, 1)], 1):
        assert point[0].running_var.isfinite().all()


def test_adaptation_of_all_images(folder, capsys):
    """With all images and no source the statistics are those of the corrupted set alone."""
    model = checkpoint(folder / "bn" / "last.pt")
    checkpoint(folder / "gn" / "last.pt", 1, "gn")
    options = ["--corruptions", "contrast,fog", "--severities", "5", "--adapt", "4,all"]
    options += ["--adapt-source", "0"]
    result = evaluate(folder, folder / "bn", folder / "gn", *options)
    entries = result["checkpoints"]
    assert [e.get("adapt") for e in entries] == [None, 4, "all", None]
    assert len({e["weights"] for e in entries}) == 2
    text = capsys.readouterr().out
    assert "gn: no BatchNorm with running statistics, nothing to adapt" in text
    assert "bn, adapt 4  bn, adapt all" in text
    test = data.load("cifar10", folder).test
    x = corruptions.corrupt(test.x, "contrast", 5, seed=0)
    for layer in model.modules():
        if isinstance(layer, torch.nn.BatchNorm2d):
            layer.reset_running_stats()
            layer.momentum = 1.0
    model.train()(run.to_float(x))
    expected = run.evaluate(model, test.changed(x))
    assert entries[2]["error"]["contrast"] == [expected["error"]]
    assert entries[2]["ece"]["contrast"][0] == pytest.approx(expected["ece"], abs=1e-3)
    with pytest.raises(UserError, match="--adapt 21: there are only 20 images"):
        evaluate(folder, folder / "bn", "--adapt", "21")


def test_gamma_mixes_the_statistics_of_dual_bn(folder):
    """0 is the clean set, 1 the adversarial one; other networks are refused."""
    model = checkpoint(folder / "r" / "last.pt", norm="dual-bn")
    for module in model.modules():
        if isinstance(module, models.DualBatchNorm):
            module.clean.running_mean.normal_()
    state = model.spec | {"dataset": "cifar10", "model": model.state_dict(), "method": "nofrost"}
    run.save_checkpoint(folder / "r" / "last.pt", state)
    options = ["--corruptions", "brightness", "--severities", "1"]
    entries = evaluate(folder, folder / "r", *options, "--gamma", "0,1")["checkpoints"]
    assert [e["gamma"] for e in entries] == [0, 1]
    test = data.load("cifar10", folder).test
    x = corruptions.corrupt(test.x, "brightness", 1, seed=0)
    for kind, entry in zip(("clean", "adversarial"), entries, strict=True):
        models.use_statistics(model, kind)
        assert entry["clean"] == run.evaluate(model, test)
        assert entry["error"]["brightness"] == [run.evaluate(model, test.changed(x))["error"]]
    checkpoint(folder / "bn.pt")
    with pytest.raises(UserError, match="bn has one"):
        evaluate(folder, folder / "bn.pt", *options, "--gamma", "0.5")


def alone(folder, *options):
    """Without --json: every checkpoint's results go beside it."""
    argv = [*map(str, options), "--data-dir", str(folder), "--device", "cpu"]
    return script.main(script.parse_args([*argv, "--corruptions", "fog", "--severities", "1"]))


def test_one_results_file_for_each_checkpoint(folder):
    networks = [folder / "a" / "last.pt", folder / "a" / "baseline.pt", folder / "b" / "last.pt"]
    for seed, path in enumerate(networks):
        checkpoint(path, seed)
    found = alone(folder, *networks)
    assert len(found["checkpoints"]) == 3
    for path, entry in zip(networks, found["checkpoints"], strict=True):
        content = json.loads(path.with_suffix(".corruptions.json").read_text())
        assert content["checkpoints"] == [entry]
        assert content["settings"]["weights"] == [entry["weights"]]
    with pytest.raises(UserError, match=r"holds results with another images .* --overwrite"):
        alone(folder, *networks, "--limit", "10")
    assert not list(folder.rglob(".*.lock"))


def test_results_that_cannot_be_written_are_known_first(folder, monkeypatch, capsys):
    """Before the table: --json that is a folder, two networks in one file, no place beside one."""
    checkpoint(folder / "a" / "r" / "last.pt")
    checkpoint(folder / "b" / "r" / "last.pt", 1)
    networks = folder / "a" / "r", folder / "b" / "r"
    (folder / "place").mkdir()
    with pytest.raises(UserError, match="is a folder: name a file"):
        alone(folder, *networks, "--json", folder / "place")
    original = run.results.try_folder

    def read_only(place, option):
        if place in networks:
            raise UserError(f"cannot write in {place}: read-only")
        original(place, option)

    monkeypatch.setattr(run.results, "try_folder", read_only)
    monkeypatch.chdir(folder / "place")
    with pytest.raises(UserError, match=r"several networks' results would go to .*: give --json"):
        alone(folder, *networks)
    assert "corruption " not in capsys.readouterr().out
    alone(folder, networks[0])
    assert "the results go to" in capsys.readouterr().out
    assert (folder / "place" / "r.last.corruptions.json").is_file()


@pytest.mark.slow
def test_resnet20_adapts_as_published(cifar10_dir, shared, tmp_path):
    """Benz et al. 2021: 31.80 to 27.04 % error on 32 images, whose statistics replace the source's.

    Other weights, and one batch of 32 for all 75 cells, where ours is drawn for each. The error
    under one batch for all cells has a standard deviation of 2.0 points (eval/README.md).
    """
    stats = ["--mean", "0.485,0.456,0.406", "--std", "0.229,0.224,0.225"]
    options = ["--arch", "resnet20", "--dataset", "cifar10", *stats, "--limit", "1000"]
    options += ["--adapt", "32", "--adapt-source", "0", "--data-dir", str(cifar10_dir)]
    options += ["--json", str(tmp_path / "out.json"), "--corruptions", ",".join(corruptions.NAMES)]
    options += ["--frost-dir", str(shared / "golden" / "frost")]
    weights = str(shared / "checkpoints" / "resnet20-12fca82f.th")
    found = script.main(script.parse_args([weights, *options]))["checkpoints"]
    before, after = (entry["mean_corruption_error"] for entry in found)
    assert before == pytest.approx(31.80, abs=2) and after == pytest.approx(27.04, abs=2 * 2)
    assert before - after > 4
    for name in ("brightness", "jpeg_compression"):
        assert sum(found[1]["error"][name]) > sum(found[0]["error"][name])
