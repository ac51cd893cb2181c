"""The normalisers, in one table; BatchNorm is that of the global batch under torchrun."""

from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from common import run
from common.models.spread_norm import SpreadBatchNorm


class GroupNorm(nn.GroupNorm):
    """GroupNorm, under autocast in the dtype of its input; the statistics are fp32.

    On a CPU that is torch's own. On a GPU autocast would run it in fp32: with the maps between two
    such layers in fp32 a network takes twice the memory, and each relayout twice the bytes."""

    def forward(self, x):
        low = x.dtype in (torch.bfloat16, torch.float16)
        if not (x.is_cuda and low and torch.is_autocast_enabled("cuda")):
            return super().forward(x)
        with torch.autocast("cuda", enabled=False):
            affine = self.weight.to(x.dtype), self.bias.to(x.dtype)
            return F.group_norm(x, self.num_groups, *affine, self.eps)


def group_norm(channels):
    """GroupNorm with at most 32 groups of at least 8 channels (32 groups from 256 channels on,
    as Wu & He 2018; narrow CIFAR nets would otherwise be instance-normalised)."""
    most = max(1, min(32, channels // 8))
    return GroupNorm(next(g for g in range(most, 0, -1) if channels % g == 0), channels)


class BatchNorm(nn.BatchNorm2d):
    """BatchNorm of activations (N,C) or (N,C,H,W). Under torchrun its statistics are those of the
    global batch, of which every process has an equal share; with one process it is torch's own."""

    def _check_input_dim(self, x):
        """(N,C) and (N,C,H,W) both."""

    def forward(self, x):
        if not self.training or run.world() == 1:
            return super().forward(x)
        self.num_batches_tracked += 1
        running = self.running_mean, self.running_var
        return SpreadBatchNorm.apply(x, self.weight, self.bias, *running, self.momentum, self.eps)


class NoisyBatchNorm(BatchNorm):
    """BatchNorm a, then in training noise of another distribution at every step (Algorithm 1).

        per channel       mu ~ U(-0.5, 0.5)             sigma ~ U(1, 1.25)
        per activation    m ~ U(mu - 0.1, mu + 0.1)     s ~ N(sigma, 0.1)     out = s * a + m

    The paper leaves open, and here: the noise comes after gamma and beta, 0.1 is a standard
    deviation, evaluation has none."""

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
    """BatchNorm with another divisor, per channel.

        out = (a - mean a) / N_p(a) * weight + bias,    N_p(a) = (mean |a|^p)^(1/p)

    N_p is of the activations before the mean is taken off, and N_inf is max |a|. The paper gives
    the idea; this formula is its natural reading."""

    single_process = True  # its statistics cannot be those of a batch spread over processes

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


class NoiseFreeBatchNorm(nn.BatchNorm2d):
    """BatchNorm whose training batch has no part in the statistics that normalise it: they are
    constants to the gradient, free of the batch's noise.

    "bn-population": the running averages over the batches before (the first batch, which has none,
    its own). Averages with momentum a keep a/(2-a) of one batch's variance: 1/19 at 0.1.
    "bn-aux": the statistics of the images last given to `measure_statistics`, at every layer those
    of the same weights; they keep n/M of the variance for a batch of n and M auxiliary images.
    """

    single_process = True  # its statistics cannot be those of a batch spread over processes

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

    Let a channel have mean mu and standard deviation sigma. A batch of n images has others:

        mu_B = mu + sigma u,   sigma_B = sigma (1 + v)

    So BatchNorm returns ((x - mu)/sigma - u)/(1 + v). Its noise, to first order in 1/sqrt(n) and
    back on the scale of x, is all that is done here:

        y = x - v (x - mu) - sigma u

    Law of (u, v): write a_i for the mean over positions of (x - mu)/sigma in image i and q_i for
    that of its square. Then u = mean a_i, (1 + v)^2 = mean q_i - u^2, so v = (mean q_i - 1)/2 to
    first order. Images are independent (positions are not), so (u, v) tends to N(0, C/n) with C
    the covariance over images of (a_i, q_i/2). For k independent positions: var u = 1/(nk), var v
    = (kurtosis - 1)/(4nk), the textbook values. C is estimated from the N images at hand. With
    g_i ~ N(0,1) the layer draws

        (u, v) = sum_i g_i (a_i - mean a, (q_i - mean q)/2) / sqrt(N n)

    It has that covariance, and BatchNorm's correlation between channels. Layers draw independently.

    images: n; None is that of the batch. No gradient passes through mu, sigma, u and v. Under bf16
    noise finer than its grid (v below 0.004, as of n = 1024) is rounded away: train in fp32 then.
    """

    single_process = True  # its statistics cannot be those of a batch spread over processes

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


def set_noise(model, images):
    """Let every BatchNoise draw the noise of batches of so many images."""
    for module in model.modules():
        if isinstance(module, BatchNoise):
            module.images = images


class DualBatchNorm(nn.Module):
    """BatchNorm with statistics, gain and shift of its own for clean and for adversarial images
    (AdvProp, Xie et al. 2020). `use_statistics` chooses; adversarial ones until then."""

    def __init__(self, channels):
        super().__init__()
        self.clean = BatchNorm(channels)
        self.adversarial = BatchNorm(channels)
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


NORMS = {
    "bn": BatchNorm,
    "gn": group_norm,
    "none": nn.Identity,
    "noisy-bn": NoisyBatchNorm,
    "l1": partial(LpNorm, p=1),
    "l2": partial(LpNorm, p=2),
    "linf": partial(LpNorm, p=torch.inf),
    "fixup": lambda channels: Shift(),
    "bn-population": NoiseFreeBatchNorm,
    "bn-aux": partial(NoiseFreeBatchNorm, auxiliary=True),
    "noise": BatchNoise,
    "in": partial(nn.InstanceNorm2d, affine=True),
    "ln": partial(GroupNorm, 1),
    "dual-bn": DualBatchNorm,
    "nf": nn.Identity,  # only a name: see `zoo.make_norm_free`,
}
