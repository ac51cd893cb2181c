"""How smooth trained networks are, and how far their decisions are away: one table, side by side.

    python eval/smoothness.py runs/a/last.pt [runs/b/last.pt ...] --limit 200
    python eval/smoothness.py runs/ct/last.pt runs/ct/teacher.pt      # with and without BatchNorm

Of test images x in [0,1] with label y; f: logits in eval mode; L: cross-entropy in nats. Linf
lengths and eps are in pixel units of 1/255. Means are over the images, all arithmetic is fp32.

gradient   ||dL/dx||_1 / 255, nats per 1/255: the first-order rise of L for an Linf step of 1/255.
           ||dL/dx||_2, nats per unit of L2 distance.
ligs       local input-gradient similarity: the cosine of dL/dx at x and at x + noise, noise uniform
           in the Linf ball of eps, the mean over --ligs-samples draws. 1 is a locally linear L.
lipschitz  max of ||f(x') - f(x)||_1 / ||x' - x||_inf, logits per 1/255, over x' of the eps-ball
           (Yang et al. 2020, here of logits). A lower bound: the largest found by PGD on the
           numerator in balls of eps, eps/2, eps/4 and eps/8, --steps in all, from random starts.
surface    mean L of the first --surface-images images at x + a s + b r: s the sign of dL/dx, r
           random signs, a and b from -2 eps to 2 eps in 1/255, cut with [0,1]. A picture.
           "rise at eps": L at a = eps, b = 0, minus L at 0, in nats.
margin     Linf distance in 1/255 to the nearest misclassified point found: FAB towards each of the
           likeliest --targets classes (--fab-steps), then bisection on the segment to it. An upper
           bound of the true distance; 0 for images misclassified already. Images for which no
           point was found ("infinite") are left out of the mean, not of the quantiles.
logits     logit of y minus the largest other, in logits; negative where misclassified.
hessian    eigenvalue of largest modulus of the Hessian of mean L by power iteration (--iterations):
           in the parameters, nats per squared unit of them, which says nothing between networks
           with and without normalisers: the weights before a normaliser can be scaled, and with
           them this figure, while the function stays; and in the image, the mean over images of
           each one's own, nats per squared unit of L2 distance.

Writes the numbers, distributions included, as JSON, the surface as an SVG, both to TensorBoard.
"""

import contextlib
import html
import math
import sys
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from common import attacks, data, models, run

MEASURES = ("gradient", "ligs", "lipschitz", "surface", "margin", "logits", "hessian")
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


def parse_args(argv=None):
    parser = run.Parser(__file__, __doc__)
    models.add_arguments(parser)
    parser.add_argument("--data-dir", default="data", help="folder of the data sets")
    parser.add_argument(
        "--measures", type=measures, default=list(MEASURES), metavar="A,B",
        help=f"of {', '.join(MEASURES)} (default: all)",
    )  # fmt: skip
    parser.add_argument(
        "--limit", type=run.nonnegative(int), default=200, metavar="N",
        help="N test images, the same number of each class; 0 is all",
    )  # fmt: skip
    parser.add_argument("--eps", type=float, default=8.0, help="radius of the ball in 1/255")
    parser.add_argument("--steps", type=run.positive(int), default=20, help="of PGD (lipschitz)")
    parser.add_argument(
        "--fab-steps", type=run.positive(int), default=20, help="of FAB towards each class"
    )
    parser.add_argument(
        "--ligs-samples", type=run.positive(int), default=4, help="draws of noise per image"
    )
    parser.add_argument("--targets", type=run.positive(int), default=9, help="classes for FAB")
    parser.add_argument("--iterations", type=run.positive(int), default=20, help="for the Hessian")
    parser.add_argument(
        "--surface-images", type=run.positive(int), default=16, help="images of the loss surface"
    )
    parser.add_argument(
        "--surface-points", type=run.positive(int), default=21, help="of the surface, per side"
    )
    parser.add_argument(
        "--batch-size", type=run.positive(int), default=100, help="images measured at once"
    )
    parser.add_argument(
        "--seed", type=run.nonnegative(int), default=0, help="of all random numbers"
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")
    parser.add_argument(
        "--json", metavar="FILE", help="results (default: <first checkpoint>.smoothness.json)"
    )
    parser.add_argument(
        "--tensorboard", metavar="DIR", help="pictures (default: smoothness/ beside the results)"
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="replace results of other settings"
    )
    args = parser.parse_args(argv)
    if not 0 < args.eps <= 255:
        parser.error(f"--eps {args.eps:g} is not in (0, 255]: it is given in units of 1/255")
    return args


def measures(text):
    """argparse type of --measures: names of MEASURES, each once."""
    chosen = run.listed(str)(text)
    for name in chosen:
        if name not in MEASURES:
            raise run.UserError(f"--measures {name}: choose from {', '.join(MEASURES)}")
    return chosen


# --- the measures: of a network in eval mode, images fp32 (N,3,S,S), labels (N,) ------------------


def check_gradient(label, model, x, measures):
    """Raise UserError where a measure needs a gradient and the output of one image has none."""
    if measures == ["logits"]:
        return
    with run.eval_mode(model), torch.enable_grad():
        logits = model(x[:1].detach().requires_grad_())
    if not logits.requires_grad:
        raise run.UserError(
            f"{label}: the model detaches its output from its input, so it has no gradient: only "
            "--measures logits"
        )


def input_gradient(net, x, y):
    """dL/dx of each image, (N,3,S,S)."""
    x = x.detach().requires_grad_()
    with torch.enable_grad():
        return torch.autograd.grad(F.cross_entropy(net(x), y, reduction="sum"), x)[0]


def gradient_norms(net, x, y):
    """(L1 norm / 255, L2 norm), each (N,)."""
    grad = input_gradient(net, x, y).flatten(1)
    return grad.abs().sum(1) / 255, grad.norm(dim=1)


def ligs(net, x, y, eps, samples, seed, index):
    """Mean cosine (N,) of the input gradients at x and at x + noise in the Linf ball of eps.

    Benz et al. 2021 call it local input gradient similarity. NaN where a gradient is zero.
    """
    here = input_gradient(net, x, y).flatten(1)
    total = torch.zeros(len(x), device=x.device)
    for k in range(samples):
        noise = attacks.start_noise(x, "linf", seed, index, "ligs", k)
        there = input_gradient(net, (x + eps / 255 * noise).clamp_(0, 1), y).flatten(1)
        size = here.norm(dim=1) * there.norm(dim=1)
        total += (here * there).sum(1) / size
    return total / samples


def logit_distance(logits, clean, target):
    return (logits - clean).abs().sum(1)


def lipschitz(net, x, eps, steps, seed, index, stages=4):
    """Largest ||f(x') - f(x)||_1 / ||x' - x||_inf found per image, (N,), logits per 1/255."""
    with torch.no_grad():
        clean = net(x)
    best = torch.zeros(len(x), device=x.device)
    for stage in range(stages):  # balls of eps, eps/2, ...: the slope may be steepest near x
        radius = eps / 2**stage
        noise = attacks.start_noise(x, "linf", seed, index, "lipschitz", stage)
        adv = attacks.pgd(
            net, x, clean, radius, steps=max(1, steps // stages), loss=logit_distance, noise=noise
        )
        with torch.no_grad():
            rise = logit_distance(net(adv), clean, None)
        far = 255 * attacks.distance(adv, x, "linf").float()
        best = torch.maximum(best, torch.where(far > 0, rise / far.clamp(min=1e-12), 0))
    return best


def loss_surface(net, x, y, eps, points, seed):
    """(offsets (P,) in 1/255, mean L (P,P)); rows: along the gradient's sign, columns: random."""
    offsets = torch.linspace(-2 * eps, 2 * eps, points)
    along = input_gradient(net, x, y).sign()
    bits = torch.randint(0, 2, x.shape, generator=run.generator(seed, "surface"))
    random = (bits * 2 - 1).to(x)
    surface = torch.empty(points, points)
    with torch.no_grad():
        for i, a in enumerate(offsets.tolist()):
            for j, b in enumerate(offsets.tolist()):
                moved = (x + (a * along + b * random) / 255).clamp_(0, 1)
                surface[i, j] = F.cross_entropy(net(moved), y)
    return offsets, surface


def logit_margin(net, x, y):
    """Logit of the label minus the largest other, (N,)."""
    with torch.no_grad():
        logits = net(x)
    return attacks.pick(logits, y) - attacks.without(logits, y).amax(1)


def decision_margin(model, x, y, steps, targets, halvings=12):
    """Linf distance (N,) in 1/255 to the nearest misclassified point found; infinity where none."""
    right = (attacks.judge(model, x, y)[0] <= 0).nonzero()[:, 0]
    margin = torch.zeros(len(x), dtype=torch.float64, device=x.device)
    if not len(right):
        return margin
    x, y = x[right], y[right]
    best, nearest = torch.full_like(margin[right], torch.inf), x.clone()
    with attacks.victim(model, x) as net:
        count = min(targets, net.classes - 1)
        order = attacks.without(net.logits(x), y).topk(count, dim=1).indices
        for k in range(count):
            adv, far = attacks.fab(net, x, y, None, "linf", steps, order[:, k])
            closer = far < best
            best = torch.where(closer, far, best)
            nearest = torch.where(attacks.per_image(closer, x), adv, nearest)
        low, high = torch.zeros_like(best).float(), torch.ones_like(best).float()
        for _ in range(halvings):  # the share of the way at which the decision changes
            middle = (low + high) / 2
            point = x + attacks.per_image(middle, x) * (nearest - x)
            wrong = net.fooled(net.logits(point), y)
            low, high = torch.where(wrong, low, middle), torch.where(wrong, middle, high)
        point = x + attacks.per_image(high, x) * (nearest - x)
        found = 255 * attacks.distance(point, x, "linf")
    margin[right] = torch.where(best.isfinite(), found, best)
    return margin


def power_iteration(multiply, start, iterations, dot):
    """Rayleigh quotient of the eigenvector of largest modulus. multiply: v -> Hv."""
    v, value = start, None
    for _ in range(iterations):
        v = v / dot(v, v).sqrt().clamp(min=1e-30)
        hv = multiply(v)
        value = dot(v, hv)
        v = hv
    return value


def parameter_hessian(net, x, y, batch_size, iterations, seed):
    """Eigenvalue of largest modulus of the Hessian of mean L in the parameters, a float."""
    parameters = [p for p in net.parameters() if p.is_floating_point()]
    flags = [p.requires_grad for p in parameters]
    sizes = [p.numel() for p in parameters]

    def multiply(v):
        parts = [a.view_as(p) for a, p in zip(v.split(sizes), parameters, strict=True)]
        total = torch.zeros_like(v)
        for images, labels in zip(x.split(batch_size), y.split(batch_size), strict=True):
            with torch.enable_grad():
                loss = F.cross_entropy(net(images), labels, reduction="sum") / len(x)
                grads = torch.autograd.grad(loss, parameters, create_graph=True, allow_unused=True)
                inner = sum((g * a).sum() for g, a in zip(grads, parts, strict=True)
                            if g is not None)  # fmt: skip
                second = torch.autograd.grad(inner, parameters, allow_unused=True)
            second = [
                torch.zeros_like(p) if g is None else g
                for g, p in zip(second, parameters, strict=True)
            ]
            total += torch.cat([g.flatten() for g in second])
        return total

    start = torch.randn(sum(sizes), generator=run.generator(seed, "hessian")).to(x.device)
    try:
        for p in parameters:
            p.requires_grad_()
        return power_iteration(multiply, start, iterations, torch.dot).item()
    finally:
        for p, flag in zip(parameters, flags, strict=True):
            p.requires_grad_(flag)


def image_hessian(net, x, y, iterations, seed, index):
    """Eigenvalue of largest modulus of the Hessian of each image's L in the image, (N,)."""

    def multiply(v):
        images = x.detach().requires_grad_()
        with torch.enable_grad():
            loss = F.cross_entropy(net(images), y, reduction="sum")
            (grad,) = torch.autograd.grad(loss, images, create_graph=True)
            return torch.autograd.grad((grad * v).sum(), images)[0]

    def dot(a, b):
        return (a * b).flatten(1).sum(1).view(-1, *[1] * (a.ndim - 1))

    start = attacks.draw(torch.randn, x.shape[1:], seed, index, "hessian")
    return power_iteration(multiply, start, iterations, dot).flatten()


# --- one network ----------------------------------------------------------------------------------


def spread(values):
    """Mean over the finite values of a measure, the number of the others, quantiles of all, values.

    What is not finite becomes None, for JSON has no infinity."""
    values = values.double().cpu()
    quantiles = values.quantile(torch.tensor(QUANTILES, dtype=torch.float64))
    found = values[values.isfinite()]

    def plain(numbers):
        return [float(f"{v:.6g}") if math.isfinite(v) else None for v in numbers.tolist()]

    return {
        "mean": found.mean().item() if len(found) else None,
        "infinite": len(values) - len(found),
        "quantiles": dict(zip(map(str, QUANTILES), plain(quantiles), strict=True)),
        "values": plain(values),
    }


@contextlib.contextmanager
def still(model):
    """Eval mode, no gradients of parameters."""
    with attacks.frozen(model) as net, torch.no_grad():
        yield net


def measure(model, x, y, rows, args):
    """The measures asked for: {name: number or distribution}."""
    found = {}

    def add(name, values):
        found.setdefault(name, []).append(values.detach().cpu())

    first = slice(0, args.surface_images)
    with still(model) as net:
        parts = zip(*(v.split(args.batch_size) for v in (x, y, rows)), strict=True)
        for images, labels, index in parts:
            if "gradient" in args.measures:
                l1, l2 = gradient_norms(net, images, labels)
                add("gradient l1", l1)
                add("gradient l2", l2)
            if "ligs" in args.measures:
                values = ligs(net, images, labels, args.eps, args.ligs_samples, args.seed, index)
                add("ligs", values)
            if "lipschitz" in args.measures:
                add("lipschitz", lipschitz(net, images, args.eps, args.steps, args.seed, index))
            if "margin" in args.measures:
                add("margin", decision_margin(net, images, labels, args.fab_steps, args.targets))
            if "logits" in args.measures:
                add("logit margin", logit_margin(net, images, labels))
            if "hessian" in args.measures:
                values = image_hessian(net, images, labels, args.iterations, args.seed, index)
                add("image hessian", values)
        result = {name: spread(torch.cat(values)) for name, values in found.items()}
        if "hessian" in args.measures:
            result["parameter hessian"] = parameter_hessian(
                net, x, y, args.batch_size, args.iterations, args.seed
            )
        if "surface" in args.measures:
            offsets, surface = loss_surface(
                net, x[first], y[first], args.eps, args.surface_points, args.seed
            )
            grad = input_gradient(net, x[first], y[first]).sign()
            ahead = (x[first] + args.eps / 255 * grad).clamp_(0, 1)
            losses = [F.cross_entropy(net(v), y[first]).item() for v in (x[first], ahead)]
            result["surface"] = {
                "rise": losses[1] - losses[0], "offsets": offsets.tolist(),
                "loss": surface.tolist(),
            }  # fmt: skip
    return result


ROWS = (  # title, measure, what of it
    ("gradient, L1 (nats per 1/255)", "gradient l1", "mean"),
    ("gradient, L2 (nats per unit)", "gradient l2", "mean"),
    ("gradient similarity, LIGS (cosine)", "ligs", "mean"),
    ("Lipschitz (logits per 1/255)", "lipschitz", "mean"),
    ("rise of L at eps (nats)", "surface", "rise"),
    ("decision margin, mean (1/255)", "margin", "mean"),
    ("decision margin, median (1/255)", "margin", "0.5"),
    ("decision margin, none found (images)", "margin", "infinite"),
    ("logit margin, mean", "logit margin", "mean"),
    ("logit margin, median", "logit margin", "0.5"),
    ("Hessian, parameters (nats per unit^2)", "parameter hessian", None),
    ("Hessian, image (nats per unit^2)", "image hessian", "mean"),
)


def lookup(result, measure, key):
    value = result[measure]
    if key is not None:
        value = value["quantiles"][key] if key not in value else value[key]
    return "-" if value is None else value


# --- pictures -------------------------------------------------------------------------------------


def shade(share):
    """A colour between dark blue (0) and yellow (1), as (R,G,B) in 0..255; grey for NaN."""
    if not math.isfinite(share):
        return (128, 128, 128)
    stops = ((20, 20, 90), (30, 110, 160), (70, 180, 120), (250, 230, 60))
    place = min(max(share, 0.0), 1.0) * (len(stops) - 1)
    k = min(int(place), len(stops) - 2)
    return tuple(round(a + (b - a) * (place - k)) for a, b in zip(*stops[k : k + 2], strict=True))


def draw_surfaces(path, surfaces, eps):
    """SVG of the surfaces {label: {"offsets", "loss"}}, side by side on one scale of colours."""
    losses = [v for s in surfaces.values() for row in s["loss"] for v in row]
    losses = [v for v in losses if math.isfinite(v)] or [0.0]
    low, high = min(losses), max(losses)
    side, top, gap, parts = 210, 40, 40, []
    for n, (label, s) in enumerate(surfaces.items()):
        left, points = gap + n * (side + gap), len(s["loss"])
        cell = side / points
        parts.append(f'<text x="{left}" y="18" font-weight="bold">{html.escape(label)}</text>')
        values = [v for row in s["loss"] for v in row]
        parts.append(f'<text x="{left}" y="34">L {min(values):.3g} to {max(values):.3g}</text>')
        for i, row in enumerate(s["loss"]):
            for j, value in enumerate(row):
                colour = f"rgb{shade((value - low) / max(high - low, 1e-12))}"
                x, y = left + j * cell, top + (points - 1 - i) * cell
                parts.append(
                    f'<path d="M{x:.1f} {y:.1f}h{cell + 0.3:.1f}v{cell + 0.3:.1f}'
                    f'h-{cell + 0.3:.1f}Z" fill="{colour}"/>'
                )
        note = f"right: random (+-{2 * eps:g}/255), up: along the gradient"
        parts.append(f'<text x="{left}" y="{top + side + 16}">{note}</text>')
    size = f'width="{gap + len(surfaces) * (side + gap) + 60}" height="{top + side + 26}"'
    parts.insert(0, f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-size="12">')
    Path(path).write_text("\n".join([*parts, "</svg>\n"]))


def write_tensorboard(folder, results):
    """Histograms of the distributions and the surfaces as pictures."""
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(folder)) as writer:
        for label, result in results.items():
            for name, value in result.items():
                if name == "surface":
                    loss = torch.tensor(value["loss"]).flip(0)
                    share = (loss - loss.min()) / (loss.max() - loss.min()).clamp(min=1e-12)
                    colours = [[shade(v) for v in row] for row in share.tolist()]
                    image = torch.tensor(colours, dtype=torch.uint8).permute(2, 0, 1)
                    image = image.repeat_interleave(8, 1).repeat_interleave(8, 2)
                    writer.add_image(f"surface/{label}", image)
                elif isinstance(value, dict):
                    finite = [v for v in value["values"] if v is not None]
                    if finite:
                        writer.add_histogram(f"{name}/{label}", torch.tensor(finite))
                        writer.add_scalar(f"{name} mean/{label}", value["mean"])
                elif math.isfinite(value):
                    writer.add_scalar(f"{name}/{label}", value)


# --- main -----------------------------------------------------------------------------------------


def main(args):
    device = run.get_device(args.device)
    networks, name = models.for_evaluation(args, device)
    x, y, rows, total = data.for_evaluation(name, networks, args.data_dir, args.limit)
    networks = models.check_statistics(networks, x, y)
    first = models.place_of(networks[0][2])
    settings = {
        "checkpoints": [facts["checkpoint"] for _, _, facts in networks], "dataset": name,
        "images": len(y), "limit": args.limit, "measures": args.measures, "eps": args.eps,
        "steps": args.steps, "fab_steps": args.fab_steps, "targets": args.targets,
        "ligs_samples": args.ligs_samples, "iterations": args.iterations, "seed": args.seed,
        "surface_images": args.surface_images,
    }  # fmt: skip
    place = run.Results(
        "smoothness", first, settings,
        path=args.json, tensorboard=args.tensorboard, overwrite=args.overwrite,
    )  # fmt: skip
    try:
        x, y, rows = run.to_float(x.to(device)), y.to(device), rows.to(device)
        return evaluate(args, networks, (name, x, y, rows, total), settings, place)
    finally:
        place.close()


def evaluate(args, networks, images, settings, place):
    """Measure the networks, print the table and write the results."""
    name, x, y, rows, total = images
    print(
        f"{name} test, {len(y)} of {total} images; eps {args.eps:g}/255, seed {args.seed}; means "
        "over the images unless said otherwise"
    )
    general = [flag for flag in [attacks.check_eps(args.eps)] if flag]
    results, entries, notes = {}, [], [f"warning: {flag}" for flag in general]
    for label, model, facts in networks:
        check_gradient(label, model, x, args.measures)
        logits = attacks.logits_in_fp32(model, x, args.batch_size)
        broken = int((~logits.isfinite().all(1)).sum())
        warnings = list(general)
        if broken:
            warnings.append(
                f"the logits of {broken} of {len(y)} images are not finite: they count as "
                "misclassified, and measures of them as not found; mend the network"
            )
            notes.append(f"warning: {label}: {warnings[-1]}")
        results[label] = measure(model, x, y, rows, args)
        error = run.metrics(logits, y)["error"]
        entries.append(
            facts | {"clean": {"error": error}, "measures": results[label], "warnings": warnings}
        )
        print(f"{label}: done", flush=True)
    lines = [["clean error (%)", *(e["clean"]["error"] for e in entries)]]
    for title, measured, key in ROWS:
        if measured in entries[0]["measures"]:
            lines.append([title, *(lookup(r, measured, key) for r in results.values())])
    print("\n" + run.table(lines, ["", *results], ".4g", run.window()))
    if notes:
        print("\n".join(["", *notes]))
    output = place.write({"split": "test"} | settings | {"checkpoints": entries})
    if "surface" in args.measures:
        picture = place.path.with_suffix(".svg")
        draw_surfaces(picture, {k: r["surface"] for k, r in results.items()}, args.eps)
        print(f"written: {picture}")
    write_tensorboard(place.folder, results)
    return output


if __name__ == "__main__":
    run.cli(main, parse_args)
