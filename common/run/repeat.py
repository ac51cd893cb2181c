"""One script run several times, for seeds or left-out domains, with one table at the end."""

import itertools
import statistics
from pathlib import Path

from common.run.cli import changed, command
from common.run.errors import Diverged
from common.run.report import print_average
from common.run.results import table
from common.run.rundir import default_name


def repeat(main, args, parts):
    """main() for each {name: changed options}, in <out>/<name>. Returns {name: its numbers}.

    A part that was begun goes on, and a finished one is evaluated again, where args.resume is set.
    """
    script = Path(main.__globals__["__file__"]).stem
    root = Path(args.out or default_name(args, script)).expanduser()
    found = {}
    for name, change in parts.items():
        out = root / name
        resume = str(out) if args.resume and (out / "args.json").is_file() else None
        found[name] = main(changed(args, out=str(out), resume=resume, **change))
    return found


def each_seed(main, args):
    """`main` for --seeds seeds from --seed on, then a table of mean +- standard deviation.

    Returns {"<metric>/<network>/s<seed>": value}."""
    seeds = range(args.seed, args.seed + args.seeds)
    parts = {f"s{seed}": {"seed": seed, "seeds": 1} for seed in seeds}
    found = repeat(main, args, parts)
    first = next(iter(found.values()))
    metrics = list(dict.fromkeys(key.partition("/")[0] for key in first))
    networks = list(dict.fromkeys(key.partition("/")[2] for key in first))
    rows = []
    for network in networks:
        row = [network]
        for metric in metrics:
            values = [final.get(f"{metric}/{network}") for final in found.values()]
            values = [v for v in values if v is not None]
            spread = f" +- {statistics.stdev(values):.2f}" if len(values) > 1 else ""
            row.append(f"{statistics.mean(values):.2f}{spread}" if values else "-")
        rows.append(row)
    print(f"\n{table(rows, [f'mean +- sd of {args.seeds} seeds', *metrics])}")
    return {f"{key}/{name}": v for name, final in found.items() for key, v in final.items()}


def search(name, args, values, error_of, rundir):
    """The options `args` with the combination of {option: values} of least error (%).

    error_of(options, title) trains one trial and returns its validation error. A trial that
    diverges counts as 100 %. log.jsonl gets every trial of the network `name`, and the choice."""
    trials = []
    for trial in itertools.product(*values.values()):
        chosen = dict(zip(values, trial, strict=True))
        try:
            error = error_of(changed(args, **chosen), "-".join(f"{v:g}" for v in trial))
        except Diverged:
            error = 100.0
        rundir.log(event="trial", variant=name, val_error=error, **chosen)
        trials.append((error, chosen))
    error, chosen = min(trials, key=lambda trial: trial[0])
    rundir.log(event="tuned", variant=name, val_error=error, **chosen)
    print(f"{name}: validation error {error:.2f} % with {chosen}")
    return changed(args, **chosen)


def each_domain(main, args, domains, networks):
    """`main` for every domain left out of training, then a table of accuracies.

    networks: their names in the final numbers. Returns {"<metric>/<network>/<domain>": value}."""
    found = repeat(main, args, {name: {"test_domain": name} for name in domains})
    print_average(found, "error", networks, domains)
    print(f"Each domain was left out of training once: {args.dataset}, seed {args.seed}.")
    print(f"Over seeds: {command('eval/domains.py', args.out, '--data-dir', args.data_dir)}")
    return {f"{key}/{name}": v for name, final in found.items() for key, v in final.items()}
