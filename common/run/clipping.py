"""Gradient clipping: of the norm of all gradients, and adaptive."""

import torch


def clip_gradients(model, largest):
    """The norm of all gradients, 0-d. Above `largest` they are scaled down to it; 0 is no limit."""
    if largest:
        return torch.nn.utils.clip_grad_norm_(model.parameters(), largest)
    return torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])


def unit_norms(x):
    """Norms (units,) of the output units of a weight; a vector is one unit."""
    axes = tuple(range(1, x.ndim)) if x.ndim > 1 else (0,)
    return torch.linalg.vector_norm(x, dim=axes).view(-1)


def clip_adaptively(model, ratio, eps=1e-3):
    """Adaptive gradient clipping (Brock et al. 2021, eq. 3), in place: the gradient of each output
    unit is at most `ratio` times the norm of its weights.

    `eps` stands in for weights that are smaller. Biases and gains have no fan-in, so each is one
    unit. As in the paper, the last layer ("fc") is left out.
    """
    parameters = [p for n, p in model.named_parameters() if p.grad is not None and "fc." not in n]
    if not parameters:
        return
    # One vector for the units of all parameters: a GPU gets three small kernels a parameter.
    sizes = torch.cat([unit_norms(p.grad) for p in parameters])
    weights = torch.cat([unit_norms(p.detach()) for p in parameters])
    factors = (weights.clamp_min(eps) * ratio / sizes.clamp_min(1e-6)).clamp_max(1)
    counts = [len(p) if p.ndim > 1 else 1 for p in parameters]
    for p, factor in zip(parameters, factors.split(counts), strict=True):
        p.grad.mul_(factor.view(-1, *[1] * (p.ndim - 1)))
