"""What every network is made of: layers that depend on the normaliser, and the base class."""

import torch
import torch.nn.functional as F
from torch import nn
from torchvision.ops import stochastic_depth

from common.models.norms import NORMS
from common.run import UserError


class Layers:
    """Constructors of what depends on the normaliser: `conv`, `norm` and the residual `block`.

    blocks: {block: the one to use in its place}, of Fixup."""

    def __init__(self, norm, blocks=None):
        self.name = norm
        self.blocks = blocks or {}

    def conv(self, c_in, c_out, kernel, stride=1, groups=1, padding=None, bias=False):
        padding = kernel // 2 if padding is None else padding
        bias = bias or self.name in ("none", "noise")
        return nn.Conv2d(c_in, c_out, kernel, stride, padding, groups=groups, bias=bias)

    def norm(self, channels):
        return NORMS[self.name](channels)

    def block(self, block):
        """The residual block to use in place of `block`."""
        return self.blocks.get(block, block)


def check_statistics(mean, std):
    """Raise UserError for a mean and deviation per channel that images in [0,1] cannot have. With
    those of 0..255 every image would be nearly the same, and the error that of chance."""
    mean, std = (v.flatten().tolist() if torch.is_tensor(v) else v for v in (mean, std))
    if not all(0 <= v <= 1 for v in mean) or not all(0 < v <= 1 for v in std):  # false for NaN too
        shown = [",".join(f"{v:g}" for v in values) for values in (mean, std)]
        raise UserError(
            f"mean {shown[0]} and std {shown[1]} are not of images in [0,1]: a mean is from 0 to "
            "1, a deviation above 0 and at most 1; divide those of 0..255 by 255"
        )


class Normalize(nn.Module):
    """(x - mean) / std per channel. Buffers: the checkpoint carries them."""

    def __init__(self, mean, std):
        super().__init__()
        check_statistics(mean, std)
        self.register_buffer("mean", torch.tensor(mean, dtype=torch.float32).view(1, -1, 1, 1))
        self.register_buffer("std", torch.tensor(std, dtype=torch.float32).view(1, -1, 1, 1))

    def forward(self, x):
        return (x - self.mean) / self.std


class Net(nn.Module):
    """Base of all networks: subclasses define `normalize`, `fc`, `maps`, and `embed` where another
    layer stands between the last map and the pooling."""

    spec = None  # arch, norm, num_classes, image_size; set by `build`
    gain = 2**0.5  # of ReLU, for `init_without_norm`

    def maps(self, x):
        """Images in [0,1] (N,3,H,W) to a list of feature maps (N,C,H',W'): what each stage ends
        with, the highest resolution first."""
        raise NotImplementedError

    def embed(self, last):
        """The last of the maps to the pooled penultimate embedding (N,D), fp32."""
        return pool(last)

    def features(self, x):
        """Images in [0,1] (N,3,H,W) to the pooled penultimate embedding (N,D), fp32."""
        return self.embed(self.maps(x)[-1])

    def head(self, h):
        """Embedding (N,D) to logits (N,K), in fp32 under autocast too: rounding logits to bf16
        would cost the margins that losses and attacks live on."""
        with torch.autocast(h.device.type, enabled=False):
            return self.fc(h.float())

    def forward(self, x, with_features=False, with_stages=False, dropout=0.0):
        """Logits (N,K); with_features adds the embedding h, with_stages the list of `maps`, in
        this order. dropout: rate in training, on what the head sees of h."""
        maps = self.maps(x) if with_stages else None
        h = self.embed(maps[-1]) if with_stages else self.features(x)
        logits = self.head(F.dropout(h, dropout, self.training))
        return answer(logits, h if with_features else None, maps)


def answer(logits, h, maps):
    """What a network returns: the logits alone, or a tuple with those of the others that are."""
    others = [part for part in (h, maps) if part is not None]
    return (logits, *others) if others else logits


def maps_between(layers, kind, x):
    """Run x (N,C,H,W) through a list of layers. Returns the list of what each layer of the class
    `kind` is given, and of what comes out at the end."""
    maps = []
    for layer in layers:
        if isinstance(layer, kind):
            maps.append(x)
        x = layer(x)
    return [*maps, x]


def pool(x):
    """Global average (N,C,H,W) -> (N,C), accumulated in fp32."""
    return x.mean((2, 3), dtype=torch.float32)


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
