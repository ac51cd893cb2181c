"""Error of checkpoints under the 19 common corruptions, as one table.

    python eval/corruptions.py runs/a/last.pt [runs/b/last.pt ...]

Reads the released CIFAR-10-C / CIFAR-100-C arrays where <data-dir>/CIFAR-10-C/ has them, else
generates the corruptions from the test images (common/corruptions.py) and says so. "mean (15 x 5)"
is the mean error over the 15 corruptions of the benchmark and 5 severities, not normalised by
AlexNet; the four extra corruptions are apart and never in it. ECE: expected calibration error, 15
bins. All numbers in percent.

A state_dict of another project: add --arch --dataset --mean --std.

    python eval/corruptions.py --export data/CIFAR-10-C --dataset cifar10
    python eval/corruptions.py --export OUT --dataset folder --data-dir TREE    # TREE/<class>/*.jpg

On ImageNet, for its checkpoints and for torchvision's networks by name,

    python eval/corruptions.py torchvision:resnet50 --data-dir data

the released ImageNet-C (<data-dir>/imagenet-c/<corruption>/<severity>/<wnid>/*, or in the folders
blur, digital, extra, noise, weather of its archives) is read as it is: 224 x 224 files, neither
resized nor cropped; another size is refused. "mCE" is the mean over the 15 corruptions of the error
(mean over 5 severities) divided by AlexNet's. Then the error on imagenet-a and imagenet-r (logits
restricted to their 200 classes) and imagenet-sketch, as far as these are there.

--export writes a corrupted set in the official layout instead: <corruption>.npy (5N,S,S,3) uint8,
severity after severity in the order of the test set, and labels.npy; or, for a tree of photographs
(short side to 256, centre 224), <corruption>/<severity>/<class>/*.JPEG of quality 85, whose loss
is part of ImageNet-C. manifest.json holds seed, versions and checksums; an interrupted export goes
on where it stopped. Evaluated from the arrays, a network gets the numbers it gets on the fly.
"""

import argparse
import hashlib
import json
import os
import sys
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from common import corruptions, data, models, run
from common.data import folders, trees

EVERY = [*corruptions.NAMES, *corruptions.EXTRA]
# AlexNet's errors on ImageNet-C, mean over 5 severities, in the order of corruptions.NAMES, from
# the code of hendrycks/robustness.
ALEXNET = dict(zip(corruptions.NAMES, (
    0.886428, 0.894468, 0.922640, 0.819880, 0.826268, 0.785948, 0.798360, 0.866816,
    0.826572, 0.819324, 0.564592, 0.853204, 0.646056, 0.717840, 0.606500,
), strict=True))  # fmt: skip


def parse_args(argv=None):
    parser = run.Parser(__file__, __doc__)
    parser.add_argument("--export", metavar="DIR", help="write the corrupted images there instead")
    parser.add_argument("--data-dir", default="data")
    parser.add_argument("--generate", action="store_true", help="even where released arrays are")
    parser.add_argument("--seed", type=run.nonnegative(int), default=0, help="of generated ones")
    parser.add_argument("--frost-dir", help="folder of the official frost textures")
    parser.add_argument("--corruptions", type=names, default=EVERY, metavar="A,B", help="names")
    parser.add_argument("--severities", type=severities, default=[1, 2, 3, 4, 5], metavar="1,3")
    parser.add_argument(
        "--limit", type=run.nonnegative(int), default=0, metavar="N",
        help="N test images, the same number of each class (0: all)",
    )  # fmt: skip
    parser.add_argument("--batch-size", type=run.positive(int), default=500)
    parser.add_argument("--workers", type=run.nonnegative(int), help="that decode; default: cores")
    parser.add_argument("--strict", action="store_true", help="stop at a file that is no image")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--precision", default="fp32", choices=["auto", "fp32", "bf16", "fp16"])
    parser.add_argument("--json", help="default: <first checkpoint>.corruptions.json")
    parser.add_argument("--tensorboard", metavar="DIR", help="default: corruptions/ beside it")
    models.add_arguments(parser, "*", data.NAMES)
    args = parser.parse_args(argv)
    if args.export and args.checkpoints:
        parser.error("--export takes no checkpoint: evaluate it afterwards")
    if args.export and not args.dataset:
        parser.error("--export needs --dataset cifar10, cifar100, ... or folder")
    if not args.export and not args.checkpoints:
        parser.error("a checkpoint is required, or --export DIR --dataset NAME")
    if not args.export and args.dataset == "folder":
        parser.error("--dataset folder goes with --export")
    return args


def names(text):
    chosen = EVERY if text == "all" else text.split(",")
    for name in chosen:
        if name not in EVERY:
            raise argparse.ArgumentTypeError(f"{name} is not one of {', '.join(EVERY)}")
        if chosen.count(name) > 1:
            raise argparse.ArgumentTypeError(f"{name} is named twice: name each corruption once")
    return chosen


def severities(text):
    chosen = text.split(",")
    if not set(chosen) <= set("12345"):
        raise argparse.ArgumentTypeError(f"{text}: severities are 1 to 5, as 1,3,5")
    return sorted({int(s) for s in chosen})


# --- images -----------------------------------------------------------------------------------


def corrupted_images(args, dataset, folder, name, severity, rows):
    """Released or generated images (N,3,S,S) of the test rows `rows`, uint8."""
    if folder:
        return data.read_corrupted(folder, name, severity, rows)
    x = dataset.test.x[rows]
    return corruptions.corrupt(
        x, name, severity, args.seed, rows.to(x.device), frost_dir=args.frost_dir,
        data_dir=args.data_dir, scale=dataset.scale,
    )  # fmt: skip


def picture(x, columns):
    """Images (N,3,S,S) uint8 as one picture (3,H,W), `columns` in a row."""
    n, c, h, w = x.shape
    x = x.view(n // columns, columns, c, h, w).permute(2, 0, 3, 1, 4)
    return x.reshape(c, n // columns * h, columns * w)


def available(chosen, missing, place):
    """The corruptions of `chosen` to evaluate, given those that `place` does not hold.

    The extra four are left out with a note where none was asked for by name. Raises UserError
    for any other one that is missing, so that it is known before the first evaluation.
    """
    needed = [c for c in missing if chosen != EVERY or c not in corruptions.EXTRA]
    if needed:
        raise run.UserError(
            f"{place}: no {', '.join(needed)}; complete it, choose --corruptions, or use --generate"
        )
    if missing:
        print(f"{place}: no {', '.join(missing)}; left out, no mean over the 15 needs them")
    return [c for c in chosen if c not in missing]


# --- ImageNet -----------------------------------------------------------------------------------


class Corrupted:
    """Files that are corrupted as they are read; for `run.evaluate`, like the files themselves.
    Image i is that of index rows[i], whatever the batch."""

    def __init__(self, files, name, severity, options):
        self.files, self.kind, self.options = files, (name, severity), options
        self.device = files.device

    def __getitem__(self, part):
        return Corrupted(self.files[part], *self.kind, self.options)

    def split(self, batch_size):
        for start in range(0, len(self.files), batch_size):
            x, held = self.files.read(slice(start, start + batch_size))
            rows = torch.from_numpy(self.files.rows[start : start + batch_size]).to(x.device)[held]
            if len(x):
                yield corruptions.corrupt(x, *self.kind, index=rows, **self.options)

    def scored(self, logits, y):
        self.files.skipped = self.files.unreadable
        return self.files.scored(logits, y)


def released_folder(root, name, severity):
    """<root>/[<group>/]<corruption>/<severity> of ImageNet-C."""
    for group in ("", "noise", "blur", "weather", "digital", "extra"):
        if (root / group / name / str(severity)).is_dir():
            return root / group / name / str(severity)
    raise run.UserError(
        f"{root}: no {name}/{severity}; complete it, choose --corruptions, or use --generate"
    )


def imagenet(args, networks, device, precision):
    """The table of ImageNet, ImageNet-C, -A, -R and -Sketch. Returns what the JSON file holds."""
    data_dir = Path(args.data_dir)
    options = {"device": device, "workers": args.workers, "strict": args.strict}
    classes = trees.imagenet_classes(data_dir)
    root = next((data_dir / n for n in trees.IMAGENET_TESTS["imagenet-c"]
                 if (data_dir / n).is_dir()), None)  # fmt: skip
    root = None if args.generate else root
    results = [facts | {"error": {}} for _, _, facts in networks]
    titles = [title for title, _, _ in networks]
    widths = [max(9, len(t) + 2) for t in titles]
    print("error in %".ljust(20) + "".join(t.rjust(w) for t, w in zip(titles, widths, strict=True)))

    def row(title, values):
        cells = [f"{v:.2f}".rjust(w) for v, w in zip(values, widths, strict=True)]
        print(title.ljust(20) + "".join(cells), flush=True)

    counts = {}

    def score(key, images):
        values = [run.evaluate(m, *images, precision, args.batch_size) for _, m, _ in networks]
        bad = len(getattr(images.x, "files", images.x).unreadable)
        counts[key] = len(images.y) - bad, bad
        return [v["error"] for v in values]

    def few(images):
        if args.limit and args.limit < len(images.y):
            images = images.subset(data.stratified_split(images.y, args.limit, 0, "--limit")[1])
        return images.to(device)

    sizes = sorted({m.spec["image_size"] for _, m, _ in networks})
    if len(sizes) > 1:
        raise run.UserError(f"networks for images of {sizes} pixels: one at a time")
    if root and sizes != [224]:
        raise run.UserError(f"{root} has 224 pixels, the network takes {sizes[0]}: use --generate")

    def own(name):
        return few(trees.read_imagenet_test(name, data_dir, classes, sizes[0], options))

    if root:
        groups = ("", "extra")
        missing = [c for c in corruptions.EXTRA if c in args.corruptions]
        missing = [c for c in missing if not any((root / g / c).is_dir() for g in groups)]
        args.corruptions = available(args.corruptions, missing, root)
        for name in args.corruptions:  # each folder is looked for before the first evaluation
            for severity in args.severities:
                released_folder(root, name, severity)

    clean = None
    try:
        clean = own("imagenet")
    except run.UserError as error:
        if not root:
            raise
        trees.note(f"clean images are left out: {error}")
    if clean:
        for result, value in zip(results, score("imagenet val", clean), strict=True):
            result["clean"] = value
        row("imagenet val", [r["clean"] for r in results])
    for name in args.corruptions:
        for severity in args.severities:
            if root:
                folder, title = released_folder(root, name, severity), f"imagenet-c {name}"
                images = trees.read_test(title, folder, classes, 224, options, 50_000, "exact")
                images = few(images)
            else:
                kind = {"seed": args.seed, "frost_dir": args.frost_dir, "data_dir": args.data_dir}
                scale = min(corruptions.SIZES, key=lambda s: abs(s - clean.x.size))
                x = Corrupted(clean.x, name, severity, kind | {"scale": scale})
                images = folders.Images(x, clean.y)
            for result, value in zip(results, score(f"{name} {severity}", images), strict=True):
                result["error"].setdefault(name, []).append(value)
        means = [sum(r["error"][name]) / len(args.severities) for r in results]
        row(name, means)
    complete = set(corruptions.NAMES) <= set(args.corruptions) and len(args.severities) == 5
    for result in results:
        if complete:
            means = {n: sum(result["error"][n]) / 5 for n in corruptions.NAMES}
            result["mean_corruption_error"] = sum(means.values()) / 15
            result["mCE"] = mean_ce(means)
    if complete:
        row("mean (15 x 5)", [r["mean_corruption_error"] for r in results])
        row("mCE", [r["mCE"] for r in results])
    else:
        print("mCE: needs all 15 corruptions and 5 severities")
    for name in ("imagenet-a", "imagenet-r", "imagenet-sketch"):
        if not any((data_dir / n).is_dir() for n in trees.IMAGENET_TESTS[name]):
            print(f"{name}: not in {data_dir}")
            continue
        for result, value in zip(results, score(name, own(name)), strict=True):
            result[name] = value
        row(name, [r[name] for r in results])
    where = f"released files in {root}" if root else f"generated (seed {args.seed}), no JPEG step"
    most = max(n for n, _ in counts.values())
    print(f"ImageNet-C: {where}; up to {most} images a set; {precision.name}; mCE: AlexNet is 100")
    return {
        "command": "python " + " ".join(["eval/corruptions.py", *sys.argv[1:]]),
        "versions": run.versions(), "dataset": "imagenet", "split": "val", "limit": args.limit,
        "source": where, "severities": args.severities, "corruptions": args.corruptions,
        "images": {k: n for k, (n, _) in counts.items()},
        "unreadable": sum(bad for _, bad in counts.values()),
        "precision": precision.name, "checkpoints": results,
    }  # fmt: skip


def mean_ce(errors):
    """mCE in % of {corruption: error in %, mean over the severities}."""
    return sum(errors[name] / alexnet for name, alexnet in ALEXNET.items()) / len(ALEXNET)


def write_json(args, output):
    """Write the results beside the first checkpoint, or where --json says."""
    first = Path(args.checkpoints[0].replace("torchvision:", ""))
    first = first / "last.pt" if first.is_dir() else first
    path = Path(args.json or first.with_suffix(".corruptions.json"))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(output, indent=1) + "\n")
    except OSError as error:
        raise run.UserError(f"cannot write {path}: {error.strerror}; give --json") from None
    print(f"written: {path}")


# --- export -------------------------------------------------------------------------------------


def read_manifest(folder):
    """manifest.json of an exported set, or None where there is none."""
    path = Path(folder) / "manifest.json"
    try:
        return json.loads(path.read_text()) if path.is_file() else None
    except ValueError:
        raise run.UserError(f"{path}: not JSON; delete the folder and export again") from None


def replace(path, write):
    """Let `write(file)` fill a file beside `path`; the name appears when all is written."""
    part = path.with_name(f".{path.name}.part")
    try:
        with open(part, "wb") as file:
            write(file)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def sha256(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def export(args, device):
    """Write a corrupted set in the official layout; returns its manifest."""
    out = Path(args.export)
    as_arrays = args.dataset != "folder"
    if as_arrays and args.severities != [1, 2, 3, 4, 5]:
        raise run.UserError("--export: the layout of the arrays holds all five severities")
    settings = {
        "dataset": args.dataset, "seed": args.seed, "limit": args.limit,
        "severities": args.severities,
        "frost": corruptions.frost_textures(args.frost_dir, args.data_dir)[1],
    }  # fmt: skip
    manifest = read_manifest(out) or settings | {"versions": run.versions(), "sha256": {}}
    for key, value in settings.items():
        if manifest.get(key) != value:
            raise run.UserError(
                f"{out} holds an export with {key} {manifest.get(key)}, not {value}: choose "
                "another folder, or delete it"
            )

    def finished(name, digest):
        manifest["sha256"][name] = digest
        text = json.dumps(manifest, indent=1) + "\n"
        replace(out / "manifest.json", lambda file: file.write(text.encode()))

    try:
        out.mkdir(parents=True, exist_ok=True)
        write = export_arrays if as_arrays else export_tree
        write(args, device, out, manifest["sha256"], finished)
    except OSError as error:
        raise run.UserError(f"cannot write {out}: {error}") from None
    print(f"written: {out}")
    return manifest


def export_arrays(args, device, out, digests, finished):
    """One file per corruption; whole files are kept, an unfinished one is written anew."""
    dataset = data.load(args.dataset, args.data_dir)
    x, y = dataset.test
    rows = torch.arange(len(y))
    if args.limit:
        rows = data.stratified_split(y, args.limit, 0, "--limit")[1]
    labels = y[rows].to(torch.uint8).repeat(5).numpy()
    replace(out / "labels.npy", lambda file: np.save(file, labels))
    finished("labels.npy", sha256(out / "labels.npy"))
    shape = (5 * len(rows), *x.shape[2:], 3)

    for name in args.corruptions:
        path = out / f"{name}.npy"
        if path.is_file() and digests.get(path.name) == sha256(path):
            print(f"{name}: there already")
            continue

        def write(file, name=name):
            header = {"descr": "|u1", "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(file, header)
            for severity in args.severities:
                for part in rows.split(args.batch_size):
                    images = corruptions.corrupt(
                        x[part].to(device), name, severity, args.seed, part.to(device),
                        frost_dir=args.frost_dir, data_dir=args.data_dir,
                    )  # fmt: skip
                    file.write(images.permute(0, 2, 3, 1).contiguous().cpu().numpy().tobytes())

        replace(path, write)
        finished(path.name, sha256(path))
        print(f"{name}: {shape[0]} images", flush=True)


def export_tree(args, device, out, digests, finished):
    """One file per image; those that are there are kept. A manifest entry per corruption and
    severity: the hash of the hashes of its files, in order."""
    files = photographs(Path(args.data_dir))
    if args.limit:
        classes = {name: k for k, name in enumerate(sorted({f.parent.name for f in files}))}
        labels = torch.tensor([classes[f.parent.name] for f in files])
        rows = data.stratified_split(labels, args.limit, 0, "--limit")[1].tolist()
    else:
        rows = list(range(len(files)))
    kinds = [(name, severity) for name in args.corruptions for severity in args.severities]
    hashes = {kind: hashlib.sha256() for kind in kinds}
    batch = min(args.batch_size, 64)  # photographs are large
    for start in range(0, len(rows), batch):
        index = rows[start : start + batch]
        x = None
        for name, severity in kinds:
            folder = out / name / str(severity)
            paths = [folder / files[i].parent.name / f"{files[i].stem}.JPEG" for i in index]
            if not all(path.is_file() for path in paths):
                if x is None:
                    x = torch.stack([photograph(files[i]) for i in index]).to(device)
                images = corruptions.corrupt(
                    x, name, severity, args.seed, torch.tensor(index, device=device),
                    frost_dir=args.frost_dir, data_dir=args.data_dir,
                )  # fmt: skip
                for path, image in zip(paths, images.cpu(), strict=True):
                    write_jpeg(path, image)
            for path in paths:
                hashes[name, severity].update(sha256(path).encode())
        print(f"{start + len(index)} of {len(rows)} images", flush=True)
    for (name, severity), digest in hashes.items():
        finished(f"{name}/{severity}", digest.hexdigest())


def photographs(tree):
    """The image files <tree>/<class>/*, sorted. Their place in the list is their index."""
    found = (f for f in tree.glob("*/*") if not f.name.startswith("."))
    files = sorted(f for f in found if f.suffix.lower() in folders.SUFFIXES)
    if not files:
        raise run.UserError(f"--data-dir {tree}: no images <class>/*.jpg there")
    names = [(f.parent.name, f.stem) for f in files]
    if len(set(names)) < len(names):
        twice = next(n for n in names if names.count(n) > 1)
        raise run.UserError(f"{tree / twice[0]}: two files are called {twice[1]}")
    return files


def photograph(path, side=224, short=256):
    """uint8 (3,224,224): short side to 256, antialiased bilinear, centre, as for ImageNet-C."""
    import torchvision.transforms.functional as tf
    from PIL import Image

    try:
        image = Image.fromarray(folders.decode(path).permute(1, 2, 0).numpy())
    except folders.Unreadable as error:
        raise run.UserError(f"{path}: not a readable image ({error})") from None
    return tf.pil_to_tensor(tf.center_crop(tf.resize(image, short), side))


def write_jpeg(path, image):
    """uint8 (3,S,S) as the original saves it."""
    from PIL import Image

    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(image.permute(1, 2, 0).numpy())
    replace(path, lambda file: image.save(file, "JPEG", quality=85, optimize=True))


# --- main ---------------------------------------------------------------------------------------


def main(args):
    device = run.get_device(args.device)
    if args.export:
        if run.world() > 1:
            raise run.UserError("--export: for one process")
        return export(args, device)
    precision = run.Precision(args.precision, device)
    networks, name = models.for_evaluation(args, device)
    if name in trees.IMAGENET:
        output = imagenet(args, networks, device, precision)
        if run.rank() == 0:
            write_json(args, output)
        return output
    options = data.test_options(name, networks) | {"strict": args.strict}
    if name not in data.STATS:
        options["image_size"] = networks[0][1].spec["image_size"]
    dataset = data.load(name, args.data_dir, workers=args.workers, **options)
    if len(dataset.test.y) > 20_000 and isinstance(dataset.test.x, folders.Files):
        if not 0 < args.limit <= 20_000:
            raise run.UserError(f"{name}: {len(dataset.test.y)} images; --limit 20000 or fewer")
    for _, model, facts in networks:
        if model.spec["num_classes"] != len(dataset.classes):
            raise run.UserError(
                f"{name} has {len(dataset.classes)} classes, {Path(facts['checkpoint']).name} "
                f"{model.spec['num_classes']}"
            )
    folder = None if args.generate else data.corrupted_dir(name, args.data_dir)
    if folder:
        missing = [c for c in args.corruptions if not (folder / f"{c}.npy").is_file()]
        args.corruptions = available(args.corruptions, missing, folder)
    texture = corruptions.frost_textures(args.frost_dir, args.data_dir)[1]
    labels = data.corrupted_labels(folder) if folder else dataset.test.y
    if args.limit:
        rows = data.stratified_split(labels, args.limit, 0, "--limit")[1]
    else:
        rows = torch.arange(len(labels))
    mine = rows[run.rows(len(rows))]  # of several processes each makes and evaluates a part
    manifest = read_manifest(folder) if folder else None
    if manifest:  # not the release, whatever the name of the folder
        source = f"exported by this project (seed {manifest['seed']}) in {folder}"
        texture = manifest["frost"]
    else:
        source = f"released arrays in {folder}" if folder else f"generated (seed {args.seed})"
    if (manifest or not folder) and "frost" in args.corruptions:
        source += f", frost: {texture}"

    def score(x, y):
        x, y = x.to(device), y.to(device)
        kind = precision, args.batch_size, True
        return [run.evaluate(model, x, y, *kind) for _, model, _ in networks]

    limit_note = f"{len(rows)} of {len(labels)}" if args.limit else f"all {len(labels)}"
    print(f"{name} test, {limit_note} images; corruptions: {source}; error in %, {precision.name}")
    single = len(networks) == 1
    titles = (
        [f"s{s}" for s in args.severities] + ["mean"] if single else [n for n, _, _ in networks]
    )
    widths = [max(7, len(t) + 2) for t in titles]
    print(
        "".join(
            ["corruption".ljust(20), *(t.rjust(w) for t, w in zip(titles, widths, strict=True))]
        )
    )

    def row(title, values):
        cells = ["" if v is None else f"{v:.2f}" for v in values]
        cells = [c.rjust(w) for c, w in zip(cells, widths, strict=True)]
        print("".join([title.ljust(20), *cells]), flush=True)

    # The clean rows are those of the test set; a released labels.npy in another order than ours
    # (an .npz need not have the official one) would make the two incomparable only with --limit.
    own = mine
    if manifest and len(labels) < len(dataset.test.y):  # exported with --limit: of these rows
        own = data.stratified_split(dataset.test.y, len(labels), 0, "--limit")[1][mine]
    clean = score(dataset.test.x[own], dataset.test.y[own])
    results = []
    for (_, _, facts), values in zip(networks, clean, strict=True):
        results.append(facts | {"clean": values, "error": {}, "ece": {}})
    pad = [None] * (len(titles) - 1)
    row("clean", [*pad, clean[0]["error"]] if single else [c["error"] for c in clean])
    grid = []
    for corruption in args.corruptions:
        for severity in args.severities:
            x = corrupted_images(args, dataset, folder, corruption, severity, mine)
            grid.append(x[:1].cpu())
            for result, values in zip(results, score(x, labels[mine]), strict=True):
                result["error"].setdefault(corruption, []).append(values["error"])
                result["ece"].setdefault(corruption, []).append(values["ece"])
        means = [sum(r["error"][corruption]) / len(args.severities) for r in results]
        row(corruption, [*results[0]["error"][corruption], *means] if single else means)

    groups = {"mean": corruptions.NAMES, "extra": corruptions.EXTRA}
    for group, members in groups.items():
        members = [c for c in members if c in args.corruptions]
        if not members:
            continue
        key = "mean_corruption" if group == "mean" else "extra"
        title = f"{group} ({len(members)} x {len(args.severities)})"
        for kind in ("error", "ece"):
            for result in results:
                values = [v for c in members for v in result[kind][c]]
                result[f"{key}_{kind}"] = sum(values) / len(values)
        row(title, [*pad, results[0][f"{key}_error"]] if single
            else [r[f"{key}_error"] for r in results])  # fmt: skip
    row("ECE clean", [*pad, clean[0]["ece"]] if single else [c["ece"] for c in clean])
    if "mean_corruption_ece" in results[0]:
        values = [r["mean_corruption_ece"] for r in results]
        row("ECE corrupted (15)", [*pad, *values] if single else values)

    first = Path(args.checkpoints[0])
    first = first / "last.pt" if first.is_dir() else first
    output = {
        "command": "python " + " ".join(["eval/corruptions.py", *sys.argv[1:]]),
        "versions": run.versions(), "dataset": name, "split": "test", "images": len(rows),
        "limit": args.limit, "source": source, "severities": args.severities,
        "corruptions": args.corruptions,
        "precision": precision.name, "checkpoints": results,
    }  # fmt: skip
    if run.rank() == 0:
        write_json(args, output)
        place = args.tensorboard or first.parent / "corruptions"
        write_tensorboard(place, args, networks, results, grid)
    return output


def write_tensorboard(folder, args, networks, results, grid):
    """One picture (a row per corruption, a column per severity) and error over severity."""
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(folder)) as writer:
        writer.add_image("corruptions", picture(torch.cat(grid), len(args.severities)))
        for (title, _, _), result in zip(networks, results, strict=True):
            for corruption, errors in result["error"].items():
                for severity, error in zip(args.severities, errors, strict=True):
                    writer.add_scalar(f"error_{corruption}/{title}", error, severity)


if __name__ == "__main__":
    run.cli(main, parse_args)
