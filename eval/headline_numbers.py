"""The numbers of the headline tables: where they stand, and which of them are published.

`collect` takes them from the logs of trainings and the JSON of evaluations on this machine. It
keeps those that the results file already holds, where this machine does not know better.
"""

import math
import re
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from common import run
from eval.headline_jobs import (
    all_jobs,
    command_of,
    entries_of,
    evaluation_command,
    final_numbers,
    finished,
    made_by_another,
    mark,
    read_json,
    result_file,
    run_folder,
    trained_on,
    trainings_of,
)


def number(args, scale, row, path, seed):
    """The number that a path of `Scale.columns` leads to, None where it is not there."""
    source, *keys = [k.format(stage=row.stage) if isinstance(k, str) else k for k in path]
    if source == "100 -":
        value = number(args, scale, row, keys, seed)
        return None if value is None else 100 - value
    if source.startswith("run"):
        name = source.removeprefix("run").strip() or row.run
        product, command = run_folder(args, name, seed), command_of(scale, name)
        content = final_numbers(product)
    else:
        product = result_file(args, row, source, seed)
        command = evaluation_command(scale, row, source)
        entry = keys.pop(0) if isinstance(keys[0], int) else 0
        content = dict(enumerate(entries_of(read_json(product)))).get(entry)
    for key in keys:
        content = content.get(key) if isinstance(content, dict) else None
    is_number = isinstance(content, (int, float)) and math.isfinite(content)
    return content if is_number and not made_by_another(product, command) else None


def diverged(args, row, seed):
    """The step at which the network of a row diverged, None where it did not."""
    final = final_numbers(run_folder(args, row.run, seed)) or {}
    return final.get(f"diverged/{row.stage}")


def numbers_of(args, scale, row, seed):
    """{column: number or None}; networks that diverged or are of another command have none."""
    foreign = made_by_another(run_folder(args, row.run, seed), command_of(scale, row.run))
    if foreign or diverged(args, row, seed) is not None:
        return dict.fromkeys(scale.columns)
    found = {}
    for column, path in scale.columns.items():
        if path[0] == "mean":
            values = [found[name] for name in path[1:]]
            found[column] = None if None in values else statistics.mean(values)
        else:
            found[column] = number(args, scale, row, path, seed)
    return found


def failure(args, scale, row, seed):
    """Why a row has no numbers for a seed, or None."""
    step = diverged(args, row, seed)
    foreign = made_by_another(run_folder(args, row.run, seed), command_of(scale, row.run))
    if step is not None and not foreign:
        return f"diverged at step {step:g}"
    own = {f"{name}-s{seed}" for name in trainings_of(scale, row)}
    for key, job in all_jobs(run.changed(args, evaluations=None), scale, [row], [seed]).items():
        stale = not job.product.exists() and made_by_another(job.product, job.command)
        if mark(job).is_file() and not finished(job) and not stale:
            if job.trains and key not in own:
                return f"needs {key}, which failed"
            reason = re.sub(r"(?<!\S)/\S*/", "", mark(job).read_text().strip())  # of a machine
            return reason if job.trains else f"{key.partition(' ')[2]}: {reason}"
    return None


def feeds(path):
    """What a column's number comes from: "run", "run NAME", "mean", or an evaluation."""
    return path[1] if path[0] == "100 -" else path[0]


def sources_of(args, scale, row, seed):
    """{evaluation: where its images come from} of the evaluations that say so."""
    found = {}
    for name in scale.evaluations:
        product = result_file(args, row, name, seed)
        content = read_json(product) or {}
        foreign = made_by_another(product, evaluation_command(scale, row, name))
        if isinstance(content.get("source"), str) and not foreign:
            found[name] = re.sub(r"(?<!\S)/\S*/", "", content["source"])
    return found


def curve_of(args, scale, row, seed):
    """[[epoch, value], ...] of what the table draws over epochs; of each epoch the last value."""
    if not scale.curve:
        return []
    lines = run.read_log(run_folder(args, row.run, seed))
    own = [line for line in lines if line.get("stage") == row.stage and scale.curve[0] in line]
    values = {line["epoch"]: line[scale.curve[0]] for line in own}
    return [[epoch, float(f"{value:.4g}")] for epoch, value in sorted(values.items())]


def published_file(args, name, scale):
    """(content of the results file that stands in --out, its `published_rows`), ({}, {}) of none.

    Raises UserError for a file that is no such thing: its numbers would be lost."""
    path = args.out / f"headline_{name}_{args.scale}.json"
    if not path.exists():
        return {}, {}
    content = read_json(path)
    try:
        cells(content["rows"])
        return content, published_rows(content, scale)
    except (AttributeError, KeyError, TypeError, ValueError):
        raise run.UserError(f"{path} is no table of headline.py: mend it or move it away") from None


def published_rows(content, scale):
    """{(title, command, seed): (numbers, about, failure)} of a published file's content.

    A row of another network is left out, and so are numbers of another evaluation or place."""
    rows = {row.title: row for row in scale.rows}
    paths = {column: list(path) for column, path in scale.columns.items()}
    before = content.get("paths", paths)
    found = {}
    for old in content["rows"]:
        row, network = rows.get(old["row"]), old.get("network", {})
        if row is None or (row.stage, row.file) != (network.get("stage"), network.get("file")):
            continue
        today = {name: evaluation_command(scale, row, name) for name in scale.evaluations}
        then = {
            name: f"{command} {network.get('options', {}).get(name, '')}".strip()
            for name, command in content["evaluations"].items()
        }
        for seed in sorted({*old["seeds"], *old["failed"]}, key=int):
            numbers, about = old["seeds"].get(seed, {}), old["trained"].get(seed, {})
            kept = {
                column: numbers.get(column)
                for column, path in scale.columns.items()
                if before.get(column) == paths[column]
                and then.get(feeds(path)) == today.get(feeds(path))
            }
            sources = about.get("sources", {}).items()
            about = about | {"sources": {k: v for k, v in sources if then[k] == today.get(k)}}
            about = {key: value for key, value in about.items() if value}
            found[old["row"], old["command"], seed] = kept, about, old["failed"].get(seed)
    return found


def unpublished(args, name, scale, rows, seed):
    """The rows whose numbers of a seed the results file in --out does not hold whole. A network
    that diverged has none to hold."""
    _, published = published_file(args, name, scale)

    def is_known(row):
        key = row.title, f"python {command_of(scale, row.run)}", str(seed)
        numbers, _, failed = published.get(key, ({}, {}, None))
        return is_whole(scale, numbers) or (failed or "").startswith("diverged")

    return [row for row in rows if not is_known(row)]


def known(numbers):
    """The columns that have a number."""
    return {column for column, value in numbers.items() if value is not None}


def collect(args, name, table, rows, seeds):
    """What the JSON file holds: the numbers of every row, column and seed, and the commands.

    The results file in --out keeps its numbers of a row and seed until the trainings here know all
    of them. It keeps them too where its corruptions have another source. A failure here takes none
    away, nor does a smaller number of seeds. So several machines may share a table."""
    scale = table.scales[args.scale]
    before, published = published_file(args, name, scale)
    seeds = max([seeds, *(int(seed) + 1 for *_, seed in published)])
    found = []
    for row in rows:
        numbers, failures, trained = {}, {}, {}
        command = f"python {command_of(scale, row.run)}"
        for seed in map(str, range(seeds)):
            values = numbers_of(args, scale, row, seed)
            old, about, failed = published.get((row.title, command, seed), ({}, {}, None))
            reason = failure(args, scale, row, seed) or (None if known(values) else failed)
            sources = sources_of(args, scale, row, seed)
            theirs = about.get("sources", {})
            other = known(old) and any(theirs.get(k, v) != v for k, v in sources.items())
            if other:
                warn(
                    f"{row.title}, seed {seed}: the published numbers stay, for they are of other "
                    f"images ({'; '.join(theirs.values())})"
                )
            if reason:
                failures[seed] = reason
            if known(values) >= known(old) and not other:
                folders = [run_folder(args, name, seed) for name in trainings_of(scale, row)]
                more = {"sources": sources, "curve": curve_of(args, scale, row, seed)}
                about = trained_on(folders) | {k: v for k, v in more.items() if v}
            else:
                values = {column: old.get(column) for column in scale.columns}
            if known(values):
                numbers[seed], trained[seed] = values, about
        network = {"stage": row.stage, "file": row.file, "options": row.options or {}}
        found.append(
            {
                "row": row.title, "run": row.run, "command": command, "network": network,
                "paper": row.paper or {}, "seeds": numbers, "failed": failures, "trained": trained,
            }
        )  # fmt: skip
    lost = len(cells(before.get("rows", ())) - cells(found))
    if lost:
        warn(f"{name}: {lost} published numbers are left out, for their commands are other ones")
    return {
        "table": name, "title": table.title, "scale": args.scale, "size": scale.size,
        "paper": table.paper, "note": table.note, "dataset": scale.dataset,
        "columns": list(scale.columns), "chart": list(scale.chart), "curve": list(scale.curve),
        "paths": {column: list(path) for column, path in scale.columns.items()},
        "evaluations": scale.evaluations, "versions": run.versions(), "rows": found,
    }  # fmt: skip


def cells(rows):
    """{(title, seed, column)} of the cells that have a number."""
    return {
        (row["row"], seed, column)
        for row in rows
        for seed, numbers in row["seeds"].items()
        for column in known(numbers)
    }


def warn(text):
    print(f"warning: {text}", file=sys.stderr)


def is_whole(scale, numbers):
    """Whether every training and evaluation that feeds a column gave a row a number."""
    given = {feeds(scale.columns[c]) for c, value in numbers.items() if value is not None}
    return given >= {feeds(path) for path in scale.columns.values()}
