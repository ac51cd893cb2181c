"""NoFrost: adversarial training without normalisers.

Paper: Wang et al., "Removing Batch Normalization Boosts Adversarial Training", ICML 2022, arXiv
2207.01156. Clean and adversarial images have different statistics. BatchNorm must serve both with
one set, and adversarial training pays for that in clean accuracy. NoFrost takes the normalisers
out of the network (--norm nf: an NF-ResNet) and trains on

    L = (1 - lam) CE(f(x), y) + lam CE(f(x_adv), y)

PGD on the cross-entropy gives x_adv, with the network in eval mode. CE has label smoothing. --norm
dual-bn is the older remedy, a BatchNorm for clean and another one for attacked images. NoFrost*
(--streams clean,deepaug,tda,adv) adds streams of augmented images. Its loss is the mean of theirs.

From the authors' code: the loss, lam 0.5, smoothing 0.1, eps 8/255, 10 steps of min(1.25 eps,
eps + 4)/10. So is the recipe of --dataset imagenet: 90 epochs, batch 256, rate 0.1 per 256 images,
cosine by epochs, Nesterov; weight decay 5e-5 on everything, dropout 0.25, stochastic depth 0.1, no
warm-up, no clipping. The paper has no small images, so their recipe is ours (DEFAULTS): warm-up,
gradients clipped at norm 1, weight decay 5e-4, rate per step. So are their NF networks (--arch
wrnD-K, resnetN with --norm nf).

    python nofrost.py                                    # embedded data, minutes on a CPU
    python nofrost.py --dataset cifar10 --arch wrn28-10  # the full job on a GPU
    python nofrost.py --dataset cifar10 --norms nf,bn,dual-bn  # with BatchNorm too, in one table
    python nofrost.py --dataset cifar10 --lam 0          # normal training

The robust accuracy of the paper (22 to 24 %, ResNet-50) is PGD-20's. Under AutoAttack its figure
reports 9.4 %. A user of the official network measured 1.3 %; nobody has reconciled the two.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F

from common import attacks, data, models, run

# --- options ------------------------------------------------------------------------------------

SMALL = {
    "arch": "wrn28-10", "norms": ["nf"], "epochs": 60, "batch_size": 128, "lr": 0.1, "warmup": 1.0,
    "schedule": "step", "weight_decay": 5e-4, "clip": 1.0, "dropout": 0.0, "drop_path": 0.0,
    "eps": 8.0, "attack_steps": 10, "eval_every": 1, "robust_images": 500,
}  # fmt: skip
DEFAULTS = {
    "shapes": SMALL | {
        "arch": "wrn10-1", "norms": ["nf", "bn", "dual-bn"], "epochs": 8, "batch_size": 64,
        "lr": 0.3, "eps": 4.0, "attack_steps": 1, "robust_images": 100,
        "image_size": 16, "eval_every": 0.8,
    },
    **dict.fromkeys(("cifar10", "cifar100", "svhn", "tiny-imagenet"), SMALL),
    "folders": SMALL | {
        "arch": "nf_resnet50", "epochs": 90, "batch_size": 256, "warmup": 0.0,
        "schedule": "epoch", "weight_decay": 5e-5, "clip": 0.0, "dropout": 0.25, "drop_path": 0.1,
    },
}  # fmt: skip
JUDGES = {"pgd-20": "PGD-20", "apgd-ce": "then APGD-CE", "apgd-t": "then APGD-T"}
SHOWN = {"error": "clean", **JUDGES}
NORMS = ("nf", "none", "gn", "in", "ln", "bn", "dual-bn")
SEPARATE = ("bn", "dual-bn")  # normalisers for which clean and adversarial images go separately


def parse_args(argv=None):
    positive, nonnegative = run.positive, run.nonnegative
    parser = run.Parser(__file__, __doc__)
    data.add_arguments(parser)
    add = run.add_recipe_arguments(parser, DEFAULTS).add_argument
    add("--norms", type=run.listed(str), help=f"networks to train, of {', '.join(NORMS)}")
    add("--norm", choices=NORMS, help="one network: short for --norms NAME")
    add("--schedule", choices=["step", "epoch"], help="when the cosine moves the rate")
    add("--agc", type=nonnegative(float), default=0.0, help="ratio of adaptive clipping; 0: none")
    add("--dropout", type=run.fraction, help="share of the features set to 0")
    add("--drop-path", type=run.fraction, help="chance that the last block is left out")
    add("--ema", type=run.fraction, default=0.0, help="decay of the averaged weights; 0: none")
    add = parser.add_argument_group("method").add_argument
    add("--lam", type=float, default=0.5, help="weight of the attacked images, 0 to 1")
    add("--loss", default="mixture", choices=["mixture", "trades"], help="the objective")
    add("--beta", type=nonnegative(float), default=6.0, help="weight of the divergence in trades")
    add("--label-smoothing", type=run.fraction, help="its share (default: 0.1, for trades 0)")
    add("--streams", type=run.listed(str), default=["clean", "adv"], help="also deepaug, tda")
    add("--deepaug-dir", metavar="DIR", help="class folders of DeepAugment images, for deepaug")
    add = parser.add_argument_group("attack").add_argument
    add("--eps", type=positive(float), help="radius in units of 1/255")
    add("--alpha", type=positive(float), help="step, as eps (default: min(1.25 eps, eps + 4) / n)")
    add("--attack-steps", type=positive(int), help="number n of steps; 1: FGSM, random start")
    add("--attack-norm", default="linf", choices=["linf", "l2"], help="norm of the radius")
    add("--attack-mode", default="eval", choices=["eval", "train"], help="the network's")
    add("--capture", action=run.Flag, default=True, help="attack steps as CUDA graphs on a GPU")
    add = run.add_evaluation_arguments(parser, DEFAULTS, "--robust-images", "attacked").add_argument
    add("--probe-images", type=positive(int), default=200, help="held-out images under PGD-10")
    run.add_arguments(parser, DEFAULTS)
    args = run.parse(parser, argv)
    args.streams = data.check_streams(args.streams)
    args.norms = run.either(args.norm and [args.norm], args.norms, "--norm, --norms")
    del args.norm  # --norms says it
    defaults = dict(run.defaults_for(DEFAULTS, args.dataset))
    if args.dataset in data.PHOTOGRAPHS and (args.norms or ["nf"]) != ["nf"]:
        defaults["arch"] = "resnet50"
    if args.loss == "trades" or not is_attacked(args):
        defaults["norms"] = [n for n in defaults["norms"] if n != "dual-bn"]
    defaults["label_smoothing"] = 0.0 if args.loss == "trades" else 0.1
    run.fill(args, defaults)
    check_options(args)
    args.capture = args.capture and is_attacked(args) and args.attack_mode == "eval"
    if is_attacked(args) and (warning := attacks.check_eps(args.eps, args.attack_norm, args.alpha)):
        print(f"warning: {warning}")
    return args


def is_attacked(args):
    """Whether adversarial images are trained on."""
    return "adv" in args.streams and (args.lam > 0 or args.loss == "trades")


def check_options(args):
    """Raise UserError for options that do not go together."""
    mixture = args.streams == ["clean", "adv"]
    trades = args.loss == "trades"
    dual = "dual-bn" in args.norms
    wrong = {
        f"--norms {','.join(args.norms)}: each once, of {', '.join(NORMS)}":
            sorted(args.norms) != sorted(set(args.norms) & set(NORMS)),
        f"--lam {args.lam:g}: must be from 0 (clean only) to 1": not 0 <= args.lam <= 1,
        "--loss trades: has its own two terms, so no --streams": trades and not mixture,
        "--lam: only with --streams clean,adv; trades has --beta, more streams their mean":
            args.lam != 0.5 and (trades or (args.lam and not mixture)),
        "--beta: goes with --loss trades": args.beta != 6 and not trades,
        "--norm dual-bn: half of it is idle without adversarial images; take bn":
            dual and not is_attacked(args),
        "--loss trades: compares two outputs of one network, so no dual-bn": dual and trades,
    }  # fmt: skip
    run.refuse(wrong)


# --- method -------------------------------------------------------------------------------------


def perturb(model, x, y, args, precision, step, graphs=None):
    """(x_adv, {"zero_grad": share}): PGD on x (N,3,H,W) from a start that the step decides.

    The share is that of images without a gradient. graphs: an attacks.Graphs, for --capture. TRADES
    (Zhang et al. 2019) instead climbs KL(f(x) || f(x_adv)) from x + 0.001 N(0,1).
    """
    rng = run.generator(args.seed, "attack", step, device=x.device)
    shape = (len(x) * run.world(), *x.shape[1:])  # drawn for the global batch
    loss = "ce"
    if args.loss == "trades":
        with attacks.frozen(model, args.attack_mode) as net, precision.autocast():
            y = F.log_softmax(net(x).float(), 1)
        loss = attacks.kl_loss
        noise = torch.randn(shape, generator=rng, device=x.device)
        noise = (noise * (0.001 * 255 / args.eps)).clamp_(-1, 1)
    else:
        noise = attacks.unit_noise(shape, args.attack_norm, rng)
    noise = noise[run.rows(len(noise))]
    x_adv, stats = attacks.pgd(
        model, x, y, args.eps, args.alpha, args.attack_steps, args.attack_norm, loss, noise=noise,
        precision=precision, mode=args.attack_mode, capture=graphs, check=False, return_stats=True,
    )  # fmt: skip
    return x_adv, {"zero_grad": stats["zero_grad"]}


def forward(model, images, norm, args, precision):
    """Logits {stream: (N,K)} of images {stream: (N,3,H,W)}.

    With BatchNorm each stream is a batch, for its statistics are the batch's; else all are one."""
    with precision.autocast():
        if norm not in SEPARATE:
            logits = model(torch.cat(list(images.values())), dropout=args.dropout)
            return dict(zip(images, logits.split([len(x) for x in images.values()]), strict=True))
        logits = {}
        for name, x in images.items():
            models.use_statistics(model, "adversarial" if name == "adv" else "clean")
            logits[name] = model(x, dropout=args.dropout)
        models.use_statistics(model, "adversarial")
        return logits


def objective(logits, labels, args):
    """(loss, {stream: its loss}) of logits {stream: (N,K)} and labels {stream: (N,)}.

    mixture of clean and adv: (1 - lam) CE_clean + lam CE_adv; of other streams: their mean.
    trades: CE_clean + beta KL(f(x) || f(x_adv)).
    """
    smoothing = args.label_smoothing
    terms = {k: F.cross_entropy(z, labels[k], label_smoothing=smoothing) for k, z in logits.items()}
    if args.loss == "trades" and "adv" in terms:
        clean = F.log_softmax(logits["clean"], 1)
        terms["adv"] = attacks.kl_loss(logits["adv"], clean).mean()
        return terms["clean"] + args.beta * terms["adv"], terms
    if list(terms) == ["clean", "adv"]:
        return (1 - args.lam) * terms["clean"] + args.lam * terms["adv"], terms
    return sum(terms.values()) / len(terms), terms


def build(norm, args, dataset, device):
    """A network of this run; its weights depend on the seed and the options alone."""
    torch.manual_seed(run.seed_key(args.seed, "init"))
    model = models.build(args.arch, norm, **dataset.model_kwargs)
    if args.dataset in data.PHOTOGRAPHS and norm in SEPARATE:
        models.zero_branches(model)  # as the authors' networks with BatchNorm
    models.set_drop_path(model, args.drop_path)
    return model.to(device, memory_format=torch.channels_last)


# --- training -----------------------------------------------------------------------------------


class Task(NamedTuple):
    """What a network is trained and held out on."""

    batches: data.Batches
    streams: data.Streams
    held_out: data.Images
    probe: data.Images  # the first --probe-images of them, attacked at every evaluation
    selects: bool  # whether the best epoch is kept (best.pt), with --val-size


def make_task(dataset, args):
    options = (args.batch_size, args.seed, args.augment, args.deepaug_dir, args.strict)
    streams = data.Streams(args.streams, dataset, *options)
    held_out = dataset.val or dataset.test
    probe = held_out.take(slice(0, args.probe_images))
    return Task(streams.clean, streams, held_out, probe, dataset.val is not None)


def lr_at(step, total, peak, warmup, hold=1):
    """Linear warm-up over `warmup` steps, then half a cosine to 0 at `total`.

    After the warm-up the rate moves every `hold` steps."""
    if step < warmup:
        return peak * (step + 1) / warmup
    step = max(step // hold * hold, warmup)
    return 0.5 * peak * (1 + math.cos(math.pi * (step - warmup) / max(total - warmup, 1)))


def curves(logits, terms, y):
    """{tag: 0-d tensor} for TensorBoard, of logits and losses {stream: ...} and labels y (N,)."""
    shown = {f"loss_{name}": value for name, value in terms.items()}
    shown["accuracy"] = run.accuracy(logits["clean"], y)
    if "adv" in logits:
        shown["robust_accuracy"] = run.accuracy(logits["adv"], y)
    return shown


def train(stage, model, args, task, rundir, precision):
    """Train `model` in place on the objective. Returns its last metrics. stage: its normaliser."""
    per_epoch = task.batches.per_epoch
    peak = args.lr * (args.batch_size / 256 if args.dataset in data.PHOTOGRAPHS else 1)  # per 256
    optimizer = torch.optim.SGD(
        model.parameters(), peak, args.momentum,
        weight_decay=args.weight_decay, nesterov=args.momentum > 0,
        fused=precision.device.type == "cuda",
    )  # fmt: skip
    loop = run.Loop(rundir, stage, model, optimizer, precision, task.batches, args.epochs)
    warmup = round(args.warmup * per_epoch)
    hold = per_epoch if args.schedule == "epoch" else 1
    graphs = attacks.Graphs() if args.capture else None
    judge = (["pgd-10"], args.eps, args.attack_norm, precision)
    chance = 100 - 100 / model.spec["num_classes"]  # the error of guessing
    for step in loop:
        x, y = task.batches(step)

        images, labels = task.streams(step, x, y)
        shown = {}
        if is_attacked(args):
            images["adv"], shown = perturb(model, x, y, args, precision, step, graphs)
            labels["adv"] = y
        logits = forward(loop.net, images, stage, args, precision)
        loss, terms = objective(logits, labels, args)

        loop.backward(loss)
        if args.agc:
            run.clip_adaptively(model, args.agc)
        loop.step(lr_at(step, loop.total, peak, warmup, hold), args.clip)
        loop.log(loss=loss, **shown, **curves(logits, terms, y))

        if loop.evaluates:
            error = run.evaluate(loop.average.model, task.held_out, precision)["error"]
            pgd_error = attacks.robust_errors(loop.average.model, task.probe, *judge)["pgd-10"]
            least = attacks.warn_of_fall(loop.metrics, pgd_error, chance)
            loop.report(error=error, pgd_error=pgd_error, least_pgd_error=least)
            if task.selects:
                loop.keep_best(-pgd_error if is_attacked(args) else -error)
    return loop.metrics


# --- main ---------------------------------------------------------------------------------------


def main(args):
    if args.seeds > 1:
        return run.each_seed(main, args, lambda errors: run.accuracy_columns(errors, SHOWN))
    device = run.get_device(args.device)
    precision = run.Precision(args.precision, device)
    dataset = data.from_args(args, device)
    task = make_task(dataset, args)
    attacks.check_radius(args.eps, args.attack_norm, 3 * dataset.image_size**2)
    networks = {norm: build(norm, args, dataset, device) for norm in args.norms}
    results = ("error", *JUDGES) if args.robust_images else ("error",)
    last = args.norms[0] if len(args.norms) == 1 else None
    rundir = run.RunDir(args, __file__, precision, last, results)  # from here on files appear
    rundir.plan(**dict.fromkeys(networks, args.epochs))
    for norm, model in networks.items():
        train(norm, model, args, task, rundir, precision)
    return report(networks, dataset, args, rundir, precision)


def report(networks, dataset, args, rundir, precision):
    """Print the table of the run and what it says; returns {"<metric>/<network>": value}."""
    few = dataset.test.take(slice(0, args.robust_images))
    judges = [name for name in JUDGES if len(dataset.classes) >= attacks.CLASSES.get(name, 2)]
    radius, rows = (args.eps, args.attack_norm, precision), {}
    for norm, model in networks.items():
        # The two sets of statistics of a "dual-bn" network are two networks to an attacker.
        for kind in ("adversarial", "clean") if norm == "dual-bn" else ("adversarial",):
            models.use_statistics(model, kind)
            row = {"error": run.evaluate(model, dataset.test, precision)["error"]}
            if args.robust_images:
                row |= attacks.robust_errors(model, few, judges, *radius)
            rows[norm if kind == "adversarial" else f"{norm}, clean statistics"] = row
        models.use_statistics(model, "adversarial")
        eight = dataset.test.take(slice(0, 8))
        picture = attacks.picture(model, eight, dataset.classes, args.eps, args.attack_norm)
        rundir.writer(norm).add_image("attack", picture, rundir.step(norm), dataformats="HWC")
    errors = run.by_metric(rows)
    rundir.close(final := run.final_numbers(errors))
    columns = run.accuracy_columns(errors, SHOWN)
    run.print_accuracies(columns, len(dataset.classes))
    print(f"{args.dataset} test, {len(dataset.test)} images, {args.arch}, seed {args.seed}")
    if args.robust_images:
        print(f"attacks: {args.attack_norm}, eps {args.eps:g}/255, {len(few)} images, 1 start,")
        print("  each on what those before left; the last two are AutoAttack's first two")
    pair = {"clean": columns["clean"], "robust": columns[list(columns)[-1]]}
    here = run.compare(pair, {"clean": len(dataset.test), "robust": len(few)})
    file = rundir.dir / rundir.file(args.norms[0])
    following = {
        "the curves, and pictures of attacks": "tensorboard",
        "all of AutoAttack": ["eval/adversarial.py", file, "--attacks", "standard",
                              "--norm", args.attack_norm, "--eps", f"{args.eps:g}"],
        "real images, half an hour on a core": "nofrost.py --dataset cifar10 --norms nf,bn "
        "--arch wrn10-1 --limit 5000 --epochs 20",
    }  # fmt: skip
    paper = "without BatchNorm, adversarial training keeps more clean and robust accuracy."
    run.print_findings(paper, here, args, rundir.dir, following)
    return final


if __name__ == "__main__":
    run.cli(main, parse_args)
