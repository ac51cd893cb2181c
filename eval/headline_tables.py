"""The headline tables as data: what is trained, what is evaluated, and what the papers say.

`eval/headline.py` runs what stands here. Nothing here computes anything. It is one long file, so
that every command and every number of a paper is found in one place.

Table    a question or a claim, its paper, and its scales: `small` for two CPU cores, `full` for
         the paper's size on GPUs.
Scale    `runs` are training commands. `evaluations` are commands for the network of each row.
         `columns` say in which JSON a number stands. `rows` name a network and what the paper
         reports of it.

Words in braces are filled in. {name} in a command is the run directory of that training with the
same seed. {network} is the row's checkpoint, {run} the row's run directory. Every training also
gets --seed, --data-dir, --out and --resume auto; every evaluation gets --data-dir and --json.

A column's path begins with the name of an evaluation, whose JSON holds the networks under
"checkpoints". The path goes on in the entry of the row's network; a number before it chooses a
later entry, as that of the adapted network. A path that begins with "run" is a final number of
the row's training, with "run NAME" of another training; {stage} in it is the
row's network. "100 -" before a path turns an error into an accuracy. ("mean", A, B) is the mean of
the columns A and B.

`minutes` are estimates for one seed of all rows; None where nothing of that size has been run.
"""

from typing import NamedTuple


class Row(NamedTuple):
    """A line of a table: one network of one training."""

    title: str
    run: str  # its training
    stage: str  # its name in the training's final numbers
    file: str = "last.pt"  # its checkpoint in the run directory
    paper: dict | None = None  # {column: what the paper reports, a number or words}
    options: dict | None = None  # {evaluation: options of this row alone}


class Scale(NamedTuple):
    """A table at one size."""

    size: str  # what is trained and evaluated, in words
    dataset: str
    seeds: int
    minutes: int | None
    machine: str
    runs: dict  # {name: training command}
    evaluations: dict  # {name: evaluation command}
    columns: dict  # {title: path}
    rows: tuple
    chart: tuple = ()  # columns of the figure: across, up, and up after adaptation
    curve: tuple = ()  # or (what each epoch of log.jsonl holds, its title): a figure over epochs


class Table(NamedTuple):
    title: str
    paper: str  # where the paper's numbers stand
    scales: dict  # {"small": Scale, "full": Scale}
    note: str = ""


CORE = "one CPU core"
GPUS = "GPUs"

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
    "bn-cutout": f"{CT} --lam 0 --policy cutout",
    "bn-mixup": f"{FIXUP} --norm bn --mixup 1 --clip 0",
    "bn-augmix": f"{CT} --lam 0 --policy augmix",
    "ct-augmix": f"{CT} --lam 5 --teacher {{none}}/last.pt --policy augmix",
}
QUESTION_EVALUATIONS = {
    "corruptions": "eval/corruptions.py {network} --limit 2000 --adapt 200 --precision bf16",
    "linf": "eval/adversarial.py {network} --attacks apgd --eps 1 --limit 300 --precision bf16",
    "l2": "eval/adversarial.py {network} --attacks apgd --norm l2 --eps 63.75 --limit 300"
    " --precision bf16",
    "smoothness": "eval/smoothness.py {network} --measures ligs --eps 2.55 --limit 500",
}
QUESTION_COLUMNS = {
    "clean error %": ("run", "error/{stage}"),
    "15 corruptions, error %": ("corruptions", "mean_corruption_error"),
    "adapted, error %": ("corruptions", 1, "mean_corruption_error"),
    "4 extra, error %": ("corruptions", "extra_error"),
    "ECE clean %": ("corruptions", "clean", "ece"),
    "ECE corrupted %": ("corruptions", "mean_corruption_ece"),
    "Linf 1/255, accuracy %": ("linf", "accuracy", "worst of all"),
    "L2 0.25, accuracy %": ("l2", "accuracy", "worst of all"),
    "LIGS (cosine)": ("smoothness", "measures", "ligs", "mean"),
}
QUESTION_SIZE = (
    "WRN-16-1, 20 epochs, last epoch; clean: 10,000 test images; corruptions and ECE: 2,000; "
    "adapted: BatchNorm's statistics of 200 of each corruption and severity, mixed with the "
    "training's, which count as 16; attacks (APGD-CE, then APGD-T): 300; LIGS: 500, noise 0.01"
)
QUESTION = Table(
    "What does BatchNorm do to robustness?",
    "LIGS: Benz et al., ICCV 2021, ResNet-18, CIFAR-10, noise 0.01, read off a figure",
    {
        "small": Scale(
            QUESTION_SIZE,
            "cifar10", 3, 300, CORE,
            QUESTION_RUNS, QUESTION_EVALUATIONS, QUESTION_COLUMNS,
            (
                Row("BatchNorm", "bn", "student", paper={"LIGS (cosine)": 0.59}),
                Row("none", "none", "student", paper={"LIGS (cosine)": 0.79}),
                Row("CT", "ct", "student"),
                Row("GroupNorm", "gn", "student"),
                Row("NF", "nf", "nf"),
                Row("Fixup", "fixup", "fixup"),
                Row("Fixup + penalty", "fixup-penalty", "fixup+embedding"),
                Row("BatchNorm + cutout", "bn-cutout", "student"),
                Row("BatchNorm + mixup", "bn-mixup", "bn"),
                Row("BatchNorm + AugMix", "bn-augmix", "student"),
                Row("CT + AugMix", "ct-augmix", "student"),
            ),
            ("clean error %", "15 corruptions, error %", "adapted, error %"),
        ),
    },
    "One budget and one data order for all rows. none, NF, Fixup and Fixup + penalty clip "
    "gradients at norm 1; the peak rate is 0.1, for none and NF 0.2. Cutout: 16 pixels; mixup: "
    "alpha 1; AugMix: severity 3, weight of its divergence 12.",
)  # fmt: skip


# --- Counterbalancing Teacher --------------------------------------------------------------------

ERRORS = {
    "clean error %": ("run", "error/{stage}"),
    "15 corruptions, error %": ("corruptions", "mean_corruption_error"),
}
ERRORS_CHART = tuple(ERRORS)


def three_networks(run, arch, paper=None):
    """The rows of one run of ct.py: the baseline, the teacher and the student."""
    return (
        Row(f"{arch}, BatchNorm", run, "baseline", "baseline.pt", paper),
        Row(f"{arch}, none", run, "teacher", "teacher.pt"),
        Row(f"{arch}, CT", run, "student"),
    )


AUGMIX = {  # architecture: options of AugMix's protocol
    "allconv": "--epochs 100",
    "densenet40": "--epochs 200 --weight-decay 1e-4",
    "wrn40-2": "--epochs 100",
    "resnext29": "--epochs 200",
}
AUGMIX_STANDARD = {  # mean corruption error of its row "standard", %
    "cifar10": dict(zip(AUGMIX, (30.8, 30.7, 26.9, 27.5), strict=True)),
    "cifar100": dict(zip(AUGMIX, (56.4, 59.3, 53.3, 53.4), strict=True)),
}


def augmix_scale(dataset):
    """AugMix's four architectures at their full length, three networks each."""
    column = "15 corruptions, error %"
    rows = []
    for arch, error in AUGMIX_STANDARD[dataset].items():
        rows += three_networks(f"{dataset}-{arch}", arch, {column: error})
    return Scale(
        "AugMix's protocol and architectures; all 10,000 test images",
        dataset, 3, None, GPUS,
        {
            f"{dataset}-{arch}": f"ct.py --dataset {dataset} --arch {arch} {options} "
            "--corrupted-images 0"
            for arch, options in AUGMIX.items()
        },
        {"corruptions": "eval/corruptions.py {network}"}, ERRORS, tuple(rows), ERRORS_CHART,
    )  # fmt: skip


SMALL_ARCHS = ("resnet20", "vgg11-16", "allconv-16", "wrn10-2")
ARCHITECTURES = Scale(
    "20 epochs; clean: 10,000 test images; corruptions: 2,000",
    "cifar10", 1, 240, CORE,
    {
        arch: f"ct.py --dataset cifar10 --arch {arch} --epochs 20 --corrupted-images 0"
        for arch in SMALL_ARCHS
    },
    {"corruptions": QUESTION_EVALUATIONS["corruptions"]}, ERRORS,
    tuple(row for arch in SMALL_ARCHS for row in three_networks(arch, arch)), ERRORS_CHART,
)  # fmt: skip
CIFAR100 = Scale(
    QUESTION_SIZE,
    "cifar100", 3, 60, CORE,
    {"cifar100": "ct.py --dataset cifar100 --arch wrn16-1 --epochs 20 --corrupted-images 0"},
    QUESTION_EVALUATIONS, QUESTION_COLUMNS, three_networks("cifar100", "wrn16-1"), ERRORS_CHART,
)  # fmt: skip
CT_SOURCE = "CT reports no table for it; BatchNorm rows: Hendrycks et al., AugMix, ICLR 2020"
CT_CIFAR10 = Table(
    "CT on CIFAR-10-C over architectures", CT_SOURCE,
    {"small": ARCHITECTURES, "full": augmix_scale("cifar10")},
)  # fmt: skip
CT_CIFAR100 = Table(
    "CT on CIFAR-100-C", CT_SOURCE, {"small": CIFAR100, "full": augmix_scale("cifar100")}
)

DOMAINS = {  # data set: {domain: DomainBed's accuracy of ERM}, and its average
    "vlcs": {"Caltech101": 97.7, "LabelMe": 64.3, "SUN09": 73.4, "VOC2007": 74.6, "average": 77.5},
    "pacs": {
        "art_painting": 84.7, "cartoon": 80.8, "photo": 97.2, "sketch": 79.3, "average": 85.5,
    },
}  # fmt: skip


def domains_table(dataset):
    """Each domain left out of training once: a run a domain, three networks each."""
    erm = {f"{name} %": accuracy for name, accuracy in DOMAINS[dataset].items()}
    names = [name for name in DOMAINS[dataset] if name != "average"]
    command = f"ct.py --dataset {dataset} --arch resnet50 --pretrained --epochs 30 "
    command += "--batch-size 96 --lr 0.01 --teacher-lr 0.01 --corrupted-images 0"
    runs = {f"{dataset}-{name}": f"{command} --test-domain {name}" for name in names}
    columns = {f"{name} %": ("100 -", f"run {dataset}-{name}", "error/{stage}") for name in names}
    rows = three_networks(f"{dataset}-{names[0]}", "ResNet-50", erm)
    return Table(
        f"CT on {dataset.upper()}, each domain left out once",
        "CT reports no table for it; BatchNorm: ERM of DomainBed, another optimiser (Adam)",
        {
            "full": Scale(
                "ResNet-50 from ImageNet weights, the epoch that validation chose, accuracy",
                dataset, 3, None, GPUS, runs, {},
                columns | {"average %": ("mean", *columns)}, rows,
            )
        },
    )  # fmt: skip


ACCURACY = ("domains", "accuracy")
CAMELYON = Table(
    "CT on Camelyon17, another hospital",
    "BatchNorm: ERM of WILDS, whose protocol this is not in full; CT: arXiv 2207.01548",
    {
        "full": Scale(
            "DenseNet-40 in place of WILDS's DenseNet-121, 96 pixels, 5 epochs, accuracy",
            "camelyon17", 3, None, GPUS,
            {
                "camelyon17": "ct.py --dataset camelyon17 --arch densenet40 --epochs 5 "
                "--batch-size 32 --lr 0.001 --teacher-lr 0.001 --weight-decay 0.01 "
                "--corrupted-images 0"
            },
            {"domains": "eval/domains.py {network}"},
            {"hospital 1 %": (*ACCURACY, "val"), "hospital 2 %": (*ACCURACY, "test")},
            (
                Row("BatchNorm", "camelyon17", "baseline", "baseline.pt", {"hospital 2 %": 70.3}),
                Row("none", "camelyon17", "teacher", "teacher.pt"),
                Row("CT", "camelyon17", "student", paper={"hospital 2 %": 73.9}),
            ),
        )
    },
)  # fmt: skip
IN9 = Table(
    "CT on the backgrounds challenge (ImageNet-9)",
    "arXiv 2207.01548; BatchNorm: the challenge's ResNet-50 trained on IN-9L; CT names 14.3",
    {
        "full": Scale(
            "ResNet-50 trained on IN-9L, accuracy; BG-gap: mixed-same less mixed-rand",
            "in9", 3, None, GPUS,
            {"in9": "ct.py --dataset in9 --arch resnet50 --corrupted-images 0"},
            {"domains": "eval/domains.py {network}"},
            {
                "original %": (*ACCURACY, "original"),
                "mixed-same %": (*ACCURACY, "mixed-same"),
                "mixed-rand %": (*ACCURACY, "mixed-rand"),
                "BG-gap": (*ACCURACY, "BG-gap"),
            },
            (
                Row("BatchNorm", "in9", "baseline", "baseline.pt",
                    {"original %": 96.4, "mixed-same %": 89.8, "mixed-rand %": 75.6,
                     "BG-gap": 14.2}),
                Row("none", "in9", "teacher", "teacher.pt"),
                Row("CT", "in9", "student", paper={"BG-gap": 8.1}),
            ),
        )
    },
)  # fmt: skip
CT_IMAGENET = Table(
    "CT on ImageNet-C",
    "Schneider et al., NeurIPS 2020: mCE of ResNet-50 with BatchNorm, and of Fixup for none",
    {
        "full": Scale(
            "ResNet-50, 90 epochs, all 50,000 images, ImageNet-C as released",
            "imagenet", 1, None, GPUS,
            {"imagenet": "ct.py --dataset imagenet --arch resnet50 --batch-size 256 "
                         "--weight-decay 1e-4 --corrupted-images 0"},
            {"corruptions": "eval/corruptions.py {network}"},
            {"clean error %": ("run", "error/{stage}"), "mCE": ("corruptions", "mCE")},
            (
                Row("BatchNorm", "imagenet", "baseline", "baseline.pt", {"mCE": 76.7}),
                Row("none", "imagenet", "teacher", "teacher.pt", {"mCE": 72.0}),
                Row("CT", "imagenet", "student"),
            ),
        )
    },
)  # fmt: skip

# --- NoFrost -------------------------------------------------------------------------------------

ATTACKED = {
    "clean, accuracy %": ("autoattack", "accuracy", "clean"),
    "PGD-20, accuracy %": ("pgd", "accuracy", "pgd-20"),
    "AutoAttack, accuracy %": ("autoattack", "accuracy", "worst of all"),
}
TRADE_OFF = {  # gamma: (clean, AutoAttack) of the paper's figure
    "1": (60.53, 10.35), "0.9": (63.87, 7.80), "0.8": (66.69, 3.26), "0.7": (68.95, 0.81),
    "0.6": (70.52, 0.21), "0.5": (71.77, 0.06), "0": (73.5, 0.0),
}  # fmt: skip


def gamma_rows(run, paper):
    """One network with two sets of statistics, at every share of the adversarial set."""
    rows = []
    for gamma, (clean, robust) in TRADE_OFF.items():
        options = {name: f"--gamma {gamma}" for name in ("pgd", "autoattack")}
        reported = {"clean, accuracy %": clean, "AutoAttack, accuracy %": robust} if paper else None
        rows.append(Row(f"dual-bn, gamma {gamma}", run, "dual-bn", paper=reported, options=options))
    return tuple(rows)


NOFROST_SMALL = (
    "nofrost.py --dataset cifar10 --arch wrn10-1 --limit 20000 --epochs 10 --lr 0.3 "
    "--batch-size 32 --attack-steps 7 --val-size 1000 --robust-images 0"
)
NOFROST_FULL = "nofrost.py --dataset imagenet --robust-images 0"


def attacks_of(limit):
    return {
        "pgd": f"eval/adversarial.py {{network}} --attacks pgd-20 --limit {limit}",
        "autoattack": f"eval/adversarial.py {{network}} --attacks standard --limit {limit}",
    }


NOFROST = Table(
    "NoFrost's trade-off: clean accuracy against AutoAttack, Linf 8/255",
    "arXiv 2207.01156: abstract (clean, PGD) and the trade-off figure (AutoAttack, +-0.05); the "
    "steps of its PGD are 20 in the code",
    {
        "small": Scale(
            "WRN-10-1, 20,000 images, 10 epochs, PGD-7, rate 0.3 and batch 32 for all; 500 test "
            "images",
            "cifar10", 2, 180, CORE,
            {
                "nofrost-nf": f"{NOFROST_SMALL} --norm nf",
                "nofrost-nf-ema": f"{NOFROST_SMALL} --norm nf --ema 0.999",
                "nofrost-nf-fgsm": f"{NOFROST_SMALL} --norm nf --attack-steps 1",
                "nofrost-bn": f"{NOFROST_SMALL} --norm bn",
                "nofrost-none": f"{NOFROST_SMALL} --norm none",
                "nofrost-gn": f"{NOFROST_SMALL} --norm gn",
                "nofrost-trades": f"{NOFROST_SMALL} --norm bn --loss trades",
                "nofrost-dual": f"{NOFROST_SMALL} --norm dual-bn",
            },
            attacks_of(500), ATTACKED,
            (
                Row("NoFrost (nf)", "nofrost-nf", "nf"),
                Row("NoFrost (nf), best epoch", "nofrost-nf", "nf", "best.pt"),
                Row("NoFrost (nf), averaged weights", "nofrost-nf-ema", "nf"),
                Row("NoFrost (nf), FGSM", "nofrost-nf-fgsm", "nf"),
                Row("BatchNorm", "nofrost-bn", "bn"),
                Row("BatchNorm, best epoch", "nofrost-bn", "bn", "best.pt"),
                Row("none", "nofrost-none", "none"),
                Row("GroupNorm", "nofrost-gn", "gn"),
                Row("TRADES (bn)", "nofrost-trades", "bn"),
                *gamma_rows("nofrost-dual", paper=False),
            ),
            ("clean, accuracy %", "AutoAttack, accuracy %"),
        ),
        "full": Scale(
            "ResNet-50, the authors' recipe, 5,000 images of the validation set",
            "imagenet", 1, None, GPUS,
            {
                "nofrost-nf": f"{NOFROST_FULL} --norm nf",
                "nofrost-bn": f"{NOFROST_FULL} --norm bn",
                "nofrost-dual": f"{NOFROST_FULL} --norm dual-bn",
                "nofrost-standard": f"{NOFROST_FULL} --norm bn --lam 0",
            },
            attacks_of(5000), ATTACKED,
            (
                Row("NoFrost (nf)", "nofrost-nf", "nf",
                    paper={"clean, accuracy %": 74.06, "PGD-20, accuracy %": 23.56,
                           "AutoAttack, accuracy %": 9.38}),
                Row("BatchNorm", "nofrost-bn", "bn",
                    paper={"clean, accuracy %": 59.28, "PGD-20, accuracy %": 13.57}),
                *gamma_rows("nofrost-dual", paper=True),
                Row("normal training (bn)", "nofrost-standard", "bn",
                    paper={"clean, accuracy %": 76.06, "PGD-20, accuracy %": 0.0}),
            ),
            ("clean, accuracy %", "AutoAttack, accuracy %"),
        ),
    },
    "gamma is the share of the adversarial statistics and affine parameters. A training step costs "
    "9 forward and backward passes of a batch with PGD-7, 3 with FGSM (one step from a random "
    "start), 1 without attack. Averaged weights: --ema 0.999.",
)  # fmt: skip

# The same networks with all training images, and twice the test images.
_SMALL = NOFROST.scales["small"]
NOFROST_50000 = NOFROST._replace(
    title="NoFrost's trade-off, trained on all of CIFAR-10",
    scales={
        "small": _SMALL._replace(
            size="WRN-10-1, 50,000 images, 10 epochs, PGD-7, rate 0.3 and batch 32 for all; 1,000 "
            "test images",
            minutes=450,
            runs={f"{name}-50000": command.replace(" --limit 20000", "")
                  for name, command in _SMALL.runs.items()},
            evaluations=attacks_of(1000),
            rows=tuple(row._replace(run=f"{row.run}-50000") for row in _SMALL.rows),
        )
    },
)  # fmt: skip

# --- Fixup and the penalty -----------------------------------------------------------------------

VARIANTS = ("none", "none+penalty", "fixup", "fixup+penalty", "none+dropout", "bn")
FIXUP_COLUMNS = {
    "train %": ("run", "train_accuracy/{stage}"),
    "test %": ("100 -", "run", "error/{stage}"),
    "corrupted %": ("100 -", "run", "corrupted/{stage}"),
    "final layer": ("run", "final_layer/{stage}"),
}


def fixup_scale(size, command, dataset, seeds, minutes, machine, name="tuned", chosen=None):
    """A run of fixup_penalty.py for each variant: tuned, or with the options `chosen` for it."""
    chosen = chosen or dict.fromkeys(VARIANTS, "--tune")
    runs = {
        f"{name}-{v}": f"fixup_penalty.py {command} {chosen[v]} --variants {v}" for v in VARIANTS
    }
    rows = tuple(Row(variant, f"{name}-{variant}", variant) for variant in VARIANTS)
    return Scale(size, dataset, seeds, minutes, machine, runs, {}, FIXUP_COLUMNS, rows,
                 curve=("embedding", "mean square of the embedding"))  # fmt: skip


FIXUP_SOURCE = (
    "ICLR 2021, Deconstructing the Regularization of BatchNorm; its tables were not available"
)
FIXUP_NOTE = (
    "The claim compares fixup+penalty with none; final layer: mean square of the embedding. "
    "The paper's own numbers were not available."
)
FIXUP_PENALTY = Table(
    "How much of BatchNorm's accuracy Fixup and a penalty bring back", FIXUP_SOURCE,
    {
        "small": fixup_scale(
            "WRN-16-1, 4,000 images, no augmentation, 40 epochs, every seed tuned by itself; "
            "corrupted: 500 test images",
            "--dataset cifar10 --arch wrn16-1 --limit 4000 --no-augment --epochs 40 "
            "--val-size 1000",
            "cifar10", 3, 90, CORE,
        ),
        "full": fixup_scale(
            "WRN-28-10, 200 epochs, tuned on 5,000 images, median of the run's 10 seeds",
            "--dataset cifar10 --seeds 10 --corrupted-images 10000",
            "cifar10", 1, None, GPUS,
        ),
    },
    FIXUP_NOTE,
)  # fmt: skip
CHOSEN = {  # what --tune chose on 4,000 images, with every seed or with most
    "none": "--lr 0.1", "none+penalty": "--lr 0.1 --penalty-weight 0.0001", "fixup": "--lr 0.3",
    "fixup+penalty": "--lr 0.3 --penalty-weight 0.001", "none+dropout": "--lr 0.1 --dropout 0.1",
    "bn": "--lr 0.3",
}  # fmt: skip
IMAGES_10000 = "--dataset cifar10 --arch wrn16-1 --limit 10000 --no-augment --epochs 40"
FIXUP_10000 = Table(
    "How much Fixup and a penalty bring back on 10,000 images", FIXUP_SOURCE,
    {
        "small": fixup_scale(
            "WRN-16-1, 10,000 images, no augmentation, 40 epochs; rate, weight and dropout as "
            "tuned on 4,000; corrupted: 500 test images",
            IMAGES_10000, "cifar10", 3, 50, CORE, "fixup-10000", CHOSEN,
        ),
    },
    FIXUP_NOTE,
)  # fmt: skip
FIXUP_10000_TUNED = Table(
    "How much Fixup and a penalty bring back on 10,000 images, tuned on them", FIXUP_SOURCE,
    {
        "small": fixup_scale(
            "WRN-16-1, 10,000 images, no augmentation, 40 epochs, every seed tuned by itself; "
            "corrupted: 500 test images",
            f"{IMAGES_10000} --val-size 1000", "cifar10", 3, 225, CORE, "tuned-10000",
        ),
    },
    FIXUP_NOTE,
)  # fmt: skip

# --- how BatchNorm helps optimisation ------------------------------------------------------------

SHIFT, MOVES = "covariate shift l2, layer 5, median", "mean of a unit moves, layer 3, median"
PROBES = {
    "train %": ("run", "accuracy/{stage}"),
    "test %": ("run", "test/{stage}"),
    "loss band, median width": ("run", "landscape_width/{stage}"),
    "gradient change, median of the largest": ("run", "predictiveness_high/{stage}"),
    "effective beta, median": ("run", "beta/{stage}"),
    SHIFT: ("run", "shift_l2_5/{stage}"),
    "covariate shift cosine, layer 5, median": ("run", "shift_cos_5/{stage}"),
    MOVES: ("run", "mean_step_3/{stage}"),
}


def probed_row(title, norm, lr, paper=None):
    name = f"{norm}-lr{lr}"
    return Row(f"{title}, rate {lr}", f"probed-{name}", name, f"{name}.pt", paper)


PROBED_ROWS = (
    probed_row("none", "none", 0.1, paper={
        "test %": 80, "effective beta, median": "5 to 45", MOVES: "up to 0.2"}),
    probed_row("BatchNorm", "bn", 0.1, paper={
        "test %": 83, "effective beta, median": "16 to 20", MOVES: "0",
        SHIFT: "as none or larger"}),
    probed_row("noisy BatchNorm", "noisy-bn", 0.1, paper={MOVES: "0.2 to 1"}),
    probed_row("none", "none", 0.5, paper={"train %": 10}),
    probed_row("BatchNorm", "bn", 0.5, paper={"train %": "97 to 99"}),
    probed_row("noisy BatchNorm", "noisy-bn", 0.5),
)  # fmt: skip
LP_ROWS = tuple(probed_row(norm, norm, 0.1) for norm in ("l1", "l2", "linf"))


def probed_scale(size, options, minutes, machine, seeds, rows):
    """Networks with and without BatchNorm, each a run of its own: --jobs spreads them."""
    runs = {}
    for row in rows:
        norm, lr = row.stage.split("-lr")
        runs[row.run] = f"bn_ablation.py --dataset cifar10 {options} --norms {norm} --lrs {lr}"
    return Scale(size, "cifar10", seeds, minutes, machine, runs, {}, PROBES, rows)


OPTIMISATION = Table(
    "BatchNorm makes the loss smoother over the weights",
    "arXiv 1805.11604, figures 1 to 4, read off",
    {
        "small": probed_scale(
            "VGG16 at a quarter of its width, 15,000 steps, probed every 100",
            "--arch vgg16-16 --measure-every 100", 900, CORE, 2, PROBED_ROWS,
        ),
        "full": probed_scale(
            "VGG16, 15,000 steps, probed every 50",
            "--arch vgg16", None, GPUS, 3, PROBED_ROWS + LP_ROWS,
        ),
    },
)  # fmt: skip
LINEAR_LOSS = {"none": 1700, "bn": 480, "l1": 100, "l2": 480, "linf": 1000}
LINEAR = Table(
    "The linear network of 25 layers",
    "arXiv 1805.11604, figures 5 and 13, read off: loss after 10,000 steps",
    {
        "small": Scale(
            "10,000 steps at rate 1e-6, double precision", "gaussian", 3, 20, CORE,
            {f"linear-{norm}": f"bn_ablation.py --arch dln25 --norms {norm}"
             for norm in LINEAR_LOSS}, {},
            {
                "loss": ("run", "loss/{stage}"),
                "loss band, median width": ("run", "landscape_width/{stage}"),
                "effective beta, median": ("run", "beta/{stage}"),
            },
            tuple(
                Row({"bn": "BatchNorm"}.get(norm, norm), f"linear-{norm}", f"{norm}-lr1e-06",
                    f"{norm}-lr1e-06.pt", {"loss": loss})
                for norm, loss in LINEAR_LOSS.items()
            ),
        )
    },
    "The end depends on the draw of the target matrix, so only the order compares.",
)  # fmt: skip

TABLES = {
    "question": QUESTION,
    "ct-cifar10": CT_CIFAR10,
    "ct-cifar100": CT_CIFAR100,
    "ct-vlcs": domains_table("vlcs"),
    "ct-pacs": domains_table("pacs"),
    "ct-camelyon17": CAMELYON,
    "ct-in9": IN9,
    "ct-imagenet-c": CT_IMAGENET,
    "nofrost": NOFROST,
    "nofrost-50000": NOFROST_50000,
    "fixup-penalty": FIXUP_PENALTY,
    "fixup-penalty-10000": FIXUP_10000,
    "fixup-penalty-10000-tuned": FIXUP_10000_TUNED,
    "bn-optimisation": OPTIMISATION,
    "bn-linear": LINEAR,
}
