"""The commands of the headline tables: which are done, and how the others are run.

A job is one training or one evaluation. It is done when its result is there and was made by the
command that the table has today. Trainings lie in <runs>/<scale>/<name>-s<seed>. Beside a run
directory or a results file FILE stand FILE.command, FILE.log and, after a failure, FILE.failed.
"""

import contextlib
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from common import run

NUMBERS = [getattr(signal, name) for name in run.SIGNALS]
# Exit statuses of a training that left after a signal, of an evaluation, and of any process.
TOLD_TO_STOP = {run.TRY_AGAIN, *(128 + n for n in NUMBERS), *(-n for n in NUMBERS)}
POLL = 0.2  # seconds between two looks at the running jobs
NAME = re.compile(r"\{([\w+-]+)\}")
OWN = ("run", "seed")  # names in braces that are no trainings


# --- jobs -----------------------------------------------------------------------------------------


class Job(NamedTuple):
    """One command. It is done when `finished` finds its result."""

    key: str  # "bn-s0", or "bn-s0 corruptions"
    words: list  # the script and its arguments
    product: Path  # the run directory of a training, the JSON file of an evaluation
    needs: tuple  # keys of the trainings that it reads
    command: str  # as the table has it; what another command made does not count
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


def command_of(scale, name):
    """A training's command and those of the trainings that it reads: a student of another teacher
    is another network."""
    command = scale.runs[name]
    needs = [need for need in dict.fromkeys(NAME.findall(command)) if need not in OWN]
    return "; ".join([command, *(f"{need}: {command_of(scale, need)}" for need in needs)])


def training(args, scale, name, seed):
    folder = run_folder(args, name, seed)
    words, needs = filled(scale.runs[name], args, seed, {"run": folder, "seed": seed})
    words += ["--seed", str(seed), "--data-dir", args.data_dir]
    words += ["--out", str(folder), "--resume", "auto"]
    command = command_of(scale, name)
    return Job(f"{name}-s{seed}", words, folder, needs, command, seed, trains=True)


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
    """The object in a JSON file, None where there is none or not a whole one."""
    with contextlib.suppress(OSError, ValueError):
        content = json.loads(path.read_text())
        return content if isinstance(content, dict) else None
    return None


def entries_of(content):
    """The networks of an evaluation's JSON, [] of what is none."""
    entries = (content or {}).get("checkpoints")
    return [e for e in entries if isinstance(e, dict)] if isinstance(entries, list) else []


def final_numbers(folder):
    """The final numbers of a training, None as long as it has none."""
    ends = [line for line in run.read_log(folder) if line.get("event") == "end"]
    return ends[-1] if ends else None


def trained_on(folders):
    """{"device", "torch", "git"} of the processes that trained in the folders, and what --tune
    chose there, as "tuned".

    Logs from before 2026-11-26 do not name the device."""
    lines = [line for folder in folders for line in run.read_log(folder)]
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
    if job.trains:
        done = final_numbers(job.product) is not None
    else:
        done = bool(entries_of(read_json(job.product)))
    return done and not made_by_another(job.product, job.command)


def mark(job):
    """The file that says why a job failed."""
    return job.product.with_name(f"{job.product.name}.failed")


# --- running --------------------------------------------------------------------------------------


def launched(job, args):
    """The words of the process that a job is, in the folder of the scripts."""
    words = [sys.executable]
    if job.trains and args.gpus > 1:
        words += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
        words.append(str(args.gpus))
    words += job.words
    if "adversarial.py" in job.words[0] and Path(f"{job.product}.state").is_dir():
        words.append("--resume")
    return words


def start(job, args):
    """Start a job; returns its process, and where its part of the log beside its product begins."""
    mark(job).unlink(missing_ok=True)
    job.product.parent.mkdir(parents=True, exist_ok=True)
    Path(f"{job.product}.command").write_text(f"{job.command}\n")
    if not job.trains:
        job.product.unlink(missing_ok=True)  # not whole, else it would be finished
    with open(f"{job.product}.log", "a") as log:
        begins = log.tell()
        process = subprocess.Popen(
            launched(job, args), stdout=log, stderr=log, cwd=run.ROOT,
            env=os.environ | {"OMP_NUM_THREADS": "1"}, start_new_session=True,
        )  # fmt: skip
        return process, begins


def reason_of(job, status, begins):
    """Why a job failed: the signal that killed it, else the last error in its part of the log, else
    the last line. Torchrun writes many lines below an error."""
    if status < 0:
        why = ": was there too little memory?" if status == -signal.SIGKILL else ""
        return f"killed by {signal.Signals(-status).name}{why}"
    text = Path(f"{job.product}.log").read_bytes()[begins:].decode(errors="replace")
    lines = text.strip().splitlines()
    if status == 0:
        return "ended without a result"
    errors = [line for line in lines if line.startswith("error: ")]
    return [f"exit status {status}", *lines[-1:], *errors[-1:]][-1].removeprefix("error: ")


def told_to_stop(job, status):
    """Whether a job left because of a signal. Under torchrun a stopped training leaves with 0."""
    if status == 0 and job.trains and not finished(job):
        return [line.get("event") for line in run.read_log(job.product)][-1:] == ["stop"]
    return status in TOLD_TO_STOP


def obstacle(job, failed):
    """What keeps a job from being started, or None."""
    broken = next((need for need in job.needs if need in failed), None)
    if broken:
        return f"needs {broken}, which failed"
    return in_the_way(job)


def in_the_way(job):
    """What another command made in a job's place, in words, or None."""
    if job.product.exists() and made_by_another(job.product, job.command):
        return f"{job.product} was made by another command: move it away"
    return None


def lost_network(job):
    """What keeps an evaluation from being started whose trainings have ended, or None."""
    network = None if job.trains else Path(job.words[1])
    if network and not network.exists():
        return f"no {network}, though its training ended: move its folder away to train it again"
    return None


@contextlib.contextmanager
def held():
    """Signals that would stop this command wait; gives the list of their names. An ignored one,
    as SIGHUP under nohup, stays ignored."""
    names = []
    old = {}
    for number in (n for n in NUMBERS if signal.getsignal(n) is not signal.SIG_IGN):
        old[number] = signal.signal(number, lambda n, _: names.append(signal.Signals(n).name))
    try:
        yield names
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


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
                if finished(job):  # by another command, meanwhile
                    del todo[key]
                    continue
                ready = not waits(job, todo, running)
                reason = obstacle(job, failed) or (ready and lost_network(job))
                if reason:
                    del todo[key]
                    fail(job, reason, failed)
                elif ready and len(running) < args.jobs:
                    del todo[key]
                    clock = run.clock(time.monotonic() - began)
                    print(f"{clock}  {total - len(todo)} of {total}  {key}", flush=True)
                    with held() as signals:  # a process that nobody knows would not be stopped
                        running[key] = job, *start(job, args)
                    if signals:
                        raise Stopped(f"{signals[0]}: stopped")
            for key, (job, process, begins) in list(running.items()):
                status = process.poll()
                if status is None:
                    continue
                del running[key]
                if told_to_stop(job, status):
                    raise Stopped(f"{key} was stopped")
                reason = reason_of(job, status, begins)
                if status and "another process" in reason:  # it is at work on the same, unfailed
                    raise Stopped(f"{key}: {reason}")
                if status or not finished(job):
                    fail(job, reason, failed)
            time.sleep(POLL)
    finally:
        for _, process, _ in running.values():
            with contextlib.suppress(ProcessLookupError):
                os.kill(process.pid, signal.SIGTERM)  # a training saves and leaves
        for _, process, _ in running.values():
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
