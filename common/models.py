"""The networks, each with or without normalisation.

Every network takes images in [0,1] (N,3,H,W), normalises them in its first layer, and has
`features(x) -> (N,D)`, the pooled penultimate embedding, and `head(h) -> (N,K)`, the logits.

norm "bn" is the published network. norm "none" removes every BatchNorm and changes nothing else in
the function computed, except that each convolution gets the bias that BatchNorm's shift supplied.
Such a network starts differently (`init_without_norm`), for without BatchNorm the scale of the
weights decides how far the signal reaches:

* He fan-in instead of the published fan-out. Fan-out divides the variance by c_out k^2 / c_in k^2,
  5.3 at the stem (3 to 16 channels) and 2 at every widening: harmless before BatchNorm, not here.
* In a residual branch of m convolutions, of L branches in all, the inner ones are multiplied by
  L^(-1/(2m-2)) (Fixup's rule 2, Zhang et al. 2019), and the last by 0.5. Fixup has zero there.
  At zero, the loss of WRN-10-1 on `shapes` rests at ln 10 for epochs: 11.6 % error after 10 epochs
  with zero, 9.5 with 0.5, 31.4 with fan-out and zero (one seed).

A chain without branches is He fan-in. Warm-up and gradient clipping are the scripts' part.
"""

import argparse
import copy
import re
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torchvision.ops import stochastic_depth

from common import run
from common.run import UserError

# --- layers a normaliser decides ------------------------------------------------------------------


def group_norm(channels):
    """GroupNorm with at most 32 groups of at least 8 channels (32 groups from 256 channels on,
    as Wu & He 2018; narrow CIFAR nets would otherwise be instance-normalised)."""
    most = max(1, min(32, channels // 8))
    return nn.GroupNorm(next(g for g in range(most, 0, -1) if channels % g == 0), channels)


NORMS = {"bn": nn.BatchNorm2d, "gn": group_norm, "none": nn.Identity}


class Layers:
    """Constructors of the two layers that depend on the normaliser: `conv` and `norm`."""

    def __init__(self, norm):
        self.name = norm

    def conv(self, c_in, c_out, kernel, stride=1, groups=1, padding=None, bias=False):
        padding = kernel // 2 if padding is None else padding
        bias = bias or self.name in ("none", "noise")
        return nn.Conv2d(c_in, c_out, kernel, stride, padding, groups=groups, bias=bias)

    def norm(self, channels):
        return NORMS[self.name](channels)

    def block(self, block):
        """The residual block to use in place of `block`: Fixup's, if it is fixup."""
        return FIXUP[block] if self.name == "fixup" else block


class Normalize(nn.Module):
    """(x - mean) / std per channel. Buffers: the checkpoint carries them."""

    def __init__(self, mean, std):
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean, dtype=torch.float32).view(1, -1, 1, 1))
        self.register_buffer("std", torch.tensor(std, dtype=torch.float32).view(1, -1, 1, 1))

    def forward(self, x):
        return (x - self.mean) / self.std


class Net(nn.Module):
    """Base of all networks: subclasses define `normalize`, `fc` and `features`."""

    spec = None  # arch, norm, num_classes, image_size; set by `build`
    gain = 2**0.5  # of ReLU, for `init_without_norm`

    def features(self, x):
        """Images in [0,1] (N,3,H,W) to the pooled penultimate embedding (N,D), fp32."""
        raise NotImplementedError

    def head(self, h):
        """Embedding (N,D) to logits (N,K), in fp32 under autocast too: rounding logits to bf16
        would cost the margins that losses and attacks live on."""
        with torch.autocast(h.device.type, enabled=False):
            return self.fc(h.float())

    def forward(self, x, with_features=False, dropout=0.0):
        """Logits, or (logits, h). dropout: rate in training, on what the head sees of h."""
        h = self.features(x)
        logits = self.head(F.dropout(h, dropout, self.training))
        return (logits, h) if with_features else logits


def pool(x):
    """Global average (N,C,H,W) -> (N,C), accumulated in fp32."""
    return x.mean((2, 3), dtype=torch.float32)


# --- ResNet: He et al. 2016, for CIFAR (option A) and for ImageNet --------------------------------


class PadShortcut(nn.Module):
    """Option A: every second pixel, and zero channels on both sides. No parameters."""

    def __init__(self, c_in, c_out, stride):
        super().__init__()
        self.stride, self.extra = stride, (c_out - c_in) // 2

    def forward(self, x):
        x = x[:, :, :: self.stride, :: self.stride]
        return F.pad(x, (0, 0, 0, 0, self.extra, self.extra))


def conv_shortcut(layers, c_in, c_out, stride):
    """Option B: a 1x1 convolution and a norm."""
    return nn.Sequential(layers.conv(c_in, c_out, 1, stride), layers.norm(c_out))


def drop_path(branch, block):
    """Stochastic depth (Huang et al. 2016): in training the branch (N,C,H,W) of each image is left
    out with probability `block.drop_path`, and the others grow to keep the mean."""
    return stochastic_depth(branch, block.drop_path, "row", block.training)


def set_drop_path(model, rate):
    """Let the branches drop out in training, the first never, the last with probability `rate`,
    linear in between. UserError for a network whose blocks cannot."""
    blocks = [m for m in model.modules() if hasattr(m, "drop_path")]
    if rate and not blocks:
        raise UserError(f"--drop-path: {model.spec['arch']} has no blocks that can be dropped")
    for i, block in enumerate(blocks):
        block.drop_path = rate * i / max(len(blocks) - 1, 1)


class BasicBlock(nn.Module):
    expansion, drop_path = 1, 0.0

    def __init__(self, layers, c_in, width, stride, option):
        super().__init__()
        self.conv1 = layers.conv(c_in, width, 3, stride)
        self.bn1 = layers.norm(width)
        self.conv2 = layers.conv(width, width, 3)
        self.bn2 = layers.norm(width)
        self.downsample = None
        if stride != 1 or c_in != width:
            shortcut = PadShortcut if option == "A" else partial(conv_shortcut, layers)
            self.downsample = shortcut(c_in, width, stride)

    branch = ("conv1", "conv2")

    def forward(self, x):
        out = F.relu(self.bn1(self.conv1(x)))
        out = drop_path(self.bn2(self.conv2(out)), self)
        return F.relu(out + (x if self.downsample is None else self.downsample(x)))


class Bottleneck(nn.Module):
    """1x1, 3x3 (carries the stride, "v1.5"; `groups` > 1 is ResNeXt), 1x1."""

    expansion, drop_path = 4, 0.0

    def __init__(self, layers, c_in, width, stride, option="B", inner=None, groups=1):
        super().__init__()
        inner, c_out = inner or width, width * self.expansion
        self.conv1 = layers.conv(c_in, inner, 1)
        self.bn1 = layers.norm(inner)
        self.conv2 = layers.conv(inner, inner, 3, stride, groups)
        self.bn2 = layers.norm(inner)
        self.conv3 = layers.conv(inner, c_out, 1)
        self.bn3 = layers.norm(c_out)
        self.downsample = None
        if stride != 1 or c_in != c_out:
            self.downsample = conv_shortcut(layers, c_in, c_out, stride)

    branch = ("conv1", "conv2", "conv3")

    def forward(self, x):
        out = F.relu(self.bn1(self.conv1(x)))
        out = F.relu(self.bn2(self.conv2(out)))
        out = drop_path(self.bn3(self.conv3(out)), self)
        return F.relu(out + (x if self.downsample is None else self.downsample(x)))


class ResNet(Net):
    """Stages of residual blocks; each stage after the first halves the resolution.

    stem: "cifar" is a 3x3 convolution, "imagenet" 7x7 with stride 2 and a 3x3 max-pool.
    """

    def __init__(self, layers, num_classes, mean, std, block, depths, widths, stem, option):
        super().__init__()
        self.normalize = Normalize(mean, std)
        kernel, stride = (3, 1) if stem == "cifar" else (7, 2)
        width = widths[0] if option == "A" else 64
        self.conv1 = layers.conv(3, width, kernel, stride)
        self.bn1 = layers.norm(width)
        self.maxpool = nn.MaxPool2d(3, 2, 1) if stem == "imagenet" else nn.Identity()
        self.stages, block = [], layers.block(block)
        for i, (depth, planes) in enumerate(zip(depths, widths, strict=True), 1):
            blocks = []
            for j in range(depth):
                blocks.append(block(layers, width, planes, 2 if j == 0 and i > 1 else 1, option))
                width = planes * blocks[-1].expansion
            self.stages.append(f"layer{i}")
            setattr(self, f"layer{i}", nn.Sequential(*blocks))
        self.fc = nn.Linear(width, num_classes)

    def features(self, x):
        x = self.maxpool(F.relu(self.bn1(self.conv1(self.normalize(x)))))
        for stage in self.stages:
            x = getattr(self, stage)(x)
        return pool(x)


# --- Wide ResNet: Zagoruyko & Komodakis 2016 ------------------------------------------------------


class WideBlock(nn.Module):
    """Pre-activation; where the width changes, the shortcut shares the first activation."""

    drop_path = 0.0

    def __init__(self, layers, c_in, width, stride):
        super().__init__()
        self.bn1 = layers.norm(c_in)
        self.conv1 = layers.conv(c_in, width, 3, stride)
        self.bn2 = layers.norm(width)
        self.conv2 = layers.conv(width, width, 3)
        self.shortcut = layers.conv(c_in, width, 1, stride) if c_in != width else None

    branch = ("conv1", "conv2")

    def forward(self, x):
        active = F.relu(self.bn1(x))
        out = drop_path(self.conv2(F.relu(self.bn2(self.conv1(active)))), self)
        return out + (x if self.shortcut is None else self.shortcut(active))


class WideResNet(Net):
    def __init__(self, layers, num_classes, mean, std, depth, widen):
        super().__init__()
        self.normalize = Normalize(mean, std)
        self.conv1 = layers.conv(3, 16, 3)
        width, block = 16, layers.block(WideBlock)
        for i, planes in enumerate((16 * widen, 32 * widen, 64 * widen), 1):
            blocks = []
            for j in range((depth - 4) // 6):
                blocks.append(block(layers, width, planes, 2 if j == 0 and i > 1 else 1))
                width = planes
            setattr(self, f"block{i}", nn.Sequential(*blocks))
        self.bn1 = layers.norm(width)
        self.fc = nn.Linear(width, num_classes)

    def features(self, x):
        x = self.block3(self.block2(self.block1(self.conv1(self.normalize(x)))))
        return pool(F.relu(self.bn1(x)))


# --- the other networks of the AugMix protocol (Hendrycks et al. 2020) ----------------------------


class AllConv(Net):
    """All-CNN-C (Springenberg et al. 2015) as AugMix has it: max-pool and dropout 0.5 between
    stages, GELU in its sigmoid form. Difference: the two 1x1 convolutions are not padded (AugMix
    pads them by 1 and then pools the top-left 8x8 of 10x10)."""

    gain = 1.54  # of SigmoidGELU

    def __init__(self, layers, num_classes, mean, std):
        super().__init__()
        self.normalize = Normalize(mean, std)
        plan = [(3, 96, 3, 1), (96, 96, 3, 1), (96, 96, 3, 1), None]
        plan += [(96, 192, 3, 1), (192, 192, 3, 1), (192, 192, 3, 1), None]
        plan += [(192, 192, 3, 0), (192, 192, 1, 0), (192, 192, 1, 0)]
        body = []
        for step in plan:
            if step is None:
                body += [nn.MaxPool2d(2), nn.Dropout(0.5)]
                continue
            c_in, c_out, kernel, padding = step
            body += [layers.conv(c_in, c_out, kernel, padding=padding, bias=True)]
            body += [layers.norm(c_out), SigmoidGELU()]
        self.body = nn.Sequential(*body)
        self.fc = nn.Linear(192, num_classes)

    def features(self, x):
        return pool(self.body(self.normalize(x)))


class SigmoidGELU(nn.Module):
    """x * sigmoid(1.702 x), the approximation of GELU that AugMix uses."""

    def forward(self, x):
        return x * torch.sigmoid(1.702 * x)


class DenseLayer(nn.Module):
    def __init__(self, layers, c_in, growth):
        super().__init__()
        self.bn1 = layers.norm(c_in)
        self.conv1 = layers.conv(c_in, growth, 3)

    def forward(self, x):
        return torch.cat([x, self.conv1(F.relu(self.bn1(x)))], 1)


class Transition(nn.Module):
    def __init__(self, layers, channels):
        super().__init__()
        self.bn1 = layers.norm(channels)
        self.conv1 = layers.conv(channels, channels, 1)

    def forward(self, x):
        return F.avg_pool2d(self.conv1(F.relu(self.bn1(x))), 2)


class DenseNet(Net):
    """Huang et al. 2017, no bottleneck, no compression; depth 40 and growth 12 in AugMix."""

    def __init__(self, layers, num_classes, mean, std, depth, growth):
        super().__init__()
        self.normalize = Normalize(mean, std)
        width = 2 * growth
        self.conv1 = layers.conv(3, width, 3)
        body = []
        for stage in range(3):
            for _ in range((depth - 4) // 3):
                body.append(DenseLayer(layers, width, growth))
                width += growth
            if stage < 2:
                body.append(Transition(layers, width))
        self.body = nn.Sequential(*body)
        self.bn1 = layers.norm(width)
        self.fc = nn.Linear(width, num_classes)

    def features(self, x):
        return pool(F.relu(self.bn1(self.body(self.conv1(self.normalize(x))))))


class ResNeXt(Net):
    """Xie et al. 2017 for CIFAR, 3 stages; AugMix has depth 29, cardinality 4, base width 32."""

    def __init__(self, layers, num_classes, mean, std, depth, cardinality, base_width):
        super().__init__()
        self.normalize = Normalize(mean, std)
        self.conv1 = layers.conv(3, 64, 3)
        self.bn1 = layers.norm(64)
        width, body, block = 64, [], layers.block(Bottleneck)
        for i, planes in enumerate((64, 128, 256)):
            inner = cardinality * (planes * base_width // 64)
            for j in range((depth - 2) // 9):
                stride = 2 if j == 0 and i > 0 else 1
                body.append(block(layers, width, planes, stride, "B", inner, cardinality))
                width = planes * block.expansion
        self.body = nn.Sequential(*body)
        self.fc = nn.Linear(width, num_classes)

    def features(self, x):
        return pool(self.body(F.relu(self.bn1(self.conv1(self.normalize(x))))))


# --- networks and normalisers of bn_ablation.py (Santurkar et al. 2018) ---------------------------


class NoisyBatchNorm(nn.modules.batchnorm._BatchNorm):
    """BatchNorm, then in training noise whose distribution is another one at every step
    (their Algorithm 1): per channel mu ~ U(-0.5, 0.5) and sigma ~ U(1, 1.25), then per activation
    m ~ U(mu - 0.1, mu + 0.1) and s ~ N(sigma, 0.1), out = s * a + m. The paper leaves open, and
    here: the noise comes after gamma and beta, 0.1 is a standard deviation, evaluation has none."""

    def _check_input_dim(self, x):
        """(N,C) and (N,C,H,W) both."""

    def forward(self, x):
        a = super().forward(x)
        if not self.training:
            return a
        channel = a.new_empty(1, a.shape[1], *[1] * (a.dim() - 2))
        mu = torch.rand_like(channel) - 0.5
        sigma = 1 + 0.25 * torch.rand_like(channel)
        m = mu + 0.2 * (torch.rand_like(a) - 0.5)
        # randn_like would draw into channels_last one value at a time, ten times slower
        normal = torch.randn(a.numel(), dtype=a.dtype, device=a.device)
        return (sigma + 0.1 * normal.as_strided(a.shape, a.stride())) * a + m


class LpNorm(nn.Module):
    """BatchNorm with another divisor: (a - mean a) / N_p(a) * weight + bias per channel, with
    N_p(a) = (mean |a|^p)^(1/p) of the activations before the mean is taken off (N_inf: max |a|).
    The paper gives the idea; this formula is its natural reading."""

    def __init__(self, channels, p, eps=1e-5, momentum=0.1):
        super().__init__()
        self.p, self.eps, self.momentum = p, eps, momentum
        self.weight, self.bias = (
            nn.Parameter(torch.ones(channels)),
            nn.Parameter(torch.zeros(channels)),
        )
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_norm", torch.ones(channels))

    def forward(self, x):
        axes, view = [0, *range(2, x.dim())], (-1,) + (1,) * (x.dim() - 2)
        if self.training:
            a = x.to(self.weight.dtype)  # statistics in fp32 under autocast
            mean = a.mean(axes)
            size = torch.linalg.vector_norm(a, self.p, axes) * (x.numel() // x.shape[1]) ** (
                -1 / self.p
            )
            with torch.no_grad():
                self.running_mean.lerp_(mean, self.momentum)
                self.running_norm.lerp_(size, self.momentum)
        else:
            mean, size = self.running_mean, self.running_norm
        scale = self.weight / (size + self.eps)
        return x * scale.view(view).to(x.dtype) + (self.bias - mean * scale).view(view).to(x.dtype)


NORMS |= {
    "noisy-bn": NoisyBatchNorm,
    "l1": partial(LpNorm, p=1),
    "l2": partial(LpNorm, p=2),
    "linf": partial(LpNorm, p=torch.inf),
}


class VGG(Net):
    """Simonyan & Zisserman 2015 for 32 pixels: 3x3 convolutions in five stages, each ending in a
    2x2 max-pool, and one linear layer instead of three. `convs` per stage, `width` of the first."""

    def __init__(self, layers, num_classes, mean, std, convs, width):
        super().__init__()
        self.normalize = Normalize(mean, std)
        body, c_in = [], 3
        for count, c_out in zip(
            convs, (width, 2 * width, 4 * width, 8 * width, 8 * width), strict=True
        ):
            for _ in range(count):
                body += [layers.conv(c_in, c_out, 3), layers.norm(c_out), nn.ReLU()]
                c_in = c_out
            body.append(nn.MaxPool2d(2))
        self.body = nn.Sequential(*body)
        self.fc = nn.Linear(c_in, num_classes)

    def features(self, x):
        return pool(self.body(self.normalize(x)))


class DeepLinear(Net):
    """A product of `depth` square matrices without biases, on vectors (N, width); a normaliser
    follows every matrix but the last. For bn_ablation.py only."""

    def __init__(self, layers, depth, width):
        super().__init__()
        norm = nn.BatchNorm1d if layers.name == "bn" else layers.norm
        body = []
        for _ in range(depth - 1):
            body += [nn.Linear(width, width, bias=False), norm(width)]
        self.body = nn.Sequential(*body)
        self.fc = nn.Linear(width, width, bias=False)

    def features(self, x):
        if x.dim() != 2:
            raise UserError("the deep linear network takes vectors, not images: use bn_ablation.py")
        return self.body(x)

    def head(self, h):
        return self.fc(h)


# --- networks and normalisers of fixup_penalty.py (Zhang et al. 2019; Dauphin & Cubuk 2021) -------


def shift(x, bias):
    """x + bias (one scalar) in x's dtype: under autocast fp32 would spread through the network."""
    return x + bias.to(x.dtype)


class Shift(nn.Module):
    """x + one scalar: what stands before every activation where "fixup" replaces a normaliser."""

    def __init__(self):
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(1))

    def forward(self, x):
        return shift(x, self.bias)


class FixupLinear(nn.Linear):
    """A linear layer with a scalar bias before it."""

    def __init__(self, c_in, c_out):
        super().__init__(c_in, c_out)
        self.bias_in = nn.Parameter(torch.zeros(1))

    def forward(self, x):
        return super().forward(x + self.bias_in)


class FixupBlock(nn.Module):
    """Base of the blocks: one multiplier (1) before the branch's last bias, and the scalar biases
    (0) that a block names in `biases`, as in the authors' code: 1a before conv1, 1b after it."""

    def __init__(self):
        super().__init__()
        for name in self.biases:
            setattr(self, name, nn.Parameter(torch.zeros(1)))
        self.scale = nn.Parameter(torch.ones(1))

    def scaled(self, x, bias):
        return x * self.scale.to(x.dtype) + bias.to(x.dtype)


class FixupBasicBlock(FixupBlock):
    expansion = 1
    branch = ("conv1", "conv2")
    biases = ("bias1a", "bias1b", "bias2a", "bias2b")

    def __init__(self, layers, c_in, width, stride, option):
        super().__init__()
        self.conv1 = layers.conv(c_in, width, 3, stride)
        self.conv2 = layers.conv(width, width, 3)
        self.stride, self.extra = stride, width - c_in
        self.downsample = None
        if option == "B" and (stride != 1 or c_in != width):
            self.downsample = layers.conv(c_in, width, 1, stride)

    def forward(self, x):
        inside = shift(x, self.bias1a)
        out = F.relu(shift(self.conv1(inside), self.bias1b))
        out = self.scaled(self.conv2(shift(out, self.bias2a)), self.bias2b)
        if self.downsample is not None:
            x = self.downsample(inside)
        elif self.extra:  # option A; the authors put the zero channels last
            x = inside[:, :, :: self.stride, :: self.stride]
            x = F.pad(x, (0, 0, 0, 0, 0, self.extra))
        return F.relu(out + x)


class FixupBottleneck(FixupBlock):
    expansion = 4
    branch = ("conv1", "conv2", "conv3")
    biases = ("bias1a", "bias1b", "bias2a", "bias2b", "bias3a", "bias3b")

    def __init__(self, layers, c_in, width, stride, option="B", inner=None, groups=1):
        super().__init__()
        inner, c_out = inner or width, width * self.expansion
        self.conv1 = layers.conv(c_in, inner, 1)
        self.conv2 = layers.conv(inner, inner, 3, stride, groups)
        self.conv3 = layers.conv(inner, c_out, 1)
        self.downsample = None
        if stride != 1 or c_in != c_out:
            self.downsample = layers.conv(c_in, c_out, 1, stride)

    def forward(self, x):
        inside = shift(x, self.bias1a)
        out = F.relu(shift(self.conv1(inside), self.bias1b))
        out = F.relu(shift(self.conv2(shift(out, self.bias2a)), self.bias2b))
        out = self.scaled(self.conv3(shift(out, self.bias3a)), self.bias3b)
        return F.relu(out + (x if self.downsample is None else self.downsample(inside)))


class FixupWideBlock(FixupBlock):
    """The same rule for the pre-activation block, which the authors' code does not have: a bias
    before each activation (1a, 2a) and convolution (1b, 2b), the multiplier at the end; the bias
    after it is the next block's 1a."""

    branch = ("conv1", "conv2")
    biases = ("bias1a", "bias1b", "bias2a", "bias2b")

    def __init__(self, layers, c_in, width, stride):
        super().__init__()
        self.conv1 = layers.conv(c_in, width, 3, stride)
        self.conv2 = layers.conv(width, width, 3)
        self.shortcut = layers.conv(c_in, width, 1, stride) if c_in != width else None

    def forward(self, x):
        inside = shift(F.relu(shift(x, self.bias1a)), self.bias1b)
        out = F.relu(shift(self.conv1(inside), self.bias2a))
        out = self.conv2(shift(out, self.bias2b)) * self.scale.to(x.dtype)
        return out + (x if self.shortcut is None else self.shortcut(inside))


FIXUP = {BasicBlock: FixupBasicBlock, Bottleneck: FixupBottleneck, WideBlock: FixupWideBlock}


class NoiseFreeBatchNorm(nn.BatchNorm2d):
    """BatchNorm whose training batch has no part in the statistics that normalise it: they are
    constants to the gradient, free of the batch's noise.

    "bn-population": the running averages over the batches before (the first batch, which has none,
    its own). Averages with momentum a keep a/(2-a) of one batch's variance: 1/19 at 0.1.
    "bn-aux": the statistics of the images last given to `measure_statistics`, at every layer those
    of the same weights; they keep n/M of the variance for a batch of n and M auxiliary images.
    """

    def __init__(self, channels, auxiliary=False):
        super().__init__(channels)
        self.auxiliary, self.measuring = auxiliary, False
        if auxiliary:  # not saved: measured again before every step
            self.register_buffer("mean", torch.zeros(channels), persistent=False)
            self.register_buffer("var", torch.ones(channels), persistent=False)

    def forward(self, x):
        if not self.training:
            return super().forward(x)
        mean, var = (self.mean, self.var) if self.auxiliary else (None, None)
        if self.measuring or not self.auxiliary:
            with torch.no_grad():
                own_var, own_mean = torch.var_mean(x.float(), (0, 2, 3), correction=0)
                first = self.num_batches_tracked == 0  # a tensor: no sync point
                if self.auxiliary:
                    mean, var = self.mean.copy_(own_mean), self.var.copy_(own_var)
                else:
                    mean = torch.where(first, own_mean, self.running_mean)
                    var = torch.where(first, own_var, self.running_var)
                step = torch.where(first, 1.0, self.momentum)
                self.running_mean.lerp_(own_mean, step)
                self.running_var.lerp_(own_var, step)
                self.num_batches_tracked += 1
        return F.batch_norm(x, mean, var, self.weight, self.bias, eps=self.eps)


@torch.no_grad()
def measure_statistics(model, x):
    """Give the "bn-aux" layers of a model in training mode the statistics of images x."""
    layers = [m for m in model.modules() if isinstance(m, NoiseFreeBatchNorm) and m.auxiliary]
    for layer in layers:
        layer.measuring = True
    if layers:
        model(x)
    for layer in layers:
        layer.measuring = False


class BatchNoise(nn.Module):
    """The noise of batch statistics without the normalisation; identity in evaluation.

    With mean mu and standard deviation sigma of a channel, a batch of n images has mu_B = mu +
    sigma u and sigma_B = sigma (1 + v), and BatchNorm returns ((x - mu)/sigma - u)/(1 + v). Its
    noise, to first order in 1/sqrt(n) and back on the scale of x, is all that is done here:

        y = x - v (x - mu) - sigma u

    Law of (u, v): write a_i for the mean over positions of (x - mu)/sigma in image i and q_i for
    that of its square. Then u = mean a_i, (1 + v)^2 = mean q_i - u^2, so v = (mean q_i - 1)/2 to
    first order. Images are independent (positions are not), so (u, v) tends to N(0, C/n) with C
    the covariance over images of (a_i, q_i/2). For k independent positions: var u = 1/(nk), var v
    = (kurtosis - 1)/(4nk), the textbook values. C is estimated from the batch, and (u, v) drawn as
    sum_i g_i (a_i - mean a, (q_i - mean q)/2)/sqrt(N n), g_i ~ N(0,1) for the N images at hand: it
    has that covariance, and BatchNorm's correlation between channels. Layers draw independently.

    images: n; None is that of the batch. No gradient passes through mu, sigma, u and v. Under bf16
    noise finer than its grid (v below 0.004, as of n = 1024) is rounded away: train in fp32 then.
    """

    def __init__(self, channels, images=None):
        super().__init__()
        self.images = images

    def draw(self, x):
        """mu, sigma, u, v (C,), for activations x (N,C,H,W)."""
        x = x.detach().float()
        var, mu = torch.var_mean(x, (0, 2, 3), correction=0)
        sigma = var.sqrt().clamp_min(1e-6)
        z = (x - mu.view(-1, 1, 1)) / sigma.view(-1, 1, 1)
        a, q = z.mean((2, 3)), z.square().mean((2, 3))
        g = torch.randn(len(x), device=x.device) / (len(x) * (self.images or len(x))) ** 0.5
        return mu, sigma, g @ (a - a.mean(0)), g @ (q - q.mean(0)) / 2

    def forward(self, x):
        if not self.training:
            return x
        mu, sigma, u, v = (t.view(-1, 1, 1) for t in self.draw(x))
        return x * (1 - v).to(x.dtype) + (v * mu - sigma * u).to(x.dtype)


NORMS |= {
    "fixup": lambda channels: Shift(),
    "bn-population": NoiseFreeBatchNorm,
    "bn-aux": partial(NoiseFreeBatchNorm, auxiliary=True),
    "noise": BatchNoise,
}


# --- normaliser-free ResNets and normalisers of nofrost.py (Wang et al. 2022) ---------------------


class DualBatchNorm(nn.Module):
    """BatchNorm with statistics, gain and shift of its own for clean and for adversarial images
    (AdvProp, Xie et al. 2020). `use_statistics` chooses; adversarial ones until then."""

    def __init__(self, channels):
        super().__init__()
        self.clean, self.adversarial = nn.BatchNorm2d(channels), nn.BatchNorm2d(channels)
        self.used = "adversarial"

    def forward(self, x):
        return self.clean(x) if self.used == "clean" else self.adversarial(x)


def use_statistics(model, kind):
    """Let the "dual-bn" layers of a model use those of `kind`: "clean" or "adversarial"."""
    for module in model.modules():
        if isinstance(module, DualBatchNorm):
            module.used = kind


@torch.no_grad()
def mix_statistics(model, gamma):
    """Give the "dual-bn" layers a mixture as the set in use: gamma of the adversarial statistics,
    gain and shift, and 1 - gamma of the clean ones. False where the model has no such layer."""
    found = False
    for module in model.modules():
        if isinstance(module, DualBatchNorm):
            found = True
            module.used = "adversarial"
            clean = module.clean.state_dict()
            for name, value in module.adversarial.state_dict().items():
                if value.is_floating_point():
                    value.mul_(gamma).add_(clean[name], alpha=1 - gamma)
    return found


NORMS |= {
    "in": partial(nn.InstanceNorm2d, affine=True),
    "ln": partial(nn.GroupNorm, 1),
    "dual-bn": DualBatchNorm,
    "nf": nn.Identity,  # only a name: see `make_norm_free`
}


class ScaledStdConv2d(nn.Conv2d):
    """Convolution with scaled weight standardisation (Brock et al. 2021), as timm's: each filter
    w becomes gain * gamma * (w - mean w) / sqrt(fan-in * (var w + 1e-5)), in one batch_norm."""

    gamma = 1.7139588594436646  # 1 / standard deviation of relu(z), z standard normal

    def __init__(self, c_in, c_out, kernel, stride=1, gain=1.0):
        super().__init__(c_in, c_out, kernel, stride, kernel // 2)
        self.gain = nn.Parameter(torch.full((c_out, 1, 1, 1), gain))
        self.scale = self.gamma * self.weight[0].numel() ** -0.5

    def standardized(self):
        """The weight in use (C_out,C_in,k,k), fp32."""
        rows = self.weight.permute(0, 2, 3, 1)  # the order in memory under channels_last
        gain = (self.gain * self.scale).flatten()
        flat = rows.reshape(1, len(rows), -1)
        flat = F.batch_norm(flat, None, None, gain, training=True, momentum=0.0, eps=1e-5)
        return flat.view(rows.shape).permute(0, 3, 1, 2)

    def forward(self, x):
        weight = self.standardized()
        return F.conv2d(x, weight, self.bias, self.stride, self.padding)


class AverageShortcut(nn.Module):
    """2x2 average pooling where the stride is 2, then a 1x1 convolution."""

    def __init__(self, c_in, c_out, stride):
        super().__init__()
        pooled = nn.AvgPool2d(2, stride, ceil_mode=True, count_include_pad=False)
        self.pool = pooled if stride > 1 else nn.Identity()
        self.conv = ScaledStdConv2d(c_in, c_out, 1)

    def forward(self, x):
        return self.conv(self.pool(x))


class NormFreeBlock(nn.Module):
    """x + alpha f(beta relu(x)), f of convolutions 3x3, 3x3 or 1x1, 3x3, 1x1. The last one has
    `gain` at the start: 0 in timm's ImageNet recipe, 1 in the nets for small images.
    beta is 1 over the standard deviation that x has at the start; a shortcut begins after it."""

    alpha, drop_path = 0.2, 0.0

    def __init__(self, c_in, c_out, stride, bottleneck, beta, gain):
        super().__init__()
        self.beta, inner = beta, c_out // 4 if bottleneck else c_out
        self.downsample = None
        if stride != 1 or c_in != c_out:
            self.downsample = AverageShortcut(c_in, c_out, stride)
        if bottleneck:
            self.conv1 = ScaledStdConv2d(c_in, inner, 1)
            self.conv2 = ScaledStdConv2d(inner, inner, 3, stride)
            self.conv3 = ScaledStdConv2d(inner, c_out, 1, gain=gain)
        else:
            self.conv1 = ScaledStdConv2d(c_in, inner, 3, stride)
            self.conv2 = ScaledStdConv2d(inner, c_out, 3, gain=gain)
        self.branch = ("conv1", "conv2", "conv3") if bottleneck else ("conv1", "conv2")

    def forward(self, x):
        out = F.relu(x) * self.beta
        shortcut = x if self.downsample is None else self.downsample(out)
        for name in self.branch[:-1]:
            out = F.relu(getattr(self, name)(out))
        out = drop_path(getattr(self, self.branch[-1])(out), self)
        return shortcut + out * self.alpha


class NormFreeNet(Net):
    """Pre-activation ResNet without normalisers: timm's nf_resnet26/50 with the stem "imagenet"
    and bottlenecks; ours with two 3x3 convolutions a block and the stem "cifar".

    start: (gain at the end of a branch, standard deviation of the classifier). timm's (0, 0.01)
    is made for 90 epochs of ImageNet. A small network that trains for minutes hardly leaves it:
    85.4 % error after 6 epochs of `shapes` at rate 0.1, 7.8 with (1, 0.1) at rate 0.3 (one seed).
    """

    def __init__(
        self, num_classes, mean, std, depths, widths, bottleneck, stem, stem_width, start
    ):  # fmt: skip
        super().__init__()
        self.normalize = Normalize(mean, std)
        kernel, stride = (3, 1) if stem == "cifar" else (7, 2)
        self.stem = nn.Sequential()
        self.stem.conv = ScaledStdConv2d(3, stem_width, kernel, stride)
        if stem == "imagenet":
            self.stem.pool = nn.MaxPool2d(3, 2, 1)
        width, variance, stages = stem_width, 1.0, []
        for i, (depth, planes) in enumerate(zip(depths, widths, strict=True)):
            blocks = []
            for j in range(depth):
                stride = 2 if j == 0 and i > 0 else 1
                blocks.append(
                    NormFreeBlock(width, planes, stride, bottleneck, variance**-0.5, start[0])
                )
                # The shortcut of a stage's first block starts anew at variance 1.
                variance = (1.0 if j == 0 else variance) + NormFreeBlock.alpha**2
                width = planes
            stages.append(nn.Sequential(*blocks))
        self.stages = nn.Sequential(*stages)
        self.fc = nn.Linear(width, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, nonlinearity="linear")
                nn.init.zeros_(module.bias)
        nn.init.normal_(self.fc.weight, std=start[1])
        nn.init.zeros_(self.fc.bias)

    def features(self, x):
        return pool(F.relu(self.stages(self.stem(self.normalize(x)))))


# --- initialisation -------------------------------------------------------------------------------


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
    nn.init.zeros_(model.fc.bias)


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


# --- build, save, load ----------------------------------------------------------------------------

CIFAR_RESNETS = {f"resnet{d}": d for d in (8, 14, 20, 26, 32, 44, 56, 110)}
IMAGENET_RESNETS = {
    "resnet18": (BasicBlock, (2, 2, 2, 2)),
    "resnet34": (BasicBlock, (3, 4, 6, 3)),
    "resnet50": (Bottleneck, (3, 4, 6, 3)),
}


def make_cifar_resnet(depth):
    def make(layers, num_classes, mean, std, image_size):
        depths, widths = ((depth - 2) // 6,) * 3, (16, 32, 64)
        return ResNet(layers, num_classes, mean, std, BasicBlock, depths, widths, "cifar", "A")

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
        start = (0.0, 0.01) if arch in NF_RESNETS else (1.0, 0.1)
        return NormFreeNet(
            num_classes, mean, std, depths, widths, bottleneck, stem, stem_width, start
        )

    return make


def make_vgg(depth, width=64):
    convs = {11: (1, 1, 2, 2, 2), 13: (2, 2, 2, 2, 2), 16: (2, 2, 3, 3, 3)}[depth]

    def make(layers, num_classes, mean, std, image_size):
        if image_size < 32:
            raise UserError(f"vgg{depth}: needs images of >= 32 px, not {image_size}")
        return VGG(layers, num_classes, mean, std, convs, width)

    return make


ARCHS = {name: make_cifar_resnet(depth) for name, depth in CIFAR_RESNETS.items()}
ARCHS |= {name: make_imagenet_resnet(*plan) for name, plan in IMAGENET_RESNETS.items()}
NF_RESNETS = {"nf_resnet26": (2, 2, 2, 2), "nf_resnet50": (3, 4, 6, 3)}
ARCHS |= {name: make_norm_free(name) for name in NF_RESNETS}
ARCHS |= {
    "allconv": lambda layers, k, mean, std, size: AllConv(layers, k, mean, std),
    "densenet40": lambda layers, k, mean, std, size: DenseNet(layers, k, mean, std, 40, 12),
    "resnext29": lambda layers, k, mean, std, size: ResNeXt(layers, k, mean, std, 29, 4, 32),
    "vgg11": make_vgg(11),
    "vgg13": make_vgg(13),
    "vgg16": make_vgg(16),
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
    """The constructor for a name: a key of ARCHS, `wrnD-K`, `wrn28` (WRN-28-10), or
    `vggD-W`, a VGG whose first stage has W channels instead of 64."""
    wide = wide_size(arch)
    if wide:
        return make_wide(*wide)
    narrow = re.fullmatch(r"vgg(11|13|16)-([1-9]\d*)", arch)
    if narrow:
        return make_vgg(int(narrow[1]), int(narrow[2]))
    if arch not in ARCHS:
        raise UserError(
            f"--arch {arch}: unknown; there are {', '.join(ARCHS)}, wrn28, wrnD-K and vggD-W"
        )
    return ARCHS[arch]


def build(arch, norm="bn", num_classes=10, image_size=32, mean=(0.5,) * 3, std=(0.5,) * 3):
    """A freshly initialised network (torch's global generator decides the weights).

    arch: a name of ARCHS or wrnD-K; norm: a name of NORMS; mean, std: of the data in [0,1].
    Raises UserError for an unknown name or an impossible pair.
    """
    make = constructor(arch)
    if norm not in NORMS:
        raise UserError(f"--norm {norm}: unknown; {arch} takes {', '.join(NORMS)}")
    if num_classes < 1 or image_size < 8:
        raise UserError(
            f"{arch}: needs >= 1 class and images of >= 8 px, not {num_classes}, {image_size}"
        )
    make = make_norm_free(arch) if norm == "nf" else make
    model = make(Layers(norm), num_classes, mean, std, image_size)
    if norm == "fixup":
        model.fc = FixupLinear(model.fc.in_features, num_classes)
        init_fixup(model)
    elif isinstance(model, (VGG, DeepLinear)):
        init_glorot(model)
    elif norm != "nf":  # which initialises itself
        init_without_norm(model) if norm in ("none", "noise") else init_he(model)
    model.spec = {"arch": arch, "norm": norm, "num_classes": num_classes, "image_size": image_size}
    return model


def from_checkpoint(checkpoint):
    """The network of a checkpoint dict (`run.load_checkpoint`), in eval mode."""
    keys = ("arch", "norm", "num_classes", "image_size")
    model = build(**{key: checkpoint[key] for key in keys})
    model.load_state_dict(checkpoint["model"])
    return model.eval()


RENAMES = [  # names in other projects' checkpoints -> names here
    (r"^(module\.|_orig_mod\.|model\.)+", ""),
    (r"^linear\.", "fc."),
    (r"\.shortcut\.(?=[01]\.)", ".downsample."),
    (r"^(block\d)\.layer\.", r"\1."),
    (r"\.convShortcut\.", ".shortcut."),
    (r"^head\.fc\.", "fc."),  # timm's NF-ResNets
    (r"^bias1$", "bn1.bias"),  # the authors' Fixup nets
    (r"^bias2$", "fc.bias_in"),
]


def load_foreign(model, state):
    """Load a state_dict of another project (torchvision, akamaster's and kuangliu's CIFAR nets,
    the PyTorch Wide ResNet). Raises UserError naming what does not fit."""
    state = next((state[k] for k in ("state_dict", "model", "net") if k in state), state)
    renamed = {}
    for key, value in state.items():
        for pattern, new in RENAMES:
            key = re.sub(pattern, new, key)
        renamed[key] = value
    own = model.state_dict()
    ours = r"normalize\..*|.*num_batches_tracked"  # absent elsewhere, or in old files
    renamed = {k: own[k] for k in own if re.fullmatch(ours, k)} | renamed
    wrong = sorted(own.keys() ^ renamed.keys())
    wrong += [k for k in own.keys() & renamed.keys() if own[k].shape != renamed[k].shape]
    if wrong:
        arch = model.spec["arch"]
        raise UserError(f"the state_dict is no {arch}: {len(wrong)} entries differ, as {wrong[0]}")
    model.load_state_dict(renamed)
    return model.eval()


# --- networks to evaluate -------------------------------------------------------------------------


def add_arguments(parser, nargs="+", datasets=None):
    """Add the networks of an evaluation: checkpoints, state_dicts, torchvision's names."""
    parser.add_argument(
        "checkpoints", nargs=nargs, metavar="CHECKPOINT",
        help="runs/x/last.pt, a run directory, or torchvision:resnet50 (ImageNet)",
    )  # fmt: skip
    group = parser.add_argument_group("state_dict of another project")
    group.add_argument("--arch")
    group.add_argument("--model-norm", default="bn", choices=NORMS, help="its normalisation")
    group.add_argument("--dataset", choices=datasets, help="what it was trained on")
    group.add_argument("--mean", type=triple, metavar="R,G,B", help="in [0,1]")
    group.add_argument("--std", type=triple, metavar="R,G,B")


def triple(text):
    """argparse type: three numbers."""
    values = tuple(float(v) for v in text.split(","))
    if len(values) != 3:
        raise argparse.ArgumentTypeError(f"{text}: three numbers, as 0.49,0.48,0.45")
    return values


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
    model = nn.Sequential(Normalize(form.mean, form.std), net).eval()
    model.spec = {"arch": name, "norm": "bn", "num_classes": 1000, "image_size": 224}
    return model


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
            tensors = next((state[k] for k in ("state_dict", "model", "net") if k in state), state)
            heads = [v for v in tensors.values() if isinstance(v, torch.Tensor) and v.ndim == 2]
            classes = len(heads[-1]) if heads else 10
            size = {"imagenet": 224, "tiny-imagenet": 64}.get(args.dataset, 32)
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


INITS = {"he": init_he, "glorot": init_glorot, "fixup": init_fixup}


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
    from common.attacks import folded as _folded

    source = build(arch, "bn", 1000, 224)
    load_foreign(source, run.load_checkpoint(file, foreign=True))
    modules, weights = dict(source.named_modules()), source.state_dict()
    if norm == "none":
        weights = {}
        for name in [n for n, m in modules.items() if isinstance(m, nn.Conv2d)]:
            shortcut = name.removesuffix("downsample.0") + "downsample.1"
            follows = shortcut if "downsample" in name else name.replace("conv", "bn")
            pair = _folded(modules[name], modules[follows])
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
