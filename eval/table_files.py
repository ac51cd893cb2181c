"""The results files that eval/tables.py reads, each kind as the same thing: a `Result`."""

import json
import re
import sys
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from common import run
from eval import shortcut

SHARED = ("dataset", "split", "images")
CORRUPTION_FACTS = (*SHARED, "source", "corruptions", "severities", "precision")
ATTACK_FACTS = (*SHARED, "norm", "eps", "attacks", "precision")
SMOOTHNESS_FACTS = (*SHARED, "eps", "steps")
CORRUPTION_COLUMNS = {
    "clean error": ("clean", "error"),
    "mean corruption error": ("mean_corruption_error",),
    "extra (4)": ("extra_error",),
    "ECE clean": ("clean", "ece"),
    "ECE corrupted": ("mean_corruption_ece",),
}
TITLES = {  # of numbers in records of trainings
    "error": "clean error",
    "clean_error": "clean error",
    "test_error_10000": "clean error",
    "corrupted": "mean corruption error",
    "ece": "ECE",
    "pgd10_probe_error": "PGD-10 error",
    "without": "grating removed",
    "swapped": "grating swapped",
}
NOT_NUMBERS = ("seed", "epochs", "seconds", "wall_seconds", "cpu_seconds", "loss")
ROW_OPTIONS = ("network", "variant", "depth", "threads", "arch", *shortcut.KEYS)
STAGES = ("teacher", "baseline", "student")
FOREIGN = (
    "no results of networks that are known: give a JSON of corruptions.py, adversarial.py, "
    "smoothness.py, domains.py, headline.py or shortcut.py, or the record of a training"
)


class Result(NamedTuple):
    """What one file, or a part of it, holds of networks."""

    kind: str  # of the evaluation
    facts: dict  # what must be equal for two results to share a table
    columns: dict  # title: path in an entry
    what: str  # the line below the table
    entries: list  # a dict for each network; "options" holds what it was trained with


def read(path):
    """The results in a file, a list; UserError where there are none."""
    try:
        content = json.loads(Path(path).read_text())
        results = of_content(content, Path(path).stem)
    except OSError as error:
        raise run.UserError(f"{path}: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, AttributeError, IndexError):
        raise run.UserError(f"{path}: {FOREIGN}") from None
    if not results or not any(result.entries for result in results):
        raise run.UserError(f"{path}: {FOREIGN}")
    return results


def is_result(path):
    """Whether a file in a folder holds results."""
    try:
        read(path)
    except run.UserError:
        return False
    return True


def of_content(content, name):
    """The results in the content of a file of this name."""
    if "checkpoints" in content:
        return [of_evaluation(content)]
    if "runs" in content:
        return [of_runs(content, name)]
    rows = content.get("rows", content.get("networks"))
    if isinstance(rows, list):
        headline = "columns" in content
        return [of_headline(content, name) if headline else of_rows(content, rows, name)]
    if "accuracy" in content and "average" in content:
        return [of_domain_averages(content, name)]
    pairs = list(pairs_in(content))
    if pairs:
        columns = {"ours": ("ours",), "theirs": ("theirs",)}
        return [Result(name, {}, columns, content["what"], pairs)]
    return [of_evaluation(part) for part in content.values()]  # one for each seed


# --- evaluations ----------------------------------------------------------------------------------


def of_evaluation(content):
    """What corruptions.py, adversarial.py, smoothness.py or domains.py wrote."""
    content = content.get("settings", {}) | content
    entries = content["checkpoints"]
    if "attacks" in content:
        return of_attacks(content, entries)
    if any("measures" in entry for entry in entries):
        return of_smoothness(content, entries)
    if any("trained_on" in entry for entry in entries):
        return of_domains(content, entries)
    facts = {fact: content[fact] for fact in CORRUPTION_FACTS}
    what = (
        f"{described(facts)}; {facts['source']}; {len(facts['corruptions'])} corruptions, "
        f"severities {facts['severities']}; evaluated in {facts['precision']}; error and ECE in %"
    )
    return Result("corruptions", facts, CORRUPTION_COLUMNS, what, entries)


def described(facts):
    return f"{facts['dataset']} {facts['split']}, {facts['images']} images"


def of_attacks(content, entries):
    facts = {fact: content[fact] for fact in ATTACK_FACTS}
    rows = {row: ("accuracy", row) for row in facts["attacks"]}
    what = (
        f"{described(facts)}; {facts['norm']} eps {facts['eps']:g}/255; attacked in "
        f"{facts['precision']}; accuracy in %"
    )
    return Result("adversarial", facts, {"clean": ("accuracy", "clean")} | rows, what, entries)


def of_smoothness(content, entries):
    facts = {fact: content[fact] for fact in SMOOTHNESS_FACTS}
    columns = {"clean error": ("clean", "error")}
    for entry in entries:
        for measure, found in entry["measures"].items():
            if isinstance(found, dict) and "mean" in found:
                columns[measure] = ("measures", measure, "mean")
            elif isinstance(found, float):
                columns[measure] = ("measures", measure)
    what = f"{described(facts)}; eps {facts['eps']:g}/255; means over the images"
    return Result("smoothness", facts, columns, what, entries)


def of_domains(content, entries):
    """The networks of one method and seed, each with another domain left out, as one entry."""
    merged = {}
    for entry, own in zip(entries, run.method_options(entries), strict=True):
        options = {k: v for k, v in entry["options"].items() if k != "test_domain"}
        own.pop("test_domain", None)
        key = json.dumps([own, entry["seed"], entry.get("stage")], sort_keys=True)
        first = merged.setdefault(key, entry | {"options": options, "accuracy": {}})
        first["accuracy"] |= entry["accuracy"]
    names = dict.fromkeys(name for entry in entries for name in entry["accuracy"])
    columns = {name: ("accuracy", name) for name in names}
    what = f"{content['dataset']}; accuracy in % on the domain left out"
    facts = {"dataset": content["dataset"], "precision": content["precision"]}
    return Result("domains", facts, columns, what, list(merged.values()))


# --- records of trainings -------------------------------------------------------------------------


def of_runs(content, name):
    """The runs of a record: a list, or a dict whose names end in the seed or the rate."""
    entries = []
    runs = content["runs"]
    if isinstance(runs, list):
        for values in runs:
            entries += of_stages(values)
    elif all("median" in values for values in runs.values()):
        return of_ablation(content, name)
    else:
        for title, values in runs.items():
            variant, _, seed = title.rpartition("-s")
            entries.append({**values, "options": {"variant": variant, "seed": int(seed)}})
    keys = [key for key in TITLES if any(isinstance(e.get(key), float) for e in entries)]
    every = dict.fromkeys(key for entry in entries for key in entry)
    keys += [
        key for key in every
        if key not in TITLES and key not in NOT_NUMBERS
        and all(isinstance(entry.get(key), float) for entry in entries)
    ]  # fmt: skip
    columns = {TITLES.get(key, key.replace("_", " ")): (key,) for key in keys}
    return Result(name, {}, columns, content["what"], entries)


def of_stages(values):
    """The networks of one run of ct.py; a run called none_s0 is of one network."""
    if "run" in values:
        variant = values["run"].rpartition("_s")[0]
        return [{**values, "options": {"variant": variant, "seed": values["seed"]}}]
    entries = []
    for stage in STAGES:
        entry = {"error": values[f"error/{stage}"], "corrupted": values.get(f"corrupted/{stage}")}
        entries.append({**entry, "stage": stage, "options": {"seed": values["seed"]}})
    return entries


def of_ablation(content, name):
    """bn_ablation.py: the curves at the last step that all runs have, and the medians."""
    runs = content["runs"].items()
    curves = {"training accuracy": "accuracy", "test accuracy": "test", "loss": "loss"}
    columns = {}
    for title, key in curves.items():
        if all(values.get(key) for _, values in runs):
            step = max(set.intersection(*(set(values[key]) for _, values in runs)), key=int)
            columns[f"{title} at {step} steps"] = (key, step)
    medians = {"loss band": "landscape_width", "gradient change": "gradient_change", "beta": "beta"}
    columns |= {title: ("median", key) for title, key in medians.items()}
    entries = []
    for title, values in runs:
        norm, _, rate = title.rpartition("-lr")
        options = {"norm": norm, "lr": float(rate), "seed": content["seed"]}
        entries.append({**values, "options": options})
    what = "accuracy in %; loss band, gradient change and beta: medians over the steps measured"
    return Result(name, {}, columns, content.get("what", what), entries)


def of_headline(content, name):
    """A table of eval/headline.py."""
    entries = []
    for row in content["rows"]:
        for seed, numbers in row["seeds"].items():
            entries.append({**numbers, "options": {"row": row["row"], "seed": int(seed)}})
    columns = {column: (column,) for column in content["columns"]}
    what = content.get("what") or f"{content['dataset']}, {content['scale']}: {content['size']}"
    return Result(name, {}, columns, what, entries)


def of_rows(content, rows, name):
    """Rows of numbers, one a network: eval/shortcut.py (the end of each curve) and growth.py."""
    entries = []
    for row in rows:
        row = shortcut.completed(row) if "curve" in row else row
        numbers = {k: v for k, v in row.items() if k not in ROW_OPTIONS}
        options = {k: v for k, v in row.items() if k in ROW_OPTIONS}
        entries.append({**numbers, **row.get("curve", [{}])[-1], "options": options})
    names = dict.fromkeys(key for entry in entries for key in entry if key not in NOT_NUMBERS)
    shown = [n for n in names if any(isinstance(entry.get(n), float) for entry in entries)]
    columns = {TITLES.get(n, n.replace("_", " ")): (n,) for n in shown}
    what = content.get("what", f"{content.get('arch', name)}, last epoch, accuracy or error in %")
    return Result(name, {}, columns, what, entries)


def of_domain_averages(content, name):
    """A record of leave-one-domain-out: {stage: {domain: accuracy}}."""
    entries = []
    for stage, accuracy in content["accuracy"].items():
        entry = {"accuracy": accuracy, "average": content["average"][stage], "stage": stage}
        entries.append({**entry, "options": {"seed": content["seed"]}})
    columns = {domain: ("accuracy", domain) for domain in entries[0]["accuracy"]}
    return Result(name, {}, {**columns, "average": ("average",)}, content["what"], entries)


def pairs_in(content, path=()):
    """The entries of all pairs of accuracies, ours and theirs, in a record of an agreement."""
    for name, part in content.items():
        if not isinstance(part, dict):
            continue
        for prefix in ("", "accuracy_"):
            found = [part.get(f"{prefix}{who}") for who in ("ours", "reference")]
            if all(isinstance(value, float) for value in found):
                row = re.sub("^(single attacks|more images): ", "", ": ".join([*path, name]))
                yield {"ours": found[0], "theirs": found[1], "options": {"row": row}}
        yield from pairs_in(part, (*path, name))
