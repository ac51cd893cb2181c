"""Deconstructing BatchNorm: without it, keep the final layer small, and see how much comes back.

Paper: Dauphin & Cubuk, "Deconstructing the Regularization of BatchNorm", ICLR 2021. BatchNorm keeps
the embedding h before the classifier W from growing explosively, at the start and in training. A
plain penalty does so too, and recovers a large part of the accuracy, about as much as dropout:

    L = CE(W h, y) + weight * mean_b ||h_b||^2        (or of the logits), over the batch

Fixup (Zhang, Dauphin & Ma, ICLR 2019) keeps h small at the start: the last layer of every residual
branch and the classifier are zero. The paper compares fixup+penalty with none. A variant is a
normaliser and words: bn, fixup+penalty+dropout. Three normalisers isolate BatchNorm's effects:

    noise          no normaliser, the noise of batch statistics (its law: models.BatchNoise)
    bn-population  BatchNorm with running averages as constants: normalisation without noise
    bn-aux         BatchNorm with the statistics of --aux-batch other images

Only the introduction was available to us. Our choices, each an option:
  1. penalty      --penalty embedding or logits; summed over dimensions, or --penalty-reduction mean
  2. schedule     cosine, or x0.1 at 1/2 and 3/4 as Fixup's code (--schedule); Nesterov momentum
  3. stem         He like the rest, where Fixup's code has PyTorch's default
  4. clipping     at norm 1 for every variant, for He initialisation without BatchNorm
  5. start        none: He's by fan-out, as in the Fixup paper; in ct.py and nofrost.py by fan-in

    python fixup_penalty.py             # 1,000 embedded pictures of 16 pixels, two minutes
    python fixup_penalty.py --dataset cifar10 --tune --seeds 10  # the paper's protocol, WRN-28-10
    python fixup_penalty.py --dataset cifar10 --limit 4000 --no-augment --arch wrn16-1 --epochs 40
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F

from common import corruptions, data, models, run

# --- options ------------------------------------------------------------------------------------

USUAL = {
    "arch": "wrn28", "epochs": 200, "batch_size": 128, "lr": 0.1, "limit": 0, "augment": True,
    "corrupted_images": 500, "eval_every": 5,
}  # fmt: skip
DEFAULTS = {
    "shapes": {
        "arch": "resnet8", "epochs": 80, "batch_size": 64, "lr": 0.2, "limit": 1000,
        "augment": False, "image_size": 16, "corrupted_images": 0, "eval_every": 5,
    },
    **dict.fromkeys(("cifar10", "cifar100", "svhn"), USUAL),
    "folders": USUAL | {"arch": "resnet50", "epochs": 90},
}  # fmt: skip
VARIANTS = ["none", "none+penalty", "fixup+penalty", "none+dropout", "bn"]
HELD_OUT = {"shapes": 200, "svhn": 3257, "cifar10": 5000, "cifar100": 5000, "folders": 10_000}
TUNED = {  # the values that --tune tries
    "lr": (0.03, 0.1, 0.3), "penalty_weight": (1e-4, 1e-3, 1e-2, 1e-1, 1),
    "dropout": (0.1, 0.3, 0.5),
}  # fmt: skip


def parse_args(argv=None):
    positive, nonnegative = run.positive, run.nonnegative
    parser = run.Parser(__file__, __doc__)
    data.add_arguments(parser)
    add = run.add_recipe_arguments(parser, DEFAULTS, clip=1.0).add_argument
    add("--scalar-lr", type=positive(float), default=0.1, help="share of --lr for its scalars")
    add("--schedule", default="cosine", choices=["cosine", "steps"], help="steps: x0.1 at 1/2, 3/4")
    add("--mixup", type=nonnegative(float), default=0.0, help="alpha of mixup; 0 is none")
    add = parser.add_argument_group("method").add_argument
    words = f"+penalty, +embedding, +logits, +dropout, +he, +glorot (default: {','.join(VARIANTS)})"
    add("--variants", type=run.listed(str), help=f"networks: a norm with any of {words}")
    add("--norm", choices=models.NORMS, help="one network: short for --variants NAME")
    start = "start of the weights (default: fixup for norm fixup, else he)"
    add("--init", choices=["he", "glorot", "fixup"], help=start)
    kinds, what = ["embedding", "logits", "none"], "what +penalty keeps small (default: embedding)"
    add("--penalty", default="none", choices=kinds, help=f"{what}; beside --norm it adds that")
    add("--penalty-weight", type=nonnegative(float), default=0.001, help="factor in the loss")
    add("--penalty-reduction", default="sum", choices=["mean", "sum"], help="over dimensions")
    add("--dropout", type=run.fraction, default=0.0, help="rate of +dropout; 0 means 0.3 there")
    add("--aux-batch", type=positive(int), default=1024, help="images of bn-aux's statistics")
    add("--tune", action="store_true", help="choose rate, weight and dropout on a validation split")
    run.add_evaluation_arguments(parser, DEFAULTS)
    run.add_arguments(parser, DEFAULTS)
    args = run.parse(parser, argv)
    run.fill(args, run.defaults_for(DEFAULTS, args.dataset))
    if args.tune and not args.val_size:
        args.val_size = run.defaults_for(HELD_OUT, args.dataset)
    args.variants = variants_of(args)
    for name in args.variants:
        options_of(name, args)  # refuses what does not go together
    return args


def variants_of(args):
    """The names of the networks to train, from --variants, or from --norm and its words."""
    words = [args.penalty] * (args.penalty != "none") + ["dropout"] * (args.dropout > 0)
    single = ["+".join([args.norm, *words])] if args.norm else None
    names = run.either(single, args.variants, "--norm, --variants") or VARIANTS
    given = {word for name in names for word in name.split("+")[1:]}
    if args.dropout and "dropout" not in given:
        raise run.UserError("--dropout: no variant has +dropout")
    if args.penalty != "none" and not given & {"penalty", "embedding", "logits"}:
        raise run.UserError(f"--penalty {args.penalty}: no variant has +penalty")
    return names


def options_of(name, args):
    """The options of one variant: `args` with norm, init, penalty and dropout as its name says."""
    norm, *words = name.split("+")
    usual = "logits" if args.penalty == "logits" else "embedding"
    meant = {
        "penalty": {"penalty": usual}, "embedding": {"penalty": "embedding"},
        "logits": {"penalty": "logits"}, "dropout": {"dropout": args.dropout or 0.3},
        "he": {"init": "he"}, "glorot": {"init": "glorot"},
    }  # fmt: skip
    if norm not in models.NORMS or not set(words) <= set(meant):
        text = f"({', '.join(models.NORMS)}), then any of +{', +'.join(meant)}"
        raise run.UserError(f"variant {name}: must be one normaliser {text}")
    init = args.init or ("fixup" if norm == "fixup" else "he")
    own = run.changed(args, variant=name, norm=norm, init=init, penalty="none", dropout=0.0)
    for word in words:
        own = run.changed(own, **meant[word])
    if own.penalty == "none":  # an option at 0 is not tuned
        own.penalty_weight = 0.0
    wrong = {
        f"variant {name}: fixup is an initialisation; --init {own.init} is not":
            norm == "fixup" and own.init != "fixup",
        f"--init fixup takes no normaliser: norm fixup or none, not {norm}":
            own.init == "fixup" and norm not in ("fixup", "none", "noise"),
        "dual-bn: half of it is idle without adversarial images; take bn": norm == "dual-bn",
        "bn-aux: the auxiliary images are not mixed, so --mixup must be 0":
            norm == "bn-aux" and args.mixup > 0,
    }  # fmt: skip
    run.refuse(wrong)
    return own


# --- method -------------------------------------------------------------------------------------


def penalty(kind, h, logits, reduction):
    """Mean over samples of the sum (or mean) over dimensions of h^2 (N,D) or logits^2 (N,K)."""
    if kind == "none":
        return torch.zeros((), device=h.device)
    squares = (h if kind == "embedding" else logits).square()
    return squares.mean() if reduction == "mean" else squares.sum(1).mean()


def build(args, dataset, device):
    """A network for this run; its weights depend on the seed and the variant alone."""
    torch.manual_seed(run.seed_key(args.seed, "init"))
    model = models.build(args.arch, args.norm, **dataset.model_kwargs)
    models.INITS[args.init](model)
    models.set_noise(model, args.batch_size)
    return model.to(device, memory_format=torch.channels_last)


# --- training -----------------------------------------------------------------------------------


class Task(NamedTuple):
    """What a network is trained and held out on."""

    batches: data.Batches
    held_out: data.Images
    auxiliary: data.Batches  # other images, for bn-aux


def make_task(dataset, args):
    rest = args.augment, dataset.flip
    whole = args.mixup > 0  # mixed with rows of other processes
    batches = data.Batches(dataset.train, args.batch_size, args.seed, *rest, whole=whole)
    size = min(args.aux_batch, len(dataset.train))
    auxiliary = data.Batches(dataset.train, size, f"{args.seed}-aux", *rest)
    return Task(batches, dataset.val or dataset.test, auxiliary)


def lr_at(step, total, peak, warmup, schedule="cosine"):
    """Linear warm-up over `warmup` steps, then half a cosine to 0, or a tenth at 1/2 and 3/4."""
    if step < warmup:
        return peak * (step + 1) / warmup
    if schedule == "steps":
        return peak * 0.1 ** ((2 * step >= total) + (4 * step >= 3 * total))
    return 0.5 * peak * (1 + math.cos(math.pi * (step - warmup) / max(total - warmup, 1)))


def train(stage, model, args, task, rundir, precision):
    """Train `model` in place on cross-entropy + weight * penalty. Returns its last metrics."""
    optimizer = torch.optim.SGD(
        models.fixup_groups(model, args.scalar_lr), args.lr, args.momentum,
        weight_decay=args.weight_decay, nesterov=args.momentum > 0,
        fused=precision.device.type == "cuda",
    )  # fmt: skip
    loop = run.Loop(rundir, stage, model, optimizer, precision, task.batches, args.epochs)
    warmup = round(args.warmup * task.batches.per_epoch)
    for step in loop:
        x, y = task.batches(step)

        if args.mixup:
            x, y, other, share = data.mixup(x, y, args.mixup, args.seed, step)
        with precision.autocast():
            if args.norm == "bn-aux":
                models.measure_statistics(model, task.auxiliary(step)[0])
            logits, h = loop.net(x, with_features=True, dropout=args.dropout)
        loss_cls = F.cross_entropy(logits, y)
        if args.mixup:
            loss_cls = share * loss_cls + (1 - share) * F.cross_entropy(logits, other)
        extra = penalty(args.penalty, h, logits, args.penalty_reduction)
        loss = loss_cls + args.penalty_weight * extra

        loop.backward(loss)
        loop.step(lr_at(step, loop.total, args.lr, warmup, args.schedule), args.clip)
        sizes = {"embedding": h.square().mean(), "logits": logits.square().mean()}
        loop.log(loss=loss_cls, penalty=extra, accuracy=run.accuracy(logits, y), **sizes)

        if loop.evaluates:
            error = run.evaluate(model, task.held_out, precision)["error"]
            size = loop.means["embedding"]
            loop.report(error=error, train_accuracy=loop.means["accuracy"], final_layer=size)
    return loop.metrics


def fit(stage, args, dataset, rundir, precision):
    """Train a network of these options. Returns it and its last metrics."""
    model = build(args, dataset, precision.device)
    task = make_task(dataset, args)
    if not (rundir.dir / rundir.file(stage)).exists():  # how far the signal grows at the start
        found = models.mean_squares(model, task.batches(0)[0])
        rundir.scalars(stage, 0, {k: found[k] for k in ("embedding", "logits")})
        rundir.log(stage=stage, epoch=0, step=0, **found)
    return model, train(stage, model, args, task, rundir, precision)


# --- main ---------------------------------------------------------------------------------------


def main(args):
    device = run.get_device(args.device)
    precision = run.Precision(args.precision, device)
    dataset = data.from_args(args, device)
    variants = {name: options_of(name, args) for name in args.variants}
    if args.corrupted_images and dataset.image_size < 24:
        raise run.UserError("--corrupted-images: the corruptions need images of 24 pixels or more")
    for own in variants.values():  # whatever may refuse an option comes before the run directory
        run.check_processes(build(own, dataset, device))
    make_task(dataset, args)
    last = args.variants[0] if len(variants) * args.seeds == 1 else None
    results = ("train_accuracy", "error", "corrupted", "final_layer")
    rundir = run.RunDir(args, __file__, precision, last, results)  # from here on files appear

    def fit_one(stage, own):
        return fit(stage, own, dataset, rundir, precision)

    if args.tune:
        variants = {k: run.search(own, TUNED, fit_one, rundir) for k, own in variants.items()}
        dataset = data.from_args(args, device, val_size=0)  # fit_one trains on all images now
    stages = run.with_seeds(variants, args)
    rundir.plan(**dict.fromkeys(stages, args.epochs))
    networks, metrics = {}, {}
    for stage, own in stages.items():
        networks[stage], metrics[stage] = fit_one(stage, own)
    return report(networks, metrics, stages, dataset, args, rundir, precision)


def report(networks, metrics, stages, dataset, args, rundir, precision):
    """Print the table of medians over seeds; returns {"<metric>/<variant>": median}."""
    found = {"error": run.errors_of(networks, dataset.test, precision)}
    if args.corrupted_images:
        found["corrupted"] = corruptions.corruption_errors(networks, dataset, args, precision)
    for metric in ("train_accuracy", "final_layer"):
        found[metric] = {stage: own[metric] for stage, own in metrics.items()}
    medians = run.medians_over_seeds(found, stages, rundir)
    rundir.close(final := run.final_numbers(medians))

    columns = run.accuracy_columns(medians, {"error": "test %", "corrupted": "corrupted %"})
    columns |= {"train %": medians["train_accuracy"], "final layer": medians["final_layer"]}
    run.print_accuracies(columns, len(dataset.classes), "variant")
    print("accuracies, higher is better; final layer: mean square of the embedding at the end")
    print(f"{args.dataset}, {len(dataset.train)} training images, {len(dataset.test)} test images,")
    print(f"  {args.arch}, last epoch, {run.seeds_in_words(args)}")
    paper = "Fixup and the penalty bring a large part of BatchNorm's test accuracy back."
    real = "fixup_penalty.py --dataset cifar10 --limit 4000 --no-augment --arch wrn16-1 --epochs 40"
    following = {"growth of the final layer, tag embedding": "tensorboard"}
    following["real images, a quarter of an hour on a core"] = real
    run.print_findings(paper, verdict(columns), args, rundir.dir, following)
    return final


def verdict(columns):
    """A sentence made of the table: how much of the gap between none and bn comes back."""
    test, size = columns["test %"], columns["final layer"]
    if not {"none", "bn"} <= set(test):
        return "add none and bn to --variants to see how much of the gap comes back."
    words = [f"{name} {test[name] - test['none']:+.1f}" for name in test if name != "none"]
    return (
        f"test accuracy against none, in points: {', '.join(words)}; final layer "
        f"{size['none']:.3g} without BatchNorm, {size['bn']:.3g} with it."
    )


if __name__ == "__main__":
    run.cli(main, parse_args)
