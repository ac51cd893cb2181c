"""What a run leaves for TensorBoard: the event files of each script, and what the server serves."""

import json
import urllib.parse
import urllib.request

import pytest
from tensorboard import program
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams import plugin_data_pb2

import bn_ablation
import ct
import fixup_penalty
import nofrost
from common import data

# --- event files --------------------------------------------------------------------------------

SHORT = "--dataset shapes --device cpu --precision fp32 --batch-size 32 --log-every 1 --seed 1 "
RUNS = {  # script, options, its networks, pictures, and tags beside those of every script
    "ct": (ct, f"{SHORT} --arch resnet8 --epochs 2 --eval-every 0.5 --corrupted-images 2",
           ("teacher", "baseline", "student"), ("batch", "corrupted"),
           ("distance", "probe_error", "final/corrupted")),
    "nofrost": (nofrost, f"{SHORT} --arch wrn10-1 --epochs 2 --attack-steps 1 --probe-images 8 "
                "--robust-images 8 --eval-every 0.5", ("nf", "bn", "dual-bn"),
                ("batch", "attack"), ("pgd_error", "robust_accuracy", "loss_adv")),
    "fixup_penalty": (fixup_penalty, f"{SHORT} --arch resnet8 --epochs 2 --limit 0 "
                      "--eval-every 0.5", ("none", "none+penalty", "bn"), ("batch",),
                      ("embedding", "logits", "penalty", "final_layer")),
    "bn_ablation": (bn_ablation, f"{SHORT} --arch vgg11-4 --steps 6 --eval-every 1 "
                    "--measure-every 2 --norms none,bn", ("none-lr0.3", "bn-lr0.3"), ("batch",),
                    ("landscape/low", "predictiveness/high", "beta")),
}  # fmt: skip
TAGS = {"loss", "accuracy", "error", "lr", "grad_norm", "images_per_s", "final/error"}


@pytest.fixture(params=RUNS)
def written(request, tmp_path, monkeypatch):
    """(name of the script, {network: its events}) of a short run of each script."""
    monkeypatch.setattr(data.sets, "SHAPES_SIZES", {"train": 96, "test": 40})
    script, options, networks, *_ = RUNS[request.param]
    if script is fixup_penalty:
        options += f" --variants {','.join(networks)}"
    script.main(script.parse_args([*options.split(), "--out", str(tmp_path / "run")]))
    folders = {path.parent.name for path in tmp_path.glob("run/*/events.out.*")}
    assert folders == set(networks)
    found = {name: EventAccumulator(str(tmp_path / "run" / name)) for name in networks}
    return request.param, {name: events.Reload() for name, events in found.items()}


def test_event_files_of_each_script(written):
    """A sub-run for each network. All have the same tags, the options as a text and as a row of
    HPARAMS, and pictures."""
    script, networks = written
    _, _, _, pictures, more = RUNS[script]
    tags = [events.Tags() for events in networks.values()]
    for found in tags:
        assert TAGS | set(more) <= set(found["scalars"])
        assert set(found["scalars"]) == set(tags[0]["scalars"])
        assert set(pictures) <= set(found["images"])
        assert "arguments/text_summary" in found["tensors"]
    for name, events in networks.items():
        steps = [event.step for event in events.Scalars("error")]
        assert len(steps) >= 3 and steps == sorted(set(steps))
        start = events.PluginTagToContent("hparams")["_hparams_/session_start_info"]
        row = plugin_data_pb2.HParamsPluginData.FromString(start).session_start_info.hparams
        assert row["network"].string_value == name and row["seed"].number_value == 1
        assert "weight_decay" not in row  # nothing that has its default


@pytest.mark.parametrize("script", [ct, nofrost, fixup_penalty, bn_ablation])
def test_ten_points_a_curve_by_default(script):
    """Of the curves of a default run: evaluations of every network, and means of the training."""
    args = script.parse_args([])
    images = args.limit or data.SHAPES_SIZES["train"]
    per_epoch = images // args.batch_size
    steps = args.steps if script is bn_ablation else args.epochs * per_epoch
    every = round(args.eval_every * (1 if script is bn_ablation else per_epoch))
    assert len({*range(every, steps, every), steps}) >= 10
    assert steps / args.log_every >= 10


# --- the server ---------------------------------------------------------------------------------


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
