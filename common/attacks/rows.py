"""Batches from which images retire: a ball per image, rows of tensors, random numbers per image."""

import copy

import torch

from common import run
from common.attacks.pgd import BALLS


def per_image(values, like):
    """(N,) as (N,1,1,1), to multiply images with."""
    return values.view(-1, *[1] * (like.ndim - 1))


def lengths(delta, norm):
    """Norms (N,) fp64 of the rows of `delta`. The largest entry is exact in any dtype, and fp32 is
    17 times faster than vector_norm in fp64."""
    if norm == "linf":
        return delta.flatten(1).abs().amax(1).double()
    return torch.linalg.vector_norm(delta.flatten(1), 2, dim=1, dtype=torch.float64)


def distance(x_adv, x, norm):
    """Distances (N,) in exact arithmetic: fp64 holds the difference of two fp32 numbers."""
    return lengths(x_adv.double() - x.double(), norm)


class Ball:
    """The ball of pgd.py around each of the images x, cut with [0,1]."""

    def __init__(self, x, eps, norm):
        self.ball, self.norm, self.eps, self.x = BALLS[norm](x, eps, eps), norm, eps, x

    def __getitem__(self, rows):
        part = copy.copy(self)
        part.ball, part.x = copy.copy(self.ball), self.x[rows]
        for name, value in vars(self.ball).items():
            if isinstance(value, torch.Tensor):
                setattr(part.ball, name, value[rows])
        return part

    def project(self, adv):
        """In place: into the ball and the box, exactly."""
        if self.norm == "linf":
            return adv.clamp_(self.ball.low, self.ball.high)
        self.ball.project(adv, adv - self.x)
        return adv

    def direction(self, grad):
        """The steepest step of length one."""
        if self.norm == "linf":
            return grad.sign()
        return grad * per_image(lengths(grad, "l2").clamp_(min=1e-30).reciprocal(), grad).float()


class Rows:
    """Named values with one row per image."""

    def __init__(self, **values):
        vars(self).update(values)

    def keep(self, mask):
        """Keep the rows of a mask (N,). One wait for the device, not one for each value."""
        rows = mask.nonzero()[:, 0]
        for name, value in vars(self).items():
            if value is not None:
                setattr(self, name, value[rows])


def draw(function, shape, seed, index, *key):
    """Random numbers (N,*shape) that belong to the images `index`, not to their batch."""
    rows = [function(shape, generator=run.generator(seed, *key, i)) for i in index.tolist()]
    return torch.stack(rows).to(index.device)


def start_noise(x, norm, seed, index, *key):
    """Starts of APGD: uniform in the box of Linf, uniform on the sphere of L2, both of size 1."""
    if norm == "linf":
        return draw(torch.rand, x.shape[1:], seed, index, *key).mul_(2).sub_(1)
    noise = draw(torch.randn, x.shape[1:], seed, index, *key)
    return noise / per_image(lengths(noise, "l2"), noise).float()
