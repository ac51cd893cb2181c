"""The headline tables: one command trains and evaluates what is missing, and prints the table.

    python eval/headline.py                                  # the tables and their state
    python eval/headline.py --dry-run                        # every command and data set, checked
    python eval/headline.py question --dry-run               # the commands of a table
    python eval/headline.py question --jobs 2                # what is missing, then the table
    python eval/headline.py question --seeds 1 --rows BatchNorm,CT
    python eval/headline.py fixup-penalty --unpublished      # rows and seeds that nobody has run

A table is data: eval/headline_tables.py holds the commands, and says where each number stands.
Trainings lie in <runs>/<scale>/<name>-s<seed>, and tables share them. A stopped command goes on
where it stopped when it is given again. A training that fails makes a row that says so, and the
next call tries it again. One that diverges makes a row that says so, and is not repeated.

Every job has one thread; --jobs says how many run side by side. Cells are mean +- sample standard
deviation over n seeds. A column that a paper reports stands twice, "paper" and "here". The results
go to <out>/headline_<table>_<scale>.json, .md and, where the table has a figure, .svg. Numbers that
the JSON there already holds stay until this machine has measured the same row and seed itself, on
corruptions of the same source.

Exit status: 0 where all is done, 2 after a failure, 75 after a signal.
"""

import contextlib
import importlib.util
import io
import shlex
import signal
import sys
import textwrap
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from common import corruptions, data, run
from eval import headline_report, headline_tables
from eval.headline_jobs import (
    Stopped,
    all_jobs,
    execute,
    finished,
    held,
    in_the_way,
    launched,
    made_by_another,
    trained_on,
    training,
)
from eval.headline_numbers import collect, is_whole, published_file, unpublished


def parse_args(argv=None):
    parser = run.Parser(__file__, __doc__)
    parser.add_argument(
        "table", nargs="?", metavar="TABLE",
        help=f"{', '.join(headline_tables.TABLES)} (default: list them)",
    )  # fmt: skip
    parser.add_argument(
        "--scale", default="small", choices=["small", "full"],
        help="small: two CPU cores; full: the paper's size",
    )  # fmt: skip
    parser.add_argument(
        "--jobs", type=run.positive(int), default=1, help="trainings and evaluations side by side"
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="print and check the commands that are missing"
    )
    parser.add_argument("--runs", default="runs/headline", help="folder of the trainings")
    parser.add_argument("--out", help="folder of the results (default: eval/results)")
    parser.add_argument("--data-dir", default="data", help="folder of the data sets")
    parser.add_argument(
        "--seeds", type=run.positive(int), help="number of seeds, from 0 on (default: the table's)"
    )
    parser.add_argument(
        "--rows", metavar="A,B", help="only these rows, by their titles (default: all)"
    )
    parser.add_argument(
        "--evaluations", type=run.listed(str), metavar="A,B",
        help="only these evaluations, by name (default: all)",
    )  # fmt: skip
    parser.add_argument(
        "--unpublished", action="store_true",
        help="only the rows and seeds that the results file in --out does not hold whole",
    )  # fmt: skip
    parser.add_argument(
        "--gpus", type=run.positive(int), default=1,
        help="processes of a training; above 1 torchrun starts them",
    )  # fmt: skip
    parser.add_argument(
        "--readme", action="store_true",
        help="only write the tables of <out>/*.json between the markers of its README.md",
    )  # fmt: skip
    parser.add_argument(
        "--checkpoints", action="store_true",
        help="only write the network of each finished row, without the optimiser's state, to "
        "<out>/checkpoints/<name>.pt, of the first seed",
    )  # fmt: skip
    args = parser.parse_args(argv)
    if args.table is not None and args.table not in headline_tables.TABLES:
        known = ", ".join(headline_tables.TABLES)
        raise run.UserError(f"{args.table}: no such table; there are {known}")
    run.refuse(refused(args))
    args.out = Path(args.out) if args.out else run.ROOT / "eval" / "results"
    args.runs = Path(args.runs).expanduser().resolve()
    args.data_dir = str(Path(args.data_dir).expanduser().resolve())
    return args


def refused(args):
    """{message: whether it holds} of options that would do nothing."""
    chosen = {"--rows": args.rows, "--evaluations": args.evaluations,
              "--checkpoints": args.checkpoints, "--unpublished": args.unpublished,
              "--jobs": args.jobs > 1}  # fmt: skip
    wrong = {f"{name}: of which table?": args.table is None and on for name, on in chosen.items()}
    working = {"--seeds": args.seeds, "--evaluations": args.evaluations, "--jobs": args.jobs > 1,
               "--unpublished": args.unpublished, "--gpus": args.gpus > 1}  # fmt: skip
    idle = " and ".join(name for name, on in working.items() if on)
    only = [name for name in ("readme", "checkpoints", "dry_run") if getattr(args, name)]
    several = " and ".join(f"--{name.replace('_', '-')}" for name in only)
    return wrong | {
        f"{several}: one at a time": len(only) > 1,
        "--readme writes all tables: leave the name out": args.readme and args.table is not None,
        f"--checkpoints writes networks of seed 0 and runs nothing: leave {idle} out": bool(
            args.checkpoints and idle
        ),
        "--out and --runs: a folder each": "" in (args.out, args.runs),
    }


# --- dry run --------------------------------------------------------------------------------------


def script_of(words):
    """The module of a command's script."""
    path = run.ROOT / words[0]
    spec = importlib.util.spec_from_file_location(f"headline_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def check(job):
    """Parse a command's options with its script's own parser; returns them.

    Raises UserError for an option that the script does not know."""
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            return script_of(job.words).parse_args(job.words[1:])
    except run.UserError as error:
        raise run.UserError(f"{job.key}: {error}") from None


def dry_run(jobs, scale, args):
    """Print the commands that are missing, after a check of each."""
    todo = [job for job in jobs.values() if not finished(job)]
    for job in todo:
        check(job)
        _, *words = launched(job, args)
        print(f"python {shlex.join(words)}")
        if in_the_way(job):
            print(f"  would fail: {in_the_way(job)}")
    print(f"{len(todo)} of {len(jobs)} commands are missing; their options are known")
    print(f"data set {scale.dataset}: {missing_data(scale.dataset, args.data_dir) or 'there'}")
    for line in images_of_evaluations(scale, args.data_dir):
        print(line)
    return todo


def dry_run_all(args):
    """Check the commands of every table and scale, and name the data sets that are not there."""
    lines, reasons, others = [], {}, {}
    for name, table in headline_tables.TABLES.items():
        for size, scale in table.scales.items():
            own = run.changed(args, scale=size)
            jobs = all_jobs(own, scale, scale.rows, range(args.seeds or scale.seeds))
            for job in jobs.values():
                check(job)
            if scale.dataset not in reasons:
                reasons[scale.dataset] = missing_data(scale.dataset, args.data_dir)
            others |= dict.fromkeys(images_of_evaluations(scale, args.data_dir))
            state = "missing" if reasons[scale.dataset] else "there"
            lines.append([name, size, len(jobs), scale.dataset, state])
    print(run.table(lines, ["table", "scale", "commands", "data set", ""]))
    print(f"{sum(line[2] for line in lines)} commands; their options are known")
    print("\n".join([*filter(None, reasons.values()), *others]))
    return lines


def missing_data(name, data_dir):
    """What keeps a data set from being read, or None. Nothing is fetched."""
    if name not in data.NAMES:
        return None  # the script makes it
    if name in ("cifar10", "cifar100"):
        if data.cifar_place(name, data_dir) is None:
            return f"{name}: not in {data_dir}; a training would download it"
    try:
        data.load(name, data_dir, seed=0)
    except run.UserError as error:
        return str(error)
    return None


def images_of_evaluations(scale, data_dir):
    """Sentences on what the evaluations of a table read besides its data set."""
    lines, commands = [], " ".join(scale.evaluations.values())
    if "eval/corruptions.py" in commands:
        folder = data.corrupted_dir(scale.dataset, data_dir)
        if scale.dataset == "imagenet":
            names = data.SETS["imagenet-c"].folders
            folder = next((n for n in names if (Path(data_dir) / n).is_dir()), None)
        frost = corruptions.frost_textures(None, data_dir)[1]
        words = "the release" if folder else f"generated, frost: {frost}"
        lines.append(f"corruptions of {scale.dataset}: {words}")
    if scale.dataset == "in9" and "eval/domains.py" in commands:
        parts = (missing_data(f"in9-mixed-{part}", data_dir) for part in ("same", "rand"))
        lines += filter(None, parts)
    return lines


# --- checkpoints ----------------------------------------------------------------------------------

NETWORK = ("format", "method", "versions", "dataset", "arch", "norm", "num_classes", "image_size",
           "step", "total", "metrics", "stage", "model")  # fmt: skip
PLACES = ("data_dir", "out", "teacher")  # options that name a folder of the machine


def write_checkpoints(args, rows):
    """Write the networks of the finished rows, seed 0, into <out>/checkpoints; returns the paths.

    <run>.pt is last.pt of a training; its other files are <run>-<file>.

    A file is that of the training without the optimiser's state and without names of folders."""
    scale = headline_tables.TABLES[args.table].scales[args.scale]
    folder = args.out / "checkpoints"
    run.try_folder(folder, "--out")
    networks = {}
    for row in rows:
        networks.setdefault((row.run, row.file), row)
    paths = []
    for row in networks.values():
        job = training(args, scale, row.run, 0)
        if not finished(job):
            foreign = made_by_another(job.product, job.command)
            print(f"{'made by another command' if foreign else 'not finished'}: {row.title}")
            continue
        if not (job.product / row.file).is_file():
            print(f"no {row.file} in {job.product}: {row.title}")
            continue
        content = run.load_checkpoint(job.product / row.file)
        network = {name: content[name] for name in NETWORK if name in content}
        network["args"] = {k: v for k, v in content["args"].items() if k not in PLACES}
        network |= {"table": args.table, "title": row.title}
        for chosen in trained_on([job.product]).get("tuned", ()):
            network["args"] |= {k: v for k, v in chosen.items() if k in network["args"]}
        path = folder / (f"{row.run}.pt" if row.file == "last.pt" else f"{row.run}-{row.file}")
        run.save_checkpoint(path, network)
        print(f"written: {path}, {path.stat().st_size / 1e6:.1f} MB")
        paths.append(path)
    return paths


# --- main -----------------------------------------------------------------------------------------


def state_of(args, name, table):
    """(words, minutes) of a table at the scale asked for."""
    scale = table.scales[args.scale]
    seeds = args.seeds or scale.seeds
    content = collect(args, name, table, scale.rows, seeds)
    asked = [(row, str(seed)) for row in content["rows"] for seed in range(seeds)]
    states = [(is_whole(scale, row["seeds"].get(seed, {})), row, seed) for row, seed in asked]
    whole = sum(state for state, _, _ in states)
    failed = sum(seed in row["failed"] for state, row, seed in states if not state)
    jobs = all_jobs(args, scale, scale.rows, range(seeds)).values()
    begun = failed or any(row["seeds"] for row in content["rows"])
    begun = begun or any(job.product.exists() for job in jobs)
    words = f"{whole} of {len(asked)} rows x seeds" if begun else "not begun"
    words = "done" if whole == len(asked) else words + (f", {failed} failed" if failed else "")
    if scale.minutes is None:
        return words, f"not measured, on {scale.machine}"
    return words, f"{scale.minutes * seeds / 60:.0f} h of {scale.machine}"


def list_tables(args):
    """Print every table with its scales, their state and time, then what it holds and its paper."""
    rows = []
    for name, table in headline_tables.TABLES.items():
        for scale in table.scales:
            rows.append([name, scale, *state_of(run.changed(args, scale=scale), name, table)])
    print(run.table(rows, ["table", "scale", "state", "time, estimated"], width=run.window()))
    print("state: what is whole, published or measured here; time: of all seeds\n")
    for name, table in headline_tables.TABLES.items():
        words = f"{name}: {table.title} ({table.paper})"
        print(textwrap.fill(words, 79, subsequent_indent="  ", break_on_hyphens=False))
    print("\npython eval/headline.py TABLE runs what has not run here, and prints the table.")
    print("With --unpublished it runs only what is not published.")
    return rows


def chosen_rows(args, scale):
    """The rows of --rows, all by default. A title may hold commas: the longest one counts."""
    titles = [row.title for row in scale.rows]
    if args.rows is None:
        return list(scale.rows)
    chosen, parts = [], [part.strip() for part in args.rows.split(",")]
    while parts:
        lengths = range(len(parts), 0, -1)
        n = next((n for n in lengths if ", ".join(parts[:n]) in titles), 0)
        if not n:
            raise run.UserError(f"--rows: no {parts[0]}; there are {'; '.join(titles)}")
        chosen.append(", ".join(parts[:n]))
        del parts[:n]
    return [row for row in scale.rows if row.title in chosen]


def main(args):
    if args.readme:
        return headline_report.update(args.out / "README.md")
    if args.table is None:
        return dry_run_all(args) if args.dry_run else list_tables(args)
    table = headline_tables.TABLES[args.table]
    if args.scale not in table.scales:
        (other,) = table.scales
        raise run.UserError(f"{args.table} has no {args.scale} scale: give --scale {other}")
    scale = table.scales[args.scale]
    for name in args.evaluations or ():
        if name not in scale.evaluations:
            known = ", ".join(scale.evaluations) or "none, for its numbers come from the trainings"
            raise run.UserError(f"--evaluations {name}: {args.table} has {known}")
    rows, seeds = chosen_rows(args, scale), args.seeds or scale.seeds
    if args.checkpoints:
        return write_checkpoints(args, rows)
    jobs = {}
    for seed in range(seeds):
        left = unpublished(args, args.table, scale, rows, seed) if args.unpublished else rows
        jobs |= all_jobs(args, scale, left, [seed])
    if args.dry_run:
        return dry_run(jobs, scale, args)
    published_file(args, args.table, scale)  # tried before there is work to lose, as the folders
    run.try_folder(args.out, "--out")
    run.try_folder(args.runs, "--runs")
    failed, stopped = {}, None
    try:
        failed = execute(jobs, args)
    except (Stopped, KeyboardInterrupt, SystemExit) as error:
        stopped = name_of(error)
    with held() as signals:
        content = collect(args, args.table, table, scale.rows, max(seeds, scale.seeds))
        show(content, args)
    stopped = stopped or (signals and f"{signals[0]}: stopped")
    if stopped:
        print(f"{stopped}; the same command goes on", file=sys.stderr)
        sys.exit(run.TRY_AGAIN)
    if failed:
        logs = args.runs / args.scale / "*.log"
        raise run.UserError(f"{len(failed)} of {len(jobs)} commands failed; see {logs}")
    return content


def show(content, args):
    """Publish the table and print it."""
    if any(row["seeds"] or row["failed"] for row in content["rows"]):
        path = headline_report.publish(content, args.out)
        lines, header = headline_report.lines_of(content)
        words = textwrap.fill(headline_report.caption(content), 79, break_on_hyphens=False)
        print(f"\n{run.table(lines, header, width=run.window())}\n\n{words}\nwritten: {path}")
    else:
        print(f"{args.table}: nothing is finished yet")


def name_of(error):
    """What stopped this command, in words."""
    if isinstance(error, KeyboardInterrupt):
        return "SIGINT: stopped"
    if isinstance(error, SystemExit):  # run.cli leaves with 128 and the signal's number
        return f"{signal.Signals(error.code - 128).name}: stopped"
    return str(error)


if __name__ == "__main__":
    run.cli(main, parse_args)
