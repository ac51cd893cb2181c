"""The headline tables as data: what is trained, what is evaluated, and what the papers say.

`eval/headline.py` runs what stands here. Nothing here computes anything.

Table    a question or a claim, its paper, and its scales: `small` for two CPU cores, `full` for
         the paper's size on GPUs.
Scale    `runs` are training commands. `evaluations` are commands for the network of each row.
         `columns` say in which JSON a number stands. `rows` name a network and what the paper
         reports of it.

Words in braces are filled in. {name} in a command is the run directory of that training with the
same seed. {network} is the row's checkpoint, {run} the row's run directory. Every training also
gets --seed, --data-dir, --out and --resume auto; every evaluation gets --data-dir and --json.

A column's path begins with the name of an evaluation, whose JSON holds the networks under
"checkpoints". The path goes on in the entry of the row's network. A path that begins with "run" is
a final number of the training; {stage} in it is the row's network.
"""

from typing import NamedTuple


class Row(NamedTuple):
    """A line of a table: one network of one training."""

    title: str
    run: str  # its training
    stage: str  # its name in the training's final numbers
    file: str = "last.pt"  # its checkpoint in the run directory
    paper: dict | None = None  # {column: what the paper reports, a number or words}


class Scale(NamedTuple):
    """A table at one size."""

    size: str  # what is trained, in words
    dataset: str
    seeds: int
    minutes: int  # of one seed of all rows, on `machine`
    machine: str
    runs: dict  # {name: training command}
    evaluations: dict  # {name: evaluation command}
    columns: dict  # {title: path}
    rows: tuple
    chart: tuple = ()  # two columns of the figure: across, up


class Table(NamedTuple):
    title: str
    paper: str  # where the paper's numbers stand
    scales: dict  # {"small": Scale, "full": Scale}
    note: str = ""


TWO_CORES = "one core of a 2-core CPU"

# --- one table for the question ------------------------------------------------------------------

SMALL = "--dataset cifar10 --arch wrn16-1 --epochs 20 --eval-every 5"
CT = f"ct.py {SMALL} --no-baseline --corrupted-images 0"
FIXUP = f"fixup_penalty.py {SMALL} --corrupted-images 0"
# Without BatchNorm the gradients are clipped at norm 1. The rate 0.2 is the teacher's, chosen on a
# validation split; NF networks learned best at a rate above the 0.1 of their attacked trainings.
QUESTION_RUNS = {
    "bn": f"{CT} --lam 0",
    "none": f"{CT} --norm none --lam 0 --lr 0.2 --clip 1",
    "ct": f"{CT} --lam 5 --teacher {{none}}/last.pt",
    "gn": f"{CT} --norm gn --lam 0",
    "nf": f"nofrost.py {SMALL} --norm nf --lam 0 --label-smoothing 0 --lr 0.2 --robust-images 0",
    "fixup": f"{FIXUP} --norm fixup",
    "fixup-penalty": f"{FIXUP} --norm fixup --penalty embedding",
}
QUESTION_EVALUATIONS = {
    "corruptions": "eval/corruptions.py {network} --limit 2000 --precision bf16",
    "linf": "eval/adversarial.py {network} --attacks apgd --eps 1 --limit 300 --precision bf16",
    "l2": "eval/adversarial.py {network} --attacks apgd --norm l2 --eps 63.75 --limit 300"
    " --precision bf16",
    "smoothness": "eval/smoothness.py {network} --measures ligs --eps 2.55 --limit 500",
}
QUESTION_COLUMNS = {
    "clean error %": ("run", "error/{stage}"),
    "15 corruptions, error %": ("corruptions", "mean_corruption_error"),
    "4 extra, error %": ("corruptions", "extra_error"),
    "ECE clean %": ("corruptions", "clean", "ece"),
    "ECE corrupted %": ("corruptions", "mean_corruption_ece"),
    "Linf 1/255, accuracy %": ("linf", "accuracy", "worst of all"),
    "L2 0.25, accuracy %": ("l2", "accuracy", "worst of all"),
    "LIGS (cosine)": ("smoothness", "measures", "ligs", "mean"),
}
QUESTION = Table(
    "What does BatchNorm do to robustness?",
    "LIGS: Benz et al., ICCV 2021, ResNet-18, CIFAR-10, read off a figure; another network and "
    "another size of noise",
    {
        "small": Scale(
            "WRN-16-1, 20 epochs, last epoch; clean: 10,000 test images; corruptions and ECE: "
            "2,000; attacks (APGD-CE, then APGD-T): 300; LIGS: 500, noise 0.01",
            "cifar10", 3, 160, TWO_CORES,
            QUESTION_RUNS, QUESTION_EVALUATIONS, QUESTION_COLUMNS,
            (
                Row("BatchNorm", "bn", "student", paper={"LIGS (cosine)": 0.59}),
                Row("none", "none", "student", paper={"LIGS (cosine)": 0.79}),
                Row("CT", "ct", "student"),
                Row("GroupNorm", "gn", "student"),
                Row("NF", "nf", "nf"),
                Row("Fixup", "fixup", "fixup"),
                Row("Fixup + penalty", "fixup-penalty", "fixup+embedding"),
            ),
            ("clean error %", "15 corruptions, error %"),
        ),
    },
    "One budget and one data order for all rows. Rows without BatchNorm clip gradients at norm 1.",
)  # fmt: skip

TABLES = {"question": QUESTION}
