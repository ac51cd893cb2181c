"""Tables over seeds, from the JSON that the other eval scripts write.

    python eval/tables.py eval/results/ct_cifar10_{none,bn,ct}.json
    python eval/tables.py runs                       # every result of networks below the folder
    python eval/tables.py eval/results/nofrost_cifar10.json --per-seed
    python eval/tables.py runs/*/last.adversarial.json --scatter clean,apgd-ce trade-off.svg

Checkpoints that differ in nothing but the seed form a row: mean +- sample standard deviation over
the seeds, and their number n. A row is named by the options in which the rows differ. The same
network counts once, however many files hold it.
"""

import json
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from common import run

COLUMNS = {  # title: path in a checkpoint's entry; percent
    "clean error": ("clean", "error"),
    "mean corruption error": ("mean_corruption_error",),
    "extra (4)": ("extra_error",),
    "ECE clean": ("clean", "ece"),
    "ECE corrupted": ("mean_corruption_ece",),
}
VARIANT_COLUMNS = {  # of fixup_penalty_cifar10.json
    "clean error": ("error",),
    "ECE": ("ece",),
    "training loss": ("training_loss",),
    "embedding": ("embedding",),
    "logits": ("logits",),
}
STAGE_COLUMNS = {"clean error": ("error",), "mean corruption error": ("corrupted",)}
FACTS = ("dataset", "split", "images", "source", "corruptions", "severities", "precision")
ATTACK_FACTS = ("dataset", "split", "images", "norm", "eps", "attacks", "precision")
NOT_OPTIONS = {"seed", "log_every", "save_every", "eval_every", "corrupted_images", "baseline"}
NOT_OPTIONS |= {"keep", "save_minutes", "out", "data_dir", "workers", "device"}
FOREIGN = "no result of eval/corruptions.py or adversarial.py"


def parse_args(argv=None):
    parser = run.Parser(__file__, __doc__)
    parser.add_argument("files", nargs="+", help="JSON files of eval scripts, or folders of them")
    parser.add_argument("--per-seed", action="store_true", help="print every seed's number too")
    parser.add_argument("--names", type=lambda text: text.split(","), help="titles of the rows")
    parser.add_argument(
        "--scatter", nargs=2, metavar=("X,Y", "SVG"), help="draw two columns against each other"
    )
    run.add_table_arguments(parser)
    return parser.parse_args(argv)


def find(paths):
    """The files, and the results below the folders. Raises UserError where a folder has none."""
    found = []
    for path in map(Path, paths):
        if not path.is_dir():
            found.append(path)
            continue
        inside = [p for p in sorted(path.rglob("*.json")) if is_result(p)]
        if not inside:
            raise run.UserError(
                f"{path}: no results of eval/corruptions.py or adversarial.py there"
            )
        found += inside
    return list({path.resolve(): path for path in found}.values())


def is_result(path):
    """Whether a file in a folder holds a table of checkpoints."""
    try:
        read(path)
    except run.UserError:
        return False
    return True


def read(path):
    """The results in a file, a list of dicts; UserError when there are none."""
    try:
        content = json.loads(Path(path).read_text())
        if "checkpoints" not in content:
            return [of_training(path, content)] if "runs" in content else of_parts(content)
        return [of_evaluation(content)]
    except OSError as error:
        raise run.UserError(f"{path}: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise run.UserError(f"{path}: {FOREIGN} ({error!r})") from None


def of_parts(content):
    """The results of a file that has one for each seed, as nofrost_cifar10.json."""
    if not content:
        raise KeyError("checkpoints")
    return [of_evaluation(part) for part in content.values()]


def of_evaluation(content):
    content = content.get("settings", {}) | content
    return {key: content[key] for key in (*facts(content), "checkpoints")}


def of_training(path, content):
    """The result in a record of trainings: fixup_penalty's variants, or ct.py's stages."""
    entries = []
    runs = content["runs"]
    if isinstance(runs, dict):
        for name, values in runs.items():
            variant, _, seed = name.rpartition("-s")
            options = {"variant": variant, "seed": int(seed)}
            entries.append({"error": values["error"], **values, "options": options})
        columns = VARIANT_COLUMNS
    else:
        for values in runs:
            for stage in ("teacher", "baseline", "student"):
                entry = {"error": values[f"error/{stage}"]}
                entry["corrupted"] = values.get(f"corrupted/{stage}")
                entries.append({**entry, "stage": stage, "options": {"seed": values["seed"]}})
        columns = STAGE_COLUMNS
    return {"kind": Path(path).name, "what": content["what"], "columns": columns,
            "checkpoints": entries}  # fmt: skip


def facts(result):
    """What must be equal for two files to share a table."""
    if "columns" in result:
        return ("kind",)
    return ATTACK_FACTS if "attacks" in result else FACTS


def columns(result):
    """{title: path in a checkpoint's entry}, percent."""
    if "columns" in result:
        return result["columns"]
    if "attacks" not in result:
        return COLUMNS
    rows = {row: ("accuracy", row) for row in result["attacks"]}
    return {"clean": ("accuracy", "clean")} | rows


def settings(entry):
    """What tells one method from another: its options and its stage, without the seed."""
    options = {k: v for k, v in entry.get("options", {}).items() if k not in NOT_OPTIONS}
    if not options.get("lam"):  # without a teacher the rest of the method does nothing
        idle = ("distance", "match", "temperature", "student_init")
        options = {k: v for k, v in options.items() if k not in idle and "teacher" not in k}
    keys = ("method", "stage", "arch", "norm", "gamma", "adapt", "adapt_source")
    return options | {k: entry.get(k) for k in keys}


def identity(entry):
    """Equal for two entries of the same weights: their digest, else everything but the path."""
    if entry.get("weights"):
        return json.dumps([entry["weights"], settings(entry)], sort_keys=True)
    return json.dumps({k: v for k, v in entry.items() if k != "checkpoint"}, sort_keys=True)


def lookup(entry, keys):
    for key in keys:
        entry = entry.get(key) if isinstance(entry, dict) else None
    return entry


def grouped(results):
    """[(options, entries)]: the entries of one method, each network once."""
    entries = {}
    total = 0
    for result in results:
        for entry in result["checkpoints"]:
            total += 1
            entries.setdefault(identity(entry), entry)
    if len(entries) < total:
        again = total - len(entries)
        print(f"{again} results of networks already read: each counts once", file=sys.stderr)
    groups = {}
    for entry in entries.values():
        groups.setdefault(json.dumps(settings(entry), sort_keys=True), []).append(entry)
    return [(json.loads(key), group) for key, group in groups.items()]


def described(first):
    """The line below the table: what the numbers are."""
    if "what" in first:
        return first["what"]
    start = f"{first['dataset']} {first['split']}, {first['images']} images; "
    if "attacks" in first:
        return start + (
            f"{first['norm']} eps {first['eps']:g}/255; attacked in {first['precision']}; "
            "accuracy in %"
        )
    return start + (
        f"{first['source']}; {len(first['corruptions'])} corruptions, severities "
        f"{first['severities']}; evaluated in {first['precision']}; error and ECE in %"
    )


def draw(scatter, shown, titles, groups):
    """Write the SVG of --scatter: a point for each row, bars of one standard deviation."""
    names, path = scatter[0].split(","), scatter[1]
    if len(names) != 2 or not set(names) <= set(shown):
        raise run.UserError(f"--scatter {scatter[0]}: two of these columns: {', '.join(shown)}")
    points = {}
    for title, (_, entries) in zip(titles, groups, strict=True):
        point = []
        for name in names:
            values = [lookup(entry, shown[name]) for entry in entries]
            if None not in values:
                deviation = statistics.stdev(values) if len(values) > 1 else 0.0
                point += [statistics.mean(values), deviation]
        if len(point) == 4:
            points[title] = point
    if not points:
        raise run.UserError(f"--scatter {scatter[0]}: no row has both columns")
    across, up = (name if "loss" in name else f"{name} (%)" for name in names)
    try:
        run.scatter_chart(path, f"{names[1]} against {names[0]}", points, across, up)
    except OSError as error:
        raise run.UserError(f"cannot write {path}: {error.strerror}") from None
    print(f"written: {path}")


def main(args):
    results = [result for path in find(args.files) for result in read(path)]
    for result in results[1:]:
        for fact in facts(results[0]):
            if result.get(fact) != results[0].get(fact):
                raise run.UserError(
                    f"the files differ in {fact} ({results[0].get(fact)}, {result.get(fact)}): "
                    "their numbers do not belong into one table"
                )
    shown = columns(results[0])
    groups = grouped(results)
    titles = run.row_titles([options for options, _ in groups])
    if args.names:
        if len(args.names) != len(titles):
            raise run.UserError(f"--names: {len(args.names)} names for {len(titles)} rows")
        titles = args.names
    header = ["", *shown, "n"]
    rows = []
    for title, (_, entries) in zip(titles, groups, strict=True):
        cells = [[lookup(entry, keys) for entry in entries] for keys in shown.values()]
        rows.append([title, *map(run.mean_sd, cells), len(entries)])
        if args.per_seed:
            for i, entry in enumerate(entries):
                numbers = ["-" if values[i] is None else values[i] for values in cells]
                rows.append([f"  seed {entry['options'].get('seed')}", *numbers, ""])
    form = run.form_of(args)
    print(run.format_table(rows, header, form))
    if form in ("text", "markdown"):
        print("\n" + described(results[0]))
    if args.scatter:
        draw(args.scatter, shown, titles, groups)
    return {row[0]: dict(zip(header[1:], row[1:], strict=True)) for row in rows}


if __name__ == "__main__":
    run.cli(main, parse_args)
