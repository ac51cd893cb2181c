"""NoFrost: adversarial training without normalisers.

Paper: Wang et al., "Removing Batch Normalization Boosts Adversarial Training", ICML 2022, arXiv
2207.01156. Clean and adversarial images have different statistics; BatchNorm must serve both with
one set, and adversarial training pays for that in clean accuracy. NoFrost takes the normalisers
out of the network (--norm nf: an NF-ResNet) and trains on

    L = (1 - lam) CE(f(x), y) + lam CE(f(x_adv), y),

x_adv by PGD on the cross-entropy with the network in eval mode, CE with label smoothing. NoFrost*
(--streams clean,deepaug,tda,adv) adds streams of augmented images and takes the mean of the
streams' losses.

From the authors' code: the loss, lam 0.5, smoothing 0.1, eps 8/255, 10 steps of min(1.25 eps,
eps + 4)/10, and the whole recipe of --dataset imagenet (90 epochs, batch 256, rate 0.1 per 256
images, cosine by epochs, Nesterov, weight decay 5e-5 on everything, dropout 0.25, stochastic depth
0.1, no warm-up, no clipping). Ours, for the paper has no small images: the recipe of the other
data sets (RECIPES; warm-up, gradients clipped at norm 1, weight decay 5e-4, rate per step) and
NF networks for them (--arch wrnD-K, resnetN with --norm nf).

    python nofrost.py                                    # embedded shapes data, minutes on a CPU
    python nofrost.py --dataset cifar10 --arch wrn28-10  # the full job on a GPU
    python nofrost.py --dataset cifar10 --norm bn        # adversarial training with BatchNorm
    python nofrost.py --dataset cifar10 --norm dual-bn   # statistics for clean and adversarial
    python nofrost.py --dataset cifar10 --lam 0          # normal training
    python nofrost.py --dataset cifar10 --loss trades

The robust accuracy of the paper (22 to 24 %, ResNet-50) is PGD-20's. Under stronger attacks the
official network keeps 5.3 % (APGD-CE, 100 steps) and 1.3 % (AutoAttack); see the README.
"""

import argparse
import math
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torchvision.utils import make_grid

from common import attacks, data, models, run
from common.data import folders, trees

# --- options ------------------------------------------------------------------------------------

RECIPES = {  # per data set, where it is not told otherwise; "small" is for all that is not named
    "shapes": {"arch": "wrn10-1", "epochs": 8, "attack_steps": 5},
    "imagenet": {
        "arch": "nf_resnet50", "epochs": 90, "batch_size": 256, "lr": 0.1, "warmup": 0.0,
        "schedule": "epoch", "weight_decay": 5e-5, "clip": 0.0, "dropout": 0.25, "drop_path": 0.1,
    },
    "small": {
        "arch": "wrn28-10", "epochs": 60, "batch_size": 128, "lr": 0.1, "warmup": 1.0,
        "schedule": "step", "weight_decay": 5e-4, "clip": 1.0, "dropout": 0.0, "drop_path": 0.0,
        "attack_steps": 10,
    },
}  # fmt: skip
STREAMS = ("clean", "deepaug", "tda", "adv")
JUDGES = ("pgd-20", "pgd-100", "apgd-ce-100")  # attacks of the table at the end
NORMS = ("nf", "none", "gn", "in", "ln", "bn", "dual-bn")
SEPARATE = ("bn", "dual-bn")  # normalisers for which clean and adversarial images go separately


def parse_args(argv=None):
    parser = run.Parser(__file__, __doc__)
    data.add_arguments(parser)
    group = parser.add_argument_group("model and optimisation (default: by data set, see RECIPES)")
    group.add_argument(
        "--arch", help="wrn10-1 for shapes, nf_resnet50 (resnet50) for trees, else wrn28-10"
    )
    group.add_argument("--norm", default="nf", choices=NORMS)
    group.add_argument("--epochs", type=run.positive(int))
    group.add_argument("--batch-size", type=run.positive(int))
    group.add_argument("--lr", type=run.positive(float), help="peak rate; of trees: per 256 images")
    group.add_argument("--schedule", choices=["step", "epoch"], help="of the cosine to 0")
    group.add_argument("--warmup", type=run.nonnegative(float), help="epochs")
    group.add_argument("--momentum", type=run.nonnegative(float), default=0.9)
    group.add_argument("--weight-decay", type=run.nonnegative(float))
    group.add_argument("--clip", type=run.nonnegative(float), help="norm; 0: none")
    group.add_argument("--agc", type=run.nonnegative(float), default=0.0, help="adaptive; 0: none")
    group.add_argument("--dropout", type=run.fraction, help="before the last layer")
    group.add_argument("--drop-path", type=run.fraction, help="stochastic depth, last block")
    group = parser.add_argument_group("method")
    group.add_argument("--lam", type=float, default=0.5, help="weight of adv: 0 to 1")
    group.add_argument("--loss", default="mixture", choices=["mixture", "trades"])
    group.add_argument("--beta", type=run.nonnegative(float), default=6.0, help="of trades")
    group.add_argument("--label-smoothing", type=run.fraction, help="default: 0.1; trades: 0")
    group.add_argument("--streams", type=run.listed(str), default=["clean", "adv"])
    group.add_argument("--deepaug-dir", help="class folders of DeepAugment images, for deepaug")
    group = parser.add_argument_group("attack")
    group.add_argument("--eps", type=run.positive(float), default=8.0, help="radius, of 255")
    group.add_argument("--alpha", type=run.positive(float), help="default: see pgd")
    group.add_argument("--attack-steps", type=run.positive(int), help="default: 10; shapes: 5")
    group.add_argument("--attack-norm", default="linf", choices=["linf", "l2"])
    group.add_argument("--attack-mode", default="eval", choices=["eval", "train"])
    group.add_argument(
        "--capture", action=argparse.BooleanOptionalAction, default=False,
        help="on a GPU, run each attack step as one CUDA graph",
    )  # fmt: skip
    group = parser.add_argument_group("evaluation")
    group.add_argument("--eval-every", type=run.positive(int), default=5, help="epochs")
    group.add_argument("--probe-images", type=run.positive(int), default=200, metavar="N")
    group.add_argument(
        "--robust-images", type=run.nonnegative(int), default=500, metavar="N",
        help="test images attacked for the table at the end; 0: leave it out",
    )  # fmt: skip
    run.add_arguments(parser)
    args = run.parse(parser, argv)
    recipe = "imagenet" if args.dataset in data.PHOTOGRAPHS else args.dataset
    if recipe == "imagenet" and args.norm != "nf":
        args.arch = args.arch or "resnet50"
    for key, value in (RECIPES["small"] | RECIPES.get(recipe, {})).items():
        if getattr(args, key) is None:
            setattr(args, key, value)
    if args.label_smoothing is None:
        args.label_smoothing = 0.0 if args.loss == "trades" else 0.1
    check_options(args)
    warning = attacks.check_eps(args.eps, args.attack_norm)
    if warning and is_attacked(args):
        print(f"warning: {warning}")
    return args


def is_attacked(args):
    """Whether adversarial images are trained on."""
    return "adv" in args.streams and (args.lam > 0 or args.loss == "trades")


def check_options(args):
    """Raise UserError for options that do not go together."""
    if not 0 <= args.lam <= 1:
        raise run.UserError(f"--lam {args.lam:g}: must be from 0 (clean only) to 1 (adversarial)")
    unknown = set(args.streams) - set(STREAMS)
    if unknown or "clean" not in args.streams or len(set(args.streams)) < len(args.streams):
        raise run.UserError(
            f"--streams {','.join(args.streams)}: clean, and any of {', '.join(STREAMS[1:])}, once"
        )
    args.streams.sort(key=STREAMS.index)
    mixture = args.streams == ["clean", "adv"]
    if args.loss == "trades" and not mixture:
        raise run.UserError("--loss trades: has its own two terms, so no --streams")
    if args.lam != 0.5 and (args.loss == "trades" or (args.lam and not mixture)):
        raise run.UserError("--lam: of clean and adv alone; trades has --beta, streams their mean")
    if args.beta != 6 and args.loss != "trades":
        raise run.UserError("--beta: goes with --loss trades")
    if args.norm == "dual-bn" and not is_attacked(args):
        raise run.UserError(
            "--norm dual-bn: half of it is idle without adversarial images; take bn"
        )
    if args.loss == "trades" and args.norm == "dual-bn":
        raise run.UserError("--loss trades: compares two outputs of one network, so no dual-bn")
    if "deepaug" in args.streams and not args.deepaug_dir:
        raise run.UserError(
            "--streams deepaug: its images cannot be shipped; give --deepaug-dir, a folder with "
            "one folder of images per class (made by the DeepAugment code of imagenet-r)"
        )


# --- method -------------------------------------------------------------------------------------


def perturb(model, x, y, args, precision, step, graphs=None):
    """(x_adv, {zero_grad, loss}): PGD on images x (N,3,H,W) whose start is a function of the step.
    graphs: an attacks.Graphs, for --capture.

    TRADES (Zhang et al. 2019) instead climbs KL(f(x) || f(x_adv)) from x + 0.001 N(0,1).
    """
    rng, loss = run.generator(args.seed, "attack", step, device=x.device), "ce"
    shape = (len(x) * run.world(), *x.shape[1:])  # drawn for the global batch
    if args.loss == "trades":
        with attacks.frozen(model, args.attack_mode) as net, precision.autocast():
            y, loss = F.log_softmax(net(x).float(), 1), divergence
        noise = torch.randn(shape, generator=rng, device=x.device)
        noise = (noise * (0.001 * 255 / args.eps)).clamp_(-1, 1)
    else:
        noise = attacks.unit_noise(shape, args.attack_norm, rng)
    noise = noise[run.rows(len(noise))]
    return attacks.pgd(
        model, x, y, args.eps, args.alpha, args.attack_steps, args.attack_norm, loss, noise=noise,
        precision=precision, mode=args.attack_mode, capture=graphs, check=False,
        return_stats=True,
    )  # fmt: skip


def divergence(logits, clean, target=None):
    """KL(clean || adversarial) per image (N,), of log-probabilities `clean` and logits (N,K)."""
    return F.kl_div(F.log_softmax(logits, 1), clean, reduction="none", log_target=True).sum(1)


def forward(model, streams, args, precision):
    """Logits {stream: (N,K)} of images {stream: (N,3,H,W)}. With BatchNorm each stream goes
    through by itself, for the statistics are those of a batch; else all together."""
    with precision.autocast():
        if args.norm not in SEPARATE:
            logits = model(torch.cat(list(streams.values())), dropout=args.dropout)
            return dict(zip(streams, logits.split([len(x) for x in streams.values()]), strict=True))
        logits = {}
        for name, x in streams.items():
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
        terms["adv"] = divergence(logits["adv"], clean).mean()
        return terms["clean"] + args.beta * terms["adv"], terms
    if list(terms) == ["clean", "adv"]:
        return (1 - args.lam) * terms["clean"] + args.lam * terms["adv"], terms
    return sum(terms.values()) / len(terms), terms


def clip_adaptively(parameters, ratio, eps=1e-3):
    """Adaptive gradient clipping (Brock et al. 2021, eq. 3): the gradient of each output unit at
    most `ratio` times the norm of its weights, for which `eps` stands in where they are smaller.
    In place; biases and gains, which have no fan-in, are single units."""
    for p in parameters:
        if p.grad is None:
            continue
        axes = tuple(range(1, p.ndim)) if p.ndim > 1 else (0,)
        size, most = (
            torch.linalg.vector_norm(t.detach(), dim=axes, keepdim=True) for t in (p.grad, p)
        )
        p.grad.mul_((most.clamp_min(eps) * ratio / size.clamp_min(1e-6)).clamp_max(1))


def grey(x):
    """Luma (N,1,H,W) of RGB images, as torchvision's rgb_to_grayscale."""
    r, g, b = x.unbind(1)
    return (0.2989 * r + 0.587 * g + 0.114 * b).unsqueeze(1)


def turn_hue(x, turns):
    """RGB images (N,3,H,W) in [0,1] with the hue of HSV moved by `turns` (N,1,1) of a circle."""
    high, least = x.amax(1), x.amin(1)
    chroma, (r, g, b) = high - least, x.unbind(1)
    safe = chroma.clamp_min(1e-8)
    hue = torch.where(high == r, (g - b) / safe % 6, (b - r) / safe + 2)
    hue = torch.where((high == b) & (high != r) & (high != g), (r - g) / safe + 4, hue)
    hue = hue + 6 * turns
    k = [(n + hue) % 6 for n in (5, 3, 1)]
    return torch.stack([high - chroma * torch.minimum(i, 4 - i).clamp(0, 1) for i in k], 1)


def debias_texture(x, generator):
    """Texture-debiasing augmentation of images x (N,3,H,W) in [0,1], after the authors' code: with
    probability 0.5 {with 0.8 colour jitter (brightness, contrast, saturation 0.8, hue 0.2, in an
    order drawn for the batch), with 0.2 to grey}. Crop and flip are the loader's."""

    def draw(low, high):
        values = torch.rand(len(x), 1, 1, 1, generator=generator, device=generator.device)
        return (low + (high - low) * values).to(x.device)

    def blend(a, b, factor):
        return torch.lerp(b, a, factor).clamp_(0, 1)

    factors, turns = [draw(0.2, 1.8) for _ in range(3)], draw(-0.2, 0.2)[:, 0]
    steps = [
        lambda z: blend(z, torch.zeros_like(z), factors[0]),
        lambda z: blend(z, grey(z).mean((2, 3), keepdim=True).expand_as(z), factors[1]),
        lambda z: blend(z, grey(z).expand_as(z), factors[2]),
        lambda z: turn_hue(z, turns),
    ]
    out = x
    for i in torch.randperm(4, generator=generator, device=generator.device).tolist():
        out = steps[i](out)
    chosen, jittered, to_grey = draw(0, 1) < 0.5, draw(0, 1) < 0.8, draw(0, 1) < 0.2
    out = torch.where(jittered, out, x)
    out = torch.where(to_grey, grey(out).expand_as(out), out)
    return torch.where(chosen, out, x)


def stream_images(name, args, dataset, device):
    """data.Images of a stream: the training set, for deepaug the files of --deepaug-dir (in memory
    where the training set is). Crops of photographs take 64 % and more for tda (else 8 %)."""
    images = dataset.train
    files = isinstance(images.x, folders.Files)
    if name == "deepaug":
        listing = trees.listed(Path(args.deepaug_dir))
        y = torch.from_numpy(trees.labels_of(listing, dataset.classes))
        x = folders.Files(listing, None, dataset.image_size, strict=args.strict)
        images = data.Images(x if files else x[torch.arange(len(x))], y).to(device)
    if name == "tda" and files:
        images = images.subset(slice(None))
        images.x.scale = (0.64, 1.0)
    return images


def build(args, dataset, device):
    """The network; its weights depend on the seed and the options alone."""
    torch.manual_seed(run.seed_key(args.seed, "init"))
    model = models.build(args.arch, args.norm, **dataset.model_kwargs)
    for block in model.modules():  # as the authors' networks with BatchNorm: branches start at zero
        if args.dataset in data.PHOTOGRAPHS and isinstance(block, models.Bottleneck):
            for name, gain in block.bn3.named_parameters():
                if args.norm in SEPARATE and name.endswith("weight"):
                    torch.nn.init.zeros_(gain)
    models.set_drop_path(model, args.drop_path)
    return model.to(device, memory_format=torch.channels_last)


# --- training -----------------------------------------------------------------------------------


def lr_at(step, total, peak, warmup):
    """Linear warm-up over `warmup` steps, then half a cosine to 0 at `total`."""
    if step < warmup:
        return peak * (step + 1) / warmup
    return 0.5 * peak * (1 + math.cos(math.pi * (step - warmup) / max(total - warmup, 1)))


def robust_error(model, images, attack, args, precision, statistics="adversarial"):
    """Error (%) under an attack of common/attacks, from fixed starts, judged in fp32."""
    models.use_statistics(model, statistics)
    wrong, size = 0, min(250, -(-len(images.y) // run.world()))
    for i, (x, y) in enumerate(zip(images.x.split(size), images.y.split(size), strict=True)):
        if i % run.world() == run.rank():
            right = run.predict(model, x).argmax(1) == y
            x, y, index = run.to_float(x)[right], y[right], size * i + right.nonzero()[:, 0]
            settings = args.eps, args.attack_norm, 0, index, precision
            _, fooled, _ = attacks.attack(model, x, y, attack, *settings)
            wrong += (~right).sum().item() + fooled.sum().item()
    models.use_statistics(model, "adversarial")
    return 100 * run.summed(torch.tensor(wrong)).item() / len(images.y)


def show_attack(record, model, x, y, args, precision, step):
    """A picture: rows of clean images, adversarial images, and their difference (grey: none)."""
    x_adv, _ = perturb(model, x, y, args, precision, step)
    rows = [x, x_adv, ((x_adv - x) * (127.5 / args.eps) + 0.5).clamp(0, 1)]
    record.writer.add_image("attack", make_grid(torch.cat(rows), nrow=len(x)), step)


def train(model, args, batches, held_out, selects, record, precision):
    """Train `model` in place and return its final metrics.

    batches: {stream: data.Batches}; held_out: images whose first --probe-images are attacked after
    every epoch; selects: whether the best epoch is kept (best.pt), by its accuracy under this
    attack, without adversarial training by the clean one.
    """
    device, per_epoch = next(model.parameters()).device, batches["clean"].per_epoch
    total, warmup = args.epochs * per_epoch, round(args.warmup * per_epoch)
    peak = args.lr * (args.batch_size / 256 if args.dataset in data.PHOTOGRAPHS else 1)
    attacked = is_attacked(args)
    optimizer = torch.optim.SGD(
        model.parameters(), peak, args.momentum, weight_decay=args.weight_decay,
        nesterov=args.momentum > 0,
    )  # fmt: skip
    guard = run.Guard(record, "last.pt", model, optimizer, precision, per_epoch, total)
    metrics, best = guard.state.get("metrics", {}), guard.state.get("best", -1.0)
    probe = held_out.take(slice(0, args.probe_images))
    names = [s for s in args.streams if s != "adv" or attacked]
    graphs = attacks.Graphs() if args.capture else None
    sums, count, clock = torch.zeros(len(names) + 5, device=device), 0, time.perf_counter()
    for step in range(guard.start, total):
        model.train()
        floored = args.schedule == "epoch" and step >= warmup
        at = max(step // per_epoch * per_epoch, warmup) if floored else step
        lr = lr_at(at, total, peak, warmup)
        optimizer.param_groups[0]["lr"] = lr
        torch.manual_seed(run.seed_key(args.seed, "step", step))  # dropout, as a function of it
        images, labels = {}, {}
        for name, batch in batches.items():
            images[name], labels[name] = batch(step)
        if "tda" in images:
            images["tda"] = debias_texture(images["tda"], run.generator(args.seed, "tda", step))
        images, labels = ({k: run.share(v)[0] for k, v in d.items()} for d in (images, labels))
        stats = {"zero_grad": torch.zeros((), device=device)}
        if attacked:
            x, y = images["clean"], labels["clean"]
            images["adv"], stats = perturb(model, x, y, args, precision, step, graphs)
            labels["adv"] = y
        logits = forward(guard.net, {k: images[k] for k in names}, args, precision)
        loss, terms = objective(logits, labels, args)
        optimizer.zero_grad(set_to_none=True)
        precision.scaler.scale(loss).backward()
        precision.scaler.unscale_(optimizer)
        if args.agc:
            clip_adaptively((p for n, p in model.named_parameters() if "fc." not in n), args.agc)
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), args.clip or float("inf"))
        correct = [(logits[k].detach().argmax(1) == labels[k]).float().mean() for k in
                   ("clean", names[-1])]  # fmt: skip
        shown = [*(terms[k].detach() for k in names), loss.detach(), *correct]
        if guard.fine(step, lr, loss, norm):
            precision.scaler.step(optimizer)
            norm = norm.nan_to_num(0, 0, 0)  # of steps that the fp16 scaler leaves out
            sums += torch.stack([*shown, norm, stats["zero_grad"]])
            count += 1
        precision.scaler.update()

        done = step + 1
        if done % args.log_every == 0 or done % per_epoch == 0 or done == total:
            guard.check()  # sync point
            sums = run.mean(sums / max(count, 1))
            *each, loss, clean, robust, norm, zero = sums.tolist()
            rate = count * args.batch_size / (time.perf_counter() - clock)
            values = {"loss/total": loss, "train/accuracy": 100 * clean, "train/grad_norm": norm}
            values |= {f"loss/{k}": v for k, v in zip(names, each, strict=True)}
            values |= {"train/lr": lr, "speed/images_per_s": rate}
            text = f"epoch {done / per_epoch:.1f}/{args.epochs}  loss {loss:.3f}"
            text += f"  train {100 * clean:.1f} %"
            if attacked:
                values |= {"train/robust_accuracy": 100 * robust, "train/zero_grad": zero}
                # an attack step is a forward and a backward pass, as a training step on one image
                values["speed/attack_steps_per_s"] = rate * (args.attack_steps + 2)
                text += f"  robust {100 * robust:.1f} %"
            record.scalars(done, values)
            text += f"  {rate:.0f} img/s"
            record.progress(done, total, text)
            sums, count, clock = torch.zeros_like(sums), 0, time.perf_counter()
        if done % per_epoch == 0:
            epoch = done // per_epoch
            robust = 100 - robust_error(model, probe, "pgd-10", args, precision)
            record.scalars(done, {"robust/pgd_probe": robust})
            if attacked and robust < best / 2:
                fall = f"from {best:.1f} to {robust:.1f} % at epoch {epoch}"
                print(f"warning: accuracy under PGD-10 fell {fall}: raise --attack-steps")
            fresh, score = {"pgd_probe_error": 100 - robust}, robust
            if epoch % args.eval_every == 0 or done == total or (selects and not attacked):
                fresh |= run.evaluate(model, *held_out, precision)
                record.scalars(done, {"eval/accuracy": 100 - fresh["error"]})
                show_attack(record, model, *(v[:8] for v in batches["clean"](0)), args, precision,
                            done)  # fmt: skip
                text += f"  error {fresh['error']:.2f}"
                score = robust if attacked else 100 - fresh["error"]
            metrics |= fresh
            record.record(epoch=epoch, step=done, loss=loss, eval=fresh)
            record.progress(done, total, f"{text}  pgd-10 {robust:.1f} %", done=True)
            if selects and score > best:
                state = {"step": done, "metrics": metrics, "dataset": args.dataset}
                record.save("best.pt", model.spec | state | {"model": model.state_dict()})
            best = max(best, score)
            clock = time.perf_counter()
        guard.save(done, metrics=metrics, best=best, dataset=args.dataset)
    model.eval()
    return metrics


# --- main ---------------------------------------------------------------------------------------


def main(args):
    device = run.get_device(args.device)
    precision = run.Precision(args.precision, device)
    dataset = data.from_args(args, device)
    # Whatever may refuse an option comes before the run directory.
    given = [s for s in args.streams if s != "adv"]
    share = args.batch_size // len(given)
    if share < 1 or share % run.world():
        raise run.UserError(
            f"--batch-size {args.batch_size}: {share} images for each of {len(given)} streams, "
            f"which must divide among {run.world()} processes"
        )
    batches = {}
    for name in given:
        images = stream_images(name, args, dataset, device)
        seed = args.seed if name == "clean" else run.seed_key(args.seed, name)
        settings = args.augment, dataset.flip, True
        batches[name] = data.Batches(images, share, seed, *settings)
    model = build(args, dataset, device)
    judges = JUDGES if args.robust_images else ()
    record = run.Run(args, __file__, [f"error/{name}" for name in ("clean", *judges)])
    held_out = dataset.val or dataset.test
    train(model, args, batches, held_out, dataset.val is not None, record, precision)

    final, rows = {}, []
    # The two sets of statistics of a "dual-bn" network are two networks to an attacker.
    kinds = ["adversarial", "clean"] if args.norm == "dual-bn" else ["adversarial"]
    few = dataset.test.take(slice(0, args.robust_images))
    for kind in kinds:
        models.use_statistics(model, kind)
        end = "-clean" if kind != "adversarial" else ""
        final[f"error/clean{end}"] = run.evaluate(model, *dataset.test, precision)["error"]
        for attack in judges:
            error = robust_error(model, few, attack, args, precision, kind)
            final[f"error/{attack}{end}"] = error
        name = f"{args.arch}, {args.norm}" + (f", {kind} statistics" if len(kinds) > 1 else "")
        rows.append([name, *(100 - v for k, v in final.items() if k.endswith(end))])
    models.use_statistics(model, "adversarial")
    record.close(final)
    print(f"\n{run.table(rows, ['accuracy %', 'clean', *judges])}")
    print(f"{args.dataset} test, {len(dataset.test.y)} images, last epoch, seed {args.seed}")
    if args.robust_images:
        print(f"attacks: {args.attack_norm}, eps {args.eps:g}/255, {len(few.y)} images, 1 start")
        print("robust accuracy is what the strongest attack leaves, not what PGD leaves:")
        print(f"python eval/adversarial.py {Path(record.dir) / 'last.pt'} --attacks standard")
    return final


if __name__ == "__main__":
    run.cli(main, parse_args)
