"""A checkpoint on a file system that cannot be written: the results go to the working directory."""

import subprocess
import sys

import numpy as np
import pytest
import torch

from common import models, run

MOUNT = "mount --bind {0} {0} && mount -o remount,ro,bind {0} && "
OPTIONS = {  # script: checkpoint, options
    "corruptions": ("last.pt", "--data-dir . --corruptions fog --severities 1,2"),
    "adversarial": ("last.pt", "--data-dir . --attacks fgsm"),
    "smoothness": ("last.pt", "--data-dir . --measures gradient,surface --limit 10"),
    "domains": ("style.pt", "--device cpu"),
}
DRIVER = """
import importlib.util, sys
root, checkpoints = sys.argv[1:3]
for name, file, options in {cases!r}:
    spec = importlib.util.spec_from_file_location(name, f"{{root}}/eval/{{name}}.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    script.main(script.parse_args([f"{{checkpoints}}/{{file}}", *options.split()]))
"""


def checkpoint(path, **facts):
    torch.manual_seed(0)
    model = models.build("resnet8", "bn", num_classes=10)
    state = model.spec | {"method": "ct", "model": model.state_dict(), "step": 1}
    run.save_checkpoint(path, state | facts)


def test_every_evaluation_of_a_checkpoint_on_a_read_only_file_system(tmp_path):
    """JSON, TensorBoard's folder, the picture and the unfinished state; and a line for each."""
    checkpoints, here = tmp_path / "r", tmp_path / "here"
    checkpoints.mkdir()
    here.mkdir()
    checkpoint(checkpoints / "last.pt", dataset="cifar10", args={"seed": 0})
    options = {"seed": 0, "test_domain": "filled", "dataset": "shapes", "limit": 64}
    checkpoint(checkpoints / "style.pt", dataset="shapes", args=options, stage="student")
    x = np.random.default_rng(0).integers(256, size=(20, 32, 32, 3), dtype=np.uint8)
    y = np.arange(20) % 10
    np.savez(here / "cifar10.npz", x_train=x, y_train=y, x_test=x, y_test=y)
    probe = ["unshare", "-m", "sh", "-c", MOUNT.format(checkpoints) + f"touch {checkpoints}/x"]
    try:
        refused = subprocess.run(probe, capture_output=True, text=True).stderr
    except OSError:
        refused = "no unshare"
    if "Read-only" not in refused:
        pytest.skip(f"needs the right to mount a folder read-only: {refused.strip()[:100]}")
    cases = [(name, *case) for name, case in OPTIONS.items()]
    python = [sys.executable, "-c", DRIVER.format(cases=cases), str(run.ROOT), str(checkpoints)]
    command = ["unshare", "-m", "sh", "-c", MOUNT.format(checkpoints) + 'exec "$@"', "sh", *python]
    done = subprocess.run(command, cwd=here, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert sorted(path.name for path in checkpoints.iterdir()) == ["last.pt", "style.pt"]
    for name, (file, _) in OPTIONS.items():
        written = here / f"r.{file.removesuffix('.pt')}.{name}.json"
        assert written.is_file()
        line = f"cannot write beside {checkpoints / file}: the results go to {written}"
        assert line in done.stdout
        assert f"written: {written.name}" in done.stdout
        if name == "domains":  # which draws nothing
            assert f"the pictures go to {here / name}\n" not in done.stdout
        else:
            assert list((here / name).rglob("events*")), name
            assert f"the pictures go to {here / name}\n" in done.stdout
    assert (here / "r.last.smoothness.svg").is_file()
