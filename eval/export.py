"""Corrupted images of a test set in the layout of CIFAR-C or ImageNet-C.

    python eval/export.py data/CIFAR-10-C --dataset cifar10
    python eval/export.py OUT --dataset folder --data-dir TREE    # TREE/<class>/*.jpg

A data set of arrays becomes <corruption>.npy, uint8 (5N,S,S,3), and labels.npy. The severities
follow one another, each in the order of the test set. A tree of photographs becomes
<corruption>/<severity>/<class>/*.JPEG: short side to 256, centre 224, quality 85. The loss of the
JPEG step is part of ImageNet-C.

manifest.json holds the seed, the versions and the checksums. An interrupted export goes on where it
stopped. Evaluated from the arrays, a network gets the numbers that it gets on the fly.
"""

import hashlib
import json
import os
import sys
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from common import corruptions, data, run
from common.data import decode, folders


def parse_args(argv=None):
    parser = run.Parser(__file__, __doc__)
    parser.add_argument("out", metavar="DIR", help="folder of the corrupted set")
    parser.add_argument("--dataset", choices=data.NAMES, help="test set to corrupt")
    parser.add_argument("--data-dir", default="data", help="folder of the data sets")
    parser.add_argument(
        "--seed", type=run.nonnegative(int), default=0, help="of the random numbers"
    )
    corruptions.add_arguments(parser, "of a tree; arrays always hold all five")
    parser.add_argument(
        "--limit", type=run.nonnegative(int), default=0, metavar="N",
        help="N test images, the same number of each class; 0 is all",
    )  # fmt: skip
    parser.add_argument(
        "--batch-size", type=run.positive(int), default=500, help="images corrupted at once"
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")
    args = parser.parse_args(argv)
    if not args.dataset:
        parser.error("--dataset is needed: cifar10, cifar100, ... or folder")
    return args


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
    out = Path(args.out).expanduser()
    as_arrays = args.dataset != "folder"
    if as_arrays and args.severities != [1, 2, 3, 4, 5]:
        raise run.UserError("--severities: the layout of the arrays holds all five")
    settings = {
        "dataset": args.dataset, "seed": args.seed, "limit": args.limit,
        "severities": args.severities,
        "frost": corruptions.frost_textures(args.frost_dir, args.data_dir)[1],
    }  # fmt: skip
    manifest = data.read_manifest(out) or settings | {"versions": run.versions(), "sha256": {}}
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

    run.try_folder(out, "DIR")
    try:
        write = export_arrays if as_arrays else export_tree
        write(args, device, out, manifest["sha256"], finished)
    except OSError as error:
        raise run.UserError(f"cannot write {out}: {error}") from None
    print(f"written: {out}")
    return manifest


def export_arrays(args, device, out, digests, finished):
    """One file per corruption; whole files are kept, an unfinished one is written anew."""
    dataset = data.load(args.dataset, args.data_dir)
    if not dataset.test.in_memory:
        raise run.UserError(f"{args.dataset}: its images are files; give --dataset folder")
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
        image = Image.fromarray(decode.decode(path).permute(1, 2, 0).numpy())
    except decode.Unreadable as error:
        raise run.UserError(f"{path}: not a readable image ({error})") from None
    return tf.pil_to_tensor(tf.center_crop(tf.resize(image, short), side))


def write_jpeg(path, image):
    """uint8 (3,S,S) as the original saves it."""
    from PIL import Image

    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(image.permute(1, 2, 0).numpy())
    replace(path, lambda file: image.save(file, "JPEG", quality=85, optimize=True))


def main(args):
    device = run.get_device(args.device)
    if run.world() > 1:
        raise run.UserError("eval/export.py: for one process")
    return export(args, device)


if __name__ == "__main__":
    run.cli(main, parse_args)
