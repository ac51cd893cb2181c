"""What a training ends with: its table, over seeds too, and commands that run as printed."""

import importlib.util
import re
import shlex
from pathlib import Path

import pytest

import bn_ablation
import ct
import fixup_penalty
import nofrost
from common import data, models, run

SMALL = "--dataset shapes --batch-size 16 --precision fp32 --device cpu --limit 32 "
SCRIPTS = {
    ct: "--arch resnet8 --image-size 24 --epochs 1 --lam 0 --corrupted-images 0",
    nofrost: "--arch resnet8 --image-size 16 --epochs 1 --norm bn --robust-images 4 "
    "--probe-images 4 --eval-every 1",
    fixup_penalty: "--image-size 16 --epochs 1 --variants none,bn",
    bn_ablation: "--arch vgg11-4 --steps 4 --measure-every 2 --norms bn,none --eval-every 4",
}


@pytest.fixture(autouse=True)
def small_shapes(monkeypatch):
    monkeypatch.setattr(data.sets, "SHAPES_SIZES", {"train": 96, "test": 40})


def train(script, *more):
    return script.main(script.parse_args([*SMALL.split(), *SCRIPTS[script].split(), *more]))


def commands(printed):
    """The words of each command under "Next:"."""
    lines = printed.partition("\nNext:\n")[2].splitlines()
    return [shlex.split(line) for line in lines if line.startswith("  ") and line[2] != "#"]


def parse(words):
    """What the script of a command makes of its options; UserError where it refuses them."""
    spec = importlib.util.spec_from_file_location("told", words[1])
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    return script.parse_args(words[2:])


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda s: s.__name__)
@pytest.mark.parametrize("odd", [False, True])
def test_commands_run_as_printed(script, odd, tmp_path, monkeypatch, capsys):
    """From another directory too; --out and --data-dir with a space in them, or left out."""
    monkeypatch.chdir(tmp_path)
    train(script, *(["--out", "my runs/a", "--data-dir", "my data"] if odd else []))
    logs, *others = commands(capsys.readouterr().out)
    assert logs[:2] == ["tensorboard", "--logdir"]
    assert list(Path(logs[2]).glob("**/events.out.*")) and Path(logs[2]).name != "runs"
    assert others
    for words in others:
        args = parse(words)
        if "/eval/" in words[1]:
            assert Path(args.checkpoints[0]).is_file()
        if "gaussian" not in vars(args).values():
            assert args.data_dir == ("my data" if odd else "data")


def told(tmp_path, arch, dataset, capsys):
    args = ct.parse_args(["--arch", arch, "--dataset", dataset])
    following = {"x": "tensorboard", "y": ["eval/corruptions.py", "a.pt"],
                 "z": "ct.py --dataset cifar10"}  # fmt: skip
    run.print_findings("p.", "h.", args, tmp_path, following)
    return [words[1:] for words in commands(capsys.readouterr().out)]


def test_a_network_of_the_users_is_named(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(run.ROOT)
    lines = told(tmp_path, "my_model.py:make", "shapes", capsys)
    assert lines[1] == ["eval/corruptions.py", "a.pt", "--arch", "my_model.py:make"]
    assert lines[2] == ["ct.py", "--dataset", "cifar10"]


def test_no_command_repeats_the_run(tmp_path, capsys):
    """The same data set is left out, another one with the same network is not."""
    assert len(told(tmp_path, "resnet8", "cifar10", capsys)) == 2
    assert len(told(tmp_path, "resnet8", "shapes", capsys)) == 3
    args = bn_ablation.parse_args([])
    following = {"a": "bn_ablation.py --dataset cifar10 --arch vgg11-16", "b": "ct.py --arch dln25"}
    run.print_findings("p.", "h.", args, tmp_path, following)
    args = bn_ablation.parse_args(["--arch", "dln25"])
    run.print_findings("p.", "h.", args, tmp_path, following)
    assert capsys.readouterr().out.count("  python") == 3


def test_names_of_rows():
    errors = {"error": {"student": 10.0, "student/sketch": 20.0, "bn": 30.0}, "other": {"bn": 1.0}}
    found = run.accuracy_columns(errors, {"error": "clean"}, {"student": "CT"})
    assert found == {"clean": {"CT": 90.0, "CT/sketch": 80.0, "bn": 70.0}}


@pytest.mark.parametrize("script", [ct, nofrost, bn_ablation], ids=lambda s: s.__name__)
def test_the_table_over_seeds_is_that_of_a_seed(script, tmp_path, capsys):
    """The same titles and rows, and the mean of the cells of the seeds' tables."""
    train(script, "--seeds", "2", "--out", str(tmp_path / "r"))
    printed = capsys.readouterr().out
    tables = []
    for block in re.split(r"\n\n+", printed):
        lines = block.splitlines()
        if len(lines) > 2 and set(lines[1]) == {"-"}:
            tables.append([re.split(r"  +", line) for line in (lines[0], *lines[2:])])
    first, second, mean = tables
    assert mean[0][0] == f"{first[0][0]}; mean +- sd of 2 seeds"
    assert mean[0][1:] == first[0][1:]
    names = [row[0] for row in mean[1:]]
    for a, b in zip(first[1:], second[1:], strict=False):
        if len(a) == len(first[0]) == len(b):  # a row of the table, not what follows it
            row = mean[1 + names.index(a[0])]
            halves = [(float(x) + float(y)) / 2 for x, y in zip(a[1:], b[1:], strict=True)]
            shown = [float(cell.split(" +- ")[0]) for cell in row[1:]]
            assert shown == pytest.approx(halves, rel=2e-3, abs=0.011)


def test_a_student_without_its_loss_is_no_ct(tmp_path, capsys):
    train(ct, "--norm", "none", "--out", str(tmp_path / "r"))
    printed = capsys.readouterr().out
    assert "CT" not in printed.partition("Paper:")[0] and re.search(r"^none  ", printed, re.M)
    assert ct.titles(ct.parse_args(["--lam", "1"]))["student"] == "CT"


def test_a_teacher_that_is_none_is_said(tmp_path, capsys):
    """BatchNorm, an unfinished training, other data: a warning each, and one line each."""
    train(ct, "--norm", "bn", "--out", str(tmp_path / "bn"))
    file = tmp_path / "bn" / "last.pt"
    checkpoint = run.load_checkpoint(file)
    args = ct.parse_args(["--dataset", "shapes"])
    student = models.build("resnet8", "bn", 10, 24)
    capsys.readouterr()
    models.load_teacher(file, student, "cpu", args)
    assert capsys.readouterr().out.splitlines() == [
        f"warning: --teacher {file}: has BatchNorm, which the method's teacher lacks"
    ]
    with pytest.raises(run.UserError, match="its image_size is 24, the student's is 32"):
        models.load_teacher(file, models.build("resnet8", "bn", 10, 32), "cpu", args)
    run.save_checkpoint(file, checkpoint | {"step": 1, "total": 750})
    models.load_teacher(file, student, "cpu", ct.parse_args(["--dataset", "cifar10"]))
    printed = capsys.readouterr().out
    assert "step 1 of 750, its training has not ended" in printed
    assert "was trained on shapes, the student is on cifar10" in printed
    train(ct, "--norm", "none", "--out", str(tmp_path / "none"))
    capsys.readouterr()
    models.load_teacher(tmp_path / "none" / "last.pt", student, "cpu", args)
    assert capsys.readouterr().out == ""
    args.test_domain = "outline"  # which that teacher has seen
    models.load_teacher(tmp_path / "none" / "last.pt", student, "cpu", args)
    assert "the student is on shapes without outline" in capsys.readouterr().out
