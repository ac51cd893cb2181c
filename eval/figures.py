"""Draw figures as SVG from measured numbers.

    python eval/figures.py                                      # all of eval/results
    python eval/figures.py runs/bn_ablation-shapes-vgg11-16-s0  # of a run of bn_ablation.py
    python eval/figures.py runs/a --out figures

Without a run the figures of the results' JSON files are drawn anew beside them: headline tables,
the final layer, bands of the loss, the study of the shortcut, speed. Of a run there is one SVG per
measurement with all networks. It shows their curves, and bands where a measurement was made at
several step sizes.
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from common import run
from eval import headline_report, shortcut, speed_scaling

RESULTS = run.ROOT / "eval" / "results"


def parse_args(argv=None):
    parser = run.Parser(__file__, __doc__)
    parser.add_argument(
        "run", type=Path, nargs="?",
        help="run directory of bn_ablation.py (default: the results' files)",
    )  # fmt: skip
    parser.add_argument(
        "--out", type=Path, help="folder of the figures (default: <run>/figures, eval/results)"
    )
    return parser.parse_args(argv)


def draw_growth(content, path):
    """The mean square of the embedding before the first step against the depth, by norm.

    content: what eval/growth.py writes."""
    curves = {}
    for entry in content["networks"]:
        point = (entry["depth"], *(entry["embedding"],) * 3)
        curves.setdefault(entry["norm"], []).append(point)
    title = f"Growth of the final layer, {content['arch']} by depth"
    run.line_chart(
        path, title, curves, log=True, across="layers", up="mean square of the embedding"
    )


def draw_loss_bands(content, path):
    """The band of the loss along the gradient against the step, by norm.

    content: rows of bn_ablation.py, {"step_sizes", "runs": {name: [{"step", "loss_at"}, ...]}}."""
    curves = {}
    for name, rows in content["runs"].items():
        for row in rows:
            band = row["loss_at"]
            middle = sum(band) / len(band)
            curves.setdefault(name, []).append((row["step"], middle, min(band), max(band)))
    sizes = content["step_sizes"]
    title = f"Loss after steps of {min(sizes):g} to {max(sizes):g} rates along the gradient"
    run.line_chart(
        path, title, curves, log=True, across="training step", up="loss (cross-entropy, nats)"
    )


def draw_scaling(content, path):
    """Images per second over width, depth, batch, threads and processes, see eval/speed.py."""
    speed_scaling.draw(path, content["scaling"]["axes"], content["scaling"]["base"])


def draw_shortcut(content, path):
    """The figure of a study of eval/shortcut.py; its name stands in the name of the file."""
    rows = [shortcut.completed(row) for row in content["rows"]]
    shortcut.figure(rows, path.stem.removeprefix("shortcut_"), path)


DRAWN = {  # by the name of the JSON file
    "growth": draw_growth, "loss_bands": draw_loss_bands, "speed_scaling": draw_scaling,
    **{f"shortcut_{study}": draw_shortcut for study in shortcut.STUDIES},
}  # fmt: skip


def draw_results(out):
    """Draw the figures of eval/results into a folder; returns their names."""
    drawn = []
    for path in sorted(RESULTS.glob("*.json")):
        content = json.loads(path.read_text())
        target = out / f"{path.stem}.svg"
        if path.stem.startswith("headline_"):
            if headline_report.draw(content, target):
                drawn.append(target.name)
        elif path.stem in DRAWN:
            DRAWN[path.stem](content, target)
            drawn.append(target.name)
    return drawn


def main(args):
    if args.run is None:
        out = args.out or RESULTS
        run.try_folder(out, "--out")
        names = draw_results(out)
        print(f"{len(names)} figures in {out.resolve()}: {', '.join(names)}")
        return names
    options = run.read_options(args.run)
    history = {name: rows for name, rows in run.read_history(args.run).items() if rows}
    if options.get("method") != "bn_ablation" or not history:
        raise run.UserError(f"{args.run}: holds no measurements of bn_ablation.py")
    folder = args.out or args.run / "figures"
    run.try_folder(folder, "--out")
    run.draw_bands(folder, history, options["step_sizes"])
    print(f"{len(list(folder.glob('*.svg')))} figures in {folder.resolve()}")


if __name__ == "__main__":
    run.cli(main, parse_args)
