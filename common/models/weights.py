"""Weights of checkpoints, of other projects and of torchvision."""

import re
from pathlib import Path

import torch
from torch import nn

from common import run
from common.models.adapt import batch_norms
from common.models.own import Own
from common.models.zoo import CIFAR_RESNETS, IMAGENET_RESNETS, build, from_checkpoint
from common.run import UserError

RENAMES = [  # names in other projects' checkpoints -> names here
    (r"^(module\.|_orig_mod\.|model\.)+", ""),
    (r"^1\.(?=conv1|bn1|layer|block|fc|linear)", ""),  # Sequential(normalisation, network)
    (r"^linear\.", "fc."),
    (r"\.shortcut\.(?=[01]\.)", ".downsample."),
    (r"^(block\d)\.layer\.", r"\1."),
    (r"\.convShortcut\.", ".shortcut."),
    (r"^head\.fc\.", "fc."),  # timm's NF-ResNets
    (r"^bias1$", "bn1.bias"),  # the authors' Fixup nets
    (r"^bias2$", "fc.bias_in"),
    # AugMix's ResNeXt, as RobustBench has it: three blocks a stage
    (r"^conv_1_3x3\.", "conv1."),
    (r"^bn_1\.", "bn1."),
    (r"^stage_(\d)\.(\d)\.", lambda m: f"body.{3 * int(m[1]) - 3 + int(m[2])}."),
    (r"\.conv_reduce\.", ".conv1."),
    (r"\.bn_reduce\.", ".bn1."),
    (r"\.conv_conv\.", ".conv2."),
    (r"(?<=\d)\.bn\.", ".bn2."),
    (r"\.conv_expand\.", ".conv3."),
    (r"\.bn_expand\.", ".bn3."),
    # kuangliu's VGG
    (r"^features\.", "body."),
    (r"^classifier\.(?=weight|bias|\d)", "fc."),
]
# What is no weight of the network: TRADES builds its first block twice and uses it once; MAIR keeps
# the number of classes; Madry's "robustness" saves the network a second time.
SURPLUS = r"sub_block1\..*|n_classes|attacker\..*"
MEANS = (  # of the images, as buffers
    "mu", "mean", "normalize.mean", "norm.mean", "normalizer.mean", "normalizer.new_mean", "0.mean",
)  # fmt: skip
DEVIATIONS = (
    "sigma", "std", "normalize.std", "norm.std", "normalizer.std", "normalizer.new_std", "0.std",
)  # fmt: skip

WRAPPINGS = (
    "state_dict", "model_state_dict", "model_state", "model", "rmodel", "net", "network", "weights",
)  # fmt: skip
PREFIX = r"^(module\.|_orig_mod\.|model\.|net\.)+"


def unwrap(content):
    """The dict of tensors in the content of another project's file.

    Raises UserError where there is none; it names what the file holds instead."""
    if isinstance(content, dict):
        wrapped = next((content[k] for k in WRAPPINGS if k in content), content)
        tensors = isinstance(wrapped, dict) and any(
            isinstance(v, torch.Tensor) for v in wrapped.values()
        )
        if tensors and all(isinstance(k, str) for k in wrapped):
            return wrapped
        keys = ", ".join(str(k)[:40] for k in list(content)[:6]) or "nothing"
        holds = f"a dict of {keys}"
    else:
        holds = f"of type {type(content).__name__}"
    raise UserError(
        f"the file holds no weights by name but is {holds}; save model.state_dict() alone"
    )


def is_tensor_of(value, other):
    """Whether `value` is a tensor of the shape of the tensor `other`."""
    return isinstance(value, torch.Tensor) and value.shape == other.shape


def image_size_of(state, dataset):
    """The image size in pixels to build a network for that takes these weights of another project.

    A first convolution of 7x7 belongs to the stem for photographs, whatever the data set."""
    tensors = [v for v in state.values() if isinstance(v, torch.Tensor)]
    if any(v.ndim == 4 and v.shape[1:] == (3, 7, 7) for v in tensors):
        return 224
    return {"imagenet": 224, "tiny-imagenet": 64}.get(dataset, 32)


def without_statistics(state, mean=None, std=None):
    """(state, (mean, std)): a state_dict without the buffers of a normalising layer, and their
    values as triples, where `mean` and `std` are not given."""
    kept, found = {}, {}
    for key, value in state.items():
        name = re.sub(RENAMES[0][0], "", key)
        which = "mean" if name in MEANS else "std" if name in DEVIATIONS else None
        three = isinstance(value, torch.Tensor) and value.numel() == 3
        if which and three:
            found[which] = tuple(value.flatten().tolist())
        else:
            kept[key] = value
    if mean is None and std is None and len(found) == 2:
        print(f"mean {shown(found['mean'])} and deviation {shown(found['std'])} from the file")
        mean, std = found["mean"], found["std"]
    return kept, (mean, std)


def shown(triple):
    return ",".join(f"{value:g}" for value in triple)


def arch_of(arch, state):
    """The name of the network for these weights. chenyaofo's have a "-b" at the end: the shortcuts
    of the ResNets are convolutions and not padding, the VGGs end in three linear layers."""
    if arch.startswith("vgg") and any(key.endswith("classifier.6.weight") for key in state):
        return arch.removesuffix("-b") + "-b"
    convolved = any(key.endswith("downsample.0.weight") for key in state)
    return f"{arch}-b" if arch in CIFAR_RESNETS and convolved else arch


def load_foreign(model, state):
    """Load a state_dict of another project (torchvision, akamaster's, kuangliu's and chenyaofo's
    CIFAR nets, the PyTorch Wide ResNet, TRADES, MAIR, RobustBench). Raises UserError naming what
    does not fit."""
    state = unwrap(state)
    renamed = {}
    for key, value in state.items():
        for pattern, new in RENAMES:
            key = re.sub(pattern, new, key)
        if not re.fullmatch(SURPLUS, key):
            renamed[key] = value
    own = model.state_dict()
    ours = r"normalize\..*|.*num_batches_tracked"  # absent elsewhere, or in old files
    renamed = {k: own[k] for k in own if re.fullmatch(ours, k)} | renamed
    without_biases(renamed, own)
    wrong = sorted(own.keys() ^ renamed.keys())
    wrong += [k for k in own.keys() & renamed.keys() if not is_tensor_of(renamed[k], own[k])]
    if wrong:
        arch = model.spec["arch"]
        raise UserError(f"the state_dict is no {arch}: {len(wrong)} entries differ, as {wrong[0]}")
    model.load_state_dict(renamed)
    return model.eval()


def without_biases(renamed, own):
    """Take the biases of convolutions before BatchNorm out of kuangliu's VGG: subtracted from the
    running mean they do the same."""
    for key in [k for k in renamed if k not in own and re.fullmatch(r"body\.\d+\.bias", k)]:
        mean = f"body.{int(key.split('.')[1]) + 1}.running_mean"
        if mean in renamed and is_tensor_of(renamed[mean], renamed[key]):
            renamed[mean] = renamed[mean] - renamed.pop(key)


def load_own(model, state):
    """Load the weights of a user's network, with or without the usual prefixes. Raises UserError
    naming what does not fit."""
    own = model.net.state_dict()
    stripped = {re.sub(PREFIX, "", key): value for key, value in state.items()}
    best = min((state, stripped), key=lambda found: len(own.keys() ^ found.keys()))
    wrong = sorted(own.keys() ^ best.keys())
    wrong += [k for k in own.keys() & best.keys() if not is_tensor_of(best[k], own[k])]
    if wrong:
        arch = model.spec["arch"]
        raise UserError(f"the state_dict is no {arch}: {len(wrong)} entries differ, as {wrong[0]}")
    model.net.load_state_dict(best)


def from_torchvision(name):
    """An ImageNet network of torchvision with its first published weights, from torchvision's
    cache; its normalisation inside."""
    from torchvision import models as theirs

    try:
        weights = theirs.get_model_weights(name).IMAGENET1K_V1
    except (ValueError, AttributeError):
        raise UserError(f"torchvision:{name}: has no weights IMAGENET1K_V1") from None
    form, rescales = weights.transforms(), ("googlenet", "inception_v3")  # with these weights
    usual = form.crop_size == [224] and form.resize_size == [256]
    if not usual or form.interpolation.value != "bilinear" or name in rescales:
        raise UserError(
            f"torchvision:{name}: takes other images than 224 of 256 pixels in ImageNet's mean and "
            "deviation; evaluate such a network by hand"
        )
    file = Path(torch.hub.get_dir()) / "checkpoints" / Path(weights.url).name
    if not file.is_file():
        raise UserError(f"torchvision:{name}: no {file}; put {weights.url} there")
    net = theirs.get_model(name)
    net.load_state_dict(run.load_checkpoint(file, foreign=True))
    model = Own(net, name, form.mean, form.std).eval()
    model.spec = {"arch": name, "norm": "bn", "num_classes": 1000, "image_size": 224}
    return model


def fold(conv, norm):
    """(weight, bias) of the convolution that does what `conv` and then `norm`, BatchNorm in eval
    mode, do. In fp64, for large gains make rounding visible."""
    scale = norm.weight.double() / (norm.running_var.double() + norm.eps).sqrt()
    bias = norm.bias.double() - norm.running_mean.double() * scale
    if conv.bias is not None:
        bias = bias + conv.bias.double() * scale
    weight = conv.weight.double() * scale.view(-1, 1, 1, 1)
    return weight.to(conv.weight.dtype), bias.to(conv.weight.dtype)


def unfinished(checkpoint):
    """Where the training of a checkpoint stands, as "step 175 of 400"; None at its end.

    The checkpoint of a selected epoch does not say how long the training was: None, too.
    """
    step, total = checkpoint.get("step"), checkpoint.get("total")
    return f"step {step} of {total}" if step and total and step < total else None


def trained_on(options):
    """In words, the training images that a dict of options names."""
    name = options.get("dataset", "unknown data").removesuffix(".1")  # cifar10.1 has a test alone
    left_out = options.get("test_domain")
    return f"{name} without {left_out}" if left_out else name


def load_teacher(path, student, device, args):
    """The network of a checkpoint, in eval mode, to teach `student` on `device`.

    args: options of the student's training. Raises UserError where the architecture, the image size
    or the number of classes is another. Warns of BatchNorm, of a training that has not ended, and
    of other data.
    """
    checkpoint = run.load_checkpoint(path, device)
    for key in ("arch", "num_classes", "image_size"):
        own, wanted = checkpoint[key], student.spec[key]
        if own != wanted:
            raise UserError(f"--teacher {path}: its {key} is {own}, the student's is {wanted}")
    teacher = from_checkpoint(checkpoint, student.spec["arch"])
    theirs, ours = trained_on(checkpoint.get("args", {})), trained_on(vars(args))
    warnings = {
        "has BatchNorm, which the method's teacher lacks": bool(batch_norms(teacher)),
        f"{unfinished(checkpoint)}, its training has not ended": bool(unfinished(checkpoint)),
        f"was trained on {theirs}, the student is on {ours}": theirs != ours,
    }
    for text, holds in warnings.items():
        if holds:
            print(f"warning: --teacher {path}: {text}")
    return teacher.to(device, memory_format=torch.channels_last)


def load_pretrained(model, file):
    """Give `model` the backbone of ImageNet weights. Without BatchNorm it gets the convolutions
    with BatchNorm folded in: the same function of an image as the other's in evaluation mode."""
    arch, norm = model.spec["arch"], model.spec["norm"]
    if norm not in ("bn", "none") or arch not in IMAGENET_RESNETS:
        known = ", ".join(IMAGENET_RESNETS)
        raise UserError(f"--pretrained: for {known} with norm bn or none, not {arch}, {norm}")
    if file == "torchvision":
        from torchvision.models import get_model_weights

        url = get_model_weights(arch).IMAGENET1K_V1.url
        file = Path(torch.hub.get_dir()) / "checkpoints" / Path(url).name
        if not file.is_file():
            raise UserError(f"--pretrained: no {file}; put {url} there, or name a file")
    source = build(arch, "bn", 1000, 224)
    load_foreign(source, run.load_checkpoint(file, foreign=True))
    modules, weights = dict(source.named_modules()), source.state_dict()
    if norm == "none":
        weights = {}
        for name in [n for n, m in modules.items() if isinstance(m, nn.Conv2d)]:
            shortcut = name.removesuffix("downsample.0") + "downsample.1"
            follows = shortcut if "downsample" in name else name.replace("conv", "bn")
            pair = fold(modules[name], modules[follows])
            weights[f"{name}.weight"], weights[f"{name}.bias"] = pair
    own = model.state_dict()
    weights = {k: v for k, v in weights.items() if not k.startswith(("fc.", "normalize."))}
    try:
        model.load_state_dict(own | weights)
    except RuntimeError as error:
        reason = str(error).splitlines()[1].strip()[:100]
        raise UserError(f"--pretrained: {arch} for this image size differs: {reason}") from None


def copy_matching_weights(source, target):
    """Give `target` the weights of `source` that have the same names and shapes."""
    shapes = {k: v.shape for k, v in target.state_dict().items()}
    weights = {k: v for k, v in source.state_dict().items() if v.shape == shapes.get(k)}
    target.load_state_dict(weights, strict=False)
