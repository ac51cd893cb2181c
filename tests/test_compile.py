"""--compile: one graph a network without a break, and no second one; the teacher too."""

import pytest
import torch
from torch._dynamo.testing import CompileCounter

import ct
import fixup_penalty
import nofrost
from common import run
from common.run.device import LONG, refuse_graphs_twice, wants_compiled

TINY = ["--dataset", "shapes", "--limit", "64", "--batch-size", "16", "--epochs", "2",
        "--eval-every", "1", "--device", "cpu", "--overwrite", "--compile", "--val-size",
        "20"]  # fmt: skip
CT = [*TINY, "--arch", "wrn10-1", "--corrupted-images", "0", "--teacher-epochs", "1"]
NOFROST = [*TINY, "--arch", "wrn10-1", "--robust-images", "0", "--probe-images", "4"]
FIXUP = [*TINY, "--arch", "wrn10-1", "--corrupted-images", "0"]
CASES = {  # script, options, graphs: the networks of the run, and the frozen teacher of ct.py
    "ct": (ct, CT, 4),
    "nofrost": (nofrost, [*NOFROST, "--norms", "nf,bn"], 2),
    "nofrost dual-bn": (nofrost, [*NOFROST, "--norms", "dual-bn"], 2),  # one for each statistics
    "nofrost trades": (nofrost, [*NOFROST, "--norms", "none", "--loss", "trades"], 1),
    "fixup": (fixup_penalty, [*FIXUP, "--variants", "none,fixup+penalty,bn+dropout,bn-aux",
                              "--aux-batch", "20"], 4),
    "norms": (fixup_penalty, [*FIXUP, "--variants", "gn,in,ln,noise,bn-population,noisy-bn,l1,linf,"
                              "l2,bn"], 10),
}  # fmt: skip


FAST = ("ct", "nofrost dual-bn", "norms")


@pytest.mark.parametrize(
    "name", [n if n in FAST else pytest.param(n, marks=pytest.mark.slow) for n in CASES]
)
def test_each_network_is_one_graph(tmp_path, monkeypatch, name):
    """More networks of a class than torch compiles (8) are no limit, for each loop starts anew."""
    script, options, graphs = CASES[name]
    counter = CompileCounter()
    compile_with = torch.compile

    def counted(model, mode=None):
        return compile_with(model, backend=counter, fullgraph=True)  # a break is an error

    monkeypatch.setattr(torch, "compile", counted)
    torch.compiler.reset()
    script.main(script.parse_args([*options, "--out", str(tmp_path)]))
    assert counter.frame_count == graphs
    torch.compiler.reset()


def test_compile_is_the_default_of_long_trainings_on_a_gpu(monkeypatch):
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    for has_triton in (True, False):
        monkeypatch.setattr("torch.utils._triton.has_triton", lambda has=has_triton: has)
        assert wants_compiled({"compile": None}, gpu, LONG) == has_triton
        assert not wants_compiled({"compile": None}, gpu, LONG - 1)
        assert not wants_compiled({"compile": None}, cpu, LONG)
        for device in (cpu, gpu):
            assert wants_compiled({"compile": True}, device, 1)
            assert not wants_compiled({"compile": False}, device, LONG)
        assert not wants_compiled({"compile": None, "capture": True}, gpu, LONG)
    both = vars(nofrost.parse_args(["--dataset", "shapes", "--compile"]))
    refuse_graphs_twice(both, cpu)
    with pytest.raises(run.UserError, match="add --no-capture"):
        refuse_graphs_twice(both, gpu)


def test_nofrost_captures_attacks_alone():
    """Without an attack there is nothing to capture, and the network may be compiled."""
    assert nofrost.parse_args(["--dataset", "shapes"]).capture
    assert not nofrost.parse_args(["--dataset", "shapes", "--lam", "0"]).capture
    assert not nofrost.parse_args(["--dataset", "shapes", "--attack-mode", "train"]).capture


def test_kernels_are_launched_together_on_one_gpu(monkeypatch):
    modes = []
    monkeypatch.setattr(torch, "compile", lambda model, mode=None: modes.append(mode))
    run.compiled(None, torch.device("cuda"))
    run.compiled(None, torch.device("cpu"))
    monkeypatch.setattr("common.run.device.world", lambda: 2)
    run.compiled(None, torch.device("cuda"))
    assert modes == ["reduce-overhead", None, None]
