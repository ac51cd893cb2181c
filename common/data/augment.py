"""Augmentations beside crop and flip: cutout and AugMix, of a whole batch at once.

    batches = augmented(batches, "augmix", dataset.mean)
    x, y = batches(step)                    # x (3B,3,S,S): the images, then two views of each
    loss = loss + 12 * jsd(logits, len(y))

AugMix is Hendrycks et al. 2020: three chains of one to three operations, mixed with weights of
Dirichlet(1), then with the image at a share of Beta(1, 1). Its nine operations are none of the
corruptions of the benchmark. They do here what Pillow does: the tables of grey levels bit for bit,
the geometric ones but for rounding.

All draws of a step depend on (seed, step) alone and are made for the global batch.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F

from common import run

POLICIES = ("none", "cutout", "augmix")
VIEWS, CHAINS, DEPTH, SEVERITY = 2, 3, 3, 3.0  # of AugMix; the severity is one of 10


def augmented(batches, policy, mean):
    """The Batches with a policy of `POLICIES` on top. mean: per channel, what cutout fills in."""
    return batches if policy == "none" else Augmented(batches, policy, mean)


class Augmented:
    """Batches with cutout or AugMix; the same names as `Batches`."""

    def __init__(self, batches, policy, mean):
        self.batches, self.policy, self.mean = batches, policy, mean
        self.seed, self.per_epoch = batches.seed, batches.per_epoch
        self.batch_size = batches.batch_size

    def __call__(self, step):
        """(x, y) of this process; with augmix x is (3B,3,S,S), see above."""
        x, y = self.batches.read(step)
        rng = run.generator(self.seed, self.policy, step)
        own = run.rows(self.batch_size)
        if self.policy == "cutout":
            centre = torch.randint(x.shape[-1], (2, self.batch_size), generator=rng)[:, own]
            return cutout(run.to_float(x), *run.upload(centre, x.device), self.mean), y
        draws = Draws(*(part[..., own] for part in draw(self.batch_size, rng)))
        views = augmix(x, draws).to(memory_format=torch.channels_last)
        return torch.cat([run.to_float(x), views]), y


def cutout(x, row, column, fill):
    """Images x (N,3,S,S) in [0,1] with a square around (row, column) of N filled by `fill` (3,).

    DeVries and Taylor 2017: half of S a side, 16 pixels on CIFAR-10, cut at the border. They set
    normalised pixels to zero, which are the mean of the data set here."""
    half = x.shape[-1] // 4
    place = torch.arange(x.shape[-1], device=x.device)
    down = (place >= row[:, None] - half) & (place < row[:, None] + half)
    across = (place >= column[:, None] - half) & (place < column[:, None] + half)
    square = (down[:, :, None] & across[:, None, :]).unsqueeze(1)
    return torch.where(square, torch.tensor(fill, device=x.device).view(3, 1, 1), x)


# --- AugMix ---------------------------------------------------------------------------------------


class Draws(NamedTuple):
    """What AugMix draws for n images; CPU tensors.

    kind, level, sign: of each operation, (VIEWS,CHAINS,DEPTH,n). depth: of each chain,
    (VIEWS,CHAINS,n). weight: of each chain, the same shape. share: of the chains, (VIEWS,n)."""

    kind: torch.Tensor
    level: torch.Tensor
    sign: torch.Tensor
    depth: torch.Tensor
    weight: torch.Tensor
    share: torch.Tensor


def draw(n, rng):
    """The Draws of n images."""
    chains = (VIEWS, CHAINS, n)
    each = (VIEWS, CHAINS, DEPTH, n)
    weight = torch.empty(chains).exponential_(generator=rng)
    return Draws(
        kind=torch.randint(len(OPERATIONS), each, generator=rng),
        level=0.1 + (SEVERITY - 0.1) * torch.rand(each, generator=rng, dtype=torch.float64),
        sign=2.0 * torch.randint(2, each, generator=rng) - 1,
        depth=torch.randint(1, DEPTH + 1, chains, generator=rng),
        weight=weight / weight.sum(1, keepdim=True),  # Dirichlet(1, 1, 1)
        share=torch.rand((VIEWS, n), generator=rng),  # Beta(1, 1)
    )


def augmix(x, draws):
    """The views (VIEWS*n,3,S,S) in [0,1] of images x uint8 (n,3,S,S)."""
    n = len(x)
    z = x.contiguous().repeat(VIEWS * CHAINS, 1, 1, 1)
    depth = draws.depth.flatten()
    for d in range(DEPTH):
        rows = (depth > d).nonzero().flatten()
        kind, level, sign = (part[:, :, d].flatten()[rows] for part in draws[:3])
        on_device = run.upload(rows, x.device)
        z[on_device] = operate(z[on_device], kind, level, sign)
    weight = run.upload(draws.share[:, None] * draws.weight, x.device)
    z = z.view(VIEWS, CHAINS, n, -1)
    mixed = (weight[..., None] * z).sum(1)
    rest = run.upload(1 - draws.share, x.device)
    mixed += rest[..., None] * x.reshape(n, -1)
    return mixed.view(VIEWS * n, *x.shape[1:]) / 255


def jsd(logits, n):
    """Jensen-Shannon divergence of the predictions for n images and their views, in nats.

    logits (V*n,K): of the images, then of each view. Mean over images; AugMix's factor is 12."""
    log_p = logits.float().log_softmax(1).view(-1, n, logits.shape[1])
    p = log_p.exp()
    log_mean = p.mean(0).clamp_min(1e-7).log()
    return (p * (log_p - log_mean)).sum(2).mean()


# --- operations -----------------------------------------------------------------------------------


def operate(x, kind, level, sign):
    """Images x uint8 (n,3,S,S), each after its own operation: OPERATIONS[kind] of the level.

    kind, level, sign: CPU tensors (n,)."""
    out = x.clone()
    for k, table in enumerate(TABLES.values()):
        rows = (kind == k).nonzero().flatten()
        if len(rows):
            strength = run.upload(level[rows], x.device)
            rows = run.upload(rows, x.device)
            out[rows] = looked_up(x[rows], table(x[rows], strength))
    rows = (kind >= len(TABLES)).nonzero().flatten()
    if len(rows):
        matrix = matrices(kind[rows], level[rows], sign[rows], x.shape[-1])
        rows = run.upload(rows, x.device)
        out[rows] = warped(x[rows], run.upload(matrix, x.device))
    return out


def looked_up(x, table):
    """Images uint8 (n,3,S,S) through a table (n,3,256) or (n,1,256) of grey levels each."""
    table = table.clamp(0, 255).to(torch.uint8).expand(-1, 3, -1)
    return table.gather(2, x.flatten(2).long()).view_as(x)


def levels(x):
    """The grey levels 0 to 255, float64 (1,1,256)."""
    return torch.arange(256.0, dtype=torch.float64, device=x.device).view(1, 1, -1)


def autocontrast(x, level):
    """Stretch each channel over all grey levels."""
    low, high = (bound.double().unsqueeze(-1) for bound in x.flatten(2).aminmax(dim=2))
    scale = torch.full_like(low, 255.0) / (high - low).clamp_min(1)  # torch rounds 255 / x twice
    table = (levels(x) * scale - low * scale).trunc()
    return torch.where(high > low, table, levels(x))


def equalize(x, level):
    """Give each channel a flat histogram, in Pillow's integer arithmetic."""
    values = x.flatten(2).long()
    counts = torch.zeros(*values.shape[:2], 256, dtype=torch.int64, device=x.device)
    counts.scatter_add_(2, values, torch.ones_like(values))
    last = counts.gather(2, values.amax(2, keepdim=True))
    step = (values.shape[2] - last) // 255
    below = counts.cumsum(2) - counts
    table = (step // 2 + below) // step.clamp_min(1)
    return torch.where(step > 0, table, levels(x).long())


def posterize(x, level):
    """Keep the upper 4 bits, fewer at higher levels."""
    width = 2 ** (4 + (level * 4 / 10).trunc().view(-1, 1, 1))
    return levels(x) - levels(x) % width


def solarize(x, level):
    """Invert the grey levels from a threshold on."""
    threshold = 256 - (level * 256 / 10).trunc().view(-1, 1, 1)
    return torch.where(levels(x) < threshold, levels(x), 255 - levels(x))


TABLES = {
    "autocontrast": autocontrast, "equalize": equalize, "posterize": posterize,
    "solarize": solarize,
}  # fmt: skip
OPERATIONS = (*TABLES, "rotate", "shear_x", "shear_y", "translate_x", "translate_y")


def matrices(kind, level, sign, size):
    """Rows (a, b, c, d, e, f) float32 (n,6) of the geometric operations.

    As in Pillow the pixel centre (x, y) shows the source at this point:

        (a x + b y + c, d x + e y + f)
    """
    matrix = torch.tensor([1.0, 0, 0, 0, 1, 0], dtype=torch.float64).repeat(len(kind), 1)
    shear = sign * level * 0.3 / 10
    shift = sign * (level * (size / 3) / 10).trunc()
    for name, place, value in (
        ("shear_x", 1, shear), ("shear_y", 3, shear),
        ("translate_x", 2, shift), ("translate_y", 5, shift),
    ):  # fmt: skip
        rows = kind == OPERATIONS.index(name)
        matrix[rows, place] = value[rows]
    rows = kind == OPERATIONS.index("rotate")
    angle = torch.deg2rad(sign * (level * 30 / 10).trunc())[rows]  # counterclockwise
    cos, sin = angle.cos(), angle.sin()
    middle = size / 2
    matrix[rows] = torch.stack(
        [cos, -sin, middle * (1 - cos + sin), sin, cos, middle * (1 - sin - cos)], 1
    )
    return matrix.float()


def warped(x, matrix):
    """Images uint8 (n,3,S,S) under `matrices`, bilinear; black where the source lies outside."""
    size = x.shape[-1]
    place = torch.arange(size, device=x.device) + 0.5
    a, b, c, d, e, f = matrix[:, :, None, None].unbind(1)
    across = a * place + b * place[:, None] + c  # (n,S,S), in pixels
    down = d * place + e * place[:, None] + f
    inside = (across >= 0) & (across < size) & (down >= 0) & (down < size)
    grid = torch.stack([across, down], 3) * (2 / size) - 1
    out = F.grid_sample(x.float(), grid, "bilinear", "border", align_corners=False)
    out = (out + 1e-3).mul_(inside.unsqueeze(1))  # Pillow cuts off; 1e-3 is above our rounding
    return out.to(torch.uint8)
