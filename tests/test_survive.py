"""Runs that survive: kills, signals, broken checkpoints, full disks, NaN, two runs in one place."""

import json
import os
import random
import signal
import subprocess
import sys
import textwrap
import threading
import time

import pytest
import torch

import bn_ablation
import ct
import fixup_penalty
from common import data, models, run
from common.run import UserError

TINY = "--arch resnet8 --batch-size 32 --precision fp32 --device cpu --corrupted-images 0".split()


@pytest.fixture(autouse=True)
def small_shapes(monkeypatch):
    monkeypatch.setattr(data, "SHAPES_SIZES", {"train": 96, "test": 40})


def train_ct(out, *options):
    """The student alone, 3 steps an epoch."""
    argv = [*TINY, "--lam", "0", "--epochs", "3", "--out", str(out), *options]
    return ct.main(ct.parse_args(argv))


def train_fixup(out, *options):
    argv = [*TINY, "--norm", "none", "--epochs", "3", "--out", str(out), *options]
    return fixup_penalty.main(fixup_penalty.parse_args(argv))


def train_bn(out, *options):
    argv = "--arch vgg11-4 --batch-size 32 --steps 9 --norms bn --measure-every 0 --device cpu"
    argv = [*argv.split(), "--log-every", "9", "--out", str(out), *options]
    return bn_ablation.main(bn_ablation.parse_args(argv))


TRAINERS = {
    "ct": (train_ct, "last.pt"),
    "fixup_penalty": (train_fixup, "last.pt"),
    "bn_ablation": (train_bn, "bn-lr0.1.pt"),
}


def weights(path):
    return torch.load(path, weights_only=True)["model"]


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def finite(path):
    return all(v.isfinite().all() for v in weights(path).values())


def lines(out):
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def at_step(monkeypatch, step, action):
    """Call `action()` when a loop has made the updates before `step` and computed this one's."""
    real = run.Guard.fine

    def fine(self, now, *rest):
        if now == step:
            action()
        return real(self, now, *rest)

    monkeypatch.setattr(run.Guard, "fine", fine)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """{trainer: directory of an uninterrupted run}."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "SHAPES_SIZES", {"train": 96, "test": 40})
        folders = {name: tmp_path_factory.mktemp(name) / "run" for name in TRAINERS}
        for name, folder in folders.items():
            TRAINERS[name][0](folder)
        return folders


# --- kills ----------------------------------------------------------------------------------------

KILLER = """
    import os, random, signal, sys, time, torch, traceback
    from pathlib import Path
    from torch.utils.tensorboard import SummaryWriter  # what takes seconds to import, imported once
    import ct
    from common import data
    data.SHAPES_SIZES.update(train=96, test=40)
    folder, kills, rng = Path(sys.argv[1]), int(sys.argv[2]), random.Random(int(sys.argv[3]))
    options = sys.argv[4:]

    def run(out, life=None):
        "Train in a child; kill it `life` seconds after its first step. True if it came to its end."
        begun, begin = os.pipe()
        child = os.fork()
        if not child:
            from common import run
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            real = run.Guard.__init__
            def init(self, *args):
                real(self, *args)
                os.write(begin, b"x")
            run.Guard.__init__ = init
            try:
                ct.main(ct.parse_args([*options, "--out", str(out), "--resume", "auto"]))
                os._exit(0)
            except BaseException:
                traceback.print_exc()
                os._exit(1)
        os.close(begin)
        os.read(begun, 1)
        os.close(begun)
        if life is not None:
            time.sleep(life)
            os.kill(child, signal.SIGKILL)
        status = os.waitpid(child, 0)[1]
        if os.WIFEXITED(status) and os.WEXITSTATUS(status):
            sys.exit("a resumed run failed")
        return os.WIFEXITED(status)

    def weights(out):
        return [torch.load(out / f, weights_only=True)["model"] for f in ("teacher.pt", "last.pt")]

    began = time.monotonic()
    run(folder / "whole")
    expected, longest = weights(folder / "whole"), (time.monotonic() - began) / 2
    done = torn = n = 0
    while done < kills or not ended:
        out = folder / str(n)
        ended = run(out, rng.uniform(0, longest) if done < kills else None)
        done += not ended
        torn += bool(list(out.glob(".*.pt.*")))
        if ended:
            for have, want in zip(weights(out), expected):
                assert have.keys() == want.keys() and all(torch.equal(have[k], want[k]) for k in have)
            n += 1
    print(done, torn, n)
"""


def kill(tmp_path, kills, seed):
    """(kills, those within the writing of a checkpoint, runs compared), of ct.py's two stages."""
    options = "--epochs 4 --no-baseline --eval-every 4 --save-minutes 1e-9 --keep 3".split()
    command = [sys.executable, "-c", textwrap.dedent(KILLER), str(tmp_path), str(kills), str(seed)]
    done = subprocess.run([*command, *TINY, *options], cwd=run.ROOT, text=True, capture_output=True)
    assert done.returncode == 0, done.stderr
    return [int(n) for n in done.stdout.split()[-3:]]


def test_killed_and_resumed_is_the_uninterrupted_run(tmp_path):
    """SIGKILL at three random moments, teacher and student: the same weights, bit for bit."""
    kills, _, ended = kill(tmp_path, 3, seed=0)
    assert kills == 3 and ended >= 1


@pytest.mark.slow
def test_killed_at_20_points(tmp_path):
    """The same at 20 moments and more, until five fell within the writing of a checkpoint."""
    kills, torn, ended = 0, 0, 0
    for seed in range(5):
        found = kill(tmp_path / str(seed), 20, seed)
        kills, torn, ended = (a + b for a, b in zip((kills, torn, ended), found, strict=True))
        if torn >= 5:
            break
    print(f"{kills} kills, {torn} within a write, {ended} runs compared")
    assert kills >= 20 and torn >= 5
