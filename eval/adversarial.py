"""Accuracy of checkpoints under adversarial attack, as one table, every image checked again.

    python eval/adversarial.py runs/a/last.pt [runs/b/last.pt ...]          # AutoAttack, Linf 8/255
    python eval/adversarial.py runs/a/last.pt --attacks fast --limit 1000
    python eval/adversarial.py runs/a/last.pt --attacks pgd-50-10,apgd-ce,pgd-t
    python eval/adversarial.py runs/a/last.pt --attacks sweep --norm l2 --eps 128
    python eval/adversarial.py runs/dual-bn/last.pt --attacks fast --gamma 0,0.5,1
    python eval/adversarial.py resnet20.th --arch resnet20 --dataset cifar10 --mean ... --std ...

--attacks: names of common/attacks with steps (or queries) at the end: pgd-20, and pgd-50-10 for 50
steps from each of 10 starts. Each attacks every image that the network classifies correctly.

standard  AutoAttack: apgd-ce, apgd-t, fab-t and square, each on what the one before left standing
          (apgd-t needs 4 classes). A line tells how many images each of them alone took.
apgd      the first two of these: apgd-ce, then apgd-t on what it left standing.
fast      apgd-ce, then apgd-malt: APGD towards the 5 classes that a linear network would reach
          first. It is not AutoAttack, and the table says so.
sweep     pgd-20, pgd-50 and pgd-100, all with the step of pgd-20. By itself pgd-100 takes a fifth
          of it and comes no farther.

"worst of all" counts an image as robust that withstood every attack of the table. Accuracies are in
percent; eps and alpha are in pixel units of 1/255 for both norms (128 is an L2 radius of 0.502). A
pass is one image through the network, forward or backward.

Attacks run in --precision. The unmodified network decides in fp32 whether an image fooled it, and
decides again in batches of another size. Images on which the two differ count as robust; if they
are more than 1 % of the images found there is no table. Each finished batch is written to
<json>.state. --resume goes on after the last of them and gives, on a CPU bit for bit, the numbers
of an uninterrupted evaluation.
"""

import contextlib
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
STRONGEST = 8  # images of each network in TensorBoard


def parse_args(argv=None):
    parser = run.Parser(__file__, __doc__)
    models.add_arguments(parser)
    parser.add_argument("--data-dir", default="data", help="folder of the data sets")
    parser.add_argument(
        "--attacks", type=attack_names, default="standard", metavar="A,B",
        help=f"standard, apgd, fast, sweep, {', '.join(attacks.STEPS)}; steps as in pgd-20, "
        "restarts as in pgd-50-10",
    )  # fmt: skip
    parser.add_argument(
        "--norm", default="linf", choices=["linf", "l2"], help="norm of the perturbation"
    )
    parser.add_argument("--eps", type=float, help="radius in 1/255 (default: linf 8, l2 128)")
    parser.add_argument(
        "--alpha", type=run.positive(float), help="step of bim, pgd, cw in 1/255 (default: by eps)"
    )
    models.add_gamma(parser)
    parser.add_argument(
        "--eot", type=run.positive(int), default=1, metavar="N",
        help="passes of a random network whose mean logits are attacked and judged",
    )  # fmt: skip
    parser.add_argument(
        "--limit", type=run.nonnegative(int), default=0, metavar="N",
        help="N test images, the same number of each class; 0 is all",
    )  # fmt: skip
    parser.add_argument(
        "--batch-size", type=run.positive(int), default=250, help="images attacked at once"
    )
    parser.add_argument(
        "--seed", type=run.nonnegative(int), default=0, help="of the attacks' random numbers"
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")
    parser.add_argument(
        "--precision", default="fp32", choices=["fp32", "tf32", "bf16"],
        help="arithmetic of the network during the attacks; the judge has fp32",
    )  # fmt: skip
    parser.add_argument(
        "--json", metavar="FILE", help="results (default: <first checkpoint>.adversarial.json)"
    )
    parser.add_argument(
        "--tensorboard", metavar="DIR", help="pictures (default: adversarial/ beside the results)"
    )
    parser.add_argument("--save", metavar="FILE", help="write the adversarial images there")
    parser.add_argument("--resume", action="store_true", help="go on where a run stopped")
    parser.add_argument(
        "--overwrite", action="store_true",
        help="forget an unfinished run, and replace results of other settings",
    )  # fmt: skip
    args = parser.parse_args(argv)
    args.eps = {"linf": 8.0, "l2": 128.0}[args.norm] if args.eps is None else args.eps
    most = 255 if args.norm == "linf" else float("inf")  # of L2 by the images: `check_plan`
    if not 0 < args.eps <= most:
        parser.error(f"--eps {args.eps:g} is not in (0, {most:g}]: it is given in units of 1/255")
    return args


def attack_names(text):
    """[(title, name, whether the attack gets only what the one before left)] of --attacks."""
    plan, single = [], {}
    series = {
        "standard": ("AutoAttack", attacks.STANDARD), "apgd": ("apgd", attacks.STANDARD[:2]),
        "fast": ("fast", attacks.FAST),
    }  # fmt: skip
    for name in text.split(","):
        if name in series:
            title, parts = series[name]
            plan += [(f"{title}: {part}", part, part != parts[0]) for part in parts]
        elif name == "sweep":
            plan += [(f"sweep: {part}", part, False) for part in SWEEP]
        else:
            same = single.setdefault(attacks.parse(name), name)
            if same != name:
                raise run.UserError(f"--attacks: {name} is {same}: name each once")
            plan.append((name, name, False))
    titles = [title for title, _, _ in plan]
    for title in titles:
        if titles.count(title) > 1:
            raise run.UserError(f"--attacks: {title} is there twice")
    return plan


class Progress:
    """The moving line of one attack on one network."""

    def __init__(self, title, batches):
        self.title, self.batches, self.batch = title, batches, 0
        self._line, self._began = run.Progress(), time.monotonic()

    def show(self, share):
        """At every step of an attack, with the share of the batch that is done."""
        done = (self.batch + share) / self.batches
        left = (time.monotonic() - self._began) * (1 - done) / max(done, 1e-9)
        self._line.moving(f"{self.title}  {100 * done:.1f} %  eta {run.clock(left)}")

    def clear(self):
        self._line.clear()


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
        begun = self.folder.is_dir()
        old = self.read(path)
        if begun and (overwrite or old is None):  # without settings nobody knows what is in it
            shutil.rmtree(self.folder, ignore_errors=True)
        elif begun:
            if not resume:
                raise run.UserError(
                    f"{self.folder} holds an unfinished evaluation: --resume to go on with it, "
                    "--overwrite to forget it"
                )
            self.compare(old, settings)
            return
        if resume and not begun:
            raise run.UserError(f"--resume: there is no unfinished evaluation in {self.folder}")
        run.write_json(path, settings)

    @staticmethod
    def read(path):
        """The settings in a file; None where there are none."""
        with contextlib.suppress(OSError, ValueError):
            old = json.loads(path.read_text())
            return old if isinstance(old, dict) else None
        return None

    def compare(self, old, settings):
        for key, value in json.loads(json.dumps(settings)).items():
            if old.get(key) != value:
                raise run.UserError(
                    f"{self.folder} was begun with another {key} ({old.get(key)}, now {value}): "
                    "evaluate with that, or --overwrite to begin again"
                )

    def has(self, name):
        return (self.folder / f"{name}.pt").is_file()

    def get(self, name):
        return run.load_checkpoint(self.folder / f"{name}.pt", foreign=True)

    def put(self, name, batch):
        run.save_checkpoint(self.folder / f"{name}.pt", batch)

    def remove(self):
        shutil.rmtree(self.folder, ignore_errors=True)


# --- one network ----------------------------------------------------------------------------------


class Found:
    """What the attacks on one network found. Images stay in `state`, but for the strongest."""

    def __init__(self, correct):
        self.correct = correct  # images that were classified correctly
        self.fooled = {}  # row title: positions of the fooled images, (M,)
        self.keys = {}  # row title: names of its batches in the state
        self.strongest = []  # (lead, position, image), each position once
        self.images = 0
        self.largest, self.nan, self.low, self.high = 0.0, 0, 1.0, 0.0

    def add(self, row, key, batch):
        """Take in a batch of the state."""
        self.keys.setdefault(row, []).append(key)
        positions, fresh = batch["positions"], len(batch["positions"])
        old = self.fooled.get(row, positions[:0])
        self.fooled[row] = torch.cat([old, positions])
        self.images += fresh
        if not fresh:
            return
        self.largest = max(self.largest, batch["largest"])
        self.nan += batch["nan"]
        self.low, self.high = min(self.low, batch["low"]), max(self.high, batch["high"])
        pool = list(zip(batch["leads"].tolist(), positions.tolist(), batch["images"], strict=True))
        best = {}
        for item in sorted([*pool, *self.strongest], key=lambda item: -item[0]):
            best.setdefault(item[1], item)
        self.strongest = list(best.values())[:STRONGEST]


def attack_batch(model, x, y, part, rows, name, args, precision, device, alpha, tick):
    """Attack the images at the positions `part` and look at the fooled ones again, in fp32 and in
    batches of another size. Returns what the state keeps of them."""
    began, busy = time.perf_counter(), time.process_time()
    labels = y[part].to(device)
    adv, fooled, facts = attacks.attack(
        model, x[part].to(device), labels, name, args.eps, args.norm, args.seed, rows[part],
        precision, alpha, tick, args.eot,
    )  # fmt: skip
    seconds, cpu_seconds = time.perf_counter() - began, time.process_time() - busy
    images, kept = adv[fooled], fooled.cpu()
    lead = torch.zeros(0)
    if len(images):
        other = max(1, args.batch_size * 2 // 3)
        lead = attacks.judge(model, images, labels[fooled], other, args.eot)[0].cpu()
    images, positions = images.cpu().contiguous(), part[kept]
    far = attacks.distance(images, run.to_float(x[positions]).float(), args.norm)
    again = lead > 0
    return facts | {
        "seconds": seconds, "cpu_seconds": cpu_seconds, "differ": int((~again).sum()),
        "positions": positions[again],
        "leads": lead[again], "images": images[again].clone(), "nan": int(images.isnan().sum()),
        "largest": far.max().item() if len(far) else 0.0,
        "low": images.min().item() if len(images) else 1.0,
        "high": images.max().item() if len(images) else 0.0,
    }  # fmt: skip


COUNTS = ("zero", "lost", "broken", "differ", "forward", "backward", "seconds", "cpu_seconds")


def attack_network(number, title, model, x, y, rows, args, precision, device, state):
    """Run the attacks on one network. Returns (accuracies {row title: %}, facts {row title: ...},
    Found, flags)."""
    parts = zip(x.split(args.batch_size), y.split(args.batch_size), strict=True)
    leads = [
        attacks.judge(model, part.to(device), labels.to(device), eot=args.eot)[0].cpu()
        for part, labels in parts
    ]
    correct = torch.cat(leads) <= 0
    accuracy = {"clean": 100 * correct.double().mean().item()}
    print(f"{title}: clean {accuracy['clean']:.2f}", flush=True)
    flags = inspect(model, x[: args.batch_size].to(device), args.eot)
    facts, found = {}, Found(int(correct.sum()))
    robust, standing = correct.clone(), correct.clone()
    for k, (row, name, follows) in enumerate(args.attacks):
        standing = standing if follows else correct.clone()
        todo = standing.nonzero()[:, 0]
        alpha = args.alpha
        if row.startswith("sweep") and alpha is None:
            alpha = attacks.default_alpha(args.eps, attacks.parse(SWEEP[0])[1])
        batches = todo.split(args.batch_size) if len(todo) else []
        progress = Progress(f"{title}, {row}", len(batches))
        for b, part in enumerate(batches):
            key, progress.batch = f"{number}-{k}-{b}", b
            if b % run.world() == run.rank() and not state.has(key):
                batch = attack_batch(
                    model, x, y, part, rows, name, args, precision, device, alpha, progress.show
                )
                state.put(key, batch)
        run.wait()  # the batches of the other processes lie in `state` too
        sums = dict.fromkeys(COUNTS, 0)
        for b in range(len(batches)):
            batch = state.get(f"{number}-{k}-{b}")
            found.add(row, f"{number}-{k}-{b}", batch)
            for count in COUNTS:
                sums[count] += batch[count]
        progress.clear()
        took = found.fooled.get(row, todo[:0])
        standing[took] = False
        robust &= standing
        accuracy[row] = 100 * standing.double().mean().item()
        facts[row] = {
            "attacked": len(todo), "took": len(took), "forward_passes": sums["forward"],
            "backward_passes": sums["backward"], "seconds": round(sums["seconds"], 1),
            "cpu_seconds": round(sums["cpu_seconds"], 1), "zero_gradients": sums["zero"],
            "lost_in_fp32": sums["lost"],
            "differ_when_judged_again": sums["differ"],
        }  # fmt: skip
        print(
            f"{title}: {row} {accuracy[row]:.2f}  (took {len(took)} of {len(todo)} images, "
            f"{sums['seconds']:.0f} s)",
            flush=True,
        )
        flags += attack_flags(title, row, sums, len(took))
    accuracy[WORST] = 100 * robust.double().mean().item()
    return accuracy, facts, found, flags + compare_rows(args.attacks, accuracy)


def attack_flags(title, row, sums, took):
    """What one attack's counts say against its accuracy, as sentences. Raises UserError where more
    images than rounding explains are not fooled when they are judged again."""
    flags = []
    differ = sums["differ"]
    if differ > max(1, (took + differ) // 100):
        raise run.UserError(
            f"{title}, {row}: {differ} of {took + differ} adversarial images are classified "
            "correctly when evaluated again in fp32: no table; the network is random (try --eot "
            "20), or its result depends on the batch"
        )
    if differ:
        flags.append(
            f"{row}: {differ} images count as robust because the network decides on them by "
            "rounding: fooled in one batch, not in another"
        )
    if sums["zero"]:
        flags.append(
            f"{row}: {sums['zero']} images have a zero gradient, so attacks by gradient fail on "
            "them; look for saturated outputs or operations without a derivative, and trust "
            "apgd-dlr, square and fab-t"
        )
    if sums["broken"]:
        flags.append(
            f"{row}: {sums['broken']} images count as misclassified because their logits are not "
            "finite: an overflow, no decision; mend the network"
        )
    return flags


@torch.no_grad()
def inspect(model, x, eot=1):
    """AutoAttack's questions to a network before the attacks, as sentences; x: a few images."""
    flags = []
    passes = [attacks.logits_in_fp32(model, x) for _ in range(3)]
    size = passes[0].norm(dim=1).clamp(min=1e-10)
    change = max(((p - passes[0]).norm(dim=1) / size).max().item() for p in passes[1:])
    if change > 1e-4:
        advice = (
            f"attacked and judged by the mean of {eot} passes"
            if eot > 1
            else "these accuracies are too high; attack the mean of many passes with --eot 20"
        )
        flags.append(
            f"the network is random (logits change by {100 * change:.2g} % between passes): "
            f"{advice}"
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
        kind, steps, restarts = attacks.parse(name)
        if kind != "square" and not row.startswith(("AutoAttack", "fast")):
            kind += f" with {restarts} starts" if restarts > 1 else ""
            kinds.setdefault(row.removesuffix(name) + kind, []).append((steps, accuracy[row]))
    for kind, points in kinds.items():
        (most, last), *rest = sorted(points, reverse=True)
        if rest and rest[0][1] - last > 0.5:
            flags.append(
                f"{kind}: accuracy still falls from {rest[0][1]:.2f} to {last:.2f} between "
                f"{rest[0][0]} and {most} steps: take more steps, or apgd-t"
            )
    return flags


def verify(found, accuracy, args, title, total):
    """Raise UserError where the images found do not give the accuracies of the table, or leave the
    ball or [0,1]."""
    taken = set()
    for row, _, follows in args.attacks:
        fooled = set(found.fooled.get(row, torch.zeros(0)).tolist())
        taken = (taken if follows else set()) | fooled
        again = 100 * (found.correct - len(taken)) / total
        if abs(again - accuracy[row]) > 1e-9:
            raise run.UserError(
                f"{title}, {row}: {accuracy[row]:.2f} in the table, {again:.2f} from its images: "
                "no table; report this"
            )
    outside = found.low < 0 or found.high > 1 or found.largest > args.eps / 255
    if found.images and (found.nan or outside):
        raise run.UserError(
            f"{title}: adversarial images leave the ball or [0,1] (perturbation "
            f"{255 * found.largest:.6g}/255, {found.nan} NaN, values {found.low:.6g} to "
            f"{found.high:.6g}): no table"
        )


# --- main -----------------------------------------------------------------------------------------


def check_plan(args, networks, x):
    """Raise UserError for an attack that these networks or images do not admit, before any runs."""
    classes = networks[0][1].spec["num_classes"]
    for row, name, _ in args.attacks:
        needed = attacks.CLASSES.get(attacks.parse(name)[0], 2)
        if classes < needed:
            raise run.UserError(
                f"--attacks, {row}: its loss needs {needed} classes, here are {classes}"
                + (": take apgd-ce,fab-t,square" if classes > 1 else ", which no attack can change")
            )
    most = 255 * x[0].numel() ** 0.5
    if args.norm == "l2" and args.eps > most:
        raise run.UserError(f"--eps {args.eps:g}: the images' whole box is {most:.0f}/255 across")


def main(args):
    device = run.get_device(args.device)
    precision = run.Precision(args.precision, device)
    networks, name = models.for_evaluation(args, device)
    x, y, rows, total = data.for_evaluation(name, networks, args.data_dir, args.limit)
    networks = models.check_statistics(networks, x, y)
    first = models.place_of(networks[0][2])
    networks = models.with_gamma(networks, args.gamma)
    check_plan(args, networks, x)
    settings = {
        "model": [digest(*model.state_dict().values()) for _, model, _ in networks],
        "data": digest(x, y), "attacks": [row for row, _, _ in args.attacks], "eps": args.eps,
        "norm": args.norm, "alpha": args.alpha, "seed": args.seed, "gamma": args.gamma,
        "eot": args.eot, "precision": precision.name,
    }  # fmt: skip
    unfinished = settings | {
        "batch size": args.batch_size, "device": device.type, "torch": str(torch.__version__),
    }  # fmt: skip
    results = None
    if run.rank() == 0:
        results = run.Results(
            "adversarial", first, settings,
            path=args.json, tensorboard=args.tensorboard, overwrite=args.overwrite,
        )  # fmt: skip
    try:
        return evaluate(
            args, device, precision, networks, name, (x, y, rows, total), unfinished, results
        )
    finally:
        if results:
            results.close()


def open_state(results, settings, args):
    """The State of the evaluation, the same for all processes."""
    places = [str(results.path.resolve()) if results else None]
    if run.world() > 1:
        torch.distributed.broadcast_object_list(places)
    folder = Path(places[0] + ".state")
    if run.rank() == 0:
        state = State(folder, settings, args.resume, args.overwrite)
    run.wait()
    return State(folder, settings, resume=True, overwrite=False) if run.rank() else state


def evaluate(args, device, precision, networks, name, images, settings, results):
    """Attack the networks, print the table and write the results."""
    x, y, rows, total = images
    if args.save and results:
        run.try_file(args.save, "--save")
    limit_note = f"{len(y)} of {total}" if len(y) < total else f"all {total}"
    print(
        f"{name} test, {limit_note} images; {args.norm} eps {args.eps:g}/255, seed {args.seed}, "
        f"{precision.name}; accuracy in %"
    )
    general = [flag for flag in [attacks.check_eps(args.eps, args.norm, args.alpha)] if flag]
    if any(row.startswith("fast") for row, _, _ in args.attacks):
        general.append(
            "fast is APGD-CE and APGD towards 5 classes, not AutoAttack: publish numbers of "
            "standard"
        )
    if general:
        print("\n".join(f"warning: {flag}" for flag in general), flush=True)
    state = open_state(results, settings, args)
    entries, every, notes = [], [], [f"warning: {flag}" for flag in general]
    for k, (title, model, entry) in enumerate(networks):
        accuracy, facts, found, flags = attack_network(
            k, title, model, x, y, rows, args, precision, device, state
        )
        verify(found, accuracy, args, title, len(y))
        every.append((title, found))
        largest = 255 * found.largest
        notes += [f"warning: {title}: {flag}" for flag in flags]
        if found.images:  # none where no image was right before the attack
            notes.append(
                f"{title}: {found.images} adversarial images evaluated again in fp32, largest "
                f"perturbation {largest:.6g}/255, {found.nan} NaN, values {found.low:.4g} to "
                f"{found.high:.4g}"
            )
        entries.append(
            entry | {
                "clean": {"error": 100 - accuracy["clean"]}, "accuracy": accuracy, "runs": facts,
                "largest_perturbation": largest, "nan": found.nan,
                "values": [found.low, found.high], "warnings": general + flags,
            }
        )  # fmt: skip
    titles = list(entries[0]["accuracy"])
    if len(args.attacks) == 1:
        titles.remove(WORST)
    print_tables(titles, entries, [title for title, _, _ in networks])
    print("\n".join(["", *notes]))
    output = {
        "dataset": name, "split": "test", "images": len(y), "limit": args.limit,
        "norm": args.norm, "eps": args.eps, "alpha": args.alpha, "seed": args.seed,
        "eot": args.eot, "attacks": titles[1:], "precision": precision.name,
        "checkpoints": entries,
    }  # fmt: skip
    run.wait()
    if run.rank():
        return output
    output = results.write(output)
    if args.save:
        save_images(Path(args.save).expanduser(), every, rows, state, args)
    write_tensorboard(results.folder, x, every)
    state.remove()
    return output


def print_tables(titles, entries, names):
    """Accuracies, and what each attack cost."""
    lines = [[t, *(entry["accuracy"][t] for entry in entries)] for t in titles]
    print("\n" + run.table(lines, ["accuracy", *names], width=run.window()))
    cost = []
    for row in titles:
        runs = [entry["runs"][row] for entry in entries if row in entry["runs"]]
        if runs:
            keys = ("took", "forward_passes", "backward_passes", "seconds")
            took, forward, backward, seconds = (sum(r[key] for r in runs) for key in keys)
            cost.append([row, took, f"{forward:,}", f"{backward:,}", f"{seconds:.1f}"])
    header = ["cost, all networks", "images taken", "forward", "backward", "seconds"]
    print("\n" + run.table(cost, header))


def save_images(path, every, rows, state, args):
    """Write the adversarial images of every network and attack to one file."""
    saved = {}
    for title, found in every:
        saved[title] = {}
        for row, keys in found.keys.items():
            batches = [state.get(key) for key in keys]
            positions = torch.cat([batch["positions"] for batch in batches])
            images = torch.cat([batch["images"] for batch in batches])
            saved[title][row] = {"rows": rows[positions], "images": images}
    run.save_checkpoint(path, {"eps": args.eps, "norm": args.norm, "networks": saved})


def write_tensorboard(folder, x, every):
    """Per network the images that it gets wrong by the largest lead: clean, attacked, and the
    perturbation around grey, each one's largest entry black or white."""
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(folder)) as writer:
        for title, found in every:
            if not found.strongest:
                continue
            clean = run.to_float(x[[p for _, p, _ in found.strongest]]).float()
            adv = torch.stack([image for _, _, image in found.strongest])
            delta = adv - clean
            delta = delta / delta.flatten(1).abs().amax(1).clamp(min=1e-12).view(-1, 1, 1, 1)
            strip = [torch.cat(list(part), 2) for part in (clean, adv, delta / 2 + 0.5)]
            writer.add_image(f"strongest/{title}", torch.cat(strip, 1).clamp(0, 1))


if __name__ == "__main__":
    run.cli(main, parse_args)
