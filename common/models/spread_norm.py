"""BatchNorm of a batch that is spread over processes: two exchanges a layer and step.

An exchange takes the host half a millisecond on one machine, whatever its size, and the others
wait. So the forward pass has one, for mean and variance together, and so has the backward pass.
"""

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from common import run


class SpreadBatchNorm(torch.autograd.Function):
    """Activations x (N,C) or (N,C,H,W), normalised by mean and variance of the global batch.

    Every process has an equal share of it. weight, bias, running_mean, running_var: (C,), fp32
    where x is less. The running statistics move by `momentum` towards those of the global batch.
    """

    @staticmethod
    def forward(ctx, x, weight, bias, running_mean, running_var, momentum, eps):
        old = torch.zeros_like(running_mean), torch.ones_like(running_var)  # set the dtype only
        own = torch.batch_norm_update_stats(x, *old, 0.0)
        means, variances = run.gathered(torch.stack(own)).unbind(1)
        mean = means.mean(0)
        var = variances.mean(0) + means.var(0, correction=0)
        count = x.numel() // x.shape[1] * run.world()
        running_mean.lerp_(mean, momentum)
        running_var.lerp_(var * (count / (count - 1)), momentum)
        ctx.eps, ctx.count = eps, count
        ctx.save_for_backward(x, weight, mean, var)
        return F.batch_norm(x, mean, var, weight, bias, training=False, eps=eps)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        """With a = (x - mean) / std, and means of the global batch:

            dx = weight / std * (grad - mean(grad) - a * mean(grad * a))

        The kernel takes this process's own means instead. So what they differ by is added."""
        x, weight, mean, var = ctx.saved_tensors
        rstd = (var + ctx.eps).rsqrt()
        dx, dweight, dbias = torch.ops.aten.native_batch_norm_backward(
            grad, x, weight, mean, var, mean, rstd, train=True, eps=ctx.eps, output_mask=[True] * 3
        )
        own = torch.stack([dweight, dbias])
        missing = own * (run.world() / ctx.count) - run.gathered(own).sum(0) / ctx.count
        gain, shift = missing * (weight * rstd)
        dx += F.batch_norm(x, mean, var, gain, shift, training=False, eps=ctx.eps)
        return dx, dweight, dbias, None, None, None, None
