"""What a training ends with: a table, what it was measured on, and one sentence made of it."""

import shlex
import statistics
import sys
import textwrap
from itertools import pairwise

from common.run.cli import command
from common.run.evaluate import warn_of_chance
from common.run.results import mean_sd, table, window

ACCURACY = "accuracy %, high is good"  # head of a table of accuracies


def accuracy_columns(errors, titles, names=None):
    """{title: {network: accuracy %}} of {metric: {network: error %}}, in the order of titles.

    names: {network: its name in the table} where that is another."""

    def named(network):  # "student", or "student/sketch" of a domain that was left out
        first, *rest = network.split("/")
        return "/".join([(names or {}).get(first, first), *rest])

    return {
        title: {named(name): 100 - error for name, error in errors[metric].items()}
        for metric, title in titles.items()
        if metric in errors
    }


def final_numbers(metrics):
    """{"<metric>/<network>": value} of {metric: {network: value}}: what a script's main returns."""
    return {f"{metric}/{k}": v for metric, row in metrics.items() for k, v in row.items()}


def by_metric(rows):
    """{metric: {network: value}} of {network: {metric: value}}."""
    found = {}
    for name, row in rows.items():
        for metric, value in row.items():
            found.setdefault(metric, {})[name] = value
    return found


def print_table(columns, first=ACCURACY, floats=".2f"):
    """Print {title: {row: number}}: a line per row, "-" where a column lacks it."""
    names = list(dict.fromkeys(name for column in columns.values() for name in column))
    rows = [[name, *(column.get(name, "-") for column in columns.values())] for name in names]
    print(f"\n{table(rows, [first, *columns], floats, window())}")


def print_accuracies(columns, num_classes, first=ACCURACY):
    """`print_table` after a warning of networks that are at chance in the first column."""
    warn_of_chance(next(iter(columns.values())), num_classes)
    print_table(columns, first)


def print_table_of_seeds(tables, first=ACCURACY, floats=".2f"):
    """Print tables {title: {row: number}} of several seeds as one of mean +- standard deviation."""
    columns = {}
    for title in dict.fromkeys(title for own in tables for title in own):
        parts = [own.get(title, {}) for own in tables]
        names = dict.fromkeys(name for part in parts for name in part)
        columns[title] = {k: mean_sd([part.get(k) for part in parts], floats) for k in names}
    print_table(columns, f"{first}; mean +- sd of {len(tables)} seeds")


def print_findings(paper, here, args, folder, following):
    """Print what the paper claims, what this run found, and commands that can follow it.

    args: the run's options; folder: its directory. following: {what a command shows: "script.py
    --option ...", or a list of its words}; "tensorboard" is that of the folder. The commands get
    this run's --data-dir, and --arch where a network is a user's own. One that would train on the
    same data again is left out; without --dataset its network decides.
    """
    lines = {}
    for shows, words in following.items():
        script, *options = map(str, words.split() if isinstance(words, str) else words)
        own = ("--dataset", args.dataset) if "--dataset" in options else ("--arch", args.arch)
        if script == "tensorboard":
            lines[shlex.join([script, "--logdir", str(folder)])] = shows
        elif own not in pairwise(options):
            evaluates = script.startswith("eval/")
            if args.data_dir != "data" and (evaluates or "--dataset" in options):
                options += ["--data-dir", args.data_dir]
            if evaluates and ".py:" in args.arch:
                options += ["--arch", args.arch]
            lines[command(script, *options)] = shows
    print()
    for words in (f"Paper: {paper}", f"Here: {here}"):
        print(textwrap.fill(words, window() or sys.maxsize, break_on_hyphens=False))
    print("\nNext:")
    for line, shows in lines.items():
        print(f"  # {shows}\n  {line}")


def print_average(found, metric, networks, parts):
    """Print the accuracy of {part: {"<metric>/<network>": error %}}, a column a part, and the mean
    over the parts. networks: {network: its title}."""
    columns = {}
    for part in parts:
        columns[part] = {}
        for name, title in networks.items():
            if f"{metric}/{name}" in found[part]:
                columns[part][title] = 100 - found[part][f"{metric}/{name}"]
    shown = columns[parts[0]]
    columns["average"] = {n: statistics.mean(columns[p][n] for p in parts) for n in shown}
    print_table(columns, "accuracy % on")
