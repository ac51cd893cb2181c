"""Who leans on a faint shortcut: how early, and from which size on? A study of this repository.

    python eval/shortcut.py shapes                   # against training steps, one line a normaliser
    python eval/shortcut.py cifar10 --data-dir data  # against the size of the grating
    python eval/shortcut.py recipe --data-dir data   # against epochs, rate and batch size
    python eval/shortcut.py cifar10 --draw           # the figure of what is finished

Every training image carries a grating that tells its class (common/data/shortcut.py). In the test
set "swapped" it is that of another class. A network that reads the grating then answers wrongly; a
network that looks at the picture does not notice. So the swapped accuracy measures the reliance.

Each network is one row {data, norm, levels, seed, ...} of a JSON file, written when it is finished.
A run that was stopped goes on with the rows that are missing. Table and figure hold the rows with
the epochs and images asked for; seeds of different recipes are never averaged. `ct` is the student
of ct.py with BatchNorm; its teacher is the network `none` of the same seed and size.

What limits the study: one kind of pattern, drawn by us; one small architecture; one recipe for each
normaliser. Networks without a normaliser train twice as long as those with one.
"""

import itertools
import json
import math
import statistics
import sys
import time
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from common import data, models, run

RESULTS = run.ROOT / "eval" / "results"
RUNS = run.ROOT / "runs" / "shortcut"
ARCH = "wrn10-1"


class Recipe(NamedTuple):
    """How one network trains."""

    epochs: int
    lr: float = 0.1  # peak rate
    clip: float = 0.0  # largest gradient norm; 0: none
    batch_size: int = 128


LONG = {"none": Recipe(16, 0.2, 1.0), "nf": Recipe(16, 0.3, 1.0), "fixup": Recipe(16, 0.1, 1.0)}
STUDIES = {  # recipes: of single networks; all others have `usual`. all: its training images
    "shapes": {
        "data": "shapes-shortcut", "all": 10_000, "limit": 0, "sizes": [3.0],
        "norms": ["bn", "none", "gn", "ln", "in", "nf", "fixup"],
        "usual": Recipe(20), "recipes": {k: r._replace(epochs=20) for k, r in LONG.items()},
    },
    "cifar10": {
        "data": "cifar10", "all": 50_000, "limit": 20_000,
        "sizes": [1.0, 0.5, 2.0, 0.0, 0.75, 3.0, 0.25, 4.0, 5.0],  # the telling ones first
        "norms": ["bn", "none", "ct", "gn", "nf", "fixup"],
        "usual": Recipe(8), "recipes": LONG,
    },
}  # fmt: skip
STUDIES["recipe"] = STUDIES["cifar10"] | {"sizes": [0.5], "norms": ["bn", "none"]}
CHANGES = {  # of the study `recipe`: factors of the usual recipe
    "usual": {},
    "half the epochs": {"epochs": 0.5},
    "twice the epochs": {"epochs": 2},
    "half the rate": {"lr": 0.5},
    "twice the rate": {"lr": 2},
    "half the batch": {"batch_size": 0.5},
    "twice the batch": {"batch_size": 2},
}
SWAPPED = "accuracy with the grating swapped, %"
AXES = {
    "shapes": ("training steps", SWAPPED),
    "cifar10": ("size of the grating, grey levels of 255", SWAPPED),
    "recipe": ("accuracy with the grating removed, %", "accuracy that swapping it costs, points"),
}
KEYS = ("data", "norm", "levels", "change", *Recipe._fields, "images", "seed")  # of a row
ORDER = ["bn", "none", "ct", "gn", "ln", "in", "nf", "fixup", *models.NORMS]  # of table and figure
LAM = 20.0  # of CT, with the cosine of pooled features
FEW = 1000  # test images of the accuracies before the end
MOMENTUM, WEIGHT_DECAY = 0.9, 5e-4


def parse_args(argv=None):
    parser = run.Parser(__file__, __doc__)
    parser.add_argument("study", choices=list(STUDIES), help="study")
    parser.add_argument("--data-dir", default="data", help="where the data sets are")
    parser.add_argument("--norms", type=run.listed(str), help="default: those of the study")
    parser.add_argument("--sizes", type=run.listed(data.shortcut.levels), help="grey levels")
    parser.add_argument(
        "--seeds", type=run.positive(int), default=3, help="number of seeds, from 0 on"
    )
    parser.add_argument("--limit", type=run.nonnegative(int), help="training images; 0: all")
    parser.add_argument("--epochs", type=run.positive(int), help="of every network")
    parser.add_argument(
        "--json", type=Path,
        help="the rows (default: eval/results/shortcut_<study>.json; with other --epochs or "
        "--limit a file in --runs)",
    )  # fmt: skip
    parser.add_argument(
        "--runs", type=Path, default=RUNS,
        help="folder of the networks that teach `ct` (default: runs/shortcut)",
    )  # fmt: skip
    parser.add_argument("--draw", action="store_true", help="draw the figure and train nothing")
    args = parser.parse_args(argv)
    study = STUDIES[args.study]
    args.norms = args.norms or study["norms"]
    args.sizes = args.sizes or study["sizes"]
    args.limit = study["limit"] if args.limit is None else args.limit
    args.images = args.limit or study["all"]
    args.json = args.json or default_json(args, study)
    if args.json.suffix == ".svg":
        raise run.UserError(f"--json {args.json}: the figure is written there; give another name")
    if args.study == "recipe" and args.epochs == 1:
        raise run.UserError("--epochs 1 has no half: give 2 or more for this study")
    known = {*models.NORMS, "ct"}
    if unknown := set(args.norms) - known:
        raise run.UserError(f"--norms {', '.join(sorted(unknown))}: choose from {sorted(known)}")
    return args


def default_json(args, study):
    """The published file of a study, or a file of its own for other epochs or images."""
    epochs = f"-e{args.epochs}" if args.epochs else ""
    images = "" if args.images == (study["limit"] or study["all"]) else f"-n{args.images}"
    if epochs or images:
        return args.runs / f"{args.study}{epochs}{images}.json"
    return RESULTS / f"shortcut_{args.study}.json"


def recipe_of(norm, study, epochs=None, change="usual"):
    """The recipe of a network in one of STUDIES, for other epochs, with one of CHANGES."""
    recipe = study["recipes"].get(norm, study["usual"])
    if epochs:
        recipe = recipe._replace(epochs=epochs)
    kinds = {"epochs": int, "lr": float, "batch_size": int}
    new = {k: kinds[k](getattr(recipe, k) * factor) for k, factor in CHANGES[change].items()}
    return recipe._replace(**new)


def lr_at(step, total, peak, warmup):
    """Linear warm-up over `warmup` steps, then half a cosine to 0 at `total`."""
    if step < warmup:
        return peak * (step + 1) / warmup
    return 0.5 * peak * (1 + math.cos(math.pi * (step - warmup) / max(total - warmup, 1)))


def build(norm, seed, dataset):
    """A network whose weights depend on the seed and the normaliser alone."""
    torch.manual_seed(run.seed_key(seed, "init"))
    model = models.build(ARCH, "bn" if norm == "ct" else norm, **dataset.model_kwargs)
    return model.to(memory_format=torch.channels_last)


def accuracies(model, dataset, precision, few=None):
    """{"clean", "without", "swapped": accuracy %} on the first `few` test images, or all. Without
    a grating in the data set the three are the same."""
    tests = dict.fromkeys(("clean", "without", "swapped"), dataset.test) | dataset.shortcut_tests
    found = {}
    for name, images in tests.items():
        if images is dataset.test and found:
            found[name] = found["clean"]
            continue
        part = images.take(slice(0, few)) if few else images
        found[name] = round(100 - run.evaluate(model, part, precision)["error"], 3)
    return found


def train(norm, seed, dataset, recipe, precision, teacher=None):
    """Train a network. Returns it and its curve: after every epoch {"step", "loss" of that batch,
    "clean", "without", "swapped"}."""
    model = build(norm, seed, dataset)
    # Fixup's scalars learn slowly. `models.fixup_groups` also slows the classifier's bias, as its
    # authors do; the rows of the study were measured without that.
    slow, rest = [], []
    for parameter in model.parameters():
        (slow if norm == "fixup" and parameter.numel() == 1 else rest).append(parameter)
    groups = [{"params": rest, "scale": 1.0}, {"params": slow, "scale": 0.1}]
    optimizer = torch.optim.SGD(
        groups, recipe.lr, MOMENTUM, weight_decay=WEIGHT_DECAY, nesterov=True
    )  # fmt: skip
    batches = data.Batches(dataset.train, recipe.batch_size, seed, augment=True, flip=dataset.flip)
    total, curve = recipe.epochs * batches.per_epoch, []
    for step in range(total):
        model.train()
        for group in optimizer.param_groups:
            group["lr"] = group["scale"] * lr_at(step, total, recipe.lr, batches.per_epoch)
        x, y = batches(step)
        with precision.autocast():
            logits, f_s = model(x, with_features=True)
        loss = F.cross_entropy(logits, y)
        if teacher is not None:
            with torch.no_grad(), precision.autocast():
                _, f_t = teacher(x, with_features=True)
            loss = loss + LAM * (1 - F.cosine_similarity(f_s, f_t, dim=1).mean())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.clip or math.inf)
        optimizer.step()
        done = step + 1
        if done % batches.per_epoch == 0:
            curve.append({"step": done, "loss": round(loss.item(), 4)})
            few = None if done == total else FEW
            curve[-1] |= accuracies(model.eval(), dataset, precision, few)
    return model.eval(), curve


def read(path):
    """The finished rows of a JSON file, [] where there is none. UserError where it is broken."""
    if not path.is_file():
        return []
    try:
        return [completed(row) for row in json.loads(path.read_text())["rows"]]
    except (ValueError, KeyError, TypeError):
        raise run.UserError(f"{path}: holds no rows of this study; give --json elsewhere") from None


def completed(row):
    """A row with all of KEYS. Older rows lack change and recipe: theirs were those of the study."""
    study = {study["data"]: study for study in STUDIES.values()}[row["data"]]
    return {"change": "usual", **recipe_of(row["norm"], study)._asdict(), **row}


def add(row, path, args):
    """Add a row to the file. The rows before it stay as they are."""
    rows = json.loads(path.read_text())["rows"] if path.is_file() else []
    about = {"command": f"python eval/shortcut.py {args.study}", "arch": ARCH, "lam": LAM}
    run.write_json(path, about | {"versions": run.versions(), "rows": [*rows, run.finite(row)]})


def key_of(row):
    """What no two rows share; without its end, the seed, what a mean is over."""
    return tuple(row[key] for key in KEYS)


def asked_for(row, args):
    """Whether a row has the data, the images and the recipe of the study on the command line."""
    study, change = STUDIES[args.study], row["change"]
    if change not in (CHANGES if args.study == "recipe" else ("usual",)):
        return False
    recipe = recipe_of(row["norm"], study, args.epochs, change)._asdict()
    return (recipe | {"data": study["data"], "images": args.images}).items() <= row.items()


def timed(*args):
    """The network of `train` and its {"cpu_seconds", "curve"}."""
    begun = time.process_time()
    model, curve = train(*args)
    return model, {"cpu_seconds": round(time.process_time() - begun, 1), "curve": curve}


def plain(row, recipe, dataset, args, precision):
    """The network `none` of a row's size and seed, and its {"cpu_seconds", "curve"}.

    It is trained where --runs does not hold it, or holds a file that is broken."""
    facts = row["data"], f"{float(row['levels'])}", f"n{args.images}", *map(str, recipe)
    path = args.runs / f"{'-'.join([ARCH, 'none', *facts])}-s{row['seed']}.pt"
    if path.is_file():
        try:
            checkpoint = run.load_checkpoint(path)
            return models.from_checkpoint(checkpoint), checkpoint["found"]
        except (run.UserError, KeyError) as error:
            print(f"trained again: {error}", file=sys.stderr)
    model, found = timed("none", row["seed"], dataset, recipe, precision)
    checkpoint = {"model": model.state_dict(), "found": found, "dataset": row["data"]}
    run.save_checkpoint(path, model.spec | checkpoint)
    return model, found


def train_row(row, dataset, args, precision):
    """Train the network of a row; returns its {"cpu_seconds", "curve"}."""
    recipe, teacher = Recipe(*(row[key] for key in Recipe._fields)), None
    if row["norm"] == "none":
        return plain(row, recipe, dataset, args, precision)[1]
    if row["norm"] == "ct":
        teacher, _ = plain(
            row, recipe_of("none", STUDIES[args.study], args.epochs), dataset, args, precision
        )
        teacher.to(memory_format=torch.channels_last).requires_grad_(requires_grad=False)
    return timed(row["norm"], row["seed"], dataset, recipe, precision, teacher)[1]


def place_of(row):
    """Where a row stands in the table."""
    return list(CHANGES).index(row["change"]), row["levels"], ORDER.index(row["norm"])


def markdown(rows):
    """A table of what the rows say at their end: accuracy in %, mean +- deviation over seeds."""
    groups = {}
    for row in rows:
        groups.setdefault(key_of(row)[:-1], []).append(row)
    recipes = len({row["change"] for row in rows}) > 1
    lines = []
    for found in sorted(groups.values(), key=lambda group: place_of(group[0])):
        first, ends = found[0], [row["curve"][-1] for row in found]
        cells = [first["change"]] if recipes else []
        cells += [f"{first['levels']:g}", f"`{first['norm']}`"]
        for name in ("clean", "without", "swapped"):
            cells.append(run.mean_sd([end[name] for end in ends], ".1f"))
        lines.append([*cells, len(found)])
    header = ["recipe"] if recipes else []
    header += ["grey levels", "network", "clean", "grating removed", "grating swapped", "seeds"]
    return run.format_table(lines, header, "markdown")


def points_of(row, study, line):
    """[(line, place on it, x, y)] of a row in the figure of a study, see `figure`."""
    end = row["curve"][-1]
    if study == "shapes":
        return [(line, at["step"], at["step"], at["swapped"]) for at in row["curve"]]
    if study == "cifar10":
        return [(row["norm"], row["levels"], row["levels"], end["swapped"])]
    factors = CHANGES[row["change"]]
    at = end["without"], end["clean"] - end["swapped"]
    options = {"epochs": "epochs", "lr": "rate", "batch_size": "batch"}
    return [
        (f"{line}, {title}", factors.get(option, 1), *at)
        for option, title in options.items() if option in factors or not factors
    ]  # fmt: skip


def figure(rows, study, path):
    """The SVG: swapped accuracy against steps (shapes) or the grating's size (cifar10).

    recipe: what swapping costs against the accuracy without the grating. A line joins half, usual
    and twice of one option. Points are means over seeds, bars their deviation."""
    several, points = len({row["levels"] for row in rows}) > 1, {}
    for row in sorted(rows, key=lambda row: ORDER.index(row["norm"])):
        title = f"{row['norm']}, {row['levels']:g}" if several else row["norm"]
        for line, place, *point in points_of(row, study, title):
            points.setdefault(line, {}).setdefault(place, []).append(point)
    lines = {}
    for line, places in points.items():
        lines[line] = []
        for _, found in sorted(places.items()):
            xs, ys = zip(*found, strict=True)
            spread = statistics.stdev(ys) if len(ys) > 1 else 0.0
            lines[line].append((statistics.mean(xs), statistics.mean(ys), spread))
        if lines[line][0] > lines[line][-1]:  # the name stands at the right end
            lines[line].reverse()
    run.line_plot(path, lines, *AXES[study])


def main(args):
    run.try_file(args.json, "--json")
    if not args.draw:
        run.try_folder(args.runs, "--runs")
    precision = run.Precision("auto", "cpu")
    finished = {key_of(row) for row in read(args.json)}
    study = STUDIES[args.study]
    changes = list(CHANGES) if args.study == "recipe" else ["usual"]
    wanted = itertools.product(range(args.seeds), args.sizes, changes, args.norms)
    dataset, loaded = None, None
    for seed, levels, change, norm in () if args.draw else wanted:
        row = {"data": study["data"], "norm": norm, "levels": levels, "seed": seed}
        row |= {"change": change, **recipe_of(norm, study, args.epochs, change)._asdict()}
        row["images"] = args.images
        if key_of(row) in finished:
            continue
        if loaded != levels:
            options = {"limit": args.limit, "shortcut_levels": levels}
            dataset, loaded = data.load(study["data"], args.data_dir, **options), levels
            if (count := len(dataset.train)) != args.images:
                raise run.UserError(f"{study['data']}: {count} images here; give --limit {count}")
        row |= train_row(row, dataset, args, precision)
        add(row, args.json, args)
        ends = "  ".join(f"{k} {v:.2f}" for k, v in row["curve"][-1].items())
        print(f"{norm}, {levels:g} levels, {change}, seed {seed}: {ends}", flush=True)
    every = read(args.json)
    rows = [row for row in every if asked_for(row, args)]
    if not rows:
        raise run.UserError(f"{args.json}: no finished network to draw; run without --draw first")
    if len(rows) < len(every):
        print(f"{len(every) - len(rows)} rows of other epochs, images or recipes are left out")
    print(f"\naccuracy in %, mean +- standard deviation over seeds\n\n{markdown(rows)}")
    figure(rows, args.study, args.json.with_suffix(".svg"))
    print(f"figure: {args.json.with_suffix('.svg')}")


if __name__ == "__main__":
    run.cli(main, parse_args)
