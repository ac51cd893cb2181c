"""Adaptive gradient clipping."""

import torch


def clip_adaptively(model, ratio, eps=1e-3):
    """Adaptive gradient clipping (Brock et al. 2021, eq. 3), in place: the gradient of each output
    unit is at most `ratio` times the norm of its weights.

    `eps` stands in for weights that are smaller. Biases and gains have no fan-in, so each is one
    unit. As in the paper, the last layer ("fc") is left out.
    """
    for name, p in model.named_parameters():
        if p.grad is None or "fc." in name:
            continue
        axes = tuple(range(1, p.ndim)) if p.ndim > 1 else (0,)
        size = torch.linalg.vector_norm(p.grad.detach(), dim=axes, keepdim=True)
        weight = torch.linalg.vector_norm(p.detach(), dim=axes, keepdim=True)
        p.grad.mul_((weight.clamp_min(eps) * ratio / size.clamp_min(1e-6)).clamp_max(1))
