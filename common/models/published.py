"""Clean accuracies that others published, and what a far lower one says of mean and deviation."""

import torch

from common import run

RESNETS = "He et al. 2016"
KUANGLIU = "kuangliu/pytorch-cifar"
CHENYAOFO = "chenyaofo/pytorch-cifar-models"
TORCHVISION = "torchvision, IMAGENET1K_V1"
PUBLISHED = {  # (data set, architecture): accuracy in % of plain training, source
    ("cifar10", "resnet20"): (91.25, RESNETS),
    ("cifar10", "resnet32"): (92.49, RESNETS),
    ("cifar10", "resnet44"): (92.83, RESNETS),
    ("cifar10", "resnet56"): (93.03, RESNETS),
    ("cifar10", "resnet110"): (93.39, RESNETS),
    ("cifar10", "resnet20-b"): (92.60, CHENYAOFO),
    ("cifar10", "resnet32-b"): (93.53, CHENYAOFO),
    ("cifar10", "resnet44-b"): (94.01, CHENYAOFO),
    ("cifar10", "resnet56-b"): (94.37, CHENYAOFO),
    ("cifar10", "vgg11-b"): (92.79, CHENYAOFO),
    ("cifar10", "vgg13-b"): (94.00, CHENYAOFO),
    ("cifar10", "vgg16-b"): (94.16, CHENYAOFO),
    ("cifar10", "vgg19-b"): (93.91, CHENYAOFO),
    ("cifar10", "vgg16"): (92.64, KUANGLIU),
    ("cifar10", "resnet18"): (93.02, KUANGLIU),
    ("cifar10", "resnet50"): (93.62, KUANGLIU),
    ("cifar10", "wrn28-10"): (94.78, "RobustBench, Standard"),
    ("imagenet", "resnet18"): (69.76, TORCHVISION),
    ("imagenet", "resnet34"): (73.31, TORCHVISION),
    ("imagenet", "resnet50"): (76.13, TORCHVISION),
}
USUAL = (  # mean and deviation that projects train with
    ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),  # ImageNet's
    ((0.4914, 0.4822, 0.4465), (0.247, 0.2435, 0.2616)),  # CIFAR-10's
    ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.201)),  # the deviation that kuangliu's copies
    ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),  # CIFAR-100's
    ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
    ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0)),  # none
)
FAR = 3.0  # points below the published accuracy, or above that of the pair that was given
CLOSE = 2.0  # points within which two pairs cannot be told apart on IMAGES images
IMAGES = 500


def accuracy(model, x, y):
    return 100 * (run.predict(model, x).argmax(1) == y).double().mean().item()


@torch.no_grad()
def doubts(model, facts, x, y):
    """What the clean accuracy says against the mean and the deviation of another project's network,
    as a sentence; None where nothing does. x (N,C,H,W) in [0,1] or uint8 and y (N,): the images of
    the evaluation, of which the first IMAGES are looked at.

    The usual pairs are tried only where the accuracy is far below the published one. The network
    is left as it was."""
    arch = {"wrn28": "wrn28-10"}.get(facts["arch"], facts["arch"])
    known = PUBLISHED.get((facts["dataset"], arch))
    if known is None or facts.get("method") != "foreign" or not len(y):
        return None
    device = model.normalize.mean.device
    x, y = x[:IMAGES].to(device), y[:IMAGES].to(device)
    given = accuracy(model, x, y)
    if given >= known[0] - FAR:
        return None
    own = {name: buffer.clone() for name, buffer in model.normalize.named_buffers()}
    found = []
    try:
        for mean, std in USUAL:
            model.normalize.mean.copy_(torch.tensor(mean).view(1, 3, 1, 1))
            model.normalize.std.copy_(torch.tensor(std).view(1, 3, 1, 1))
            found.append((accuracy(model, x, y), mean, std))
    finally:
        model.normalize.load_state_dict(own)
    found.sort(key=lambda pair: -pair[0])
    best = found[0][0]
    start = f"{given:.1f} % of {len(y)} clean images"
    if best > given + FAR:
        likely = [pair for pair in found if pair[0] > best - CLOSE]
        pairs = [
            f"{value:.1f} % with --mean {','.join(f'{m:g}' for m in mean)} --std "
            f"{','.join(f'{s:g}' for s in std)}" for value, mean, std in likely
        ]  # fmt: skip
        which = "those" if len(likely) == 1 else "one of these"
        return (
            f"{start} with this mean and deviation, {', '.join(pairs)}: probably trained with "
            f"{which}"
        )
    return (
        f"{start}, where {known[1]} reports {known[0]:.1f} % for {arch}; no usual mean and "
        "deviation does better, so it was trained otherwise (as against attacks), or the images "
        "are prepared differently"
    )


def check_statistics(networks, x, y):
    """The networks of an evaluation with `doubts` about each in its facts; prints them too."""
    checked = []
    for title, model, facts in networks:
        doubt = doubts(model, facts, x, y)
        if doubt:
            print(f"warning: {title}: {doubt}", flush=True)
            facts = facts | {"doubt": doubt}
        checked.append((title, model, facts))
    return checked
