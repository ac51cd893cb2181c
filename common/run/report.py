"""What a training ends with: a table, what it was measured on, and one sentence made of it."""

import statistics

from common.run.results import table


def accuracy_columns(errors, titles):
    """{title: {network: accuracy %}} of {metric: {network: error %}}, in the order of titles."""
    return {
        title: {name: 100 - error for name, error in errors[metric].items()}
        for metric, title in titles.items()
        if metric in errors
    }


def by_metric(rows):
    """{metric: {network: value}} of {network: {metric: value}}."""
    found = {}
    for name, row in rows.items():
        for metric, value in row.items():
            found.setdefault(metric, {})[name] = value
    return found


def print_table(columns, first="accuracy %, high is good", floats=".2f"):
    """Print {title: {row: number}}: a line per row, "-" where a column lacks it."""
    names = list(dict.fromkeys(name for column in columns.values() for name in column))
    rows = [[name, *(column.get(name, "-") for column in columns.values())] for name in names]
    print(f"\n{table(rows, [first, *columns], floats)}")


def print_findings(paper, here, following):
    """Print what the paper claims, what this run found, and commands {command: what it shows}."""
    print(f"\nPaper: {paper}\nHere: {here}\n\nNext:")
    width = max(map(len, following))
    for command, shows in following.items():
        print(f"  {command:{width}}  # {shows}")


def print_average(found, metric, networks, parts):
    """Print the accuracy of {part: {"<metric>/<network>": error %}}, a column a part, and the mean
    over the parts."""
    columns = {}
    for part in parts:
        columns[part] = {}
        for name in networks:
            if f"{metric}/{name}" in found[part]:
                columns[part][name] = 100 - found[part][f"{metric}/{name}"]
    shown = columns[parts[0]]
    columns["average"] = {n: statistics.mean(columns[p][n] for p in parts) for n in shown}
    print_table(columns, "accuracy % on")
