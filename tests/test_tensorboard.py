"""The curves as TensorBoard's own server hands them out: nothing that was written is dropped."""

import json
import urllib.parse
import urllib.request

import pytest
from tensorboard import program

import bn_ablation
from common import data


@pytest.fixture(scope="module")
def ask(tmp_path_factory):
    """ask(path, **query) -> the JSON of a server that shows a short run of bn_ablation.py."""
    folder = tmp_path_factory.mktemp("tb")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data.sets, "SHAPES_SIZES", {"train": 96, "test": 40})
        argv = ["--arch", "vgg11-4", "--batch-size", "32", "--norms", "none,bn", "--steps", "6"]
        argv += ["--log-every", "1", "--measure-every", "2", "--out", str(folder / "run")]
        bn_ablation.main(bn_ablation.parse_args(argv))
    board = program.TensorBoard()
    board.configure(argv=[None, "--logdir", str(folder), "--port", "0", "--load_fast", "false"])
    url = board.launch()

    def get(path, **query):
        text = f"{url}data/plugin/{path}?{urllib.parse.urlencode(query)}"
        return json.loads(urllib.request.urlopen(text, timeout=60).read())

    return get


def curve(ask, name, tag):
    return [(step, value) for _, step, value in ask("scalars/scalars", run=name, tag=tag)]


def test_every_point_of_a_curve_is_served(ask):
    runs = ask("scalars/tags")
    assert {"run/none-lr0.3", "run/bn-lr0.3"} <= runs.keys()
    assert [step for step, _ in curve(ask, "run/bn-lr0.3", "loss")] == [1, 2, 3, 4, 5, 6]
    assert len(curve(ask, "run/bn-lr0.3", "landscape/low")) >= 3


def test_final_numbers_stand_apart_at_the_last_step(ask):
    for name, tags in ask("scalars/tags").items():
        final = [tag for tag in tags if tag.startswith("final/")]
        assert "final/error" in final, name
        for tag in final:
            assert [step for step, _ in curve(ask, name, tag)] == [6], (name, tag)


def test_networks_share_their_tags(ask):
    runs = ask("scalars/tags")
    assert set(runs["run/none-lr0.3"]) == set(runs["run/bn-lr0.3"])
