"""Charts: SVG lines, and TensorBoard's layout of margins."""

import html
import math
import re
from pathlib import Path

from common.run.plot import COLOURS, GREY, ticks

STYLE = (
    "<style>text{fill:#222;font-family:sans-serif}"
    "@media(prefers-color-scheme:dark){text{fill:#ddd}}</style>"
)


def line_chart(path, title, curves, log=False, across="", up=""):
    """Write an SVG line chart. curves: {label: [(x, value, low, high), ...]}, x from 0; where low
    and high differ, a band is drawn. What a logarithmic value axis cannot show is left out.
    across, up: titles of the axes, with their units. It is legible on light and on dark pages."""
    curves = {k: [p for p in c if not log or p[2] > 0] for k, c in curves.items()}
    points = [p for c in curves.values() for p in c]
    if not points:
        return
    scale = math.log10 if log else float
    left, top, width, height = 72, 28, 440, 280
    low, high = scale(min(p[2] for p in points)), scale(max(p[3] for p in points))
    low, high = (low, high) if high > low else (low - 0.5, low + 0.5)
    last = max(p[0] for p in points) or 1

    def xy(x, value):
        y = top + height * (high - scale(value)) / (high - low)
        return f"{left + width * x / last:.1f} {y:.1f}"

    parts = [f'<text x="{left}" y="18" font-weight="bold">{html.escape(title)}</text>']
    for value in _decades(low, high) if log else ticks(low, high):
        y = top + height * (high - value) / (high - low)
        label = f"{10**value if log else value:.3g}"
        parts.append(f'<path d="M{left} {y:.1f}h{width}" stroke="#888" stroke-opacity="0.3"/>')
        parts.append(f'<text x="{left - 6}" y="{y + 4:.1f}" text-anchor="end">{label}</text>')
    for x in ticks(0, last):
        place = f'x="{left + width * x / last:.1f}" y="{top + height + 16}" text-anchor="middle"'
        parts.append(f"<text {place}>{x:.4g}</text>")
    for i, (label, curve) in enumerate(curves.items()):
        colour = COLOURS[i % len(COLOURS)]
        if any(p[2] < p[3] for p in curve):
            edge = [xy(p[0], p[3]) for p in curve] + [xy(p[0], p[2]) for p in curve[::-1]]
            parts.append(f'<path d="M{"L".join(edge)}Z" fill="{colour}" fill-opacity="0.25"/>')
        if curve:
            line = "L".join(xy(*p[:2]) for p in curve)
            parts.append(f'<path d="M{line}" fill="none" stroke="{colour}" stroke-width="1.4"/>')
        place = f'x="{left + width + 8}" y="{top + 14 + 16 * i}"'
        parts.append(f'<text {place} style="fill:{colour}">{html.escape(label)}</text>')
    parts += _axis_titles(across, up, left + width / 2, top + height / 2, top + height + 34)
    size = f'width="{left + width + 150}" height="{top + height + (44 if across else 26)}"'
    parts.insert(0, f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-size="12">{STYLE}')
    Path(path).write_text("\n".join([*parts, "</svg>\n"]))


def _decades(low, high):
    """Places of a logarithmic axis: whole decades, 1, 2 and 5 of them below two decades, or
    quarters of a short range."""
    digits = (1, 2, 5) if high - low < 2 else (1,)
    powers = range(math.floor(low), math.ceil(high) + 1)
    places = [power + math.log10(digit) for power in powers for digit in digits]
    round_ones = [place for place in places if low <= place <= high]
    return round_ones if len(round_ones) > 2 else [low + (high - low) * k / 4 for k in range(5)]


def _axis_titles(across, up, middle_x, middle_y, below):
    """The texts below the chart and, turned, to its left."""
    turned = f'transform="translate(16 {middle_y}) rotate(-90)" text-anchor="middle"'
    return [
        f'<text x="{middle_x}" y="{below}" text-anchor="middle">{html.escape(across)}</text>',
        f"<text {turned}>{html.escape(up)}</text>",
    ]


def scatter_chart(path, title, points, across, up, after=None, joined=None):
    """Write an SVG of points with error bars. It is legible on light and on dark pages.

    points: {label: (x, x_sd, y, y_sd)}. across, up: titles of the axes, with their units. after:
    the same for some labels, drawn as rings that a line joins to their points. joined: {label:
    text beside its point} of grey points that a line joins in this order.
    """
    left, top, width, height = 72, 34, 440, 300
    after = after or {}
    joined = joined or {}
    legend = [label for label in points if label not in joined]
    colours = [colour for colour in COLOURS if not (joined and colour == GREY)]
    every = [*points.values(), *after.values()]
    x_low, x_high = _widened([x + s * sd for x, sd, _, _ in every for s in (-1, 1)])
    y_low, y_high = _widened([y + s * sd for _, _, y, sd in every for s in (-1, 1)])

    def at(x, y):
        across_by = left + width * (x - x_low) / (x_high - x_low)
        return across_by, top + height * (y_high - y) / (y_high - y_low)

    def line(places):
        return "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in places)

    parts = [f'<text x="{left}" y="20" font-weight="bold">{html.escape(title)}</text>']
    for y in ticks(y_low, y_high):
        place = at(x_low, y)[1]
        parts.append(f'<path d="M{left} {place:.1f}h{width}" stroke="#888" stroke-opacity="0.3"/>')
        parts.append(f'<text x="{left - 6}" y="{place + 4:.1f}" text-anchor="end">{y:g}</text>')
    for x in ticks(x_low, x_high):
        place = f'x="{at(x, y_low)[0]:.1f}" y="{top + height + 16}" text-anchor="middle"'
        parts.append(f"<text {place}>{x:g}</text>")
    if joined:
        path_d = line(at(points[label][0], points[label][2]) for label in joined)
        parts.append(f'<path d="{path_d}" fill="none" stroke="{GREY}" stroke-width="1.4"/>')
    for label in points:
        colour = colours[legend.index(label) % len(colours)] if label in legend else GREY
        both = [points[label], *([after[label]] if label in after else [])]
        if len(both) > 1:
            ends = line(at(x, y) for x, _, y, _ in both)
            parts.append(f'<path d="{ends}" stroke="{colour}" stroke-dasharray="3 3"/>')
        for fill, (x, x_sd, y, y_sd) in zip((colour, "none"), both, strict=False):
            px, py = at(x, y)
            bars = line([at(x - x_sd, y), at(x + x_sd, y)]) if x_sd else ""
            bars += line([at(x, y - y_sd), at(x, y + y_sd)]) if y_sd else ""
            if bars:
                parts.append(f'<path d="{bars}" stroke="{colour}" stroke-width="1.4"/>')
            dot = f'cx="{px:.1f}" cy="{py:.1f}" r="4" fill="{fill}" stroke="{colour}"'
            parts.append(f"<circle {dot}/>")
    for label, text in joined.items():
        px, py = at(points[label][0], points[label][2])
        parts.append(f'<text x="{px + 8:.1f}" y="{py - 4:.1f}">{html.escape(text)}</text>')
    for i, label in enumerate(legend):
        place = f'x="{left + width + 8}" y="{top + 14 + 16 * i}"'
        colour = colours[i % len(colours)]
        parts.append(f'<text {place} style="fill:{colour}">{html.escape(label)}</text>')
    if any(x_sd or y_sd for _, x_sd, _, y_sd in every):
        across += "; bars: standard deviation over seeds (no bar: one seed)"
    parts += _axis_titles(across, up, left + width / 2, top + height / 2, top + height + 34)
    size = f'width="{left + width + 240}" height="{max(top + height + 44, 20 + 16 * len(legend))}"'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-size="12">{STYLE}'
    Path(path).write_text("\n".join([head, *parts, "</svg>\n"]))


def _widened(values):
    """(low, high) of an axis: the range of the values and a tenth of it on both sides."""
    low, high = min(values), max(values)
    room = 0.1 * (high - low) or 0.5
    return low - room, high + room


def custom_scalars(writer, charts):
    """Lay out TensorBoard's CUSTOM SCALARS. charts: {title: list of tags, all in one chart}, or
    {title: (tags,)} for margins between the scalars "<tag>/low" and "<tag>/high"."""
    from tensorboard.compat.proto.summary_pb2 import Summary, SummaryMetadata
    from tensorboard.compat.proto.tensor_pb2 import TensorProto
    from tensorboard.plugins.custom_scalar import layout_pb2

    layout = layout_pb2.Layout()
    category = layout.category.add(title="charts")
    for title, tags in charts.items():
        chart = category.chart.add(title=title)
        if isinstance(tags, tuple):
            for tag in tags[0]:
                chart.margin.series.add(value=tag, lower=f"{tag}/low", upper=f"{tag}/high")
        else:
            chart.multiline.tag.extend(f"^{re.escape(tag)}$" for tag in tags)
    data = SummaryMetadata.PluginData(plugin_name="custom_scalars")
    tensor = TensorProto(dtype="DT_STRING", string_val=[layout.SerializeToString()])
    value = Summary.Value(
        tag="custom_scalars__config__", tensor=tensor, metadata=SummaryMetadata(plugin_data=data)
    )
    writer.file_writer.add_summary(Summary(value=[value]))
