"""Tables of results as text."""


def table(rows, header, floats=".2f"):
    """Text table: first column to the left, the others to the right. Floats get `floats`."""
    cells = [[format(c, floats) if isinstance(c, float) else str(c) for c in r] for r in rows]
    cells.insert(0, list(header))
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = []
    for row in cells:
        rest = [c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True)]
        lines.append("  ".join([row[0].ljust(widths[0]), *rest]).rstrip())
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])
