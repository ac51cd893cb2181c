"""eval/speed.py train and gpu, at tiny sizes."""

import json

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from common import models, run
from eval import speed, speed_train

TINY = ["--arch", "wrn10-1", "--batch-size", "8", "--group", "1", "--groups", "2", "--matmul", "64"]


def test_the_fastest_group_counts(monkeypatch):
    times = iter([0.0, 3.0, 5.0, 9.0])
    monkeypatch.setattr(speed_train, "synchronised", lambda device: next(times))
    clock = speed_train.Clock(torch.device("cpu"), skip=2, group=2)
    for _ in range(9):  # 8 steps: 2 to warm up, then three groups of 2
        clock.mark()
    assert clock.marks == [0.0, 3.0, 5.0, 9.0] and clock.seconds() == 1.0


def test_train_times_every_trainer(tmp_path):
    file = tmp_path / "speed.json"
    words = ["train", *TINY, "--threads-list", "1", "--no-compiled", "--json", str(file)]
    speed.main(speed.parse_args(words))
    rows = json.loads(file.read_text())["train"]["rows"]
    assert [row["trainer"] for row in rows] == list(speed_train.TRAINERS)
    assert all(row[key] > 0 for row in rows for key in ("images_per_s", "plain", "floor"))
    by_name = {row["trainer"]: row for row in rows}
    # The same plain loop stands beside both, divided by the teacher's part of the work.
    assert by_name["ct-baseline"]["plain"] / by_name["ct"]["plain"] == pytest.approx(4 / 3)


def test_the_floor_counts_three_passes():
    """Forward, and two passes back but for the gradient of the images, which nobody wants."""
    args = speed.parse_args(["train", *TINY])
    model, x = models.build("wrn10-1", "bn", 10), torch.rand(8, 3, 32, 32)
    with FlopCounterMode(display=False) as counter:
        model(x)
    forward = counter.get_total_flops() / 1e9
    first = 2 * 8 * 3 * 16 * 9 * 32 * 32 / 1e9  # the first convolution's
    found = speed_train.floor(args, torch.device("cpu"), "bn", (1e9, 1e9))
    assert found["gflop"] == pytest.approx(3 * forward - first, rel=1e-6)
    assert found["seconds"] == pytest.approx(found["gflop"] + found["gbyte"])
    maps = 8 * 16 * 32 * 32 * 4 / 1e9  # one map of the first stage, fp32; each is read and written
    assert found["gbyte"] > 10 * maps / 2


@pytest.mark.parametrize("words", [["train", "--trainers", "ct,other"]])
def test_unknown_trainers_are_refused(words):
    with pytest.raises(run.UserError, match="'other' is not one of"):
        speed.parse_args(words)
