"""Draw the figures of a run of bn_ablation.py again, from its log.jsonl.

    python eval/figures.py runs/bn_ablation-shapes-vgg11-16-s0
    python eval/figures.py runs/a --out figures

One SVG per measurement holds all networks of the run: their curves, and bands where a measurement
was made at several step sizes.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from common import run


def parse_args(argv=None):
    parser = run.Parser(__file__, __doc__)
    parser.add_argument("run", type=Path, help="run directory of bn_ablation.py")
    parser.add_argument("--out", type=Path, help="folder of the figures (default: <run>/figures)")
    return parser.parse_args(argv)


def main(args):
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
