"""Scripts on a pretended GPU (fake_cuda.py): every tensor is on the device, no step waits for it.

A training runs with 4 and with 8 steps. What it waits for outside of its steps is the same in both,
so what the longer one waits for in addition is what 4 steps wait for.
"""

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
ALL = ["--device", "cuda", "--batch-size", "16", "--log-every", "1000", "--no-compile"]
EPOCH = [*ALL, "--epochs", "1"]
CT = ["ct.py", "--dataset", "shapes", *EPOCH, "--corrupted-images", "0", "--val-size", "20",
      "--teacher-epochs", "1"]  # fmt: skip
NOFROST = ["nofrost.py", *EPOCH, "--robust-images", "0", "--probe-images", "4",
           "--attack-steps", "2", "--no-capture"]  # fmt: skip
FIXUP = ["fixup_penalty.py", *EPOCH, "--corrupted-images", "0"]
BN = ["bn_ablation.py", *ALL, "--arch", "vgg16-4", "--measure-every", "0", "--eval-every", "1000",
      "--limit", "200"]  # fmt: skip
slow = pytest.mark.slow
LENGTHS = {"bn_ablation.py": ("--steps", 4, 8)}  # elsewhere the images of one epoch
CASES = [
    [*CT, "--no-baseline"],
    [*NOFROST, "--norms", "nf,dual-bn"],
    [*FIXUP, "--variants", "fixup+penalty,bn-aux", "--aux-batch", "32"],
    pytest.param([*CT, "--no-baseline", "--precision", "fp32", "--distance", "kl"], marks=slow),
    pytest.param([*CT, "--lam", "0", "--precision", "fp16"], marks=slow),
    pytest.param([*CT, "--lam", "0", "--norm", "gn"], marks=slow),
    pytest.param([*NOFROST, "--norms", "nf", "--precision", "fp16"], marks=slow),
    pytest.param([*NOFROST, "--norms", "bn", "--attack-norm", "l2", "--agc", "0.1"], marks=slow),
    pytest.param([*NOFROST, "--norms", "nf", "--streams", "clean,tda,adv"], marks=slow),
    pytest.param([*NOFROST, "--norms", "none", "--loss", "trades"], marks=slow),
    pytest.param([*NOFROST, "--norms", "bn", "--precision", "fp32", "--attack-mode", "train"],
                 marks=slow),
    pytest.param([*NOFROST, "--norms", "nf,dual-bn", "--capture"], marks=slow),
    pytest.param([*FIXUP, "--variants", "none,noise+dropout", "--mixup", "0.2"], marks=slow),
    pytest.param([*FIXUP, "--variants", "fixup", "--precision", "fp16"], marks=slow),
    pytest.param([*FIXUP, "--variants", "bn-population", "--precision", "fp32"], marks=slow),
    pytest.param([*BN, "--norms", "none,bn,noisy-bn,l1"], marks=slow),
    pytest.param([*BN, "--norms", "bn", "--precision", "fp32"], marks=slow),
]  # fmt: skip


def run_pretended(tmp_path, *commands):
    """Run scripts on the pretended GPU in one process; (finished process, their reports)."""
    report = tmp_path / "report.json"
    words = [str(word) for command in commands for word in ("--", *command)][1:]
    process = subprocess.run(
        [sys.executable, str(HERE / "fake_cuda.py"), str(report), *words],
        capture_output=True,
        text=True,
        env=os.environ | {"CUDA_VISIBLE_DEVICES": ""},  # pretended, also beside a real GPU
    )
    return process, json.loads(report.read_text()) if report.exists() else None


def waits_of_steps(tmp_path, script, *options):
    """{(what, where): waits of the host in 4 steps} of a training."""
    option, *lengths = LENGTHS.get(script.split("/")[-1], ("--limit", 64, 128))
    commands = [
        [script, *options, option, length, "--out", tmp_path / str(length)] for length in lengths
    ]
    process, reports = run_pretended(tmp_path, *commands)
    assert process.returncode == 0, process.stderr[-3000:]
    short, long = (Counter({(a, b): n for a, b, n in report["waits"]}) for report in reports)
    done = [steps_in(tmp_path / str(length)) for length in lengths]
    assert done[0].keys() == done[1].keys() and done[0]
    assert all(done[1][stage] == done[0][stage] + 4 for stage in done[0])
    return long - short


def steps_in(folder):
    """{network: its last step} in the log of a run."""
    rows = map(json.loads, (folder / "log.jsonl").read_text().splitlines())
    return {row.get("stage", "all"): row["step"] for row in rows if "step" in row}


def shown(waits):
    return "\n".join(f"{n / 4:g} a step: {what}, {where}" for (what, where), n in waits.items())


def named(command):
    return " ".join(word for word in command if word not in EPOCH).replace("/", "")


@pytest.mark.parametrize("command", CASES, ids=named)
def test_no_step_waits_for_the_device(tmp_path, command):
    waits = waits_of_steps(tmp_path, *command)
    assert not waits, shown(waits)


# --- defects planted on purpose -------------------------------------------------------------------


def planted(tmp_path, old, new):
    """A copy of ct.py with `old` replaced by `new`."""
    text = (ROOT / "ct.py").read_text()
    assert text.count(old) == 1
    script = tmp_path / "planted.py"
    script.write_text(text.replace(old, new))
    return str(script)


def test_a_wait_in_a_step_is_caught(tmp_path):
    script = planted(
        tmp_path, "        loop.backward(loss)", "        loss.item()\n        loop.backward(loss)"
    )
    process, (report,) = run_pretended(
        tmp_path, [script, *CT[1:], "--lam", "0", "--limit", "64", "--out", tmp_path / "run"]
    )
    assert process.returncode == 0, process.stderr[-3000:]
    found = [(where, count) for what, where, count in report["waits"] if what == "item"]
    assert [count for where, count in found if where.startswith("planted.py")] == [4]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("F.cross_entropy(logits[: len(y)], y)", "F.cross_entropy(logits[: len(y)], y.cpu())",
         "same device"),
        pytest.param("x, y = task.batches(step)\n", "x, y = task.batches(step)\n"
                     "        torch.rand(2, generator=run.generator(1), device=x.device)\n",
                     "generator", marks=slow),
        pytest.param("x, y = task.batches(step)\n", "x, y = task.batches(step)\n"
                     "        x.numpy()\n", "numpy", marks=slow),
        pytest.param("x, y = task.batches(step)\n", "x, y = task.batches(step)\n"
                     "        torch.zeros(9)[y]\n", "indices on cuda", marks=slow),
    ],
)  # fmt: skip
def test_mixed_devices_are_refused(tmp_path, old, new, message):
    script = planted(tmp_path, old, new)
    process, _ = run_pretended(
        tmp_path, [script, *CT[1:], "--lam", "0", "--limit", "64", "--out", tmp_path / "run"]
    )
    assert process.returncode and message in process.stderr


# --- evaluations ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The run directory of a network that has learnt a little, trained on the CPU."""
    folder = tmp_path_factory.mktemp("device") / "run"
    command = ["ct.py", "--arch", "wrn10-1", "--lam", "0", "--corrupted-images", "0", "--limit",
               "2000", "--batch-size", "50", "--epochs", "3", "--device", "cpu"]  # fmt: skip
    subprocess.run(
        [sys.executable, *command, "--out", str(folder)], check=True, cwd=ROOT, capture_output=True
    )
    return folder


EVALUATIONS = {
    "adversarial": [["--limit", "20", "--attacks", "pgd-2,apgd-ce-2,apgd-t-1,fab-t-1,square-5",
                     "--batch-size", "10"], "square-5"],
    "corruptions": [["--limit", "20"], "mean"],
    "smoothness": [["--limit", "64"], "written"],
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", EVALUATIONS)
def test_evaluations_reach_their_tables(tmp_path, trained, name):
    """The attack's images stay in the ball that the CPU measures: 255 divides as there."""
    options, word = EVALUATIONS[name]
    process, _ = run_pretended(tmp_path, [f"eval/{name}.py", trained, "--device", "cuda", *options])
    assert process.returncode == 0, process.stderr[-3000:]
    assert word in process.stdout


# --- parts ----------------------------------------------------------------------------------------

LAYERS = """
import torch
import torch.nn.functional as F
from common import attacks, models, run
from common.attacks import fastnet

x = torch.rand(4, 3, 32, 32).cuda()
bf16 = run.Precision("bf16", "cuda")
for norm in ("gn", "ln", "in"):
    torch.manual_seed(0)
    model = models.build("wrn10-1", norm, 10).to("cuda", memory_format=torch.channels_last)
    with bf16.autocast():
        maps = model.maps(x)
    print(norm, {str(part.dtype) for part in maps})
layer = models.norms.GroupNorm(2, 8).cuda()
part = torch.rand(4, 8, 5, 5).cuda()
with bf16.autocast():
    low = layer(part.bfloat16())
exact = F.group_norm(part, 2)
print("near", bool(((low.float() - exact).abs() < 0.02 + 0.01 * exact.abs()).all()))
model = models.build("wrn10-1", "bn", 10).to("cuda", memory_format=torch.channels_last).eval()
with attacks.fastnet.prepared(model, x, bf16) as net:
    print("loose", len(net.norms), all("forward" in vars(norm) for norm in net.norms))
"""

SAVED = """
import torch
from common import run

parts = [torch.rand(3, device="cuda") for _ in range(50)]
state = {"a": parts, "b": {"c": torch.rand(2, 2)}, "d": 1}
found = run.checkpoint.on_host(state)
assert not any(part.is_cuda for part in found["a"]) and found["b"]["c"] is state["b"]["c"]
"""

SYNCHRONISED = """
import torch
import torch.distributed as dist
from common import models, run

models.norms.run.world = lambda: 2
run.device.world = lambda: 2
dist.all_gather = lambda parts, x: [part.copy_(x) for part in parts]
model = models.build("wrn10-1", "bn", 10).to("cuda", memory_format=torch.channels_last).train()
model(torch.rand(4, 3, 32, 32, device="cuda")).sum().backward()
"""


def test_parts_on_a_pretended_gpu(tmp_path):
    """GroupNorm stays bf16, as on a CPU; a checkpoint waits once; BatchNorm over processes never.

    torch's SyncBatchNorm would wait three times a layer."""
    scripts = {"layers.py": LAYERS, "saved.py": SAVED, "synchronised.py": SYNCHRONISED}
    for name, text in scripts.items():
        (tmp_path / name).write_text(text)
    process, reports = run_pretended(tmp_path, *([tmp_path / name] for name in scripts))
    assert process.returncode == 0, process.stderr[-3000:]
    told = process.stdout.splitlines()
    assert told[:3] == [f"{norm} {{'torch.bfloat16'}}" for norm in ("gn", "ln", "in")]
    assert told[3] == "near True"
    assert told[4].startswith("loose ") and told[4].endswith(" True") and told[4] != "loose 0 True"
    _, saved, synchronised = reports
    assert [(what, count) for what, _, count in saved["waits"]] == [("api: synchronize", 1)]
    line = next(k for k, text in enumerate(SYNCHRONISED.split("\n"), 1) if ".to(" in text)
    places = {where.split()[0] for _, where, _ in synchronised["waits"]}
    assert places == {f"synchronised.py:{line}"}  # where the model is put on the device
    assert synchronised["kernels"] > 100
