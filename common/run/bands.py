"""Measurements of bn_ablation.py: rows of log.jsonl as curves, and bands around them.

A row holds lists where something was measured at several step sizes; its curve is their mean and
its band goes from the least to the largest.
"""

import contextlib
import json
import statistics
import sys

from common.run.chart import custom_scalars, line_chart
from common.run.checkpoint import versions
from common.run.device import rank, wait
from common.run.results import finite, write_json

LINEAR_AXIS = ("accuracy", "test", "shift_cos", "slot")  # of charts; the others are logarithmic


def charts(row):
    """{chart: (value, low, high)} of one row of log.jsonl; a value without a band is all three."""
    result = {k: (row[k],) * 3 for k in ("loss", "accuracy", "test") if k in row}
    for kind in ("", "random_"):
        for chart, key in (("landscape", "loss_at"), ("predictiveness", "difference_at")):
            band = [v for v in row.get(kind + key, []) if v is not None]
            if band:
                result[kind + chart] = (sum(band) / len(band), min(band), max(band))
        if kind + "beta" in row:
            result[kind + "beta"] = (row[kind + "beta"],) * 3
    for layer, (length, cosine) in row.get("shift", {}).items():
        result[f"shift_l2_{layer}"], result[f"shift_cos_{layer}"] = (length,) * 3, (cosine,) * 3
    for slot, v in row.get("slots", {}).items():
        low, middle, high = v["quantiles"]
        result[f"slot_{slot}"] = (middle, low, high)
        for key in ("mean_step", "var_step"):
            result[f"{key}_{slot}"] = (v[key],) * 3
    return {k: v for k, v in result.items() if None not in v}


def record(rundir, stage, step, row, histograms=None):
    """Write a row of measurements at a step to log.jsonl and to TensorBoard's curves.

    histograms: {tag: tensor}."""
    row = finite({"step": step, **row})
    rundir.log(run=stage, **row)
    for chart, (value, low, high) in charts(row).items():
        if chart not in ("loss", "accuracy"):
            ends = {f"{chart}/low": low, f"{chart}/high": high} if low < high else {}
            rundir.scalars(stage, step, {chart: value} | ends)
    for tag, values in (histograms or {}).items():
        rundir.writer(stage).add_histogram(tag, values, step)


def write_bands(rundir, ends, args):
    """Draw the figures of a run and write summary.json. Returns (folder of the figures, summaries).

    ends: {network: its last metrics}. The summaries are {network: {metric: number}}, of the
    networks of earlier calls on the same run directory too."""
    wait()
    history = read_history(rundir.dir, ends)
    diverged = diverged_in(rundir.dir)
    summaries = {
        name: medians(rows) | diverged.get(name, {}) | ends.get(name, {})
        for name, rows in history.items()
    }
    folder = rundir.dir / "figures"
    if rank() == 0:
        draw_bands(folder, history, args.step_sizes)
        result = {"command": " ".join(sys.argv), "options": vars(args), "runs": summaries}
        write_json(rundir.dir / "summary.json", result | {"versions": versions()})
    return folder, summaries


def band_columns(metrics):
    """The table {title: {run: number}} of {metric: {run: number}}; of the first layer and slot."""
    layer, slot = (
        next((key.removeprefix(prefix) for key in metrics if key.startswith(prefix)), "")
        for prefix in ("shift_l2_", "mean_step_")
    )
    shown = {
        "loss": "loss", "accuracy": "train %", "test": "test %", "diverged": "diverged",
        "landscape_width": "loss band", "predictiveness_high": "gradient change", "beta": "beta",
        f"shift_l2_{layer}": f"shift l2 {layer}", f"shift_cos_{layer}": "cos",
        f"mean_step_{slot}": "mean moves",
    }  # fmt: skip
    return {title: metrics[key] for key, title in shown.items() if key in metrics}


def lay_out_bands(rundir, stage):
    """Show the measurements of a network that have a band under CUSTOM SCALARS."""
    banded = {}
    for row in read_history(rundir.dir, [stage])[stage]:
        for chart, (_, low, high) in charts(row).items():
            banded[chart] = banded.get(chart, False) or low < high
    shown = {chart: ([chart],) for chart, has_band in banded.items() if has_band}
    custom_scalars(rundir.writer(stage), shown)


def draw_bands(folder, history, factors):
    """One SVG per chart with all runs, and one per run of the gradient difference against the step
    size (the paper's Fig. 11). history: {run: [row, ...]}; factors: the step sizes / lr."""
    folder.mkdir(exist_ok=True)
    curves = {}
    for name, rows in history.items():
        for row in rows:
            for chart, point in charts(row).items():
                curves.setdefault(chart, {}).setdefault(name, []).append((row["step"], *point))
        rows, lines = [r for r in rows if None not in r.get("difference_at", [None])], {}
        for row in rows[:: max(1, len(rows) // 5)]:
            points = zip(factors, row["difference_at"], strict=True)
            lines[f"step {row['step']}"] = [(e, d, d, d) for e, d in points]
        title = f"gradient difference over eta / lr, {name}"
        line_chart(folder / f"stepsize_{name}.svg", title, lines, log=True)
    for chart, lines in curves.items():
        log = not chart.startswith(LINEAR_AXIS)
        line_chart(folder / f"{chart}.svg", chart, lines, log)


def read_log(folder):
    """The lines of a run's log.jsonl that are whole, as dicts."""
    lines = []
    with contextlib.suppress(OSError):
        for text in (folder / "log.jsonl").read_text(errors="replace").splitlines():
            with contextlib.suppress(ValueError):
                line = json.loads(text)
                lines += [line] if isinstance(line, dict) else []
    return lines


def diverged_in(folder):
    """{run: {"diverged": step}} of a log.jsonl."""
    ends = (row for row in read_log(folder) if row.get("event") == "diverged")
    return {row["run"]: {"diverged": row["step"]} for row in ends}


def read_history(folder, names=()):
    """{run: rows} of an earlier log.jsonl, in the order of steps.

    What was measured twice at a step, before and after a resume, counts once, the later."""
    history = {name: {} for name in names}
    for row in read_log(folder):
        if row.get("run") and "event" not in row:
            name = row.pop("run")
            history.setdefault(name, {})[(row["step"], *sorted(row))] = row
    return {
        name: sorted(rows.values(), key=lambda row: row["step"]) for name, rows in history.items()
    }


def medians(rows):
    """Medians over the measured steps of one run, {name: number}."""
    points = {}
    for row in rows:
        for chart, (value, low, high) in charts(row).items():
            points.setdefault(chart, []).append(value)
            if chart.endswith(("landscape", "predictiveness")):
                points.setdefault(f"{chart}_width", []).append(high - low)
                points.setdefault(f"{chart}_high", []).append(high)
    skip = ("loss", "accuracy", "test", "slot")
    medians = {k: statistics.median(v) for k, v in points.items() if not k.startswith(skip)}
    last = {k: v[-1] for k, v in points.items() if k in skip}
    return last | medians
