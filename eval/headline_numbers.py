"""The numbers of the headline tables: where they stand, and which of them are published.

`collect` takes them from the logs of trainings and the JSON of evaluations on this machine. It
keeps those that the results file already holds, where this machine does not know better.
"""

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
    log_of,
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
    return None if made_by_another(product, command) else content


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
    if step is not None:
        return f"diverged at step {step:g}"
    own = {f"{name}-s{seed}" for name in trainings_of(scale, row)}
    for key, job in all_jobs(run.changed(args, evaluations=None), scale, [row], [seed]).items():
        if mark(job).is_file() and not finished(job):
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
        content = read_json(result_file(args, row, name, seed)) or {}
        if isinstance(content.get("source"), str):
            found[name] = re.sub(r"(?<!\S)/\S*/", "", content["source"])
    return found


def curve_of(args, scale, row, seed):
    """[[epoch, value], ...] of what the table draws over epochs; of each epoch the last value."""
    if not scale.curve:
        return []
    lines = log_of(run_folder(args, row.run, seed))
    own = [line for line in lines if line.get("stage") == row.stage and scale.curve[0] in line]
    values = {line["epoch"]: line[scale.curve[0]] for line in own}
    return [[epoch, float(f"{value:.4g}")] for epoch, value in sorted(values.items())]


def network_of(row):
    """What tells a row's network from others of the same training."""
    return {"stage": row.stage, "file": row.file, "options": row.options or {}}


def published_file(args, name):
    """The results file that stands in --out, {} where there is none.

    Raises UserError for a file that is no such thing: its numbers would be lost."""
    path = args.out / f"headline_{name}_{args.scale}.json"
    if not path.exists():
        return {}
    content = read_json(path) or {}
    rows = content.get("rows")
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise run.UserError(f"{path} is no table of headline.py: mend it or move it away")
    return content


def published_rows(content, scale):
    """{(title, command, network, seed): (numbers, about)} of a published file's content.

    A number whose evaluation has another command today is left out."""
    before = content.get("evaluations", {})
    same = [
        column
        for column, path in scale.columns.items()
        if before.get(feeds(path)) == scale.evaluations.get(feeds(path))
    ]
    found = {}
    for row in content.get("rows", []):
        for seed, numbers in row["seeds"].items():
            key = row["row"], row["command"], str(row.get("network")), seed
            kept = {column: numbers.get(column) for column in same}
            found[key] = kept, row.get("trained", {}).get(seed, {})
    return found


def known(numbers):
    return sum(value is not None for value in numbers.values())


def collect(args, name, table, rows, seeds):
    """What the JSON file holds: the numbers of every row, column and seed, and the commands.

    The results file in --out keeps its numbers of a row and seed while it knows more of them than
    the trainings here. It keeps them too where its corruptions have another source. A failure here
    takes none away, nor does a smaller number of seeds. So several machines may share a table."""
    scale = table.scales[args.scale]
    published = published_rows(published_file(args, name), scale)
    seeds = max([seeds, *(int(seed) + 1 for *_, seed in published)])
    found = []
    for row in rows:
        numbers, failures, trained = {}, {}, {}
        command, network = f"python {command_of(scale, row.run)}", network_of(row)
        for seed in map(str, range(seeds)):
            values = numbers_of(args, scale, row, seed)
            reason = failure(args, scale, row, seed)
            old, about = published.get((row.title, command, str(network), seed), ({}, {}))
            sources = sources_of(args, scale, row, seed)
            before = about.get("sources", sources)
            other = known(old) and any(before.get(k, v) != v for k, v in sources.items())
            if other:
                print(
                    f"warning: {row.title}, seed {seed}: the published numbers stay, for they are "
                    f"of other images ({'; '.join(before.values())})", file=sys.stderr,
                )  # fmt: skip
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
        found.append(
            {
                "row": row.title, "run": row.run, "command": command, "network": network,
                "paper": row.paper or {}, "seeds": numbers, "failed": failures, "trained": trained,
            }
        )  # fmt: skip
    return {
        "table": name, "title": table.title, "scale": args.scale, "size": scale.size,
        "paper": table.paper, "note": table.note, "dataset": scale.dataset,
        "columns": list(scale.columns), "chart": list(scale.chart), "curve": list(scale.curve),
        "evaluations": scale.evaluations, "versions": run.versions(), "rows": found,
    }  # fmt: skip


def is_whole(scale, numbers):
    """Whether every training and evaluation that feeds a column gave a row a number."""
    given = {feeds(scale.columns[c]) for c, value in numbers.items() if value is not None}
    return given >= {feeds(path) for path in scale.columns.values()}
