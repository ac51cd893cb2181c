"""eval/speed.py train and gpu, at tiny sizes."""

import json
import subprocess
import sys

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from common import models, run
from eval import speed, speed_gpu, speed_train

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


# --- gpu ------------------------------------------------------------------------------------------

GPU = ["gpu", *TINY, "--trainers", "ct-baseline", "--threads-list", "1", "--no-compiled",
       "--large-arch", "wrn10-1", "--attack-arch", "resnet8", "--attack-batch", "4",
       "--corrupted", "2"]  # fmt: skip


def test_gpu_without_a_gpu_is_one_line():
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    done = subprocess.run(
        [sys.executable, str(run.ROOT / "eval" / "speed.py"), "gpu"], capture_output=True, text=True
    )
    assert done.returncode == 2 and not done.stdout
    assert done.stderr == "error: gpu: no CUDA GPU here, so nothing was measured\n"


def test_gpu_parts_on_the_cpu(tmp_path, monkeypatch):
    """Every part runs to its lines, here with the CPU in the GPU's place."""
    test = tmp_path / "test_one.py"
    test.write_text("def test_gpu():\n    pass\n\n\ndef test_other():\n    assert False\n")
    monkeypatch.setattr(speed_gpu, "TESTS", [str(test)])
    args = speed.parse_args([*GPU, "--device", "cpu", "--data-dir", str(tmp_path)])
    text, numbers = speed_gpu.page(args, torch.device("cpu"), speed_gpu.PARTS)
    assert "failed:" not in text and "not run" not in text
    assert all(f"**{title}**" in text for title in speed_gpu.PARTS)
    assert numbers["tests that need a GPU"]["status"] == 0
    assert "1 passed" in text and "1 deselected" in text
    assert numbers["attack"]["apart"] == 0 and set(numbers["attack"]["ms"]) >= {"captured", "plain"}
    assert len(numbers["corruptions"]) == 19
    assert all(row["most"] == 0 for row in numbers["corruptions"].values())
    assert numbers["WRN-28-10"]["eager"]["share"] > 0
    assert len(numbers["steps of the trainers"]["rows"]) == 1
    assert "left out: no CIFAR-10" in text


def test_gpu_goes_on_after_a_failure_and_ends_in_time():
    def broken(args, device):
        raise RuntimeError("no kernel image\nmore")

    args = speed.parse_args(GPU)
    cpu = torch.device("cpu")
    parts = {"a": broken, "b": lambda args, device: (["fine"], {"x": 1})}
    text, numbers = speed_gpu.page(args, cpu, parts)
    assert "failed: no kernel image\n" in text and "fine" in text and numbers["b"] == {"x": 1}
    args.minutes = -1
    text, numbers = speed_gpu.page(args, cpu, parts)
    assert text.count("not run") == 2 and not numbers
