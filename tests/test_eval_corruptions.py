"""eval/corruptions.py: from a checkpoint to a table, on generated and released images."""

import argparse
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


def checkpoint(path, seed=0, norm="bn", dataset="cifar10", classes=10):
    torch.manual_seed(seed)
    model = models.build("resnet8", norm, num_classes=classes)
    state = model.spec | {"dataset": dataset, "model": model.state_dict()}
    path.parent.mkdir(parents=True, exist_ok=True)
    run.save_checkpoint(path, state | {"method": "ct", "args": {"seed": seed}})
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
    result = script.main(script.parse_args([*map(str, options), *out]))
    assert json.loads((folder / "out.json").read_text()) == result
    return result


def test_numbers_are_those_of_the_parts(folder, capsys):
    """Errors equal run.evaluate on corruptions.corrupt; the mean is over the 15 and no other."""
    model = checkpoint(folder / "r" / "last.pt")
    result = evaluate(folder, folder / "r" / "last.pt")
    test = data.load("cifar10", folder).test
    entry = result["checkpoints"][0]
    assert entry["clean"] == run.evaluate(model, *test)
    x = corruptions.corrupt(test.x, "fog", 4, data_dir=str(folder))
    assert entry["error"]["fog"][3] == run.evaluate(model, x, test.y)["error"]
    assert list(entry["error"]) == corruptions.NAMES + corruptions.EXTRA
    fifteen = [e for name in corruptions.NAMES for e in entry["error"][name]]
    assert len(fifteen) == 75
    assert entry["mean_corruption_error"] == pytest.approx(sum(fifteen) / 75)
    four = [e for name in corruptions.EXTRA for e in entry["error"][name]]
    assert entry["extra_error"] == pytest.approx(sum(four) / 20)
    text = capsys.readouterr().out
    assert "generated (seed 0), frost: procedural" in text and "mean (15 x 5)" in text
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
    whole = corruptions.corrupt(test.x, "gaussian_noise", 2)
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
        (lambda p: np.save(p / "labels.npy", np.arange(100)), "five equal blocks"),
        (lambda p: np.save(p / "fog.npy", np.array([None])), "truncated or not a .npy array"),
    ],
)
def test_damaged_release(folder, damage, text):
    checkpoint(folder / "r" / "last.pt")
    damage(release(folder, ["fog"]))
    with pytest.raises(UserError, match=text):
        evaluate(folder, folder / "r", "--corruptions", "fog")


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
    events = EventAccumulator(str(folder / "r" / "corruptions")).Reload()
    picture = events.Images("corruptions")[0]
    assert (picture.width, picture.height) == (64, 64)
    assert [e.step for e in events.Scalars("error_fog/r")] == [1, 5]


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (["x.pt", "--corruptions", "rain"], "rain is not one of"),
        (["x.pt", "--severities", "0"], "severities are 1 to 5"),
        (["x.pt", "--limit", "-1"], "at least 0"),
        (["x.pt", "--mean", "1,2"], "three numbers"),
        ([], "required"),
    ],
)
def test_bad_options(options, text):
    with pytest.raises(UserError, match=text):
        script.parse_args(options)


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
    with pytest.raises(argparse.ArgumentTypeError, match="fog is named twice"):
        script.names("fog,snow,fog")


def test_a_missing_corruption_is_known_at_the_beginning(capsys):
    """The extra four may be missing; another one, or one asked for by name, is an error."""
    assert script.available(script.EVERY, corruptions.EXTRA, "C") == list(corruptions.NAMES)
    assert "left out" in capsys.readouterr().out
    for chosen, missing in ((script.EVERY, ["jpeg_compression"]), (["spatter"], ["spatter"])):
        with pytest.raises(UserError, match=f"C: no {missing[0]}; complete it"):
            script.available(chosen, missing, "C")
