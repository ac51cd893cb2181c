"""Options of every run, and the last line of every script."""

import argparse
import json
import os
import re
import signal
import sys
from pathlib import Path

import torch.distributed as dist

from common.run import rundir
from common.run.device import world
from common.run.errors import UserError


def cli(main, parse_args):
    """Last line of every script. A `UserError` ends in one line on stderr and exit status 2; the
    first SIGTERM, SIGUSR1 or Ctrl-C in a run ends in a checkpoint and exit status 0."""
    own = int(os.environ.get("RANK", 0))
    if own:
        sys.stdout = open(os.devnull, "w")  # one process prints
    for name in ("SIGTERM", "SIGUSR1", "SIGINT"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), rundir.on_signal)
    try:
        main(parse_args())
    except UserError as error:
        print(f"error: {error}" if not own else f"process {own}: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        sys.exit(130)
    except RuntimeError as error:
        # What is left of a job whose other process died: torchrun starts all of them again.
        if world() == 1 or not re.search("gloo|nccl|peer|closed|timed out", str(error), re.I):
            raise
        stopped = rundir.Run.current and rundir.Run.current.stop
        reason = str(error).strip().split("\n")[0][:100]
        print(f"process {own}: lost the other processes ({reason})", file=sys.stderr, flush=True)
        os._exit(0 if stopped else 1)  # tearing down a broken group may hang
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def positive(kind):
    """argparse type: an int or float above zero."""

    def parse(text):
        value = kind(text)
        if not value > 0 or value == float("inf"):
            raise argparse.ArgumentTypeError(f"must be a finite number above 0, got {text}")
        return value

    parse.__name__ = kind.__name__
    return parse


def nonnegative(kind):
    """argparse type: an int or float of at least zero."""

    def parse(text):
        value = kind(text)
        if not value >= 0 or value == float("inf"):
            raise argparse.ArgumentTypeError(f"must be a finite number of at least 0, got {text}")
        return value

    parse.__name__ = kind.__name__
    return parse


def fraction(text):
    """argparse type: a float of at least 0 and below 1."""
    value = float(text)
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 0 and below 1, got {text}")
    return value


def listed(kind):
    """argparse type: values of `kind` with commas between them, as a list."""

    def parse(text):
        return [kind(part) for part in text.split(",")]

    parse.__name__ = f"list of {kind.__name__}"
    return parse


class Parser(argparse.ArgumentParser):
    """Shows defaults in --help and answers a wrong option with one line, exit status 2."""

    def __init__(self, script, doc):
        name, form = Path(script).name, argparse.ArgumentDefaultsHelpFormatter
        super().__init__(name, description=doc.split("\n")[0], formatter_class=form)

    def error(self, message):
        raise UserError(f"{message} ({self.prog} --help lists the options)")


def add_arguments(parser):
    """Add the options of every run, as the group "run"."""
    group = parser.add_argument_group("run")
    group.add_argument("--out", help="run directory (default: runs/<script>-<data>-<arch>-s<seed>)")
    group.add_argument("--overwrite", action="store_true", help="replace what is in --out")
    group.add_argument(
        "--resume", metavar="RUN", help="go on with this run directory; auto: with --out's, if any"
    )
    group.add_argument("--seed", type=nonnegative(int), default=0)
    group.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")
    group.add_argument("--precision", default="auto", choices=["auto", "fp32", "bf16", "fp16"])
    group.add_argument("--compile", action=argparse.BooleanOptionalAction, default=False)
    group.add_argument("--log-every", type=positive(int), default=50, help="steps between scalars")
    group.add_argument("--save-every", type=positive(int), default=1, help="epochs between saves")
    group.add_argument(
        "--save-minutes", type=positive(float), metavar="M", help="save as often too"
    )
    group.add_argument(
        "--keep", type=positive(int), default=2, help="checkpoints kept of each name"
    )
    group.add_argument(
        "--max-skips", type=nonnegative(int), default=0, metavar="N",
        help="steps left out because loss or gradient were not finite, before the run stops",
    )  # fmt: skip


def parse(parser, argv=None):
    """Parse `argv`; with `--resume RUN` the options saved there are the defaults.

    `--resume auto` is `--resume OUT` where a run is in `--out`, or in the directory that `Run`
    chooses, and nothing where none is. What torchrun starts again resumes so by itself.
    """
    args = parser.parse_args(argv)
    folder = args.resume
    if not folder and int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)):
        folder = "auto"
    if folder == "auto" and args.out and (Path(args.out) / "args.json").is_file():
        folder = args.out
    if folder and folder != "auto":
        file = Path(folder) / "args.json"
        if not file.is_file():
            raise UserError(f"--resume {folder}: no args.json there, so it is no run directory")
        try:
            saved = json.loads(file.read_text())
        except ValueError:
            raise UserError(f"{file}: not JSON; give the options and --overwrite") from None
        known = {k: v for k, v in saved.items() if k in vars(args)}
        parser.set_defaults(**known | {"out": folder, "overwrite": False})
        args = parser.parse_args(argv)
        args.out = folder
    args.resume = folder
    return args
