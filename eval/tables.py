"""Tables over seeds, from the JSON that the other eval scripts write.

    python eval/tables.py eval/results/ct_cifar10_{none,bn,ct}.json
    python eval/tables.py runs/*/last.corruptions.json
    python eval/tables.py runs/*/last.adversarial.json      # accuracies under attack

Checkpoints that differ in nothing but the seed form a row: mean +- sample standard deviation over
the seeds, and their number n. A row is named by the options in which the rows differ.
"""

import json
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from common import run

COLUMNS = {  # title: path in a checkpoint's entry; percent
    "clean error": ("clean", "error"),
    "mean corruption error": ("mean_corruption_error",),
    "extra (4)": ("extra_error",),
    "ECE clean": ("clean", "ece"),
    "ECE corrupted": ("mean_corruption_ece",),
}
FACTS = ("dataset", "split", "images", "source", "corruptions", "severities", "precision")
ATTACK_FACTS = ("dataset", "split", "images", "norm", "eps", "attacks", "precision")
NOT_OPTIONS = {"seed", "log_every", "save_every", "eval_every", "corrupted_images", "baseline"}


def parse_args(argv=None):
    parser = run.Parser(__file__, __doc__)
    parser.add_argument(
        "files", nargs="+", help="JSON of eval/corruptions.py or eval/adversarial.py"
    )
    parser.add_argument("--markdown", action="store_true", help="as in the README")
    return parser.parse_args(argv)


def read(path):
    """One result file; UserError when it is none."""
    try:
        result = json.loads(Path(path).read_text())
        return {key: result[key] for key in (*facts(result), "checkpoints")}
    except OSError as error:
        raise run.UserError(f"{path}: {error.strerror}") from None
    except (ValueError, KeyError, TypeError) as error:
        raise run.UserError(
            f"{path}: no result of eval/corruptions.py or adversarial.py ({error!r})"
        ) from None


def facts(result):
    """What must be equal for two files to share a table."""
    return ATTACK_FACTS if "attacks" in result else FACTS


def columns(result):
    """{title: path in a checkpoint's entry}, percent."""
    if "attacks" not in result:
        return COLUMNS
    rows = {row: ("accuracy", row) for row in result["attacks"]}
    return {"clean": ("accuracy", "clean")} | rows


def settings(entry):
    """What tells one method from another: its options and its stage, without the seed."""
    options = {k: v for k, v in entry.get("options", {}).items() if k not in NOT_OPTIONS}
    if not options.get("lam"):  # without a teacher the rest of the method does nothing
        idle = ("distance", "match", "temperature", "student_init")
        options = {k: v for k, v in options.items() if k not in idle and "teacher" not in k}
    keys = ("method", "stage", "arch", "norm")
    return options | {k: entry.get(k) for k in keys}


def lookup(entry, keys):
    for key in keys:
        entry = entry.get(key) if isinstance(entry, dict) else None
    return entry


def spread(values):
    """ "mean +- sd" of the numbers; without sd for a single one."""
    if None in values:
        return "-"
    mean = f"{statistics.mean(values):.2f}"
    return f"{mean} +- {statistics.stdev(values):.2f}" if len(values) > 1 else mean


def main(args):
    results = [read(path) for path in args.files]
    for result in results[1:]:
        for fact in facts(results[0]):
            if result.get(fact) != results[0][fact]:
                raise run.UserError(
                    f"the files differ in {fact} ({results[0][fact]}, {result.get(fact)}): "
                    "their numbers do not belong into one table"
                )
    shown = columns(results[0])
    groups = {}
    for entry in (entry for result in results for entry in result["checkpoints"]):
        groups.setdefault(json.dumps(settings(entry), sort_keys=True), []).append(entry)
    options = [json.loads(key) for key in groups]
    every = sorted({name for o in options for name in o})
    differ = [n for n in every if len({json.dumps(o.get(n)) for o in options}) > 1]
    rows = []
    for option, entries in zip(options, groups.values(), strict=True):
        name = ", ".join(f"{n} {option[n]}" for n in differ if option.get(n) is not None)
        cells = [spread([lookup(e, keys) for e in entries]) for keys in shown.values()]
        rows.append([name or "all", *cells, len(entries)])
    header = ["", *shown, "n"]
    if args.markdown:
        lines = [header, ["---"] * len(header), *rows]
        print("\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines))
    else:
        print(run.table(rows, header))
    first = results[0]
    if "attacks" in first:
        print(
            f"\n{first['dataset']} {first['split']}, {first['images']} images; {first['norm']} eps "
            f"{first['eps']:g}/255; attacked in {first['precision']}; accuracy in %"
        )
        return {row[0]: dict(zip(header[1:], row[1:], strict=True)) for row in rows}
    print(
        f"\n{first['dataset']} {first['split']}, {first['images']} images; {first['source']}; "
        f"{len(first['corruptions'])} corruptions, severities {first['severities']}; "
        f"evaluated in {first['precision']}; error and ECE in %"
    )
    return {row[0]: dict(zip(header[1:], row[1:], strict=True)) for row in rows}


if __name__ == "__main__":
    run.cli(main, parse_args)
