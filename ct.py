"""Counterbalancing Teacher (CT): a frozen network without BatchNorm teaches the one with it.

Paper: Taghanaki et al., "Counterbalancing Teacher: Regularizing Batch Normalized Models for
Robustness", arXiv 2207.01548. BatchNorm makes a network lean on low-variance features that are
specific to the training domain; without it the same network errs more in-domain and less under
corruption. CT trains the network with BatchNorm on

    L = CE(f_S(x), y) + lam * D(h_S(x), h_T(x)),

h_T from a frozen copy of the same network without BatchNorm, trained first on the same data. The
student alone is used at test time; no image of the target domain is seen.

From the paper: the frozen copy without BatchNorm as teacher, the consistency of representations,
corruption benchmarks and leave-one-domain-out as the test. Ours, for the text at hand leaves them
open, each an option:
  1. D                --distance, of pooled penultimate features or logits (--match): cosine
  2. lam              --lam, constant over training: 5
  3. student's start  --student-init: fresh weights, or the teacher's convolutions (its control,
                      the same start without the distance: --student-init teacher --lam 0)
  4. teacher          --teacher-*: the student's schedule at rate 0.2, clipped at norm 1;
                      "without BatchNorm" as in common/models.py (biases, branches start at 0)
  5. everything else  the AugMix protocol: SGD, Nesterov momentum 0.9, weight decay 5e-4, batch
                      128, cosine per step, flip and padded crop

    python ct.py                                       # embedded shapes data, minutes on a CPU
    python ct.py --dataset cifar100 --arch wrn28       # WRN-28-10, the full job on a GPU
    python ct.py --dataset cifar10 --teacher runs/a/teacher.pt --lam 3 --no-baseline
    python ct.py --dataset pacs --test-domain all --arch resnet50 --pretrained

With --test-domain, DomainBed's protocol: a domain is left out of training and tested on; of each
other domain 20 % chooses the epoch (best.pt). Not DomainBed's: batches come from the pooled domains
(there 32 of each), and so does the validation error (there the mean over domains); all of the
left-out domain is the test (there 80 %); no colour jitter and greys, BatchNorm is not frozen, SGD
instead of Adam.

1 to 4 were chosen on a validation split of CIFAR-10 and the four extra corruptions, never on the
benchmark's 15; the README has the measurements.
"""

import argparse
import copy
import statistics
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F

from common import attacks, corruptions, data, models, run

# --- options ------------------------------------------------------------------------------------

NORMS = ("bn", "gn", "in", "ln", "none")
DEFAULTS = {  # per data set: arch, epochs
    "shapes": ("wrn10-1", 10),
    "cifar10": ("wrn40-2", 100),
    "cifar100": ("wrn40-2", 100),
    "svhn": ("wrn40-2", 100),
    "photographs": ("resnet18", 90),  # every tree of images
}


def parse_args(argv=None):
    parser = run.Parser(__file__, __doc__)
    data.add_arguments(parser)
    group = parser.add_argument_group("model and optimisation")
    group.add_argument("--arch", help="default: wrn10-1, wrn40-2, resnet18 by data")
    group.add_argument("--norm", default="bn", choices=NORMS, help="the student's normaliser")
    group.add_argument(
        "--pretrained", nargs="?", const="torchvision", metavar="FILE",
        help="start from torchvision's ImageNet weights: in its cache, or this file",
    )  # fmt: skip
    group.add_argument("--epochs", type=run.positive(int), help="default: 10, 100, 90 by data")
    group.add_argument("--batch-size", type=run.positive(int), default=128)
    group.add_argument("--lr", type=run.positive(float), default=0.1, help="peak rate")
    group.add_argument("--warmup", type=run.nonnegative(float), default=1.0, help="epochs")
    group.add_argument("--momentum", type=run.nonnegative(float), default=0.9)
    group.add_argument("--weight-decay", type=run.nonnegative(float), default=5e-4)
    group.add_argument("--clip", type=run.nonnegative(float), default=0.0, help="norm; 0: none")
    group = parser.add_argument_group("method")
    group.add_argument("--lam", type=run.nonnegative(float), default=5.0, help="0: the baseline")
    group.add_argument("--distance", default="cosine", choices=["mse", "relative", "cosine", "kl"])
    group.add_argument("--match", choices=["features", "logits"], help="default: logits for kl")
    group.add_argument("--temperature", type=run.positive(float), default=4.0, help="of kl")
    group.add_argument("--student-init", default="fresh", choices=["fresh", "teacher"])
    group.add_argument("--teacher", metavar="CKPT", help="use this teacher; trains none")
    group.add_argument("--teacher-epochs", type=run.positive(int), help="default: --epochs")
    group.add_argument("--teacher-lr", type=run.positive(float), default=0.2)
    group.add_argument("--teacher-clip", type=run.nonnegative(float), default=1.0)
    group.add_argument(
        "--baseline", action=argparse.BooleanOptionalAction, default=True,
        help="train the BatchNorm baseline too, for the table at the end",
    )  # fmt: skip
    group = parser.add_argument_group("evaluation")
    group.add_argument("--eval-every", type=run.positive(int), default=5, help="epochs")
    group.add_argument(
        "--corrupted-images", type=run.nonnegative(int), default=500, metavar="N",
        help="test images for the corrupted column of the table at the end; 0: leave it out",
    )  # fmt: skip
    run.add_arguments(parser)
    args = run.parse(parser, argv)
    arch, epochs = DEFAULTS.get(args.dataset.removesuffix(".1"), DEFAULTS["photographs"])
    args.arch, args.epochs = args.arch or arch, args.epochs or epochs
    args.teacher_epochs = args.teacher_epochs or args.epochs
    if args.test_domain and not args.out:
        name = f"ct-{args.dataset}-domains-{args.arch}-s{args.seed}"
        args.out = str(Path("runs") / name / args.test_domain.removesuffix("all"))
    args.match = args.match or ("logits" if args.distance == "kl" else "features")
    if args.distance == "kl" and args.match != "logits":
        raise run.UserError("--distance kl compares distributions: use --match logits")
    return args


# --- method -------------------------------------------------------------------------------------


def distance(kind, student, teacher, temperature):
    """D(student, teacher), a scalar, for features or logits (N,D).

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
    s, t = (F.log_softmax(z / temperature, dim=1) for z in (student, teacher))
    return temperature**2 * F.kl_div(s, t, reduction="batchmean", log_target=True)


def load_teacher(path, args, num_classes, device):
    """The frozen teacher of a checkpoint; UserError if it cannot teach this student."""
    checkpoint = run.load_checkpoint(path, device)
    for key, wanted in (("arch", args.arch), ("num_classes", num_classes)):
        if checkpoint[key] != wanted:
            raise run.UserError(
                f"--teacher {path}: its {key} is {checkpoint[key]}, the student's is {wanted}"
            )
    return models.from_checkpoint(checkpoint).to(device, memory_format=torch.channels_last)


def build(norm, args, dataset, device):
    """A network for this run; its weights depend on the seed and the normaliser alone."""
    torch.manual_seed(run.seed_key(args.seed, "init"))
    model = models.build(args.arch, norm, **dataset.model_kwargs)
    if args.pretrained:
        load_pretrained(model, args.pretrained)
    return model.to(device, memory_format=torch.channels_last)


def load_pretrained(model, file):
    """Give `model` the backbone of ImageNet weights. Without BatchNorm it gets the convolutions
    with BatchNorm folded in: the same function of an image as the other's in evaluation mode."""
    arch, norm = model.spec["arch"], model.spec["norm"]
    if norm not in ("bn", "none") or arch not in models.IMAGENET_RESNETS:
        known = ", ".join(models.IMAGENET_RESNETS)
        raise run.UserError(f"--pretrained: for {known} with norm bn or none, not {arch}, {norm}")
    if file == "torchvision":
        from torchvision.models import get_model_weights

        url = get_model_weights(arch).IMAGENET1K_V1.url
        file = Path(torch.hub.get_dir()) / "checkpoints" / Path(url).name
        if not file.is_file():
            raise run.UserError(f"--pretrained: no {file}; put {url} there, or name a file")
    source = models.build(arch, "bn", 1000, 224)
    models.load_foreign(source, run.load_checkpoint(file, foreign=True))
    modules, weights = dict(source.named_modules()), source.state_dict()
    if norm == "none":
        weights = {}
        for name in [n for n, m in modules.items() if isinstance(m, torch.nn.Conv2d)]:
            shortcut = name.removesuffix("downsample.0") + "downsample.1"
            follows = shortcut if "downsample" in name else name.replace("conv", "bn")
            pair = attacks.folded(modules[name], modules[follows])
            weights[f"{name}.weight"], weights[f"{name}.bias"] = pair
    own = model.state_dict()
    weights = {k: v for k, v in weights.items() if not k.startswith(("fc.", "normalize."))}
    try:
        model.load_state_dict(own | weights)
    except RuntimeError as error:
        reason = str(error).splitlines()[1].strip()[:100]
        raise run.UserError(f"--pretrained: {arch} for this image size differs: {reason}") from None


# --- training -----------------------------------------------------------------------------------


def lr_at(step, total, peak, warmup):
    """Linear warm-up over `warmup` steps, then half a cosine to 0 at `total`."""
    if step < warmup:
        return peak * (step + 1) / warmup
    angle = torch.pi * (step - warmup) / max(total - warmup, 1)
    return 0.5 * peak * (1 + torch.cos(torch.tensor(angle, dtype=torch.float64)).item())


def train(stage, model, args, batches, held_out, probe, record, precision, teacher=None):
    """Train `model` in place and return its final metrics.

    stage: "teacher", "baseline" or "student": the prefix of its scalars and the name of its
    checkpoint (last.pt for the student). A stage whose checkpoint is in the run directory goes on
    from there, or is skipped when that was its end. With --test-domain the model ends with the
    weights of least validation error among those evaluated, those of best.pt or <stage>-best.pt.
    """
    own = stage == "teacher"
    epochs, peak = (args.teacher_epochs, args.teacher_lr) if own else (args.epochs, args.lr)
    clip = (args.teacher_clip if own else args.clip) or float("inf")
    file = "last.pt" if stage == "student" else f"{stage}.pt"
    selected = "best.pt" if stage == "student" else f"{stage}-best.pt"
    device = next(model.parameters()).device
    total, warmup = epochs * batches.per_epoch, round(args.warmup * batches.per_epoch)
    optimizer = torch.optim.SGD(
        model.parameters(), peak, args.momentum, weight_decay=args.weight_decay,
        nesterov=args.momentum > 0,
    )  # fmt: skip
    guard = run.Guard(record, file, model, optimizer, precision, batches.per_epoch, total)
    net, metrics = guard.net, guard.state.get("metrics", {})
    if not guard.start:
        record.writer.add_images(f"{stage}/augmented", batches(0)[0][:32], 0)
    sums, count, clock = torch.zeros(4, device=device), 0, time.perf_counter()
    for step in range(guard.start, total):
        model.train()
        lr = lr_at(step, total, peak, warmup)
        optimizer.param_groups[0]["lr"] = lr
        torch.manual_seed(run.seed_key(args.seed, "step", step))  # dropout, as a function of it
        x, y = run.share(*batches(step))
        with precision.autocast():
            logits, h = net(x, with_features=True)
        loss = ce = F.cross_entropy(logits, y)
        gap = torch.zeros((), device=device)
        if teacher is not None:
            with torch.no_grad(), precision.autocast():
                logits_t, h_t = teacher(x, with_features=True)
            pair = (h, h_t) if args.match == "features" else (logits, logits_t)
            gap = distance(args.distance, *pair, args.temperature)
            loss = ce + args.lam * gap
        optimizer.zero_grad(set_to_none=True)
        precision.scaler.scale(loss).backward()
        precision.scaler.unscale_(optimizer)
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        correct = (logits.detach().argmax(1) == y).float().mean()
        if guard.fine(step, lr, loss, norm):
            precision.scaler.step(optimizer)
            norm = norm.nan_to_num(0, 0, 0)  # of steps that the fp16 scaler leaves out
            sums += torch.stack([ce.detach(), gap.detach(), correct, norm])
            count += 1
        precision.scaler.update()

        done = step + 1
        if done % args.log_every == 0 or done % batches.per_epoch == 0 or done == total:
            guard.check()  # sync point
            ce, gap, correct, norm = run.mean(sums / max(count, 1)).tolist()
            rate = count * args.batch_size / (time.perf_counter() - clock)
            values = {"loss": ce, "accuracy": 100 * correct, "grad_norm": norm, "lr": lr}
            values |= {"images_per_s": rate} | ({"distance": gap} if teacher is not None else {})
            record.scalars(done, {f"{stage}/{k}": v for k, v in values.items()})
            text = f"{stage} epoch {done / batches.per_epoch:.1f}/{epochs}  loss {ce:.3f}"
            text += f"  train {100 * correct:.1f} %  {rate:.0f} img/s"
            record.progress(done, total, text)
            sums, count, clock = torch.zeros_like(sums), 0, time.perf_counter()
        if done % batches.per_epoch == 0:
            epoch = done // batches.per_epoch
            evaluated = epoch % args.eval_every == 0 or done == total
            if evaluated:
                least = metrics.get("least_error", float("inf"))
                metrics = run.evaluate(model, *held_out, precision)
                if args.test_domain:
                    state = {"stage": stage, "step": done, "metrics": metrics}
                    state |= model.spec | {"dataset": args.dataset, "model": model.state_dict()}
                    if metrics["error"] < least:
                        record.save(selected, state)
                    metrics["least_error"] = min(least, metrics["error"])
                metrics["probe_error"] = run.evaluate(model, *probe, precision)["error"]
                shown = {"error": metrics["error"], "probe_error": metrics["probe_error"]}
                record.scalars(done, {f"{stage}/{k}": v for k, v in shown.items()})
                text += "".join(f"  {k} {v:.2f}" for k, v in shown.items())
            fresh = metrics if evaluated else {}
            record.record(stage=stage, epoch=epoch, step=done, loss=ce, distance=gap, eval=fresh)
            record.progress(done, total, text, done=True)
            clock = time.perf_counter()
        guard.save(done, stage=stage, metrics=metrics, dataset=args.dataset)
    if args.test_domain:
        model.load_state_dict(run.load_checkpoint(record.dir / selected, device)["model"])
    model.eval()
    return metrics


# --- main ---------------------------------------------------------------------------------------


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


def each_domain(args):
    """A run for every domain left out, in <out>/<domain>. Returns {key/domain: value}."""
    names, final = data.domain_names(args.dataset, args.data_dir), {}
    for name in names:
        out = Path(args.out) / name
        resume = str(out) if args.resume and (out / "args.json").is_file() else None
        own = {"test_domain": name, "out": str(out), "resume": resume}
        run.Run.again = [*sys.argv, "--resume", "auto"]  # all domains, not this one alone
        try:
            found = main(argparse.Namespace(**vars(args) | own))
        finally:
            run.Run.again = None
        final |= {f"{key}/{name}": value for key, value in found.items()}
    rows = []
    for stage in ("teacher", "baseline", "student"):
        values = [100 - final[k] for n in names if (k := f"error/{stage}/{n}") in final]
        if values:
            rows.append([stage, *values, statistics.mean(values)])
    print(f"\n{run.table(rows, ['accuracy % on', *names, 'average'])}")
    print(f"each left out of training, {args.dataset}, seed {args.seed}; over seeds:")
    print(f"python eval/domains.py {args.out} --data-dir {args.data_dir}")
    return final


def main(args):
    if args.test_domain == "all":
        return each_domain(args)
    device = run.get_device(args.device)
    precision = run.Precision(args.precision, device)
    dataset = data.from_args(args, device)
    # Whatever may refuse an option comes before the run directory.
    settings = args.augment, dataset.flip, True
    batches = data.Batches(dataset.train, args.batch_size, args.seed, *settings)
    student = build(args.norm, args, dataset, device)
    teacher, wanted = None, args.lam or args.student_init == "teacher"
    if args.teacher and wanted:
        teacher = load_teacher(args.teacher, args, len(dataset.classes), device)
    tags = ["error/teacher", "error/baseline", "error/student"]
    record = run.Run(args, __file__, tags + [t.replace("error", "corrupted") for t in tags])

    # A small corrupted set to watch robustness move: the four extra corruptions, so that nothing
    # the benchmark's 15 measure is looked at during training.
    held_out = dataset.val or dataset.test
    few = held_out.take(slice(0, 500))
    probe = [corruptions.corrupt(few.x, name, 3, scale=dataset.scale) for name in corruptions.EXTRA]
    probe = data.Images(torch.cat(probe), few.y.repeat(len(probe)))

    networks = {}
    common = (args, batches, held_out, probe, record, precision)
    if wanted:
        if teacher is None:
            teacher = build("none", args, dataset, device)
            train("teacher", teacher, *common)
        networks["teacher"] = teacher.requires_grad_(False).eval()
        if args.baseline:
            networks["baseline"] = copy.deepcopy(student)
            train("baseline", networks["baseline"], *common)
        if args.student_init == "teacher":
            shapes = {k: v.shape for k, v in student.state_dict().items()}
            weights = {k: v for k, v in teacher.state_dict().items() if v.shape == shapes.get(k)}
            student.load_state_dict(weights, strict=False)
    networks["student"] = student
    train("student", student, *common, teacher=teacher if args.lam else None)

    titles = {
        "teacher": f"teacher ({args.arch}, {teacher.spec['norm'] if teacher else 'none'})",
        "baseline": f"baseline ({args.arch}, {args.norm})",
        "student": f"CT ({args.arch}, {args.norm}, lam {args.lam:g})",
    }
    results = {k: run.evaluate(m, *dataset.test, precision) for k, m in networks.items()}
    final = {f"error/{k}": v["error"] for k, v in results.items()}
    header = ["accuracy %", "clean"]
    rows = [[titles[k], 100 - v["error"]] for k, v in results.items()]
    if args.corrupted_images:
        subset = dataset.test.take(slice(0, args.corrupted_images))
        errors = corrupted_error(networks, subset, precision, args.data_dir, dataset.scale)
        final |= {f"corrupted/{k}": v for k, v in errors.items()}
        header.append("corrupted")
        for row, value in zip(rows, errors.values(), strict=True):
            row.append(100 - value)
    record.close(final)
    print(f"\n{run.table(rows, header)}")
    chosen = "epoch of least validation error" if args.test_domain else "last epoch"
    what = f"{args.dataset} {args.test_domain or 'test'}, {len(dataset.test.y)} images"
    print(f"{what}, {chosen}, seed {args.seed}")
    if args.corrupted_images:
        texture = corruptions.frost_textures(data_dir=args.data_dir)[1]
        print(f"corrupted: mean over 15 corruptions x 5 severities, {len(subset.y)} images,")
        print(f"  generated (seed 0), frost: {texture}")
    print(f"per corruption: python eval/corruptions.py {record.dir}/last.pt")
    return final


if __name__ == "__main__":
    run.cli(main, parse_args)
