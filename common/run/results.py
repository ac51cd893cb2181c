"""Results of an evaluation: where they are written, and tables as text."""

import contextlib
import csv
import hashlib
import io
import json
import math
import os
import shlex
import statistics
import sys
import tempfile
from pathlib import Path

import torch

from common.run.checkpoint import versions
from common.run.cli import NOT_OPTIONS
from common.run.errors import UserError
from common.run.progress import window

# Options that name a row best, in this order, and those whose value needs no name before it.
TELLING = (
    "row",
    "variant",
    "network",
    "stage",
    "method",
    "norm",
    "change",
    "arch",
    "lam",
    "gamma",
    "adapt",
    "lr",
)
OFF = (None, False, 0, "none")  # values of an option that leave out what it is for
SELF_EVIDENT = ("row", "variant", "network", "stage", "arch")


class Results:
    """The files of one evaluation. Whether they can be written is tried before any work.

    kind: the evaluation's name, as in `last.adversarial.json`. first: its first checkpoint.
    settings: what the numbers depend on, as JSON has it. path, tensorboard: of --json and
    --tensorboard, or None for the place beside the checkpoint. If that cannot be written it is the
    working directory, and a line says so. TensorBoard goes beside the JSON. pictures: whether the
    evaluation writes to TensorBoard.

    Raises UserError where a file cannot be written, or another process writes the same results.
    Without `overwrite` it also does where results of other settings would be replaced.
    """

    def __init__(
        self, kind, first, settings, path=None, tensorboard=None, overwrite=False, *, pictures=True
    ):
        if path and Path(path).suffix == ".svg":
            raise UserError(f"--json {path}: a figure may be written there; give another name")
        self.kind = kind
        self.settings = json.loads(json.dumps(settings))
        self.moved = False  # to the working directory
        self.path = self._place(Path(first), path)
        self._lock = self._locked()
        self.folder = Path(tensorboard).expanduser() if tensorboard else self.path.parent / kind
        try:
            if pictures:
                try_folder(self.folder, "--tensorboard")
                if self.moved:
                    print(f"the pictures go to {self.folder.resolve()}")
            if self.path.is_file() and not overwrite:
                self._compare()
        except UserError:
            self.close()
            raise

    def _place(self, first, path):
        if path:
            return try_file(path, "--json")
        first = first / "last.pt" if first.is_dir() else first
        beside = first.with_suffix(f".{self.kind}.json")
        try:
            try_folder(beside.parent, "--json")
        except UserError:
            here = Path(f"{first.parent.name}.{beside.name}".lstrip("."))
            try_folder(here.parent, "--json")
            print(f"cannot write beside {first}: the results go to {here.resolve()}")
            self.moved = True
            return here
        return beside

    def _locked(self):
        """A locked file, which the kernel releases when the process ends; None on Windows."""
        try:
            import fcntl
        except ImportError:
            return None
        file = open(self.path.with_name(f".{self.path.name}.lock"), "w")
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            file.close()
            raise UserError(
                f"another process is writing {self.path}: wait for it, or give --json elsewhere"
            ) from None
        return file

    def _compare(self):
        try:
            old = json.loads(self.path.read_text())
            old = old.get("settings", old)
        except (ValueError, AttributeError, OSError):
            raise UserError(
                f"{self.path} is no results file: --overwrite to replace it, or give --json "
                "elsewhere"
            ) from None
        for key, value in self.settings.items():
            if key in old and old[key] != value:
                raise UserError(
                    f"{self.path} holds results with another {key} ({brief(old[key])}, now "
                    f"{brief(value)}): --overwrite to replace them, or give --json elsewhere"
                )

    def write(self, output):
        """Write the JSON: the command, versions and settings, then `output`. The name appears when
        all is written."""
        words = [f"eval/{Path(sys.argv[0]).name}", *sys.argv[1:]]
        output = {
            "command": "python " + shlex.join(words),
            "versions": versions(),
            "settings": self.settings,
            **output,
        }
        output = finite(output)
        write_json(self.path, output)
        print(f"written: {self.path}")
        return output

    def close(self):
        """Let others write these results."""
        if self._lock is not None:
            with contextlib.suppress(OSError):
                os.unlink(self._lock.name)
            self._lock.close()
            self._lock = None


def try_folder(folder, option):
    """Make the folder and write in it. Raises UserError naming the option."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UserError(
            f"cannot write in {folder}: {error.strerror}; give {option} elsewhere"
        ) from None


def try_file(path, option):
    """The Path of a file to be written at the end, after a try that it can be. Raises UserError
    naming the option, before there is work to lose."""
    path = Path(path).expanduser()
    if path.is_dir():
        raise UserError(f"{option} {path} is a folder: name a file, as {path / 'out'}")
    try_folder(path.parent, option)
    return path


def write_json(path, output):
    """Write a JSON file whose name appears when all is written. UserError where it cannot be."""
    part = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part.write_text(json.dumps(output, indent=1) + "\n")
        os.replace(part, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)
        raise UserError(f"cannot write {path}: {error.strerror}; give --json elsewhere") from None


def finite(value):
    """The value with None for numbers that are not finite, which JSON does not have."""
    if isinstance(value, dict):
        return {key: finite(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def brief(value):
    """A value of the settings in a message."""
    text = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
    return text if len(text) <= 40 else text[:37] + "..."


def table(rows, header, floats=".2f", width=None):
    """Text table: first column to the left, the others to the right. Floats get `floats`.

    width: characters in a line. A wider table comes in parts, each with the first column again.
    """
    cells = [[format(c, floats) if isinstance(c, float) else str(c) for c in r] for r in rows]
    cells.insert(0, list(header))
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    parts = [[]]
    taken = widths[0]
    for column, own in enumerate(widths[1:], 1):
        if width and parts[-1] and taken + 2 + own > width:
            parts.append([])
            taken = widths[0]
        parts[-1].append(column)
        taken += 2 + own
    texts = []
    for columns in parts:
        lines = []
        for row in cells:
            rest = [row[k].rjust(widths[k]) for k in columns]
            lines.append("  ".join([row[0].ljust(widths[0]), *rest]).rstrip())
        lines.insert(1, "-" * len(lines[0]))
        texts.append("\n".join(lines))
    return "\n\n".join(texts)


def add_table_arguments(parser):
    """Options that choose how a table is printed: --markdown, --csv and --latex."""
    group = parser.add_mutually_exclusive_group()
    for form in ("markdown", "csv", "latex"):
        group.add_argument(f"--{form}", action="store_true", help=f"print the table as {form}")


def form_of(args):
    """The form that the options of `add_table_arguments` name, "text" by default."""
    chosen = [form for form in ("markdown", "csv", "latex") if getattr(args, form)]
    return chosen[0] if chosen else "text"


def format_table(rows, header, form="text"):
    """A table as "text", "markdown", "csv" or "latex" (a tabular of booktabs)."""
    if form == "text":
        return table(rows, header, width=window())
    lines = [[f"{c:.2f}" if isinstance(c, float) else str(c) for c in row] for row in rows]
    lines.insert(0, list(header))
    if form == "csv":
        out = io.StringIO()
        csv.writer(out, lineterminator="\n").writerows(lines)
        return out.getvalue().rstrip("\n")
    if form == "markdown":
        lines = [[cell.replace("|", "\\|") for cell in line] for line in lines]
        lines.insert(1, ["---"] * len(header))
        return "\n".join("| " + " | ".join(line) + " |" for line in lines)
    lines = [" & ".join(map(latex, line)) + r" \\" for line in lines]
    first = rf"\begin{{tabular}}{{l{'r' * (len(header) - 1)}}}"
    return "\n".join(
        [first, r"\toprule", lines[0], r"\midrule", *lines[1:], r"\bottomrule", r"\end{tabular}"]
    )


def latex(text):
    """The text with LaTeX's special characters escaped."""
    for sign in "&%_#$":
        text = text.replace(sign, "\\" + sign)
    return text.replace("+-", r"$\pm$")


def mean_sd(values, floats=".2f"):
    """ "mean +- sample standard deviation" of the values that are not None, "-" where all are.

    One value stands alone. "(1 of 3)" follows where some are missing."""
    known = [value for value in values if value is not None]
    if not known:
        return "-"
    text = format(statistics.mean(known), floats)
    text += f" +- {statistics.stdev(known):{floats}}" if len(known) > 1 else ""
    return f"{text} ({len(known)} of {len(values)})" if len(known) < len(values) else text


def row_titles(options):
    """A title for each dict of options, from the fewest options that tell the dicts apart; those
    that say most come first."""
    every = sorted({name for o in options for name in o})
    every.sort(key=lambda name: TELLING.index(name) if name in TELLING else len(TELLING))
    chosen, apart = [], 1
    for name in every:
        found = len({json.dumps([o.get(n) for n in [*chosen, name]]) for o in options})
        if found > apart:
            chosen.append(name)
            apart = found
    for name in chosen[::-1]:  # one that a later one makes needless
        others = [n for n in chosen if n != name]
        if len({json.dumps([o.get(n) for n in others]) for o in options}) == apart:
            chosen = others
    titles = []
    for option in options:
        words = [
            str(option[n]) if n in SELF_EVIDENT else f"{n} {option[n]}"
            for n in chosen if option.get(n) is not None
        ]  # fmt: skip
        titles.append(", ".join(words) or "all")
    return titles


def method_options(entries):
    """The options of each network without NOT_OPTIONS and those that were tuned, a list of dicts.

    entries: networks with "options" and "method". An older checkpoint lacks the options that came
    later. It counts as having such a one off, as others of its method have it.
    """
    every = []
    for entry in entries:
        options = entry.get("options", {})
        apart = NOT_OPTIONS.union(options.get("tuned") or ())  # seeds may have chosen differently
        every.append({k: v for k, v in options.items() if k not in apart})
    for method in {entry.get("method") for entry in entries}:
        alike = [o for o, e in zip(every, entries, strict=True) if e.get("method") == method]
        for name in {name for own in alike for name in own}:
            off = {json.dumps(own[name]) for own in alike if name in own and own[name] in OFF}
            for own in alike if len(off) == 1 else ():
                own.setdefault(name, json.loads(*off))
    return every


def weights_digest(model):
    """Hexadecimal digest of the weights and buffers, equal for the same network in two files."""
    hashed = hashlib.sha256()
    for name, value in model.state_dict().items():
        hashed.update(name.encode())
        hashed.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return hashed.hexdigest()[:16]


def gap(a, b, count, kind):
    """Words for accuracy a less accuracy b (%), of `count` images each: a difference within two
    standard errors shows none."""
    noise = 2 * math.sqrt((a * (100 - a) + b * (100 - b)) / max(count, 1))
    if abs(a - b) <= noise:
        return f"no difference in {kind} accuracy shows ({a - b:+.1f})"
    return f"{abs(a - b):.1f} points {'more' if a > b else 'less'} {kind} accuracy"


def compare(columns, counts):
    """One sentence: the first network of a table against each of the others.

    columns: {"clean": {network: accuracy in %}, ...}; counts: {"clean": images, ...}.
    """
    kinds = [kind for kind in columns if counts[kind]]
    first, *others = columns[kinds[0]]
    if not others:
        return (
            f"{first} keeps " + " and ".join(f"{columns[k][first]:.1f} % {k}" for k in kinds) + "."
        )
    parts = []
    for name in others:
        words = [gap(columns[k][first], columns[k][name], counts[k], k) for k in kinds]
        parts.append(f"{first} against {name}: {' and '.join(words)}")
    return "; ".join(parts) + "."
