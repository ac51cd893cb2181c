"""Networks by name."""

import re

from common.models.init import init_fixup, init_glorot, init_he, init_without_norm
from common.models.layers import Layers, check_statistics
from common.models.networks import (
    VGG,
    AllConv,
    BasicBlock,
    Bottleneck,
    DeepLinear,
    DenseNet,
    ResNet,
    ResNeXt,
    WideResNet,
)
from common.models.normfree import FIXUP, FixupLinear, NormFreeNet
from common.models.norms import NORMS
from common.models.own import build_own, is_own
from common.run import UserError

CIFAR_RESNETS = {f"resnet{d}": d for d in (8, 14, 20, 26, 32, 44, 56, 110)}

IMAGENET_RESNETS = {
    "resnet18": (BasicBlock, (2, 2, 2, 2)),
    "resnet34": (BasicBlock, (3, 4, 6, 3)),
    "resnet50": (Bottleneck, (3, 4, 6, 3)),
}


def make_cifar_resnet(depth, option="A"):
    """ResNet of He et al. for CIFAR. option: of the shortcuts, A pads and B convolves."""

    def make(layers, num_classes, mean, std, image_size):
        depths, widths = ((depth - 2) // 6,) * 3, (16, 32, 64)
        return ResNet(layers, num_classes, mean, std, BasicBlock, depths, widths, "cifar", option)

    return make


def make_imagenet_resnet(block, depths):
    def make(layers, num_classes, mean, std, image_size):
        stem = "cifar" if image_size <= 64 else "imagenet"
        widths = (64, 128, 256, 512)
        return ResNet(layers, num_classes, mean, std, block, depths, widths, stem, "B")

    return make


def make_wide(depth, widen):
    return lambda layers, k, mean, std, size: WideResNet(layers, k, mean, std, depth, widen)


def make_norm_free(arch):
    """NF-ResNet-26/50, or the counterpart without normalisers of a resnet* or wrnD-K."""

    def make(layers, num_classes, mean, std, image_size):
        if layers.name != "nf":
            raise UserError(f"--arch {arch}: has no normaliser, so --norm nf (with one: resnet50)")
        stem, bottleneck, stem_width = "cifar" if image_size <= 64 else "imagenet", False, 16
        if arch in NF_RESNETS or arch in IMAGENET_RESNETS:
            block, depths = IMAGENET_RESNETS.get(arch, (Bottleneck, NF_RESNETS.get(arch)))
            bottleneck, stem_width = block is Bottleneck, 64
            widths = [planes * block.expansion for planes in (64, 128, 256, 512)]
        elif arch in CIFAR_RESNETS:
            stem, depths, widths = "cifar", ((CIFAR_RESNETS[arch] - 2) // 6,) * 3, (16, 32, 64)
        elif wide_size(arch):
            depth, widen = wide_size(arch)
            stem, depths = "cifar", ((depth - 4) // 6,) * 3
            widths = (16 * widen, 32 * widen, 64 * widen)
        else:
            raise UserError(
                f"--norm nf: not for {arch}; there are resnet*, wrnD-K, nf_resnet26 and nf_resnet50"
            )
        theirs = arch in NF_RESNETS or (arch in IMAGENET_RESNETS and stem == "imagenet")
        start = (0.0, 0.01) if theirs else (1.0, 0.1)
        return NormFreeNet(
            num_classes, mean, std, depths, widths, bottleneck, stem, stem_width, start
        )

    return make


VGG_CONVS = {
    "11": (1, 1, 2, 2, 2), "13": (2, 2, 2, 2, 2), "16": (2, 2, 3, 3, 3), "19": (2, 2, 4, 4, 4),
}  # fmt: skip


def make_vgg(depth, width=64, hidden=0):
    """VGG. depth: a key of VGG_CONVS. hidden: units of its two more linear layers."""
    convs = VGG_CONVS[depth]

    def make(layers, num_classes, mean, std, image_size):
        if image_size < 32:
            raise UserError(f"vgg{depth}: needs images of >= 32 px, not {image_size}")
        return VGG(layers, num_classes, mean, std, convs, width, hidden)

    return make


def make_allconv(width):
    """Constructor of AllConv whose first stage has `width` channels."""

    def make(layers, num_classes, mean, std, image_size):
        return AllConv(layers, num_classes, mean, std, width)

    return make


ARCHS = {name: make_cifar_resnet(depth) for name, depth in CIFAR_RESNETS.items()}

ARCHS |= {name: make_imagenet_resnet(*plan) for name, plan in IMAGENET_RESNETS.items()}

NF_RESNETS = {"nf_resnet26": (2, 2, 2, 2), "nf_resnet50": (3, 4, 6, 3)}

ARCHS |= {name: make_norm_free(name) for name in NF_RESNETS}

ARCHS |= {
    "allconv": make_allconv(96),
    "densenet40": lambda layers, k, mean, std, size: DenseNet(layers, k, mean, std, 40, 12),
    "resnext29": lambda layers, k, mean, std, size: ResNeXt(layers, k, mean, std, 29, 4, 32),
    **{f"vgg{depth}": make_vgg(depth) for depth in VGG_CONVS},
    "dln25": lambda layers, k, mean, std, size: DeepLinear(layers, 25, k),
}


def wide_size(arch):
    """(depth, widening) of a name wrnD-K or wrn28 (WRN-28-10); None for other names."""
    wide = re.fullmatch(r"wrn(\d+)-(\d+)", "wrn28-10" if arch == "wrn28" else arch)
    if wide is None:
        return None
    depth, widen = int(wide[1]), int(wide[2])
    if depth < 10 or (depth - 4) % 6 or widen < 1:
        raise UserError(f"--arch {arch}: a Wide ResNet has depth 6n+4 (10, 16, 22, 28, 40 ...)")
    return depth, widen


def constructor(arch):
    """The constructor for a name: a key of ARCHS, `wrnD-K`, `wrn28` (WRN-28-10), `vggD-W` and
    `allconv-W`, whose first stage has W channels instead of 64 or 96, or one of chenyaofo's:
    `resnet20-b`, whose shortcuts convolve, and `vgg16-b`, which ends in three linear layers."""
    wide = wide_size(arch)
    if wide:
        return make_wide(*wide)
    narrow = re.fullmatch(r"vgg(11|13|16|19)-([1-9]\d*)", arch)
    if narrow:
        return make_vgg(narrow[1], int(narrow[2]))
    if re.fullmatch(r"allconv-[1-9]\d*", arch):
        return make_allconv(int(arch.removeprefix("allconv-")))
    deep = re.fullmatch(r"vgg(11|13|16|19)-b", arch)
    if deep:
        return make_vgg(deep[1], hidden=512)
    convolved = re.fullmatch(r"(resnet\d+)-b", arch)
    if convolved and convolved[1] in CIFAR_RESNETS:
        return make_cifar_resnet(CIFAR_RESNETS[convolved[1]], "B")
    if arch not in ARCHS:
        raise UserError(
            f"--arch {arch}: unknown; there are {', '.join(ARCHS)}, wrn28, wrnD-K, vggD-W and "
            "allconv-W, or your own as FILE.py:NAME"
        )
    return ARCHS[arch]


def build(arch, norm="bn", num_classes=10, image_size=32, mean=(0.5,) * 3, std=(0.5,) * 3):
    """A freshly initialised network (torch's global generator decides the weights).

    arch: a name of ARCHS or wrnD-K, or a user's FILE.py:NAME, whose code then runs. norm: a name of
    NORMS. mean, std: of the data in [0,1]. Raises UserError for an unknown name or an impossible
    pair.
    """
    if is_own(arch):
        return build_own(arch, norm, num_classes, image_size, mean, std)
    make = constructor(arch)
    if norm not in NORMS:
        raise UserError(f"--norm {norm}: unknown; {arch} takes {', '.join(NORMS)}")
    if num_classes < 1 or image_size < 8:
        raise UserError(
            f"{arch}: needs >= 1 class and images of >= 8 px, not {num_classes}, {image_size}"
        )
    make = make_norm_free(arch) if norm == "nf" else make
    model = make(
        Layers(norm, FIXUP if norm == "fixup" else None), num_classes, mean, std, image_size
    )
    if norm == "fixup":
        model.fc = FixupLinear(model.fc.in_features, num_classes)
        init_fixup(model)
    elif isinstance(model, (VGG, DeepLinear)):
        init_glorot(model)
    elif norm != "nf":  # which initialises itself
        init_without_norm(model) if norm in ("none", "noise") else init_he(model)
    model.spec = {"arch": arch, "norm": norm, "num_classes": num_classes, "image_size": image_size}
    return model


def from_checkpoint(checkpoint, named=None):
    """The network of a checkpoint dict (`run.load_checkpoint`), in eval mode.

    named: FILE.py:NAME where the user named it, for no checkpoint makes code run. Raises UserError
    where it is needed, where fields are missing, or the weights are those of another network."""
    keys = ("arch", "norm", "num_classes", "image_size")
    missing = [key for key in keys if key not in checkpoint]
    if missing:
        raise UserError(f"the checkpoint has no {missing[0]}: take an intact copy")
    state = checkpoint["model"]
    rows = max((len(value) for value in state.values() if value.ndim), default=0)
    if checkpoint["num_classes"] > rows:  # such a head is not in the weights, and may fill memory
        raise UserError(
            f"the checkpoint's num_classes is {checkpoint['num_classes']}, which its weights are "
            "too few for: take an intact copy"
        )
    spec = {key: checkpoint[key] for key in keys}
    if is_own(spec["arch"]):
        if not is_own(named):
            raise UserError(
                f"the checkpoint is of {spec['arch']}, whose code no checkpoint makes run: name it "
                f"with --arch {spec['arch']}"
            )
        spec["arch"] = named
        spec |= {} if "normalize.mean" in state else {"mean": None, "std": None}
    model = build(**spec)
    own = model.state_dict()
    wrong = sorted(own.keys() ^ state.keys())
    for name in sorted(own.keys() & state.keys()):
        kinds = {value.is_floating_point() for value in (own[name], state[name])}
        if own[name].shape != state[name].shape or len(kinds) == 2:
            wrong.append(name)
    if wrong:
        raise UserError(
            f"the checkpoint's weights are no {checkpoint['arch']} with norm {checkpoint['norm']}: "
            f"{len(wrong)} entries differ, as {wrong[0]}"
        )
    if "normalize.mean" in state:
        check_statistics(state["normalize.mean"], state["normalize.std"])
    model.load_state_dict(state)
    return model.eval()
