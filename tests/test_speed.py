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


def test_train_times_every_trainer(tmp_path, monkeypatch):
    monkeypatch.setattr(speed_train, "time_plain", lambda *_: 0.5)
    file = tmp_path / "speed.json"
    words = ["train", *TINY, "--threads-list", "1", "--no-compiled", "--repeat", "1"]
    words += ["--json", str(file)]
    speed.main(speed.parse_args(words))
    rows = json.loads(file.read_text())["train"]["rows"]
    assert [row["trainer"] for row in rows] == list(speed_train.TRAINERS)
    assert all(row[key] > 0 for row in rows for key in ("images_per_s", "plain", "floor"))
    by_name = {row["trainer"]: row for row in rows}
    # The plain loop stands beside both, divided by the teacher's part of the work.
    assert by_name["ct-baseline"]["plain"] == 16
    assert by_name["ct"]["plain"] == pytest.approx(16 * 3 / 4) == by_name["ct"]["eager"]


def test_trainer_and_plain_loop_run_in_turn(monkeypatch):
    """Of each the fastest round counts; what is compiled has one."""
    calls = []
    monkeypatch.setattr(
        speed_train, "time_plain", lambda *_, **__: calls.append("plain") or 1 / len(calls)
    )
    monkeypatch.setattr(
        speed_train, "time_trainer", lambda *_: calls.append("own") or 1 / len(calls)
    )
    args = speed.parse_args(["train", "--repeat", "2"])
    assert speed_train.in_turn("ct", args, torch.device("cpu"), None) == (1 / 4, 1 / 3)
    assert calls == ["plain", "own"] * 2
    assert speed_train.in_turn("ct", args, torch.device("cpu"), None, compiled=True) == (
        1 / 6,
        1 / 5,
    )


def test_one_thread_is_timed_by_its_own_seconds(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    monkeypatch.setattr(speed_train.time, "process_time", lambda: 7.0)
    monkeypatch.setattr(speed_train.time, "perf_counter", lambda: 9.0)
    assert speed_train.synchronised(torch.device("cpu")) == 7.0
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    assert speed_train.synchronised(torch.device("cpu")) == 9.0


@pytest.mark.slow
def test_scaling_has_a_point_for_every_value(tmp_path):
    words = ["scaling", *"--widths 1,2 --depths 10 --batches 4,8 --threads-list 1".split()]
    words += [*"--processes 2 --depth 10 --batch-size 4 --group 1 --groups 2".split()]
    words += ["--repeat", "1", "--precision", "fp32", "--svg", str(tmp_path / "a.svg")]
    axes = speed.main(speed.parse_args(words))["scaling"]["axes"]
    values = {axis: [row["value"] for row in rows] for axis, rows in axes.items()}
    assert values == {
        "width": [1, 2], "depth": [10], "batch": [4, 8], "threads": [1], "processes": [2],
    }  # fmt: skip
    assert all(row["images_per_s"] > 0 for rows in axes.values() for row in rows)
    text = (tmp_path / "a.svg").read_text()
    assert "processes (of 1)" in text and "times the base value" in text


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


@pytest.mark.parametrize(
    "words", [["train", "--trainers", "ct,other"], ["gpu", "--parts", "tests,other"]]
)
def test_unknown_names_are_refused(words):
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
    marked = "import pytest\n\n\n@pytest.mark.gpu\ndef test_one():\n    pass\n\n\n"
    test.write_text(marked + "def test_other():\n    assert False\n")
    monkeypatch.setattr(speed_gpu, "TESTS", [str(test)])
    args = speed.parse_args([*GPU, "--device", "cpu", "--data-dir", str(tmp_path)])
    text, numbers = speed_gpu.page(args, torch.device("cpu"), speed_gpu.PARTS.values())
    assert "failed:" not in text and "not run" not in text
    assert all(f"**{title}**" in text for title, _ in speed_gpu.PARTS.values())
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
    text, numbers = speed_gpu.page(args, cpu, parts.items())
    assert "failed: no kernel image\n" in text and "fine" in text and numbers["b"] == {"x": 1}
    args.minutes = -1
    text, numbers = speed_gpu.page(args, cpu, parts.items())
    assert text.count("not run") == 2 and not numbers
