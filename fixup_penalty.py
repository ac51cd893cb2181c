"""Deconstructing BatchNorm: without it, keep the final layer small, and see how much comes back.

Paper: Dauphin & Cubuk, "Deconstructing the Regularization of BatchNorm", ICLR 2021. BatchNorm keeps
the embedding before the classifier from growing explosively, at the start and in training. A plain
penalty that does so recovers a large part of its generalisation, about as much as dropout does:

    L = CE(W h, y) + weight * mean_b ||h_b||^2        (or of the logits), over the batch

Fixup (Zhang, Dauphin & Ma, ICLR 2019) keeps the embedding small at the start: the last layer of
every residual branch and the classifier are zero. The paper's claim compares fixup+penalty with
none. A variant is named by its normaliser and words: none, none+penalty, fixup+penalty+dropout, bn,
none+glorot. Three more normalisers isolate BatchNorm's other effects, in our reading:

    noise          no normaliser, the noise of batch statistics (its law: models.BatchNoise)
    bn-population  BatchNorm with running averages as constants: normalisation without noise
    bn-aux         BatchNorm with the statistics of --aux-batch other images

Only the introduction was available to us. Our choices, each an option:
  1. penalty      --penalty embedding or logits; summed over dimensions, or --penalty-reduction mean
  2. schedule     cosine, or x0.1 at 1/2 and 3/4 as Fixup's code (--schedule); Nesterov momentum
  3. stem         He like the rest, where Fixup's code has PyTorch's default
  4. clipping     at norm 1 for every variant, for He initialisation without BatchNorm

    python fixup_penalty.py             # 1,000 embedded pictures of 16 pixels, two minutes
    python fixup_penalty.py --dataset cifar10 --tune --seeds 10  # the paper's protocol, WRN-28-10
    python fixup_penalty.py --dataset cifar10 --limit 4000 --no-augment --arch wrn16-1 --epochs 40
"""

import itertools
import math
import statistics
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
HELD_OUT = {
    "shapes": 200,
    "svhn": 3257,
    "cifar10": 5000,
    "cifar100": 5000,
}  # by --tune, else 10,000
VARIANTS = ["none", "none+penalty", "fixup+penalty", "none+dropout", "bn"]
PENALTIES, INITS = ("penalty", "embedding", "logits"), ("he", "glorot")
TUNED = {  # the values that --tune tries
    "lr": (0.03, 0.1, 0.3), "penalty_weight": (1e-4, 1e-3, 1e-2, 1e-1), "dropout": (0.1, 0.3, 0.5),
}  # fmt: skip


def parse_args(argv=None):
    positive, nonnegative = run.positive, run.nonnegative
    parser = run.Parser(__file__, __doc__)
    data.add_arguments(parser)
    add = run.add_recipe_arguments(parser, DEFAULTS, clip=1.0).add_argument
    add("--scalar-lr", type=positive(float), default=0.1, help="rate of Fixup's scalars / --lr")
    schedules = ["cosine", "steps"]
    add("--schedule", default="cosine", choices=schedules, help="steps: x0.1 at 1/2 and 3/4")
    add("--mixup", type=nonnegative(float), default=0.0, help="its alpha; 0 is none")
    add = parser.add_argument_group("method").add_argument
    add("--variants", type=run.listed(str), help=f"networks (default: {','.join(VARIANTS)})")
    add("--norm", choices=models.NORMS, help="one network: short for --variants NAME")
    add(
        "--init", choices=["he", "glorot", "fixup"],
        help="start of the weights (default: fixup for norm fixup, else he)",
    )  # fmt: skip
    kinds = ["embedding", "logits", "none"]
    add("--penalty", default="none", choices=kinds, help="what +penalty keeps small: embedding")
    add("--penalty-weight", type=nonnegative(float), default=0.001, help="its factor in the loss")
    add("--penalty-reduction", default="sum", choices=["mean", "sum"], help="over dimensions")
    add("--dropout", type=run.fraction, default=0.0, help="rate of +dropout; 0 means 0.3 there")
    add("--aux-batch", type=positive(int), default=1024, help="images of bn-aux's statistics")
    add("--tune", action="store_true", help="choose rate, weight and dropout on a validation split")
    run.add_evaluation_arguments(parser, DEFAULTS)
    run.add_arguments(parser)
    run.defaults_by_data(parser, DEFAULTS)
    args = run.parse(parser, argv)
    run.fill(args, run.defaults_for(DEFAULTS, args.dataset))
    if args.tune and not args.val_size:
        args.val_size = HELD_OUT.get(args.dataset.removesuffix(".1"), 10_000)
    if args.norm:
        words = [args.penalty] * (args.penalty != "none") + ["dropout"] * (args.dropout > 0)
        single = ["+".join([args.norm, *words])]
        if args.variants not in (None, single):
            raise run.UserError("--norm is for one variant, --variants for several: give one")
        args.variants = single
    args.variants = list(dict.fromkeys(args.variants or VARIANTS))
    words = {word for name in args.variants for word in name.split("+")[1:]}
    if args.dropout and "dropout" not in words:
        raise run.UserError("--dropout: no variant has +dropout")
    if args.penalty != "none" and not words & set(PENALTIES):
        raise run.UserError(f"--penalty {args.penalty}: no variant has +penalty")
    return args


def options_of(name, args):
    """The options of one variant: `args` with norm, init, penalty and dropout as its name says."""
    norm, *words = name.split("+")
    known = (*PENALTIES, "dropout", *INITS)
    if norm not in models.NORMS or not set(words) <= set(known):
        text = f"({', '.join(models.NORMS)}), then any of +{', +'.join(known)}"
        raise run.UserError(f"variant {name}: must be one normaliser {text}")
    own = run.changed(args, norm=norm, penalty="none", dropout=0.0)
    own.init = args.init or ("fixup" if norm == "fixup" else "he")
    for word in words:
        if word in PENALTIES:
            usual = "logits" if args.penalty == "logits" else "embedding"
            own.penalty = usual if word == "penalty" else word
        elif word == "dropout":
            own.dropout = args.dropout or 0.3
        else:
            own.init = word
    wrong = {
        f"variant {name}: fixup is an initialisation; --init {own.init} is not":
            norm == "fixup" and own.init != "fixup",
        f"--init fixup takes no normaliser: norm fixup or none, not {norm}":
            own.init == "fixup" and norm not in ("fixup", "none", "noise"),
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


def mixup(x, y, alpha, seed, step):
    """Images mixed with a permutation of the global batch, both labels, and the first's share.

    One Beta(alpha, alpha) share per batch (Zhang et al. 2018). Returns this process's rows."""
    rng = run.generator(seed, "mixup", step)
    gammas = torch._standard_gamma(torch.full((2,), alpha, dtype=torch.float64), generator=rng)
    share = (gammas[0] / gammas.sum()).item()
    partner = run.upload(torch.randperm(len(y), generator=rng), y.device)
    mixed = share * x + (1 - share) * x[partner]
    own = run.rows(len(y))
    return mixed[own], y[own], y[partner][own], share


def build(args, dataset, device):
    """A network for this run; its weights depend on the seed and the variant alone."""
    torch.manual_seed(run.seed_key(args.seed, "init"))
    model = models.build(args.arch, args.norm, **dataset.model_kwargs)
    models.INITS[args.init](model)
    models.set_noise(model, args.batch_size)
    return model.to(device, memory_format=torch.channels_last)


def parameter_groups(model, args):
    """Fixup's scalars, and its classifier's bias as in its code, learn at --scalar-lr times the
    rate. Weight decay is on all parameters, as there."""
    groups = {1.0: [], args.scalar_lr: []}
    for name, parameter in model.named_parameters():
        scalar = args.norm == "fixup" and ("bias" in name or "scale" in name)
        groups[args.scalar_lr if scalar else 1.0].append(parameter)
    return [{"params": own, "lr_scale": scale} for scale, own in groups.items() if own]


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
        parameter_groups(model, args), args.lr, args.momentum, weight_decay=args.weight_decay,
        nesterov=args.momentum > 0, fused=precision.device.type == "cuda",
    )  # fmt: skip
    loop = run.Loop(rundir, stage, model, optimizer, precision, task.batches, args.epochs)
    warmup = round(args.warmup * task.batches.per_epoch)
    for step in loop:
        x, y = task.batches(step)

        if args.mixup:
            x, y, other, share = mixup(x, y, args.mixup, args.seed, step)
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
        lr = lr_at(step, loop.total, args.lr, warmup, args.schedule)
        loop.step(lr, args.clip)
        sizes = {"embedding": h.square().mean(), "logits": logits.square().mean()}
        loop.log(loss=loss_cls, penalty=extra, accuracy=run.accuracy(logits, y), **sizes)

        if loop.evaluates:
            error = run.evaluate(model, task.held_out, precision)["error"]
            size = loop.means["embedding"]
            loop.report(error=error, train_accuracy=loop.means["accuracy"], final_layer=size)
    return loop.metrics


def log_start(stage, model, dataset, args, rundir):
    """Mean squares of the embedding, the logits and every block before the first step."""
    if not (rundir.dir / rundir.file(stage)).exists():
        order = torch.randperm(len(dataset.train), generator=run.generator(0, "test order"))
        few = dataset.train.take(order[: args.batch_size])
        found = models.mean_squares(model, run.to_float(few.x))
        rundir.scalars(stage, 0, {k: found[k] for k in ("embedding", "logits")})
        rundir.log(stage=stage, epoch=0, step=0, **found)


def tune(name, own, dataset, rundir, precision):
    """The options of a variant with the rate, weight and dropout of least validation error."""
    values = {k: v for k, v in TUNED.items() if k == "lr"}
    if own.penalty != "none":
        values["penalty_weight"] = TUNED["penalty_weight"]
    if own.dropout:
        values["dropout"] = TUNED["dropout"]

    def error_of(options, title):
        model, task = build(options, dataset, precision.device), make_task(dataset, options)
        return train(f"tune-{name}-{title}", model, options, task, rundir, precision)["error"]

    return run.search(name, own, values, error_of, rundir)


# --- main ---------------------------------------------------------------------------------------

SHOWN = {
    "train_accuracy": "train %", "error": "test %", "corrupted": "corrupted %",
    "final_layer": "final layer",
}  # fmt: skip


def main(args):
    device = run.get_device(args.device)
    precision = run.Precision(args.precision, device)
    dataset = data.from_args(args, device)
    variants = {name: options_of(name, args) for name in args.variants}
    for own in variants.values():
        build(own, dataset, device)
    if args.corrupted_images and dataset.image_size < 24:
        raise run.UserError("--corrupted-images: the corruptions need images of 24 pixels or more")
    make_task(dataset, args)
    seeds = range(args.seed, args.seed + args.seeds)
    last = args.variants[0] if len(variants) * args.seeds == 1 else None
    rundir = run.RunDir(args, __file__, precision, last, SHOWN)  # from here on files appear

    if args.tune:
        variants = {k: tune(k, own, dataset, rundir, precision) for k, own in variants.items()}
        dataset = data.from_args(args, device, val_size=0)
    stages = {}  # of every variant the networks of all seeds
    for name in variants:
        stages[name] = [name if args.seeds == 1 else f"{name}-s{seed}" for seed in seeds]
    rundir.plan(**dict.fromkeys(itertools.chain(*stages.values()), args.epochs))
    networks, metrics = {}, {}
    for name, own in variants.items():
        for stage, seed in zip(stages[name], seeds, strict=True):
            own = run.changed(own, seed=seed)
            networks[stage] = build(own, dataset, device)
            task = make_task(dataset, own)
            log_start(stage, networks[stage], dataset, args, rundir)
            metrics[stage] = train(stage, networks[stage], own, task, rundir, precision)
    return report(networks, metrics, stages, dataset, args, rundir, precision)


def report(networks, metrics, stages, dataset, args, rundir, precision):
    """Print the table of medians over seeds; returns {"<metric>/<variant>": median}."""
    errors = {"error": run.errors_of(networks, dataset.test, precision)}
    if args.corrupted_images:
        few = dataset.test.take(slice(0, args.corrupted_images))
        errors["corrupted"] = corruptions.corruption_errors(
            networks, few, precision, args.data_dir, dataset.scale
        )
    found = dict(errors)
    for metric in ("train_accuracy", "final_layer"):
        found[metric] = {stage: own[metric] for stage, own in metrics.items()}
    final, columns = {}, {}
    for metric in (k for k in SHOWN if k in found):
        columns[SHOWN[metric]] = column = {}
        for name, own in stages.items():
            values = [found[metric][stage] for stage in own]
            rundir.log(event="result", variant=name, metric=metric, values=values)
            middle = final[f"{metric}/{name}"] = statistics.median(values)
            column[name] = 100 - middle if metric in errors else middle
    rundir.close(final)
    run.warn_of_chance(columns["test %"], len(dataset.classes))
    run.print_table(columns, "variant")
    print("train, test, corrupted: accuracy, higher is better; final layer: mean square of the")
    print("embedding at the end of training, the growth that BatchNorm prevents")
    print(f"{args.dataset}, {len(dataset.train)} training images, {len(dataset.test)} test images,")
    print(f"  {args.arch}, last epoch, median of {args.seeds} seeds from {args.seed} on")
    paper = "Fixup and the penalty bring a large part of BatchNorm's test accuracy back."
    following = {
        "tensorboard --logdir runs": "growth of the final layer, tag embedding",
        "python fixup_penalty.py --dataset cifar10 --limit 4000 --arch wrn16-1": "real images",
    }
    run.print_findings(paper, verdict(columns), following)
    return final


def verdict(columns):
    """A sentence made of the table: how much of the gap between none and bn comes back."""
    test, size = columns["test %"], columns["final layer"]
    if not {"none", "bn"} <= set(test):
        return "the sentence needs the variants none and bn."
    words = [f"{name} {test[name] - test['none']:+.1f}" for name in test if name != "none"]
    return (
        f"test accuracy against none, in points: {', '.join(words)}; final layer "
        f"{size['none']:.3g} without BatchNorm, {size['bn']:.3g} with it."
    )


if __name__ == "__main__":
    run.cli(main, parse_args)
