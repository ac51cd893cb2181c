"""The networks of an evaluation: its options, and what they name."""

import argparse
import copy
from pathlib import Path

import torch

from common import run
from common.models.norms import NORMS, mix_statistics
from common.models.own import build_own, is_own
from common.models.weights import (
    arch_of,
    from_torchvision,
    image_size_of,
    load_foreign,
    load_own,
    unfinished,
    unwrap,
    without_statistics,
)
from common.models.zoo import build, from_checkpoint
from common.run import UserError


def add_arguments(parser, datasets=None):
    """Add the networks of an evaluation: checkpoints, others' weights, a user's own network."""
    parser.add_argument(
        "checkpoints", nargs="*", metavar="CHECKPOINT",
        help="runs/x/last.pt, a run directory, torchvision:resnet50 (ImageNet), or FILE.py:NAME, a "
        "function or class of yours that gives a network with its weights",
    )  # fmt: skip
    group = parser.add_argument_group("network of another project")
    group.add_argument(
        "--arch", metavar="NAME",
        help="network of the weights: a name of common/models, or FILE.py:NAME, whose code runs",
    )  # fmt: skip
    group.add_argument(
        "--weights", nargs="+", default=[], metavar="FILE",
        help="files of weights, like CHECKPOINT (default: none)",
    )  # fmt: skip
    group.add_argument("--model-norm", default="bn", choices=NORMS, help="its normalisation")
    group.add_argument("--dataset", choices=datasets, help="data set that it was trained on")
    group.add_argument(
        "--mean", type=triple, metavar="R,G,B",
        help="of its training images in [0,1] (default: in the file; FILE.py:NAME: none)",
    )  # fmt: skip
    group.add_argument(
        "--std", type=deviations, metavar="R,G,B",
        help="of its training images, above 0, at most 1 (default: as for --mean)",
    )  # fmt: skip


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


def say_unfinished(label, facts):
    """Print that a network's training has not ended, where its facts say so."""
    if facts.get("unfinished") and not run.rank():
        print(f"{label}: {facts['unfinished']}, its training has not ended", flush=True)


def of_checkpoint(path, args):
    """(label, model, facts) of a checkpoint of this project."""
    checkpoint = run.load_checkpoint(path)
    model = from_checkpoint(checkpoint, args.arch)
    keys = ("method", "stage", "arch", "norm", "dataset", "num_classes", "step")
    facts = {key: checkpoint.get(key) for key in keys}
    if unfinished(checkpoint):
        facts["unfinished"] = unfinished(checkpoint)
    options, paths = checkpoint.get("args", {}).items(), ("out", "data_dir", "teacher", "device")
    facts["options"] = {key: value for key, value in options if key not in paths}
    place = Path(path)
    label = f"{place.parent.name}/{place.stem}".strip("/")
    if place.is_dir() or place.name == "last.pt":
        label = (place if place.is_dir() else place.parent).name or "last"
    return label, model, facts


def of_torchvision(path):
    """(label, model, facts) of torchvision:NAME."""
    label = path.partition(":")[2]
    model = from_torchvision(label)
    return label, model, model.spec | {"dataset": "imagenet", "method": "torchvision"}


def of_state_dict(path, args):
    """(label, model, facts) of another project's weights for a network of this one."""
    state = unwrap(run.load_checkpoint(path, foreign=True))
    state, (mean, std) = without_statistics(state, args.mean, args.std)
    if not (args.dataset and mean and std):
        raise UserError("--arch goes with --dataset, --mean and --std")
    heads = [v for v in state.values() if isinstance(v, torch.Tensor) and v.ndim == 2]
    classes = len(heads[-1]) if heads else 10
    size = image_size_of(state, args.dataset)
    arch = arch_of(args.arch, state)
    model = build(arch, args.model_norm, classes, size, mean, std)
    load_foreign(model, state)
    return Path(path).stem, model, model.spec | {"dataset": args.dataset, "method": "foreign"}


def of_user(arch, path, args):
    """(label, model, facts) of a user's FILE.py:NAME, with the weights of `path` if there is one.

    A checkpoint that this project wrote of such a network says the rest by itself."""
    content = run.load_checkpoint(path, foreign=True) if path else None
    if isinstance(content, dict) and {"format", "arch", "model"} <= content.keys():
        return of_checkpoint(path, args)
    if not args.dataset:
        raise UserError(f"{arch} goes with --dataset, and with --mean and --std if it needs them")
    if (args.mean is None) != (args.std is None):
        raise UserError("--mean and --std go together")
    size = image_size_of(unwrap(content) if path else {}, args.dataset)
    model = build_own(arch, args.model_norm, None, size, args.mean, args.std)
    if path:
        load_own(model, unwrap(content))
    label = Path(path).stem if path else Path(arch).name.replace(".py:", ":")
    return label, model.eval(), model.spec | {"dataset": args.dataset, "method": "own"}


def place_of(facts):
    """The Path beside which an evaluation of a network writes its results."""
    place = facts["checkpoint"].removeprefix("torchvision:")
    return Path(place.replace(".py:", "-") if is_own(place) else place)


def file_of(path):
    """What a path names: the file at the end of its links, or "torchvision:NAME"."""
    if path.startswith("torchvision:"):
        return path
    place = Path(path)
    return (place / "last.pt" if place.is_dir() else place).resolve()


def for_evaluation(args, device):
    """Networks of `add_arguments`: ([(label, model, facts)], name of the one data set of all).
    facts: what the results file says of a network; its options are without paths."""
    paths = [*args.checkpoints, *args.weights]
    if not paths and is_own(args.arch):
        paths = [args.arch]
    if not paths:
        raise UserError("a checkpoint is required: runs/x/last.pt, torchvision:NAME, FILE.py:NAME")
    files = [file_of(path) for path in map(str, paths)]
    for k, file in enumerate(files):
        if file in files[:k]:
            raise UserError(f"{paths[k]} is the same checkpoint as {paths[files.index(file)]}")
    networks = []
    for path in map(str, paths):
        if path.startswith("torchvision:"):
            label, model, facts = of_torchvision(path)
        elif is_own(path):
            label, model, facts = of_user(path, None, args)
        elif is_own(args.arch):
            label, model, facts = of_user(args.arch, path, args)
        elif args.arch:
            label, model, facts = of_state_dict(path, args)
        else:
            label, model, facts = of_checkpoint(path, args)
        model.to(device, memory_format=torch.channels_last)
        facts = facts | {"checkpoint": path, "weights": run.weights_digest(model)}
        networks.append((label, model, facts))
    labels = [label for label, _, _ in networks]
    for k, (label, model, facts) in enumerate(networks):
        if labels.count(label) > 1:  # runs of the same name: by their paths
            networks[k] = (facts["checkpoint"], model, facts)
    found = sorted({str(facts["dataset"]) for _, _, facts in networks})
    if len(found) > 1:
        raise UserError(f"the checkpoints are of different data sets: {', '.join(found)}")
    for label, _, facts in networks:
        say_unfinished(label, facts)
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
