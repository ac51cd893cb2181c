"""ct.py in-process on small shapes data: what it promises, and its wrong options."""

import json
import math
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import ct
from common import data, run
from common.run import UserError

FAST = "--arch resnet8 --epochs 2 --batch-size 32 --corrupted-images 10".split()
FAST += "--eval-every 1 --precision fp32 --device cpu --dataset shapes".split()


@pytest.fixture(autouse=True)
def small_shapes(monkeypatch):
    monkeypatch.setattr(data.sets, "SHAPES_SIZES", {"train": 96, "test": 40})


def train(out, *options):
    return ct.main(ct.parse_args([*FAST, "--out", str(out), *options]))


def weights(path):
    return torch.load(path, weights_only=True)["model"]


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """One full run: teacher, baseline and student."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data.sets, "SHAPES_SIZES", {"train": 96, "test": 40})
        out = tmp_path_factory.mktemp("ct") / "run"
        return out, train(out, "--lam", "1")


def test_full_run(finished):
    out, final = finished
    stages = ("teacher", "baseline", "student")
    assert set(final) == {f"{k}/{s}" for k in ("error", "corrupted") for s in stages}
    assert all(0 <= v <= 100 for v in final.values())
    files = {"teacher.pt": "none", "baseline.pt": "bn", "last.pt": "bn"}
    for name, norm in files.items():
        checkpoint = run.load_checkpoint(out / name)
        assert checkpoint["norm"] == norm
        assert checkpoint["step"] == checkpoint["total"] == (12 if norm == "none" else 6)
        assert checkpoint["args"]["lam"] == 1 and checkpoint["method"] == "ct"
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert [x["stage"] for x in lines if "stage" in x] == [
        *["teacher"] * 4, *["baseline"] * 2, *["student"] * 2
    ]  # fmt: skip
    assert all(math.isfinite(x["loss"]) for x in lines if "stage" in x)


def test_lam_0_is_the_baseline_bit_for_bit(finished, tmp_path):
    out, _ = finished
    train(tmp_path / "zero", "--lam", "0", "--teacher", str(out / "teacher.pt"))
    assert same(weights(tmp_path / "zero" / "last.pt"), weights(out / "baseline.pt"))
    assert not same(weights(out / "last.pt"), weights(out / "baseline.pt"))
    assert not (tmp_path / "zero" / "teacher.pt").exists()


def test_given_teacher_is_the_trained_one_and_stays_frozen(finished, tmp_path):
    """A student of a given checkpoint equals the student of the run that trained it."""
    out, _ = finished
    before = (out / "teacher.pt").read_bytes()
    train(tmp_path / "b", "--teacher", str(out / "teacher.pt"), "--no-baseline", "--lam", "1")
    assert same(weights(tmp_path / "b" / "last.pt"), weights(out / "last.pt"))
    assert (out / "teacher.pt").read_bytes() == before


@pytest.mark.parametrize("stop", ["teacher", "student"])
def test_resume_is_exact(finished, tmp_path, monkeypatch, stop):
    """Interrupted after the first epoch of a stage and resumed: the same weights, bit for bit."""
    out, _ = finished
    real = run.RunDir.save

    def save(self, name, checkpoint):
        real(self, name, checkpoint)
        if checkpoint["stage"] == stop and checkpoint["step"] == 3:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(run.RunDir, "save", save)
        train(tmp_path / "r", "--lam", "1")
    args = ct.parse_args(["--resume", str(tmp_path / "r")])
    assert args.epochs == 2 and args.batch_size == 32
    ct.main(args)
    assert same(weights(tmp_path / "r" / "last.pt"), weights(out / "last.pt"))
    assert same(weights(tmp_path / "r" / "teacher.pt"), weights(out / "teacher.pt"))


@pytest.mark.parametrize("options", [["--distance", "cosine", "--student-init", "teacher"],
                                     ["--distance", "kl"], ["--distance", "relative"],
                                     ["--distance", "mse", "--match", "logits"],
                                     ["--policy", "cutout"], ["--policy", "augmix"],
                                     ["--arch", "allconv", "--precision", "bf16"]])  # fmt: skip
def test_options_train(finished, tmp_path, options):
    own = [] if "--arch" in options else ["--teacher", str(finished[0] / "teacher.pt")]
    final = train(tmp_path / "r", *own, *options, "--epochs", "1", "--no-baseline")
    assert math.isfinite(final["error/student"])


def test_student_starts_from_the_teacher(finished, tmp_path, monkeypatch):
    """Its control, --lam 0, starts there too and never calls the distance."""
    teacher = weights(finished[0] / "teacher.pt")
    seen = []
    monkeypatch.setattr(ct, "train", lambda stage, model, *rest, **kw: seen.append((model, kw)))
    options = ["--student-init", "teacher", "--teacher", str(finished[0] / "teacher.pt")]
    for lam in "01":
        train(tmp_path / lam, *options, "--lam", lam, "--no-baseline")
    for model, _ in seen:
        start = model.state_dict()
        assert torch.equal(start["layer1.0.conv1.weight"], teacher["layer1.0.conv1.weight"])
        assert torch.equal(start["fc.weight"], teacher["fc.weight"])
        assert start["bn1.running_var"].eq(1).all()
    assert [kw["teacher"] is None for _, kw in seen] == [True, False]


def test_distances_by_hand():
    s, t = torch.tensor([[1.0, 2.0], [0.0, 1.0]]), torch.tensor([[1.0, 0.0], [0.0, 2.0]])
    assert ct.distance("mse", s, t, 1).item() == pytest.approx((0 + 4 + 0 + 1) / 4)
    assert ct.distance("relative", s, t, 1).item() == pytest.approx(1.25 / (5 / 4))
    assert ct.distance("cosine", s, t, 1).item() == pytest.approx(1 - (5**-0.5 + 1) / 2)
    p, q = F.softmax(t / 4, 1), F.softmax(s / 4, 1)
    kl = (p * (p / q).log()).sum(1).mean() * 16
    assert ct.distance("kl", s, t, 4).item() == pytest.approx(kl.item(), rel=1e-5)
    for kind in ("mse", "relative", "cosine", "kl"):
        assert ct.distance(kind, t, t, 4).item() == pytest.approx(0, abs=1e-6)


def test_lr_is_a_function_of_the_step():
    rates = [ct.lr_at(s, 100, 0.1, 10) for s in range(101)]
    assert rates[9] == pytest.approx(0.1) and max(rates) == pytest.approx(0.1)
    assert rates[:10] == sorted(rates[:10]) and rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[55] == pytest.approx(0.05) and rates[100] == pytest.approx(0)


def test_user_line_parses():
    """The line the README gives for the full job."""
    args = ct.parse_args("--dataset cifar100 --arch wrn28".split())
    assert (args.epochs, args.batch_size, args.lr) == (100, 128, 0.1)


@pytest.mark.slow
def test_user_line_runs(tmp_path, monkeypatch):
    """`python ct.py --dataset cifar100 --arch wrn28` as it stands, on a CIFAR-100 of 128 images."""
    rng = np.random.default_rng(0)
    x, y = rng.integers(256, size=(128, 32, 32, 3), dtype=np.uint8), np.arange(128) % 100
    (tmp_path / "data").mkdir()
    np.savez(tmp_path / "data" / "cifar100.npz", x_train=x, y_train=y, x_test=x[:4], y_test=y[:4])
    monkeypatch.chdir(tmp_path)
    final = ct.main(ct.parse_args("--dataset cifar100 --arch wrn28 --epochs 1".split()))
    assert math.isfinite(final["error/student"])
    assert (tmp_path / "runs" / "ct-cifar100-wrn28-epochs-1-s0" / "last.pt").is_file()


# --- bad input ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (["--dataset", "cifar11"], "invalid choice"),
        (["--batch-size", "0"], "above 0"),
        (["--epochs", "-1"], "above 0"),
        (["--lam", "-1"], "at least 0"),
        (["--lam", "nan"], "at least 0"),
        (["--limit", "-5"], "at least 0"),
        (["--distance", "kl", "--match", "features"], "--match logits"),
        (["--nonsense"], "unrecognized"),
        (["--resume", "nowhere"], "no args.json"),
    ],
)
def test_bad_options(options, text):
    with pytest.raises(UserError, match=text):
        ct.parse_args(options)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (["--arch", "resnet9"], "--arch resnet9: unknown"),
        (["--norm", "batch"], "invalid choice: 'batch'"),
        (["--teacher", "none.pt"], "no such checkpoint"),
        (["--batch-size", "97"], "only 96 images"),
        (["--val-size", "96"], "only 96 training images"),
        (["--device", "cuda:99"], "--device cuda:99"),
    ],
)
def test_bad_runs_leave_nothing(tmp_path, options, text):
    with pytest.raises(UserError, match=text):
        train(tmp_path / "r", *options)
    assert not (tmp_path / "r").exists()


def test_teacher_that_does_not_fit(finished, tmp_path):
    teacher = str(finished[0] / "teacher.pt")
    with pytest.raises(UserError, match="its arch is resnet8, the student's is resnet14"):
        train(tmp_path / "r", "--teacher", teacher, "--arch", "resnet14")
    checkpoint = torch.load(teacher, weights_only=True) | {"num_classes": 7}
    torch.save(checkpoint, tmp_path / "seven.pt")
    with pytest.raises(UserError, match="its num_classes is 7, the student's is 10"):
        train(tmp_path / "r", "--teacher", str(tmp_path / "seven.pt"))
    assert not (tmp_path / "r").exists()


def test_divergence_stops_before_the_checkpoint(tmp_path):
    with pytest.raises(UserError, match=r"at step \d+ \(lr"):
        train(tmp_path / "r", "--lam", "0", "--lr", "1e30", "--warmup", "0")
    assert not (tmp_path / "r" / "last.pt").exists()


def test_error_is_one_line_and_status_2(tmp_path):
    command = [sys.executable, str(run.ROOT / "ct.py"), "--arch", "resnet9", "--limit", "200"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: --arch resnet9: unknown")
    assert done.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_help_mentions_every_group():
    done = subprocess.run([sys.executable, str(run.ROOT / "ct.py"), "--help"],
                          capture_output=True, text=True)  # fmt: skip
    assert done.returncode == 0
    for word in ("--dataset", "--lam", "--teacher", "--out", "--precision"):
        assert word in done.stdout


def test_the_sentence_is_made_of_the_numbers():
    columns = {
        "clean": {"teacher": 11.0, "baseline": 99.0, "CT": 90.0},
        "shortcut swapped": {"teacher": 11.0, "baseline": 0.0, "CT": 70.0},
    }
    sentence = ct.verdict(columns, 15.0)
    assert "teacher has not learnt (11.0 % with it" in sentence
    assert "baseline reads the shortcut (99.0 % with it, 0.0 % swapped)" in sentence
    assert "CT looks at the picture (90.0 % with it, 70.0 % swapped)" in sentence


def test_the_sentence_speaks_of_nothing_that_was_not_measured():
    clean = {"teacher": 80.0, "baseline": 90.0, "CT": 91.0}
    corrupted = {"teacher": 70.0, "baseline": 60.0, "CT": 65.5}
    assert ct.verdict({"clean": {"CT": 91.0}}, 15.0) == "clean: CT 91.0 %."
    assert ct.verdict({"clean": clean, "corrupted": corrupted}, 15.0) == (
        "clean / corrupted: teacher 80.0 / 70.0 %, baseline 90.0 / 60.0 %, CT 91.0 / 65.5 %, "
        "CT against baseline +1.0 clean, CT against baseline +5.5 corrupted."
    )


@pytest.mark.parametrize(
    "line, interval",
    [("", 0.8), ("--dataset cifar10", 5), ("--dataset cifar10 --epochs 20", 2),
     ("--dataset cifar10 --epochs 6", 1), ("--dataset cifar10 --epochs 20 --eval-every 5", 5)],
)  # fmt: skip
def test_a_curve_of_a_short_training_has_ten_points(line, interval):
    """Or one an epoch; --eval-every is taken as it is given."""
    assert ct.parse_args(line.split()).eval_every == interval
