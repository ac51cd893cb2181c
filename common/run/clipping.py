"""Gradient clipping: of the norm of all gradients, and adaptive."""

import torch


def clip_gradients(model, largest):
    """The norm of all gradients, 0-d. Above `largest` they are scaled down to it; 0 is no limit."""
    if largest:
        return torch.nn.utils.clip_grad_norm_(model.parameters(), largest)
    return torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])


def dense(x):
    """x, or its contiguous copy where its rows do not lie in memory one after the other."""
    last = x.is_contiguous(memory_format=torch.channels_last)
    return x if last or x.is_contiguous() else x.contiguous()


def units(x):
    """A dense weight as a matrix (output units, values of a unit), without a copy. A vector is one
    unit. The order within a unit is that of the memory."""
    count = len(x) if x.ndim > 1 else 1
    size = x.numel() // count
    return x.as_strided((count, size), (size, 1))


def joined(rows):
    """Matrices of equal width as one. A matrix alone is itself, not a copy."""
    return rows[0] if len(rows) == 1 else torch.cat(rows)


def norms(matrices):
    """Norms of all rows, (rows,)."""
    return torch.cat([torch.linalg.vector_norm(rows, dim=1) for rows in matrices])


def clip_adaptively(model, ratio, eps=1e-3, together=None):
    """Adaptive gradient clipping (Brock et al. 2021, eq. 3), in place: the gradient of each output
    unit is at most `ratio` times the norm of its weights.

    `eps` stands in for weights that are smaller. Biases and gains have no fan-in, so each is one
    unit. As in the paper, the last layer ("fc") is left out.

    together: units of one size are copied into one matrix. So the number of kernels does not grow
    with depth. None: on a GPU. On a CPU the copies would take longer than the calls.
    """
    alike = {}
    for name, p in model.named_parameters():
        if p.grad is not None and "fc." not in name:
            p.grad = dense(p.grad)
            weight = units(dense(p.detach()))
            key = weight.shape[1] if (p.is_cuda if together is None else together) else name
            alike.setdefault(key, []).append((p.grad, weight))
    if not alike:
        return
    grads = [joined([units(grad) for grad, _ in group]) for group in alike.values()]
    weights = norms([joined([weight for _, weight in group]) for group in alike.values()])
    factors = (weights.clamp_min(eps) * ratio / norms(grads).clamp_min(1e-6)).clamp_max(1)
    for rows, factor in zip(grads, factors.split([len(rows) for rows in grads]), strict=True):
        rows.mul_(factor[:, None])
    copied = [(group, rows) for group, rows in zip(alike.values(), grads, strict=True) if group[1:]]
    old = [grad for group, _ in copied for grad, _ in group]
    new = [part for group, rows in copied for part in rows.split([len(w) for _, w in group])]
    if old:
        new = [part.as_strided(g.shape, g.stride()) for part, g in zip(new, old, strict=True)]
        torch._foreach_copy_(old, new)
