"""How fast the trainers' steps are, beside a plain loop and a floor; a part of eval/speed.py.

The trainers run as they are. `Timed` takes the place of `run.Loop` and looks at the clock between
their steps. So all that a step does is in the time: the batch, the attack, the update, the log.
"""

import contextlib
import io
import os
import re
import runpy
import shutil
import sys
import tempfile
import time
import unittest.mock
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from common import models, run
from common.data import shapes

SHORT = ["--overwrite", "--log-every", "1000", "--val-size", "20", "--no-augment"]
IMAGES = 9900  # of an epoch at most: shapes has 10,000
# Trainer: (script, normaliser, options, its work over that of a plain step). A plain step is one
# forward pass and two passes back, to the weights and to the maps: 3. A frozen teacher adds 1. An
# attack's step is one forward pass and one back: 2; the images it makes are a second batch: 3.
TRAINERS = {
    "ct-baseline": ("ct", "bn", [*SHORT, "--lam", "0", "--corrupted-images", "0"], 1.0),
    "ct": ("ct", "bn", [*SHORT, "--teacher", "{teacher}", "--no-baseline",
                        "--corrupted-images", "0"], 4 / 3),
    "nofrost": ("nofrost", "nf", [*SHORT, "--norms", "nf", "--attack-steps", "1", "--robust-images",
                                  "0", "--probe-images", "1"], 8 / 3),
    "fixup_penalty": ("fixup_penalty", "fixup", [*SHORT, "--variants", "fixup+penalty",
                                                 "--corrupted-images", "0"], 1.0),
    "bn_ablation": ("bn_ablation", "bn", [*SHORT, "--norms", "bn", "--lrs", "0.1",
                                          "--measure-every", "0", "--eval-every", "10000"], 1.0),
}  # fmt: skip


def synchronised(device):
    """The time in seconds, after all that the device was given. A sync point.

    On one thread of a CPU it is the time that this process had: what others take does not count."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif torch.get_num_threads() == 1:
        return time.process_time()
    return time.perf_counter()


class Clock:
    """Marks between steps: the fastest group of `group` steps after the first `skip` steps.

    The fastest one is the one that other processes disturbed least.
    """

    def __init__(self, device, skip, group):
        self.device, self.skip, self.group = device, skip, group
        self.marks = []
        self.count = 0

    def mark(self):
        """Between two steps, and after the last one."""
        if self.count >= self.skip and (self.count - self.skip) % self.group == 0:
            self.marks.append(synchronised(self.device))
        self.count += 1

    def seconds(self):
        """Seconds of a step."""
        spans = [b - a for a, b in zip(self.marks, self.marks[1:], strict=False)]
        return min(spans) / self.group


def timed_loop(clock, found):
    """A class in the place of run.Loop whose steps the clock sees. found: gets the network."""

    class Timed(run.Loop):
        def __iter__(self):
            found["spec"] = self.model.spec
            for step in super().__iter__():
                clock.mark()
                yield step
            clock.mark()

    return Timed


# --- the trainers ---------------------------------------------------------------------------------


def steps_of(args):
    """(steps to warm up, steps of a group, steps in all)."""
    warm = 3 if args.device == "cpu" else 10
    return warm, args.group, warm + args.group * args.groups


def time_trainer(name, args, device, teacher, compiled=False):
    """Seconds of a step of a trainer, whose script runs in this process."""
    script, norm, options, _ = TRAINERS[name]
    skip, group, steps = steps_of(args)
    clock, found = Clock(device, skip, group), {}
    with tempfile.TemporaryDirectory() as folder:
        if args.batch_size > IMAGES:
            raise run.UserError(f"--batch-size {args.batch_size}: at most {IMAGES} here")
        per_epoch = min(steps, IMAGES // args.batch_size)
        length = ["--dataset", "shapes", "--image-size", "32"]
        length += ["--limit", str(args.batch_size * per_epoch + 20)]
        if script == "bn_ablation":
            length += ["--steps", str(steps)]
        else:
            epochs = str(-(-steps // per_epoch))
            length += ["--epochs", epochs, "--eval-every", epochs, "--save-every", epochs]
        words = [
            *(str(teacher) if word == "{teacher}" else word for word in options), *length,
            "--arch", args.arch, "--batch-size", str(args.batch_size), "--device", str(device),
            "--precision", args.precision, "--out", str(Path(folder) / "run"),
            "--compile" if compiled else "--no-compile",
        ]  # fmt: skip
        if compiled and script == "nofrost":
            words.append("--no-capture")  # on a GPU not both
        space = runpy.run_path(str(run.ROOT / f"{script}.py"))
        with (
            unittest.mock.patch.object(run, "Loop", timed_loop(clock, found)),
            contextlib.redirect_stdout(io.StringIO()),
        ):
            space["main"](space["parse_args"](words))
    same = {"arch": args.arch, "norm": norm, "image_size": 32}
    if {key: found["spec"][key] for key in same} != same:
        raise run.UserError(f"{name}: trained another network than the plain loop: {found['spec']}")
    return clock.seconds()


def plain_step(args, device, norm, compiled=False):
    """step(): forward pass, backward pass and update of the same network on one batch that is
    there, in channels_last; what most scripts do, without their data, logs and checks."""
    model = models.build(args.arch, norm, 10).to(device, memory_format=torch.channels_last).train()
    net = run.compiled(model, device) if compiled else model
    fused = device.type == "cuda"
    optimizer = torch.optim.SGD(
        model.parameters(), 0.01, 0.9, weight_decay=5e-4, nesterov=True, fused=fused
    )
    precision = run.Precision(args.precision, device)
    x, y = shapes.make(args.batch_size, device=device)
    x = run.to_float(x)

    def step():
        with precision.autocast():
            loss = F.cross_entropy(net(x), y)
        optimizer.zero_grad()
        precision.scaler.scale(loss).backward()
        precision.scaler.step(optimizer)
        precision.scaler.update()

    return step


def time_plain(args, device, norm, compiled=False):
    """Seconds of a step of the plain loop."""
    skip, group, steps = steps_of(args)
    clock = Clock(device, skip, group)
    step = plain_step(args, device, norm, compiled)
    for _ in range(steps):
        clock.mark()
        step()
    clock.mark()
    return clock.seconds()


def compiles(device):
    """Whether torch.compile has a compiler for the device; says so where it has none."""
    if device.type == "cuda" and run.can_compile(device):
        return True
    names = os.environ.get("CXX", "g++"), "clang++", "c++"
    if device.type == "cpu" and any(shutil.which(name) for name in names):
        return True
    print("no rows with --compile: there is no compiler")
    return False


def in_turn(name, args, device, teacher, compiled=False):
    """(seconds of the trainer's step, of the plain loop's): the fastest of --repeat rounds, in
    which both run one after the other and meet the same disturbances."""
    norm = TRAINERS[name][1]
    own, plain = [], []
    for _ in range(1 if compiled else args.repeat):  # to compile takes minutes
        plain.append(time_plain(args, device, norm, compiled))
        own.append(time_trainer(name, args, device, teacher, compiled))
    return min(own), min(plain)


# --- the floor ------------------------------------------------------------------------------------


class Traffic(TorchDispatchMode):
    """Counts the bytes that operators other than matrix products read and write."""

    PRODUCTS = re.compile(r"conv|mm|addmm|linear")

    def __init__(self):
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        view = any(r.alias_info and not r.alias_info.is_write for r in func._schema.returns)
        if not view and not self.PRODUCTS.search(name) and not name.startswith(("empty", "new_")):
            tensors = [t for t in tree_leaves((args, kwargs, out)) if isinstance(t, torch.Tensor)]
            self.bytes += sum(t.numel() * t.element_size() for t in tensors)
        return out


def rates(args, device):
    """Measured: operations per second of a matrix product, bytes per second of a copy."""
    precision = run.Precision(args.precision, device)
    n = args.matmul or (8192 if device.type == "cuda" else 1024)
    a = torch.randn(n, n, device=device, dtype=precision.dtype)
    b = torch.randn(n * n * 8, device=device, dtype=precision.dtype)
    into = torch.empty_like(b)
    product = fastest(lambda: a @ a, device)
    copy = fastest(lambda: into.copy_(b), device)
    return 2 * n**3 / product, 2 * b.numel() * b.element_size() / copy


def fastest(function, device, repeat=8):
    """Seconds of the fastest of several calls."""
    function()
    times = []
    for _ in range(repeat):
        begin = synchronised(device)
        function()
        times.append(synchronised(device) - begin)
    return min(times)


def floor(args, device, norm, measured):
    """Seconds that a plain step takes at least, operator by operator: its products at the measured
    rate, then one reading and one writing of what all others touch, at the rate of a copy."""
    step = plain_step(args, device, norm)
    step()  # the optimizer's state is there
    with FlopCounterMode(display=False) as flops:
        step()
    with Traffic() as traffic:
        step()
    operations = flops.get_total_flops()
    seconds = operations / measured[0] + traffic.bytes / measured[1]
    return {"gflop": operations / 1e9, "gbyte": traffic.bytes / 1e9, "seconds": seconds}


def kernels(args, device, norm):
    """Kernels that the plain step launches, and waits of the host in it, on a GPU."""
    step = plain_step(args, device, norm)
    step()
    kinds = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=kinds) as profile:
        step()
    events = {event.key: event.count for event in profile.key_averages()}
    launches = sum(n for key, n in events.items() if "LaunchKernel" in key)
    waits = sum(n for key, n in events.items() if key.startswith("cudaStreamSynchronize"))
    return {"kernels": launches, "waits": waits}


# --- the table ------------------------------------------------------------------------------------


def teacher_for(args, folder):
    """A checkpoint of an untrained network without a normaliser, to time a step with a teacher."""
    model = models.build(args.arch, "none", 10)
    path = Path(folder) / "teacher.pt"
    run.save_checkpoint(path, model.spec | {"model": model.state_dict(), "dataset": "shapes"})
    return path


def time_train(args, device):
    """Images per second of every trainer's step, and of a plain loop that does the same work."""
    output = {"arch": args.arch, "batch_size": args.batch_size, "rows": []}
    output["precision"] = run.Precision(args.precision, device).name
    counts = args.threads_list if device.type == "cpu" else [torch.get_num_threads()]
    with tempfile.TemporaryDirectory() as folder:
        teacher = teacher_for(args, folder)
        for threads in counts:
            torch.set_num_threads(threads)
            measured = rates(args, device)
            floors, eager = {}, {}
            for compiled in (False, True)[: 1 + (args.compiled and compiles(device))]:
                for name in args.trainers:
                    _, norm, _, work = TRAINERS[name]
                    if compiled and name == "bn_ablation":
                        continue  # its probes look into the network
                    torch.compiler.reset()
                    if norm not in floors:
                        floors[norm] = floor(args, device, norm, measured)
                    seconds, plain = in_turn(name, args, device, teacher, compiled)
                    eager.setdefault(name, plain)  # that of the pass that is not compiled
                    row = {"trainer": name, "norm": norm, "threads": threads, "compiled": compiled}
                    row["images_per_s"] = args.batch_size / seconds
                    row["plain"] = args.batch_size / plain / work
                    row["eager"] = args.batch_size / eager[name] / work
                    row["floor"] = args.batch_size / floors[norm]["seconds"] / work
                    row |= {"gflop": floors[norm]["gflop"], "gbyte": floors[norm]["gbyte"]}
                    if device.type == "cuda" and not compiled:
                        row |= kernels(args, device, norm)
                    output["rows"].append(row)
    print(f"\nsteps of {args.arch}, batch {args.batch_size}, 32 pixels, {output['precision']}")
    print(table(output["rows"]))
    print(f"images per second, fastest of {args.groups} groups of {args.group} steps; plain: a")
    print("loop of forward, backward and update, divided by the work of the trainer's step (with")
    print("teacher 4/3, with PGD-1 and its images 8/3); of eager: over the plain loop that is not")
    print("compiled; floor: its products at the measured rate of a product, and the bytes of its")
    print("other operators at that of a copy; one thread: by the CPU time of the process")
    if hasattr(os, "getloadavg"):
        output["load"] = os.getloadavg()[1]
        output["cores"] = os.cpu_count()
        print(f"load of the machine over 5 minutes: {output['load']:.1f} on {os.cpu_count()} cores")
    return output


def table(rows):
    """The rows as text."""
    lines = []
    for row in rows:
        lines.append(
            [
                row["trainer"], row["norm"], row["threads"], "yes" if row["compiled"] else "no",
                f"{row['images_per_s']:.0f}", f"{row['plain']:.0f}",
                f"{row['images_per_s'] / row['plain']:.2f}",
                f"{row['images_per_s'] / row['eager']:.2f}", f"{row['floor']:.0f}",
                *(str(row[key]) for key in ("kernels", "waits") if key in row),
            ]
        )  # fmt: skip
    columns = ["trainer", "norm", "threads", "compiled", "img/s", "plain", "of plain"]
    columns += ["of eager", "floor"]
    if any("kernels" in row for row in rows):
        columns += ["kernels", "waits"]
        lines = [line + ["-"] * (len(columns) - len(line)) for line in lines]
    return run.table(lines, columns)
