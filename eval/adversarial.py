"""Accuracy of checkpoints under adversarial attack, as one table, every image checked again.

    python eval/adversarial.py runs/a/last.pt [runs/b/last.pt ...]          # AutoAttack, Linf 8/255
    python eval/adversarial.py runs/a/last.pt --attacks pgd-20,apgd-ce --limit 1000
    python eval/adversarial.py runs/a/last.pt --attacks sweep --norm l2 --eps 128
    python eval/adversarial.py resnet20.th --arch resnet20 --dataset cifar10 --mean ... --std ...

--attacks: names of common/attacks with steps (or queries) at the end, "pgd-20"; each attacks
every image that the network classifies correctly. "standard" is AutoAttack: apgd-ce, apgd-t, fab-t
and square, each on what the one before left standing (apgd-t needs 4 classes). "sweep" is pgd-20,
pgd-50 and pgd-100, all with the step of pgd-20: by itself pgd-100 takes a fifth of it and comes no
farther. "worst of all" counts an image as robust that withstood every attack of the table. All
numbers are accuracies in percent; eps and alpha are in pixel units of 1/255 for both norms (128 is
an L2 radius of 0.502).

Attacks run in --precision; whether an image fooled the network is decided in fp32, and at the end
every adversarial image is evaluated once more, in fp32: the table appears only if both agree. Each
finished batch is written to <json>.state; --resume goes on after the last of them and gives, on a
CPU bit for bit, the numbers of an uninterrupted evaluation.
"""

import hashlib
import json
import shutil
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from common import attacks, data, models, run

SWEEP = ("pgd-20", "pgd-50", "pgd-100")
WORST = "worst of all"


def parse_args(argv=None):
    parser = run.Parser(__file__, __doc__)
    models.add_arguments(parser)
    parser.add_argument("--data-dir", default="data")
    parser.add_argument(
        "--attacks", type=attack_names, default="standard", metavar="A,B",
        help=f"standard, sweep, {', '.join(attacks.STEPS)}; steps as in pgd-20",
    )  # fmt: skip
    parser.add_argument("--norm", default="linf", choices=["linf", "l2"])
    parser.add_argument("--eps", type=float, help="radius in 1/255 (default: linf 8, l2 128)")
    parser.add_argument(
        "--alpha", type=run.positive(float), help="step of bim, pgd, cw in 1/255 (default: by eps)"
    )
    parser.add_argument(
        "--limit", type=run.nonnegative(int), default=0, metavar="N",
        help="N test images, the same number of each class (0: all)",
    )  # fmt: skip
    parser.add_argument("--batch-size", type=run.positive(int), default=250)
    parser.add_argument("--seed", type=run.nonnegative(int), default=0)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--precision", default="fp32", choices=["fp32", "bf16"])
    parser.add_argument("--json", help="default: <first checkpoint>.adversarial.json")
    parser.add_argument("--tensorboard", metavar="DIR", help="default: adversarial/ beside it")
    parser.add_argument("--save", metavar="FILE", help="write the adversarial images there")
    parser.add_argument("--resume", action="store_true", help="go on where a run stopped")
    parser.add_argument("--overwrite", action="store_true", help="forget an unfinished run")
    args = parser.parse_args(argv)
    args.eps = {"linf": 8.0, "l2": 128.0}[args.norm] if args.eps is None else args.eps
    most = 255 if args.norm == "linf" else float("inf")  # of L2 by the images: `check_plan`
    if not 0 < args.eps <= most:
        parser.error(f"--eps {args.eps:g} is not in (0, {most:g}]: it is given in units of 1/255")
    return args


def attack_names(text):
    """[(title, name, whether the attack gets only what the one before left)] of --attacks."""
    plan = []
    for name in text.split(","):
        if name == "standard":
            for part in attacks.STANDARD:
                plan.append((f"AutoAttack: {part}", part, part != attacks.STANDARD[0]))
            continue
        if name == "sweep":
            plan += [(f"sweep: {part}", part, False) for part in SWEEP]
            continue
        attacks.parse(name)
        plan.append((name, name, False))
    titles = [title for title, _, _ in plan]
    for title in titles:
        if titles.count(title) > 1:
            raise run.UserError(f"--attacks: {title} is there twice")
    return plan


class Progress:
    """The progress line of a run, for one attack."""

    def __init__(self, title, batches):
        self.title, self.batches, self.batch = title, batches, 0
        self._tty, self._first = sys.stderr.isatty(), None
        self._shown = time.perf_counter()

    line = run.Run.progress

    def show(self, share):
        """At every step of an attack: the line on a terminal, in a pipe another every minute."""
        late = not self._tty and time.perf_counter() - self._shown > 60
        done = int(1000 * (self.batch + share))
        self.line(done, 1000 * self.batches, self.title, done=late)

    def clear(self):
        if self._tty:
            print("\r\033[K", end="", file=sys.stderr)


# --- what is evaluated ----------------------------------------------------------------------------


def digest(*tensors):
    """sha256 of the bytes of tensors, as 16 hexadecimal digits."""
    hashed = hashlib.sha256()
    for tensor in tensors:
        hashed.update(str((tensor.dtype, tuple(tensor.shape))).encode())
        hashed.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return hashed.hexdigest()[:16]


class State:
    """Finished batches of an evaluation, a file each. `settings` says what they depend on."""

    def __init__(self, folder, settings, resume, overwrite):
        self.folder, path = Path(folder), Path(folder) / "settings.json"
        if overwrite and self.folder.is_dir():
            shutil.rmtree(self.folder)
        if path.is_file():
            if not resume:
                raise run.UserError(
                    f"{self.folder} holds an unfinished evaluation: --resume to go on with it, "
                    "--overwrite to forget it"
                )
            self.compare(path, settings)
            return
        if resume:
            raise run.UserError(f"--resume: there is no unfinished evaluation in {self.folder}")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(settings, indent=1) + "\n")
        except OSError as error:
            raise run.UserError(f"cannot write {self.folder}: {error.strerror}") from None

    def compare(self, path, settings):
        try:
            old = json.loads(path.read_text())
        except ValueError:
            raise run.UserError(f"{path}: not JSON; --overwrite to begin again") from None
        for key, value in json.loads(json.dumps(settings)).items():
            if old.get(key) != value:
                raise run.UserError(
                    f"{self.folder} was begun with another {key} ({old.get(key)}, now {value}): "
                    "evaluate with that, or --overwrite to begin again"
                )

    def get(self, name):
        path = self.folder / f"{name}.pt"
        return run.load_checkpoint(path, foreign=True) if path.is_file() else None

    def put(self, name, batch):
        run.save_checkpoint(self.folder / f"{name}.pt", batch)

    def remove(self):
        shutil.rmtree(self.folder, ignore_errors=True)


# --- one network ----------------------------------------------------------------------------------


def attack_network(number, title, model, x, y, rows, args, precision, device, state):
    """Run the attacks on one network. Returns (accuracies {row title: %}, facts {row title: ...},
    found {row title: (positions, images)}, flags, correct)."""
    lead = torch.cat(
        [
            attacks.judge(model, part.to(device), labels.to(device))[0].cpu()
            for part, labels in zip(x.split(args.batch_size), y.split(args.batch_size), strict=True)
        ]
    )
    correct = lead <= 0
    accuracy = {"clean": 100 * correct.double().mean().item()}
    print(f"{title}: clean {accuracy['clean']:.2f}", flush=True)
    facts, found, flags = {}, {}, inspect(model, x[: args.batch_size].to(device))
    robust, standing = correct.clone(), correct.clone()
    for k, (row, name, follows) in enumerate(args.attacks):
        standing = standing if follows else correct.clone()
        todo = standing.nonzero()[:, 0]
        zero = lost = broken = seconds = 0
        alpha = args.alpha
        if row.startswith("sweep") and alpha is None:
            alpha = attacks.default_alpha(args.eps, attacks.parse(SWEEP[0])[1])
        positions, images = [], []
        batches = todo.split(args.batch_size) if len(todo) else []
        progress = Progress(f"{title}, {row}", len(batches))
        for b, part in enumerate(batches):
            key, progress.batch = f"{number}-{k}-{b}", b
            if b % run.world() == run.rank() and state.get(key) is None:
                began = time.perf_counter()
                adv, fooled, more = attacks.attack(
                    model, x[part].to(device), y[part].to(device), name, args.eps, args.norm,
                    args.seed, rows[part], precision, alpha, progress.show,
                )  # fmt: skip
                batch = more | {
                    "positions": part[fooled.cpu()], "images": adv[fooled].cpu().contiguous(),
                    "seconds": time.perf_counter() - began,
                }  # fmt: skip
                state.put(key, batch)
        run.wait()  # the batches of the other processes lie in `state` too
        for b in range(len(batches)):
            batch = state.get(f"{number}-{k}-{b}")
            positions.append(batch["positions"])
            images.append(batch["images"])
            zero, lost = zero + batch["zero"], lost + batch["lost"]
            broken, seconds = broken + batch.get("broken", 0), seconds + batch["seconds"]
        progress.clear()
        if batches:
            found[row] = torch.cat(positions), torch.cat(images)
            standing[found[row][0]] = False
        robust &= standing
        accuracy[row] = 100 * standing.double().mean().item()
        facts[row] = {"zero_gradients": zero, "lost_in_fp32": lost, "seconds": round(seconds, 1)}
        print(f"{title}: {row} {accuracy[row]:.2f}  ({seconds:.0f} s)", flush=True)
        if zero:
            flags.append(
                f"{row}: {zero} images have a zero gradient, so attacks by gradient fail on them; "
                "look for saturated outputs or operations without a derivative, and trust "
                "apgd-dlr, square and fab-t"
            )
        if broken:
            flags.append(
                f"{row}: {broken} images count as misclassified because their logits are not "
                "finite: an overflow, no decision; mend the network"
            )
    accuracy[WORST] = 100 * robust.double().mean().item()
    return accuracy, facts, found, flags + compare_rows(args.attacks, accuracy), correct


@torch.no_grad()
def inspect(model, x):
    """AutoAttack's questions to a network before the attacks, as sentences; x: a few images."""
    flags = []
    passes = [run.predict(model, x) for _ in range(3)]
    size = passes[0].norm(dim=1).clamp(min=1e-10)
    change = max(((p - passes[0]).norm(dim=1) / size).max().item() for p in passes[1:])
    if change > 1e-4:
        flags.append(
            f"the network is random (logits change by {100 * change:.2g} % between passes): "
            "these accuracies are too high; attack the mean of many passes instead"
        )
    logits = passes[0]
    if logits.min() >= -1e-5 and ((logits.sum(1) - 1).abs() < 1e-5).all():
        flags.append(
            "the outputs are probabilities, not logits: gradients vanish where the network is "
            "sure; take the softmax out of the model"
        )
    if not logits.isfinite().all():
        flags.append("some logits are not finite: mend the network before trusting its accuracy")
    return flags


def compare_rows(plan, accuracy):
    """Warnings that follow from the table of one network."""
    flags, before = [], accuracy["clean"]
    whites = [accuracy[row] for row, name, _ in plan if not name.startswith("square")]
    for row, name, follows in plan:
        best = before if follows else min(whites, default=0)
        if name.startswith("square") and accuracy[row] < best - 0.2:
            flags.append(
                f"{row} finds {best - accuracy[row]:.2f} points that the attacks by gradient miss: "
                "gradients are masked; raise the queries (square-20000) and adapt an attack"
            )
        before = accuracy[row]
    kinds = {}
    for row, name, _ in plan:
        kind, steps, _ = attacks.parse(name)
        if kind != "square" and not row.startswith("AutoAttack"):
            kinds.setdefault(row.removesuffix(name) + kind, []).append((steps, accuracy[row]))
    for kind, points in kinds.items():
        (most, last), *rest = sorted(points, reverse=True)
        if rest and rest[0][1] - last > 0.5:
            flags.append(
                f"{kind}: accuracy still falls from {rest[0][1]:.2f} to {last:.2f} between "
                f"{rest[0][0]} and {most} steps: take more steps, or apgd-t"
            )
    return flags


def verify(model, x, y, found, accuracy, correct, args, device, title):
    """Evaluate every adversarial image again, in fp32. Returns the largest perturbation in units
    of 1/255, the count of NaN, the least and the largest value, and the leads of the wrong class;
    raises UserError where the images do not give the accuracies of the table."""
    largest, nans, low, high, leads = 0.0, 0, 1.0, 0.0, {}
    for row, (positions, images) in found.items():
        lead = []
        size = max(1, args.batch_size * 2 // 3)  # other batches than those of the attack
        for part, adv in zip(positions.split(size), images.split(size), strict=True):
            if not len(part):
                continue
            lead.append(attacks.judge(model, adv.to(device), y[part].to(device))[0].cpu())
            far = attacks.distance(adv, run.to_float(x[part]).float(), args.norm)
            largest, nans = max(largest, far.max().item()), nans + int(adv.isnan().sum())
            low, high = min(low, adv.min().item()), max(high, adv.max().item())
        leads[row] = torch.cat(lead) if lead else torch.zeros(0)
        wrong = int((~(leads[row] > 0)).sum())
        if wrong:
            raise run.UserError(
                f"{title}, {row}: {wrong} of {len(positions)} adversarial images are classified "
                "correctly when evaluated again in fp32: no table; the network is random, or its "
                "result depends on the batch"
            )
    fooled = {row: set(positions.tolist()) for row, (positions, _) in found.items()}
    taken = set()
    for row, _, follows in args.attacks:
        taken = (taken if follows else set()) | fooled.get(row, set())
        again = 100 * (int(correct.sum()) - len(taken)) / len(y)
        if abs(again - accuracy[row]) > 1e-9:
            raise run.UserError(
                f"{title}, {row}: {accuracy[row]:.2f} in the table, {again:.2f} from its images: "
                "no table; report this"
            )
    bad = nans or low < 0 or high > 1 or largest > args.eps / 255
    if bad and any(len(images) for _, images in found.values()):
        raise run.UserError(
            f"{title}: adversarial images leave the ball or [0,1] (perturbation "
            f"{255 * largest:.6g}/255, {nans} NaN, values {low:.6g} to {high:.6g}): no table"
        )
    return 255 * largest, nans, low, high, leads


# --- main -----------------------------------------------------------------------------------------


def check_plan(args, networks, x):
    """Raise UserError for an attack that these networks or images do not admit, before any runs."""
    classes = networks[0][1].spec["num_classes"]
    for row, name, _ in args.attacks:
        needed = attacks.CLASSES.get(attacks.parse(name)[0], 2)
        if classes < needed:
            raise run.UserError(
                f"--attacks, {row}: its loss needs {needed} classes, here are {classes}: take "
                "apgd-ce,fab-t,square"
            )
    most = 255 * x[0].numel() ** 0.5
    if args.norm == "l2" and args.eps > most:
        raise run.UserError(f"--eps {args.eps:g}: the images' whole box is {most:.0f}/255 across")


def main(args):
    device = run.get_device(args.device)
    precision = run.Precision(args.precision, device)
    networks, name = models.for_evaluation(args, device)
    x, y, rows, total = data.for_evaluation(name, networks, args.data_dir, args.limit)
    check_plan(args, networks, x)
    first = Path(args.checkpoints[0])
    first = first / "last.pt" if first.is_dir() else first
    first = Path(networks[0][0]) if str(first).startswith("torchvision:") else first
    path = Path(args.json or first.with_suffix(".adversarial.json"))
    settings = {
        "model": [digest(*model.state_dict().values()) for _, model, _ in networks],
        "data": digest(x, y), "attacks": [list(part) for part in args.attacks], "eps": args.eps,
        "norm": args.norm, "alpha": args.alpha, "seed": args.seed, "batch size": args.batch_size,
        "precision": precision.name, "device": device.type, "torch": str(torch.__version__),
    }  # fmt: skip
    limit_note = f"{len(y)} of {total}" if len(y) < total else f"all {total}"
    print(
        f"{name} test, {limit_note} images; {args.norm} eps {args.eps:g}/255, seed {args.seed}, "
        f"{precision.name}; accuracy in %"
    )
    folder = path.with_name(path.name + ".state")
    if run.rank() == 0:
        state = State(folder, settings, args.resume, args.overwrite)
    run.wait()
    if run.rank():
        state = State(folder, settings, resume=True, overwrite=False)
    results, every, notes = [], [], []
    for k, (title, model, entry) in enumerate(networks):
        accuracy, facts, found, flags, correct = attack_network(
            k, title, model, x, y, rows, args, precision, device, state
        )
        largest, nans, low, high, leads = verify(
            model, x, y, found, accuracy, correct, args, device, title
        )
        every.append((title, found, leads))
        closing = (
            f"{title}: {sum(len(p) for p, _ in found.values())} adversarial images evaluated again "
            f"in fp32, largest perturbation {largest:.6g}/255, {nans} NaN, values {low:.4g} to "
            f"{high:.4g}"
        )
        notes += [f"warning: {title}: {flag}" for flag in flags] + [closing]
        results.append(
            entry | {
                "clean": {"error": 100 - accuracy["clean"]}, "accuracy": accuracy, "runs": facts,
                "largest_perturbation": largest, "nan": nans, "values": [low, high],
                "warnings": flags,
            }
        )  # fmt: skip
    titles = list(results[0]["accuracy"])
    if len(args.attacks) == 1:
        titles.remove(WORST)
    lines = [[t, *(r["accuracy"][t] for r in results)] for t in titles]
    print("\n" + run.table(lines, ["accuracy", *(title for title, _, _ in networks)]))
    print("\n".join(["", *notes]))
    output = {
        "command": "python " + " ".join(["eval/adversarial.py", *sys.argv[1:]]),
        "versions": run.versions(), "dataset": name, "split": "test", "images": len(y),
        "limit": args.limit, "norm": args.norm, "eps": args.eps, "alpha": args.alpha,
        "seed": args.seed, "attacks": titles[1:], "precision": precision.name,
        "checkpoints": results,
    }  # fmt: skip
    run.wait()
    if run.rank():
        return output
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(output, indent=1) + "\n")
    except OSError as error:
        raise run.UserError(f"cannot write {path}: {error.strerror}; give --json") from None
    if args.save:
        saved = {
            title: {row: {"rows": rows[p], "images": images} for row, (p, images) in found.items()}
            for title, found, _ in every
        }
        run.save_checkpoint(args.save, {"eps": args.eps, "norm": args.norm, "networks": saved})
    write_tensorboard(args.tensorboard or first.parent / "adversarial", x, every)
    state.remove()
    print(f"written: {path}")
    return output


def write_tensorboard(folder, x, every, count=8):
    """Per network the images that it gets wrong by the largest lead: clean, attacked, and the
    perturbation around grey, each one's largest entry black or white."""
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(folder)) as writer:
        for title, found, leads in every:
            pool = [
                (lead, position, image)
                for row, (positions, images) in found.items()
                for lead, position, image in zip(
                    leads[row].tolist(), positions.tolist(), images, strict=True
                )
            ]
            chosen, seen = [], set()
            for lead, position, image in sorted(pool, key=lambda item: -item[0]):
                if position not in seen and len(chosen) < count:
                    seen.add(position)
                    chosen.append((position, image, lead))
            if not chosen:
                continue
            clean = run.to_float(x[[p for p, _, _ in chosen]]).float()
            adv = torch.stack([image for _, image, _ in chosen])
            delta = adv - clean
            delta = delta / delta.flatten(1).abs().amax(1).clamp(min=1e-12).view(-1, 1, 1, 1)
            strip = [torch.cat(list(part), 2) for part in (clean, adv, delta / 2 + 0.5)]
            writer.add_image(f"strongest/{title}", torch.cat(strip, 1).clamp(0, 1))


if __name__ == "__main__":
    run.cli(main, parse_args)
