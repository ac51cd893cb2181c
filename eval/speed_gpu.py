"""The first ten minutes on a GPU, as a page for the README; a part of eval/speed.py.

Each part is a function (args, device) that gives lines of text and numbers. A part that fails is a
line of the page, and the next one runs. When --minutes are over, those that are left are named.
"""

import argparse
import contextlib
import copy
import functools
import io
import json
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from common import attacks, corruptions, models, run
from common.data import shapes
from eval import speed_train

TESTS = ["tests/test_gpu.py", "tests/test_corruptions.py"]
GOAL = 0.45  # of the measured rate of a matrix product, for the steps of WRN-28-10
CIFAR = ["ct.py", "--dataset", "cifar10", "--arch", "resnet18", "--lam", "0", "--epochs", "30",
         "--eval-every", "5", "--corrupted-images", "0", "--overwrite"]  # fmt: skip


def part_tests(args, device):
    """The tests that need a GPU."""
    words = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "--durations=0", *TESTS]
    done = subprocess.run(words, cwd=run.ROOT, capture_output=True, text=True)
    lines = done.stdout.strip().splitlines()
    failed = [line for line in lines if line.startswith("FAILED")]
    last = lines[-1] if lines else done.stderr.strip()[-200:]
    return [last, *failed], {"status": done.returncode, "summary": last}


def part_attack(args, device):
    """PGD-10: captured, plain, and torchattacks where installed; milliseconds per batch."""
    x, y = shapes.make(args.attack_batch, device=device)
    x = run.to_float(x)
    model = models.build(args.attack_arch, "bn", 10).to(device).eval()
    precision = run.Precision("auto", device)
    graphs = attacks.Graphs()
    ours = functools.partial(attacks.pgd, model, x, y, 8, steps=10, precision=precision)
    calls = {"captured": functools.partial(ours, capture=graphs), "plain": ours}
    try:
        import torchattacks

        theirs = torchattacks.PGD(copy.deepcopy(model), eps=8 / 255, alpha=1 / 255, steps=10)
        calls["torchattacks, fp32"] = functools.partial(theirs, x, y)
    except ImportError:
        pass
    noise = attacks.unit_noise(x.shape, device=device)
    captured, plain = (calls[k](noise=noise) for k in ("captured", "plain"))
    apart = float((captured - plain).abs().max()) * 255
    ms = {k: 1000 * speed_train.fastest(call, device, 5) for k, call in calls.items()}
    rows = run.table([[k, f"{v:.1f}"] for k, v in ms.items()], ("PGD-10", "ms"))
    title = f"{args.attack_arch}, batch {args.attack_batch}, {precision.name}"
    line = f"captured and plain from one start differ by {apart:.3g} grey levels at most"
    return [title, *rows.splitlines(), line], {"ms": ms, "apart": apart}


def part_steps(args, device):
    """The steps of all trainers, eager and compiled."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        found = speed_train.time_train(args, device)
    return out.getvalue().strip().splitlines(), found


def part_large(args, device):
    """WRN-28-10: its step against 45 % of the measured rate of a matrix product."""
    large = argparse.Namespace(**vars(args) | {"arch": args.large_arch})
    rate, _ = speed_train.rates(large, device)
    gflop = speed_train.floor(large, device, "bn", (rate, 1.0))["gflop"]
    lines, numbers = [f"a matrix product: {rate / 1e12:.0f} TFLOP/s"], {"tflops": rate / 1e12}
    for compiled in (False, True)[: 1 + args.compiled]:
        seconds = speed_train.time_plain(large, device, "bn", compiled)
        share = gflop * 1e9 / seconds / rate
        name = "compiled" if compiled else "eager"
        numbers[name] = {"images_per_s": args.batch_size / seconds, "share": share}
        verdict = "reached" if share >= GOAL else "not reached"
        lines.append(
            f"{args.large_arch}, batch {args.batch_size}, {name}: {args.batch_size / seconds:.0f} "
            f"images/s, {100 * share:.0f} % of it ({100 * GOAL:.0f} %: {verdict})"
        )
    return lines, numbers


def part_corruptions(args, device):
    """The 19 corruptions: largest difference from the CPU's values, milliseconds per image."""
    x, _ = shapes.make(args.corrupted)
    here = x.to(device)
    index = torch.arange(len(x))
    rows, numbers = [], {}
    for name in (*corruptions.NAMES, *corruptions.EXTRA):
        on_cpu = functools.partial(corruptions.corrupt, x, name, 3, index=index)
        on_gpu = functools.partial(corruptions.corrupt, here, name, 3, index=index.to(device))
        apart = (on_cpu().int() - on_gpu().cpu().int()).abs()
        times = [
            1000 * speed_train.fastest(call, where, 2) / len(x)
            for call, where in ((on_cpu, torch.device("cpu")), (on_gpu, device))
        ]
        numbers[name] = {"most": int(apart.max()), "cpu_ms": times[0], "gpu_ms": times[1]}
        rows.append([name, int(apart.max()), f"{times[0]:.3f}", f"{times[1]:.4f}"])
    head = ("corruption", "levels apart", "CPU ms", "GPU ms")
    return run.table(rows, head).splitlines(), numbers


def part_cifar(args, device):
    """CIFAR-10 with ResNet-18: minutes, and accuracy of 94 % or not."""
    places = [Path(args.data_dir) / name for name in ("cifar-10-batches-py", "cifar10.npz")]
    if not any(place.exists() for place in places):
        return [f"left out: no CIFAR-10 in {args.data_dir}"], {}
    with tempfile.TemporaryDirectory() as folder:
        words = [*CIFAR, "--data-dir", str(Path(args.data_dir).resolve()), "--out", folder]
        begin = time.perf_counter()
        subprocess.run([sys.executable, *words], cwd=run.ROOT, check=True, capture_output=True)
        minutes = (time.perf_counter() - begin) / 60
        ends = [json.loads(line) for line in (Path(folder) / "log.jsonl").open()]
    accuracy = 100 - ends[-1]["error/student"]
    verdict = "reached" if accuracy >= 94 else "not reached"
    line = f"ResNet-18, 30 epochs: {accuracy:.2f} % in {minutes:.1f} minutes (94 %: {verdict})"
    return [line], {"accuracy": accuracy, "minutes": minutes}


PARTS = {  # name for --parts: (title, function)
    "tests": ("tests that need a GPU", part_tests),
    "attack": ("attack", part_attack),
    "large": ("WRN-28-10", part_large),
    "steps": ("steps of the trainers", part_steps),
    "corruptions": ("corruptions", part_corruptions),
    "cifar": ("CIFAR-10 to 94 %", part_cifar),
}


def page(args, device, parts):
    """(text of the page, {title: numbers}) of the parts [(title, function)] that --minutes leave
    time for."""
    begin = time.monotonic()
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    lines = [f"Measured on {where}, torch {torch.__version__}.", ""]
    numbers = {}
    for title, part in parts:
        lines += [f"**{title}**", "", "```"]
        if time.monotonic() - begin > 60 * args.minutes:
            lines.append(f"not run: {args.minutes:g} minutes were over")
        else:
            own, numbers[title] = guarded(part, args, device)
            lines += own
        lines += ["```", ""]
    return "\n".join(lines), numbers


def guarded(part, args, device):
    """Lines and numbers of a part with its peak memory, or the error that ended it."""
    cuda = device.type == "cuda"
    if cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    try:
        lines, numbers = part(args, device)
    except Exception as error:  # whatever breaks on a machine that nobody has seen
        traceback.print_exc()
        first = (str(error).strip() or repr(error)).splitlines()[0]
        return [f"failed: {first[:200]}"], {"failed": repr(error)}
    if cuda:
        peak = torch.cuda.max_memory_allocated(device) / 2**30
        lines = [*lines, f"peak memory {peak:.2f} GiB"]
        numbers = numbers | {"peak_gib": peak}
    return lines, numbers


def time_gpu(args, device):
    """Print the page; returns its numbers."""
    text, numbers = page(args, device, [PARTS[name] for name in args.parts])
    print(text)
    return numbers
