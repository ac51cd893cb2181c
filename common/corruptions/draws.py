"""Random numbers: a stream per image, so that no picture depends on the others."""

import hashlib
import math

import torch


def _signed(word):
    return word - (1 << 64) if word >> 63 else word


_GAMMA, _MIX1, _MIX2 = map(
    _signed, (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
)  # splitmix64 (Steele, Lea, Flood, OOPSLA 2014)


def _mix(z):
    """The finaliser of splitmix64 on int64, in place. `>>` keeps the sign, hence the masks."""
    t = torch.empty_like(z)
    for shift, factor in ((30, _MIX1), (27, _MIX2), (31, None)):
        torch.bitwise_right_shift(z, shift, out=t)
        z.bitwise_xor_(t.bitwise_and_((1 << (64 - shift)) - 1))
        if factor is not None:
            z.mul_(factor)
    return z


class _Stream:
    """Random numbers for the images `index` (n,): hashes of (key of the image, counter).

    Integer operations only, so CPU and GPU give the same bits; 32 bits per number.
    """

    def __init__(self, key, index):
        digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
        base = int.from_bytes(digest, "little", signed=True)
        self.key = _mix(index * _GAMMA + base)[:, None]
        self.used = 0

    def _words(self, count):
        """(n, count) float64: signed 32-bit words times 2^-32, so in [-1/2, 1/2)."""
        half = (count + 1) // 2
        counter = torch.arange(self.used + 1, self.used + 1 + half, device=self.key.device)
        self.used += half
        words = _mix(self.key + counter * _GAMMA).view(torch.int32)[:, :count]
        return words.double().mul_(2.0**-32)

    def uniform(self, *shape):
        """(n, *shape) in [0, 1)."""
        return self._words(math.prod(shape)).add_(0.5).view(-1, *shape)

    def normal(self, *shape):
        """(n, *shape), standard normal, by Box and Muller."""
        count = math.prod(shape)
        half = (count + 1) // 2
        radius, angle = self._words(2 * half).split(half, 1)
        radius = torch.rsub(radius, 0.5).log_().mul_(-2).sqrt_()
        angle = angle * (2 * math.pi)
        out = torch.empty(len(angle), 2 * half, dtype=angle.dtype, device=angle.device)
        for part, function in zip(out.split(half, 1), (torch.cos, torch.sin), strict=True):
            function(angle, out=part).mul_(radius)
        return out[:, :count].reshape(-1, *shape)
