"""How far the final layer has grown before the first step: depth by depth, norm by norm.

Without BatchNorm and with He's start the signal doubles in every residual block. With BatchNorm it
grows by one. With Fixup it stays (Zhang et al. 2019; Dauphin & Cubuk 2021).

    python eval/growth.py                                   # WRN-D-4, D = 10, 16, 28, 40
    python eval/growth.py --arch resnet8 --depths 8,20,56,110 --norms none,bn,fixup
"""

import re
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from common import data, models, run


def parse_args(argv=None):
    parser = run.Parser(__file__, __doc__)
    data.add_arguments(parser)
    group = parser.add_argument_group("growth")
    group.add_argument("--arch", default="wrn16-4", help="network; its first number is the depth")
    group.add_argument(
        "--depths", type=run.listed(run.positive(int)), default=[10, 16, 28, 40], help="layers"
    )
    group.add_argument(
        "--norms", type=run.listed(str), default=["none", "bn", "fixup"], help="normalisers"
    )
    group.add_argument(
        "--init", default="he", choices=["he", "own"],
        help="of norm none: He's, which explodes, or the one of models/init.py",
    )  # fmt: skip
    group.add_argument("--images", type=run.positive(int), default=128, help="training images")
    group.add_argument("--seed", type=run.nonnegative(int), default=0, help="of weights and images")
    group.add_argument("--json", type=Path, help="where the numbers go (default: nowhere)")
    args = parser.parse_args(argv)
    if not re.search(r"\d", args.arch):
        raise run.UserError(f"--arch {args.arch}: its name has no depth to change")
    return args


def main(args):
    target = run.try_file(args.json, "--json") if args.json else None
    dataset = data.from_args(args, "cpu")
    order = torch.randperm(len(dataset.train.y), generator=run.generator(args.seed, "growth"))
    x = run.to_float(dataset.train.take(order[: args.images]).x)
    rows, found = [], {}
    for norm in args.norms:
        for depth in args.depths:
            arch = re.sub(r"\d+", str(depth), args.arch, count=1)
            torch.manual_seed(run.seed_key(args.seed, "init"))
            model = models.build(arch, norm, **dataset.model_kwargs)
            if norm == "none" and args.init == "he":
                models.init_he(model)
            sizes = models.mean_squares(model, x)
            found[norm, arch] = sizes
            rows.append([norm, arch, f"{sizes['embedding']:.3g}", f"{sizes['logits']:.3g}"])
    print(run.table(rows, ["norm", "network", "embedding", "logits"]))
    print(f"mean squares at the start, {len(x)} images of {args.dataset}, seed {args.seed}")
    if target:
        networks = []
        for (norm, arch), sizes in found.items():
            depth = int(re.search(r"\d+", arch)[0])
            networks.append({"norm": norm, "arch": arch, "depth": depth, **sizes})
        title = re.sub(r"\d+", "D", args.arch, count=1)
        content = {
            "what": "mean squares before the first step; norm none has the start --init names",
            "arch": title, "dataset": args.dataset, "images": len(x), "seed": args.seed,
            "init": args.init, "networks": networks, "versions": run.versions(),
        }  # fmt: skip
        run.write_json(target, content)
    return found


if __name__ == "__main__":
    run.cli(main, parse_args)
