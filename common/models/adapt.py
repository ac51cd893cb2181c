"""BatchNorm's statistics estimated anew on images without labels.

Schneider et al., "Improving robustness against common corruptions by covariate shift adaptation"
(NeurIPS 2020), equations 1 and 2.
"""

import contextlib

import torch
from torch.nn.modules.batchnorm import _BatchNorm

from common import run

SOURCE = 16  # images that the statistics of the training count as


def batch_norms(model):
    """The layers of a model whose statistics are running averages of batches."""
    layers = (m for m in model.modules() if isinstance(m, _BatchNorm))
    return [layer for layer in layers if layer.running_mean is not None]


class _Adapting:
    """Forward pre-hook of one layer. It mixes the statistics of what comes in with the source's."""

    def __init__(self, layer, share):
        self.layer, self.share = layer, share
        self.source = layer.running_mean.clone(), layer.running_var.clone()
        self.sums = torch.zeros(3, len(layer.running_mean), dtype=torch.float64)
        self.handle = layer.register_forward_pre_hook(self)

    def __call__(self, layer, inputs):
        x = inputs[0]
        count = x.numel() // x.shape[1]
        axes = [0, *range(2, x.dim())]
        var, mean = torch.var_mean(x.float(), axes, correction=0)
        self.use(mean, var, count)
        mean, var = mean.double().cpu(), var.double().cpu()
        self.sums += torch.stack([torch.ones_like(mean), mean, var + mean.square()]) * count

    def use(self, mean, var, count):
        """Give the layer its mixture. Like a running variance, `var` becomes the unbiased one."""
        own = mean, var * (count / max(count - 1, 1))
        buffers = self.layer.running_mean, self.layer.running_var
        for buffer, source, new in zip(buffers, self.source, own, strict=True):
            buffer.copy_(torch.lerp(source, new.to(source), self.share))

    def finish(self):
        """Give the layer the mixture with the statistics of all batches."""
        self.handle.remove()
        count, mean, square = self.sums
        if count[0] > 0:
            mean, square = mean / count, square / count
            self.use(mean, (square - mean.square()).clamp_min(0), count[0].item())

    def restore(self):
        self.handle.remove()
        self.layer.running_mean.copy_(self.source[0])
        self.layer.running_var.copy_(self.source[1])


@contextlib.contextmanager
def adapted(model, batches, count, source=SOURCE, precision=None):
    """Inside, the model has the BatchNorm statistics of the n images in `batches`, mixed with its
    own, which count as N images:

        mean = N / (N + n) mean_training + n / (N + n) mean_images, and so the variance.

    batches: an iterable of images (B,3,S,S) on the model's device, uint8 or float in [0,1]. count:
    n, the number of images in all of them. source: N. Afterwards the model is as it was.

    Every layer sees what the layers before it make of the images with their own mixtures. Of
    several batches each goes through with its own; in the end a layer gets the statistics of all.
    """
    precision = precision or run.Precision("fp32", next(model.parameters()).device)
    share = count / (count + source)
    with torch.no_grad():
        hooks = [_Adapting(layer, share) for layer in batch_norms(model)]
    try:
        with run.eval_mode(model), torch.no_grad(), precision.autocast():
            for x in batches:
                model(run.to_float(x))
            for hook in hooks:
                hook.finish()
        yield model
    finally:
        with torch.no_grad():
            for hook in hooks:
                hook.restore()
