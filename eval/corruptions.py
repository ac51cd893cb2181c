"""Error of checkpoints under the 19 common corruptions, as one table.

    python eval/corruptions.py runs/a/last.pt [runs/b/last.pt ...]
    python eval/corruptions.py runs/a/last.pt --adapt 8,32,200
    python eval/corruptions.py runs/dual-bn/last.pt --gamma 0,0.5,1
    python eval/corruptions.py resnet20.th --arch resnet20 --dataset cifar10 --mean ... --std ...
    python eval/corruptions.py torchvision:resnet50 --data-dir data

Reads the released CIFAR-10-C / CIFAR-100-C arrays where <data-dir>/CIFAR-10-C/ has them. Elsewhere
it generates the corruptions from the test images, and says so. "mean (15 x 5)" is the mean error
over the 15 corruptions of the benchmark and 5 severities, not normalised by AlexNet. The four extra
corruptions are apart and never in it. ECE: expected calibration error, 15 bins. All numbers are in
percent.

--adapt N[,N...] adds a column for each N. There BatchNorm's statistics are estimated anew, without
labels, on N images of each corruption and severity, drawn from the seed. They are mixed with those
of the training, which count as --adapt-source images (Schneider et al., NeurIPS 2020). The error is
that of all images.

For ImageNet's networks the released ImageNet-C (<data-dir>/imagenet-c/<corruption>/<severity>/
<wnid>/*, or in the folders blur, digital, extra, noise, weather of its archives) is read as it is:
224 x 224 files, neither resized nor cropped; another size is refused. "mCE" is the mean over the 15
corruptions of the error (mean over 5 severities) divided by AlexNet's. Then follow the errors on
imagenet-a and imagenet-r (logits restricted to their 200 classes) and imagenet-sketch, as far as
these are there.

Each checkpoint's results are written beside it. eval/export.py writes corrupted sets.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from common import corruptions, data, models, run
from common.data import trees

# AlexNet's errors on ImageNet-C, mean over 5 severities, in the order of corruptions.NAMES, from
# the code of hendrycks/robustness.
ALEXNET = dict(zip(corruptions.NAMES, (
    0.886428, 0.894468, 0.922640, 0.819880, 0.826268, 0.785948, 0.798360, 0.866816,
    0.826572, 0.819324, 0.564592, 0.853204, 0.646056, 0.717840, 0.606500,
), strict=True))  # fmt: skip


def parse_args(argv=None):
    parser = run.Parser(__file__, __doc__)
    parser.add_argument("--data-dir", default="data", help="folder of the data sets")
    parser.add_argument(
        "--generate", action="store_true", help="corrupt the test images even where a release is"
    )
    parser.add_argument(
        "--seed", type=run.nonnegative(int), default=0,
        help="of generated corruptions and of the images for --adapt",
    )  # fmt: skip
    corruptions.add_arguments(parser, "numbers from 1 to 5")
    parser.add_argument(
        "--adapt", type=image_counts, default=[], metavar="N,N",
        help="images of each corruption and severity for new statistics of BatchNorm, or all "
        "(default: none)",
    )  # fmt: skip
    parser.add_argument(
        "--adapt-source", type=run.nonnegative(int), default=models.SOURCE, metavar="N",
        help="images that the training's statistics count as beside those of --adapt",
    )  # fmt: skip
    models.add_gamma(parser)
    parser.add_argument(
        "--limit", type=run.nonnegative(int), default=0, metavar="N",
        help="N test images, the same number of each class; 0 is all",
    )  # fmt: skip
    parser.add_argument(
        "--batch-size", type=run.positive(int), default=500, help="images evaluated at once"
    )
    parser.add_argument(
        "--workers", type=run.nonnegative(int), help="processes that decode (default: the cores)"
    )
    parser.add_argument("--strict", action="store_true", help="stop at a file that is no image")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")
    parser.add_argument(
        "--precision", default="fp32", choices=["auto", "fp32", "bf16", "fp16"],
        help="arithmetic of the network",
    )  # fmt: skip
    parser.add_argument(
        "--json", metavar="FILE",
        help="results of all networks (default: <checkpoint>.corruptions.json, each its own)",
    )  # fmt: skip
    parser.add_argument(
        "--tensorboard", metavar="DIR", help="pictures (default: corruptions/ beside the results)"
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="replace results of other settings"
    )
    parser.add_argument("--export", metavar="DIR", help="replaced by eval/export.py")
    models.add_arguments(parser, data.NAMES)
    args = parser.parse_args(argv)
    if args.export:
        words = f"{args.export} --dataset {args.dataset or 'cifar10'}"
        parser.error(f"--export is a script of its own now: python eval/export.py {words}")
    if args.dataset == "folder":
        parser.error("--dataset folder goes with eval/export.py")
    return args


def image_counts(text):
    """argparse type of --adapt: positive numbers, or "all", each once."""
    for word in text.split(","):
        if word != "all" and not (word.isdecimal() and int(word) > 0):
            raise run.UserError(f"--adapt {word}: give numbers of images above 0, or all")
    return run.listed(lambda word: word if word == "all" else int(word))(text)


# --- what is evaluated ----------------------------------------------------------------------------


@dataclass
class Column:
    """A network as one column of the table."""

    title: str
    model: torch.nn.Module
    entry: dict  # what the results say of it
    adapt: int | str | None = None  # images that BatchNorm adapts to, "all", or none


def columns_of(networks, args):
    """[[Column, ...] of each checkpoint]: with every gamma, without and with each --adapt."""
    columns = []
    for title, model, facts in networks:
        facts = facts | {"weights": run.weights_digest(model)}
        own = []
        for name, mixed, entry in models.with_gamma([(title, model, facts)], args.gamma):
            own.append(Column(name, mixed, dict(entry)))
            if args.adapt and not models.batch_norms(mixed):
                print(f"{name}: no BatchNorm with running statistics, nothing to adapt")
                continue
            for count in args.adapt:
                notes = {"adapt": count, "adapt_source": args.adapt_source}
                own.append(Column(f"{name}, adapt {count}", mixed, entry | notes, count))
        columns.append(own)
    return columns


def score(columns, images, kind, parts, args, precision):
    """The metrics of each column on images: (this process's share, the number of all).

    kind: (corruption, severity), which with the seed chooses the images for --adapt. parts(rows):
    an iterable of batches on the device, of the images at the positions `rows` of the whole set.
    """
    share, total = images
    metrics = []
    for column in columns:
        options = precision, args.batch_size, True
        if column.adapt is None:
            metrics.append(run.evaluate(column.model, share, *options))
            continue
        rows = torch.arange(total)
        if column.adapt != "all":
            rng = run.generator(args.seed, "adapt", *kind)
            rows = torch.randperm(total, generator=rng)[: column.adapt].sort().values
        source = args.adapt_source
        with models.adapted(column.model, parts(rows), len(rows), source, precision) as model:
            metrics.append(run.evaluate(model, share, *options))
    for column, values in zip(columns, metrics, strict=True):
        warning = run.not_finite(values)
        if warning and "warnings" not in column.entry:  # once for a network
            column.entry["warnings"] = [warning]
            print(f"warning: {column.title}: {warning}", file=sys.stderr)
    return metrics


def flat(groups):
    """The columns of all checkpoints in one list."""
    return [column for group in groups for column in group]


def options_of(args):
    """The options of the networks that the settings of a results file name."""
    source = args.adapt_source if args.adapt else None
    return {"gamma": args.gamma, "adapt": args.adapt, "adapt_source": source}


def check_adapt(args, total):
    """Raise UserError where --adapt asks for more images than there are."""
    for count in args.adapt:
        if count != "all" and count > total:
            raise run.UserError(f"--adapt {count}: there are only {total} images")


def note_fewer(args, title, total):
    """A note where a set beside the corruptions has fewer images than --adapt asks for."""
    for count in args.adapt:
        if count != "all" and count > total:
            trees.note(f"{title}: {total} images for --adapt {count}, all are taken")


def available(chosen, missing, place):
    """The corruptions of `chosen` to evaluate, given those that `place` does not hold.

    The extra four are left out with a note where none was asked for by name. Raises UserError
    for any other one that is missing, so that it is known before the first evaluation.
    """
    whole = chosen == corruptions.EVERY
    needed = [c for c in missing if not whole or c not in corruptions.EXTRA]
    if needed:
        raise run.UserError(
            f"{place}: no {', '.join(needed)}; complete it, choose --corruptions, or use --generate"
        )
    if missing:
        print(f"{place}: no {', '.join(missing)}; left out, no mean over the 15 needs them")
    return [c for c in chosen if c not in missing]


# --- the table ------------------------------------------------------------------------------------


class Table:
    """Prints rows as they come: a column for each network, or for a single one the severities."""

    def __init__(self, columns, severities, first="error in %"):
        self.single = len(columns) == 1 and severities is not None
        names = [column.title for column in columns]
        titles = [*(f"s{s}" for s in severities), "mean"] if self.single else names
        self.widths = [max(7, len(title) + 2) for title in titles]
        self.show(first, titles)

    def show(self, title, cells):
        parts = [cell.rjust(width) for cell, width in zip(cells, self.widths, strict=True)]
        print("".join([title.ljust(20), *parts]), flush=True)

    def row(self, title, values, severities=None):
        """values: one number for each network. severities: of the single one."""
        shown = values
        if self.single:
            shown = [*(severities or [None] * (len(self.widths) - 1)), *values]
        self.show(title, ["" if value is None else f"{value:.2f}" for value in shown])


# --- results --------------------------------------------------------------------------------------


class Files:
    """The results files: that of --json for all networks, or one beside each checkpoint."""

    def __init__(self, args, columns, settings):
        self.groups = [flat(columns)] if args.json else columns
        self.results = []
        if run.rank():
            return
        try:
            for group in self.groups:
                digests = list(dict.fromkeys(column.entry["weights"] for column in group))
                first = models.place_of(group[0].entry)
                results = run.Results(
                    "corruptions", first, {"weights": digests} | settings,
                    path=args.json, tensorboard=args.tensorboard, overwrite=args.overwrite,
                )  # fmt: skip
                self.results.append(results)
            paths = [results.path.resolve() for results in self.results]
            if len(set(paths)) < len(paths):
                again = next(path for path in paths if paths.count(path) > 1)
                raise run.UserError(
                    f"several networks' results would go to {again}: give --json for one file"
                )
        except run.UserError:
            self.close()
            raise

    def write(self, output, grid=None, severities=()):
        """Write the files. Returns the content of the first, with the entries of all."""
        written = output
        for results, group in zip(self.results, self.groups, strict=False):
            content = results.write(output | {"checkpoints": [c.entry for c in group]})
            written = content if results is self.results[0] else written
            if grid:
                write_tensorboard(results.folder, group, grid, severities)
        if len(self.groups) == 1 and self.results:
            return written
        return written | {"checkpoints": [column.entry for column in flat(self.groups)]}

    def close(self):
        for results in self.results:
            results.close()


def write_tensorboard(folder, columns, grid, severities):
    """A sub-run for each column: the error over the severity, the same tags in all. The pictures
    are in the first one's: a row for each corruption, a column for each severity."""
    from torch.utils.tensorboard import SummaryWriter

    for k, column in enumerate(columns):
        place = folder / column.title.strip("/").replace("/", "-").replace(", ", "-")
        with SummaryWriter(str(place).replace(" ", "-")) as writer:
            if k == 0:
                writer.add_image("corruptions", picture(torch.cat(grid), len(severities)))
            for name, errors in column.entry["error"].items():
                for severity, error in zip(severities, errors, strict=True):
                    writer.add_scalar(f"error/{name}", error, severity)


def picture(x, columns):
    """Images (N,3,S,S) uint8 as one picture (3,H,W), `columns` in a row."""
    n, c, h, w = x.shape
    x = x.view(n // columns, columns, c, h, w).permute(2, 0, 3, 1, 4)
    return x.reshape(c, n // columns * h, columns * w)


# --- small images ---------------------------------------------------------------------------------


class Arrays:
    """The test images of a data set of arrays, clean and corrupted."""

    def __init__(self, args, name, networks, device):
        self.device = device
        options = data.test_options(name, networks) | {"strict": args.strict}
        if data.SETS[name].sized:
            options["image_size"] = networks[0][1].spec["image_size"]
        self.args = args
        self.dataset = dataset = data.load(name, args.data_dir, workers=args.workers, **options)
        many = len(dataset.test) > 20_000 and not dataset.test.in_memory
        if many and not 0 < args.limit <= 20_000:
            raise run.UserError(f"{name}: {len(dataset.test.y)} images; --limit 20000 or fewer")
        size = networks[0][1].spec["image_size"]
        data.check_networks(name, networks, dataset.classes, size)
        self.folder = None if args.generate else data.corrupted_dir(name, args.data_dir)
        self.labels = dataset.test.y
        if self.folder:
            self.labels = data.corrupted_labels(self.folder, len(dataset.classes))
        self.rows = torch.arange(len(self.labels))
        if args.limit:
            self.rows = data.stratified_split(self.labels, args.limit, 0, "--limit")[1]
        self.mine = self.rows[run.rows(len(self.rows))]  # the part of this process
        self.corruptions, self.source = self.look()

    def look(self):
        """(the corruptions to evaluate, where they come from). UserError where one is damaged."""
        args, folder = self.args, self.folder
        chosen = args.corruptions
        if folder:
            missing = [c for c in chosen if not (folder / f"{c}.npy").is_file()]
            chosen = available(chosen, missing, folder)
            for name in chosen:  # a damaged file is known before the first evaluation
                size = self.dataset.image_size
                data.read_corrupted(folder, name, args.severities[-1], self.rows[:1], size)
        texture = corruptions.frost_textures(args.frost_dir, args.data_dir)[1]
        self.manifest = data.read_manifest(folder) if folder else None
        count, clean = len(self.labels), len(self.dataset.test.y)
        if count > clean or (count < clean and not self.manifest):
            raise run.UserError(
                f"{folder}: of {count} test images, where {args.data_dir} has {clean}; complete "
                "the data set, or use --generate"
            )
        if self.manifest:  # not the release, whatever the name of the folder
            source = f"exported by this project (seed {self.manifest['seed']}) in {folder}"
            texture = self.manifest["frost"]
        else:
            source = f"released arrays in {folder}" if folder else f"generated (seed {args.seed})"
        if (self.manifest or not folder) and "frost" in chosen:
            source += f", frost: {texture}"
        return chosen, source

    def corrupted(self, name, severity, rows):
        """Released or generated images (N,3,S,S) of the test rows `rows`, uint8."""
        if self.folder:
            return data.read_corrupted(self.folder, name, severity, rows)
        x = self.dataset.test.take(rows, complete=True).x.to(self.device)
        return corruptions.corrupt(
            x, name, severity, self.args.seed, rows.to(x.device), frost_dir=self.args.frost_dir,
            data_dir=self.args.data_dir, scale=self.dataset.scale,
        )  # fmt: skip

    def own(self, rows):
        """The rows of the clean test set that the rows of the corrupted one are.

        The clean rows are those of the test set. A released labels.npy in another order (an .npz
        need not have the official one) would make the two incomparable only with --limit.
        """
        count = len(self.dataset.test.y)
        if self.manifest and len(self.labels) < count:  # exported with --limit: of these rows
            kept = data.stratified_split(self.dataset.test.y, len(self.labels), 0, "--limit")[1]
            return kept[rows]
        return rows

    def clean(self, rows):
        return self.dataset.test.take(self.own(rows), complete=True).x


def evaluate_arrays(args, networks, name, device, precision):
    """The table of small images. Returns what the results files hold."""
    images = Arrays(args, name, networks, device)
    args.corruptions = images.corruptions
    check_adapt(args, len(images.rows))
    test = images.dataset.test
    if test.in_memory:
        few = images.rows[: models.published.IMAGES].to(test.x.device)
        networks = models.check_statistics(networks, test.x[few], test.y[few])
    columns = columns_of(networks, args)
    facts = {
        "dataset": name, "split": "test", "images": len(images.rows), "limit": args.limit,
        "source": images.source, "severities": args.severities, "corruptions": args.corruptions,
        "precision": precision.name, "seed": args.seed,
    }  # fmt: skip
    files = Files(args, columns, facts | options_of(args))
    try:
        total = len(images.labels)
        limit = f"{len(images.rows)} of {total}" if args.limit else f"all {total}"
        print(
            f"{name} test, {limit} images; corruptions: {images.source}; error in %, "
            f"{precision.name}"
        )
        grid = fill_arrays(args, images, flat(columns), device, precision)
        return files.write(facts, grid, args.severities)
    finally:
        files.close()


def fill_arrays(args, images, columns, device, precision):
    """Evaluate the columns and print the table. Returns the first image of each corruption."""
    progress = run.Progress()

    def measure(kind, read, y):
        progress.moving(" ".join(map(str, kind)))

        def parts(rows):
            return read(images.rows[rows]).to(device).split(args.batch_size)

        x = read(images.mine).to(device)
        share = data.Images(x, y.to(device)), len(images.rows)
        found = score(columns, share, kind, parts, args, precision)
        progress.clear()
        return x, found

    table = Table(columns, args.severities, "corruption")
    clean = images.dataset.test.y[images.own(images.mine)]
    for column, values in zip(columns, measure(("clean",), images.clean, clean)[1], strict=True):
        column.entry |= {"clean": values, "error": {}, "ece": {}}
    table.row("clean", [column.entry["clean"]["error"] for column in columns])
    grid = []
    for name in args.corruptions:
        for severity in args.severities:
            kind = name, severity

            def read(rows, kind=kind):
                return images.corrupted(*kind, rows)

            x, found = measure(kind, read, images.labels[images.mine])
            grid.append(x[:1].cpu())
            for column, values in zip(columns, found, strict=True):
                for key in ("error", "ece"):
                    column.entry[key].setdefault(name, []).append(values[key])
        errors = [column.entry["error"][name] for column in columns]
        table.row(name, [sum(e) / len(e) for e in errors], errors[0])
    calibration = {"ECE clean": [column.entry["clean"]["ece"] for column in columns]}
    for title, key, names in (
        ("mean", "mean_corruption", corruptions.NAMES), ("extra", "extra", corruptions.EXTRA),
    ):  # fmt: skip
        names = [name for name in names if name in args.corruptions]
        if not names:
            continue
        of = f"({len(names)} x {len(args.severities)})"
        for kind in ("error", "ece"):
            for column in columns:
                values = [v for name in names for v in column.entry[kind][name]]
                column.entry[f"{key}_{kind}"] = sum(values) / len(values)
        table.row(f"{title} {of}", [column.entry[f"{key}_error"] for column in columns])
        if key == "mean_corruption":
            calibration[f"ECE {title} {of}"] = [c.entry[f"{key}_ece"] for c in columns]
    for title, values in calibration.items():
        table.row(title, values)
    return grid


# --- ImageNet -------------------------------------------------------------------------------------


class Corrupted:
    """Files that are corrupted as they are read; for `run.evaluate`, like the files themselves.
    Each image is corrupted as its row in the listing says, whatever the batch."""

    def __init__(self, files, name, severity, options):
        self.files, self.kind, self.options = files, (name, severity), options
        self.y, self.device, self.only = files.y, files.device, files.only

    @property
    def unreadable(self):
        return self.files.unreadable

    def subset(self, rows):
        return Corrupted(self.files.subset(rows), *self.kind, self.options)

    def batches(self, batch_size):
        for x, y, rows in self.files.numbered(batch_size):
            yield corruptions.corrupt(x, *self.kind, index=rows, **self.options), y


def released_folder(root, name, severity):
    """<root>/[<group>/]<corruption>/<severity> of ImageNet-C."""
    for group in ("", "noise", "blur", "weather", "digital", "extra"):
        if (root / group / name / str(severity)).is_dir():
            return root / group / name / str(severity)
    raise run.UserError(
        f"{root}: no {name}/{severity}; complete it, choose --corruptions, or use --generate"
    )


class ImageNet:
    """ImageNet's test sets, and ImageNet-C released or generated."""

    def __init__(self, args, networks, device):
        self.args, self.dir = args, Path(args.data_dir)
        self.options = {"device": device, "workers": args.workers, "strict": args.strict}
        self.device, self.classes = device, trees.imagenet_classes(self.dir)
        self.counts = {}  # of a set: images read, and unreadable ones
        names = data.SETS["imagenet-c"].folders
        root = next((self.dir / n for n in names if (self.dir / n).is_dir()), None)
        self.root = None if args.generate else root
        sizes = sorted({model.spec["image_size"] for _, model, _ in networks})
        if len(sizes) > 1:
            raise run.UserError(f"networks for images of {sizes} pixels: one at a time")
        self.size = sizes[0]
        self.source = f"generated (seed {args.seed}), no JPEG step"
        self.corruptions = args.corruptions
        if self.root:
            self.corruptions = self.look()
            self.source = f"released files in {self.root}"
        else:
            corruptions.frost_textures(args.frost_dir, args.data_dir)  # UserError now, not later
        self.val = None
        try:
            self.val = self.own("imagenet")
        except run.UserError as error:
            if not self.root:
                raise
            trees.note(f"clean images are left out: {error}")

    def look(self):
        """The corruptions that the release holds; every folder is looked for."""
        if self.size != 224:
            raise run.UserError(
                f"{self.root} has 224 pixels, the network takes {self.size}: use --generate"
            )
        missing = [c for c in corruptions.EXTRA if c in self.args.corruptions]
        groups = ("", "extra")
        missing = [c for c in missing if not any((self.root / g / c).is_dir() for g in groups)]
        chosen = available(self.args.corruptions, missing, self.root)
        for name in chosen:
            for severity in self.args.severities:
                released_folder(self.root, name, severity)
        return chosen

    def few(self, images):
        """--limit of these images, undecoded."""
        limit = self.args.limit
        if limit and limit < len(images.y):
            images = images.subset(data.stratified_split(images.y, limit, 0, "--limit")[1])
        return images.to(self.device)

    def own(self, name):
        options = self.options
        return self.few(trees.read_imagenet_test(name, self.dir, self.classes, self.size, options))

    def corrupted(self, name, severity):
        if self.root:
            folder, title = released_folder(self.root, name, severity), f"imagenet-c {name}"
            read = trees.read_test
            return self.few(read(title, folder, self.classes, 224, self.options, 50_000, "exact"))
        scale = min(corruptions.SIZES, key=lambda size: abs(size - self.size))
        options = {
            "seed": self.args.seed, "frost_dir": self.args.frost_dir,
            "data_dir": self.args.data_dir, "scale": scale,
        }  # fmt: skip
        return Corrupted(self.val, name, severity, options)


def evaluate_imagenet(args, networks, device, precision):
    """The table of ImageNet, ImageNet-C, -A, -R and -Sketch. Returns what the files hold."""
    images = ImageNet(args, networks, device)
    args.corruptions = images.corruptions
    columns = columns_of(networks, args)
    if args.adapt:
        check_adapt(args, len(images.corrupted(args.corruptions[0], args.severities[0]).y))
    facts = {
        "dataset": "imagenet", "split": "val", "limit": args.limit, "source": images.source,
        "severities": args.severities, "corruptions": args.corruptions,
        "precision": precision.name, "seed": args.seed,
    }  # fmt: skip
    files = Files(args, columns, facts | options_of(args))
    try:
        fill_imagenet(args, images, flat(columns), precision)
        most = max(n for n, _ in images.counts.values())
        print(
            f"ImageNet-C: {images.source}; up to {most} images a set; {precision.name}; mCE: "
            "AlexNet is 100"
        )
        return files.write(facts | {
            "images": {key: n for key, (n, _) in images.counts.items()},
            "unreadable": sum(bad for _, bad in images.counts.values()),
        })  # fmt: skip
    finally:
        files.close()


def fill_imagenet(args, images, columns, precision):
    """Evaluate the columns and print the table."""

    def measure(title, found, kind):
        def parts(rows):
            return (x for x, _ in found.subset(rows).batches(args.batch_size))

        note_fewer(args, title, len(found.y))
        share = found.subset(run.rows(len(found.y))), len(found.y)
        values = score(columns, share, kind, parts, args, precision)
        bad = len(found.unreadable)
        images.counts[title] = len(found.y) - bad, bad
        return [v["error"] for v in values]

    table = Table(columns, None)
    for column in columns:
        column.entry["error"] = {}
    if images.val:
        values = measure("imagenet val", images.val, ("clean",))
        for column, value in zip(columns, values, strict=True):
            column.entry["clean"] = {"error": value}
        table.row("imagenet val", values)
    for name in args.corruptions:
        for severity in args.severities:
            kind = name, severity
            found = images.corrupted(*kind)
            values = measure(f"{name} {severity}", found, kind)
            for column, value in zip(columns, values, strict=True):
                column.entry["error"].setdefault(name, []).append(value)
        means = [sum(column.entry["error"][name]) / len(args.severities) for column in columns]
        table.row(name, means)
    if set(corruptions.NAMES) <= set(args.corruptions) and len(args.severities) == 5:
        for column in columns:
            means = {n: sum(column.entry["error"][n]) / 5 for n in corruptions.NAMES}
            column.entry["mean_corruption_error"] = sum(means.values()) / 15
            column.entry["mCE"] = mean_ce(means)
        for title, key in (("mean (15 x 5)", "mean_corruption_error"), ("mCE", "mCE")):
            table.row(title, [column.entry[key] for column in columns])
    else:
        print("mCE: needs all 15 corruptions and 5 severities")
    for name in ("imagenet-a", "imagenet-r", "imagenet-sketch"):
        if not any((images.dir / n).is_dir() for n in data.SETS[name].folders):
            print(f"{name}: not in {images.dir}")
            continue
        values = measure(name, images.own(name), (name,))
        for column, value in zip(columns, values, strict=True):
            column.entry[name] = value
        table.row(name, values)


def mean_ce(errors):
    """mCE in % of {corruption: error in %, mean over the severities}."""
    return sum(errors[name] / alexnet for name, alexnet in ALEXNET.items()) / len(ALEXNET)


# --- main -----------------------------------------------------------------------------------------


def main(args):
    device = run.get_device(args.device)
    precision = run.Precision(args.precision, device)
    networks, name = models.for_evaluation(args, device)
    if name in data.IMAGENET:
        return evaluate_imagenet(args, networks, device, precision)
    return evaluate_arrays(args, networks, name, device, precision)


if __name__ == "__main__":
    run.cli(main, parse_args)
