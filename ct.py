"""Counterbalancing Teacher (CT): a frozen network without BatchNorm teaches the one with it.

Paper: Taghanaki et al., "Counterbalancing Teacher: Regularizing Batch Normalized Models for
Robustness", arXiv 2207.01548. BatchNorm makes a network lean on low-variance features that are
specific to the training domain; without it the same network errs more in-domain and less under
corruption. CT trains the network S with BatchNorm on

    L = L_cls(p_S, y) + lam L_ct(f_S, f_T),

where f_T are the features of T, a frozen copy of the same network without BatchNorm. T is trained
first, on the same data. S alone is used at test time. No image of the target domain is seen.

From the paper and its figure: the frozen teacher, the features before the classifier, a fresh
student, the same image for both. The paper does not specify these; our choices, each an option:
  1. L_ct             --distance, of pooled penultimate features or logits (--match): cosine
  2. lam              --lam, constant over training
  3. student's start  --student-init: fresh weights, or the teacher's convolutions
  4. teacher          --teacher-*: its length, rate and clipping
  5. everything else  the AugMix protocol: SGD, Nesterov momentum 0.9, weight decay 5e-4, batch
                      128, cosine per step, flip and padded crop
Choices 1 to 4 were made on a validation split and the four extra corruptions, never on the
benchmark's 15: eval/results/ct_shapes_search.json and ct_cifar10_search.json.

    python ct.py                                       # embedded data, three minutes on a CPU
    python ct.py --dataset cifar100 --arch wrn28       # WRN-28-10, the full job on a GPU
    python ct.py --dataset cifar10 --teacher runs/a/teacher.pt --lam 3 --no-baseline
    python ct.py --dataset pacs --test-domain all --arch resnet50 --pretrained

--test-domain follows DomainBed: it leaves a domain out of training and tests on it, and 20 % of
each other domain choose the epoch (best.pt). Different from DomainBed: batches and validation pool
the domains, all of the left-out domain is the test, no colour jitter, BatchNorm is not frozen, SGD.
"""

import copy
import math
import statistics
from typing import NamedTuple

import torch
import torch.nn.functional as F

from common import corruptions, data, models, run

# --- options ------------------------------------------------------------------------------------

NORMS = ("bn", "gn", "in", "ln", "none")
DEFAULTS = {
    "shapes": {"arch": "wrn10-1", "epochs": 8, "lam": 20.0, "eval_every": 1},
    "cifar10": {"arch": "wrn40-2", "epochs": 100, "lam": 5.0, "eval_every": 5},
    "cifar100": {"arch": "wrn40-2", "epochs": 100, "lam": 5.0, "eval_every": 5},
    "svhn": {"arch": "wrn40-2", "epochs": 100, "lam": 5.0, "eval_every": 5},
    "folders": {"arch": "resnet18", "epochs": 90, "lam": 5.0, "eval_every": 5},
}


def parse_args(argv=None):
    parser = run.Parser(__file__, __doc__)
    data.add_arguments(parser)
    group = run.add_recipe_arguments(parser, DEFAULTS)
    group.add_argument("--norm", default="bn", choices=NORMS, help="the student's normaliser")
    group.add_argument(
        "--pretrained", nargs="?", const="torchvision", metavar="FILE",
        help="start from torchvision's ImageNet weights in its cache, or in FILE (default: no)",
    )  # fmt: skip
    group = parser.add_argument_group("method")
    group.add_argument(
        "--lam", type=run.nonnegative(float),
        help=f"weight of L_ct; 0 trains without a teacher; {run.by_data(DEFAULTS, 'lam')}",
    )  # fmt: skip
    group.add_argument(
        "--distance", default="cosine", choices=["mse", "relative", "cosine", "kl"], help="L_ct"
    )
    group.add_argument(
        "--match", choices=["features", "logits"],
        help="what L_ct compares (default: logits for kl, else features)",
    )  # fmt: skip
    group.add_argument(
        "--temperature", type=run.positive(float), default=4.0, help="of --distance kl"
    )
    group.add_argument(
        "--student-init", default="fresh", choices=["fresh", "teacher"],
        help="fresh weights, or the teacher's convolutions",
    )  # fmt: skip
    group.add_argument(
        "--teacher", metavar="CKPT", help="use this teacher (default: train one in this run)"
    )
    group.add_argument(
        "--teacher-epochs", type=run.positive(int),
        help="epochs of the teacher (default: twice --epochs for shapes, else --epochs)",
    )  # fmt: skip
    group.add_argument(
        "--teacher-lr", type=run.positive(float), default=0.2, help="its peak learning rate"
    )
    group.add_argument(
        "--teacher-clip", type=run.nonnegative(float), default=1.0,
        help="its largest gradient norm; 0: none",
    )  # fmt: skip
    group.add_argument(
        "--baseline", action=run.Flag, default=True, help="train the network without CT too"
    )
    run.add_evaluation_arguments(parser, DEFAULTS)
    run.add_arguments(parser)
    parser.set_defaults(dataset="shapes-shortcut")
    args = run.parse(parser, argv)
    run.fill(args, run.defaults_for(DEFAULTS, args.dataset))
    args.teacher_epochs = args.teacher_epochs or args.epochs * (
        1 + args.dataset.startswith("shapes")
    )
    args.match = args.match or ("logits" if args.distance == "kl" else "features")
    if args.distance == "kl" and args.match != "logits":
        raise run.UserError("--distance kl compares distributions: use --match logits")
    return args


# --- method -------------------------------------------------------------------------------------


def distance(kind, student, teacher, temperature):
    """L_ct, a scalar, for features or logits (N,D) of student and teacher.

    mse       mean over samples and dimensions of the squared difference
    relative  the same, divided by the mean square of the teacher's: free of its scale
    cosine    mean over samples of 1 - cos(student, teacher)
    kl        T^2 KL(softmax(teacher/T) || softmax(student/T)), mean over samples (Hinton 2015)
    """
    if kind == "mse":
        return F.mse_loss(student, teacher)
    if kind == "relative":
        return F.mse_loss(student, teacher) / run.mean(teacher.square().mean())
    if kind == "cosine":
        return 1 - F.cosine_similarity(student, teacher, dim=1).mean()
    log_student = F.log_softmax(student / temperature, dim=1)
    log_teacher = F.log_softmax(teacher / temperature, dim=1)
    divergence = F.kl_div(log_student, log_teacher, reduction="batchmean", log_target=True)
    return temperature**2 * divergence


def build(norm, args, dataset, device):
    """A network for this run; its weights depend on the seed and the normaliser alone."""
    torch.manual_seed(run.seed_key(args.seed, "init"))
    model = models.build(args.arch, norm, **dataset.model_kwargs)
    if args.pretrained:
        models.load_pretrained(model, args.pretrained)
    return model.to(device, memory_format=torch.channels_last)


def load_teacher(path, args, num_classes, device):
    """The frozen teacher of a checkpoint; UserError if it cannot teach this student."""
    checkpoint = run.load_checkpoint(path, device)
    for key, wanted in (("arch", args.arch), ("num_classes", num_classes)):
        if checkpoint[key] != wanted:
            raise run.UserError(
                f"--teacher {path}: its {key} is {checkpoint[key]}, the student's is {wanted}"
            )
    return models.from_checkpoint(checkpoint).to(device, memory_format=torch.channels_last)


# --- training -----------------------------------------------------------------------------------


class Task(NamedTuple):
    """What a network is trained and held out on."""

    batches: data.Batches
    held_out: data.Images
    probe: data.Images  # the first 500 held-out images under the four extra corruptions


def make_task(dataset, args):
    batches = data.Batches(dataset.train, args.batch_size, args.seed, args.augment, dataset.flip)
    held_out = dataset.val or dataset.test
    few = held_out.take(slice(0, 500))
    probe = [corruptions.corrupt(few.x, name, 3, scale=dataset.scale) for name in corruptions.EXTRA]
    return Task(batches, held_out, data.Images(torch.cat(probe), few.y.repeat(len(probe))))


def lr_at(step, total, peak, warmup):
    """Linear warm-up over `warmup` steps, then half a cosine to 0 at `total`."""
    if step < warmup:
        return peak * (step + 1) / warmup
    return 0.5 * peak * (1 + math.cos(math.pi * (step - warmup) / max(total - warmup, 1)))


def train(stage, model, args, task, rundir, precision, teacher=None):
    """Train `model` in place on L_cls + lam L_ct. Returns its last metrics."""
    optimizer = torch.optim.SGD(
        model.parameters(), args.lr, args.momentum, weight_decay=args.weight_decay,
        nesterov=args.momentum > 0, fused=precision.device.type == "cuda",
    )  # fmt: skip
    loop = run.Loop(rundir, stage, model, optimizer, precision, task.batches, args.epochs)
    teacher = loop.fast(teacher)
    warmup = round(args.warmup * task.batches.per_epoch)
    for step in loop:
        x, y = task.batches(step)

        with precision.autocast():
            logits, f_s = loop.net(x, with_features=True)
        loss_cls = F.cross_entropy(logits, y)
        loss_ct = torch.zeros_like(loss_cls)
        if teacher is not None:
            with torch.no_grad(), precision.autocast():
                logits_t, f_t = teacher(x, with_features=True)
            if args.match == "features":
                loss_ct = distance(args.distance, f_s, f_t, args.temperature)
            else:
                loss_ct = distance(args.distance, logits, logits_t, args.temperature)
        loss = loss_cls + args.lam * loss_ct

        loop.backward(loss)
        loop.step(lr_at(step, loop.total, args.lr, warmup), args.clip)
        loop.log(loss=loss_cls, distance=loss_ct, accuracy=run.accuracy(logits, y))

        if loop.evaluates:
            error = run.evaluate(model, task.held_out, precision)["error"]
            probe_error = run.evaluate(model, task.probe, precision)["error"]
            loop.report(error=error, probe_error=probe_error)
            if args.test_domain:
                loop.keep_best(-error)
    if args.test_domain:
        loop.load_best()
    return loop.metrics


# --- main ---------------------------------------------------------------------------------------


def each_domain(args):
    """A run for every domain left out, then a table. Returns {"<metric>/<network>/<domain>": v}."""
    names = data.domain_names(args.dataset, args.data_dir)
    found = run.repeat(main, args, {name: {"test_domain": name} for name in names})
    rows = []
    for stage in ("teacher", "baseline", "student"):
        values = [100 - f[f"error/{stage}"] for f in found.values() if f"error/{stage}" in f]
        if values:
            rows.append([stage, *values, statistics.mean(values)])
    print(f"\n{run.table(rows, ['accuracy % on', *names, 'average'])}")
    print(f"Each domain was left out of training once: {args.dataset}, seed {args.seed}.")
    again = run.command("eval/domains.py", args.out, "--data-dir", args.data_dir)
    print(f"Over seeds: {again}")
    return {f"{key}/{name}": v for name, final in found.items() for key, v in final.items()}


def main(args):
    if args.seeds > 1:
        return run.each_seed(main, args)
    if args.test_domain == "all":
        return each_domain(args)
    device = run.get_device(args.device)
    precision = run.Precision(args.precision, device)
    dataset = data.from_args(args, device)
    task = make_task(dataset, args)
    student = build(args.norm, args, dataset, device)
    teacher = None
    if args.lam or args.student_init == "teacher":
        if args.teacher:
            teacher = load_teacher(args.teacher, args, len(dataset.classes), device)
        else:
            teacher = build("none", args, dataset, device)
    results = ("error", "corrupted", *dataset.shortcut_tests)
    rundir = run.RunDir(args, __file__, precision, "student", results)  # from here on files appear

    networks = {}
    trains_teacher = teacher is not None and not args.teacher
    trains_baseline = teacher is not None and args.baseline
    rundir.plan(
        teacher=args.teacher_epochs * trains_teacher,
        baseline=args.epochs * trains_baseline,
        student=args.epochs,
    )
    if teacher is not None:
        if trains_teacher:
            own = run.changed(
                args, epochs=args.teacher_epochs, lr=args.teacher_lr, clip=args.teacher_clip
            )
            train("teacher", teacher, own, task, rundir, precision)
        networks["teacher"] = teacher.requires_grad_(False).eval()
        if trains_baseline:
            networks["baseline"] = copy.deepcopy(student)
            train("baseline", networks["baseline"], args, task, rundir, precision)
        if args.student_init == "teacher":
            models.copy_matching_weights(teacher, student)
    networks["student"] = student
    train("student", student, args, task, rundir, precision, teacher=teacher if args.lam else None)
    return report(networks, dataset, args, rundir, precision)


TITLES = {"teacher": "teacher", "baseline": "baseline", "student": "CT"}
SHOWN = {"without": "shortcut removed", "swapped": "shortcut swapped"}


def report(networks, dataset, args, rundir, precision):
    """Print the table of the run and what it says; returns {"<metric>/<network>": value}."""
    error = {k: run.evaluate(m, dataset.test, precision)["error"] for k, m in networks.items()}
    run.warn_of_chance({TITLES[k]: 100 - v for k, v in error.items()}, len(dataset.classes))
    final = {f"error/{k}": v for k, v in error.items()}
    columns = {"clean": {k: 100 - v for k, v in error.items()}}
    few = dataset.test.take(slice(0, args.corrupted_images))
    if args.corrupted_images:
        errors = corruptions.corruption_errors(
            networks, few, precision, args.data_dir, dataset.scale
        )
        final |= {f"corrupted/{k}": v for k, v in errors.items()}
        columns["corrupted"] = {k: 100 - v for k, v in errors.items()}
    for name, images in dataset.shortcut_tests.items():
        errors = {k: run.evaluate(m, images, precision)["error"] for k, m in networks.items()}
        final |= {f"{name}/{k}": v for k, v in errors.items()}
        columns[SHOWN[name]] = {k: 100 - v for k, v in errors.items()}
    rundir.close(final)

    rows = []
    for key, model in networks.items():
        title = f"{TITLES[key]} ({args.arch}, {model.spec['norm']})"
        rows.append([title, *(column[key] for column in columns.values())])
    print(f"\n{run.table(rows, ['accuracy %, higher is better', *columns])}")
    chosen = "epoch of least validation error" if args.test_domain else "last epoch"
    tested = f"{args.dataset} {args.test_domain or 'test'}, {len(dataset.test)} images"
    print(f"{tested}, {chosen}, seed {args.seed}")
    if args.corrupted_images:
        texture = corruptions.frost_textures(data_dir=args.data_dir)[1]
        print(f"corrupted: mean of 15 corruptions x 5 severities, {len(few)} images, generated")
        print(f"  with seed 0; frost: {texture}")
    print("\nPaper: without BatchNorm less clean and more corrupted accuracy; CT keeps both.")
    print(f"Here: {verdict(columns)}")
    print("\nNext:")
    print("  tensorboard --logdir runs                              # the curves of this run")
    again = run.command("eval/corruptions.py", rundir.dir / "last.pt")
    print(f"  {again}   # each corruption")
    print("  python ct.py --dataset cifar10 --arch wrn16-1 --epochs 20     # real images")
    return final


def verdict(columns):
    """One sentence made of the table's numbers: who reads the shortcut, or who withstands."""
    clean, swapped = columns["clean"], columns.get(SHOWN["swapped"])
    if swapped:
        words = []
        for key, title in TITLES.items():
            if key in swapped:
                reads = swapped[key] < clean[key] / 2
                verb = "reads the shortcut" if reads else "looks at the picture"
                words.append(
                    f"{title} {verb} ({clean[key]:.1f} % with it, {swapped[key]:.1f} % swapped)"
                )
        return "; ".join(words) + "."
    corrupted = columns.get("corrupted", clean)
    words = [f"{TITLES[k]} {clean[k]:.1f} / {corrupted[k]:.1f} %" for k in clean]
    gain = corrupted["student"] - corrupted.get("baseline", corrupted["student"])
    return f"clean / corrupted: {', '.join(words)}; CT against baseline {gain:+.1f}."


if __name__ == "__main__":
    run.cli(main, parse_args)
