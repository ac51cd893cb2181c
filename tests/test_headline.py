"""eval/headline.py: every command parses, rows that fail say so, and a stopped table goes on."""

import contextlib
import json
import re
import shutil
import signal
import statistics
import subprocess
import sys
import time
import xml.etree.ElementTree
from pathlib import Path

import pytest
import torch

from common import corruptions, data, models, run
from common.run.plot import GREY
from eval import corruptions as corruptions_table
from eval import (
    figures,
    headline,
    headline_jobs,
    headline_numbers,
    headline_report,
    headline_tables,
)
from eval.headline_tables import Row, Scale, Table

SCALES = [(name, scale) for name, t in headline_tables.TABLES.items() for scale in t.scales]
# Stands for a training: it needs a file, may fail, and leaves what a training leaves.
FAKE = """
import json, os, signal, sys, time
from pathlib import Path
options = dict(zip(sys.argv[1::2], sys.argv[2::2]))
out = Path(options["--out"])
out.mkdir(parents=True, exist_ok=True)
with open(out / "starts", "a") as file:
    file.write("x")
if "--wait" in options and not (out / "go").exists():
    (out / "waits").touch()
    time.sleep(60)
if "--die" in options and not (out.parent / "mended").exists():
    sys.exit("error: " + options["--die"])
fails = "--fail" in options and options["--fail"] in (options["--seed"], "all")
if fails and not (out.parent / "mended").exists():
    sys.exit("error: loss nan at step 7: stopped")
if "--die" in options and (out.parent / "mended").exists():
    sys.exit(3)  # without a word
if "--kill" in options and options["--kill"] == options["--seed"]:
    os.kill(os.getpid(), signal.SIGKILL)
if "--leave" in options and not (out.parent / "mended").exists():
    (out / "log.jsonl").write_text(json.dumps({"event": "stop"}) + "\\n")
    sys.exit(int(options["--leave"]))
if "--teacher" in options and not Path(options["--teacher"]).exists():
    sys.exit("error: no teacher")
(out / "last.pt").touch()
value = float(options.get("--value", 0)) + int(options["--seed"])
final = {"diverged/net": 16} if options.get("--diverge") == options["--seed"] else {}
with open(out / "log.jsonl", "a") as file:
    file.write(json.dumps({"event": "start"}) + "\\n")
    file.write(json.dumps({"event": "end", "error/net": value} | final) + "\\n")
"""
FAKE_EVALUATION = """
import json, sys
from pathlib import Path
options = dict(zip(sys.argv[2::2], sys.argv[3::2]))
entry = {"clean": {"error": len(sys.argv[1].split("/"))}}
source = Path(sys.argv[1]).parent.parent / "source"
content = {"source": source.read_text()} if source.exists() else {}
open(options["--json"], "w").write(json.dumps(content | {"checkpoints": [entry]}))
"""


def words_of(name, scale, tmp_path):
    """The arguments of `headline.py` for a table, with places of the test's own."""
    return [name, "--scale", scale, "--runs", str(tmp_path / "runs"), "--out", str(tmp_path)]


def jobs_of(name, scale, tmp_path, seeds=1):
    args = headline.parse_args(words_of(name, scale, tmp_path))
    table = headline_tables.TABLES[name].scales[scale]
    return args, table, headline_jobs.all_jobs(args, table, table.rows, range(seeds))


@pytest.mark.parametrize(("name", "scale"), SCALES)
def test_every_command_parses(name, scale, tmp_path):
    _, table, jobs = jobs_of(name, scale, tmp_path)
    trained = {str(job.product) for job in jobs.values() if job.trains}
    for job in jobs.values():
        options = vars(headline.check(job))
        assert all(need in jobs for need in job.needs), job.key
        if job.trains:
            assert options["dataset"] == table.dataset
            assert table.dataset in (*data.NAMES, "gaussian")
            assert options["seed"] == 0 and options["out"] in trained
        else:
            assert any(folder in " ".join(job.words) for folder in trained), job.key
            assert options["json"] == str(job.product)


@pytest.mark.parametrize(("name", "scale"), SCALES)
def test_columns_and_papers_belong_to_the_table(name, scale):
    table = headline_tables.TABLES[name].scales[scale]
    for path in table.columns.values():
        words = path[1:] if path[0] == "100 -" else path
        if words[0] == "mean":
            assert set(words[1:]) <= set(table.columns)
        elif words[0].startswith("run "):
            assert words[0].removeprefix("run ") in table.runs
        else:
            assert words[0] == "run" or words[0] in table.evaluations
    assert set(table.chart) <= set(table.columns)
    for row in table.rows:
        assert row.run in table.runs
        assert set(row.paper or {}) <= set(table.columns)
        assert set(row.options or {}) <= set(table.evaluations)
    assert len({row.title for row in table.rows}) == len(table.rows)


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """A table "fake" of the two scripts above, and a function that gives it other trainings."""
    (tmp_path / "train.py").write_text(FAKE)
    (tmp_path / "evaluate.py").write_text(FAKE_EVALUATION)
    monkeypatch.setattr(headline_report, "LEAST", 1)
    monkeypatch.setattr(headline_jobs, "POLL", 0.02)

    def make(runs, rows, chart=("error", "clean")):
        runs = {name: f"{tmp_path}/train.py {options}" for name, options in runs.items()}
        evaluations = {"files": f"{tmp_path}/evaluate.py {{network}}"}
        columns = {"error": ("run", "error/{stage}"), "clean": ("files", "clean", "error")}
        scale = Scale("made up", "shapes", 2, 1, "a core", runs, evaluations, columns, rows, chart)
        table = Table("A title", "a source", {"small": scale})
        monkeypatch.setattr(headline_tables, "TABLES", {"fake": table})
        return words_of("fake", "small", tmp_path)

    return make


def left_by(line):
    """The results file that a call leaves, however it ends."""
    args = headline.parse_args(line)
    with contextlib.suppress(run.UserError, SystemExit):
        headline.main(args)
    return json.loads((args.out / "headline_fake_small.json").read_text())


def test_runs_what_is_missing_and_writes_the_table(fake, tmp_path, capsys):
    rows = (Row("student", "b", "net"), Row("teacher", "a", "net", paper={"error": 12.5}))
    line = fake({"a": "--value 10", "b": "--value 20 --teacher {a}/last.pt"}, rows)
    content = headline.main(headline.parse_args([*line, "--jobs", "2"]))
    assert [row["row"] for row in content["rows"]] == ["student", "teacher"]
    out = capsys.readouterr().out
    header = next(text for text in out.splitlines() if text.startswith("network"))
    assert header.split("  ")[-1] == "n" and "error, paper" in header and "error, here" in header
    assert "12.5" in out and "10.50 +- 0.71" in out and "20.50 +- 0.71" in out
    for end in ("json", "md", "svg"):
        assert (tmp_path / f"headline_fake_small.{end}").is_file()
    assert "| teacher | 12.5 | 10.50 +- 0.71 |" in (tmp_path / "headline_fake_small.md").read_text()
    headline.main(headline.parse_args(line))
    assert (tmp_path / "runs" / "small" / "a-s0" / "starts").read_text() == "x"
    assert headline.main(headline.parse_args(["--runs", str(tmp_path / "runs")]))[0][2] == "done"


def test_published_numbers_stay_until_they_are_measured_here(fake, tmp_path):
    """A row, by the same command, that another machine published; failures here are not hidden."""
    rows = (Row("A", "a", "net"), Row("B", "b", "net"))
    args = headline.parse_args(fake({"a": "--value 10", "b": "--value 20"}, rows))
    headline.main(args)

    def errors(argv):
        content = left_by(argv)
        return [[v["error"] for v in row["seeds"].values()] for row in content["rows"]]

    line = fake({"a": "--value 10", "b": "--value 30"}, rows)  # another command of b
    elsewhere = [*line, "--runs", str(tmp_path / "elsewhere"), "--seeds", "1"]
    assert errors([*elsewhere, "--rows", "B"]) == [[10.0, 11.0], [30.0]]
    content = json.loads((tmp_path / "headline_fake_small.json").read_text())
    content["rows"][1]["seeds"]["0"]["error"] = 77.0  # known here, so it is measured again
    (tmp_path / "headline_fake_small.json").write_text(json.dumps(content))
    assert errors([*elsewhere, "--rows", "B"]) == [[10.0, 11.0], [30.0]]
    (tmp_path / "third" / "small" / "b-s0").mkdir(parents=True)
    (tmp_path / "third" / "small" / "b-s0" / "log.jsonl").mkdir()  # the training fails there
    third = [*line, "--runs", str(tmp_path / "third"), "--seeds", "1", "--rows", "B"]
    assert errors(third) == [[10.0, 11.0], [30.0]]
    content = json.loads((tmp_path / "headline_fake_small.json").read_text())
    assert set(content["rows"][1]["failed"]) == {"0"}


def test_a_student_of_another_teacher_is_another_network(fake, tmp_path):
    """Here and among the published numbers."""
    rows = (Row("teacher", "a", "net"), Row("student", "b", "net"))
    student = "--value 20 --teacher {a}/last.pt"
    line = [*fake({"a": "--value 10", "b": student}, rows), "--seeds", "1"]
    command = headline.main(headline.parse_args(line))["rows"][1]["command"]
    assert "--teacher {a}/last.pt; a: " in command and command.endswith("--value 10")
    line = [*fake({"a": "--value 30", "b": student}, rows), "--seeds", "1"]
    (tmp_path / "runs" / "small" / "a-s0").rename(tmp_path / "old")
    (tmp_path / "runs" / "small" / "a-s0.command").unlink()
    teacher, student = left_by(line)["rows"]
    assert teacher["seeds"]["0"]["error"] == 30.0
    assert student["seeds"] == {} and "made by another command" in student["failed"]["0"]


def test_published_numbers_outlive_other_questions(fake, tmp_path):
    """Fewer seeds, a changed evaluation, a new column; an unreadable file stops the command."""
    rows = (Row("A", "a", "net"), Row("B", "b", "net"))
    line = fake({"a": "--value 10", "b": "--value 20"}, rows)
    headline.main(headline.parse_args([*line, "--seeds", "3"]))
    elsewhere = [*line, "--runs", str(tmp_path / "elsewhere"), "--rows", "A"]
    content = headline.main(headline.parse_args([*elsewhere, "--seeds", "1"]))
    assert [list(row["seeds"]) for row in content["rows"]] == [["0", "1", "2"]] * 2
    scale = headline_tables.TABLES["fake"].scales["small"]
    scale.evaluations["files"] += " --more 1"
    third = [*line, "--runs", str(tmp_path / "third"), "--rows", "A"]
    content = headline.main(headline.parse_args(third))
    assert [v["error"] for v in content["rows"][1]["seeds"].values()] == [20.0, 21.0, 22.0]
    assert all(v["clean"] is None for v in content["rows"][1]["seeds"].values())
    assert content["rows"][0]["seeds"]["0"]["clean"] > 0  # measured anew, by today's command
    file = tmp_path / "headline_fake_small.json"
    odd = ({"rows": [{}]}, {"rows": content["rows"], "evaluations": []}, {"rows": [1]}, [1], {})
    seeds = {"x": {}}, {"0": [1]}, []
    odd += tuple(content | {"rows": [content["rows"][0] | {"seeds": own}]} for own in seeds)
    for text in ("<<<<<<< HEAD", *map(json.dumps, odd)):
        file.write_text(text)
        for argv in (line, ["--runs", str(tmp_path / "runs"), "--out", str(tmp_path)]):
            with pytest.raises(run.UserError, match="is no table of headline"):
                headline.main(headline.parse_args(argv))
        assert file.read_text() == text


def table_of(monkeypatch, tmp_path, columns, rows, evaluations=None):
    """Put another table in the place of `fake`, of the same training."""
    runs = {"a": f"{tmp_path}/train.py --value 10"}
    if evaluations is None:
        evaluations = {name: f"{tmp_path}/evaluate.py {{network}}" for name in ("e", "f")}
    scale = Scale("made up", "shapes", 1, 1, "a core", runs, evaluations, columns, rows)
    monkeypatch.setattr(headline_tables, "TABLES", {"fake": Table("", "", {"small": scale})})


COLUMNS = {"error": ("run", "error/{stage}"), "x": ("e", "clean", "error"),
           "y": ("f", "clean", "error")}  # fmt: skip


def test_published_numbers_give_way_to_a_whole_measurement_only(
    fake, tmp_path, monkeypatch, capsys
):
    rows = (Row("A", "a", "net", options={"e": "--g 1"}),)
    line = fake({"a": "--value 10"}, rows)
    table_of(monkeypatch, tmp_path, COLUMNS, rows)
    headline.main(headline.parse_args([*line, "--evaluations", "e"]))
    (row,) = headline.main(
        headline.parse_args([*line, "--runs", str(tmp_path / "b"), "--evaluations", "f"])
    )["rows"]
    assert row["seeds"]["0"]["x"] and row["seeds"]["0"]["y"] is None  # as many, but not the same

    def numbers():
        argv = [*line, "--runs", str(tmp_path / "c"), "--evaluations", "e"]
        args = headline.parse_args(argv)
        table = headline_tables.TABLES["fake"]
        content = headline_numbers.collect(args, "fake", table, table.scales["small"].rows, 1)
        return content["rows"][0]["seeds"].get("0", {})

    assert numbers() == row["seeds"]["0"]
    assert not capsys.readouterr().err
    changed = (Row("A", "a", "net", options={"e": "--g 2"}),)  # of one evaluation
    table_of(monkeypatch, tmp_path, COLUMNS, changed)
    assert numbers() == {"error": 10.0, "x": None, "y": None}
    assert "warning: fake: 1 published numbers are left out" in capsys.readouterr().err
    table_of(monkeypatch, tmp_path, COLUMNS | {"x": ("e", "clean", "loss")}, rows)
    assert numbers() == {"error": 10.0, "x": None, "y": None}  # another place
    table_of(monkeypatch, tmp_path, COLUMNS, (Row("A", "a", "other"),))
    assert numbers() == {}  # another network


def test_a_changed_evaluation_may_have_another_source(fake, tmp_path, monkeypatch, capsys):
    rows = (Row("A", "a", "net"),)
    line = fake({"a": "--value 10"}, rows)
    for folder, source in (("runs", "official"), ("other", "procedural")):
        (tmp_path / folder / "small").mkdir(parents=True)
        (tmp_path / folder / "small" / "source").write_text(source)
    table_of(monkeypatch, tmp_path, COLUMNS, rows)
    headline.main(headline.parse_args(line))
    evaluations = {name: f"{tmp_path}/evaluate.py {{network}} --new 1" for name in ("e", "f")}
    table_of(monkeypatch, tmp_path, COLUMNS, rows, evaluations)
    (row,) = headline.main(headline.parse_args([*line, "--runs", str(tmp_path / "other")]))["rows"]
    assert row["trained"]["0"]["sources"] == {"e": "procedural", "f": "procedural"}
    assert row["seeds"]["0"]["x"] > 0 and "stay" not in capsys.readouterr().err


def test_published_failures_stay(fake, tmp_path):
    """Until the row is measured here, or its command is another one."""
    rows = (Row("A", "a", "net"), Row("B", "b", "net"))
    line = fake({"a": "--value 10 --diverge 1", "b": "--value 1"}, rows)
    headline.main(headline.parse_args(line))
    third = [*line, "--runs", str(tmp_path / "third")]
    content = headline.main(headline.parse_args([*third, "--rows", "B"]))
    assert content["rows"][0]["failed"] == {"1": "diverged at step 16"}
    line = fake({"a": "--value 10", "b": "--value 1"}, rows)
    content = left_by(line)
    assert "made by another command" in content["rows"][0]["failed"]["1"]
    shutil.rmtree(tmp_path / "runs" / "small" / "a-s1")
    args = headline.parse_args(line)
    table = headline_tables.TABLES["fake"]
    (first, _) = headline_numbers.collect(args, "fake", table, rows, 2)["rows"]
    assert "diverged" not in str(first["failed"])


@pytest.mark.parametrize("value", ['"x"', "NaN", "{}", "Infinity", "null"])
def test_what_is_no_number_is_no_cell(value, fake, tmp_path):
    line = [*fake({"a": "--value 10"}, (Row("a", "a", "net"),)), "--seeds", "1"]
    headline.main(headline.parse_args(line))
    (tmp_path / "headline_fake_small.json").unlink()
    product = tmp_path / "runs" / "small" / "a-s0" / "last.files.json"
    product.write_text(f'{{"checkpoints": [{{"clean": {{"error": {value}}}}}]}}')
    (row,) = headline.main(headline.parse_args(line))["rows"]
    assert row["seeds"]["0"] == {"error": 10.0, "clean": None}


def test_what_another_command_finished_is_not_made_again(fake, tmp_path, monkeypatch):
    rows = (Row("A", "a", "net"), Row("B", "b", "net"))
    line = [*fake({"a": "--value 10", "b": "--value 1"}, rows), "--seeds", "1"]
    start = headline_jobs.start

    def slow(job, args):
        if job.key == "a-s0":  # another command trains b in the meantime
            monkeypatch.setattr(headline_jobs, "start", start)
            headline.main(headline.parse_args([*line, "--rows", "B"]))
        return start(job, args)

    monkeypatch.setattr(headline_jobs, "start", slow)
    headline.main(headline.parse_args(line))
    assert (tmp_path / "runs" / "small" / "b-s0" / "starts").read_text() == "x"


def test_the_error_above_torchrun_s_lines_is_the_reason(fake, tmp_path):
    line = fake({"a": "--value 1"}, (Row("a", "a", "net"),))
    args = headline.parse_args(line)
    job = headline_jobs.training(args, headline_tables.TABLES["fake"].scales["small"], "a", 0)
    job.product.parent.mkdir(parents=True)
    Path(f"{job.product}.log").write_text("old\nerror: no room\n=====\n  rank 0 failed\n=====\n")
    assert headline_jobs.reason_of(job, 1, 4) == "no room"
    assert headline_jobs.reason_of(job, 1, 20) == "====="


@pytest.mark.parametrize("place", ["collect", "show"])
def test_a_signal_while_the_table_is_written_waits(place, fake, tmp_path, monkeypatch, capsys):
    line = fake({"a": "--value 1"}, (Row("a", "a", "net"),))
    work = getattr(headline, place)

    def signalled(*args):
        signal.raise_signal(signal.SIGTERM)
        return work(*args)

    monkeypatch.setattr(headline, place, signalled)
    with pytest.raises(SystemExit, match=str(run.TRY_AGAIN)):
        headline.main(headline.parse_args(line))
    assert "SIGTERM: stopped; the same command goes on" in capsys.readouterr().err
    for end in ("json", "md", "svg"):
        assert (tmp_path / f"headline_fake_small.{end}").is_file()


def test_a_signal_while_a_job_starts_leaves_no_process_behind(fake, monkeypatch, capsys):
    line = fake({"a": "--wait yes"}, (Row("a", "a", "net"),))
    started, start = [], subprocess.Popen

    def signalled(*words, **options):
        started.append(start(*words, **options))
        signal.raise_signal(signal.SIGTERM)
        return started[-1]

    monkeypatch.setattr(subprocess, "Popen", signalled)
    with pytest.raises(SystemExit, match=str(run.TRY_AGAIN)):
        headline.main(headline.parse_args(line))
    (process,) = started
    assert process.returncode == -signal.SIGTERM
    assert "SIGTERM: stopped; the same command goes on" in capsys.readouterr().err


def test_a_signal_that_is_ignored_does_not_stop_the_table(fake, monkeypatch):
    line = fake({"a": "--value 1"}, (Row("a", "a", "net"),))
    show = headline.show

    def signalled(*args):
        signal.raise_signal(signal.SIGHUP)
        show(*args)

    monkeypatch.setattr(headline, "show", signalled)
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # nohup's
    try:
        assert len(headline.main(headline.parse_args(line))["rows"][0]["seeds"]) == 2
    finally:
        signal.signal(signal.SIGHUP, before)


def test_corruptions_of_another_source_do_not_replace_published_ones(fake, tmp_path, capsys):
    rows = (Row("A", "a", "net"), Row("B", "b", "net"))
    line = fake({"a": "--value 10", "b": "--value 20"}, rows)
    for folder, source in (("runs", "generated, frost: official"), ("other", "procedural")):
        (tmp_path / folder / "small").mkdir(parents=True)
        (tmp_path / folder / "small" / "source").write_text(source)
    content = headline.main(headline.parse_args([*line, "--rows", "A"]))
    assert "Corruptions: generated, frost: official." in headline_report.caption(content)
    capsys.readouterr()
    content = headline.main(headline.parse_args([*line, "--runs", str(tmp_path / "other")]))
    assert "warning: A, seed 1: the published numbers stay" in capsys.readouterr().err
    found = [row["trained"]["0"]["sources"]["files"] for row in content["rows"]]
    assert found == ["generated, frost: official", "procedural"]
    words = "Corruptions: generated, frost: official (2); procedural (2)."
    assert words in headline_report.caption(content)


def test_folders_are_tried_before_the_work(fake, tmp_path):
    line = fake({"a": "--value 10"}, (Row("a", "a", "net"),))
    (tmp_path / "file").touch()
    for option in ("--out", "--runs"):
        with pytest.raises(run.UserError, match=f"give {option} elsewhere"):
            headline.main(headline.parse_args([*line, option, str(tmp_path / "file")]))
    assert not list(tmp_path.rglob("starts"))


def test_states_count_what_is_whole(fake, tmp_path):
    """Rows x seeds with a number of every training and evaluation, published or measured here."""
    rows = (Row("A", "a", "net"), Row("B", "b", "net"))
    line = fake({"a": "--value 10", "b": "--fail all"}, rows)

    def state(*argv):
        line = ["--runs", str(tmp_path / "runs"), "--out", str(tmp_path), *argv]
        return headline.main(headline.parse_args(line))[0][2]

    assert state() == "not begun"
    content = left_by(line)
    assert state() == "2 of 4 rows x seeds, 2 failed"
    assert state("--seeds", "1") == "1 of 2 rows x seeds, 1 failed"
    elsewhere = ["--runs", str(tmp_path / "elsewhere")]
    assert state(*elsewhere) == "2 of 4 rows x seeds, 2 failed"
    content["rows"][0]["seeds"]["1"]["clean"] = None
    content["rows"][1]["seeds"] = {"0": {"error": 1.0, "clean": 1.0}}
    (tmp_path / "headline_fake_small.json").write_text(json.dumps(content))
    assert state(*elsewhere) == "2 of 4 rows x seeds, 1 failed"
    content["rows"][1]["command"] = "python another.py"
    (tmp_path / "headline_fake_small.json").write_text(json.dumps(content))
    assert state(*elsewhere) == "1 of 4 rows x seeds"


@pytest.mark.parametrize("text", ["[1]", "3", '{"checkpoints": 3}', '{"checkpoints": []}', "{", ""])
def test_what_is_no_result_is_made_anew(text, fake, tmp_path):
    line = [*fake({"a": "--value 10"}, (Row("a", "a", "net"),)), "--seeds", "1"]
    headline.main(headline.parse_args(line))
    folder = tmp_path / "runs" / "small" / "a-s0"
    (folder / "last.files.json").write_text(text)
    with open(folder / "log.jsonl", "a") as file:
        file.write('3\n[4]\n{"event": "e')  # as of a full disk
    (tmp_path / "headline_fake_small.json").unlink()
    (row,) = headline.main(headline.parse_args(line))["rows"]
    assert row["seeds"]["0"]["error"] == 10.0 and row["seeds"]["0"]["clean"] > 0
    assert (folder / "starts").read_text() == "x"


def test_a_network_that_was_deleted_is_named(fake, tmp_path):
    line = [*fake({"a": "--value 10"}, (Row("a", "a", "net"),)), "--seeds", "1"]
    headline.main(headline.parse_args(line))
    folder = tmp_path / "runs" / "small" / "a-s0"
    (folder / "last.pt").unlink()
    headline.main(headline.parse_args(line))  # nothing needs it
    (folder / "last.files.json").unlink()
    (tmp_path / "headline_fake_small.json").unlink()
    (row,) = left_by(line)["rows"]
    assert row["failed"]["0"].startswith("last.files: no last.pt, though its training ended")
    shutil.rmtree(folder)
    (row,) = headline.main(headline.parse_args(line))["rows"]
    assert row["failed"] == {} and row["seeds"]["0"]["clean"] > 0


def test_a_failure_has_its_own_words(fake, tmp_path):
    """Not those of an earlier one, no path of the machine, and they do not break the table."""
    line = fake({"a": "--die /a/b/c.pt|full"}, (Row("a", "a", "net"),))
    assert left_by(line)["rows"][0]["failed"]["0"] == "c.pt|full"
    assert r"c.pt\|full" in (tmp_path / "headline_fake_small.md").read_text()
    (tmp_path / "runs" / "small" / "mended").touch()
    assert left_by(line)["rows"][0]["failed"]["0"] == "exit status 3"


def test_where_numbers_stand(tmp_path):
    args = headline.parse_args(["question", "--runs", str(tmp_path)])
    row = Row("a", "a", "net", options={"e": "--gamma 0.5"})
    for name, error in (("a", 30.0), ("b", 50.0)):
        (tmp_path / "small" / f"{name}-s0").mkdir(parents=True)
        line = json.dumps({"event": "end", "error/net": error})
        (tmp_path / "small" / f"{name}-s0" / "log.jsonl").write_text(line + "\n")
    entries = [{"x": {"y": 1.0}}, {"x": {"y": 2.0}}]
    headline_jobs.result_file(args, row, "e", 0).write_text(json.dumps({"checkpoints": entries}))
    columns = {
        "own": ("run", "error/{stage}"), "other": ("100 -", "run b", "error/{stage}"),
        "mean": ("mean", "own", "other"), "first": ("e", "x", "y"), "second": ("e", 1, "x", "y"),
        "third": ("e", 2, "x", "y"), "nothing": ("e", "x", "z"),
        "no mean": ("mean", "own", "third"),
    }  # fmt: skip
    scale = Scale("", "shapes", 1, 1, "", {"a": "", "b": ""}, {"e": ""}, columns, (row,))
    found = headline_numbers.numbers_of(args, scale, row, 0)
    assert found == {
        "own": 30.0, "other": 50.0, "mean": 40.0, "first": 1.0, "second": 2.0, "third": None,
        "nothing": None, "no mean": None,
    }  # fmt: skip
    assert headline_jobs.trainings_of(scale, row) == ["a", "b"]


def test_a_failed_training_is_a_row_that_says_so(fake, tmp_path, capsys):
    rows = (Row("good", "g", "net"), Row("bad", "a", "net"), Row("student", "b", "net"))
    runs = {"g": "--value 1", "a": "--fail 1 --value 5", "b": "--teacher {a}/last.pt"}
    with pytest.raises(run.UserError, match="4 of 12 commands failed"):
        headline.main(headline.parse_args(fake(runs, rows)))
    content = json.loads((tmp_path / "headline_fake_small.json").read_text())
    good, bad, student = content["rows"]
    assert good["failed"] == {} and len(good["seeds"]) == 2
    assert bad["failed"] == {"1": "loss nan at step 7: stopped"} and list(bad["seeds"]) == ["0"]
    assert student["failed"] == {"1": "needs a-s1, which failed"}
    assert "failed (seed 1): loss nan" in capsys.readouterr().out
    (tmp_path / "runs" / "small" / "mended").touch()  # the next call has no failure left
    content = headline.main(headline.parse_args(fake(runs, rows)))
    assert all(row["failed"] == {} and len(row["seeds"]) == 2 for row in content["rows"])


def test_a_training_of_another_process_has_not_failed(fake, monkeypatch, tmp_path, capsys):
    """Two commands on one folder: the second stops, and marks nothing as failed."""
    rows = (Row("good", "g", "net"), Row("busy", "a", "net"))
    runs = {"g": "--value 1", "a": "--fail 1 --value 5"}
    line = fake(runs, rows)
    reason = "a-s1: another process is training in it; wait for it"
    with monkeypatch.context() as patch:
        patch.setattr(headline_jobs, "reason_of", lambda *_: reason)
        with pytest.raises(SystemExit, match=str(run.TRY_AGAIN)):
            headline.main(headline.parse_args(line))
    assert "another process" in capsys.readouterr().err
    (tmp_path / "runs" / "small" / "mended").touch()
    content = headline.main(headline.parse_args(line))
    assert all(row["failed"] == {} and len(row["seeds"]) == 2 for row in content["rows"])


def test_a_killed_job_is_a_row_that_says_so(fake):
    """It does not end the table: the other rows are measured."""
    rows = (Row("killed", "a", "net"), Row("good", "b", "net"))
    line = fake({"a": "--kill 0", "b": "--value 1"}, rows)
    killed, good = left_by(line)["rows"]
    assert killed["failed"] == {"0": "killed by SIGKILL: was there too little memory?"}
    assert list(killed["seeds"]) == ["1"] and list(good["seeds"]) == ["0", "1"]


@pytest.mark.parametrize("status", [75, 128 + signal.SIGTERM, 0])
def test_a_job_that_was_told_to_stop_has_not_failed(status, fake, tmp_path, capsys):
    """75: a training; 143: an evaluation; 0: a training under torchrun. The next call goes on."""
    line = fake({"a": f"--leave {status}"}, (Row("a", "a", "net"),))
    with pytest.raises(SystemExit, match=str(run.TRY_AGAIN)):
        headline.main(headline.parse_args(line))
    assert "nothing is finished yet" in capsys.readouterr().out
    assert not list(tmp_path.rglob("*.failed"))
    (tmp_path / "runs" / "small" / "mended").touch()
    (row,) = headline.main(headline.parse_args(line))["rows"]
    assert row["failed"] == {} and list(row["seeds"]) == ["0", "1"]


def test_a_network_that_diverged_has_no_numbers(fake, capsys):
    line = fake({"a": "--value 10 --diverge 1"}, (Row("a", "a", "net"),))
    (row,) = headline.main(headline.parse_args(line))["rows"]
    assert row["failed"] == {"1": "diverged at step 16"} and list(row["seeds"]) == ["0"]
    assert "failed (seed 1): diverged at step 16" in capsys.readouterr().out


def test_runs_of_another_command_do_not_count(fake, tmp_path):
    """Two recipes are never one row, and what was made stays where it is."""
    rows = (Row("a", "a", "net"),)
    headline.main(headline.parse_args([*fake({"a": "--value 10"}, rows), "--seeds", "1"]))
    (tmp_path / "headline_fake_small.json").unlink()
    (row,) = left_by(fake({"a": "--value 90"}, rows))["rows"]
    assert [v["error"] for v in row["seeds"].values()] == [91.0]
    assert "made by another command: move it away" in row["failed"]["0"]
    assert headline_jobs.final_numbers(tmp_path / "runs" / "small" / "a-s0")["error/net"] == 10


def test_missing_numbers_show(fake, tmp_path, capsys):
    """A cell says of how many seeds it is, a point takes seeds with both, a table is not done."""
    line = fake({"a": "--value 10"}, (Row("a", "a", "net"),))
    headline.main(headline.parse_args(line))
    (tmp_path / "runs" / "small" / "a-s1" / "last.files.json").unlink()
    (tmp_path / "headline_fake_small.json").unlink()
    args = headline.parse_args(line)
    table = headline_tables.TABLES["fake"]
    content = headline_numbers.collect(args, "fake", table, table.scales["small"].rows, 2)
    ((_, error, clean, n),) = headline_report.lines_of(content)[0]
    assert error == "10.50 +- 0.71" and clean.endswith(" (1 of 2)") and n == 2
    assert headline_report.points_of(content, "error", "clean")["a"][:2] == (10.0, 0.0)
    content["rows"].append(content["rows"][0] | {"row": "the same, best epoch"})
    assert list(headline_report.points_of(content, "error", "clean")) == ["a"]
    assert headline.main(headline.parse_args(line[1:]))[0][2] == "1 of 2 rows x seeds"


def test_rows_not_begun_are_named_below(fake):
    rows = (Row("first", "a", "net"), Row("second", "b", "net"))
    line = fake({"a": "--value 1", "b": "--value 2"}, rows)
    content = headline.main(headline.parse_args([*line, "--rows", "first"]))
    assert [line[0] for line in headline_report.lines_of(content)[0]] == ["first"]
    assert headline_report.caption(content).endswith("Not measured yet: second.")


def test_nothing_but_failures_still_makes_a_table(fake):
    content = left_by(fake({"a": "--fail all"}, (Row("a", "a", "net"),)))
    assert content["rows"][0]["seeds"] == {} and set(content["rows"][0]["failed"]) == {"0", "1"}


def test_a_stopped_table_goes_on(fake, tmp_path, monkeypatch):
    rows = (Row("first", "a", "net"), Row("second", "b", "net"))
    line = fake({"a": "--value 1", "b": "--wait yes"}, rows)
    lines = [
        "import sys",
        f"sys.path.insert(0, {str(run.ROOT)!r})",
        "from common import run",
        "from eval import headline, headline_tables as tables",
        f"scale = tables.{headline_tables.TABLES['fake'].scales['small']!r}"
        .replace("Scale(", "tables.Scale(", 1).replace("Row(", "tables.Row("),
        "tables.TABLES = {'fake': tables.Table('t', 'p', {'small': scale})}",
        "run.cli(headline.main, headline.parse_args)",
    ]  # fmt: skip
    (tmp_path / "start.py").write_text("\n".join(lines).replace("tables.tables.", "tables."))
    process = subprocess.Popen([sys.executable, str(tmp_path / "start.py"), *line])
    waiting = tmp_path / "runs" / "small" / "b-s0"
    deadline = time.monotonic() + 60
    while not (waiting / "waits").exists():
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=30) == run.TRY_AGAIN
    content = json.loads((tmp_path / "headline_fake_small.json").read_text())
    assert list(content["rows"][0]["seeds"]) == ["0"] and content["rows"][1]["seeds"] == {}
    for seed in (0, 1):
        (tmp_path / "runs" / "small" / f"b-s{seed}").mkdir(exist_ok=True)
        (tmp_path / "runs" / "small" / f"b-s{seed}" / "go").touch()
    content = headline.main(headline.parse_args(line))
    assert [len(row["seeds"]) for row in content["rows"]] == [2, 2]
    assert (tmp_path / "runs" / "small" / "a-s0" / "starts").read_text() == "x"
    assert (waiting / "starts").read_text() == "xx"


def test_rows_are_chosen_by_titles_with_commas():
    scale = headline_tables.TABLES["ct-cifar10"].scales["small"]
    words = ["ct-cifar10", "--rows", "vgg11-16, CT,wrn10-2, BatchNorm, wrn10-2, none"]
    rows = headline.chosen_rows(headline.parse_args(words), scale)
    assert [row.title for row in rows] == ["vgg11-16, CT", "wrn10-2, BatchNorm", "wrn10-2, none"]


def test_the_list_names_every_table_and_its_paper_in_80_columns(tmp_path, capsys):
    headline.main(headline.parse_args(["--runs", str(tmp_path)]))
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) < 80
    words = " ".join(out.split())
    for name, table in headline_tables.TABLES.items():
        assert f"{name}: {table.title} ({table.paper})" in words


def test_dry_run_starts_nothing(tmp_path, capsys):
    line = [*words_of("question", "small", tmp_path), "--dry-run", "--rows", "BatchNorm,CT"]
    todo = headline.main(headline.parse_args([*line, "--seeds", "1", "--data-dir", str(tmp_path)]))
    assert [job.key for job in todo if job.trains] == ["bn-s0", "none-s0", "ct-s0"]
    out = capsys.readouterr().out
    assert "python ct.py --dataset cifar10" in out and "data set cifar10:" in out
    assert not (tmp_path / "runs").exists()


def test_dry_run_of_every_table(tmp_path, capsys, monkeypatch):
    """One seed is enough: seeds differ in a number alone."""

    def load(name, *args, **options):
        if name != "cifar10":
            raise run.UserError(f"{name}: not on this machine")

    monkeypatch.setattr(data, "load", load)
    (tmp_path / "cifar10.npz").touch()
    found = headline.main(
        headline.parse_args(
            ["--dry-run", "--seeds", "1", "--data-dir", str(tmp_path), "--runs", str(tmp_path)]
        )
    )
    assert [tuple(line[:2]) for line in found] == SCALES
    states = {line[3]: line[4] for line in found}
    assert {name for name, state in states.items() if state == "there"} == {"cifar10", "gaussian"}
    out = capsys.readouterr().out
    assert "their options are known" in out and out.count("pacs: not on this machine") == 1
    assert "cifar100: not in" in out and "corruptions of cifar10: generated, frost: pro" in out
    assert "in9-mixed-rand: not on this machine" in out
    assert [path.name for path in tmp_path.iterdir()] == ["cifar10.npz"]  # nothing is fetched


def test_a_dry_run_prints_what_would_be_started(fake, capsys):
    line = [*fake({"a": "--value 1"}, (Row("a", "a", "net"),)), "--seeds", "1", "--gpus", "2"]
    args = headline.parse_args(line)
    scale = headline_tables.TABLES["fake"].scales["small"]
    job = headline_jobs.training(args, scale, "a", 0)
    words = headline_jobs.launched(job, args)
    assert words[1:6] == ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    assert words[6:] == job.words


def test_a_dry_run_names_what_another_command_made(fake, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(headline, "check", lambda job: None)  # the made-up scripts have no parser
    headline.main(headline.parse_args(fake({"a": "--value 1"}, (Row("a", "a", "net"),))))
    line = fake({"a": "--value 2"}, (Row("a", "a", "net"),))
    capsys.readouterr()
    headline.main(headline.parse_args([*line, "--dry-run"]))
    folder = tmp_path / "runs" / "small" / "a-s0"
    assert f"would fail: {folder} was made by another command" in capsys.readouterr().out


RESULTS = run.ROOT / "eval" / "results"


def test_the_readme_shows_the_results_files():
    text = (RESULTS / "README.md").read_text()
    assert headline_report.updated(text, RESULTS) == text, "python eval/headline.py --readme"
    marked = {match[1] for match in headline_report.MARKED.findall(text)}
    assert marked == {path.stem for path in RESULTS.glob("headline_*.json")}
    for name in marked:
        content = json.loads((RESULTS / f"{name}.json").read_text())
        assert (RESULTS / f"{name}.md").read_text() == headline_report.markdown(content)


def test_readme_is_brought_up_to_date(fake, tmp_path):
    headline.main(headline.parse_args(fake({"a": "--value 10"}, (Row("a", "a", "net"),))))
    head, end = "<!-- table: headline_fake_small -->", "<!-- end of table -->"
    (tmp_path / "README.md").write_text(f"before\n\n{head}\nold\n{end}\n\nafter\n")
    text = headline.main(headline.parse_args(["--readme", "--out", str(tmp_path)]))
    assert text.startswith(f"before\n\n{head}\nFile: `headline_fake_small.json`.\n\n| network |")
    assert "| a | 10.50 +- 0.71 |" in text and "old" not in text
    assert text.endswith(f"(headline_fake_small.svg)\n{end}\n\nafter\n")
    assert headline_report.updated(text, tmp_path) == text
    with pytest.raises(run.UserError, match=r"no headline_other_small.json"):
        headline_report.updated(text.replace("fake", "other"), tmp_path)


def test_unpublished_runs_only_what_the_results_file_lacks(fake, tmp_path, monkeypatch, capsys):
    """On another machine: a seed that nobody ran, a row that lost a number, one of before."""
    monkeypatch.setattr(headline, "check", lambda job: None)  # the made-up scripts have no parser
    rows = (Row("A", "a", "net"), Row("B", "b", "net"))
    line = fake({"a": "--value 10", "b": "--value 20"}, rows)
    headline.main(headline.parse_args([*line, "--seeds", "1"]))
    line += ["--unpublished", "--runs", str(tmp_path / "elsewhere")]

    def started():
        return sorted(f.parent.name for f in (tmp_path / "elsewhere").rglob("starts"))

    headline.main(headline.parse_args([*line, "--seeds", "1"]))
    assert started() == []
    content = headline.main(headline.parse_args([*line, "--rows", "B"]))
    assert started() == ["b-s1"]
    assert [list(row["seeds"]) for row in content["rows"]] == [["0"], ["0", "1"]]
    content["rows"][0]["seeds"]["0"]["clean"] = None
    content["rows"][1]["command"] += " --of-before"
    (tmp_path / "headline_fake_small.json").write_text(json.dumps(content))
    capsys.readouterr()
    headline.main(headline.parse_args([*line, "--dry-run"]))
    printed = re.findall(r"/(\w-s\d) --resume", capsys.readouterr().out)
    assert printed == ["a-s0", "b-s0", "a-s1"]  # b-s1 was trained here
    content = headline.main(headline.parse_args(line))
    assert started() == ["a-s0", "a-s1", "b-s0", "b-s1"]
    errors = [[v["error"] for v in row["seeds"].values()] for row in content["rows"]]
    assert errors == [[10.0, 11.0], [20.0, 21.0]]
    for state, left in (("diverged at step 7", []), ("error: out of memory", ["a-s1"])):
        content["rows"][0]["seeds"].pop("1", None)
        content["rows"][0]["failed"] = {"1": state}
        (tmp_path / "headline_fake_small.json").write_text(json.dumps(content))
        capsys.readouterr()
        more = ["--runs", str(tmp_path / "third"), "--dry-run"]
        headline.main(headline.parse_args([*line, *more]))
        assert re.findall(r"/(\w-s\d) --resume", capsys.readouterr().out) == left


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (["nothing"], "no such table; there are question"),
        (["question", "--rows", "other"], "--rows: no other; there are BatchNorm"),
        (["question", "--evaluations", "x"], "--evaluations x: question has corruptions, linf"),
        (["ct-vlcs", "--scale", "full", "--evaluations", "x"], "ct-vlcs has none, for its numb"),
        (["ct-vlcs"], "has no small scale: give --scale full"),
        (["--rows", "BatchNorm"], "--rows: of which table?"),
        (["--unpublished"], "--unpublished: of which table?"),
        (["--checkpoints"], "--checkpoints: of which table?"),
        (["question", "--checkpoints", "--dry-run"], "--checkpoints and --dry-run: one at a time"),
    ],
)
def test_names_that_are_not_there(line, message, tmp_path):
    with pytest.raises(run.UserError, match=message):
        headline.main(headline.parse_args([*line, "--runs", str(tmp_path), "--dry-run"]))


# --- checkpoints ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "option",
    [
        ["--seeds", "2"],
        ["--evaluations", "linf"],
        ["--jobs", "2"],
        ["--gpus", "2"],
        ["--unpublished"],
    ],
)
def test_checkpoints_refuse_options_that_would_do_nothing(option):
    with pytest.raises(run.UserError, match=f"runs nothing: leave {option[0]} out"):
        headline.parse_args(["question", "--checkpoints", *option])


CHECKPOINTS = sorted((RESULTS / "checkpoints").glob("*.pt"))


CLEAN = {
    "nofrost": "clean, accuracy %",
    "fixup-penalty": "test %",
}  # by table; others: "clean error %"


def published(content, column=None):
    """The clean error in % of a checkpoint's row, or another of its numbers, of seed 0."""
    table = content.get("table", "question")
    rows = json.loads((RESULTS / f"headline_{table}_small.json").read_text())["rows"]
    (numbers,) = (row["seeds"]["0"] for row in rows if row["row"] == content["title"])
    clean = CLEAN.get(table, "clean error %")
    number = numbers[column or clean]
    return number if column or "error" in clean else 100 - number


def test_checkpoints_are_whole_and_small():
    assert CHECKPOINTS and sum(path.stat().st_size for path in CHECKPOINTS) < 15e6
    for path in CHECKPOINTS:
        content = run.load_checkpoint(path)
        assert 0 < published(content) < 90, path.name
        assert "optimizer" not in content and content["step"] == content["total"] > 0
        words = [v for v in content["args"].values() if isinstance(v, str)]
        assert not any("/" in word for word in words)
        assert content["args"]["seed"] == 0


@pytest.mark.slow
@pytest.mark.parametrize("path", CHECKPOINTS, ids=lambda path: path.stem)
def test_checkpoints_have_the_published_clean_error(path, request):
    """Five images of 10,000, that bf16 may round apart, and none of 500 in fp32."""
    content = run.load_checkpoint(path)
    attacked = content.get("table") == "nofrost"
    folder = request.getfixturevalue(f"{content['dataset']}_dir")
    dataset = data.load(content["dataset"], str(folder), seed=0)
    model = models.from_checkpoint(content)
    if content["norm"] == "dual-bn":
        models.use_statistics(model, "adversarial")
    images = dataset.test
    if attacked:  # the images that eval/adversarial.py takes
        images = images.take(data.stratified_split(images.y, 500, 0, "--limit")[1])
    precision = run.Precision("fp32" if attacked else "bf16", torch.device("cpu"))
    error = run.evaluate(model, images, precision)["error"]
    assert error == pytest.approx(published(content), abs=1e-6 if attacked else 0.05)


@pytest.mark.slow
def test_checkpoints_give_the_published_numbers(cifar10_dir, shared, tmp_path):
    """Half a minute a network. The bound is 75 of 150,000 images: ties that bf16 rounds apart."""
    loaded = {path: run.load_checkpoint(path) for path in CHECKPOINTS}
    paths = [path for path, c in loaded.items() if c.get("table", "question") == "question"]
    line = [*map(str, paths), "--data-dir", str(cifar10_dir), "--limit", "2000"]
    line += ["--precision", "bf16", "--frost-dir", str(shared / "golden" / "frost")]
    line += ["--corruptions", ",".join(corruptions.NAMES), "--json", str(tmp_path / "out.json")]
    content = corruptions_table.main(corruptions_table.parse_args(line))
    for path, entry in zip(paths, content["checkpoints"], strict=True):
        wanted = published(loaded[path], "15 corruptions, error %")
        assert entry["mean_corruption_error"] == pytest.approx(wanted, abs=0.05), path.name


def test_writes_checkpoints_of_finished_rows(tmp_path, monkeypatch, capsys):
    rows = (
        Row("first", "a", "net"), Row("mixed", "a", "net", options={"e": "--gamma 1"}),
        Row("teacher", "a", "net", "teacher.pt"), Row("second", "b", "net"),
    )  # fmt: skip
    scale = Scale("", "shapes", 1, 1, "", {"a": "", "b": ""}, {}, {}, rows)
    monkeypatch.setattr(headline_tables, "TABLES", {"fake": Table("", "", {"small": scale})})
    folder = tmp_path / "runs" / "small" / "a-s0"
    folder.mkdir(parents=True)
    (folder / "log.jsonl").write_text(json.dumps({"event": "end"}) + "\n")
    weights = {"w": torch.arange(3.0)}
    options = {"out": "/x", "data_dir": "/y", "lr": 0.1}
    content = {"model": weights, "optimizer": {"state": weights}, "arch": "net", "args": options}
    run.save_checkpoint(folder / "last.pt", content)
    run.save_checkpoint(folder / "teacher.pt", content)
    paths = headline.main(
        headline.parse_args([*words_of("fake", "small", tmp_path), "--checkpoints"])
    )
    assert [path.name for path in paths] == ["a.pt", "a-teacher.pt"]  # one file a network
    written = run.load_checkpoint(paths[0])
    assert torch.equal(written["model"]["w"], weights["w"]) and "optimizer" not in written
    assert written["args"] == {"lr": 0.1} and written["title"] == "first"
    assert run.load_checkpoint(paths[1])["title"] == "teacher"
    assert "not finished: second" in capsys.readouterr().out
    (folder / "teacher.pt").unlink()
    (tmp_path / "runs" / "small" / "a-s0.command").write_text("another")
    line = [*words_of("fake", "small", tmp_path), "--checkpoints"]
    assert headline.main(headline.parse_args(line)) == []
    (tmp_path / "runs" / "small" / "a-s0.command").unlink()
    assert [p.name for p in headline.main(headline.parse_args(line))] == ["a.pt"]
    assert "no teacher.pt in" in capsys.readouterr().out


# --- figures --------------------------------------------------------------------------------------


def test_figures_are_those_of_the_results_files(tmp_path):
    names = figures.main(figures.parse_args(["--out", str(tmp_path)]))
    assert set(names) == {path.name for path in RESULTS.glob("*.svg")}
    for name in names:
        drawn, shown = (tmp_path / name).read_text(), (RESULTS / name).read_text()
        assert drawn == shown, f"python eval/figures.py; {name} is older than its numbers"
        texts = xml.etree.ElementTree.fromstring(drawn).iter("{http://www.w3.org/2000/svg}text")
        titles = [t.text for t in texts if t.get("text-anchor") == "middle" and t.text]
        assert any(not re.fullmatch(r"[\d.e+-]+", text) for text in titles), "no axis has a title"


def test_rings_and_joined_points(tmp_path):
    """An adapted network is a ring on the line of its dot; shares of gamma are joined, and named
    beside their points instead of in the legend."""
    rows = [{"row": f"dual, gamma {g}", "seeds": {"0": {"c": g, "r": 9 - g}}} for g in (0, 1, 2)]
    rows.append({"row": "bn", "seeds": {"0": {"c": 1.0, "r": 4.0, "a": 2.0}}})
    content = {"rows": rows, "title": "T", "chart": ["c", "r", "a, error"]}
    rows[-1]["seeds"]["0"]["a, error"] = 2.0
    assert headline_report.draw(content, tmp_path / "x.svg")
    text = (tmp_path / "x.svg").read_text()
    assert text.count("<circle") == 5 and text.count('fill="none" stroke="#') == 2
    assert text.count("stroke-dasharray") == 1 and "T Rings: a" in text
    for words in (">dual, gamma 0<", ">1<", ">2<", ">bn<"):
        assert words in text
    assert text.count('x="520"') == 1  # the legend holds the network that is not joined


def test_no_name_of_the_legend_has_the_grey_of_joined_points(tmp_path):
    points = {str(i): (i, 0, i, 0) for i in range(8)}
    for joined, names in (({"7": "gamma"}, 7), (None, 8)):
        run.scatter_chart(tmp_path / "x.svg", "T", points, "x", "y", joined=joined)
        text = (tmp_path / "x.svg").read_text()
        colours = re.findall(r'style="fill:(#\w+)"', text)
        assert len(set(colours)) == len(colours) == names
        assert (GREY in colours) is (joined is None) and f'fill="{GREY}"' in text


def test_a_curve_over_epochs_is_drawn_and_published(tmp_path, monkeypatch):
    """An epoch that was measured twice, before and after a stop, counts once."""
    rows = (Row("a", "a", "net"), Row("b", "b", "net"))
    scale = Scale("", "shapes", 2, 1, "", {"a": "", "b": ""}, {}, {"e": ("run", "e/{stage}")}, rows,
                  curve=("size", "size of it"))  # fmt: skip
    monkeypatch.setattr(headline_tables, "TABLES", {"fake": Table("", "", {"small": scale})})
    for seed in (0, 1):
        folder = tmp_path / "runs" / "small" / f"a-s{seed}"
        folder.mkdir(parents=True)
        lines = [
            {"stage": "net", "epoch": e, "size": s} for e, s in ((0, 1), (1, 9), (1, 2 + seed))
        ]
        lines += [{"stage": "tune-net", "epoch": 2, "size": 7}, {"event": "end", "e/net": 1.0}]
        (folder / "log.jsonl").write_text("\n".join(map(json.dumps, lines)))
    args = headline.parse_args(words_of("fake", "small", tmp_path))
    content = headline_numbers.collect(args, "fake", headline_tables.TABLES["fake"], rows, 2)
    assert [about["curve"] for about in content["rows"][0]["trained"].values()] == [
        [[0, 1.0], [1, 2.0]], [[0, 1.0], [1, 3.0]],
    ]  # fmt: skip
    headline_report.publish(content, tmp_path)
    text = (tmp_path / "headline_fake_small.svg").read_text()
    assert ">size of it<" in text and ">epoch<" in text and ">a<" in text and ">b<" not in text
    elsewhere = [*words_of("fake", "small", tmp_path), "--runs", str(tmp_path / "elsewhere")]
    kept = headline_numbers.collect(
        headline.parse_args(elsewhere), "fake", headline_tables.TABLES["fake"], rows, 2
    )
    assert kept["rows"] == content["rows"]


def test_few_points_are_no_figure(tmp_path):
    rows = [{"row": f"row {i}", "seeds": {"0": {"c": i, "r": i}}} for i in range(3)]
    content = {"rows": rows, "title": "T", "chart": ["c", "r"]}
    assert not headline_report.draw(content, tmp_path / "x.svg")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "values, cell",
    [([12.3456, 0.5], "12.35"), ([9255.48, 1.0], "9255"), ([691000.5, 0.0], "6.91e+05"),
     ([0.00071, 0.2], "0.00071"), ([12.3456, 0.0], "12.35")],
)  # fmt: skip
def test_large_and_small_numbers_keep_four_digits(values, cell):
    """0.00 would hide a small one. An exact zero is no small number."""
    row = {"paper": {}, "failed": {}}
    rows = [row | {"row": str(i), "seeds": {"0": {"c": v}}} for i, v in enumerate(values)]
    lines, _ = headline_report.lines_of({"rows": rows, "columns": ["c"]})
    assert lines[0][1] == cell


def test_10000_images_have_what_was_tuned_on_4000():
    """CHOSEN against the choices of every seed in the published file: that of most of them."""
    path = run.ROOT / "eval" / "results" / "headline_fixup-penalty_small.json"
    for row in json.loads(path.read_text())["rows"]:
        found = [choice for about in row["trained"].values() for choice in about["tuned"]]
        options = [
            " ".join(f"--{key.replace('_', '-')} {choice[key]}" for key in
                     ("lr", "penalty_weight", "dropout") if key in choice)
            for choice in found
        ]  # fmt: skip
        assert len(options) == 3 and statistics.mode(options) == headline_tables.CHOSEN[row["row"]]
