"""common/models/evaluation.py: what the evaluations say of a checkpoint, whichever script it is."""

import importlib
import json

import pytest
import torch

from common import data, models, run

OPTIONS = {
    "corruptions": ["--corruptions", "fog", "--severities", "1", "--limit", "10"],
    "adversarial": ["--attacks", "fgsm", "--limit", "10"],
    "smoothness": ["--limit", "10", "--measures", "gradient"],
    "domains": [],
}

LEFT_OUT = {"test_domain": "filled"}


def load_script(name):
    return importlib.import_module(f"eval.{name}")


@pytest.fixture(autouse=True)
def small_shapes(monkeypatch):
    sizes = {"train": 60, "test": 40}
    monkeypatch.setattr(data.sets, "SHAPES_SIZES", data.sets.SHAPES_SIZES | sizes)


def checkpoint(path, **facts):
    torch.manual_seed(0)
    model = models.build("resnet8", "bn", image_size=32)
    state = model.spec | {"dataset": "shapes", "model": model.state_dict(), "method": "ct"}
    run.save_checkpoint(path, state | {"args": {"seed": 0} | LEFT_OUT} | facts)
    return str(path)


@pytest.mark.parametrize("name", OPTIONS)
def test_an_unfinished_training_is_said_first(name, tmp_path, capsys):
    script = load_script(name)
    for step, said in ((175, "step 175 of 400"), (400, None)):
        path = checkpoint(tmp_path / f"{step}.pt", step=step, total=400)
        out = tmp_path / f"{step}.json"
        command = [path, *OPTIONS[name], "--json", str(out), "--device", "cpu"]
        script.main(script.parse_args(command))
        first = capsys.readouterr().out.strip().split("\n")[0]
        (entry,) = json.loads(out.read_text())["checkpoints"]
        assert entry.get("unfinished") == said
        assert (f"{step}" in first and first.endswith("training has not ended")) == bool(said)
        assert said is None or f": {said}, " in first


def test_domains_averages_what_ended_alone(tmp_path, capsys):
    """The table of eval/domains.py has a row for the seed whose training has not ended."""
    script = load_script("domains")
    paths = [checkpoint(tmp_path / "a.pt", step=400, total=400, args={"seed": 0} | LEFT_OUT)]
    paths += [checkpoint(tmp_path / "b.pt", step=175, total=400, args={"seed": 1} | LEFT_OUT)]
    out = ["--json", str(tmp_path / "out.json"), "--device", "cpu"]
    table = script.main(script.parse_args([*paths, *out]))["table"]
    assert [row[0] for row in table[1:]] == ["all", "unfinished step 175 of 400"]
    assert [row[-1] for row in table[1:]] == [1, 1]


def test_where_a_training_stands():
    assert models.unfinished({"step": 1, "total": 2}) == "step 1 of 2"
    for ended in ({"step": 2, "total": 2}, {"step": 2}, {}, {"step": 0, "total": 0}):
        assert models.unfinished(ended) is None  # of a selected epoch, or of another project
