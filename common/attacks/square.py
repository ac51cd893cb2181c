"""Square Attack, by queries alone (Andriushchenko et al. 2020, arXiv 1912.00049).

Unlike the authors' code it draws a window per image, not per batch. The window may lie at the last
row and column, as in the paper. The start in L2 has bumps of one orientation.
"""

import functools
import math

import torch

from common.attacks.pgd import pick, without
from common.attacks.rows import Ball, Rows, draw, lengths, per_image

HALVINGS = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)  # queries after which p is halved


def side(query, height, width, norm, p=0.8):
    """Side of the window at a query (from 0): p times the area, p halved by the schedule that
    AutoAttack uses whatever the number of queries; odd and at least 3 for L2."""
    p /= 2 ** sum(query > h for h in HALVINGS)
    s = max(round(math.sqrt(p * height * width)), 1 if norm == "linf" else 3)
    if norm == "l2":
        s += 1 - s % 2
    return min(s, height, width)


def windows(place, s, length):
    """(N,length) bool: s entries from `place` (N,) on."""
    offset = torch.arange(length, device=place.device) - place[:, None]
    return (offset >= 0) & (offset < s)


def pyramid(height, width):
    """The bump of L2 Square: at Chebyshev distance d from the centre, the sum of 1/j^2, j > d."""
    top = max(height // 2, width // 2) + 1
    tail = torch.arange(1, top + 1).double().pow(-2).flip(0).cumsum(0).flip(0)
    rows, columns = torch.arange(height) - height // 2, torch.arange(width) - width // 2
    return tail[torch.maximum(rows.abs()[:, None], columns.abs()[None])]


@functools.lru_cache(64)
def bumps(s):
    """The pattern eta of side s, one bump up and one down, and its transpose: (2,s,s), norm 1."""
    upper, lower = (b / b.norm() for b in (pyramid(s // 2, s), pyramid(s - s // 2, s)))
    eta = torch.cat([upper, -lower])
    eta = (eta / eta.norm()).float()
    return torch.stack([eta, eta.T])


def square(net, x, y, eps, norm, queries, seed, index, tick=None):
    """Square Attack on the margin. Returns (x_adv, fooled)."""
    n, c, _, w = x.shape
    out, fooled = x.clone(), torch.zeros(n, dtype=torch.bool, device=x.device)
    dice = draw(torch.rand, (queries, 5 + c), seed, index, "square")
    ball = Ball(x, eps, norm)
    if norm == "linf":
        first = draw(torch.rand, (c, 1, w), seed, index, "square", "start") > 0.5
        adv = torch.where(first, ball.ball.high, ball.ball.low)
    else:
        adv = ball.project(x + tiles(x, seed, index) * eps)
    margin = torch.full((n,), torch.inf, device=x.device)
    s = Rows(
        row=torch.arange(n, device=x.device), x=x, y=y, ball=ball, best=adv, margin=margin,
        dice=dice,
    )  # fmt: skip
    propose = new_box if norm == "linf" else new_bump
    for query in range(queries):
        new = propose(s, query - 1, eps) if query else s.best
        logits = net.logits(new)
        margin = pick(logits, s.y) - without(logits, s.y).amax(1)
        better = margin < s.margin
        s.best = torch.where(per_image(better, x), new, s.best)
        s.margin = torch.where(better, margin, s.margin)
        now = better & net.fooled(logits, s.y)
        if now.any():
            out[s.row[now]], fooled[s.row[now]] = s.best[now], True
            s.keep(~now)
            if not len(s.row):
                break
        if tick:
            tick((query + 1) / queries)
    out[s.row] = s.best
    return out, fooled


def places(dice, s, length):
    return (dice * (length - s + 1)).long().clamp_(max=length - s)


def new_box(s, query, eps):
    """A window whose channels go to one end of the ball each."""
    h, w = s.x.shape[2:]
    size, dice = side(query, h, w, "linf"), s.dice[:, query]
    rows = windows(places(dice[:, 0], size, h), size, h)
    columns = windows(places(dice[:, 1], size, w), size, w)
    inside = rows[:, None, :, None] & columns[:, None, None, :]
    up = dice[:, 5:, None, None] > 0.5
    return torch.where(inside, torch.where(up, s.ball.ball.high, s.ball.ball.low), s.best)


def tiles(x, seed, index):
    """The start of L2 Square: a grid of 5 x 5 bumps of random signs, (N,C,H,W) of norm 1."""
    c, h, w = x.shape[1:]
    size = max(h // 5, 1)
    across, down = w // size, h // size
    sign = draw(torch.rand, (c, down, across), seed, index, "square", "start") > 0.5
    eta = bumps(size)[0].to(x.device) if size > 1 else torch.ones(1, 1, device=x.device)
    sign = (sign.float() * 2 - 1).repeat_interleave(size, 2).repeat_interleave(size, 3)
    delta = torch.zeros_like(x)
    top, left = (h - down * size) // 2, (w - across * size) // 2
    delta[:, :, top : top + down * size, left : left + across * size] = sign * eta.repeat(
        down, across
    )
    return delta / per_image(lengths(delta, "l2"), x).float()


def new_bump(s, query, eps):
    """Mass moved from one window to another, which takes the form of a bump (Algorithm 3)."""
    n, c, h, w = s.x.shape
    size, dice = side(query, h, w, "l2"), s.dice[:, query]
    where = [places(dice[:, k], size, (h, w)[k % 2]) for k in range(4)]
    span, first = torch.arange(size, device=s.x.device), torch.arange(n, device=s.x.device)

    def patch(top, left):
        rows, columns = top[:, None] + span, left[:, None] + span
        channels = torch.arange(c, device=s.x.device)[None, :, None, None]
        return first[:, None, None, None], channels, rows[:, None, :, None], columns[:, None, None]

    into, out_of = patch(*where[:2]), patch(*where[2:])
    delta = s.best - s.x
    norm = (2, 3)
    old = delta[into]
    both = [
        windows(top, size, h)[:, None, :, None] & windows(left, size, w)[:, None, None]
        for top, left in (where[:2], where[2:])
    ]
    there = (delta.square() * (both[0] | both[1])).sum(norm, keepdim=True)
    unused = (eps**2 - delta.square().sum((1, 2, 3), keepdim=True)).clamp_(min=0)
    eta = bumps(size).to(s.x.device)[(dice[:, 4] > 0.5).long()][:, None]
    sign = (dice[:, 5:, None, None] > 0.5).float() * 2 - 1
    bump = eta * sign + old / old.norm(dim=norm, keepdim=True).clamp_(min=1e-12)
    bump *= (there + unused / c).sqrt() / bump.norm(dim=norm, keepdim=True).clamp_(min=1e-12)
    delta[out_of] = 0
    delta[into] = bump
    return s.ball.project(s.x + delta * (eps / per_image(lengths(delta, "l2"), delta)).float())
