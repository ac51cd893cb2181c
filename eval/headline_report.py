"""The results files of eval/headline.py as tables, figures and parts of a README.

A README holds a table between two markers, which `python eval/headline.py --readme` fills:

    <!-- table: headline_question_small -->
    <!-- end of table -->
"""

import json
import re
import statistics
import sys
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from common import run

FEW = 4  # rows without a number that a caption names
LEAST = 4  # points of a figure: fewer say no more than the table
MARKED = re.compile(r"(<!-- table: ([\w-]+) -->)(.*?)(<!-- end of table -->)", re.S)


def lines_of(content):
    """(rows, header) of the table of a results file. A reported column stands twice, and rows that
    nothing is known of are left out; `caption` names them."""
    reported = {c for row in content["rows"] for c in row["paper"]}
    floats = {column: floats_of(column, content["rows"]) for column in content["columns"]}
    header = ["network"]
    for column in content["columns"]:
        header += [f"{column}, paper", f"{column}, here"] if column in reported else [column]
    lines = []
    for row in content["rows"]:
        if not_begun(row):
            continue
        line = [row["row"]]
        for column in content["columns"]:
            values = [numbers.get(column) for numbers in row["seeds"].values()]
            paper = row["paper"].get(column, "-")
            if column in reported:
                line.append(f"{paper:g}" if isinstance(paper, (int, float)) else paper)
            line.append(run.mean_sd(values, floats[column]))
        state = [f"failed (seed {seed}): {why}" for seed, why in row["failed"].items()]
        lines.append([*line, len(row["seeds"]), "; ".join(state)])
    header += ["n", ""]
    if not any(line[-1] for line in lines):
        header, lines = header[:-1], [line[:-1] for line in lines]
    return lines, header


def floats_of(column, rows):
    """The format of a column: two decimals, or four digits where its numbers are large or small."""
    given = [numbers.get(column) for row in rows for numbers in row["seeds"].values()]
    sizes = [abs(value) for value in given if value]
    return ".2f" if all(0.1 <= size < 1000 for size in sizes) else ".4g"


def not_begun(row):
    """Whether a row has neither a number nor a failure yet."""
    return not row["seeds"] and not row["failed"]


def caption(content):
    """The sentences below a table."""
    text = f"{content['dataset']}, {content['scale']} scale: {content['size']}. Mean +- standard "
    text += "deviation over n seeds; a number without it is of one seed."
    shown = any(row["paper"] for row in content["rows"])
    paper = shown and content["paper"] and f"Paper: {content['paper']}."
    for extra in (content["note"], images_of(content), trained_on(content), paper):
        text += f" {extra}" if extra else ""
    absent = [row["row"] for row in content["rows"] if not_begun(row)]
    if len(absent) > FEW:
        return f"{text} Not measured yet: {len(absent)} of {len(content['rows'])} rows."
    return text + (f" Not measured yet: {'; '.join(absent)}." if absent else "")


def trained_on(content):
    """The sentence that counts the trainings by device; "" where no log names a GPU. A training
    of which several rows show a network counts once."""
    devices = {
        (row.get("run", row["row"]), seed): about.get("device", "not recorded")
        for row in content["rows"]
        for seed, about in row.get("trained", {}).items()
    }
    counts = Counter(devices.values())
    if set(counts) <= {"cpu", "not recorded"}:
        return ""
    return f"Trainings: {', '.join(f'{name} ({n})' for name, n in sorted(counts.items()))}."


def images_of(content):
    """The sentence that counts rows x seeds by the source of their corrupted images."""
    every = [about for row in content["rows"] for about in row.get("trained", {}).values()]
    counts = Counter(source for about in every for source in about.get("sources", {}).values())
    words = [f"{source} ({n})" if len(counts) > 1 else source for source, n in counts.items()]
    return f"Corruptions: {'; '.join(words)}." if words else ""


def markdown(content):
    """The table of a results file as the READMEs show it."""
    lines, header = lines_of(content)
    table = run.format_table(lines, header, "markdown")
    return f"File: `{name_of(content)}.json`.\n\n{table}\n\n{caption(content)}\n"


def draw(content, path):
    """Write the figure of a results file where it has one; returns whether it has."""
    if content.get("curve"):
        return draw_curves(content, path)
    if not content["chart"]:
        return False
    across, up, *after = content["chart"]
    points = points_of(content, across, up)
    rings = points_of(content, across, after[0]) if after else {}
    mixes = [title for title in points if ", gamma " in title]
    joined = {title: title if title == mixes[0] else title.split()[-1] for title in mixes}
    if len(points) >= LEAST:
        title = content["title"] + (f" Rings: {after[0].split(',')[0]}" if rings else "")
        run.scatter_chart(path, title, points, across, up, rings, joined)
    else:
        path.unlink(missing_ok=True)
    return len(points) >= LEAST


def draw_curves(content, path):
    """Rows over epochs: a line of the mean of the seeds, a band from the least to the largest."""
    lines = {}
    for row in content["rows"]:
        curves = [dict(about.get("curve", ())) for about in row["trained"].values()]
        for epoch in sorted({epoch for curve in curves for epoch in curve}):
            values = [curve[epoch] for curve in curves if epoch in curve]
            point = epoch, statistics.mean(values), min(values), max(values)
            lines.setdefault(row["row"], []).append(point)
    if lines:
        up = content["curve"][1]
        title = f"{up.capitalize()}: mean over seeds, band from the least to the largest"
        run.line_chart(path, title, lines, log=True, across="epoch", up=up)
    else:
        path.unlink(missing_ok=True)
    return bool(lines)


def points_of(content, across, up):
    """{title of a row: (x, its deviation, y, its deviation)} over the seeds with both numbers.

    A row at the point of one before it, as the best epoch that is the last, is left out."""
    points = {}
    for row in content["rows"]:
        pairs = [(n.get(across), n.get(up)) for n in row["seeds"].values()]
        pairs = [pair for pair in pairs if None not in pair]
        if pairs:
            x, y = zip(*pairs, strict=True)
            point = statistics.mean(x), deviation(x), statistics.mean(y), deviation(y)
            if point not in points.values():
                points[row["row"]] = point
    return points


def deviation(values):
    return statistics.stdev(values) if len(values) > 1 else 0.0


def publish(content, folder):
    """Write JSON, Markdown and SVG; returns the path of the JSON."""
    path = folder / f"{name_of(content)}.json"
    run.write_json(path, content)
    path.with_suffix(".md").write_text(markdown(content))
    draw(content, path.with_suffix(".svg"))
    return path


def name_of(content):
    return f"headline_{content['table']}_{content['scale']}"


# --- README ---------------------------------------------------------------------------------------


def updated(text, folder):
    """The text of a README with the tables of the results files in `folder` between the markers.

    Raises UserError for a marker whose file is not there."""

    def replace(match):
        path = folder / f"{match[2]}.json"
        if not path.is_file():
            raise run.UserError(f"README.md: no {path.name} for the marker {match[2]}")
        try:
            body = markdown(json.loads(path.read_text()))
        except (AttributeError, KeyError, TypeError, ValueError):
            raise run.UserError(f"{path} is no table of headline.py") from None
        if path.with_suffix(".svg").is_file():
            body += f"\n![{match[2]}]({match[2]}.svg)\n"
        return f"{match[1]}\n{body}{match[4]}"

    return MARKED.sub(replace, text)


def update(path):
    """Bring the tables of a README up to date; returns its text."""
    text = updated(path.read_text(), path.parent)
    path.write_text(text)
    print(f"written: {path}")
    return text
