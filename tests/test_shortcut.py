"""The class-dependent grating: its size, what it leaves alone, and what it survives."""

import argparse
import json
from types import SimpleNamespace

import pytest
import torch

from common import data, run
from common.data import shapes, shortcut
from common.run import Precision, UserError
from eval import shortcut as study


@pytest.fixture
def few(monkeypatch):
    monkeypatch.setattr(data.sets, "SHAPES_SIZES", {"train": 200, "test": 100})


def test_shapes_shortcut_is_shapes_with_the_grating(few):
    plain, with_it = data.load("shapes"), data.load("shapes-shortcut")
    for a, b in ((plain.train, with_it.train), (plain.test, with_it.test)):
        assert torch.equal(a.y, b.y)
        delta = b.x.int() - a.x.int()
        assert delta.abs().max() == shapes.SHORTCUT == 3
        grating = shapes.patterns(32)[a.y]
        assert torch.equal(delta, grating.int())
    tests = with_it.shortcut_tests
    assert torch.equal(tests["without"].x, plain.test.x)
    assert list(tests) == ["without", "swapped"] and plain.shortcut_tests == {}


def test_swapped_is_never_the_own_class_and_every_other(few):
    dataset = data.load("shapes-shortcut")
    swapped = dataset.shortcut_tests["swapped"]
    delta = swapped.x.int() - dataset.shortcut_tests["without"].x.int()
    grating = shapes.patterns(32).int()
    shown = torch.tensor([[torch.equal(d, g) for g in grating] for d in delta]).int().argmax(1)
    assert (shown != swapped.y).all() and len(shown.unique()) == 10
    again = data.load("shapes-shortcut").shortcut_tests["swapped"]
    assert torch.equal(again.x, swapped.x)


@pytest.mark.parametrize("levels", [0.5, 1, 2.5, 3, 16])
@pytest.mark.parametrize("classes", [10, 100, 200])
def test_gratings_are_different_and_no_larger_than_told(classes, levels):
    found = shortcut.patterns(classes, 32, levels)
    assert found.shape == (classes, 32, 32)
    assert found.abs().max() <= -(-levels // 1)
    assert found.flatten(1).float().var(1).min() > 0
    if levels >= 1:
        assert len(found.flatten(1).unique(dim=0)) == classes


def test_a_fraction_has_the_energy_of_its_size():
    """Dithered gratings lie between the whole numbers beside them, in correlation with the wave."""
    wave = shortcut.patterns(10, 32, 16).float().flatten(1)
    gains = []
    for levels in (1, 1.5, 2):
        found = shortcut.patterns(10, 32, levels).float().flatten(1)
        gains.append(((found * wave).sum(1) / wave.square().sum(1) * 16).mean().item())
    assert gains[0] < gains[1] < gains[2] and gains[1] == pytest.approx(1.5, abs=0.15)


def test_it_survives_flips_and_crops():
    """The largest response of a bank of gratings, over phases, still names the class."""
    grating = shortcut.patterns(10, 32, 3).double()
    bank = torch.fft.fft2(grating).abs().flatten(1)
    bank /= bank.norm(dim=1, keepdim=True)
    for moved in (grating.flip(2), grating.roll((2, -3), (1, 2)), grating.flip(2).roll(1, 1)):
        seen = torch.fft.fft2(moved).abs().flatten(1)
        assert torch.equal((seen @ bank.T).argmax(1), torch.arange(10))


def test_on_cifar(shared, cifar10_dir):
    plain = data.load("cifar10", cifar10_dir, limit=100)
    dataset = data.load("cifar10", cifar10_dir, limit=100, shortcut_levels=1)
    assert torch.equal(dataset.train.y, plain.train.y)
    delta = dataset.train.x.int() - plain.train.x.int()
    assert delta.abs().max() == 1 and delta.float().abs().mean() > 0.2
    assert torch.equal(dataset.shortcut_tests["without"].x, plain.test.x)


@pytest.mark.parametrize("text", ["-1", "17", "nan", "inf", "-0.5"])
def test_sizes_out_of_range(text):
    with pytest.raises(argparse.ArgumentTypeError, match="from 0"):
        shortcut.levels(text)


def test_not_for_photographs(shared):
    with pytest.raises(UserError, match="--shortcut: for small data sets"):
        data.load("pacs", shared / "data" / "samples", shortcut_levels=3)


def test_too_many_classes():
    with pytest.raises(UserError, match="at most"):
        shortcut.patterns(1000, 32, 3)


@pytest.mark.slow  # test_defaults.py, which CI runs, trains longer and asserts the same
def test_batch_norm_leans_on_it_and_the_network_without_does_not(monkeypatch):
    """2,000 images, a minute of training at most. Without the grating nobody could lean: the three
    test sets are then the same, and the assertion about BatchNorm fails."""
    monkeypatch.setattr(study, "FEW", 100)
    dataset = data.load("shapes-shortcut", limit=2000)
    ends = {}
    recipes = {"bn": study.Recipe(7, batch_size=50), "none": study.Recipe(13, 0.2, 1.0, 50)}
    for norm, recipe in recipes.items():
        _, curve = study.train(norm, 0, dataset, recipe, Precision("auto", "cpu"))
        ends[norm] = curve[-1]
    assert ends["bn"]["clean"] > 45 and ends["bn"]["swapped"] < 0.3 * ends["bn"]["clean"]
    assert ends["none"]["clean"] > 30 and ends["none"]["swapped"] > 0.8 * ends["none"]["clean"]


def test_a_changed_recipe_is_the_usual_one_but_for_one_number():
    own = study.STUDIES["recipe"]
    usual = study.recipe_of("none", own)
    assert usual == (16, 0.2, 1.0, 128)
    assert study.recipe_of("none", own, change="half the epochs") == usual._replace(epochs=8)
    assert study.recipe_of("none", own, change="twice the rate") == usual._replace(lr=0.4)
    assert study.recipe_of("none", own, change="half the batch") == usual._replace(batch_size=64)


@pytest.fixture
def trained(monkeypatch, tmp_path):
    """What main trains, in order, as (norm, seed, recipe, weights of the teacher). Nothing is: the
    end of a curve tells the seed and, in a study of recipes, the number of epochs."""
    calls = []

    def train(norm, seed, dataset, recipe, precision, teacher=None):
        calls.append((norm, seed, recipe, teacher and run.weights_digest(teacher)))
        end = {"clean": 90.0 + seed, "without": 70.0 + seed + recipe.epochs, "swapped": 60.0 - seed}
        model = study.build(norm, seed, dataset).eval()
        return model, [{"step": recipe.epochs, "loss": 1.0} | end]

    def load(name, data_dir, limit, shortcut_levels):
        kwargs = {"num_classes": 10, "image_size": 32, "mean": (0.5,) * 3, "std": (0.5,) * 3}
        return SimpleNamespace(train=range(limit or 50_000), model_kwargs=kwargs)

    monkeypatch.setattr(study, "train", train)
    monkeypatch.setattr(study.data, "load", load)
    monkeypatch.setattr(study, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(study, "RUNS", tmp_path / "runs")
    monkeypatch.chdir(tmp_path)
    return calls


def start(line):
    study.main(study.parse_args(line.split()))


def test_a_stopped_run_goes_on(trained, tmp_path, monkeypatch, capsys):
    """It was stopped in the second training, and then asked for another seed."""

    def train(*args):
        if trained:
            raise KeyboardInterrupt
        return whole(*args)

    whole = study.train
    monkeypatch.setattr(study, "train", train)
    with pytest.raises(KeyboardInterrupt):
        start("cifar10 --norms bn --sizes 1,2 --seeds 1")
    monkeypatch.setattr(study, "train", whole)
    start("cifar10 --norms bn --sizes 1,2 --seeds 2")
    assert [seed for _, seed, _, _ in trained] == [0, 0, 1, 1]
    rows = study.read(tmp_path / "results" / "shortcut_cifar10.json")
    assert sorted((row["levels"], row["seed"]) for row in rows) == [(1, 0), (1, 1), (2, 0), (2, 1)]
    assert "| 1 | `bn` | 90.5 +- 0.7 | 78.5 +- 0.7 | 59.5 +- 0.7 | 2 |" in capsys.readouterr().out


@pytest.mark.parametrize("options", ["--epochs 1", "--limit 256", "--limit 0"])
def test_another_recipe_is_a_file_and_rows_of_its_own(trained, tmp_path, options, capsys):
    """Also where both are in one file, and where 0 stands for all images."""
    line = "cifar10 --norms bn --sizes 1"
    start(f"{line} --seeds 3")
    published = tmp_path / "results" / "shortcut_cifar10.json"
    before = published.read_text()
    start(f"{line} --seeds 1 {options}")
    assert published.read_text() == before and len(trained) == 4
    start(f"{line} --seeds 1 {options} --json {published}")
    out = capsys.readouterr().out
    assert "3 rows of other epochs, images or recipes are left out" in out
    assert out.count("| 1 | `bn` | 90.0 | ") == 2
    rows = study.read(published)
    assert [row["images"] for row in rows[:3]] == [20_000] * 3
    assert rows[3]["images"] == {"--limit 256": 256, "--limit 0": 50_000}.get(options, 20_000)
    start(f"{line} --draw")
    assert "| 1 | `bn` | 91.0 +- 1.0 |" in capsys.readouterr().out
    assert study.markdown(rows).count("`bn`") == 2


def test_rows_of_an_earlier_version_have_the_recipe_of_the_study(trained, tmp_path):
    path = tmp_path / "results" / "shortcut_cifar10.json"
    start("cifar10 --norms none --sizes 1 --seeds 2")
    content = json.loads(path.read_text())
    for key in ("change", "lr", "clip", "batch_size"):
        del content["rows"][0][key]
    path.write_text(json.dumps(content))
    start("cifar10 --norms none --sizes 1 --seeds 2")
    assert len(trained) == 2 and len({study.key_of(row)[:-1] for row in study.read(path)}) == 1


def test_a_part_of_a_data_set_is_not_taken_for_all(trained, monkeypatch):
    monkeypatch.setattr(study.data, "load", lambda *args, **options: SimpleNamespace(train="few"))
    with pytest.raises(UserError, match="cifar10: 3 images here; give --limit 3"):
        start("cifar10 --limit 0")


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"rows": [1]}', '{"rows": [{"data": "x"}]}'])
def test_a_broken_file_of_rows_is_one_line(trained, tmp_path, content):
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(UserError, match="holds no rows of this study"):
        start(f"shapes --draw --json {tmp_path / 'a.json'}")


def test_the_teacher_is_trained_once_for_each_recipe(trained, tmp_path):
    """`none` has its row from the file of the teacher, also in another study with the recipe."""
    start("cifar10 --norms ct,none --sizes 0.5 --seeds 1")
    assert [call[0] for call in trained] == ["none", "ct"]
    start("recipe --norms none --seeds 1")
    assert len(trained) == 2 + 6  # all but the usual recipe
    start("cifar10 --norms ct --sizes 0.5 --seeds 1 --epochs 16")
    assert [call[0] for call in trained[8:]] == ["ct"]
    start("cifar10 --norms ct --sizes 0.5 --seeds 1 --epochs 5")
    assert [call[0] for call in trained[9:]] == ["none", "ct"]
    files = {path.name for path in (tmp_path / "runs").glob("*.pt")}
    assert "wrn10-1-none-cifar10-0.5-n20000-16-0.2-1.0-128-s0.pt" in files and len(files) == 8
    (row,) = (r for r in study.read(tmp_path / "results" / "shortcut_cifar10.json")
              if r["norm"] == "none")  # fmt: skip
    assert row["curve"][-1]["step"] == 16 and row["cpu_seconds"] >= 0


@pytest.mark.parametrize("damage", [lambda b: b"", lambda b: b[: len(b) // 2], lambda b: b"x"])
def test_a_broken_teacher_is_trained_again(trained, tmp_path, damage, capsys):
    start("cifar10 --norms none --sizes 1 --seeds 1")
    (path,) = (tmp_path / "runs").glob("*.pt")
    whole = path.read_bytes()
    path.write_bytes(damage(whole))
    start("cifar10 --norms ct --sizes 1 --seeds 1")
    assert [call[0] for call in trained] == ["none", "none", "ct"]
    assert "trained again" in capsys.readouterr().err
    model = study.models.from_checkpoint(run.load_checkpoint(path))
    assert trained[-1][-1] == run.weights_digest(model)
    assert not list(path.parent.glob(".*"))


def test_lines_of_the_recipe_are_means_over_seeds(trained, monkeypatch, tmp_path):
    drawn = {}
    monkeypatch.setattr(run, "line_plot", lambda path, lines, *axes: drawn.update(lines))
    start("recipe --seeds 3")
    names = [
        f"{norm}, {option}" for norm in ("bn", "none") for option in ("epochs", "rate", "batch")
    ]
    assert list(drawn) == names and all(len(line) == 3 for line in drawn.values())
    # Seeds 0, 1, 2 have 70, 71, 72 % and an epoch's point each; swapping costs 30, 32 and 34.
    assert drawn["bn, epochs"] == [(x, 32.0, 2.0) for x in (75.0, 79.0, 87.0)]
    assert drawn["none, batch"] == [(87.0, 32.0, 2.0)] * 3


def test_sizes_of_the_grating_are_lines_of_their_own(trained, monkeypatch):
    drawn = {}
    monkeypatch.setattr(run, "line_plot", lambda path, lines, *axes: drawn.update(lines))
    start("recipe --norms bn --seeds 1 --sizes 0.5,1")
    assert len(drawn) == 6 and "bn, 0.5, rate" in drawn and "bn, 1, rate" in drawn


def test_numbers_and_figure_have_a_file_each(tmp_path):
    with pytest.raises(UserError, match=r"--json .*x\.svg: the figure is written there"):
        study.parse_args(["shapes", "--json", str(tmp_path / "x.svg")])


def test_one_epoch_has_no_half():
    with pytest.raises(UserError, match="has no half"):
        study.parse_args(["recipe", "--epochs", "1"])
