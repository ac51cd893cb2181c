"""How the speed of a training step grows; a part of eval/speed.py.

One of width, depth, batch, threads and processes varies, the others stay as they are. The step is
that of ct.py's baseline, beside a plain loop of the same network on the same threads.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from common import run
from eval import speed_train

EPOCH = 5  # rounds of steps in the epoch that several processes are timed over
AXES = ("width", "depth", "batch", "threads", "processes")


def add_arguments(part):
    """The options of the command."""
    several = run.listed(run.positive(int))
    add = part.add_argument
    add("--widths", type=several, default=[1, 2, 4], help="k of WRN-D-k")
    add("--depths", type=several, default=[10, 16, 28, 40], help="D of WRN-D-k")
    add("--batches", type=several, default=[16, 32, 64, 128, 256], help="images of a step")
    add("--threads-list", type=several, default=[1, 2], help="threads of one process")
    add("--processes", type=several, default=[1, 2], help="processes of one thread, by torchrun")
    add("--depth", type=run.positive(int), default=16, help="where another axis varies")
    add("--width", type=run.positive(int), default=1, help="where another axis varies")
    add("--batch-size", type=run.positive(int), default=128, help="where another axis varies")
    add("--group", type=run.positive(int), default=2, help="steps that are timed together")
    add("--groups", type=run.positive(int), default=3, help="groups of a round")
    add("--precision", default="auto", choices=["auto", "fp32", "bf16", "fp16"], help="of steps")
    add("--svg", metavar="FILE", help="draw the figure (default: none)")


def time_scaling(args, device):
    """{axis: [{value, images_per_s, plain}, ...]} of every axis."""
    target = run.try_file(args.svg, "--svg") if args.svg else None
    args.matmul = None
    base = {"width": args.width, "depth": args.depth, "batch": args.batch_size}
    found = {}
    for axis, values in (
        ("width", args.widths), ("depth", args.depths), ("batch", args.batches),
        ("threads", args.threads_list),
    ):  # fmt: skip
        found[axis] = []
        for value in values:
            point = base | {"threads": args.threads} | {axis: value}
            found[axis].append({"value": value, **one_process(point, args, device)})
            show(axis, found[axis][-1])
    torch.set_num_threads(args.threads)
    found["processes"] = []
    for value in args.processes:
        rate = by_torchrun(value, base, args)
        found["processes"].append({"value": value, "images_per_s": rate})
        show("processes", found["processes"][-1])
    if target:
        draw(target, found, base)
    return {"base": base, "precision": run.Precision(args.precision, device).name, "axes": found}


def show(axis, row):
    beside = f", plain loop {row['plain']:.0f}" if "plain" in row else ""
    print(f"{axis} {row['value']}: {row['images_per_s']:.0f} images/s{beside}", flush=True)


def one_process(point, args, device):
    """{images_per_s, plain} of a step at a point {width, depth, batch, threads}."""
    torch.set_num_threads(point["threads"])
    args.arch, args.batch_size = f"wrn{point['depth']}-{point['width']}", point["batch"]
    seconds, plain = speed_train.in_turn("ct-baseline", args, device, None)
    return {"images_per_s": point["batch"] / seconds, "plain": point["batch"] / plain}


def by_torchrun(processes, base, args):
    """Images per second of ct.py's second epoch on so many processes of one thread each.

    Processes wait for one another, so fewer steps than EPOCH times a round scatter widely. The
    first epoch writes no checkpoint, for that time would count.
    """
    steps = EPOCH * args.group * args.groups
    with tempfile.TemporaryDirectory() as folder:
        command = [
            *("torchrun", "--standalone", f"--nproc-per-node={processes}"), run.ROOT / "ct.py",
            *("--dataset", "shapes", "--lam", "0", "--corrupted-images", "0", "--no-augment"),
            *("--arch", f"wrn{base['depth']}-{base['width']}", "--epochs", "2"),
            *("--limit", steps * base["batch"], "--batch-size", base["batch"]),
            *("--eval-every", "2", "--save-every", "2", "--log-every", "10000"),
            *("--precision", args.precision),
            *("--device", args.device, "--out", Path(folder) / "run"),
        ]  # fmt: skip
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        place = str(Path(sys.executable).parent)
        environment["PATH"] = place + os.pathsep + environment.get("PATH", "")
        done = subprocess.run(
            [str(word) for word in command], env=environment, capture_output=True, text=True
        )
        if done.returncode:
            raise run.UserError(f"torchrun failed: {done.stderr.strip().splitlines()[-1][:200]}")
        lines = (Path(folder) / "run" / "log.jsonl").read_text().splitlines()
        rows = [row for row in map(json.loads, lines) if row.get("epoch") == 2]
        return rows[-1]["images_per_s"]


def draw(path, found, base):
    """Write the figure: images per second over how many times the base each axis has."""
    first = {"width": base["width"], "depth": base["depth"], "batch": base["batch"]}
    curves = {}
    for axis, rows in found.items():
        unit = first.get(axis, 1)
        points = [(row["value"] / unit, *(row["images_per_s"],) * 3) for row in rows]
        curves[f"{axis} (of {unit})"] = sorted(points)
    arch = f"WRN-{base['depth']}-{base['width']}, batch {base['batch']}"
    axes = {"across": "times the base value of the axis", "up": "images per second"}
    run.line_chart(path, f"training step from {arch}", curves, log=True, **axes)
