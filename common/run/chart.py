"""Charts: SVG lines, and TensorBoard's layout of margins."""

import html
import math
import re
from pathlib import Path

COLOURS = ("#1b6ca8", "#d1495b", "#2e8b57", "#8e5ea2", "#c98a00", "#444444", "#00a0a0", "#e377c2")


def line_chart(path, title, curves, log=False):
    """Write an SVG line chart. curves: {label: [(x, value, low, high), ...]}, x from 0; where low
    and high differ, a band is drawn. What a logarithmic value axis cannot show is left out."""
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
    for k in range(5):
        x, y, value = left + width * k / 4, top + height * k / 4, high - (high - low) * k / 4
        label = f"{10**value if log else value:.3g}"
        parts.append(f'<path d="M{left} {y:.1f}h{width}" stroke="#ddd"/>')
        parts.append(f'<text x="{left - 6}" y="{y + 4:.1f}" text-anchor="end">{label}</text>')
        place = f'x="{x:.1f}" y="{top + height + 16}" text-anchor="middle"'
        parts.append(f"<text {place}>{last * k / 4:.4g}</text>")
    for i, (label, curve) in enumerate(curves.items()):
        colour = COLOURS[i % len(COLOURS)]
        if any(p[2] < p[3] for p in curve):
            edge = [xy(p[0], p[3]) for p in curve] + [xy(p[0], p[2]) for p in curve[::-1]]
            parts.append(f'<path d="M{"L".join(edge)}Z" fill="{colour}" fill-opacity="0.25"/>')
        if curve:
            line = "L".join(xy(*p[:2]) for p in curve)
            parts.append(f'<path d="M{line}" fill="none" stroke="{colour}" stroke-width="1.4"/>')
        place = f'x="{left + width + 8}" y="{top + 14 + 16 * i}" fill="{colour}"'
        parts.append(f"<text {place}>{html.escape(label)}</text>")
    size = f'width="{left + width + 150}" height="{top + height + 26}"'
    parts.insert(0, f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-size="12">')
    Path(path).write_text("\n".join([*parts, "</svg>\n"]))


def scatter_chart(path, title, points, across, up):
    """Write an SVG of points with error bars. It is legible on light and on dark pages.

    points: {label: (x, x_sd, y, y_sd)}. across, up: titles of the axes, with their units.
    """
    left, top, width, height = 72, 34, 440, 300
    xs = [x + s * sd for x, sd, _, _ in points.values() for s in (-1, 1)]
    ys = [y + s * sd for _, _, y, sd in points.values() for s in (-1, 1)]
    x_low, x_high = _widened(xs)
    y_low, y_high = _widened(ys)

    def at(x, y):
        across_by = left + width * (x - x_low) / (x_high - x_low)
        return across_by, top + height * (y_high - y) / (y_high - y_low)

    parts = [f'<text x="{left}" y="20" font-weight="bold">{html.escape(title)}</text>']
    for k in range(5):
        x = x_low + (x_high - x_low) * k / 4
        y = y_low + (y_high - y_low) * k / 4
        px, py = at(x, y)
        parts.append(f'<path d="M{left} {py:.1f}h{width}" stroke="#888" stroke-opacity="0.3"/>')
        parts.append(f'<text x="{left - 6}" y="{py + 4:.1f}" text-anchor="end">{y:.3g}</text>')
        place = f'x="{px:.1f}" y="{top + height + 16}" text-anchor="middle"'
        parts.append(f"<text {place}>{x:.3g}</text>")
    for i, (label, (x, x_sd, y, y_sd)) in enumerate(points.items()):
        colour = COLOURS[i % len(COLOURS)]
        px, py = at(x, y)
        bar_x, bar_y = at(x + x_sd, y + y_sd)
        bars = (
            f"M{2 * px - bar_x:.1f} {py:.1f}H{bar_x:.1f}M{px:.1f} {2 * py - bar_y:.1f}V{bar_y:.1f}"
        )
        parts.append(f'<path d="{bars}" stroke="{colour}" stroke-width="1.4"/>')
        parts.append(f'<circle cx="{px:.1f}" cy="{py:.1f}" r="4" fill="{colour}"/>')
        place = f'x="{left + width + 8}" y="{top + 14 + 16 * i}"'
        parts.append(f'<text {place} style="fill:{colour}">{html.escape(label)}</text>')
    place = f'x="{left + width / 2}" y="{top + height + 34}" text-anchor="middle"'
    parts.append(f"<text {place}>{html.escape(across)}</text>")
    turned = f'transform="translate(16 {top + height / 2}) rotate(-90)" text-anchor="middle"'
    parts.append(f"<text {turned}>{html.escape(up)}</text>")
    size = f'width="{left + width + 240}" height="{top + height + 44}"'
    style = "<style>text{fill:#222}@media(prefers-color-scheme:dark){text{fill:#ddd}}</style>"
    head = f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-size="12">{style}'
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
