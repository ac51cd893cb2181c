"""How fast the parts are that a run spends its time in.

    python eval/speed.py corruptions                # milliseconds per image, beside the originals'
    python eval/speed.py corruptions --device cuda --sizes 32,224 --json speed.json
    python eval/speed.py attacks --threads 2        # PGD per batch, beside other libraries'
    python eval/speed.py train --arch wrn16-1       # steps of the trainers, beside a plain loop
    python eval/speed.py scaling --svg scaling.svg  # a step over width, depth, batch, processes
    python eval/speed.py gpu                        # the first ten minutes on a GPU, as a page
    python eval/speed.py data --tree data/imagenet/train --arch resnet50 --device cuda

Times are process (CPU) times with --threads threads, medians over --repeat runs; on a GPU wall
times between synchronisations. Of the loader of files, whose work is in other processes, wall times
in images per second: it should be above the training step's.
"""

import argparse
import copy
import functools
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from common import attacks, corruptions, data, models, run
from common.data import files, folders, shapes
from eval import speed_gpu, speed_scaling, speed_train

# Milliseconds per image of the code of hendrycks/robustness, means over severities. Process time on
# one core of an AMD EPYC (AVX-512, 2 virtual cores). Medians of 3 runs over 64 CIFAR-10 and 2
# ImageNet images. Python 3.11, NumPy 1.26, SciPy 1.11, scikit-image 0.20, OpenCV 4.8.1, Pillow
# 10.4, ImageMagick 6.9. The sums over the 15 were 20.4 and 1020 ms in an earlier measurement.
ORIGINAL = {
    "gaussian_noise": (0.058, 4.308),
    "shot_noise": (0.166, 9.532),
    "impulse_noise": (0.11, 7.723),
    "defocus_blur": (0.109, 3.76),
    "glass_blur": (6.892, 497.535),
    "motion_blur": (1.078, 55.57),
    "zoom_blur": (1.846, 54.793),
    "snow": (1.373, 28.56),
    "frost": (5.583, 4.924),
    "fog": (0.297, 3.516),
    "brightness": (0.332, 15.363),
    "contrast": (0.044, 1.393),
    "elastic_transform": (0.369, 21.559),
    "pixelate": (0.021, 0.371),
    "jpeg_compression": (0.062, 0.308),
    "speckle_noise": (0.061, 2.559),
    "gaussian_blur": (0.061, 2.833),
    "spatter": (0.162, 3.706),
    "saturate": (0.318, 14.654),
}


class Part(argparse.ArgumentParser):
    """A subcommand: like run.Parser, a wrong option is one line."""

    error = run.Parser.error

    def __init__(self, *args, **kwargs):
        super().__init__(*args, formatter_class=run.Formatter, **kwargs)


def parse_args(argv=None):
    parser = run.Parser(__file__, __doc__)
    commands = parser.add_subparsers(
        dest="command", required=True, metavar="PART", parser_class=Part
    )
    part = commands.add_parser(
        "corruptions", help="each corruption per image, and as an augmentation in training",
    )  # fmt: skip
    part.set_defaults(function=time_corruptions)
    part.add_argument(
        "--sizes", type=sizes, default=[32, 224], metavar="32,64,224", help="image sizes in pixels"
    )
    part.add_argument("--images", type=run.positive(int), help="default: 256, 64, 8 by size")
    part.add_argument(
        "--severities",
        type=severities,
        default=[1, 2, 3, 4, 5],
        metavar="1,3",
        help="severities of 1 to 5",
    )
    part.add_argument("--arch", default="resnet20", help="network of the training step")
    part.add_argument("--frost-dir", help="folder of the official frost textures")
    part.add_argument("--data-dir", default="data", help="where the data sets are")
    part = commands.add_parser(
        "attacks", help="PGD on a batch, beside torchattacks and foolbox where installed",
    )  # fmt: skip
    part.set_defaults(function=time_attacks)
    part.add_argument("--arch", default="resnet18", help="network")
    part.add_argument("--norm", default="bn", help="its normaliser")
    part.add_argument("--batch-size", type=run.positive(int), default=64, help="images of a batch")
    part.add_argument("--steps", type=run.positive(int), default=10, help="steps of the attack")
    part = commands.add_parser(
        "data", help="the loader of files beside a training step, images per second",
    )  # fmt: skip
    part.set_defaults(function=time_data)
    part.add_argument("--tree", help="of class folders; default: 256 drawn JPEGs of 500x375")
    part.add_argument("--arch", default="resnet18", help="network")
    part.add_argument("--norm", default="bn", help="its normaliser")
    part.add_argument("--image-size", type=run.positive(int), default=224, help="pixels")
    part.add_argument("--batch-size", type=run.positive(int), default=32, help="images of a batch")
    part.add_argument("--batches", type=run.positive(int), default=8, help="timed, after two")
    counts = run.listed(run.nonnegative(int))
    part.add_argument(
        "--workers", type=counts, default=[files.default_workers()], help="processes that decode"
    )
    part.add_argument(
        "--precision",
        default="auto",
        choices=["auto", "fp32", "bf16", "fp16"],
        help="of the forward pass",
    )
    add_train(commands)
    part = commands.add_parser(
        "scaling", help="images per second of a step over width, depth, batch, threads, processes",
    )  # fmt: skip
    part.set_defaults(function=speed_scaling.time_scaling)
    speed_scaling.add_arguments(part)
    add_gpu(commands)
    counted = {"corruptions": "median", "attacks": "median"}
    counted |= dict.fromkeys(("train", "scaling", "gpu"), "fastest")
    for name, command in commands.choices.items():
        usual = "auto" if name == "gpu" else "cpu"
        command.add_argument("--device", default=usual, help="auto, cpu, cuda, cuda:1 ...")
        command.add_argument("--threads", type=run.positive(int), default=1, help="of the CPU")
        if name in counted:
            words = f"timings, of which the {counted[name]} counts"
            command.add_argument("--repeat", type=run.positive(int), default=3, help=words)
        command.add_argument("--json", help="write the figures to this file, too")
    return parser.parse_args(argv)


def add_train(commands):
    part = commands.add_parser(
        "train", help="images per second of every trainer's step, beside a plain loop and a floor",
    )  # fmt: skip
    part.set_defaults(function=speed_train.time_train)
    add_steps(part)


def add_steps(part):
    """The options of timed steps."""
    add = part.add_argument
    add_names(part, "--trainers", speed_train.TRAINERS, "rows of the table")
    add("--arch", default="wrn16-1", help="network of all trainers")
    add("--batch-size", type=run.positive(int), default=128, help="images of a step")
    add("--group", type=run.positive(int), default=3, help="steps that are timed together")
    add("--groups", type=run.positive(int), default=6, help="groups, of which the fastest counts")
    add("--threads-list", type=run.listed(run.positive(int)), default=[1, 2], help="of a CPU")
    add("--compiled", action=run.Flag, default=True, help="with --compile, too")
    add("--precision", default="auto", choices=["auto", "fp32", "bf16", "fp16"], help="of steps")
    add("--matmul", type=run.positive(int), help="side of the product that is timed")


def add_gpu(commands):
    part = commands.add_parser(
        "gpu", help="ten minutes on a GPU as a page for the README; exit 2 without one",
    )  # fmt: skip
    add_steps(part)
    part.set_defaults(function=speed_gpu.time_gpu, arch="wrn40-2", group=20)
    add = part.add_argument
    add_names(part, "--parts", speed_gpu.PARTS, "of the page, in this order")
    add("--minutes", type=run.positive(float), default=10.0, help="after which no part begins")
    add("--large-arch", default="wrn28-10", help="network held against the rate of a product")
    add("--attack-arch", default="resnet18", help="network under attack")
    add("--attack-batch", type=run.positive(int), default=128, help="images under attack")
    add("--corrupted", type=run.positive(int), default=256, help="images to corrupt")
    add("--data-dir", default="data", help="where CIFAR-10 is looked for")


def add_names(part, option, known, words):
    """An option that lists names; all of them by default."""
    part.add_argument(option, type=names_of(known), default=list(known), metavar="A,B", help=words)


def names_of(known):
    """The type of an option that lists names."""

    def parse(text):
        chosen = run.listed(str)(text)
        for name in chosen:
            if name not in known:
                every = ", ".join(map(repr, known))
                raise argparse.ArgumentTypeError(f"{name!r} is not one of {every}")
        return chosen

    return parse


def sizes(text):
    chosen = run.listed(lambda word: int(word) if word.isdigit() else word)(text)
    for size in chosen:
        if size not in corruptions.SIZES:
            raise argparse.ArgumentTypeError(f"{size} is not one of 32, 64, 224")
    return chosen


def severities(text):
    if not set(text.split(",")) <= set("12345"):
        raise argparse.ArgumentTypeError(f"{text}: severities are 1 to 5, as 1,3,5")
    return sorted({int(s) for s in text.split(",")})


def milliseconds(functions, device, repeat):
    """Median time of each of {name: function}, called in turn `repeat` times after one round that
    is not counted (tables, memory)."""
    clock = time.process_time if device.type == "cpu" else time.perf_counter

    def wait():
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    times = {name: [] for name in functions}
    for turn in range(repeat + 1):
        for name, function in functions.items():
            wait()
            begin = clock()
            function()
            wait()
            if turn:
                times[name].append(1000 * (clock() - begin))
    return {name: statistics.median(values) for name, values in times.items()}


# --- corruptions ----------------------------------------------------------------------------------


def time_corruptions(args, device):
    """Milliseconds per image of each corruption, and what one adds to a training step."""
    _, texture = corruptions.frost_textures(args.frost_dir, args.data_dir)
    options = {"frost_dir": args.frost_dir, "data_dir": args.data_dir}
    output = {"frost": texture, "sizes": {}, "augmentation": {}}
    for size in args.sizes:
        count = args.images or {32: 256, 64: 64, 224: 8}[size]
        x, _ = shapes.make(count, device=device)
        if size != 32:
            x = F.interpolate(x.float(), (size, size), mode="bilinear").to(torch.uint8)
        every = [*corruptions.NAMES, *corruptions.EXTRA]
        calls = {
            (name, s): functools.partial(corruptions.corrupt, x, name, s, **options)
            for name in every
            for s in args.severities
        }
        times = milliseconds(calls, device, args.repeat)
        rows = {
            name: sum(times[name, s] for s in args.severities) / len(args.severities) / count
            for name in every
        }
        rows["sum of the 15"] = sum(rows[name] for name in corruptions.NAMES)
        output["sizes"][size] = rows
        print(
            f"\n{size} pixels, {count} images, severities {args.severities}, frost: {texture}; "
            "milliseconds per image"
        )
        print(table(size, rows))
    if 32 in args.sizes:
        output["augmentation"] = time_augmentation(args, device)
    return output


def table(size, rows):
    """Ours, the original's and the ratio where the original was measured."""
    original = {name: ms[size != 32] for name, ms in ORIGINAL.items()}
    original["sum of the 15"] = sum(original.get(name, 0) for name in corruptions.NAMES)
    if size == 64:
        return run.table(rows.items(), ("corruption", "ms"), ".3f")
    lines = [
        [name, f"{ms:.3f}", f"{original[name]:.3f}", f"{original[name] / ms:.1f}"]
        for name, ms in rows.items()
    ]
    return run.table(lines, ("corruption", "ms", "original", "ratio"))


def time_augmentation(args, device, batch_size=128):
    """Milliseconds per image of a training step on clean and on corrupted 32-pixel images."""
    x, y = shapes.make(batch_size, device=device)
    model = models.build(args.arch, "bn", 10).to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)

    def step(name=None):
        images = corruptions.corrupt(x, name, 3, seed=0) if name else x
        optimizer.zero_grad()
        F.cross_entropy(model(run.to_float(images)), y).backward()
        optimizer.step()

    cheap = ("gaussian_noise", "impulse_noise", "gaussian_blur", "brightness", "contrast", "fog")
    steps = {name or "clean": functools.partial(step, name) for name in (None, *cheap)}
    rows = {name: ms / batch_size for name, ms in milliseconds(steps, device, args.repeat).items()}
    print(f"\ntraining step of {args.arch}, batch {batch_size}, severity 3; milliseconds per image")
    lines = [[name, f"{ms:.3f}", f"{ms / rows['clean']:.2f}"] for name, ms in rows.items()]
    print(run.table(lines, ("images", "ms", "of clean")))
    return rows


# --- attacks --------------------------------------------------------------------------------------


def pgd_written_out(model, x, y, eps, alpha, steps, precision):
    """PGD as in most training scripts, here without parameter gradients and in mixed precision."""
    low, high = (x - eps).clamp(0, 1), (x + eps).clamp(0, 1)
    adv = (x + eps * (2 * torch.rand_like(x) - 1)).clamp(0, 1)
    for _ in range(steps):
        adv.requires_grad_()
        with precision.autocast():
            logits = model(adv)
        (grad,) = torch.autograd.grad(F.cross_entropy(logits.float(), y, reduction="sum"), adv)
        adv = (adv.detach() + alpha * grad.sign()).clamp(low, high)
    return adv


def time_attacks(args, device):
    """Milliseconds of one attack on one batch: eps 8/255, an untrained network in eval mode. Every
    library gets the same network and images; torchattacks and foolbox know fp32 only."""
    x, y = shapes.make(args.batch_size, device=device)
    x = run.to_float(x)
    model = models.build(args.arch, args.norm, 10).to(device).eval()
    fast = (
        copy.deepcopy(model)
        .to(memory_format=torch.channels_last)
        .requires_grad_(requires_grad=False)
    )
    fast_x = x.contiguous(memory_format=torch.channels_last)
    fp32, low = run.Precision("fp32", device), run.Precision("auto", device)
    eps, alpha = 8 / 255, attacks.default_alpha(8, args.steps) / 255
    ours = functools.partial(attacks.pgd, model, x, y, 8, steps=args.steps)
    written = functools.partial(pgd_written_out, fast, fast_x, y, eps, alpha, args.steps)
    calls = {f"pgd {low.name}": functools.partial(ours, precision=low), "pgd fp32": ours}
    if device.type == "cuda":
        name = f"pgd {low.name}, captured"
        graphs = attacks.Graphs()
        calls = {name: functools.partial(ours, precision=low, capture=graphs), **calls}
    calls[f"written out {low.name}"] = functools.partial(written, low)
    calls["written out fp32"] = functools.partial(written, fp32)
    calls |= other_libraries(model, x, y, eps, alpha, args.steps)
    times = milliseconds(calls, device, args.repeat)
    best = next(iter(times.values()))
    network = f"{args.arch} with {args.norm}"
    print(f"\nPGD-{args.steps}, {network}, batch {args.batch_size}; milliseconds per batch")
    lines = [[name, f"{ms:.1f}", f"{ms / best:.2f}"] for name, ms in times.items()]
    print(run.table(lines, ("attack", "ms", "of the first")))
    return times


def other_libraries(model, x, y, eps, alpha, steps):
    """{name: call} of the libraries that are installed, once as the network comes (NCHW) and once
    in channels_last, which suits a CPU better."""
    calls = {}
    for layout, suffix in ((torch.contiguous_format, ""), (torch.channels_last, " channels_last")):
        net = copy.deepcopy(model).to(memory_format=layout)
        images = x.contiguous(memory_format=layout)
        try:
            import torchattacks

            theirs = torchattacks.PGD(net, eps=eps, alpha=alpha, steps=steps)
            calls["torchattacks" + suffix] = functools.partial(theirs, images, y)
        except ImportError:
            print("torchattacks is not installed: left out")
        try:
            import foolbox

            wrapped = foolbox.PyTorchModel(net, bounds=(0, 1), device=x.device)
            theirs = foolbox.attacks.LinfPGD(abs_stepsize=alpha, steps=steps)
            calls["foolbox" + suffix] = functools.partial(theirs, wrapped, images, y, epsilons=eps)
        except ImportError:
            print("foolbox is not installed: left out")
    return calls


# --- data -----------------------------------------------------------------------------------------


def time_data(args, device):
    """Seconds to list a tree, twice; images/s of its loader with each number of workers, and of a
    training step on images that are there."""
    with tempfile.TemporaryDirectory() as temporary:
        tree = args.tree or draw_tree(Path(temporary) / "train")
        rows, seconds = {}, []
        for _ in range(2):
            begin = time.perf_counter()
            listing = folders.scan(tree)
            seconds.append(time.perf_counter() - begin)
        y = torch.zeros(len(listing), dtype=torch.int64, device=device)
        for workers in args.workers:
            options = {"size": args.image_size, "device": device, "workers": workers}
            batches = data.Batches(data.Files(listing, y, **options), args.batch_size, seed=0)
            rows[f"loader, {workers} workers"] = rate(batches, args, device, max(workers, 1))
            del batches  # ends its workers
    x, y = torch.rand(args.batch_size, 3, *[args.image_size] * 2, device=device), y[:1]
    x, y = x.contiguous(memory_format=torch.channels_last), y.expand(args.batch_size)
    rows[f"training step, {args.arch}"] = rate(trainer(args, x, y, device), args, device)
    print(f"\n{len(listing)} files listed in {seconds[0]:.2f} s, again in {seconds[1]:.2f} s")
    print(f"{args.image_size} pixels, batch {args.batch_size}, {args.batches} batches; wall time")
    print(run.table([[k, f"{v:.1f}"] for k, v in rows.items()], ("", "images/s")))
    return {"files": len(listing), "listing_s": seconds, "images_per_s": rows}


def trainer(args, x, y, device):
    """step(i): one update of a network on the batch (x, y)."""
    model = models.build(args.arch, args.norm, 1000, args.image_size)
    model.to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    precision = run.Precision(args.precision, device)

    def step(_):
        with precision.autocast():
            loss = F.cross_entropy(model(x), y)
        optimizer.zero_grad()
        precision.scaler.scale(loss).backward()
        precision.scaler.step(optimizer)
        precision.scaler.update()

    return step


def rate(step, args, device, workers=1):
    """Images per second of the last calls of step(0), step(1), ...; the first are not counted.
    Workers deliver in bursts, so calls are counted in multiples of them, four or more."""
    first, count = 2 * workers, workers * max(4, -(-args.batches // workers))
    for i in range(first + count):
        if i == first:
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            begin = time.perf_counter()
        step(i)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return count * args.batch_size / (time.perf_counter() - begin)


def draw_tree(folder, count=256):
    """JPEGs of ImageNet's usual size, of noise smooth enough to compress as photographs do."""
    from torchvision.transforms.v2.functional import to_pil_image

    (folder / "a").mkdir(parents=True)
    rng = run.generator("tree")
    for k in range(count):
        coarse = torch.rand(1, 3, 47, 63, generator=rng)
        x = F.interpolate(coarse, (375, 500), mode="bicubic") + 0.04 * torch.rand(
            1, 3, 375, 500, generator=rng
        )
        x = x[0].mul(255).clamp(0, 255).to(torch.uint8)
        to_pil_image(x).save(folder / "a" / f"{k}.jpg", quality=90)
    return folder


# --- main -----------------------------------------------------------------------------------------


def main(args):
    target = run.try_file(args.json, "--json") if args.json else None
    device = run.get_device(args.device)
    if args.command == "gpu" and device.type != "cuda":
        raise run.UserError("gpu: no CUDA GPU here, so nothing was measured")
    torch.set_num_threads(args.threads)
    what = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    print(f"{what}, {args.threads} threads, torch {torch.__version__}")
    output = {
        "command": "python eval/speed.py " + " ".join(sys.argv[1:]),
        "versions": run.versions(), "device": what, "threads": args.threads,
        args.command: args.function(args, device),
    }  # fmt: skip
    if target:
        run.write_json(target, output)
    return output


if __name__ == "__main__":
    run.cli(main, parse_args)
