"""Deconstructing BatchNorm: without it, keep the final layer small, and see how much comes back.

Paper: Dauphin & Cubuk, "Deconstructing the Regularization of BatchNorm", ICLR 2021. BatchNorm keeps
the embedding before the classifier from growing explosively, at the start and in training. A plain
penalty that does so recovers a large part of its generalisation, about as much as dropout does:

    L = CE(W h, y) + weight * mean_i h_i^2        (or of the logits), over batch and dimensions

Fixup (Zhang, Dauphin & Ma, ICLR 2019) keeps it small at the start: the last layer of every residual
branch and the classifier are zero. A variant is named by its normaliser and words, as none,
none+penalty, fixup+penalty+dropout, bn, none+glorot. BatchNorm's other effects, in our reading:

    noise          no normaliser, the noise of batch statistics (its law: models.BatchNoise)
    bn-population  BatchNorm with running averages as constants: normalisation without noise
    bn-aux         BatchNorm with the statistics of --aux-batch other images

The text at hand of the paper ends in its introduction. Ours, each an option:
  1. penalty      --penalty embedding or logits; --penalty-reduction sum is others' ||h||^2
  2. schedule     cosine, or x0.1 at 1/2 and 3/4 as Fixup's code (--schedule); Nesterov momentum
  3. stem         He like the rest, where Fixup's code has PyTorch's default
  4. clipping     at norm 1 for every variant, for He initialisation without BatchNorm

    python fixup_penalty.py                                      # embedded shapes data, minutes
    python fixup_penalty.py --dataset cifar10 --tune --seeds 10  # the paper's protocol, WRN-28-10
    python fixup_penalty.py --arch wrn16-4 --growth 10,16,28,40  # the final layer at the start
"""

import argparse
import copy
import itertools
import re
import statistics
import time

import torch
import torch.nn.functional as F

from common import corruptions, data, models, run

# --- options ------------------------------------------------------------------------------------

DEFAULTS = {  # per data set: arch, epochs, validation images of --tune
    "shapes": ("resnet8", 8, 1000),
    "cifar10": ("wrn28", 200, 5000),
    "cifar100": ("wrn28", 200, 5000),
    "svhn": ("wrn28", 200, 3257),
    "photographs": ("resnet50", 90, 10_000),  # every tree of images
}
VARIANTS = ["none", "none+penalty", "fixup+penalty", "bn"]
PENALTIES, INITS = ("penalty", "embedding", "logits"), ("he", "glorot")


def parse_args(argv=None):
    parser, floats = run.Parser(__file__, __doc__), run.listed(run.positive(float))
    data.add_arguments(parser)
    group = parser.add_argument_group("model and optimisation")
    group.add_argument("--arch", help="default: resnet8, wrn28 (WRN-28-10), resnet50 by data")
    group.add_argument("--epochs", type=run.positive(int), help="default: 8, 200, 90 by data")
    group.add_argument("--batch-size", type=run.positive(int), default=128)
    group.add_argument("--lr", type=run.positive(float), default=0.1, help="peak rate")
    group.add_argument("--scalar-lr", type=run.positive(float), default=0.1, help="Fixup's, x lr")
    group.add_argument("--schedule", default="cosine", choices=["cosine", "steps"])
    group.add_argument("--warmup", type=run.nonnegative(float), default=1.0, help="epochs")
    group.add_argument("--momentum", type=run.nonnegative(float), default=0.9)
    group.add_argument("--weight-decay", type=run.nonnegative(float), default=5e-4)
    group.add_argument("--clip", type=run.nonnegative(float), default=1.0, help="norm; 0: none")
    group.add_argument("--mixup", type=run.nonnegative(float), default=0.0, help="alpha; 0: none")
    group = parser.add_argument_group("method")
    group.add_argument("--variants", type=run.listed(str), help=f"default: {','.join(VARIANTS)}")
    group.add_argument("--norm", help=f"one variant only: {', '.join(models.NORMS)}")
    group.add_argument("--init", choices=["he", "glorot", "fixup"], help="default: he, fixup")
    group.add_argument("--penalty", default="none", choices=["embedding", "logits", "none"])
    group.add_argument("--penalty-weight", type=run.nonnegative(float), default=0.01)
    group.add_argument("--penalty-reduction", default="mean", choices=["mean", "sum"])
    group.add_argument("--dropout", type=run.fraction, default=0.0, help="+dropout: 0 means 0.3")
    group.add_argument("--aux-batch", type=run.positive(int), default=1024, help="of bn-aux")
    group.add_argument("--noise-batch", type=run.positive(int), help="default: --batch-size")
    group.add_argument("--seeds", type=run.positive(int), default=1, help="report their median")
    group.add_argument("--tune", action="store_true", help="on --val-size images; then use all")
    group.add_argument("--tune-lrs", type=floats, default=[0.03, 0.1, 0.3])
    group.add_argument("--tune-weights", type=floats, default=[0.001, 0.01, 0.1])
    group.add_argument("--tune-dropouts", type=run.listed(run.fraction), default=[0.1, 0.3, 0.5])
    group.add_argument("--tune-epochs", type=run.positive(int), help="default: --epochs")
    group.add_argument("--growth", type=run.listed(run.positive(int)), metavar="DEPTH,DEPTH")
    group.add_argument("--growth-epochs", type=run.nonnegative(int), default=0)
    group = parser.add_argument_group("evaluation")
    group.add_argument("--eval-every", type=run.positive(int), default=5, help="epochs")
    group.add_argument(
        "--corrupted-images", type=run.nonnegative(int), default=500, metavar="N",
        help="test images for the corrupted column of the table at the end; 0: leave it out",
    )  # fmt: skip
    run.add_arguments(parser)
    args = run.parse(parser, argv)
    defaults = DEFAULTS.get(args.dataset.removesuffix(".1"), DEFAULTS["photographs"])
    arch, epochs, val_size = defaults
    args.arch, args.epochs = args.arch or arch, args.epochs or epochs
    args.tune_epochs = args.tune_epochs or args.epochs
    args.val_size = args.val_size or (val_size if args.tune else 0)
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
    if args.growth and (args.tune or args.seeds > 1):
        raise run.UserError("--growth: of one seed and fixed options, without --tune and --seeds")
    return args


def options_of(name, args):
    """The options of one variant: `args` with norm, init, penalty and dropout as its name says."""
    norm, *words = name.split("+")
    known = (*PENALTIES, "dropout", *INITS)
    if norm not in models.NORMS or not set(words) <= set(known):
        text = f"({', '.join(models.NORMS)}), then any of +{', +'.join(known)}"
        raise run.UserError(f"variant {name}: must be one normaliser {text}")
    own = argparse.Namespace(**vars(args) | {"norm": norm})
    kind, start = args.penalty, args.init or ("fixup" if norm == "fixup" else "he")
    kinds = {"penalty": "embedding" if kind == "none" else kind}
    own.penalty = next((kinds.get(w, w) for w in words if w in PENALTIES), "none")
    own.dropout = (args.dropout or 0.3) if "dropout" in words else 0.0
    own.init = next((w for w in words if w in INITS), start)
    if norm == "fixup" and own.init != "fixup":
        raise run.UserError(f"variant {name}: fixup is an initialisation; --init {own.init} is not")
    if own.init == "fixup" and norm not in ("fixup", "none", "noise"):
        raise run.UserError(f"--init fixup takes no normaliser: norm fixup or none, not {norm}")
    if norm == "bn-aux" and args.mixup:
        raise run.UserError("bn-aux: the auxiliary images are not mixed, so --mixup must be 0")
    return own


# --- method -------------------------------------------------------------------------------------


def penalty(kind, h, logits, reduction):
    """Mean over samples of the mean (or sum) over dimensions of h^2 (N,D) or logits^2 (N,K)."""
    if kind == "none":
        return torch.zeros((), device=h.device)
    squares = (h if kind == "embedding" else logits).square()
    return squares.mean() if reduction == "mean" else squares.sum(1).mean()


def objective(net, x, y, args):
    """(CE, penalty before its weight, logits, embedding, labels) of this process's share of one
    batch. Mixup is one Beta(alpha, alpha) share per global batch; it and dropout draw from the
    global generators."""
    other = y
    if args.mixup:
        share = torch.distributions.Beta(args.mixup, args.mixup).sample().item()
        partner = torch.randperm(len(y)).to(y.device)
        x, other = share * x + (1 - share) * x[partner], y[partner]
    x, y, other = run.share(x, y, other)
    logits, h = net(x, with_features=True, dropout=args.dropout)
    ce = F.cross_entropy(logits, y)
    if args.mixup:
        ce = share * ce + (1 - share) * F.cross_entropy(logits, other)
    return ce, penalty(args.penalty, h, logits, args.penalty_reduction), logits, h, y


def build(args, dataset, device):
    """A network for this run; its weights depend on the seed and the variant alone."""
    torch.manual_seed(run.seed_key(args.seed, "init"))
    model = models.build(args.arch, args.norm, **dataset.model_kwargs)
    getattr(models, f"init_{args.init}")(model)
    for module in model.modules():
        if isinstance(module, models.BatchNoise):
            module.images = args.noise_batch
    return model.to(device, memory_format=torch.channels_last)


def make_optimizer(model, args):
    """SGD. Fixup's scalars, and its classifier's bias as in its code, are a group of their own at
    --scalar-lr times the rate; weight decay is on all, as there."""
    groups = {1.0: [], args.scalar_lr: []}
    for name, parameter in model.named_parameters():
        scalar = args.norm == "fixup" and ("bias" in name or "scale" in name)
        groups[args.scalar_lr if scalar else 1.0].append(parameter)
    groups = [{"params": group, "rate": rate} for rate, group in groups.items() if group]
    rest = {"weight_decay": args.weight_decay, "nesterov": args.momentum > 0}
    return torch.optim.SGD(groups, args.lr, args.momentum, **rest)


def first_images(images, count):
    """So many, mixed, for trees are in the order of their classes; float (N,3,S,S)."""
    return run.to_float(images.take(data.shuffled(len(images.y))[:count]).x)


@torch.no_grad()
def sizes(model, x):
    """Mean squares in training mode on images x: of the embedding, the logits and, in order, the
    output of every residual block. The model itself is left as it was."""
    model, blocks = copy.deepcopy(model).train(), []
    models.measure_statistics(model, x)
    for module in model.modules():
        if hasattr(module, "branch"):
            module.register_forward_hook(lambda m, i, out: blocks.append(out.square().mean()))
    logits, h = model(x, with_features=True)
    values = torch.stack([h.square().mean(), logits.square().mean(), *blocks]).tolist()
    return {"embedding": values[0], "logits": values[1], "blocks": values[2:]}


# --- training -----------------------------------------------------------------------------------


def lr_at(step, total, peak, warmup, schedule="cosine"):
    """Linear warm-up over `warmup` steps, then half a cosine to 0, or a tenth at 1/2 and 3/4."""
    if step < warmup:
        return peak * (step + 1) / warmup
    if schedule == "steps":
        return peak * 0.1 ** ((2 * step >= total) + (4 * step >= 3 * total))
    angle = torch.pi * (step - warmup) / max(total - warmup, 1)
    return 0.5 * peak * (1 + torch.cos(torch.tensor(angle, dtype=torch.float64)).item())


def train(stage, file, args, dataset, record, precision, device):
    """Build and train the network of `args`; return it and its final metrics. stage: the prefix of
    its scalars; file: its checkpoint, from which it goes on (or is skipped) when resumed."""
    model = build(args, dataset, device)
    settings = args.augment, dataset.flip, not args.mixup  # mixed with rows of other processes
    batches = data.Batches(dataset.train, args.batch_size, args.seed, *settings)
    if args.norm == "bn-aux":
        size = min(args.aux_batch, len(dataset.train.y))
        aux = data.Batches(dataset.train, size, f"{args.seed}-aux", *settings)
    total, warmup = args.epochs * batches.per_epoch, round(args.warmup * batches.per_epoch)
    optimizer = make_optimizer(model, args)
    guard = run.Guard(record, file, model, optimizer, precision, batches.per_epoch, total)
    net, metrics = guard.net, guard.state.get("metrics", {})
    if not guard.start:
        few = first_images(dataset.train, args.batch_size)
        found = sizes(model, few)
        record.scalars(0, {f"{stage}/{k}": found[k] for k in ("embedding", "logits")})
        record.record(stage=stage, epoch=0, step=0, **found)
    sums, count, clock = torch.zeros(6, device=device), 0, time.perf_counter()
    for step in range(guard.start, total):
        model.train()
        lr = lr_at(step, total, args.lr, warmup, args.schedule)
        for group in optimizer.param_groups:
            group["lr"] = lr * group["rate"]
        torch.manual_seed(run.seed_key(args.seed, "step", step))  # noise, as a function of it
        x, y = batches(step)
        with precision.autocast():
            if args.norm == "bn-aux":
                models.measure_statistics(model, aux(step)[0])
            ce, extra, logits, h, y = objective(net, x, y, args)
        loss = ce + args.penalty_weight * extra
        optimizer.zero_grad(set_to_none=True)
        precision.scaler.scale(loss).backward()
        precision.scaler.unscale_(optimizer)
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), args.clip or float("inf"))
        correct = (logits.detach().argmax(1) == y).float().mean()
        squares = [z.detach().square().mean() for z in (h, logits)]
        if guard.fine(step, lr, loss, norm):
            precision.scaler.step(optimizer)
            norm = norm.nan_to_num(0, 0, 0)  # of steps that the fp16 scaler leaves out
            sums += torch.stack([ce.detach(), extra.detach(), correct, norm, *squares])
            count += 1
        precision.scaler.update()

        done = step + 1
        if done % args.log_every == 0 or done % batches.per_epoch == 0 or done == total:
            guard.check()  # sync point
            ce, extra, correct, norm, *squares = run.mean(sums / max(count, 1)).tolist()
            rate = count * args.batch_size / (time.perf_counter() - clock)
            values = {"loss": ce, "accuracy": 100 * correct, "grad_norm": norm, "lr": lr}
            values |= {"images_per_s": rate, "penalty": extra}
            values |= {"embedding": squares[0], "logits": squares[1]}
            record.scalars(done, {f"{stage}/{k}": v for k, v in values.items()})
            text = f"{stage} epoch {done / batches.per_epoch:.1f}/{args.epochs}  loss {ce:.3f}"
            text += f"  train {100 * correct:.1f} %  {rate:.0f} img/s"
            record.progress(done, total, text)
            sums, count, clock = torch.zeros_like(sums), 0, time.perf_counter()
        if done % batches.per_epoch == 0:
            epoch = done // batches.per_epoch
            evaluated = epoch % args.eval_every == 0 or done == total
            if evaluated:
                metrics = run.evaluate(model, *(dataset.val or dataset.test), precision)
                metrics |= {"embedding": squares[0], "logits": squares[1]}
                record.scalars(done, {f"{stage}/error": metrics["error"]})
                text += f"  error {metrics['error']:.2f}"
            fresh = metrics if evaluated else {}
            record.record(stage=stage, epoch=epoch, step=done, loss=ce, penalty=extra, eval=fresh)
            record.progress(done, total, text, done=True)
            clock = time.perf_counter()
        guard.save(done, stage=stage, metrics=metrics, dataset=args.dataset)
    return model.eval(), metrics


def tune(name, own, record, *rest):
    """The options of a variant with the rate, weight and dropout of least validation error (a
    trial that diverges: 100 %), and no validation split."""
    weights = own.tune_weights if own.penalty != "none" else [own.penalty_weight]
    dropouts = own.tune_dropouts if own.dropout else [0.0]
    trials = []
    for values in itertools.product(own.tune_lrs, weights, dropouts):
        chosen = dict(zip(("lr", "penalty_weight", "dropout"), values, strict=True))
        trial = argparse.Namespace(**vars(own) | chosen | {"epochs": own.tune_epochs})
        title = f"tune-{name}-" + "-".join(f"{v:g}" for v in values)
        try:
            error = train(title, f"{title}.pt", trial, *rest)[1]["error"]
        except run.Diverged:
            error = 100.0
        record.record(event="trial", variant=name, val_error=error, **chosen)
        trials.append((error, chosen))
    error, chosen = min(trials, key=lambda trial: trial[0])
    record.record(event="tuned", variant=name, val_error=error, **chosen)
    print(f"{name}: validation error {error:.2f} % with {chosen}")
    return argparse.Namespace(**vars(own) | chosen)


# --- main ---------------------------------------------------------------------------------------


def growth(variants, archs, dataset, record, precision, device):
    """Table of `sizes` of every variant at every depth, at the start and after --growth-epochs (the
    penalty acts in training only). Returns {when/what/variant/arch: value}."""
    rows, final = [], {}
    for (name, own), own.arch in itertools.product(variants.items(), archs):
        few, own.epochs = first_images(dataset.train, own.batch_size), own.growth_epochs
        found, key = {"start": sizes(build(own, dataset, device), few)}, f"{name}-{own.arch}"
        if own.epochs:
            model, _ = train(key, f"{key}.pt", own, dataset, record, precision, device)
            found["later"] = sizes(model, few)
        rows.append([f"{name} {own.arch}"])
        for when, what in itertools.product(found, ("embedding", "logits")):
            final[f"{when}/{what}/{name}/{own.arch}"] = value = found[when][what]
            rows[-1].append(f"{value:.3g}")
            record.scalars(own.growth[archs.index(own.arch)], {f"{when}_{what}/{name}": value})
        record.record(event="growth", variant=name, arch=own.arch, **found)
    record.close(final)
    header = ["mean square", *["embedding", "logits"] * len(found)]
    print(f"\n{run.table(rows, header)}\nat the start, then after {own.epochs} epochs")
    return final


def corrupted_error(networks, images, precision, data_dir, scale=None):
    """{name: mean error (%)} over the 15 corruptions and 5 severities, generated with seed 0."""
    sums, part = dict.fromkeys(networks, 0.0), run.rows(len(images.y))
    index, mine = torch.arange(len(images.y), device=images.x.device)[part], images.take(part)
    for name in corruptions.NAMES:
        for severity in range(1, 6):
            options = {"index": index, "data_dir": data_dir, "scale": scale}
            x = corruptions.corrupt(mine.x, name, severity, **options)
            for key, model in networks.items():
                sums[key] += run.evaluate(model, x, mine.y, precision, mine=True)["error"]
    return {key: value / 75 for key, value in sums.items()}


def main(args):
    device = run.get_device(args.device)
    precision = run.Precision(args.precision, device)
    dataset = data.from_args(args, device)
    # Whatever may refuse an option comes before the run directory.
    variants = {name: options_of(name, args) for name in args.variants}
    archs = [re.sub(r"\d+", str(d), args.arch, count=1) for d in args.growth or ()] or [args.arch]
    for own, own.arch in itertools.product(variants.values(), archs):
        build(own, dataset, device)
    data.Batches(dataset.train, args.batch_size, args.seed)
    tags = [f"{k}/{name}" for k in ("error", "corrupted") for name in variants]
    record = run.Run(args, __file__, tags)
    if args.growth:
        return growth(variants, archs, dataset, record, precision, device)
    # One chart per quantity with the curves of all variants, in TensorBoard's CUSTOM SCALARS.
    seeds = range(args.seed, args.seed + args.seeds)
    stages = {f"{name}-s{seed}": (name, seed) for name in variants for seed in seeds}
    charts = ("loss", "accuracy", "error", "embedding", "logits", "penalty")
    charts = {k: [f"{stage}/{k}" for stage in stages] for k in charts}
    run.custom_scalars(record.writer, charts)
    if args.tune:
        rest = (dataset, record, precision, device)
        variants = {name: tune(name, own, record, *rest) for name, own in variants.items()}
        dataset = data.from_args(args, device, val_size=0)
    networks, results = {}, {}
    for stage, (name, seed) in stages.items():
        own = argparse.Namespace(**vars(variants[name]) | {"seed": seed})
        file = f"{stage}.pt" if len(stages) > 1 else "last.pt"
        networks[stage], values = train(stage, file, own, dataset, record, precision, device)
        results[stage] = values | run.evaluate(networks[stage], *dataset.test, precision)
    if args.corrupted_images:
        subset = dataset.test.take(slice(0, args.corrupted_images))
        errors = corrupted_error(networks, subset, precision, args.data_dir, dataset.scale)
        for stage, value in errors.items():
            results[stage]["corrupted"] = value

    final, rows = {}, []
    columns = ["error", "corrupted"] if args.corrupted_images else ["error"]
    for name, key in itertools.product(variants, [*columns, "embedding", "logits"]):
        values = [results[stage][key] for stage, (own, _) in stages.items() if own == name]
        final[f"{key}/{name}"] = statistics.median(values)
        record.record(event="result", variant=name, metric=key, values=values)
    for name, key in itertools.product(variants, columns):  # share of the way from none to bn
        none, own, bn = (final.get(f"{key}/{n}") for n in ("none", name, "bn"))
        if None not in (none, bn) and none != bn:
            final[f"{key}_recovered/{name}"] = 100 * (none - own) / (none - bn)
    record.close(final)
    for name in variants:
        shares = [final.get(f"{key}_recovered/{name}") for key in columns]
        rows.append([name, *(100 - final[f"{key}/{name}"] for key in columns)])
        rows[-1] += ["-" if share is None else f"{share:.0f} %" for share in shares]
        rows[-1] += [f"{final[f'{key}/{name}']:.3g}" for key in ("embedding", "logits")]
    header = ["clean", *columns[1:], *["of gap"] * len(columns), "embedding", "logits"]
    print(f"\n{run.table(rows, ['median accuracy %', *header])}")
    print(f"{args.dataset} test, {len(dataset.test.y)} images, last epoch, seeds {list(seeds)}")
    if args.corrupted_images:
        texture = corruptions.frost_textures(data_dir=args.data_dir)[1]
        print(f"corrupted: mean over 15 corruptions x 5 severities, {len(subset.y)} images,")
        print(f"  generated (seed 0), frost: {texture}")
    print("of gap: share of the way from none to bn; embedding, logits: mean square at the end")
    return final


if __name__ == "__main__":
    run.cli(main, parse_args)
