"""How the networks start.

norm "bn" is the published network. norm "none" removes every BatchNorm and changes nothing else in
the function computed, except that each convolution gets the bias that BatchNorm's shift supplied.
Such a network starts differently (`init_without_norm`), for without BatchNorm the scale of the
weights decides how far the signal reaches:

* He fan-in instead of the published fan-out. Fan-out divides the variance by c_out k^2 / c_in k^2,
  5.3 at the stem (3 to 16 channels) and 2 at every widening: harmless before BatchNorm, not here.
* Let a residual branch have m convolutions, and the network L branches. The inner convolutions
  are multiplied by L^(-1/(2m-2)) (Fixup's rule 2, Zhang 2019), the last by 0.5. Fixup has zero.
  At zero, the loss of WRN-10-1 on `shapes` rests at ln 10 for epochs: 11.6 % error after 10 epochs
  with zero, 9.5 with 0.5, 31.4 with fan-out and zero (one seed).

A chain without branches is He fan-in. Warm-up and gradient clipping are the scripts' part.
"""

import copy

import torch
from torch import nn

from common.models.norms import measure_statistics
from common.run import UserError


def init_glorot(model):
    """Glorot-uniform weights, zero biases (Santurkar et al. 2018, for all normalisers)."""
    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            nn.init.xavier_uniform_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)


def init_he(model, mode="fan_out"):
    """He-normal convolutions, zero biases. mode: fan_out, as the published nets, or fan_in."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode=mode, nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    for module in getattr(model, "fc", nn.Identity()).modules():  # several in VGG with more
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)


@torch.no_grad()
def init_without_norm(model):
    """The start of networks without a normaliser; the module's docstring explains it.

    fan-in keeps the variance of the signal from layer to layer, whatever the widths; `gain` is
    1/sqrt(E[phi(z)^2]) of the network's activation, z standard normal."""
    branches = [m for m in model.modules() if hasattr(m, "branch")]
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.normal_(module.weight, std=model.gain * module.weight[0].numel() ** -0.5)
            nn.init.zeros_(module.bias)
    scale_branches(branches, LAST_SCALE)
    nn.init.zeros_(model.fc.bias)


LAST_SCALE = 0.5  # of the last convolution in a branch, for networks without a normaliser


def scale_branches(branches, last_scale):
    """Scale the L branches of m convolutions: the inner ones by L^(-1/(2m-2)), the last by
    `last_scale`. In place."""
    for module in branches:
        *inner, last = (getattr(module, name) for name in module.branch)
        for conv in inner:
            conv.weight.mul_(len(branches) ** (-0.5 / len(inner)))
        last.weight.mul_(last_scale)


@torch.no_grad()
def init_fixup(model):
    """Rules 1 and 2 of Fixup for any network with residual branches: a zero classifier, the last
    convolution of a branch zero, the others He-initialised times L^(-1/(2m-2))."""
    branches = [m for m in model.modules() if hasattr(m, "branch")]
    if not branches:
        raise UserError(
            f"fixup: {type(model).__name__} has no residual branch; possible are resnet*, wrnD-K "
            "and resnext29, or --norm none --init he"
        )
    init_he(model)
    scale_branches(branches, 0.0)
    nn.init.zeros_(model.fc.weight)


def zero_branches(model):
    """Let every bottleneck branch start at zero: the gain of its last normaliser is 0."""
    for block in model.modules():
        if hasattr(block, "bn3"):
            for name, gain in block.bn3.named_parameters():
                if name.endswith("weight"):
                    nn.init.zeros_(gain)


def fixup_groups(model, scalar_lr):
    """Parameter groups of the optimizer: Fixup's scalars learn at scalar_lr times the rate.

    So does the bias of its classifier, as in its code. Weight decay is on all parameters, as there.
    Other networks are one group.
    """
    groups = {1.0: [], scalar_lr: []}
    for name, parameter in model.named_parameters():
        scalar = model.spec["norm"] == "fixup" and ("bias" in name or "scale" in name)
        groups[scalar_lr if scalar else 1.0].append(parameter)
    return [{"params": own, "lr_scale": scale} for scale, own in groups.items() if own]


INITS = {"he": init_he, "glorot": init_glorot, "fixup": init_fixup}


@torch.no_grad()
def mean_squares(model, x):
    """Mean squares in training mode on images x: of the embedding, the logits and, in order, the
    output of every residual block. The model itself is left as it was."""
    model, blocks = copy.deepcopy(model).train(), []
    measure_statistics(model, x)
    for module in model.modules():
        if hasattr(module, "branch"):
            module.register_forward_hook(lambda m, i, out: blocks.append(out.square().mean()))
    logits, h = model(x, with_features=True)
    values = torch.stack([h.square().mean(), logits.square().mean(), *blocks]).tolist()
    return {"embedding": values[0], "logits": values[1], "blocks": values[2:]}
