"""The published networks, with blocks written out."""

from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from common.models.layers import (
    Net,
    Normalize,
    PadShortcut,
    conv_shortcut,
    drop_path,
    maps_between,
    pool,
)
from common.run import UserError


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
        width = widths[0]
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

    def maps(self, x):
        x = self.maxpool(F.relu(self.bn1(self.conv1(self.normalize(x)))))
        maps = []
        for stage in self.stages:
            x = getattr(self, stage)(x)
            maps.append(x)
        return maps


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

    def maps(self, x):
        first = self.block1(self.conv1(self.normalize(x)))
        second = self.block2(first)
        return [first, second, self.block3(second)]

    def embed(self, last):
        return pool(F.relu(self.bn1(last)))


class AllConv(Net):
    """All-CNN-C (Springenberg et al. 2015) as AugMix has it: max-pool and dropout 0.5 between
    stages, GELU in its sigmoid form. Difference: the two 1x1 convolutions are not padded (AugMix
    pads them by 1 and then pools the top-left 8x8 of 10x10)."""

    gain = 1.54  # of SigmoidGELU

    def __init__(self, layers, num_classes, mean, std, width=96):
        super().__init__()
        self.normalize = Normalize(mean, std)
        wide = 2 * width
        plan = [(3, width, 3, 1), (width, width, 3, 1), (width, width, 3, 1), None]
        plan += [(width, wide, 3, 1), (wide, wide, 3, 1), (wide, wide, 3, 1), None]
        plan += [(wide, wide, 3, 0), (wide, wide, 1, 0), (wide, wide, 1, 0)]
        body = []
        for step in plan:
            if step is None:
                body += [nn.MaxPool2d(2), nn.Dropout(0.5)]
                continue
            c_in, c_out, kernel, padding = step
            body += [layers.conv(c_in, c_out, kernel, padding=padding, bias=True)]
            body += [layers.norm(c_out), SigmoidGELU()]
        self.body = nn.Sequential(*body)
        self.fc = nn.Linear(wide, num_classes)

    def maps(self, x):
        return maps_between(self.body, nn.MaxPool2d, self.normalize(x))


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

    def maps(self, x):
        return maps_between(self.body, Transition, self.conv1(self.normalize(x)))

    def embed(self, last):
        return pool(F.relu(self.bn1(last)))


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

    def maps(self, x):
        x = F.relu(self.bn1(self.conv1(self.normalize(x))))
        maps = []
        for number, block in enumerate(self.body, 1):
            x = block(x)
            if 3 * number % len(self.body) == 0:
                maps.append(x)
        return maps


class VGG(Net):
    """Simonyan & Zisserman 2015 for 32 pixels: 3x3 convolutions in five stages, each ending in a
    2x2 max-pool, and one linear layer instead of three. `convs` per stage, `width` of the first.
    hidden: units of two more linear layers with dropout, as in chenyaofo's; 0 is none."""

    def __init__(self, layers, num_classes, mean, std, convs, width, hidden=0):
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
        head = []
        for _ in range(2 if hidden else 0):
            head += [nn.Linear(c_in, hidden), nn.ReLU(), nn.Dropout()]
            c_in = hidden
        last = nn.Linear(c_in, num_classes)
        self.fc = nn.Sequential(*head, last) if hidden else last

    def maps(self, x):
        """What each stage gives to its max-pool; that of the last belongs to the embedding."""
        *layers, _ = self.body
        return maps_between(layers, nn.MaxPool2d, self.normalize(x))

    def embed(self, last):
        return pool(self.body[-1](last))


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

    def maps(self, x):
        raise UserError("the deep linear network has vectors and no feature maps")

    def features(self, x):
        if x.dim() != 2:
            raise UserError("the deep linear network takes vectors, not images: use bn_ablation.py")
        return self.body(x)

    def head(self, h):
        return self.fc(h)
