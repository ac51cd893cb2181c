"""eval/tables.py groups by settings, averages over seeds, and refuses what does not compare."""

import importlib.util
import json

import pytest

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
