"""eval/growth.py: the laws of growth with depth, and files as images."""

import importlib.util

import pytest

from common import run
from common.run import UserError

spec = importlib.util.spec_from_file_location("growth", run.ROOT / "eval" / "growth.py")
growth = importlib.util.module_from_spec(spec)
spec.loader.exec_module(growth)


def test_without_batchnorm_it_explodes_with_fixup_it_stays():
    argv = "--dataset shapes --arch wrn16-1 --depths 10,28 --images 32".split()
    found = growth.main(growth.parse_args(argv))
    grown = {norm: found[norm, "wrn28-1"]["embedding"] / found[norm, "wrn10-1"]["embedding"]
             for norm in ("none", "bn", "fixup")}  # fmt: skip
    assert grown["none"] > 20 and grown["bn"] < 3
    assert 0.5 < grown["fixup"] < 2 and found["fixup", "wrn28-1"]["logits"] == 0
    own = growth.main(growth.parse_args([*argv, "--init", "own", "--norms", "none"]))
    assert own["none", "wrn28-1"]["embedding"] < 3 * own["none", "wrn10-1"]["embedding"]


def test_numbers_that_cannot_be_written_are_known_at_the_beginning(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(growth.data, "from_args", lambda *_: pytest.fail("worked first"))
    with pytest.raises(UserError, match="--json elsewhere"):
        growth.main(growth.parse_args(["--json", str(tmp_path / "file" / "a.json")]))


def test_bad_options():
    with pytest.raises(UserError, match="a Wide ResNet has depth"):
        growth.main(growth.parse_args("--dataset shapes --depths 11".split()))
    with pytest.raises(UserError, match="--arch allconv: its name has no depth"):
        growth.parse_args(["--arch", "allconv"])
