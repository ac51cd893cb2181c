"""The networks of an evaluation: its options, and what they name."""

import argparse
import copy
from pathlib import Path

import torch

from common import run
from common.models.norms import NORMS, mix_statistics
from common.models.weights import from_torchvision, image_size_of, load_foreign, unwrap
from common.models.zoo import build, from_checkpoint
from common.run import UserError


def add_arguments(parser, nargs="+", datasets=None):
    """Add the networks of an evaluation: checkpoints, state_dicts, torchvision's names."""
    parser.add_argument(
        "checkpoints", nargs=nargs, metavar="CHECKPOINT",
        help="runs/x/last.pt, a run directory, or torchvision:resnet50 (ImageNet)",
    )  # fmt: skip
    group = parser.add_argument_group("state_dict of another project")
    group.add_argument("--arch", help="network")
    group.add_argument("--model-norm", default="bn", choices=NORMS, help="its normalisation")
    group.add_argument("--dataset", choices=datasets, help="what it was trained on")
    group.add_argument("--mean", type=triple, metavar="R,G,B", help="in [0,1]")
    group.add_argument("--std", type=deviations, metavar="R,G,B", help="above 0, at most 1")


def triple(text):
    """argparse type: three numbers in [0,1]. Those of 0..255 would give chance without a word."""
    values = tuple(float(v) for v in text.split(","))
    if len(values) != 3:
        raise argparse.ArgumentTypeError(f"{text}: three numbers, as 0.49,0.48,0.45")
    if not all(0 <= v <= 1 for v in values):  # false for NaN too
        raise argparse.ArgumentTypeError(
            f"{text}: three numbers in [0,1]; divide those of 0..255 by 255"
        )
    return values


def deviations(text):
    """argparse type: three numbers above 0 and at most 1."""
    values = triple(text)
    if min(values) == 0:
        raise argparse.ArgumentTypeError(f"{text}: a deviation of 0 divides by zero")
    return values


def for_evaluation(args, device):
    """Networks of `add_arguments`: ([(label, model, facts)], name of the one data set of all).
    facts: what the results file says of a network; its options are without paths."""
    networks, paths = [], ("out", "data_dir", "teacher", "device")
    for path in args.checkpoints:
        label = Path(path).stem
        if str(path).startswith("torchvision:"):
            label = str(path).partition(":")[2]
            model = from_torchvision(label)
            facts = model.spec | {"dataset": "imagenet", "method": "torchvision"}
        elif args.arch:
            if not (args.dataset and args.mean and args.std):
                raise UserError("--arch goes with --dataset, --mean and --std")
            state = run.load_checkpoint(path, foreign=True)
            tensors = unwrap(state)
            heads = [v for v in tensors.values() if isinstance(v, torch.Tensor) and v.ndim == 2]
            classes = len(heads[-1]) if heads else 10
            size = image_size_of(tensors, args.dataset)
            model = build(args.arch, args.model_norm, classes, size, args.mean, args.std)
            load_foreign(model, state)
            facts = model.spec | {"dataset": args.dataset, "method": "foreign"}
        else:
            checkpoint = run.load_checkpoint(path)
            model = from_checkpoint(checkpoint)
            keys = ("method", "stage", "arch", "norm", "dataset", "num_classes", "step")
            facts = {k: checkpoint.get(k) for k in keys}
            options = checkpoint.get("args", {}).items()
            facts["options"] = {k: v for k, v in options if k not in paths}
            place = Path(path)
            if place.is_dir() or place.name == "last.pt":
                label = (place if place.is_dir() else place.parent).name or "last"
            else:
                label = f"{place.parent.name}/{place.stem}".strip("/")
        model.to(device, memory_format=torch.channels_last)
        networks.append((label, model, facts | {"checkpoint": str(path)}))
    labels = [label for label, _, _ in networks]
    for k, (label, model, facts) in enumerate(networks):
        if labels.count(label) > 1:  # runs of the same name: by their paths
            networks[k] = (facts["checkpoint"], model, facts)
    if len({label for label, _, _ in networks}) < len(networks):
        raise UserError("the same checkpoint is given twice")
    found = sorted({str(facts["dataset"]) for _, _, facts in networks})
    if len(found) > 1:
        raise UserError(f"the checkpoints are of different data sets: {', '.join(found)}")
    return networks, found[0]


def shares(text):
    """argparse type of --gamma: numbers from 0 to 1 with commas between them, each once."""
    values = run.listed(float)(text)
    if len(set(values)) < len(values) or not all(0 <= value <= 1 for value in values):
        raise UserError(f"--gamma {text}: give different numbers from 0 to 1, as 0,0.5,1")
    return values


def add_gamma(parser):
    """Add the option --gamma."""
    parser.add_argument(
        "--gamma", type=shares, default=[], metavar="G,G",
        help="for dual-bn: share of the adversarial statistics in a mixture with the clean ones, "
        "each evaluated apart (default: the adversarial ones)",
    )  # fmt: skip


def with_gamma(networks, gammas):
    """The networks, each with every share of --gamma as one of its own."""
    if not gammas:
        return networks
    mixed = []
    for title, model, facts in networks:
        for gamma in gammas:
            other = copy.deepcopy(model)
            if not mix_statistics(other, gamma):
                raise UserError(
                    f"--gamma mixes the two sets of statistics of dual-bn; {title} has one"
                )
            mixed.append((f"{title}, gamma {gamma:g}", other, facts | {"gamma": gamma}))
    return mixed
