"""The embedded data set: ten classes of coloured, textured shapes, drawn by torch from a seed.

    x, y = make(10000)                                # x uint8 (10000,3,32,32), y int64 (10000,)
    x, y = make(2000, split="test", style="outline")

A picture has a background of gradient, soft noise and stripes in random proportion. On it lie two
pieces of clutter, then the figure, which is the class, and one more piece of clutter. The figure
has random position, size, aspect, rotation, colours and contrast. A lighting ramp and pixel noise
come last. Shapes are implicit functions of the position (Quilez, "2D distance functions"), so edges
are anti-aliased at any size.

Picture i is a function of (seed, split, style, i) and of nothing else. Pictures are drawn in blocks
of BLOCK, each from one generator. Splits and styles have streams of their own, so nothing is shared
between them. Every ten consecutive pictures hold each class once.

Styles are the domains of leave-one-domain-out runs. `filled` has plain figures, `outline` the edge
only, `textured` striped and spotted figures. `inverted` is the negative of `filled`: 90 % of its
figures are darker than their background, 10 % in the other styles.

Shortcut: a class-dependent grating of at most SHORTCUT grey levels, added to the whole picture. Its
variance is tiny, it predicts the class perfectly and survives flips and crops. Noise, blur, JPEG
and the like destroy it. BatchNorm models are said to lean on such features.
"""

import math

import torch
import torch.nn.functional as F

from common import run

CLASSES = (
    "disc",
    "ring",
    "crescent",
    "square",
    "triangle",
    "pentagon",
    "star",
    "cross",
    "heart",
    "arrow",
)
STYLES = ("filled", "outline", "textured", "inverted")
SPLITS = ("train", "val", "test")
SHORTCUT = 3  # largest deviation of the shortcut pattern, grey levels
BLOCK = 100  # pictures drawn together; part of the data set's definition, like the formulas
PIECES = 3  # of clutter, the last one before the figure
DARK = 0.1  # share of figures that are darker than their background

# cycles per pixel (vertical, horizontal) of each class's grating: all periods below six pixels
FREQUENCIES = (
    (1 / 2, 1 / 2),
    (1 / 2, 0),
    (0, 1 / 2),
    (1 / 2, 1 / 4),
    (1 / 4, 1 / 2),
    (1 / 3, 1 / 3),
    (1 / 3, 0),
    (0, 1 / 3),
    (1 / 5, 2 / 5),
    (2 / 5, 1 / 5),
)


def make(
    num,
    seed=0,
    split="train",
    size=32,
    style="filled",
    shortcut=False,
    device="cpu",
    start=0,
):
    """Draw pictures `start` to `start + num - 1` of a split.

    shortcut: True adds the pattern of the picture's own class, "permuted" that of another class
    drawn at random, False none. The pictures are otherwise the same, so reliance can be measured.
    Returns x uint8 (num,3,size,size) and y int64 (num,) on `device`. They are drawn on the CPU, so
    that they do not depend on the device. Raises run.UserError for an unknown split, style or
    shortcut and for an impossible size.
    """
    for name, value, known in (("split", split, SPLITS), ("style", style, STYLES)):
        if value not in known:
            raise run.UserError(f"shapes: unknown {name} {value!r}; there are {', '.join(known)}")
    if shortcut not in (False, True, "permuted"):
        raise run.UserError(f"shapes: shortcut is False, True or 'permuted', not {shortcut!r}")
    if num < 1 or start < 0 or size < 8:
        raise run.UserError(
            f"shapes: needs num >= 1, start >= 0 and size >= 8 px, not {num}, {start} and {size}"
        )
    x = torch.empty(num, 3, size, size, dtype=torch.uint8)
    y = torch.empty(num, dtype=torch.int64)
    for block in range(start // BLOCK, (start + num - 1) // BLOCK + 1):
        first, last = max(block * BLOCK, start), min((block + 1) * BLOCK, start + num)
        inside = slice(first - block * BLOCK, last - block * BLOCK)
        g = run.generator("shapes", seed, split, style, block)
        labels, pictures = draw_block(g, size, style)
        if shortcut:
            shift = torch.randint(1, len(CLASSES), (BLOCK,), generator=g)
            shown = labels if shortcut is True else (labels + shift) % len(CLASSES)
            pictures = pictures + patterns(size)[shown]
        x[first - start : last - start] = pictures[inside].to(torch.uint8)
        y[first - start : last - start] = labels[inside]
    return x.to(device), y.to(device)


def patterns(size):
    """The shortcut: (classes,3,size,size) integer grey levels in [-SHORTCUT, SHORTCUT]."""
    at = torch.arange(size, dtype=torch.float64)
    planes = []
    for vertical, horizontal in FREQUENCIES:
        # pi/4 keeps the half-cycle gratings off their zeros
        rows = torch.cos(2 * math.pi * vertical * at + (math.pi / 4 if vertical % 0.5 else 0))
        columns = torch.cos(
            2 * math.pi * horizontal * at + (math.pi / 4 if horizontal % 0.5 else 0)
        )
        plane = rows[:, None] * columns
        planes.append(SHORTCUT * plane / plane.abs().max())
    return torch.stack(planes).round().int()[:, None].repeat(1, 3, 1, 1)


# --- one block ----------------------------------------------------------------------------------


def draw_block(g, size, style):
    """Labels (BLOCK,), pictures (BLOCK,3,size,size): whole numbers, SHORTCUT to 255 - SHORTCUT."""
    count = len(CLASSES)
    order = torch.rand(BLOCK // count, count, generator=g).argsort(1)
    labels = order.flatten()

    # random numbers that do not depend on the size come first: a larger size shows the same scene
    def uniform(low, high, *shape):
        return low + (high - low) * torch.rand(BLOCK, *shape, 1, 1, generator=g)

    def angle(*shape, most=math.pi):
        turn = uniform(-most, most, *shape)
        return torch.cos(turn), torch.sin(turn)

    at = (torch.arange(size) + 0.5) * (2 / size) - 1  # pixel centres in [-1, 1]
    v, u = at[:, None], at[None, :]

    light = uniform(0.12, 0.42)  # luminance of the background
    contrast = uniform(0.12, 0.52)  # of the figure
    sign = 1 - 2 * (uniform(0, 1) < DARK).float()
    light, contrast = light + contrast * (sign < 0), contrast * sign
    back = [colour(light[:, None] + uniform(-0.1, 0.1, 1), uniform, 0.16) for _ in range(2)]
    figure = (light + contrast)[:, None]
    front = [colour(figure + uniform(-0.06, 0.06, 1), uniform, 0.3) for _ in range(2)]
    textured = style == "textured"

    # background
    weights = uniform(0, 1, 3) ** 3
    weights = weights / weights.sum(1, keepdim=True)
    soft = torch.rand(BLOCK, 1, 6, 6, generator=g)
    mix = weights[:, 0] * ramp(u, v, angle())
    mix = mix + weights[:, 1] * enlarge(soft, size)
    mix = mix + weights[:, 2] * wave(u, v, angle(), uniform(1, 5), uniform(0, 2))
    picture = torch.lerp(back[0], back[1], mix[:, None])

    # clutter: rounded boxes from blobs to bars, most with less contrast than the figure
    place = uniform(-1, 1, PIECES), uniform(-1, 1, PIECES)
    long, thin = uniform(0.05, 0.5, PIECES), uniform(0.02, 0.1, PIECES)
    bend = uniform(0, 0.08, PIECES)
    direction = angle(PIECES)
    bright = figure[:, None] + sign[:, None, None] * uniform(-0.32, 0.04, PIECES, 1)
    tints = colour(bright, uniform, 0.3, PIECES)

    # figure
    centre = uniform(-0.22, 0.22), uniform(-0.22, 0.22)
    radius = uniform(0.45, 0.8)
    aspect = uniform(-0.17, 0.17).exp()
    pose = angle(most=0.45)
    shade = wave(u, v, angle(), uniform(0.3, 0.7), uniform(0, 2))
    if textured:
        stripes = wave(u, v, angle(), uniform(3, 7), uniform(0, 2))
        spots = wave(u, v, angle(), uniform(3, 7), uniform(0, 2))
        shade = torch.where(uniform(0, 1) < 0.5, stripes, stripes * spots * 2)
        shade = (4 * shade - 1.2).clamp(0, 1)
        front[1] = torch.lerp(front[1], back[0], 0.5)
    stroke = uniform(0.055, 0.085)
    gain, slope, lamp = uniform(0.8, 1.2), uniform(0, 0.3), angle()
    grain = uniform(0.0, 0.06)

    # paint: background, clutter, figure, clutter, light, noise
    pieces = coverage(rounded_boxes(u, v, place, direction, long, thin, bend), size)
    for i in range(PIECES - 1):
        picture = torch.lerp(picture, tints[:, i], pieces[:, i, None])
    du, dv = (u - centre[0]) / radius, (v - centre[1]) / radius
    p = (du * pose[0] + dv * pose[1]) * aspect, (dv * pose[0] - du * pose[1]) / aspect
    distance = torch.empty(BLOCK, size, size)
    for k, function in enumerate(FIGURES):
        which = (labels == k).nonzero()[:, 0]
        distance[which] = function(p[0][which], p[1][which])
    distance = distance * radius
    if style == "outline":
        distance = (distance + stroke).abs() - stroke
    surface = torch.lerp(front[0], front[1], shade[:, None])
    picture = torch.lerp(picture, surface, coverage(distance, size)[:, None])
    picture = torch.lerp(picture, tints[:, -1], pieces[:, -1, None])

    picture = picture * (gain + slope * (2 * ramp(u, v, lamp) - 1))[:, None]
    noise = torch.rand(BLOCK, 3, size, size, generator=g) - 0.5
    picture = (picture + grain[:, None] * noise).mul_(255).round_().clamp_(SHORTCUT, 255 - SHORTCUT)
    return labels, 255 - picture if style == "inverted" else picture


def colour(light, uniform, chroma, *shape):
    """Colours (BLOCK,*shape,3,1,1) of luminance `light` (R, G, B counted equally)."""
    rgb = uniform(-1, 1, *shape, 3)
    return light + chroma * (rgb - rgb.mean(-3, keepdim=True))


def ramp(u, v, direction):
    """0 to 1 across the picture."""
    return (u * direction[0] + v * direction[1]) * 0.35 + 0.5


def wave(u, v, direction, frequency, phase):
    """Triangle wave between 0 and 1, `frequency` periods across the picture."""
    along = (u * direction[0] + v * direction[1]) * (frequency / 2) + phase
    return (along - along.floor() - 0.5).abs() * 2


def enlarge(grid, size):
    """Soft noise (BLOCK,size,size) from a coarse random grid."""
    return F.interpolate(grid, (size, size), mode="bilinear", align_corners=True)[:, 0]


def coverage(distance, size):
    """Share of a pixel inside, for a distance in units of half a picture."""
    return (0.5 - distance * (size / 2)).clamp_(0, 1)


def rounded_boxes(u, v, place, direction, long, thin, bend):
    du, dv = u - place[0], v - place[1]
    along = (du * direction[0] + dv * direction[1]).abs() - long
    across = (dv * direction[0] - du * direction[1]).abs() - thin
    return box_distance(along, across) - bend


# --- figures: distance-like functions, negative inside, about one unit in radius ------------------


def box_distance(a, b):
    """Distance to a box, from |coordinate| - half-width along both axes."""
    return torch.hypot(a.clamp(min=0), b.clamp(min=0)) + torch.maximum(a, b).clamp(max=0)


def half_planes(x, y, angles, inset):
    """Intersection of half-planes whose normals point at `angles` (degrees)."""
    sides = [x * math.cos(math.radians(a)) + y * math.sin(math.radians(a)) for a in angles]
    distance = sides[0]
    for side in sides[1:]:
        distance = torch.maximum(distance, side)
    return distance - inset


def disc(x, y):
    return torch.hypot(x, y) - 0.82


def ring(x, y):
    return (torch.hypot(x, y) - 0.66).abs() - 0.2


def crescent(x, y):
    return torch.maximum(torch.hypot(x, y) - 0.92, 0.74 - torch.hypot(x - 0.46, y))


def square(x, y):
    return box_distance(x.abs() - 0.72, y.abs() - 0.72)


def triangle(x, y):
    return half_planes(x, y, (0, 120, 240), 0.52)


def pentagon(x, y):
    return half_planes(x, y, (0, 72, 144, 216, 288), 0.74)


def star(x, y):
    # the angle within one tenth of the star: 0 at an inner corner, 36 degrees at a tip
    turn = torch.atan2(y, x) / (2 * math.pi / 5)
    turn = (turn - turn.floor() - 0.5).abs() * (2 * math.pi / 5)
    radius = torch.hypot(x, y)
    x, y = radius * torch.cos(turn) - 0.45, radius * torch.sin(turn)
    ex, ey = math.cos(math.pi / 5) - 0.45, math.sin(math.pi / 5)  # the edge, inner corner to tip
    return (x * ey - y * ex) / math.hypot(ex, ey)


def cross(x, y):
    x, y = x.abs(), y.abs()
    return torch.minimum(box_distance(x - 0.92, y - 0.3), box_distance(x - 0.3, y - 0.92))


def heart(x, y):
    x, y = (x - y) * 0.7071 + 0.2, (-x - y) * 0.7071 + 0.2  # the tip points down
    lobes = torch.minimum(torch.hypot(x - 0.52, y), torch.hypot(x, y - 0.52)) - 0.52
    return torch.minimum(lobes, box_distance(x.abs() - 0.52, y.abs() - 0.52))


def arrow(x, y):
    shaft = box_distance((x + 0.4).abs() - 0.5, y.abs() - 0.22)
    head = torch.maximum(0.62 * x + 0.78 * y.abs() - 0.56, -x)
    return torch.minimum(shaft, head)


FIGURES = (disc, ring, crescent, square, triangle, pentagon, star, cross, heart, arrow)
