"""Networks without normalisers: Fixup (Zhang et al. 2019) and NF-ResNets (Brock et al. 2021)."""

import torch
import torch.nn.functional as F
from torch import nn

from common.models.layers import Net, Normalize, drop_path, pool
from common.models.networks import BasicBlock, Bottleneck, WideBlock
from common.models.norms import shift


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

    def maps(self, x):
        x = self.stem(self.normalize(x))
        maps = []
        for stage in self.stages:
            x = stage(x)
            maps.append(x)
        return maps

    def embed(self, last):
        return pool(F.relu(last))
