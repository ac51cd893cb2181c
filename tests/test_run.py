"""Seeds, precision, metrics, checkpoints and the run directory."""

import argparse
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from common import data, models, run
from common.run import UserError
from common.run.progress import Rows, shown


class Args:
    out, overwrite, resume, seed, dataset, arch = None, False, None, 0, "shapes", "resnet8"
    differs, eval_every, log_every, save_every, save_minutes = {}, 1, 50, 1, None

    def __init__(self, **options):
        self.__dict__.update({k: getattr(Args, k) for k in vars(Args) if k[0] != "_"} | options)


# --- randomness, metrics --------------------------------------------------------------------------


def test_generator_depends_on_the_key_alone():
    draw = [torch.rand(3, generator=run.generator(0, "epoch", e)) for e in (0, 1, 0)]
    assert torch.equal(draw[0], draw[2]) and not torch.equal(draw[0], draw[1])
    code = "from common import run; print(run.seed_key(0, 'epoch', 1))"
    outputs = {
        subprocess.run([sys.executable, "-c", code], cwd=run.ROOT, text=True, capture_output=True,
                       env=os.environ | {"PYTHONHASHSEED": seed}).stdout
        for seed in "12"
    }  # fmt: skip
    assert outputs == {f"{run.seed_key(0, 'epoch', 1)}\n"}


def test_metrics_by_hand():
    """Two of four wrong; confidences 0.9 (right, wrong), 0.6 (right, wrong): ECE by its sum."""
    p = torch.tensor([[0.9, 0.1], [0.9, 0.1], [0.4, 0.6], [0.4, 0.6]])
    result = run.metrics(p.log(), torch.tensor([0, 1, 1, 0]))
    assert result["error"] == 50
    assert result["ece"] == pytest.approx(100 * (2 * 0.4 + 2 * 0.1) / 4, abs=1e-4)
    want = -(p[0, 0].log() + p[1, 1].log() + p[2, 1].log() + p[3, 0].log()) / 4
    assert result["loss"] == pytest.approx(want.item())


def test_metrics_of_logits_that_are_not_finite():
    """NaN decides nothing, nor infinity beside infinity; a single one does, as in an attack."""
    inf, nan = torch.inf, torch.nan
    logits = torch.tensor([[9.0, nan], [inf, inf], [1.0, inf], [1.0, inf], [9.0, -inf]])
    result = run.metrics(logits, torch.tensor([0, 0, 1, 0, 0]))
    assert result["error"] == pytest.approx(60)  # NaN, two infinities, and the fourth
    assert result["ece"] == pytest.approx(20)
    assert "not finite" in run.not_finite(result)
    assert run.not_finite(run.metrics(torch.zeros(2, 2), torch.zeros(2).long())) is None


def test_evaluate_restores_modes_and_ignores_batch_size():
    model = models.build("allconv").train()
    model.body[1].eval()  # a submodule somebody froze
    modes = [m.training for m in model.modules()]
    before = {k: v.clone() for k, v in model.state_dict().items()}
    x, y = torch.randint(256, (7, 3, 32, 32), dtype=torch.uint8), torch.arange(7)
    a = run.evaluate(model, data.Images(x, y), batch_size=7)
    b = run.evaluate(model, data.Images(x.float() / 255, y), batch_size=3)
    assert a["error"] == b["error"] and a["loss"] == pytest.approx(b["loss"], rel=1e-5)
    assert [m.training for m in model.modules()] == modes
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_bf16_changes_little():
    model = models.build("resnet8").eval()
    x = torch.randint(256, (16, 3, 32, 32), dtype=torch.uint8)
    exact, rounded = (run.predict(model, x, run.Precision(p)) for p in ("fp32", "bf16"))
    assert rounded.dtype == torch.float32
    assert 0 < (exact - rounded).abs().max() < 0.05 * exact.abs().max()


def test_unknown_device():
    with pytest.raises(UserError, match="--device cuda:99"):
        run.get_device("cuda:99")


# --- checkpoints --------------------------------------------------------------------------------


def saved(tmp_path):
    model = models.build("resnet8")
    run.save_checkpoint(tmp_path / "a.pt", model.spec | {"model": model.state_dict()})
    return model, tmp_path / "a.pt"


def test_checkpoint_loads_in_a_fresh_process(tmp_path):
    model, path = saved(tmp_path)
    x = torch.rand(2, 3, 32, 32)
    torch.save(x, tmp_path / "x.pt")
    code = (
        "import sys, torch; from common import models, run\n"
        "m = models.from_checkpoint(run.load_checkpoint(sys.argv[1]))\n"
        "torch.save(m(torch.load(sys.argv[2])), sys.argv[3])"
    )
    files = [path, tmp_path / "x.pt", tmp_path / "z.pt"]
    subprocess.run([sys.executable, "-c", code, *map(str, files)], cwd=run.ROOT, check=True)
    torch.testing.assert_close(torch.load(tmp_path / "z.pt"), model.eval()(x))


def test_pickle_is_refused_not_executed(tmp_path):
    class Payload:
        def __reduce__(self):
            return (open, (str(tmp_path / "created"), "w"))

    torch.save({"format": 1, "arch": "resnet8", "model": Payload()}, tmp_path / "evil.pt")
    with pytest.raises(UserError, match="refused") as caught:
        run.load_checkpoint(tmp_path / "evil.pt")
    assert not (tmp_path / "created").exists() and "\n" not in str(caught.value)


@pytest.mark.parametrize("keep", [0.0, 0.3, 0.99])
def test_truncated_checkpoint(tmp_path, keep):
    path = saved(tmp_path)[1]
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * keep)])
    with pytest.raises(UserError, match="truncated"):
        run.load_checkpoint(path)


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ({"state_dict": {}}, "not a checkpoint of this project"),
        ([1, 2], "not a checkpoint of this project"),
        ({"format": 99, "arch": "resnet8", "model": {}}, "newer version"),
    ],
)
def test_foreign_or_newer_checkpoint(tmp_path, content, text):
    torch.save(content, tmp_path / "a.pt")
    with pytest.raises(UserError, match=text):
        run.load_checkpoint(tmp_path / "a.pt")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("format", "1"), ("arch", 3), ("norm", None), ("num_classes", 2.5), ("num_classes", True),
        ("args", [1]), ("args", {1: 2}), ("model", []), ("model", {"x": 1}), ("dataset", b"x"),
        ("optimizer", b"x"), ("metrics", "x"), ("scaler", []), ("total", "9"),
    ],
)  # fmt: skip
def test_a_field_of_another_type_is_named(tmp_path, name, value):
    content = {"format": 1, **models.build("resnet8").spec, "model": {"x": torch.ones(1)}}
    torch.save(content | {name: value}, tmp_path / "last.pt")
    with pytest.raises(UserError, match=f"last.pt: its {name} is .* intact copy"):
        run.load_checkpoint(tmp_path / "last.pt")


def test_missing_checkpoint(tmp_path):
    with pytest.raises(UserError, match="no such checkpoint"):
        run.load_checkpoint(tmp_path / "none.pt")


def test_failed_save_keeps_the_old_file(tmp_path, monkeypatch):
    path = saved(tmp_path)[1]
    before = path.read_bytes()

    def full(fd):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match="No space left"):
        run.save_checkpoint(path, {"x": 1})
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["a.pt"]


# --- run directory --------------------------------------------------------------------------------


def test_run_directory(tmp_path):
    """A sub-run per network with scalars, the options and HPARAMS; args.json; log.jsonl; source."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    rundir = run.RunDir(Args(out=str(tmp_path / "r")), __file__, results=["error"])
    for stage in ("a", "b"):
        rundir.scalars(stage, 1, {"loss": 2.5})
        rundir.scalars(stage, 2, {"loss": 1.5})
    rundir.log(step=1, loss=2.5)
    rundir.close({"error/a": 10.0, "error/b": 20.0})
    assert len(list((tmp_path / "r").rglob("events.out*"))) == 2
    for stage, error in (("a", 10.0), ("b", 20.0)):
        events = EventAccumulator(str(tmp_path / "r" / stage)).Reload()
        assert [point.value for point in events.Scalars("loss")] == [2.5, 1.5]
        (final,) = [p for p in events.Scalars("final/error") if p.value == p.value]
        assert (final.step, final.value) == (2, error)
        plugins = events.summary_metadata
        assert "arguments/text_summary" in plugins
        assert any("hparams" in tag for tag in plugins)
    lines = [json.loads(line) for line in (tmp_path / "r" / "log.jsonl").read_text().splitlines()]
    assert [line.get("event") for line in lines] == ["start", None, "end"]
    assert json.loads((tmp_path / "r" / "args.json").read_text())["dataset"] == "shapes"
    assert (tmp_path / "r" / "test_run.py").read_text() == open(__file__).read()


def test_a_run_is_not_overwritten(tmp_path):
    args = Args(out=str(tmp_path))
    rundir = run.RunDir(args, __file__)
    rundir.scalars("a", 1, {"loss": 1.0})
    rundir.close({})
    before = (tmp_path / "log.jsonl").read_text()
    with pytest.raises(UserError, match="holds a run already"):
        run.RunDir(args, __file__)
    assert (tmp_path / "log.jsonl").read_text() == before
    run.RunDir(Args(out=str(tmp_path), overwrite=True), __file__).close({})
    assert not list(tmp_path.rglob("events.out*"))


def test_unwritable_directory(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write the run directory"):
        run.RunDir(Args(out=str(tmp_path / "file" / "r")), __file__)


def test_check_finite():
    run.check_finite(1.0, 5, 0.1, 2.0)
    with pytest.raises(UserError, match=r"loss nan at step 5 \(lr 0.1, gradient norm 2"):
        run.check_finite(float("nan"), 5, 0.1, 2.0)


def test_table():
    text = run.table([["a", 1.0, "x"], ["bb", 22.25, "yy"]], ["name", "v", "w"])
    assert text.split("\n")[2:] == ["a      1.00   x", "bb    22.25  yy"]


def test_seeds_that_were_tuned_apart_are_one_method():
    entries = [{"method": "m", "options": {"lr": lr, "norm": "bn", "tune": True, "tuned": ["lr"]}}
               for lr in (0.1, 0.3)]  # fmt: skip
    first, second = run.method_options(entries)
    assert first == second == {"norm": "bn", "tune": True}
    entries = [{"method": "m", "options": {"lr": lr, "norm": "bn"}} for lr in (0.1, 0.3)]
    first, second = run.method_options(entries)
    assert first != second


def test_a_table_wider_than_the_terminal_comes_in_parts(monkeypatch):
    header = ["name", "first", "second", "third"]
    rows = [["a network", 1.0, 2.0, 3.0], ["another", 4.0, 5.0, 6.0]]
    whole = run.table(rows, header)
    wide = max(map(len, whole.split("\n")))
    assert run.table(rows, header, width=wide) == whole
    for width in (1, 20, 25, wide - 1):  # one column stays with its title in the narrowest
        parts = run.table(rows, header, width=width).split("\n\n")
        assert all(part.split("\n")[2].startswith("a network") for part in parts)
        assert max(len(line) for part in parts for line in part.split("\n")) <= max(width, 17)
        assert [w for p in parts for w in p.split("\n")[0].split()[1:]] == header[1:]
        numbers = [w for p in parts for w in p.split("\n")[3].split()[1:]]
        assert numbers == ["4.00", "5.00", "6.00"]

    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "20")
    assert len(run.format_table(rows, header).split("\n\n")) == 3
    monkeypatch.setattr("sys.stdout.isatty", lambda: False)  # a log keeps a row in a line
    assert run.format_table(rows, header) == whole


def test_a_home_is_expanded_where_no_shell_does_it(monkeypatch):
    monkeypatch.setenv("HOME", "/home/x")
    parser = run.Parser("a.py", "Doc.")
    parser.add_argument("files", nargs="*")
    parser.add_argument("--out")
    args = parser.parse_args(["--out=~/run", "~/a", "b~", "c=~/d"])
    assert args.out == "/home/x/run" and args.files == ["/home/x/a", "b~", "c=~/d"]


def test_a_command_can_be_pasted_into_a_shell():
    assert shlex.split(run.command("a.py", Path("a b/last.pt"))) == [
        "python",
        "a.py",
        "a b/last.pt",
    ]


def test_a_script_without_docstrings_has_its_options():
    """As under python -OO, which leaves them out."""
    parser = run.Parser("a.py", None)
    parser.add_argument("--out", help="a folder")
    assert "a folder" in parser.format_help()


def test_words_that_no_option_can_take():
    parser = run.Parser("a.py", "Doc.")
    parser.add_argument("--out")
    with pytest.raises(UserError, match="--out: -- is no value"):
        parser.parse_args(["--out=--"])
    with pytest.raises(UserError, match=r"udcff' is no UTF-8"):
        parser.parse_args(["--out", "a\udcff"])
    assert parser.parse_args(["--out", "\u00fc"]).out == "\u00fc"


def test_an_error_is_one_line(capsys):
    def main(args):
        raise UserError("a\nb: no such file")

    with pytest.raises(SystemExit) as end:
        run.cli(main, lambda: None)
    assert end.value.code == 2 and capsys.readouterr().err == "error: a b: no such file\n"


def test_a_file_system_that_refuses_is_one_line(capsys, tmp_path):
    def main(args):
        (tmp_path / ("x" * 300)).is_dir()

    with pytest.raises(SystemExit) as end:
        run.cli(main, lambda: None)
    assert end.value.code == 2 and re.fullmatch("error: .*xx: .*\n", capsys.readouterr().err)


def in_a_child(main, stdout=1, stderr=2, hangup=signal.SIG_DFL):
    """The exit status of `run.cli(main)` in a child with these files for its output. hangup: what
    SIGHUP does to it; under nohup it is ignored."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    status = 1
    try:
        os.dup2(stdout, 1)
        os.dup2(stderr, 2)
        sys.stdout, sys.stderr = open(1, "w"), open(2, "w")
        signal.signal(signal.SIGHUP, hangup)
        run.cli(main, lambda: argparse.Namespace())
        status = 0
    except SystemExit as end:
        status = end.code
    finally:
        os._exit(status)


@pytest.mark.parametrize("lost", ["stdout", "both", "full"])
def test_work_outlives_its_readers(tmp_path, lost):
    """`| head`, a closed terminal, a full device: what was to be written is written."""
    reader, writer = os.pipe()
    os.close(reader)
    out = os.open("/dev/full", os.O_WRONLY) if lost == "full" else writer

    def main(args):
        for _ in range(10_000):
            print("a line of a table", flush=True)
            print("a note", file=sys.stderr)
        (tmp_path / "result").write_text("whole")

    assert in_a_child(main, out, out if lost == "both" else os.open(os.devnull, os.O_WRONLY)) == 0
    assert (tmp_path / "result").read_text() == "whole"


@pytest.mark.parametrize("name", ["SIGHUP", "SIGTERM", "SIGUSR1"])
def test_a_signal_ends_an_evaluation_in_order(tmp_path, name):
    """It leaves through the cleaning up, so no lock and no half-written file stays."""
    number = getattr(signal, name)

    def main(args):
        try:
            os.kill(os.getpid(), number)
            time.sleep(60)
        finally:
            (tmp_path / "tidied").write_text("")

    assert in_a_child(main) == 128 + number
    assert (tmp_path / "tidied").exists()


@pytest.mark.parametrize("trains", [False, True])
def test_nohup_protects(tmp_path, trains):
    """A terminal that closes ends nothing that was started under nohup; other signals still do."""

    def main(args):
        rundir = run.RunDir(Args(out=str(tmp_path / "r")), __file__) if trains else None
        os.kill(os.getpid(), signal.SIGHUP)
        assert rundir is None or rundir.signal is None
        (tmp_path / "went on").touch()
        os.kill(os.getpid(), signal.SIGTERM)

    expected = run.TRY_AGAIN if trains else 128 + signal.SIGTERM
    assert in_a_child(main, hangup=signal.SIG_IGN) == expected
    assert (tmp_path / "went on").exists()


@pytest.mark.parametrize("kind", [run.positive, run.nonnegative])
def test_numbers_that_64_bits_do_not_hold(kind):
    assert kind(int)(str(2**63 - 1)) == 2**63 - 1 and kind(float)("1e30") == 1e30
    for text in (str(2**63), "9" * 40):
        with pytest.raises(argparse.ArgumentTypeError, match="finite"):
            kind(int)(text)
    with pytest.raises(argparse.ArgumentTypeError, match="finite"):
        kind(float)("1e37")  # a product with another number would not fit in fp32


# --- where it runs --------------------------------------------------------------------------------


def test_the_commit_is_this_repository_s_or_none(tmp_path):
    """Unpacked inside another repository, the project does not report that one's commit."""
    author = ["-c", "user.name=a", "-c", "user.email=a@b"]
    for command in (["init", "-q"], [*author, "commit", "-q", "--allow-empty", "-m", "x"]):
        subprocess.run(["git", "-C", str(tmp_path), *command], check=True)
    inner = tmp_path / "inner"
    shutil.copytree(run.ROOT / "common", inner / "common")
    code = "from common import run; print(repr(run.git_hash()))"

    def printed():
        command = [sys.executable, "-c", code]
        return subprocess.run(command, cwd=inner, text=True, capture_output=True).stdout.strip()

    assert printed() == "''"
    (tmp_path / ".git").rename(inner / ".git")
    assert len(printed().strip("'+")) == 12


@pytest.mark.parametrize("name", ["RANK", "WORLD_SIZE", "TORCHELASTIC_RESTART_COUNT"])
def test_numbers_of_the_environment(monkeypatch, name):
    """An empty variable counts as none, another word is named."""
    for text, number in (("", 1), (" 3 ", 3), ("0", 0)):
        monkeypatch.setenv(name, text)
        assert run.device.environment_number(name, 1) == number
    for text in ("x", "-1", "1.5", "²"):
        monkeypatch.setenv(name, text)
        with pytest.raises(UserError, match=f"{name}=.*unset it"):
            run.device.environment_number(name, 1)


@pytest.mark.parametrize("text", ["[1]", "null", "3", "{", '"x"'])
def test_options_that_are_none(tmp_path, text):
    (tmp_path / "args.json").write_text(text)
    with pytest.raises(UserError, match=r"args.json: .*--overwrite"):
        run.rundir.read_options(tmp_path)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("epochs", "3"), ("epochs", 0), ("epochs", 2.5), ("seed", None), ("lr", "x"),
        ("strict", 1), ("strict", None), ("norm", "batch"), ("norm", ["bn"]), ("norms", [1, 2]),
        ("norms", "bn"), ("data_dir", {}),
    ],
)  # fmt: skip
def test_a_value_of_args_json_that_no_run_writes(tmp_path, name, value):
    """It is refused as the command line would refuse it, and named."""

    def parse(*words):
        parser = run.Parser(__file__, "")
        run.add_arguments(parser)
        add = parser.add_argument
        add("--epochs", type=run.positive(int))
        add("--lr", type=run.positive(float), default=0.1)
        add("--strict", action="store_true")
        add("--data-dir", default="data")
        add("--norm", choices=["bn", "gn"], default="bn")
        add("--norms", type=run.listed(str))
        return run.parse(parser, words)

    options = {"epochs": 2, "lr": 1, "strict": False, "norm": "gn", "norms": ["bn"], "seed": 3}
    (tmp_path / "args.json").write_text(json.dumps(options | {"norms": None}))
    assert parse("--resume", str(tmp_path)).epochs == 2
    (tmp_path / "args.json").write_text(json.dumps(options | {name: value}))
    with pytest.raises(UserError, match=rf"args.json: {name} is .*no run writes"):
        parse("--resume", str(tmp_path))


@pytest.mark.parametrize(
    ("kind", "text"), [(str, "bn,gn,bn"), (int, "1,01"), (run.positive(float), "0.1,3,1e-1")]
)
def test_nothing_is_listed_twice(kind, text):
    assert run.listed(kind)(text.rpartition(",")[0])
    with pytest.raises(argparse.ArgumentTypeError, match="there twice"):
        run.listed(kind)(text)


def test_a_log_that_is_no_file(tmp_path):
    """To open a pipe would wait for whoever reads it."""
    os.mkfifo(tmp_path / "log.jsonl")
    with pytest.raises(UserError, match=r"log.jsonl: no file"):
        run.rundir.open_log(tmp_path / "log.jsonl")


WINDOWS = """
import os, signal, sys
for module, names in {
    signal: "SIGUSR1 SIGUSR2 SIGHUP SIGPIPE SIGKILL pthread_sigmask sigwaitinfo",
    os: "sched_getaffinity fork getuid",
}.items():
    for name in names.split():
        if hasattr(module, name):
            delattr(module, name)
sys.modules["fcntl"] = None
"""


@pytest.mark.parametrize("script", ["ct", "nofrost", "fixup_penalty", "bn_ablation"])
def test_starts_without_what_windows_lacks(script):
    code = f"{WINDOWS}import {script}\nsys.argv[1:] = ['--help']\n{script}.parse_args()"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=run.ROOT, text=True, capture_output=True
    )
    assert done.returncode == 0 and "usage" in done.stdout, done.stderr


# --- out of memory --------------------------------------------------------------------------------

FULL = (
    "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.18 GiB\nmore"
)


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"batch_size": 128, "precision": "auto", "epochs": 3},
         "with --batch-size 128 (Tried to allocate 2.00 GiB); "
         "try --batch-size 64 or a smaller --arch"),
        ({"batch_size": 1, "precision": "fp32", "epochs": 3, "capture": True},
         "with --batch-size 1 (Tried to allocate 2.00 GiB); "
         "try --precision bf16 or --no-capture or a smaller --arch"),
        ({"batch_size": 100, "arch": None, "capture": False},
         "with --batch-size 100 (Tried to allocate 2.00 GiB); try --batch-size 50"),
        ({}, "(Tried to allocate 2.00 GiB); free the device, then repeat"),
    ],
)  # fmt: skip
def test_out_of_memory_is_one_line_that_says_what_to_try(monkeypatch, capsys, options, line):
    def main(args):
        raise torch.OutOfMemoryError(FULL)

    monkeypatch.setattr(signal, "signal", lambda *args: None)
    with pytest.raises(SystemExit) as end:
        run.cli(main, lambda: argparse.Namespace(**options))
    assert end.value.code == 2
    text = capsys.readouterr().err
    assert text.startswith("error: out of memory") and text.endswith(line + "\n")
    assert text.count("\n") == 1


def test_rows_of_a_training_stand_in_columns():
    """Headings stand above a new network and a new number; a cell without a number is empty."""
    rows = Rows()
    first = {**shown({"loss": 2.25, "accuracy": 9.0, "images_per_s": 812.4}, 1, 16), "eta": "0:10"}
    text = rows.text("a", first)
    text += "\n" + rows.text("a", {"epoch": "10.0/16", "error": "88.85", "eta": "0:09"})
    text += "\n" + rows.text("a", first) + "\n" + rows.text("ab", first)
    assert text.splitlines() == [
        "network    epoch   loss  train %  img/s    eta",
        "a         1.0/16  2.250      9.0    812   0:10",
        "network    epoch   loss  train %  img/s  error    eta",
        "a        10.0/16                         88.85   0:09",
        "a         1.0/16  2.250      9.0    812          0:10",
        "network    epoch   loss  train %  img/s  error    eta",
        "ab        1.0/16  2.250      9.0    812          0:10",
    ]


@pytest.mark.parametrize(
    ("network", "metrics"),
    [("baseline", ("error", "probe_error")),
     ("dual-bn", ("error", "pgd_error", "least_pgd_error")),
     ("fixup+penalty", ("error", "train_accuracy", "final_layer")),
     ("tune-fixup+penalty-0.03-0.0001", ("error", "train_accuracy", "final_layer"))],
)  # fmt: skip
def test_rows_fit_the_usual_window(network, metrics):
    means = {"loss": 2.25, "accuracy": 100.0, "images_per_s": 12345}
    numbers = shown(means, 8, 16) | dict.fromkeys(metrics, "100.00") | {"eta": "0:00:00"}
    assert max(map(len, Rows().text(network, numbers, 80).splitlines())) <= 80
    assert "img/s" in Rows().text(network, numbers)  # of a file
