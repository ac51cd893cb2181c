"""Options of every run, and the last line of every script."""

import argparse
import json
import os
import re
import shlex
import signal
import sys
import textwrap
from pathlib import Path

import torch
import torch.distributed as dist

from common.run.checkpoint import ROOT
from common.run.device import LONG, environment_number, world
from common.run.errors import UserError, out_of_memory
from common.run.progress import Lasting
from common.run.rundir import answered, read_options

# Options that say where and how a run is made, not what it is: they are no part of its name.
PLUMBING = {
    "out", "overwrite", "resume", "device", "data_dir", "workers", "strict", "log_every",
    "save_every", "save_minutes", "compile", "eval_every", "corrupted_images", "robust_images",
    "probe_images", "capture", "baseline", "teacher", "deepaug_dir", "weights",
}  # fmt: skip
POINTS = 10  # evaluations of a short training, unless --eval-every says otherwise


def leave(number, frame):
    """Leave through the cleaning up. A training's RunDir has a handler of its own."""
    sys.exit(128 + number)


def cli(main, parse_args):
    """Last line of every script: a UserError ends in one line on stderr and exit status 2.

    A finished training ends with 0, one that was told to stop with 75. Under torchrun this one
    ends with 0 too: the last line of log.jsonl says "stop" or "end".
    """
    own = 0
    args = argparse.Namespace()
    sys.stdout = Lasting(sys.stdout)
    sys.stderr = Lasting(sys.stderr)
    for number in answered():
        if number != signal.SIGINT:  # Python makes a KeyboardInterrupt of it
            signal.signal(number, leave)
    try:
        own = environment_number("RANK", 0)
        if own:
            sys.stdout = Lasting(open(os.devnull, "w"))  # one process prints
        args = parse_args()
        main(args)
        sys.stdout.flush()
    except UserError as error:
        reason = " ".join(str(error).splitlines())  # of a path, say, with a line break in its name
        print(f"error: {reason}" if not own else f"process {own}: {reason}", file=sys.stderr)
        sys.exit(2)
    except OSError as error:  # as of a name that is too long, where a file is only looked for
        if error.filename is None:
            raise
        print(f"error: {str(error.filename)[:200]}: {error.strerror}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        sys.exit(130)
    except torch.OutOfMemoryError as error:
        print(f"error: {out_of_memory(error, vars(args))}", file=sys.stderr)
        sys.exit(2)
    except RuntimeError as error:
        # Another process died; torchrun restarts the job.
        if world() == 1 or not re.search("gloo|nccl|peer|closed|timed out", str(error), re.I):
            raise
        rundir = getattr(signal.getsignal(signal.SIGTERM), "__self__", None)
        stopped = getattr(rundir, "signal", None)
        reason = str(error).strip().split("\n")[0][:100]
        print(f"process {own}: lost the other processes ({reason})", file=sys.stderr, flush=True)
        os._exit(0 if stopped else 1)  # tearing down a broken group may hang
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def too_large(value):
    """Whether a number does not fit: a whole one in the 64 bits that PyTorch counts with, a float
    in fp32 with room for a factor."""
    return value >= (2**63 if isinstance(value, int) else 1e36)


def positive(kind):
    """argparse type: an int or float above zero."""

    def parse(text):
        value = kind(text)
        if not value > 0 or value == float("inf") or too_large(value):
            raise argparse.ArgumentTypeError(f"must be a finite number above 0, got {text}")
        return value

    parse.__name__ = kind.__name__
    return parse


def nonnegative(kind):
    """argparse type: an int or float of at least zero."""

    def parse(text):
        value = kind(text)
        if not value >= 0 or value == float("inf") or too_large(value):
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
    """argparse type: values of `kind` with commas between them, each once, as a list.

    What is named twice would be trained, counted or averaged twice."""

    def parse(text):
        values = [kind(part) for part in text.split(",")]
        for value in values:
            if values.count(value) > 1:
                raise argparse.ArgumentTypeError(f"{value} is there twice: name each once")
        return values

    parse.__name__ = f"list of {kind.__name__}"
    return parse


MOVED = {  # options of earlier versions: what to do now
    "--growth": "use python eval/growth.py --depths 10,16,28,40",
    "--growth-epochs": "train with --epochs and look at the tag embedding in TensorBoard",
    "--tune-lrs": "TUNED in fixup_penalty.py holds the values that are tried",
    "--tune-weights": "TUNED in fixup_penalty.py holds the values that are tried",
    "--tune-dropouts": "TUNED in fixup_penalty.py holds the values that are tried",
    "--tune-epochs": "a trial is as long as a training",
    "--noise-batch": "the noise is that of --batch-size",
    "--decode": "pictures are decoded by Pillow",
    "--keep": "the newest checkpoint and the one before it are kept",
    "--max-skips": "a run in fp16 stops when its scale has fallen too low",
}
# Options of a checkpoint that make no other method of it: networks that differ in these alone are
# seeds of one row. Those of earlier versions are among them.
NOT_OPTIONS = {
    *PLUMBING,
    "seed",
    "seeds",
    "tuned",
    *(option[2:].replace("-", "_") for option in MOVED),
}
METAVARS = {
    "int": "N",
    "float": "X",
    "fraction": "X",
    "places": "N,N,...",
    "list of float": "X,X,...",
    "list of str": "NAME,...",
}


class Formatter(argparse.RawDescriptionHelpFormatter):
    """Shows the default of every option once, and never "None". The usage line names what stands
    without a "--". No name is broken at its hyphen."""

    def add_usage(self, usage, actions, groups, prefix=None):
        for action in actions:
            if not action.option_strings:
                usage += f" {self._format_args(action, action.metavar or action.dest)}"
        super().add_usage(usage, actions, groups, prefix)

    def _split_lines(self, text, width):
        return textwrap.wrap(" ".join(text.split()), width, break_on_hyphens=False)

    def _get_help_string(self, action):
        text = action.help or ""
        if _many(action):
            text = f"{text}; one of {', '.join(map(str, action.choices))}"
        value = action.default
        if value in (None, argparse.SUPPRESS) or "default" in text or not action.option_strings:
            return text
        if isinstance(value, bool):
            value = "on" if value else "off"
        if isinstance(value, (list, tuple)):
            value = ",".join(map(str, value))
        return f"{text} (default: {str(value).replace('%', '%%')})"

    def _get_default_metavar_for_optional(self, action):
        kind = getattr(action.type, "__name__", "str")
        return METAVARS.get(kind, action.dest.upper())

    def _metavar_formatter(self, action, default_metavar):
        if _many(action):
            return super()._metavar_formatter(_short(action), default_metavar)
        return super()._metavar_formatter(action, default_metavar)


def _many(action):
    """Whether an option has so many choices that they stand in its help text."""
    return action.choices and len(action.choices) > 8 and not action.metavar


def _short(action):
    """The action with a placeholder instead of its many choices, which the help text lists."""
    return argparse.Namespace(**vars(action) | {"metavar": "NAME", "choices": None})


class Flag(argparse.BooleanOptionalAction):
    """--name and --no-name, without argparse's own note of the default."""

    def __init__(self, *args, help=None, **kwargs):
        super().__init__(*args, help=None, **kwargs)
        self.help = help


def command(script, *words):
    """The command line of a script of this project, from the current directory, as a shell needs
    it."""
    place = script if Path.cwd() == ROOT else ROOT / script
    return shlex.join(["python", str(place), *map(str, words)])


def home(word):
    """A word of the command line with a "~" at its start, or at that of its value, expanded.

    A shell expands `--out ~/run` but not `--out=~/run`."""
    option, equals, value = word.rpartition("=") if word.startswith("--") else ("", "", word)
    return option + equals + os.path.expanduser(value)


class Parser(argparse.ArgumentParser):
    """Answers a wrong option with one line, exit status 2. Its help ends with the examples of the
    script's docstring."""

    def __init__(self, script, doc):
        doc = doc or ""  # python -OO has none
        examples = [line.strip() for line in doc.splitlines() if line.startswith("    python ")]
        super().__init__(
            Path(script).name, usage="%(prog)s [options]", description=doc.split("\n")[0],
            epilog="examples:\n  " + "\n  ".join(examples) if examples else None,
            formatter_class=Formatter, allow_abbrev=False,
        )  # fmt: skip

    def parse_known_args(self, args=None, namespace=None):
        args = sys.argv[1:] if args is None else args
        for word in args:
            if word.startswith("--") and word.endswith("=--"):  # argparse takes it for no value
                self.error(f"argument {word[:-3]}: -- is no value")
            if not word.isprintable() and any("\ud800" <= sign <= "\udfff" for sign in word):
                self.error(f"{word!a} is no UTF-8: TensorBoard and JSON need such names")
        return super().parse_known_args([home(word) for word in args], namespace)

    def error(self, message):
        for old, new in MOVED.items():
            if re.search(rf"unrecognized arguments:(.* )?{old}( |=|$)", message):
                raise UserError(f"{old} is gone: {new}")
        raise UserError(f"{message} ({self.prog} --help lists the options)")


def shown(value):
    """A value as the command line has it."""
    if isinstance(value, bool):
        return "on" if value else "off"
    return ",".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)


def by_data(table, key):
    """ "default by data set: shapes 10, cifar10 100, else 90" of a script's table of defaults.

    The row "folders" is for every data set that has none, see `defaults_for`."""
    values = {name: shown(row[key]) for name, row in table.items() if key in row}
    usual = values["folders"]
    groups = {}
    for name, value in values.items():
        if value != usual:
            groups.setdefault(value, []).append(name)
    cells = [f"{'/'.join(names)} {value}" for value, names in groups.items()]
    if not cells:
        return f"default: {usual}"
    return f"default by data set: {', '.join([*cells, f'else {usual}'])}"


def defaults_for(table, dataset):
    """The row of a data set in a script's table of defaults; "folders" is for every other one."""
    name = dataset.removesuffix("-shortcut").removesuffix(".1")
    return table.get(dataset, table.get(name, table["folders"]))


def defaults_by_data(parser, table):
    """Show the defaults of a script's table in the help; where nothing is given, `fill` sets them.

    An option of the table has no default of its own, for none is the same for every data set.
    """
    for action in parser._actions:
        values = {name: row[action.dest] for name, row in table.items() if action.dest in row}
        if not values:
            continue
        action.default = None
        if "default" not in action.help:
            action.help += f"; {by_data(table, action.dest)}"


def fill(args, row):
    """Give the options that were not given the values of a row.

    A short training is evaluated more often than the row says, so that its curve has POINTS."""
    missing = [key for key in row if getattr(args, key) is None]
    for key in missing:
        setattr(args, key, row[key])
    if "eval_every" in missing and "epochs" in args:
        args.eval_every = min(args.eval_every, max(1, args.epochs / POINTS))


def add_arguments(parser, defaults=None, *, compiles=True):
    """Add the options of every run, as the group "run".

    defaults: the script's table by data set, if any; the help shows it at the options it holds.
    compiles: whether the help shows --compile.
    """
    group = parser.add_argument_group("run")
    group.add_argument(
        "--out", metavar="DIR",
        help="run directory (default: runs/<script>-<data>-<arch>-<options that differ>-s<seed>)",
    )  # fmt: skip
    group.add_argument("--overwrite", action="store_true", help="replace what is in --out")
    group.add_argument(
        "--resume", metavar="RUN",
        help="continue this run directory; auto: continue --out if it holds a run, else start "
        "(default: start)",
    )  # fmt: skip
    group.add_argument("--seed", type=nonnegative(int), default=0, help="first random seed")
    group.add_argument(
        "--device", default="auto", help="where to train: auto, cpu, cuda, cuda:1 ..."
    )
    group.add_argument(
        "--precision", default="auto", choices=["auto", "fp32", "bf16", "fp16"],
        help="number format of forward and backward pass; auto: bf16 where the hardware has it, "
        "else fp16 on a GPU, else fp32",
    )  # fmt: skip
    text = "torch.compile the networks (default: on a GPU, in trainings from "
    text += f"{LONG} steps on, without --capture)"
    group.add_argument("--compile", action=Flag, help=text if compiles else argparse.SUPPRESS)
    group.add_argument(
        "--log-every", type=positive(int), default=50, metavar="STEPS",
        help="steps between points in TensorBoard",
    )  # fmt: skip
    group.add_argument(
        "--save-every", type=positive(int), metavar="EPOCHS",
        help="epochs between checkpoints (default: 1, more where writing takes over 2 %% of the "
        "time)",
    )  # fmt: skip
    group.add_argument(
        "--save-minutes", type=positive(float), metavar="M",
        help="also save every M minutes (default: by epochs only)",
    )  # fmt: skip
    defaults_by_data(parser, defaults or {})


def add_recipe_arguments(parser, defaults, clip=0.0):
    """Add network, length and SGD's options, as the group "model and optimisation"; returns it.

    defaults: {data set: {"arch": ..., "epochs": ...}}, shown in the help (see `defaults_for`).
    """
    group = parser.add_argument_group("model and optimisation")
    group.add_argument("--arch", help=f"network, or FILE.py:NAME; {by_data(defaults, 'arch')}")
    group.add_argument(
        "--epochs", type=positive(int), help=f"length of a training; {by_data(defaults, 'epochs')}"
    )
    group.add_argument("--batch-size", type=positive(int), default=128, help="images of a step")
    group.add_argument("--lr", type=positive(float), default=0.1, help="peak learning rate")
    group.add_argument(
        "--warmup", type=nonnegative(float), default=1.0, help="epochs of linear warm-up"
    )
    group.add_argument(
        "--momentum", type=nonnegative(float), default=0.9, help="of SGD, Nesterov's; 0 is none"
    )
    group.add_argument(
        "--weight-decay", type=nonnegative(float), default=5e-4, help="factor, on all parameters"
    )
    group.add_argument(
        "--clip", type=nonnegative(float), default=clip, help="largest gradient norm; 0 is none"
    )
    return group


def add_evaluation_arguments(parser, defaults, images="--corrupted-images", kind="corrupted"):
    """Add the options of the evaluations in and after a training; returns the group.

    images: the option that says how many test images the slow columns of the table get."""
    group = parser.add_argument_group("evaluation")
    group.add_argument(
        "--eval-every", type=positive(float), metavar="EPOCHS",
        help=f"epochs between evaluations, or a part of one; {by_data(defaults, 'eval_every')}; "
        f"less in a training of few epochs, for {POINTS} evaluations",
    )  # fmt: skip
    group.add_argument(
        images, type=nonnegative(int), default=500, metavar="N",
        help=f"test images for the {kind} columns of the table; 0 leaves them out",
    )  # fmt: skip
    group.add_argument(
        "--seeds", type=positive(int), default=1, help="number of seeds, from --seed on"
    )
    return group


def check_saved(parser, folder, saved, usual):
    """Raise UserError where args.json holds a value that the command line would refuse.

    saved: {name: value} from args.json; usual: {name: default} of the same options."""
    for action in parser._actions:
        name = action.dest
        if name not in saved or (saved[name] is None and usual[name] is None):
            continue
        value = saved[name]
        try:
            if action.nargs == 0:
                fits = isinstance(value, bool)
            else:
                parsed = parser._get_value(action, shown(value))
                parser._check_value(action, parsed)
                fits = json.loads(json.dumps(parsed)) == value
        except argparse.ArgumentError:
            fits = False
        if not fits:
            raise UserError(
                f"{Path(folder) / 'args.json'}: {name} is {str(value)[:40]!r}, which no run "
                "writes; give the options and --overwrite"
            )


def parse(parser, argv=None):
    """Parse `argv`; with `--resume RUN` the options saved there are the defaults.

    `--resume auto` is `--resume OUT` where a run is in `--out`, or in the directory that RunDir
    chooses, and nothing where none is. What torchrun starts again resumes so by itself.
    args.differs: the options that differ from the parser's defaults, which name the run.
    """
    usual = vars(parser.parse_args([]))
    args = parser.parse_args(argv)
    folder = args.resume
    if not folder and environment_number("TORCHELASTIC_RESTART_COUNT", 0):
        folder = "auto"
    if folder == "auto" and args.out and (Path(args.out).expanduser() / "args.json").is_file():
        folder = args.out
    if folder and folder != "auto":
        saved = read_options(Path(folder).expanduser())
        known = {k: v for k, v in saved.items() if k in vars(args)}
        check_saved(parser, folder, known, usual)
        parser.set_defaults(**known | {"out": folder, "overwrite": False})
        args = parser.parse_args(argv)
        args.out = folder
    args.resume = folder
    args.differs = {k: v for k, v in vars(args).items() if k not in PLUMBING and v != usual[k]}
    return args


def either(one, several, names):
    """The networks that two options name: the list `one` of the short one, or `several`.

    Both may be None. names: the options, as "--norm, --norms". Raises UserError where they differ.
    """
    if one and several not in (None, one):
        short, long = names.split(", ")
        raise UserError(f"{short} is for one network, {long} for several: give one of them")
    return one or several


def refuse(wrong):
    """Raise UserError for the first message of {message: whether it is so} that holds."""
    for message, is_so in wrong.items():
        if is_so:
            raise UserError(message)


def changed(args, **values):
    """A copy of the options with some of them changed."""
    return argparse.Namespace(**vars(args) | values)
