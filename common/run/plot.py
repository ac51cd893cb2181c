"""Figures as SVG, drawn from numbers: legible on a light and on a dark page, no other package.

line_plot("a.svg", {"bn": [(0, 90.0, 0.4), (1, 54.0, 1.2)]}, "grey levels", "accuracy, %")
"""

import html
import itertools
import math
from pathlib import Path

GREY = "#808890"
COLOURS = ("#2f7fd0", "#d9534f", "#2ca05a", "#a071c8", "#c98a00", GREY, "#00a3a3", "#e0699f",
           "#8a6d3b", "#5b6dcd", "#7fa02a", "#f06a1d")  # fmt: skip
STYLE = """<style>
text { font: 12px sans-serif; fill: #222 } .axis { stroke: #666 } .grid { stroke: #ddd }
@media (prefers-color-scheme: dark) {
  text { fill: #ddd } .page { fill: #0d1117 } .axis { stroke: #999 } .grid { stroke: #333 }
}
</style>"""
LEFT, TOP, WIDTH, HEIGHT, RIGHT, BOTTOM = 60, 16, 460, 280, 110, 48


def ticks(low, high, about=6):
    """Round numbers from `low` to `high`, about so many."""
    raw = (high - low or 1.0) / about
    power = 10 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= raw)
    first = math.ceil(low / step - 1e-9)
    return [k * step for k in range(first, math.floor(high / step + 1e-9) + 1)]


def line_plot(path, lines, xlabel, ylabel):
    """Write a chart of lines {name: [(x, value, error), ...]}; error 0 draws no bar."""
    points = [p for line in lines.values() for p in line]
    left, right = min(p[0] for p in points), max(p[0] for p in points)
    low, high = min(p[1] - p[2] for p in points), max(p[1] + p[2] for p in points)
    pad = 0.04 * (high - low or 1.0)
    low, high = low - pad, high + pad

    def xy(x, y):
        across = (x - left) / (right - left or 1.0)
        return LEFT + WIDTH * across, TOP + HEIGHT * (high - y) / (high - low)

    total, bottom = LEFT + WIDTH + RIGHT, TOP + HEIGHT
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {total} {bottom + BOTTOM}" '
        f'width="{total}" height="{bottom + BOTTOM}">',
        STYLE,
        '<rect class="page" width="100%" height="100%" fill="#fff"/>',
    ]
    for y in ticks(low, high):
        at = xy(left, y)[1]
        parts.append(f'<path class="grid" d="M{LEFT} {at:.1f}h{WIDTH}"/>')
        parts.append(f'<text x="{LEFT - 8}" y="{at + 4:.1f}" text-anchor="end">{y:g}</text>')
    for x in ticks(left, right):
        at = xy(x, low)[0]
        parts.append(f'<path class="axis" d="M{at:.1f} {bottom}v4"/>')
        parts.append(f'<text x="{at:.1f}" y="{bottom + 18}" text-anchor="middle">{x:g}</text>')
    parts.append(f'<path class="axis" fill="none" d="M{LEFT} {TOP}v{HEIGHT}h{WIDTH}"/>')
    middle = LEFT + WIDTH / 2, TOP + HEIGHT / 2
    parts.append(
        f'<text x="{middle[0]}" y="{bottom + 38}" text-anchor="middle">{html.escape(xlabel)}</text>'
    )
    parts.append(
        f'<text transform="translate(14 {middle[1]}) rotate(-90)" text-anchor="middle">'
        f"{html.escape(ylabel)}</text>"
    )
    names = []
    for (name, line), colour in zip(lines.items(), COLOURS, strict=False):
        places = [xy(x, y) for x, y, _ in line]
        path_d = "L".join(f"{x:.1f} {y:.1f}" for x, y in places)
        parts.append(f'<path d="M{path_d}" fill="none" stroke="{colour}" stroke-width="2"/>')
        for (x, y, error), (px, py) in zip(line, places, strict=True):
            parts.append(f'<circle cx="{px:.1f}" cy="{py:.1f}" r="2.5" fill="{colour}"/>')
            if error:
                ends = xy(x, y + error)[1], xy(x, y - error)[1]
                parts.append(f'<path d="M{px:.1f} {ends[0]:.1f}V{ends[1]:.1f}" stroke="{colour}"/>')
        names.append([places[-1][1], name, colour])
    # Names stand at the ends of the lines, moved apart where they would overlap.
    names.sort()
    for above, below in itertools.pairwise(names):
        below[0] = max(below[0], above[0] + 14)
    for y, name, colour in names:
        x = LEFT + WIDTH + 8
        parts.append(
            f'<text x="{x}" y="{y + 4:.1f}" style="fill:{colour}">{html.escape(name)}</text>'
        )
    Path(path).write_text("\n".join([*parts, "</svg>"]) + "\n")
