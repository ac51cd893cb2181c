"""The default run of each script, whole, and what the README says of its table (minutes each)."""

import json
import subprocess
import sys

import pytest

from common import run

pytestmark = pytest.mark.slow


def default_run(script, tmp_path):
    """The final numbers {"<metric>/<network>": value} of `python <script>`, and what it printed."""
    out = tmp_path / "r"
    command = [sys.executable, str(run.ROOT / script), "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "Here:" in done.stdout and "at chance" not in done.stdout
    last = json.loads((out / "log.jsonl").read_text().splitlines()[-1])
    assert last["event"] == "end"
    return last, done.stdout


def test_ct(tmp_path):
    """BatchNorm reads the shortcut and nothing else; the teacher and CT look at the picture too.

    How much the teacher leans on the grating depends on rounding: 56 to 96 % swapped were seen."""
    final, printed = default_run("ct.py", tmp_path)
    assert final["swapped/baseline"] > 90 and final["error/baseline"] < 5
    assert final["swapped/teacher"] < 60 and final["error/teacher"] < 10
    assert final["swapped/student"] < 75 and final["error/student"] < 10
    assert final["corrupted/student"] < final["corrupted/baseline"] - 10
    assert "baseline reads the shortcut" in printed


def test_nofrost(tmp_path):
    """All three networks learn, and withstand attacks far above chance."""
    final, _ = default_run("nofrost.py", tmp_path)
    errors = {k: v for k, v in final.items() if k.startswith("error/") and isinstance(v, float)}
    assert len(errors) >= 3 and all(v < 60 for v in errors.values())


def test_fixup_penalty(tmp_path):
    """All variants overfit; without BatchNorm the final layer grows, with a penalty it does not."""
    final, _ = default_run("fixup_penalty.py", tmp_path)
    trained = [v for k, v in final.items() if k.startswith("train_accuracy/")]
    assert len(trained) == 5 and min(trained) > 90  # with dropout at work
    assert final["final_layer/none"] > 10 * final["final_layer/bn"]
    assert final["final_layer/none"] > 10 * final["final_layer/none+penalty"]


def test_bn_ablation(tmp_path):
    """The plain net learns too; with BatchNorm the loss band is narrower."""
    final, _ = default_run("bn_ablation.py", tmp_path)
    found = {k.partition("/")[2]: v for k, v in final.items() if k.startswith("landscape_width/")}
    none = next(v for k, v in found.items() if k.startswith("none"))
    bn = next(v for k, v in found.items() if k.startswith("bn"))
    assert bn < none
    assert all(v > 50 for k, v in final.items() if k.startswith("test/"))
