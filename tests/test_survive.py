"""Runs that survive: kills, signals, broken checkpoints, full disks, NaN, two runs in one place."""

import argparse
import json
import os
import resource
import shlex
import signal
import subprocess
import sys
import tarfile
import textwrap
import time
from pathlib import Path

import pytest
import torch

import bn_ablation
import ct
import fixup_penalty
import nofrost
from common import corruptions, data, models, run
from common.data import shapes
from common.run import UserError, rundir
from common.run.progress import Remaining

EVERY = ["--save-every", "1"]  # however long a loaded machine takes to write
TINY = "--arch resnet8 --batch-size 32 --precision fp32 --device cpu --corrupted-images 0".split()
TINY += "--dataset shapes --eval-every 5".split()


@pytest.fixture(autouse=True)
def small_shapes(monkeypatch):
    monkeypatch.setattr(data.sets, "SHAPES_SIZES", {"train": 96, "test": 40})


def train_ct(out, *options):
    """The student alone, 3 steps an epoch."""
    argv = [*TINY, *EVERY, "--lam", "0", "--epochs", "3", "--out", str(out), *options]
    return ct.main(ct.parse_args(argv))


def train_fixup(out, *options):
    argv = [
        *TINY,
        *EVERY,
        "--limit",
        "0",
        "--augment",
        "--norm",
        "none",
        "--epochs",
        "3",
        "--out",
        str(out),
        *options,
    ]
    return fixup_penalty.main(fixup_penalty.parse_args(argv))


def train_bn(out, *options):
    argv = "--arch vgg11-4 --batch-size 32 --steps 9 --norms bn --lrs 0.1 --measure-every 0"
    argv = [
        *argv.split(),
        *EVERY,
        "--log-every",
        "9",
        "--device",
        "cpu",
        "--out",
        str(out),
        *options,
    ]
    return bn_ablation.main(bn_ablation.parse_args(argv))


def train_nofrost(out, *options):
    argv = "--norm nf --arch wrn10-1 --batch-size 32 --epochs 3 --attack-steps 1 --probe-images 20 "
    argv += "--robust-images 0 --precision fp32 --device cpu --eval-every 3"
    return nofrost.main(nofrost.parse_args([*argv.split(), *EVERY, "--out", str(out), *options]))


TRAINERS = {
    "ct": (train_ct, "last.pt"),
    "fixup_penalty": (train_fixup, "last.pt"),
    "bn_ablation": (train_bn, "bn-lr0.1.pt"),
    "nofrost": (train_nofrost, "last.pt"),
}


def weights(path):
    return torch.load(path, weights_only=True)["model"]


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def finite(path):
    return all(v.isfinite().all() for v in weights(path).values())


def lines(out):
    """log.jsonl, every line of which must be JSON."""
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def at_step(monkeypatch, step, action):
    """Call `action()` when a loop has made the updates before `step` and computed this one's."""
    real = run.Loop.step

    def act(self, lr, clip=0.0):
        if self.done - 1 == step:
            action()
        return real(self, lr, clip)

    monkeypatch.setattr(run.Loop, "step", act)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """{trainer: directory of an uninterrupted run}."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data.sets, "SHAPES_SIZES", {"train": 96, "test": 40})
        folders = {name: tmp_path_factory.mktemp(name) / "run" for name in TRAINERS}
        for name, folder in folders.items():
            TRAINERS[name][0](folder)
        return folders


# --- kills ----------------------------------------------------------------------------------------

KILLER = """
    import importlib, os, random, signal, sys, time, torch, traceback
    from pathlib import Path
    from torch.utils.tensorboard import SummaryWriter  # what takes seconds to import, imported once
    from common import data
    data.sets.SHAPES_SIZES.update(train=96, test=40)
    script = importlib.import_module(sys.argv[1])
    folder, kills, rng = Path(sys.argv[2]), int(sys.argv[3]), random.Random(int(sys.argv[4]))
    options = sys.argv[5:]

    def run(out, life=None):
        "Train in a child; kill it `life` seconds after its first step. True if it came to its end."
        begun, begin = os.pipe()
        child = os.fork()
        if not child:
            from common import run
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            real = run.Loop.__init__
            def init(self, *args, **options):
                real(self, *args, **options)
                os.write(begin, b"x")
            run.Loop.__init__ = init
            try:
                argv = [*options, "--out", str(out), "--resume", "auto"]
                script.main(script.parse_args(argv))
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
        return {f.name: torch.load(f, weights_only=True)["model"] for f in out.glob("*.pt")}

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
            found = weights(out)
            assert found.keys() == expected.keys() and len(found) == 2
            for have, want in ((found[name], expected[name]) for name in found):
                assert have.keys() == want.keys()
                assert all(torch.equal(have[k], want[k]) for k in have)
            n += 1
    print(done, torn, n)
"""


# Two networks each. --save-minutes 1e-9 writes a checkpoint after every step.
KILLED = {
    "ct": [*TINY, *"--epochs 4 --no-baseline --teacher-epochs 4 --save-minutes 1e-9".split()],
    "fixup_penalty": [*TINY, *"--limit 0 --variants none+penalty,bn --mixup 0.5 --epochs 4 "
                      "--save-minutes 1e-9".split()],
    "nofrost": "--norms nf,bn --arch wrn10-1 --batch-size 32 --epochs 4 --attack-steps 1 "
    "--probe-images 4 --robust-images 0 --precision fp32 --device cpu --eval-every 2 "
    "--save-minutes 1e-9".split(),
    "bn_ablation": "--arch vgg11-4 --batch-size 32 --steps 12 --norms none,noisy-bn --lrs 0.1 "
    "--measure-every 3 --device cpu --save-minutes 1e-9".split(),
}  # fmt: skip


def kill(script, tmp_path, kills, seed):
    """(kills, those within the writing of a checkpoint, runs compared) of a script."""
    tmp_path.mkdir(exist_ok=True)
    command = [sys.executable, "-c", textwrap.dedent(KILLER), script, str(tmp_path), str(kills)]
    # One thread: a fork beside others (OpenBLAS starts one per core) may inherit a held lock.
    single = os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, str(seed), *KILLED[script]],
        cwd=run.ROOT, env=single, text=True, capture_output=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return [int(n) for n in done.stdout.split()[-3:]]


def test_killed_and_resumed_is_the_uninterrupted_run(tmp_path):
    """SIGKILL at three random moments, teacher and student: the same weights, bit for bit."""
    kills, _, ended = kill("ct", tmp_path, 3, seed=0)
    assert kills == 3 and ended >= 1


@pytest.mark.slow
@pytest.mark.parametrize("script", KILLED)
def test_killed_at_20_points(tmp_path, script):
    """The same at 20 moments and more, until five fell within the writing of a checkpoint."""
    kills, torn, ended = 0, 0, 0
    for seed in range(5):
        found = kill(script, tmp_path / str(seed), 20, seed)
        kills, torn, ended = (a + b for a, b in zip((kills, torn, ended), found, strict=True))
        if torn >= 5:
            break
    print(f"{script}: {kills} kills, {torn} within a write, {ended} runs compared")
    assert kills >= 20 and torn >= 5


# --- signals --------------------------------------------------------------------------------------


@pytest.fixture
def own_signals():
    """The handlers of before, whatever `run.cli` installs."""
    numbers = [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT]
    before = [signal.getsignal(number) for number in numbers]
    yield
    for number, handler in zip(numbers, before, strict=True):
        signal.signal(number, handler)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
@pytest.mark.parametrize("name", TRAINERS)
def test_signal(whole, tmp_path, monkeypatch, capsys, own_signals, name, number):
    """Within step 4, not the end of an epoch: the step is finished and saved, status 75, a line
    that tells how to go on; resumed, the run ends with the weights of the uninterrupted one."""
    train, file = TRAINERS[name]
    with monkeypatch.context() as patch:
        at_step(patch, 4, lambda: os.kill(os.getpid(), number))
        with pytest.raises(SystemExit) as end:
            run.cli(lambda out: train(out), lambda: tmp_path / "r")
    assert end.value.code == 75
    text = f"{signal.Signals(number).name}: stopped after step 5 of 9 of"
    printed = capsys.readouterr().out
    assert text in printed and "--resume auto" in printed and str(Path.cwd()) in printed
    assert run.load_checkpoint(tmp_path / "r" / file)["step"] == 5
    assert lines(tmp_path / "r")[-1]["event"] == "stop"
    train(tmp_path / "r", "--resume", "auto")
    assert same(weights(tmp_path / "r" / file), weights(whole[name] / file))


def test_ctrl_c_that_ends_tee_too_still_tells_how_to_go_on(
    tmp_path, monkeypatch, capsys, own_signals
):
    """`| tee log` is gone at once, and with it stdout: the line stands on stderr then."""
    with monkeypatch.context() as patch:
        reader, writer = os.pipe()
        patch.setattr(sys, "stdout", os.fdopen(writer, "w"))

        def ctrl_c():
            os.close(reader)
            os.kill(os.getpid(), signal.SIGINT)

        at_step(patch, 4, ctrl_c)
        with pytest.raises(SystemExit) as end:
            run.cli(lambda out: train_ct(out), lambda: tmp_path / "r")
    assert end.value.code == 75
    printed = capsys.readouterr().err
    assert printed.count("SIGINT: stopped after step 5 of 9 of") == 1
    assert "--resume auto" in printed


def test_signal_between_loops(tmp_path, monkeypatch, capsys, own_signals):
    """While the final table is made all is saved: it stops at once, and a second start makes it."""
    with monkeypatch.context() as patch:
        patch.setattr(
            corruptions, "corruption_errors", lambda *args: os.kill(os.getpid(), signal.SIGTERM)
        )
        with pytest.raises(SystemExit) as end:
            run.cli(lambda out: train_ct(out, "--corrupted-images", "5"), lambda: tmp_path / "r")
    printed = capsys.readouterr().out
    assert end.value.code == 75 and "SIGTERM: stopped in the final evaluation; go on" in printed
    assert "corrupted/student" in train_ct(tmp_path / "r", "--resume", "auto",
                                           "--corrupted-images", "5")  # fmt: skip


def test_where_a_signal_came_is_said_of_the_plan():
    """Before, between and after the trainings of the plan; a search comes before it."""
    remaining, over = Remaining(), []
    remaining.end("trial")
    over.append(remaining.over)
    remaining.set({"given": 0, "a": 3, "b": 3})
    for stage in "ab":
        over.append(remaining.over)
        remaining.end(stage)
    assert [*over, remaining.over] == [False, False, False, True]


def test_the_line_of_a_stop_under_torchrun(monkeypatch):
    """It has the options that the environment tells."""
    monkeypatch.setattr(sys, "argv", ["/x/my method.py", "--overwrite", "--lr", "1"])
    monkeypatch.setattr(rundir, "world", lambda: 8)
    told = "'/x/my method.py' --lr 1 --resume auto"
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "3")
    first = "torchrun --standalone --nproc-per-node=8 --max-restarts=3"
    assert rundir.command_to_resume().endswith(f"&& {first} {told}")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    monkeypatch.delenv("TORCHELASTIC_MAX_RESTARTS")
    first = "torchrun --nnodes=2 --nproc-per-node=4 ..."
    assert rundir.command_to_resume().endswith(f"&& {first} {told}")


def told(capsys):
    """The options of the line that a stopped run prints."""
    command = capsys.readouterr().out.strip().splitlines()[-1].partition(" && python ")[2]
    return shlex.split(command)[1:]


def test_what_is_told_goes_on_to_the_same_end(tmp_path, monkeypatch, capsys, own_signals):
    """The line after a stop keeps the options that were given on the way: here more epochs."""
    train_ct(tmp_path / "r")
    with monkeypatch.context() as patch:
        at_step(patch, 10, lambda: os.kill(os.getpid(), signal.SIGTERM))
        with pytest.raises(SystemExit):
            extended = ["--resume", str(tmp_path / "r"), "--epochs", "5"]
            patch.setattr(sys, "argv", ["ct.py", *extended])
            run.cli(lambda argv: ct.main(ct.parse_args(argv)), lambda: extended)
    ct.main(ct.parse_args(told(capsys)))
    assert run.load_checkpoint(tmp_path / "r" / "last.pt")["step"] == 15


def test_options_of_the_optimizer_may_change_on_the_way(tmp_path, monkeypatch):
    """What --resume is given counts, not what the checkpoint was trained with."""
    train_ct(tmp_path / "r")
    seen = []
    real = torch.optim.SGD.step

    def step(self, *args, **kwargs):
        seen.append({k: self.param_groups[0][k] for k in ("momentum", "weight_decay")})
        return real(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.SGD, "step", step)
    changed = ["--epochs", "4", "--weight-decay", "0.1", "--momentum", "0.5"]
    ct.main(ct.parse_args(["--resume", str(tmp_path / "r"), *changed]))
    assert seen == [{"momentum": 0.5, "weight_decay": 0.1}] * 3


def test_options_that_do_not_fit_leave_the_run_as_it_was(tmp_path):
    train_ct(tmp_path / "r")
    for option, new in (("arch", "wrn10-1"), ("batch-size", "16"), ("limit", "50"), ("lam", "1")):
        with pytest.raises(UserError, match=rf"its --{option} is \S+, not {new}"):
            ct.main(ct.parse_args(["--resume", str(tmp_path / "r"), f"--{option}", new]))
    with pytest.raises(UserError, match=r"is a run of ct\.py"):
        fixup_penalty.main(fixup_penalty.parse_args(["--resume", str(tmp_path / "r")]))
    assert "error/student" in ct.main(ct.parse_args(["--resume", str(tmp_path / "r")]))


def test_a_stop_between_domains_goes_on_with_all(tmp_path, monkeypatch, capsys, own_signals):
    """Not with the domain that was being trained alone."""
    argv = [*TINY, "--lam", "0", "--epochs", "1", "--test-domain", "all"]
    argv += ["--out", str(tmp_path / "r"), "--eval-every", "1"]
    monkeypatch.setattr(sys, "argv", ["ct.py", *argv])
    with monkeypatch.context() as patch:
        at_step(patch, 0, lambda: os.kill(os.getpid(), signal.SIGTERM))
        with pytest.raises(SystemExit):
            run.cli(lambda a: ct.main(ct.parse_args(a)), lambda: argv)
    final = ct.main(ct.parse_args(told(capsys)))
    assert {k.split("/")[-1] for k in final} == set(shapes.STYLES)


def test_seeds_of_several_domains_go_on(tmp_path, monkeypatch):
    """The folder of a seed holds runs and is none itself."""
    argv = [*TINY, "--lam", "0", "--epochs", "1", "--test-domain", "all", "--seeds", "2"]
    argv += ["--out", str(tmp_path / "r"), "--eval-every", "1"]
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        at_step(patch, 0, keyboard)  # within the first seed's first domain
        ct.main(ct.parse_args(argv))
    assert (tmp_path / "r" / "s0").is_dir() and not (tmp_path / "r" / "s1").exists()
    final = ct.main(ct.parse_args([*argv, "--resume", "auto"]))
    assert len(final) == len({key.rpartition("/")[0] for key in final}) * 2


def test_second_ctrl_c_does_not_wait(tmp_path, monkeypatch, own_signals):
    def twice():
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    at_step(monkeypatch, 4, twice)
    with pytest.raises(SystemExit) as end:
        run.cli(lambda out: train_ct(out), lambda: tmp_path / "r")
    assert end.value.code == 130


# --- fp16 -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [12, pytest.param(1000, marks=pytest.mark.slow)])
def test_fp16_leaves_out_single_steps_and_stops_when_none_is_finite(tmp_path, monkeypatch, bad):
    """The scaler halves its scale at each step that overflows; without end that is a divergence."""
    real, count = torch.amp.GradScaler.unscale_, [0]

    def unscale(self, optimizer):
        count[0] += 1
        if count[0] <= bad:
            optimizer.param_groups[0]["params"][0].grad.fill_(torch.nan)
        return real(self, optimizer)

    monkeypatch.setattr(torch.amp.GradScaler, "unscale_", unscale)
    out = str(tmp_path / "r")
    argv = [*TINY, *"--lam 0 --epochs 15 --eval-every 15 --precision fp16".split()]
    argv += ["--log-every", "5", "--out", out]
    if bad == 12:
        ct.main(ct.parse_args(argv))
        assert finite(tmp_path / "r" / "last.pt")
    else:
        with pytest.raises(run.Diverged, match="fp16: no gradient was finite for many steps"):
            ct.main(ct.parse_args(argv))


# --- checkpoints ----------------------------------------------------------------------------------


def keyboard():
    raise KeyboardInterrupt


def interrupted(train, out, monkeypatch, step, *options):
    """Leave a run as an error within this step leaves it."""
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        at_step(patch, step, keyboard)
        train(out, *options)


def test_auto_begins_where_nothing_is(whole, tmp_path):
    train_ct(tmp_path / "r", "--resume", "auto")
    assert same(weights(tmp_path / "r" / "last.pt"), weights(whole["ct"] / "last.pt"))


@pytest.mark.parametrize("damage", ["truncated", "empty", "zeros", "missing"])
def test_a_broken_checkpoint_is_named_and_the_one_before_used(
    whole, tmp_path, monkeypatch, capsys, damage
):
    out = tmp_path / "r"
    interrupted(train_ct, out, monkeypatch, 7)
    newest, content = out / "last.pt", (out / "last.pt").read_bytes()
    assert run.load_checkpoint(newest)["step"] == 6
    assert run.load_checkpoint(out / "last.1.pt")["step"] == 3
    if damage == "missing":
        newest.unlink()
    else:
        kept = {"truncated": content[: len(content) // 2], "empty": b"", "zeros": bytes(5000)}
        newest.write_bytes(kept[damage])
    capsys.readouterr()
    train_ct(out, "--resume", "auto")
    assert damage == "missing" or f"warning: {newest}: truncated" in capsys.readouterr().err
    assert same(weights(newest), weights(whole["ct"] / "last.pt"))


def test_no_loadable_checkpoint_is_an_error(tmp_path, monkeypatch):
    out = tmp_path / "r"
    interrupted(train_ct, out, monkeypatch, 7)
    for file in out.glob("last*.pt"):
        file.write_bytes(b"")
    with pytest.raises(UserError, match="no older one loads either"):
        train_ct(out, "--resume", "auto")


def test_two_checkpoints_while_it_trains_one_when_it_ended(tmp_path, monkeypatch):
    """--save-minutes ~0: every step. The one before is kept until the network is trained."""
    interrupted(train_ct, tmp_path / "r", monkeypatch, 7, "--save-minutes", "1e-9")
    names = ["last.1.pt", "last.pt"]
    assert names == sorted(file.name for file in tmp_path.glob("r/*.pt"))
    assert [run.load_checkpoint(tmp_path / "r" / name)["step"] for name in names] == [6, 7]
    train_ct(tmp_path / "r", "--resume", "auto")
    assert [file.name for file in tmp_path.glob("r/*.pt")] == ["last.pt"]


def test_minutes_and_epochs(tmp_path, monkeypatch):
    """Every epoch; with --save-every 3 and no minutes only the end is written."""
    saved = []
    monkeypatch.setattr(run.RunDir, "save", lambda self, name, c: saved.append(c["step"]))
    train_ct(tmp_path / "a")
    train_ct(tmp_path / "b", "--save-every", "3")
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    at_step(monkeypatch, 4, lambda: now.__setitem__(0, 121.0))
    train_ct(tmp_path / "c", "--save-every", "3", "--save-minutes", "2")
    assert saved == [3, 6, 9, 9, 5, 9]


@pytest.mark.parametrize(
    ("every", "steps"),
    [("0.5", [2, 3, 4, 6, 8, 9]), ("0.8", [2, 5, 7, 9]), ("2", [6, 9]), ("0.01", [*range(1, 10)])],
)
def test_evaluations_stand_at_parts_of_an_epoch(every, steps, tmp_path):
    """At the step nearest to each multiple of --eval-every, of 3 steps an epoch, and at the end."""
    train_ct(tmp_path, "--eval-every", every)
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "error" in line.get("eval", ())] == steps


def test_slow_checkpoints_are_fewer(tmp_path, monkeypatch):
    """A checkpoint that takes a second is written 50 seconds later at the earliest, and at the
    end; with --save-every 1 after every epoch all the same."""
    saved, now = [], [0.0]

    def save(self, name, content):
        saved.append(content["step"])
        now[0] += 1.0

    monkeypatch.setattr(run.RunDir, "save", save)
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    at_step(monkeypatch, 13, lambda: now.__setitem__(0, now[0] + 51))
    argv = [*TINY, "--lam", "0", "--epochs", "6", "--out", str(tmp_path / "a")]
    ct.main(ct.parse_args(argv))  # 3 steps an epoch
    assert saved == [3, 15, 18]
    saved.clear()
    train_ct(tmp_path / "b")
    assert saved == [3, 6, 9]


def test_full_disk_during_a_run(whole, tmp_path, monkeypatch):
    """One line, the last good checkpoint whole; with space again the run goes on from it."""
    real, calls = os.fsync, []

    def full(descriptor):
        calls.append(0)
        if len(calls) == 2:
            raise OSError(28, "No space left on device")
        real(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(UserError, match=r"last.pt: No space left.*the one before it is whole"):
            train_ct(tmp_path / "r")
    assert run.load_checkpoint(tmp_path / "r")["step"] == 3
    assert not list(tmp_path.glob("r/.*.pt.*"))
    train_ct(tmp_path / "r", "--resume", "auto")
    assert same(weights(tmp_path / "r" / "last.pt"), weights(whole["ct"] / "last.pt"))


@pytest.mark.parametrize("place", ["open", "link"])
def test_read_only_directory(tmp_path, monkeypatch, place):
    """Nothing can be created there any more: the old file stays, under its name."""
    path = tmp_path / "last.pt"
    run.save_checkpoint(path, {"x": 1})
    before = path.read_bytes()

    def refuse(*args, **kwargs):
        raise OSError(30, "Read-only file system")

    if place == "open":
        monkeypatch.setattr("builtins.open", refuse)
    else:
        monkeypatch.setattr(os, "link", refuse)
        monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(UserError, match=r"last.pt: Read-only file system; the one before it is"):
        run.save_checkpoint(path, {"x": 2}, keep=2)
    monkeypatch.undo()
    assert path.read_bytes() == before and [f.name for f in tmp_path.iterdir()] == ["last.pt"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes into read-only directories")
def test_real_read_only_directory(tmp_path):
    run.save_checkpoint(tmp_path / "last.pt", {"x": 1})
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(UserError, match="Permission denied"):
            run.save_checkpoint(tmp_path / "last.pt", {"x": 2}, keep=2)
    finally:
        tmp_path.chmod(0o700)


def test_file_system_without_links(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "link", lambda *names: (_ for _ in ()).throw(OSError(1, "no links")))
    for x in (1, 2, 3):
        run.save_checkpoint(tmp_path / "last.pt", {"x": x}, keep=2)
    found = [
        torch.load(tmp_path / name, weights_only=True)["x"] for name in ("last.pt", "last.1.pt")
    ]
    assert found == [3, 2]


def test_means_of_the_training_go_on(tmp_path, monkeypatch):
    """Means over steps before and after a stop, in the log and in the final numbers."""

    def numbers(out):
        found = [x for x in lines(out) if "loss" in x or x.get("event") == "end"]
        return [{k: v for k, v in x.items() if k not in ("images_per_s", "seconds")} for x in found]

    one = ["--save-minutes", "1e-9"]
    train_fixup(tmp_path / "whole", *one)
    interrupted(train_fixup, tmp_path / "r", monkeypatch, 7, *one)  # of 9, within an epoch
    train_fixup(tmp_path / "r", "--resume", "auto", *one)
    assert numbers(tmp_path / "r") == numbers(tmp_path / "whole")


def test_a_training_is_not_made_shorter(tmp_path):
    train_ct(tmp_path / "r")
    with pytest.raises(UserError, match="student was trained for 9 steps, which is more than 6"):
        train_ct(tmp_path / "r", "--resume", "auto", "--epochs", "2")


def test_one_network_does_not_become_several(tmp_path):
    """The files would have other names, and the network would be trained again."""
    train_nofrost(tmp_path / "one", "--epochs", "1")
    with pytest.raises(UserError, match=r"holds last\.pt, of a run of one network; begin another"):
        nofrost.main(nofrost.parse_args(["--resume", str(tmp_path / "one"), "--norms", "nf,bn"]))
    train_fixup(tmp_path / "two", "--epochs", "1")
    with pytest.raises(UserError, match=r"holds last\.pt, of a run of one network"):
        argv = ["--resume", str(tmp_path / "two"), "--seeds", "2"]
        fixup_penalty.main(fixup_penalty.parse_args(argv))
    argv = ["--epochs", "1", "--out", str(tmp_path / "three"), "--norms", "nf,bn"]
    words = (
        "--arch wrn10-1 --batch-size 32 --probe-images 20 --robust-images 0 --device cpu".split()
    )
    nofrost.main(nofrost.parse_args([*words, *argv, "--attack-steps", "1"]))
    with pytest.raises(UserError, match=r"holds nf\.pt, of a run of several networks"):
        nofrost.main(nofrost.parse_args(["--resume", str(tmp_path / "three"), "--norms", "nf"]))


def test_overwrite_replaces_its_own_run_alone(tmp_path):
    train_ct(tmp_path / "r" / "s0")
    train_ct(tmp_path / "r")
    before = sorted((tmp_path / "r" / "s0").rglob("events.out.*"))
    old = set((tmp_path / "r" / "student").glob("events.out.*"))
    train_ct(tmp_path / "r", "--overwrite")
    assert sorted((tmp_path / "r" / "s0").rglob("events.out.*")) == before and before
    assert not old & set((tmp_path / "r" / "student").glob("events.out.*")) and old
    teacher = ["--teacher", str(tmp_path / "r" / "last.pt"), "--lam", "1"]
    with pytest.raises(UserError, match=r"--overwrite: .*last\.pt lies in .*, which is replaced"):
        train_ct(tmp_path / "r", "--overwrite", *teacher)
    assert (tmp_path / "r" / "last.pt").is_file()


def test_options_that_do_not_fit_the_checkpoint(tmp_path, monkeypatch):
    interrupted(train_ct, tmp_path / "r", monkeypatch, 7)
    options = json.loads((tmp_path / "r" / "args.json").read_text()) | {"arch": "resnet14"}
    (tmp_path / "r" / "args.json").write_text(json.dumps(options))
    with pytest.raises(UserError, match=r"last.pt: does not fit these options"):
        ct.main(ct.parse_args(["--resume", str(tmp_path / "r")]))


# --- the run directory ----------------------------------------------------------------------------

HOLDER = """
    import sys, time
    from pathlib import Path
    from common import run
    held = run.lock(Path(sys.argv[1]))
    print("locked", flush=True)
    time.sleep(600)
"""


def test_two_runs_in_one_directory(tmp_path):
    """The second is refused and touches nothing; when the first is killed the lock is gone."""
    out = tmp_path / "r"
    train_ct(out)
    before = {f.name: f.stat().st_mtime_ns for f in out.iterdir() if f.is_file()}
    holder = subprocess.Popen([sys.executable, "-c", textwrap.dedent(HOLDER), str(out)],
                              cwd=run.ROOT, stdout=subprocess.PIPE, text=True)  # fmt: skip
    try:
        assert holder.stdout.readline() == "locked\n"
        for option in (["--overwrite"], ["--resume", str(out)]):
            with pytest.raises(UserError, match="another process is training in it"):
                train_ct(out, *option)
        del before[".lock"]
        assert before == {name: (out / name).stat().st_mtime_ns for name in before}
    finally:
        holder.kill()
        holder.wait()
        holder.stdout.close()
    train_ct(out, "--resume", str(out))


@pytest.mark.parametrize("tail", ['{"stage": "stud', "\0\0\0", '{"a": 1}'])
def test_torn_log(whole, tmp_path, monkeypatch, tail):
    """What a kill left of a line is cut off; the lines before stay as they are."""
    out = tmp_path / "r"
    interrupted(train_ct, out, monkeypatch, 7)
    with open(out / "log.jsonl", "a") as file:
        before = (out / "log.jsonl").read_text()
        file.write(tail)
    train_ct(out, "--resume", str(out))
    assert (out / "log.jsonl").read_text().startswith(before)
    assert [line["epoch"] for line in lines(out) if "epoch" in line] == [1, 2, 3]


def test_events_reach_the_disk_with_the_checkpoint(tmp_path, monkeypatch):
    """Nothing is closed or waited for: at the moment of a kill after step 7 those of step 6 are
    in the file."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    seen = []

    def look():
        events = EventAccumulator(str(tmp_path / "r" / "student")).Reload()
        seen.extend(event.step for event in events.Scalars("loss"))

    at_step(monkeypatch, 7, look)
    train_ct(tmp_path / "r")
    assert seen == [3, 6]


# --- numerical faults -----------------------------------------------------------------------------


def poison(monkeypatch, steps, what):
    """Let the loss, or the gradients alone, of these steps be NaN."""
    real = run.Loop.step

    def step(self, lr, clip=0.0):
        if self.done - 1 in steps:
            for parameter in self.model.parameters():
                parameter.grad.mul_(torch.nan)
            for buffer in self.model.buffers():
                if buffer.is_floating_point() and what == "loss":
                    buffer.mul_(torch.nan)  # as running statistics of a batch with NaN
            self._loss = self._loss * (torch.nan if what == "loss" else 1)
        return real(self, lr, clip)

    monkeypatch.setattr(run.Loop, "step", step)


@pytest.mark.parametrize("what", ["loss", "gradient"])
@pytest.mark.parametrize("name", TRAINERS)
def test_nan_stops_the_run(tmp_path, monkeypatch, name, what):
    """With step, lr and gradient norm; the checkpoint is from before, and finite."""
    train = TRAINERS[name][0]
    poison(monkeypatch, {4}, what)
    if name == "bn_ablation":  # there it is a result
        assert train(tmp_path / "r")["diverged/bn-lr0.1"] == 4
    else:
        with pytest.raises(
            run.Diverged, match=r"step 4 \(lr 0\.\d+, gradient norm nan\)"
        ) as caught:
            train(tmp_path / "r")
        assert caught.value.step == 4
    for path in tmp_path.glob("r/*.pt"):
        assert run.load_checkpoint(path)["step"] == 3 and finite(path)


def test_weights_that_are_not_finite_are_not_written(tmp_path):
    record = run.RunDir(argparse.Namespace(out=str(tmp_path), overwrite=False, resume=None, seed=0,
                                        dataset="shapes", arch="resnet8"), __file__)  # fmt: skip
    model = models.build("resnet8")
    for name in ("conv1.weight", "bn1.running_var"):
        state = {k: v.clone() for k, v in model.state_dict().items()}
        state[name].view(-1)[0] = torch.inf
        with pytest.raises(run.Diverged, match="weights not finite after 7 steps; not written"):
            record.save("last.pt", model.spec | {"model": state, "step": 7})
    state = {"state": {0: {"momentum_buffer": torch.tensor([torch.nan])}}}
    with pytest.raises(run.Diverged):
        record.save("last.pt", model.spec | {"model": model.state_dict(), "optimizer": state})
    assert not list(tmp_path.glob("*.pt"))
    record.close({})


# --- data archives --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_an_archive_cannot_leave_its_folder(tmp_path, monkeypatch, name):
    """One with ../ and absolute paths is refused by its MD5 before anything of it is unpacked."""
    from torchvision.datasets import utils

    outside, fetched = tmp_path / "outside", []

    def retrieve(url, filename, *rest, **options):
        fetched.append(filename)
        with tarfile.open(filename, "w:gz") as archive:
            for path in ("../../escaped", str(outside), "cifar-10-batches-py/x"):
                archive.addfile(tarfile.TarInfo(path))

    monkeypatch.setattr(utils, "_urlretrieve", retrieve)
    monkeypatch.setattr(utils, "_get_redirect_url", lambda url, *rest, **options: url)
    with pytest.raises(UserError, match="download failed"):
        data.load(name, tmp_path / "a" / "data")
    files = [f for f in tmp_path.rglob("*") if f.is_file()]
    assert fetched and files == [] and not outside.exists()


# --- memory ---------------------------------------------------------------------------------------


def peak():
    """The most memory that this process has had, MiB: unlike the present figure, it does not depend
    on what the allocator gave back after an earlier test."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in KiB on Linux only")
def test_memory_does_not_grow(tmp_path, monkeypatch):
    """2,000 steps with 42 checkpoints and their logs: less than 2 % above that of step 200."""
    found, real = {}, run.Loop.step

    def step(self, lr, clip=0.0):
        real(self, lr, clip)
        if self.done in (200, 1000, 2000):
            found[self.done] = peak()

    monkeypatch.setattr(run.Loop, "step", step)
    train_ct(tmp_path / "r", *"--batch-size 8 --epochs 167 --save-every 4 --eval-every 4".split())
    print({k: f"{v:.1f} MiB" for k, v in found.items()})
    assert found[2000] < 1.02 * found[200]
