"""Accuracy on domains that training has not seen, as one table.

    python ct.py --dataset pacs --test-domain all --seed 0 --out runs/pacs/0     # and seeds 1, 2
    python eval/domains.py runs/pacs --data-dir data
    python eval/domains.py runs/camelyon/last.pt
    python eval/domains.py runs/in9/last.pt torchvision:resnet50 runs/imagenet/last.pt

Finds the checkpoints below the folders that are given and evaluates each on the domain that its
training left out: with --test-domain those of the epoch that the training domains' validation
images chose (best.pt, <stage>-best.pt; DomainBed's "training-domain validation"). Columns are
domains. "average" is taken over the domains for every seed, then over the seeds; +- is the sample
standard deviation over the seeds.

Trained on camelyon17's official splits, the columns are id_val, val (hospital 1) and test (hospital
2); on IN-9, original, mixed-same, mixed-rand and the BG-gap, mixed-same less mixed-rand. Networks
of ImageNet's 1000 classes are tested on IN-9 as its authors do: right is an answer among the
classes that IN-9 joins into the label's. Percent.
"""

import json
import statistics
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from common import data, models, run
from common.data import trees

PATHS = ("out", "data_dir", "teacher", "device", "pretrained", "workers")


def parse_args(argv=None):
    parser = run.Parser(__file__, __doc__)
    parser.add_argument("checkpoints", nargs="+", help="run directories, folders of them, or files")
    parser.add_argument(
        "--arch", metavar="FILE.py:NAME", help="your network that was trained, whose code then runs"
    )
    parser.add_argument("--data-dir", default="data", help="where the data sets are")
    parser.add_argument(
        "--batch-size", type=run.positive(int), default=250, help="images of a batch"
    )
    parser.add_argument(
        "--workers", type=run.nonnegative(int), help="processes that decode; default: cores"
    )
    parser.add_argument("--strict", action="store_true", help="stop at a file that is no image")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1 ...")
    parser.add_argument(
        "--precision",
        default="fp32",
        choices=["auto", "fp32", "bf16", "fp16"],
        help="of the forward pass",
    )
    parser.add_argument("--json", help="default: <name>.domains.json beside the first checkpoint")
    parser.add_argument(
        "--overwrite", action="store_true", help="replace results of other settings"
    )
    run.add_table_arguments(parser)
    return parser.parse_args(argv)


class Joined(torch.nn.Module):
    """Logits (N,10) of the nine classes of IN-9 and of all others, from those of ImageNet's 1000:
    of each group the largest, so that the predicted group is that of the predicted class."""

    def __init__(self, model):
        super().__init__()
        self.model = model
        self.register_buffer("group", trees.in9_of_imagenet())

    def forward(self, x):
        logits = self.model(x)
        lowest = logits.new_full((len(x), 10), -torch.inf)
        return lowest.scatter_reduce(1, self.group.expand(len(x), -1), logits, "amax")


def find(paths):
    """The checkpoint files below `paths`: of each run directory those that validation chose, else
    last.pt, baseline.pt and teacher.pt."""
    found = []
    for path in paths:
        if path.startswith("torchvision:"):
            found.append(path)
            continue
        path = Path(path)
        if not path.is_dir():
            found.append(path)
            continue
        for folder in sorted({p.parent for p in path.rglob("args.json")} | {path}):
            names = [f"{stage}-best.pt" for stage in ("teacher", "baseline")] + ["best.pt"]
            if not any((folder / name).is_file() for name in names):
                names = ["teacher.pt", "baseline.pt", "last.pt"]
            found += [folder / name for name in names if (folder / name).is_file()]
    if not found:
        raise run.UserError(f"{', '.join(paths)}: no checkpoints there")
    return list(dict.fromkeys(found))


def test_sets(dataset, domain, size, args, device):
    """{column: Images} on which a network trained so is tested."""
    options = {"device": device, "workers": args.workers, "strict": args.strict}
    if domain:
        options |= {"image_size": size, "test_domain": domain}
        return {domain: data.load(dataset, args.data_dir, **options).test}
    if dataset == "camelyon17":
        images, _, _, _, split = trees.read_camelyon17(Path(args.data_dir), size, options)
        number = {"id_val": 1, "val": 3, "test": 2}
        parts = {k: images.subset((split == n).nonzero().flatten()) for k, n in number.items()}
        return {k: part.to(device) for k, part in parts.items()}
    if dataset in data.IN9_TESTS:
        names = {"original": "in9", "mixed-same": "in9-mixed-same", "mixed-rand": "in9-mixed-rand"}
        folder = Path(args.data_dir)
        sets = {k: trees.read_in9_test(n, folder, size, options) for k, n in names.items()}
        return {k: images.to(device) for k, images in sets.items()}
    raise run.UserError(
        f"{dataset}: training left no domain out; use --test-domain, camelyon17 or in9"
    )


def evaluate(path, cache, args, precision, device):
    """Facts and accuracies (%) of one checkpoint: {"accuracy": {column: value}, ...}."""
    if str(path).startswith("torchvision:"):
        model = models.from_torchvision(path.partition(":")[2])
        checkpoint = model.spec | {"dataset": "imagenet", "method": "torchvision"}
    else:
        checkpoint = run.load_checkpoint(path)
        model = models.from_checkpoint(checkpoint, args.arch)
    models.say_unfinished(path, {"unfinished": models.unfinished(checkpoint)})
    options = checkpoint.get("args", {})
    domain, dataset = options.get("test_domain"), str(checkpoint.get("dataset"))
    if dataset in data.IMAGENET:
        dataset, model = "in9", Joined(model)
    key = (dataset, domain, checkpoint["image_size"])
    if key not in cache:
        cache[key] = test_sets(*key, args, device)
    model.to(device, memory_format=torch.channels_last)
    found = {}
    for column, images in cache[key].items():
        values = run.evaluate(model, images, precision, args.batch_size)
        found[column] = 100 - values["error"]
        if warning := run.not_finite(values):
            print(f"warning: {path}, {column}: {warning}", file=sys.stderr)
    if dataset in data.IN9_TESTS:
        found["BG-gap"] = found["mixed-same"] - found["mixed-rand"]
    facts = {k: checkpoint.get(k) for k in ("method", "stage", "arch", "norm", "step")}
    if models.unfinished(checkpoint):
        facts["unfinished"] = models.unfinished(checkpoint)
    facts |= {
        "dataset": dataset,
        "trained_on": checkpoint.get("dataset"),
        "checkpoint": str(path),
        "seed": options.get("seed"),
        "test_domain": domain,
    }
    facts["options"] = {k: v for k, v in options.items() if k not in PATHS}
    facts["val_error"] = checkpoint.get("metrics", {}).get("error")
    bad = {k: len(v.unreadable) for k, v in cache[key].items()}
    facts["images"] = {k: len(v.y) - bad[k] for k, v in cache[key].items()}
    facts["unreadable"] = bad
    return facts | {"accuracy": found}


def settings(entry, options):
    """What tells one row from another: the options, the stage, and where an unfinished training
    stands; without seed and domain."""
    keys = ("dataset", "trained_on", "method", "stage", "arch", "norm")
    options = {k: v for k, v in options.items() if k != "test_domain"} | {k: entry[k] for k in keys}
    return options | ({"unfinished": entry["unfinished"]} if "unfinished" in entry else {})


def tabulate(entries):
    """(header, rows): a row for each method, over its seeds."""
    columns = list(dict.fromkeys(c for e in entries for c in e["accuracy"]))
    domains = any(e["test_domain"] for e in entries)
    groups = {}
    for entry, own in zip(entries, run.method_options(entries), strict=True):
        seeds = groups.setdefault(json.dumps(settings(entry, own), sort_keys=True), {})
        found = seeds.setdefault(entry["seed"], {})
        for column, value in entry["accuracy"].items():
            if column in found:
                raise run.UserError(f"{entry['checkpoint']}: a second result for {column}")
            found[column] = value
    options = [json.loads(key) for key in groups]
    titles = run.row_titles(options)
    rows = []
    for title, seeds in zip(titles, groups.values(), strict=True):
        cells = []
        for column in columns:
            cells.append(run.mean_sd([found.get(column) for found in seeds.values()]))
        if domains:  # over the domains first, for seeds that have all of them
            whole = [f for f in seeds.values() if len(f) == len(columns)]
            means = [statistics.mean(found.values()) for found in whole]
            cells.append(run.mean_sd(means))
        rows.append([title, *cells, len(seeds)])
    return ["accuracy %", *columns, *(["average"] if domains else []), "seeds"], rows


def main(args):
    device = run.get_device(args.device)
    precision = run.Precision(args.precision, device)
    paths = find(args.checkpoints)
    settings = {"evaluated": [str(path) for path in paths], "precision": precision.name}
    first = str(paths[0]).replace("torchvision:", "")
    place = run.Results(
        "domains", first, settings, path=args.json, overwrite=args.overwrite, pictures=False
    )
    try:
        cache = {}
        entries = [evaluate(path, cache, args, precision, device) for path in paths]
        return report(entries, precision, place, run.form_of(args))
    finally:
        place.close()


def report(entries, precision, place, form):
    """Print the table in the form that was chosen and write it; returns what is written."""
    sets = sorted({e["dataset"] for e in entries})
    if len(sets) > 1:
        raise run.UserError(f"the checkpoints are of different data sets: {', '.join(sets)}")
    header, rows = tabulate(entries)
    print(run.format_table(rows, header, form))
    counts = {k: n for e in entries for k, n in e["images"].items()}
    print(f"\n{sets[0]}: {', '.join(f'{k} {n} images' for k, n in counts.items())}")
    return place.write(
        {
            "dataset": sets[0],
            "precision": precision.name,
            "table": [header, *rows],
            "checkpoints": entries,
        }
    )


if __name__ == "__main__":
    run.cli(main, parse_args)
