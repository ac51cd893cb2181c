"""eval/tables.py groups by settings, averages over seeds, and refuses what does not compare."""

import importlib.util
import json

import pytest
import torch

from common import run
from common.run import UserError

spec = importlib.util.spec_from_file_location("tables", run.ROOT / "eval" / "tables.py")
tables = importlib.util.module_from_spec(spec)
spec.loader.exec_module(tables)


def write(path, entries, **facts):
    result = dict.fromkeys(tables.FACTS, "x") | {"checkpoints": entries} | facts
    path.write_text(json.dumps(result))
    return str(path)


def entry(norm, seed, error, lam=0.0):
    options = {"seed": seed, "lam": lam, "distance": "mse" if lam else f"ignored {seed}"}
    return {"norm": norm, "options": options, "clean": {"error": error, "ece": 1.0},
            "mean_corruption_error": 2 * error}  # fmt: skip


def test_rows_over_seeds(tmp_path, capsys):
    a = write(tmp_path / "a.json", [entry("bn", 0, 10.0), entry("none", 0, 30.0)])
    b = write(tmp_path / "b.json", [entry("bn", 1, 12.0), entry("bn", 0, 9.0, lam=1.0)])
    rows = tables.main(tables.parse_args([a, b]))
    values = [(r["clean error"], r["mean corruption error"], r["n"]) for r in rows.values()]
    assert values == [("11.00 +- 1.41", "22.00 +- 2.83", 2), ("30.00", "60.00", 1),
                      ("9.00", "18.00", 1)]  # fmt: skip
    assert all("norm" in name and "lam" in name for name in rows)
    assert all(r["extra (4)"] == "-" for r in rows.values())
    tables.main(tables.parse_args([a, "--markdown"]))
    assert "| norm bn | 10.00 | 20.00 |" in capsys.readouterr().out


def test_files_that_do_not_compare(tmp_path):
    a = write(tmp_path / "a.json", [], images=100)
    b = write(tmp_path / "b.json", [], images=200)
    with pytest.raises(UserError, match=r"differ in images \(100, 200\)"):
        tables.main(tables.parse_args([a, b]))


@pytest.mark.parametrize("content", ["", "[]", "{}", "no json"])
def test_not_a_result(tmp_path, content):
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(UserError, match="no result of eval"):
        tables.main(tables.parse_args([str(tmp_path / "a.json")]))


def test_a_network_counts_once(tmp_path, capsys):
    a = write(tmp_path / "a.json", [entry("bn", 0, 10.0) | {"checkpoint": "runs/a/last.pt"}])
    b = write(tmp_path / "b.json", [entry("bn", 0, 10.0) | {"checkpoint": "copy.pt"}])
    rows = tables.main(tables.parse_args([a, a, b]))
    assert [(r["clean error"], r["n"]) for r in rows.values()] == [("10.00", 1)]
    assert "each counts once" in capsys.readouterr().err
    same = [entry("bn", 0, error) | {"weights": "d1"} for error in (10.0, 10.1)]
    c = write(tmp_path / "c.json", same)
    assert [r["n"] for r in tables.main(tables.parse_args([c])).values()] == [1]


def test_folders_names_and_seeds(tmp_path, capsys):
    (tmp_path / "runs" / "a").mkdir(parents=True)
    write(tmp_path / "runs" / "a" / "last.corruptions.json", [entry("bn", 0, 10.0)])
    write(tmp_path / "runs" / "last.corruptions.json", [entry("bn", 1, 12.0)])
    (tmp_path / "runs" / "args.json").write_text("{}")
    line = [str(tmp_path / "runs"), "--names", "baseline", "--per-seed", "--csv"]
    assert tables.main(tables.parse_args(line))["baseline"]["n"] == 2
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].startswith("baseline,11.00 +- 1.41,22.00 +- 2.83,-")
    assert lines[2].startswith("  seed 0,10.00,") and lines[3].startswith("  seed 1,12.00,")
    with pytest.raises(UserError, match="2 names for 1 rows"):
        tables.main(tables.parse_args([line[0], "--names", "a,b"]))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no results of eval"):
        tables.main(tables.parse_args([str(tmp_path / "empty")]))


def test_latex_and_scatter(tmp_path, capsys):
    a = write(tmp_path / "a.json", [entry("bn", 0, 10.0), entry("none", 0, 30.0)])
    svg = tmp_path / "a.svg"
    columns = "clean error,mean corruption error"
    line = [a, "--latex", "--names", "a & b,c_d", "--scatter", columns, str(svg)]
    tables.main(tables.parse_args(line))
    out = capsys.readouterr().out
    assert r"a \& b & 10.00 & 20.00 &" in out and r"c\_d" in out and r"\bottomrule" in out
    assert svg.read_text().count("<circle") == 2 and "clean error (%)" in svg.read_text()
    with pytest.raises(UserError, match="two of these columns"):
        tables.main(tables.parse_args([a, "--scatter", "clean,other", str(svg)]))


@pytest.mark.parametrize(
    "name", ["ct_cifar10_bn", "nofrost_cifar10", "fixup_penalty_cifar10", "ct_cifar100_train"]
)
def test_published_results_are_read(name):
    rows = tables.main(
        tables.parse_args([str(run.ROOT / "eval" / "results" / f"{name}.json"), "--markdown"])
    )
    assert all(row["n"] in (2, 3) for row in rows.values()) and rows


def test_digest_is_of_the_weights():
    first = torch.nn.Linear(2, 3)
    second = torch.nn.Linear(2, 3)
    assert run.weights_digest(first) != run.weights_digest(second)
    second.load_state_dict(first.state_dict())
    assert run.weights_digest(first) == run.weights_digest(second)


def test_adapted_statistics_are_a_row_of_their_own():
    """The same network with and without --adapt or --gamma is never averaged with itself."""
    plain = entry("bn", 0, 10.0) | {"weights": "d1"}
    kinds = [{}, {"adapt": 32, "adapt_source": 16}, {"adapt": 8, "adapt_source": 16}, {"gamma": 0}]
    found = tables.grouped([{"checkpoints": [plain | kind for kind in kinds]}])
    assert [len(entries) for _, entries in found] == [1, 1, 1, 1]
