"""Tables over seeds, from the JSON that the other eval scripts write.

    python eval/tables.py eval/results/headline_question_small.json
    python eval/tables.py runs                       # every result of networks below the folder
    python eval/tables.py eval/results/nofrost_cifar10.json --per-seed
    python eval/tables.py runs/*/last.adversarial.json --scatter clean,apgd-ce trade-off.svg

Checkpoints that differ in nothing but the seed form a row: mean +- sample standard deviation over
the seeds, and their number n. A cell that some seeds lack says how many have it. A row is named by
the fewest options that tell the rows apart. The same network counts once, however many files hold
it. A folder gives a table for each kind of evaluation and each setting below it. Files that are
named must belong into one table.
"""

import json
import re
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from common import run
from eval import table_files

SEED = re.compile(r"-s(\d+)$")  # at the end of the stage, where one run trains several seeds


def parse_args(argv=None):
    parser = run.Parser(__file__, __doc__)
    parser.add_argument("files", nargs="+", help="JSON files of eval scripts, or folders of them")
    parser.add_argument("--per-seed", action="store_true", help="print every seed's number too")
    parser.add_argument("--names", type=run.listed(str), help="titles of the rows")
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
        inside = [p for p in sorted(path.rglob("*.json")) if table_files.is_result(p)]
        if not inside:
            raise run.UserError(f"{path}: no results of eval/*.py there")
        found += inside
    return list({path.resolve(): path for path in found}.values())


def settings(entry, options):
    """What tells one method from another: its options, see `run.method_options`, and its stage."""
    if not options.get("lam"):  # without a teacher the rest of the method does nothing
        idle = ("distance", "match", "temperature", "student_init")
        options = {k: v for k, v in options.items() if k not in idle and "teacher" not in k}
    keys = ("method", "stage", "arch", "norm", "gamma", "adapt", "adapt_source", "unfinished")
    own = {k: entry[k] for k in keys if entry.get(k) is not None}
    if "stage" in own:
        own["stage"] = SEED.sub("", own["stage"])
    # What else the run trained: the network is named by its own normaliser and stage.
    others = {"norms": "norm", "variants": "stage"}
    return {k: v for k, v in options.items() if others.get(k) not in own} | own


def seed_of(entry, other):
    """The seed of an entry; `other` where it names none."""
    found = SEED.search(entry.get("stage") or "")
    return found[1] if found else entry.get("options", {}).get("seed", other)


def identity(entry):
    """Equal for two entries of the same weights: their digest, else everything but the path."""
    if entry.get("weights"):
        (options,) = run.method_options([entry])
        return json.dumps([entry["weights"], settings(entry, options)], sort_keys=True)
    return json.dumps({k: v for k, v in entry.items() if k != "checkpoint"}, sort_keys=True)


def lookup(entry, keys):
    for key in keys:
        entry = entry.get(key) if isinstance(entry, dict) else None
    return entry


def grouped(entries):
    """[(options, entries)]: the entries of one method, each network once."""
    once = {}
    for entry in entries:
        once.setdefault(identity(entry), entry)
    if len(once) < len(entries):
        again = len(entries) - len(once)
        print(f"{again} results of networks already read: each counts once", file=sys.stderr)
    groups = []
    networks = list(once.values())
    for entry, options in zip(networks, run.method_options(networks), strict=True):
        own = settings(entry, options)
        group = next((group for other, group in groups if other == own), None)
        if group is None:
            groups.append((own, [entry]))
        else:
            group.append(entry)
    return groups


def tables_of(results, *, several):
    """[(result, entries)]: what belongs into one table. Raises UserError where that is more than
    one table and not `several`."""
    tables = {}
    for result in results:
        key = json.dumps([result.kind, result.facts], sort_keys=True)
        first, entries = tables.setdefault(key, (result, []))
        first.columns.update(result.columns)
        entries += result.entries
    tables = list(tables.values())
    if several or len(tables) == 1:
        return tables
    first, second = tables[0][0], tables[1][0]
    if first.kind != second.kind:
        raise run.UserError(
            f"the files are of {first.kind} and of {second.kind}: their numbers do not belong into "
            "one table; give each alone, or a folder"
        )
    fact = next(f for f in first.facts if first.facts[f] != second.facts[f])
    raise run.UserError(
        f"the files differ in {fact} ({first.facts[fact]}, {second.facts[fact]}): their numbers do "
        "not belong into one table"
    )


def draw(scatter, columns, titles, groups):
    """Write the SVG of --scatter: a point for each row, bars of one standard deviation."""
    names, path = scatter[0].split(","), scatter[1]
    if len(names) != 2 or len(set(names)) < 2 or not set(names) <= set(columns):
        raise run.UserError(f"--scatter {scatter[0]}: two of these columns: {', '.join(columns)}")
    points = {}
    for title, (_, entries) in zip(titles, groups, strict=True):
        point = []
        for name in names:
            values = [lookup(entry, columns[name]) for entry in entries]
            if None not in values:
                deviation = statistics.stdev(values) if len(values) > 1 else 0.0
                point += [statistics.mean(values), deviation]
        if len(point) == 4:
            points[title] = point
    if not points:
        raise run.UserError(f"--scatter {scatter[0]}: no row has both columns")
    across, up = (f"{name} (%)" if is_percent(name) else name for name in names)
    try:
        run.scatter_chart(path, f"{names[1]} against {names[0]}", points, across, up)
    except OSError as error:
        raise run.UserError(f"cannot write {path}: {error.strerror}") from None
    print(f"written: {path}")


def is_percent(column):
    """Whether the numbers of a column are percent, and its title does not say so."""
    words = ("error", "ece", "clean", "accuracy", "pgd", "apgd", "auto", "worst", "fab", "square")
    found = any(word in column.lower() for word in words)
    return found and "%" not in column


def rows_of(columns, titles, groups, *, per_seed):
    """The rows of a table: title, mean +- deviation of each column, n; below it each seed."""
    rows = []
    for title, (_, entries) in zip(titles, groups, strict=True):
        cells = [[lookup(entry, keys) for entry in entries] for keys in columns.values()]
        rows.append([title, *map(run.mean_sd, cells), len(entries)])
        for i, entry in enumerate(entries if per_seed else ()):
            numbers = ["-" if values[i] is None else values[i] for values in cells]
            rows.append([f"  seed {seed_of(entry, i)}", *numbers, ""])
    return rows


def main(args):
    """Print the tables; returns {title of a row: {column: cell}}, where there are several tables
    with the kind of the table before the title."""
    results = [result for path in find(args.files) for result in table_files.read(path)]
    tables = tables_of(results, several=any(Path(path).is_dir() for path in args.files))
    if len(tables) > 1 and (args.names or args.scatter):
        kinds = ", ".join(result.kind for result, _ in tables)
        raise run.UserError(
            f"--names and --scatter are for one table, here are {len(tables)} ({kinds}): name the "
            "files"
        )
    form, every = run.form_of(args), {}
    for number, (result, entries) in enumerate(tables):
        groups = grouped(entries)
        titles = run.row_titles([options for options, _ in groups])
        if args.names:
            if len(args.names) != len(titles):
                raise run.UserError(f"--names: {len(args.names)} names for {len(titles)} rows")
            titles = args.names
        header = ["", *result.columns, "n"]
        rows = rows_of(result.columns, titles, groups, per_seed=args.per_seed)
        if len(tables) > 1:
            print(("\n" if number else "") + f"{result.kind}\n")
        print(run.format_table(rows, header, form))
        if form in ("text", "markdown"):
            print("\n" + result.what)
        if args.scatter:
            draw(args.scatter, result.columns, titles, groups)
        start = f"{result.kind}: " if len(tables) > 1 else ""
        every |= {start + row[0]: dict(zip(header[1:], row[1:], strict=True)) for row in rows}
    return every


if __name__ == "__main__":
    run.cli(main, parse_args)
