"""Counterbalancing Teacher (CT): a frozen network without BatchNorm teaches the one with it.

Paper: Taghanaki et al., "Counterbalancing Teacher: Regularizing Batch Normalized Models for
Robustness", arXiv 2207.01548. BatchNorm makes a network lean on low-variance features that are
specific to the training domain. Without it the same network errs more in-domain and less under
corruption. CT trains the student S, with BatchNorm, on

    L = L_cls(p_S, y) + lam L_ct(f_S, f_T)

p_S are the student's predictions, and f_S, f_T the features of student and teacher before the
classifier. The teacher T is the same network without BatchNorm. It is trained first, on the same
data, and then frozen. At test time S is used alone. No image of the target domain is seen.

From the paper and its figure: the frozen teacher, the features before the classifier, the same
image for both. The paper does not specify these; our choices, nearly all of them options:
  1. L_ct             --distance, of pooled penultimate features or logits (--match): cosine
  2. lam              --lam, constant over training
  3. student's start  --student-init: fresh weights, or the teacher's convolutions
  4. teacher          --teacher-*: its length, peak rate 0.2, gradients clipped at norm 1
  5. everything else  as in the AugMix paper: SGD at 0.1, Nesterov momentum 0.9, weight decay 5e-4,
                      batch 128, warm-up and cosine, flip and crop; --policy augmix adds AugMix
Chosen on validation splits and the four extra corruptions, never on the 15: on CIFAR-10 distance,
lam and the teacher's rate; on `shapes` lam, start and the teacher's length (ct_*_search.json).

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
from typing import NamedTuple

import torch
import torch.nn.functional as F

from common import corruptions, data, models, run

# --- options ------------------------------------------------------------------------------------

NORMS = ("bn", "gn", "in", "ln", "none")
AUGMIX_JSD = 12.0  # AugMix's factor of the divergence between its views
USUAL = {"arch": "wrn40-2", "epochs": 100, "lam": 5.0, "eval_every": 5}
DEFAULTS = {
    "shapes": {"arch": "wrn10-1", "epochs": 8, "lam": 20.0, "eval_every": 0.8},
    **dict.fromkeys(("cifar10", "cifar100", "svhn"), USUAL),
    "folders": USUAL | {"arch": "resnet18", "epochs": 90},
}


def parse_args(argv=None):
    positive, nonnegative = run.positive, run.nonnegative
    parser = run.Parser(__file__, __doc__)
    data.add_arguments(parser)
    add = run.add_recipe_arguments(parser, DEFAULTS).add_argument
    add("--norm", default="bn", choices=NORMS, help="the student's normaliser")
    add("--policy", default="none", choices=data.POLICIES, help="on top of crop and flip")
    weights = "start from torchvision's ImageNet weights in its cache, or in FILE (default: no)"
    add("--pretrained", nargs="?", const="torchvision", metavar="FILE", help=weights)
    add = parser.add_argument_group("method").add_argument
    add("--lam", type=nonnegative(float), help="weight of L_ct; 0 leaves it out")
    add("--distance", default="cosine", choices=["mse", "relative", "cosine", "kl"], help="L_ct")
    add("--match", choices=["features", "logits"], help="in L_ct (default: features; kl: logits)")
    add("--temperature", type=positive(float), default=4.0, help="softmax temperature of kl")
    add("--student-init", default="fresh", choices=["fresh", "teacher"], help="its first weights")
    add("--teacher", metavar="CKPT", help="trained teacher (default: train one in this run)")
    add("--teacher-epochs", type=positive(int), help="default: --epochs, on shapes twice as many")
    add("--teacher-lr", type=positive(float), default=0.2, help="its peak learning rate")
    add("--teacher-clip", type=nonnegative(float), default=1.0, help="norm to clip at; 0: off")
    add("--baseline", action=run.Flag, default=True, help="train the network without CT too")
    run.add_evaluation_arguments(parser, DEFAULTS)
    run.add_arguments(parser, DEFAULTS)
    parser.set_defaults(dataset="shapes-shortcut")
    args = run.parse(parser, argv)
    run.fill(args, run.defaults_for(DEFAULTS, args.dataset))
    twice = 2 if args.dataset.startswith("shapes") else 1
    args.teacher_epochs = args.teacher_epochs or twice * args.epochs
    args.match = args.match or ("logits" if args.distance == "kl" else "features")
    if args.distance == "kl" and args.match != "logits":
        raise run.UserError("--distance kl compares distributions: use --match logits")
    return args


# --- method -------------------------------------------------------------------------------------


def distance(kind, student, teacher, temperature):
    """L_ct, a scalar, for features or logits (N,D) of student and teacher.

    mse       mean over samples and dimensions of the squared difference
    relative  the same, divided by the mean square of the teacher's: unchanged by a common scale
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
    """A network for this run. Its first weights depend on the options and the seed alone."""
    torch.manual_seed(run.seed_key(args.seed, "init"))
    model = models.build(args.arch, norm, **dataset.model_kwargs)
    if args.pretrained:
        models.load_pretrained(model, args.pretrained)
    return model.to(device, memory_format=torch.channels_last)


# --- training -----------------------------------------------------------------------------------


class Task(NamedTuple):
    """The training batches and the two sets of the evaluations."""

    batches: data.Batches
    held_out: data.Images  # of the validation split, where there is one, else of the test set
    probe: data.Images  # the first 500 of them under the four extra corruptions, severity 3


def make_task(dataset, args):
    batches = data.Batches(dataset.train, args.batch_size, args.seed, args.augment, dataset.flip)
    batches = data.augmented(batches, args.policy, dataset.mean)
    held_out = dataset.val or dataset.test
    few, size = held_out.take(slice(0, 500)), dataset.scale
    probe = [corruptions.corrupt(few.x, name, 3, seed=0, scale=size) for name in corruptions.EXTRA]
    return Task(batches, held_out, data.Images(torch.cat(probe), few.y.repeat(len(probe))))


def lr_at(step, total, peak, warmup):
    """Linear warm-up over `warmup` steps, then half a cosine to 0 at `total`."""
    if step < warmup:
        return peak * (step + 1) / warmup
    return 0.5 * peak * (1 + math.cos(math.pi * (step - warmup) / max(total - warmup, 1)))


def train(stage, model, args, task, rundir, precision, teacher=None):
    """Train `model` in place on L_cls + lam L_ct, with augmix + 12 JSD; L_ct sees the views too."""
    optimizer = torch.optim.SGD(
        model.parameters(), args.lr, args.momentum,
        weight_decay=args.weight_decay, nesterov=args.momentum > 0,
        fused=precision.device.type == "cuda",
    )  # fmt: skip
    loop = run.Loop(rundir, stage, model, optimizer, precision, task.batches, args.epochs)
    teacher = loop.compiled(teacher)
    warmup = round(args.warmup * task.batches.per_epoch)
    for step in loop:
        x, y = task.batches(step)

        with precision.autocast():
            logits, f_s = loop.net(x, with_features=True)
        loss_cls = F.cross_entropy(logits[: len(y)], y)  # augmix: x holds images, then their views
        loss_ct = torch.zeros_like(loss_cls)
        if teacher is not None:
            with torch.no_grad(), precision.autocast():
                logits_t, f_t = teacher(x, with_features=True)
            matched = (f_s, f_t) if args.match == "features" else (logits, logits_t)
            loss_ct = distance(args.distance, *matched, args.temperature)
        loss = loss_cls + args.lam * loss_ct
        if args.policy == "augmix":
            loss = loss + AUGMIX_JSD * data.jsd(logits, len(y))

        loop.backward(loss)
        loop.step(lr_at(step, loop.total, args.lr, warmup), args.clip)
        loop.log(loss=loss_cls, distance=loss_ct, accuracy=run.accuracy(logits[: len(y)], y))

        if loop.evaluates:
            error = run.evaluate(model, task.held_out, precision)["error"]
            probe_error = run.evaluate(model, task.probe, precision)["error"]
            loop.report(error=error, probe_error=probe_error)
            if args.test_domain:
                loop.keep_best(-error)
    loop.load_best()  # kept with --test-domain only
    return loop.metrics


# --- main ---------------------------------------------------------------------------------------

SHOWN = {"error": "clean", "corrupted": "corrupted", **data.SHORTCUT_TESTS}


def main(args):
    if args.seeds > 1:
        return run.each_seed(main, args, lambda e: run.accuracy_columns(e, SHOWN, titles(args)))
    if args.test_domain == "all":
        return run.each_domain(main, args, data.domain_names, titles(args))
    device = run.get_device(args.device)
    precision = run.Precision(args.precision, device)
    dataset = data.from_args(args, device)
    task = make_task(dataset, args)
    student = build(args.norm, args, dataset, device)
    teacher, networks = None, {"student": student}
    if args.lam or args.student_init == "teacher":
        if args.teacher:
            teacher = models.load_teacher(args.teacher, student, device, args)
        else:
            teacher = build("none", args, dataset, device)
        baseline = {"baseline": copy.deepcopy(student)} if args.baseline else {}
        networks = {"teacher": teacher, **baseline, "student": student}
    results = ("error", "corrupted", *dataset.shortcut_tests)
    rundir = run.RunDir(args, __file__, precision, "student", results)  # from here on files appear
    rate = {"lr": args.teacher_lr, "clip": args.teacher_clip}
    teacher_args = run.changed(args, epochs=args.teacher_epochs, **rate)
    lengths = {"teacher": 0 if args.teacher else args.teacher_epochs}
    rundir.plan(**{name: lengths.get(name, args.epochs) for name in networks})
    if teacher is not None:
        if not args.teacher:
            train("teacher", teacher, teacher_args, task, rundir, precision)
        teacher.requires_grad_(requires_grad=False).eval()
        if args.student_init == "teacher":
            models.copy_matching_weights(teacher, student)
    if "baseline" in networks:
        train("baseline", networks["baseline"], args, task, rundir, precision)
    train("student", student, args, task, rundir, precision, teacher=teacher if args.lam else None)
    return report(networks, dataset, args, rundir, precision)


def titles(args):
    """{network: its name in the tables}; a student without L_ct is no CT."""
    return {k: k for k in ("teacher", "baseline")} | {"student": "CT" if args.lam else args.norm}


def report(networks, dataset, args, rundir, precision):
    """Print the table of the run and what it says; returns {"<metric>/<network>": value}."""
    tests = {"error": dataset.test, **dataset.shortcut_tests}
    errors = {name: run.errors_of(networks, images, precision) for name, images in tests.items()}
    if args.corrupted_images:
        errors["corrupted"] = corruptions.corruption_errors(networks, dataset, args, precision)
        corruptions.show(networks, dataset, args, rundir)
    rundir.close(final := run.final_numbers(errors))

    columns = run.accuracy_columns(errors, SHOWN, titles(args))
    run.print_accuracies(columns, len(dataset.classes))
    chosen = "epoch of least validation error" if args.test_domain else "last epoch"
    tested = f"{args.dataset} {args.test_domain or 'test'}, {len(dataset.test)} images"
    print(f"{tested}, {args.arch}, {chosen}, seed {args.seed}")
    if args.corrupted_images:
        print(corruptions.describe(dataset, args))
    paper = "without BatchNorm worse on clean images, better on corrupted; CT is good on both."
    following = {
        "the curves of this run": "tensorboard",
        "each corruption": ["eval/corruptions.py", rundir.kept("student")],
        "real images, half an hour on a core": "ct.py --dataset cifar10 --arch wrn16-1 --epochs 10",
    }
    here = verdict(columns, 150 / len(dataset.classes))
    run.print_findings(paper, here, args, rundir.dir, following)
    return final


def verdict(columns, barely):
    """A sentence made of the table: who reads the shortcut; below `barely` % nothing is learnt."""
    clean, swapped = columns["clean"], columns.get(SHOWN["swapped"])
    if swapped:
        words = []
        for name, value in swapped.items():
            verb = "reads the shortcut" if value < clean[name] / 2 else "looks at the picture"
            verb = "has not learnt" if clean[name] < barely else verb
            words.append(f"{name} {verb} ({clean[name]:.1f} % with it, {value:.1f} % swapped)")
        return "; ".join(words) + "."
    shown = {k: columns[k] for k in ("clean", "corrupted") if k in columns}
    words = [f"{n} {' / '.join(f'{v[n]:.1f}' for v in shown.values())} %" for n in clean]
    if {"CT", "baseline"} <= clean.keys():
        gains = {k: v["CT"] - v["baseline"] for k, v in shown.items()}
        words += [f"CT against baseline {gain:+.1f} {k}" for k, gain in gains.items()]
    return f"{' / '.join(shown)}: {', '.join(words)}."


if __name__ == "__main__":
    run.cli(main, parse_args)
