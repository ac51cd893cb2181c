"""The headline tables: one command trains and evaluates what is missing, and prints the table.

    python eval/headline.py                                  # the tables and their state
    python eval/headline.py --dry-run                        # every command and data set, checked
    python eval/headline.py question --dry-run               # the commands of a table
    python eval/headline.py question --jobs 2                # what is missing, then the table
    python eval/headline.py question --seeds 1 --rows BatchNorm,CT

A table is data: eval/headline_tables.py holds the commands, and says where each number stands.
Trainings lie in <runs>/<scale>/<name>-s<seed>, and tables share them. A stopped command goes on
where it stopped when it is given again. A training that fails or diverges makes a row that says
so. The next call tries it again.

Every job has one thread; --jobs says how many run side by side. Cells are mean +- sample standard
deviation over n seeds. A column that a paper reports stands twice, "paper" and "here". The results
go to <out>/headline_<table>_<scale>.json, .md and, where the table has a figure, .svg. Numbers that
the JSON there already holds stay until this machine has measured the same row and seed itself.
"""

import contextlib
import importlib.util
import io
import json
import os
import re
import shlex
import signal
import statistics
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from common import data, run
from eval import headline_report, headline_tables

NUMBERS = [getattr(signal, name) for name in run.SIGNALS]
# Exit statuses of a training that left after a signal, of an evaluation, and of any process.
TOLD_TO_STOP = {run.TRY_AGAIN, *(128 + n for n in NUMBERS), *(-n for n in NUMBERS)}
POLL = 0.2  # seconds between two looks at the running jobs
NAME = re.compile(r"\{([\w+-]+)\}")


def parse_args(argv=None):
    parser = run.Parser(__file__, __doc__)
    parser.add_argument("table", nargs="?", help="its name (default: list the tables)")
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
    args.out = Path(args.out) if args.out else run.ROOT / "eval" / "results"
    args.runs = Path(args.runs).expanduser().resolve()
    args.data_dir = str(Path(args.data_dir).expanduser().resolve())
    return args


# --- jobs -----------------------------------------------------------------------------------------


class Job(NamedTuple):
    """One command. It is done when `finished` finds its result."""

    key: str  # "bn-s0", or "bn-s0 corruptions"
    words: list  # the script and its arguments
    product: Path  # the run directory of a training, the JSON file of an evaluation
    needs: tuple  # keys of the trainings that it reads
    command: str  # as the table has it; a product of another command does not count
    seed: int
    trains: bool


def run_folder(args, name, seed):
    return args.runs / args.scale / f"{name}-s{seed}"


def filled(command, args, seed, own):
    """The command's words with the names in braces filled in, and the trainings that they name."""
    needs = []

    def replace(match):
        name = match[1]
        if name in own:
            return str(own[name])
        needs.append(f"{name}-s{seed}")
        return str(run_folder(args, name, seed))

    return [NAME.sub(replace, word) for word in shlex.split(command)], tuple(needs)


def training(args, scale, name, seed):
    folder = run_folder(args, name, seed)
    words, needs = filled(scale.runs[name], args, seed, {"run": folder, "seed": seed})
    words += ["--seed", str(seed), "--data-dir", args.data_dir]
    words += ["--out", str(folder), "--resume", "auto"]
    return Job(f"{name}-s{seed}", words, folder, needs, scale.runs[name], seed, trains=True)


def result_file(args, row, name, seed):
    """The JSON of an evaluation; options of the row's own are part of its name."""
    folder = run_folder(args, row.run, seed)
    own = re.sub(r"[^\w.]+", "-", (row.options or {}).get(name, ""))
    return folder / f"{Path(row.file).stem}.{name}{own}.json"


def evaluation_command(scale, row, name):
    return f"{scale.evaluations[name]} {(row.options or {}).get(name, '')}".strip()


def evaluation(args, scale, row, name, seed):
    folder = run_folder(args, row.run, seed)
    own = {"network": folder / row.file, "run": folder, "seed": seed}
    command = evaluation_command(scale, row, name)
    words, needs = filled(command, args, seed, own)
    product = result_file(args, row, name, seed)
    words += ["--data-dir", args.data_dir, "--json", str(product)]
    key = f"{row.run}-s{seed} {product.stem}"
    needs = (f"{row.run}-s{seed}", *needs)
    return Job(key, words, product, needs, command, seed, trains=False)


def trainings_of(scale, row):
    """The trainings of a row: its own, and those that columns name."""
    sources = [str(word) for path in scale.columns.values() for word in path]
    return [row.run, *(w.removeprefix("run ") for w in sources if w.startswith("run "))]


def all_jobs(args, scale, rows, seeds):
    """{key: Job} of rows and several seeds. A training stands after those that it needs and before
    its evaluations."""
    jobs = {}

    def add_training(name, seed):
        job = training(args, scale, name, seed)
        for need in job.needs:
            if need not in jobs:
                add_training(need.removesuffix(f"-s{seed}"), seed)
        jobs.setdefault(job.key, job)

    for seed in seeds:
        for row in rows:
            for name in trainings_of(scale, row):
                add_training(name, seed)
            for name in args.evaluations or scale.evaluations:
                job = evaluation(args, scale, row, name, seed)
                jobs.setdefault(job.key, job)
    return jobs


def read_json(path):
    """The content of a JSON file, None where it is not there or not whole."""
    with contextlib.suppress(OSError, ValueError):
        return json.loads(path.read_text())
    return None


def final_numbers(folder):
    """The final numbers of a training, None as long as it has none."""
    with contextlib.suppress(OSError, ValueError):
        lines = (folder / "log.jsonl").read_text().splitlines()
        ends = [line for line in map(json.loads, lines) if line.get("event") == "end"]
        return ends[-1] if ends else None
    return None


def trained_on(folders):
    """{"device", "torch", "git"} of the processes that trained in the folders, and what --tune
    chose there, as "tuned".

    Logs from before 2026-11-26 do not name the device."""
    lines = []
    for folder in folders:
        with contextlib.suppress(OSError, ValueError):
            lines += map(json.loads, (folder / "log.jsonl").read_text().splitlines())
    begun = [line for line in lines if line.get("event") in ("start", "resume")]
    names = ("device", "torch", "git") if begun else ()
    found = {
        name: dict.fromkeys(line.get(name, "not recorded") for line in begun) for name in names
    }
    found = {name: " and ".join(values) for name, values in found.items()}
    tuned = [line for line in lines if line.get("event") == "tuned"]
    chosen = [{k: v for k, v in line.items() if k != "event"} for line in tuned]
    return found | ({"tuned": chosen} if chosen else {})


def made_by_another(product, command):
    """Whether a product's own record says that the table had another command then."""
    with contextlib.suppress(OSError):
        return Path(f"{product}.command").read_text().strip() != command
    return False


def finished(job):
    content = final_numbers(job.product) if job.trains else read_json(job.product)
    return content is not None and not made_by_another(job.product, job.command)


def mark(job):
    """The file that says why a job failed."""
    return job.product.with_name(f"{job.product.name}.failed")


# --- running --------------------------------------------------------------------------------------


def start(job, args):
    """Start the process of a job. Its output goes to a log beside its product."""
    mark(job).unlink(missing_ok=True)
    words = list(job.words)
    job.product.parent.mkdir(parents=True, exist_ok=True)
    Path(f"{job.product}.command").write_text(f"{job.command}\n")
    if "adversarial.py" in words[0] and Path(f"{job.product}.state").is_dir():
        words.append("--resume")
    launcher = [sys.executable]
    if job.trains and args.gpus > 1:
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        launcher += ["--nproc-per-node", str(args.gpus)]
    words[0] = str(run.ROOT / words[0])
    with open(f"{job.product}.log", "a") as log:
        return subprocess.Popen(
            [*launcher, *words], stdout=log, stderr=log, cwd=run.ROOT,
            env=os.environ | {"OMP_NUM_THREADS": "1"}, start_new_session=True,
        )  # fmt: skip


def reason_of(job, status):
    """Why a job failed: the signal that killed it, else the last line of its log."""
    if status < 0:
        why = ": was there too little memory?" if status == -signal.SIGKILL else ""
        return f"killed by {signal.Signals(-status).name}{why}"
    lines = Path(f"{job.product}.log").read_text(errors="replace").strip().splitlines()
    return lines[-1].removeprefix("error: ") if lines else f"exit status {status}"


def told_to_stop(job, status):
    """Whether a job left because of a signal. Under torchrun a stopped training leaves with 0."""
    if status == 0 and job.trains and not finished(job):
        with contextlib.suppress(OSError, ValueError, IndexError):
            last = (job.product / "log.jsonl").read_text().splitlines()[-1]
            return json.loads(last).get("event") == "stop"
    return status in TOLD_TO_STOP


def obstacle(job, failed):
    """What keeps a job from being started, or None."""
    broken = next((need for need in job.needs if need in failed), None)
    if broken:
        return f"needs {broken}, which failed"
    if job.product.exists() and made_by_another(job.product, job.command):
        return f"{job.product} was made by another command: move it away"
    return None


class Stopped(Exception):
    """A job was told to stop, or this command was."""


def execute(jobs, args):
    """Run the jobs that are not finished. Returns {key: reason} of those that failed."""
    failed, running = {}, {}
    todo = {key: job for key, job in jobs.items() if not finished(job)}
    total, began = len(todo), time.monotonic()
    try:
        while todo or running:
            for key, job in list(todo.items()):
                reason = obstacle(job, failed)
                if reason:
                    del todo[key]
                    fail(job, reason, failed)
                elif len(running) < args.jobs and not waits(job, todo, running):
                    del todo[key]
                    clock = run.clock(time.monotonic() - began)
                    print(f"{clock}  {total - len(todo)} of {total}  {key}", flush=True)
                    running[key] = job, start(job, args)
            for key, (job, process) in list(running.items()):
                status = process.poll()
                if status is None:
                    continue
                del running[key]
                if told_to_stop(job, status):
                    raise Stopped(f"{key} was stopped")
                reason = reason_of(job, status)
                if status and "another process" in reason:  # it is at work on the same, unfailed
                    raise Stopped(f"{key}: {reason}")
                if status or not finished(job):
                    fail(job, reason, failed)
            time.sleep(POLL)
    finally:
        for _, process in running.values():
            with contextlib.suppress(ProcessLookupError):
                os.kill(process.pid, signal.SIGTERM)  # a training saves and leaves
        for _, process in running.values():
            process.wait()
    return failed


def waits(job, todo, running):
    return any(need in todo or need in running for need in job.needs)


def fail(job, reason, failed):
    failed[job.key] = reason
    print(f"failed: {job.key}: {reason}", flush=True)
    if not reason.startswith("needs "):  # the mark of what it needs says it
        mark(job).parent.mkdir(parents=True, exist_ok=True)
        mark(job).write_text(reason + "\n")


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
        print(f"python {shlex.join(job.words)}")
    missing = missing_data(scale.dataset, args.data_dir)
    print(f"{len(todo)} of {len(jobs)} commands are missing; their options are known")
    print(f"data set {scale.dataset}: {missing or 'there'}")
    return todo


def dry_run_all(args):
    """Check the commands of every table and scale, and name the data sets that are not there."""
    lines, reasons = [], {}
    for name, table in headline_tables.TABLES.items():
        for size, scale in table.scales.items():
            own = run.changed(args, scale=size)
            jobs = all_jobs(own, scale, scale.rows, range(args.seeds or scale.seeds))
            for job in jobs.values():
                check(job)
            if scale.dataset not in reasons:
                reasons[scale.dataset] = missing_data(scale.dataset, args.data_dir)
            state = "missing" if reasons[scale.dataset] else "there"
            lines.append([name, size, len(jobs), scale.dataset, state])
    print(run.table(lines, ["table", "scale", "commands", "data set", ""]))
    print(f"{sum(line[2] for line in lines)} commands; their options are known")
    print("\n".join(reason for reason in reasons.values() if reason))
    return lines


def missing_data(name, data_dir):
    """What keeps a data set from being read, or None."""
    if name not in data.NAMES:
        return None  # the script makes it
    try:
        data.load(name, data_dir, seed=0)
    except run.UserError as error:
        return str(error)
    return None


# --- the table ------------------------------------------------------------------------------------


def number(args, scale, row, path, seed):
    """The number that a path of `Scale.columns` leads to, None where it is not there."""
    source, *keys = [k.format(stage=row.stage) if isinstance(k, str) else k for k in path]
    if source == "100 -":
        value = number(args, scale, row, keys, seed)
        return None if value is None else 100 - value
    if source.startswith("run"):
        name = source.removeprefix("run").strip() or row.run
        product, command = run_folder(args, name, seed), scale.runs[name]
        content = final_numbers(product)
    else:
        product = result_file(args, row, source, seed)
        command = evaluation_command(scale, row, source)
        content = read_json(product) or {}
        entry = keys.pop(0) if isinstance(keys[0], int) else 0
        content = dict(enumerate(content.get("checkpoints", []))).get(entry)
    for key in keys:
        content = content.get(key) if isinstance(content, dict) else None
    return None if made_by_another(product, command) else content


def diverged(args, row, seed):
    """The step at which the network of a row diverged, None where it did not."""
    final = final_numbers(run_folder(args, row.run, seed)) or {}
    return final.get(f"diverged/{row.stage}")


def numbers_of(args, scale, row, seed):
    """{column: number or None}; networks that diverged or are of another command have none."""
    foreign = made_by_another(run_folder(args, row.run, seed), scale.runs[row.run])
    if foreign or diverged(args, row, seed) is not None:
        return dict.fromkeys(scale.columns)
    found = {}
    for column, path in scale.columns.items():
        if path[0] == "mean":
            values = [found[name] for name in path[1:]]
            found[column] = None if None in values else statistics.mean(values)
        else:
            found[column] = number(args, scale, row, path, seed)
    return found


def failure(args, scale, row, seed):
    """Why a row has no numbers for a seed, or None."""
    step = diverged(args, row, seed)
    if step is not None:
        return f"diverged at step {step:g}"
    own = {f"{name}-s{seed}" for name in trainings_of(scale, row)}
    for key, job in all_jobs(run.changed(args, evaluations=None), scale, [row], [seed]).items():
        if mark(job).is_file() and not finished(job):
            foreign = job.trains and key not in own
            return f"needs {key}, which failed" if foreign else mark(job).read_text().strip()
    return None


def published_rows(args, name, scale):
    """{(title, command, seed): (numbers, "trained")} of the results file that stands in --out.

    {} where its evaluations are not those of today."""
    content = read_json(args.out / f"headline_{name}_{args.scale}.json") or {}
    if content.get("evaluations") != scale.evaluations:
        return {}
    return {
        (row["row"], row["command"], seed): (numbers, row.get("trained", {}).get(seed, {}))
        for row in content["rows"]
        for seed, numbers in row["seeds"].items()
    }


def known(numbers):
    return sum(value is not None for value in numbers.values())


def collect(args, name, table, rows, seeds):
    """What the JSON file holds: the numbers of every row, column and seed, and the commands.

    The results file in --out keeps its numbers of a row and seed while it knows more of them than
    the trainings here. A failure here takes none away. So several machines may share a table."""
    scale = table.scales[args.scale]
    published = published_rows(args, name, scale)
    found = []
    for row in rows:
        numbers, failures, trained = {}, {}, {}
        command = f"python {scale.runs[row.run]}"
        for seed in range(seeds):
            values = numbers_of(args, scale, row, seed)
            reason = failure(args, scale, row, seed)
            old, about = published.get((row.title, command, str(seed)), ({}, {}))
            if reason:
                failures[str(seed)] = reason
            if known(values) >= known(old):
                names = trainings_of(scale, row)
                about = trained_on([run_folder(args, name, seed) for name in names])
            else:
                values = {column: old.get(column) for column in scale.columns}
            if known(values):
                numbers[str(seed)], trained[str(seed)] = values, about
        found.append(
            {
                "row": row.title, "run": row.run, "command": command,
                "paper": row.paper or {}, "seeds": numbers, "failed": failures, "trained": trained,
            }
        )  # fmt: skip
    return {
        "table": name, "title": table.title, "scale": args.scale, "size": scale.size,
        "paper": table.paper, "note": table.note, "dataset": scale.dataset,
        "columns": list(scale.columns), "chart": list(scale.chart),
        "evaluations": scale.evaluations, "versions": run.versions(), "rows": found,
    }  # fmt: skip


# --- checkpoints ----------------------------------------------------------------------------------

NETWORK = ("format", "method", "versions", "dataset", "arch", "norm", "num_classes", "image_size",
           "step", "total", "metrics", "stage", "model")  # fmt: skip
PLACES = ("data_dir", "out", "teacher")  # options that name a folder of the machine


def write_checkpoints(args, rows):
    """Write the networks of the finished rows, seed 0, into <out>/checkpoints; returns the paths.

    <run>.pt is last.pt of a training; its other files are <run>-<file>.

    A file is that of the training without the optimiser's state and without names of folders."""
    folder = args.out / "checkpoints"
    folder.mkdir(parents=True, exist_ok=True)
    networks = {}
    for row in rows:
        networks.setdefault((row.run, row.file), row)
    paths = []
    for row in networks.values():
        trained = run_folder(args, row.run, 0)
        if final_numbers(trained) is None:
            print(f"not finished: {row.title}")
            continue
        content = run.load_checkpoint(trained / row.file)
        network = {name: content[name] for name in NETWORK if name in content}
        network["args"] = {k: v for k, v in content["args"].items() if k not in PLACES}
        network |= {"table": args.table, "title": row.title}
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
    jobs = all_jobs(args, scale, scale.rows, range(seeds)).values()
    done = sum(map(finished, jobs))
    published = read_json(args.out / f"headline_{name}_{args.scale}.json")
    words = "not begun"
    if done:
        words = "done" if done == len(jobs) else f"{done} of {len(jobs)} commands"
    elif published:
        count = sum(len(row["seeds"]) for row in published["rows"])
        words = f"{count} of {len(scale.rows) * seeds} published"
    if scale.minutes is None:
        return words, f"not measured, on {scale.machine}"
    return words, f"{scale.minutes * seeds / 60:.0f} h of {scale.machine}"


def list_tables(args):
    """Print every table with its scales, their state and time, then what it holds and its paper."""
    rows = []
    for name, table in headline_tables.TABLES.items():
        for scale in table.scales:
            rows.append([name, scale, *state_of(run.changed(args, scale=scale), name, table)])
    print(run.table(rows, ["table", "scale", "state", "time, estimated"]))
    print("published: rows x seeds in the results; commands: those that have run here\n")
    for name, table in headline_tables.TABLES.items():
        words = f"{name}: {table.title} ({table.paper})"
        print(textwrap.fill(words, 79, subsequent_indent="  ", break_on_hyphens=False))
    print("\npython eval/headline.py TABLE runs what is missing and prints the table.")
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
        raise run.UserError(f"{args.table} has no {args.scale} scale: {', '.join(table.scales)}")
    scale = table.scales[args.scale]
    for name in args.evaluations or ():
        if name not in scale.evaluations:
            raise run.UserError(f"--evaluations: {name} is none of {', '.join(scale.evaluations)}")
    rows, seeds = chosen_rows(args, scale), args.seeds or scale.seeds
    if args.checkpoints:
        return write_checkpoints(args, rows)
    jobs = all_jobs(args, scale, rows, range(seeds))
    if args.dry_run:
        return dry_run(jobs, scale, args)
    stopped = None
    try:
        execute(jobs, args)
    except (Stopped, KeyboardInterrupt, SystemExit) as error:
        stopped = str(error) or "interrupted"
    content = collect(args, args.table, table, scale.rows, max(seeds, scale.seeds))
    if not any(row["seeds"] or row["failed"] for row in content["rows"]):
        raise run.UserError(f"{args.table}: nothing is finished yet; the same command goes on")
    path = headline_report.publish(content, args.out)
    lines, header = headline_report.lines_of(content)
    words = headline_report.caption(content)
    print(f"\n{run.table(lines, header, width=run.window())}\n{words}\nwritten: {path}")
    if stopped:
        raise run.UserError(f"stopped ({stopped}); the same command goes on")
    return content


if __name__ == "__main__":
    run.cli(main, parse_args)
