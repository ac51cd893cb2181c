"""One script run several times, for seeds or left-out domains, with one table at the end."""

import itertools
import statistics
from pathlib import Path

from common.run.cli import changed, command
from common.run.errors import Diverged
from common.run.report import print_average, print_table_of_seeds
from common.run.rundir import default_name


def root_of(main, args):
    """The folder of the runs of a script that runs several times."""
    script = Path(main.__globals__["__file__"]).stem
    return Path(args.out or default_name(args, script)).expanduser()


def repeat(main, args, parts):
    """main() for each {name: changed options}, in <out>/<name>. Returns {name: its numbers}.

    A part that was begun goes on, and a finished one is evaluated again, where args.resume is set.
    """
    root = root_of(main, args)
    found = {}
    for name, change in parts.items():
        out = root / name
        resume = "auto" if args.resume else None
        found[name] = main(changed(args, out=str(out), resume=resume, **change))
    return found


def each_seed(main, args, columns_of, **form):
    """`main` for --seeds seeds from --seed on, then its table as mean +- standard deviation.

    columns_of: function of a seed's numbers {metric: {network: value}} that gives its table
    {title: {row: number}}. form: `first` and `floats` of `print_table`.
    Returns {"<metric>/<network>/s<seed>": value}."""
    seeds = range(args.seed, args.seed + args.seeds)
    parts = {f"s{seed}": {"seed": seed, "seeds": 1} for seed in seeds}
    found = repeat(main, args, parts)
    tables = []
    for final in found.values():
        metrics = {}
        for key, value in final.items():
            metric, _, network = key.partition("/")
            metrics.setdefault(metric, {})[network] = value
        tables.append(columns_of(metrics))
    print_table_of_seeds(tables, **form)
    return {f"{key}/{name}": v for name, final in found.items() for key, v in final.items()}


def with_seeds(variants, args):
    """{name of a network: its options} of {variant: options}, a network for each seed.

    The seeds are --seeds many, from --seed on. With one seed a network is named as its variant."""
    stages = {}
    for name, own in variants.items():
        for seed in range(args.seed, args.seed + args.seeds):
            stage = name if args.seeds == 1 else f"{name}-s{seed}"
            stages[stage] = changed(own, seed=seed)
    return stages


def seeds_in_words(args):
    """The seeds of a table in words: seed 0, or median of 10 seeds, from 0 on."""
    several = f"median of {args.seeds} seeds, from {args.seed} on"
    return several if args.seeds > 1 else f"seed {args.seed}"


def medians_over_seeds(found, stages, rundir):
    """{metric: {variant: median}} of {metric: {network: value}}; log.jsonl gets all values.

    stages: {network: its options}, as `with_seeds` gives them; options.variant names the group."""
    variants = list(dict.fromkeys(own.variant for own in stages.values()))
    medians = {}
    for metric, row in found.items():
        medians[metric] = {}
        for name in variants:
            values = [row[stage] for stage, own in stages.items() if own.variant == name]
            rundir.log(event="result", variant=name, metric=metric, values=values)
            medians[metric][name] = statistics.median(values)
    return medians


def search(args, values, fit, rundir):
    """The options `args` of a variant with the combination of {option: values} of least error (%).

    fit(stage, options) trains one trial and returns its network and metrics. A trial that diverges
    counts as 100 %. An option that is 0 is off, and is not searched. log.jsonl gets every trial of
    args.variant, and the choice. The checkpoints of the variant hold the choice as options, and
    the names of these as "tuned"."""
    values = {key: row for key, row in values.items() if getattr(args, key)}
    trials = []
    for trial in itertools.product(*values.values()):
        chosen = dict(zip(values, trial, strict=True))
        stage = f"tune-{args.variant}-{'-'.join(f'{v:g}' for v in trial)}"
        try:
            _, metrics = fit(stage, changed(args, **chosen))
            error = metrics["error"]
        except Diverged:
            error = 100.0
        rundir.log(event="trial", variant=args.variant, val_error=error, **chosen)
        trials.append((error, chosen))
    error, chosen = min(trials, key=lambda trial: trial[0])
    rundir.log(event="tuned", variant=args.variant, val_error=error, **chosen)
    rundir.tuned[args.variant] = {**chosen, "tuned": list(chosen)}
    print(f"{args.variant}: validation error {error:.2f} % with {chosen}")
    return changed(args, **chosen)


def each_domain(main, args, domain_names, networks):
    """`main` for every domain left out of training, then a table of accuracies.

    domain_names: of --dataset and --data-dir. networks: {name in the final numbers: title}.
    Returns {"<metric>/<network>/<domain>": value}."""
    domains = domain_names(args.dataset, args.data_dir)
    found = repeat(main, args, {name: {"test_domain": name} for name in domains})
    print_average(found, "error", networks, domains)
    print(f"Each domain was left out of training once: {args.dataset}, seed {args.seed}.")
    line = command("eval/domains.py", root_of(main, args), "--data-dir", args.data_dir)
    print(f"Over seeds: {line}")
    return {f"{key}/{name}": v for name, final in found.items() for key, v in final.items()}
