"""How does batch normalisation help optimisation? One network trained with and without, and probed.

Paper: Santurkar, Tsipras, Ilyas, Madry, "How Does Batch Normalization Help Optimization?",
NeurIPS 2018, arXiv 1805.11604. Every pair of --norms and --lrs is trained under the same seed, data
order and fixed rate (the VGG and the linear network from the same initial weights too), and every
--measure-every steps this is measured, with weights w, batch (x, y), loss L and gradient g at w:

    landscape        L(w - eta g) over the step sizes eta: the band of Fig. 4a
    predictiveness   ||grad L(w) - grad L(w - eta g)|| over eta: the band of Fig. 4b
    effective beta   largest ||grad L(w) - grad L(w - eta g)|| / ||eta g||, Fig. 4c
    random_*         the same along a random direction of g's length
    covariate shift  ||G - G'|| and cos(G, G') of Definition 2.1 for --layers: G' is the gradient of
                     a layer once all before it have made their step, on the same batch
    activations      one unit of each of --slots: histogram, quantiles, mean and variance, and how
                     far these move in one step (from this step and batch to the next)

All of it runs through torch.func.functional_call on copies, so the trajectory is the one without
measuring, bit for bit. In a chain (VGG, allconv, linear) the layers before the probed one are run
once for all of them. Figures go to <run>/figures as SVG, bands to TensorBoard's CUSTOM SCALARS.

The paper leaves open or contradicts itself on, and here:
  1. VGG         vgg16: 13 convolutions, the normaliser before each ReLU, one linear layer
  2. loss        includes 0.5 * --weight-decay * ||weights||^2, as the paper's plots suggest
  3. gradients   of the same batch at both points, as in the text. Late in training its gradient is
                 gone after the smallest step: the difference is g itself, and beta settles at 1 /
                 (smallest eta), the 20 of Fig. 4c, for both nets; it tells nothing of them then
  4. linear net  loss 0.5 * sum of squares, no normaliser after the last matrix, fp64
  5. noise       as in models.NoisyBatchNorm; l1, l2, linf as in models.LpNorm
  6. precision   fp32 by default: the differences measured are of the size of bf16's rounding

    python bn_ablation.py                                      # embedded shapes data, minutes
    python bn_ablation.py --dataset cifar10 --lrs 0.1,0.5      # the paper's, 15,000 steps each
    python bn_ablation.py --arch dln25 --norms none,bn,l1,l2,linf
    python bn_ablation.py --resume runs/a --norms l1,l2        # add runs to its figures
"""

import argparse
import json
import math
import statistics
import sys
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch.func import functional_call

from common import data, models, run

# --- options ------------------------------------------------------------------------------------

DEFAULTS = {  # per data set: arch, steps, lrs
    "shapes": ("vgg11-16", 600, [0.3]),
    "cifar10": ("vgg16", 15_000, [0.1]),
    "cifar100": ("vgg16", 15_000, [0.1]),
    "gaussian": ("dln25", 10_000, [1e-6]),
    "photographs": ("vgg16", 15_000, [0.1]),  # every tree of images
}
NORMS = ("none", "bn", "noisy-bn", "l1", "l2", "linf", "gn")
PROBED = {"vgg16": ((5, 10), (3, 11)), "dln25": ((9, 17), (1, 11, 24))}  # the paper's figures


def places(text):
    """argparse type: numbers from 1 with commas between them, or "all"."""
    return text if text == "all" else run.listed(run.positive(int))(text)


def parse_args(argv=None):
    parser = run.Parser(__file__, __doc__)
    data.add_arguments(parser)
    group = parser.add_argument_group("model and optimisation")
    group.add_argument("--arch", help="default: vgg11-16 for shapes, else vgg16; dln25 is linear")
    group.add_argument(
        "--norms",
        type=run.listed(str),
        default=["none", "bn", "noisy-bn"],
        help=f"of {', '.join(NORMS)}",
    )
    group.add_argument(
        "--lrs",
        type=run.listed(run.positive(float)),
        help="fixed (default: shapes 0.3, dln25 1e-6, else 0.1)",
    )
    group.add_argument(
        "--steps",
        type=run.positive(int),
        help="length of a training (default: shapes 600, dln25 10000, else 15000)",
    )
    group.add_argument("--batch-size", type=run.positive(int), default=128)
    group.add_argument("--momentum", type=run.nonnegative(float), default=0.0)
    group.add_argument("--weight-decay", type=run.nonnegative(float), default=5e-4)
    group = parser.add_argument_group("method")
    group.add_argument("--measure-every", type=run.nonnegative(int), default=50, help="0: never")
    group.add_argument(
        "--step-sizes", type=run.listed(run.positive(float)), metavar="F,F,...",
        help="eta / lr, increasing; default: 0.5,1,2,4, for dln25 0.01,0.1,1,10,30",
    )  # fmt: skip
    group.add_argument("--layers", type=places, help="of the covariate shift: 5,10 or all")
    group.add_argument("--slots", type=places, help="normalisers whose output is recorded: 3,11")
    group.add_argument("--random", action=argparse.BooleanOptionalAction, default=True)
    group = parser.add_argument_group("evaluation")
    group.add_argument("--eval-every", type=run.positive(int), default=500, help="steps")
    run.add_arguments(parser)
    parser.set_defaults(precision="fp32", augment=False)
    args = run.parse(parser, argv)
    if args.arch == "dln25":
        args.dataset, args.weight_decay = "gaussian", 0.0
    arch, steps, lrs = DEFAULTS.get(args.dataset.removesuffix(".1"), DEFAULTS["photographs"])
    args.arch, args.steps, args.lrs = args.arch or arch, args.steps or steps, args.lrs or lrs
    linear = args.arch == "dln25"
    args.step_sizes = args.step_sizes or ([0.01, 0.1, 1, 10, 30] if linear else [0.5, 1, 2, 4])
    if sorted(set(args.step_sizes)) != args.step_sizes:
        raise run.UserError(f"--step-sizes {args.step_sizes}: must increase")
    if unknown := set(args.norms) - set(NORMS):
        raise run.UserError(f"--norms {', '.join(unknown)}: choose from {', '.join(NORMS)}")
    if args.compile:
        raise run.UserError("--compile: not for bn_ablation.py, whose probes look into the network")
    args.compile = False
    return args


# --- method -------------------------------------------------------------------------------------


def objective(out, y, weights, decay):
    """L: cross-entropy, or half the squared error summed, plus the L2 term on matrices/kernels."""
    loss = 0.5 * (out - y).square().sum() if y.is_floating_point() else F.cross_entropy(out, y)
    if decay:
        loss = loss + 0.5 * decay * sum(w.square().sum() for w in weights if w.dim() > 1)
    return loss


def distance(a, b):
    """Euclidean distance of two lists of tensors, 0-d."""
    return torch.stack([(p - q).square().sum() for p, q in zip(a, b, strict=True)]).sum().sqrt()


class Probe:
    """Losses and gradients at other weights of `model` on one step's batch and noise.

    The module itself, its buffers and its gradients are not touched. step_seed makes dropout and
    noisy-bn draw what the training step drew, so that L is one function of the weights.
    """

    def __init__(self, model, x, y, step_seed, decay):
        self.model, self.x, self.y, self.seed, self.decay = model, x, y, step_seed, decay

    def forward(self, params):
        torch.manual_seed(self.seed)
        buffers = {k: b.clone() for k, b in self.model.named_buffers()}
        return functional_call(self.model, (params, buffers), (self.x,))

    def loss(self, params):
        return objective(self.forward(params), self.y, params.values(), self.decay)

    def gradient(self, params):
        """(L, list of gradients) at `params`, name -> tensor."""
        params = {k: p.detach().requires_grad_() for k, p in params.items()}
        loss = self.loss(params)
        return loss.detach(), torch.autograd.grad(loss, list(params.values()))


def landscape(probe, params, grads, direction, etas):
    """Losses L(w - eta d) and gradient differences ||grad L(w) - grad L(w - eta d)||, one per eta,
    and the largest difference per distance moved. d: list like `grads`. Floats."""
    losses, differences = [], []
    for eta in etas:
        moved = {k: p - eta * d for (k, p), d in zip(params.items(), direction, strict=True)}
        loss, there = probe.gradient(moved)
        losses.append(loss)
        differences.append(distance(grads, there))
    length = distance(direction, [torch.zeros_like(d) for d in direction])
    losses, differences = torch.stack(losses).tolist(), torch.stack(differences).tolist()
    ratios = [
        d / (eta * length.item() or math.inf) for d, eta in zip(differences, etas, strict=True)
    ]
    return {"loss_at": losses, "difference_at": differences, "beta": max(ratios)}


def covariate_shift(probe, old, new, grads, layers):
    """{layer: (||G - G'||, cos(G, G'))}, Definition 2.1, for weights named in `layers`.

    old, new: name -> parameter before and after the step; grads: name -> G. "Before a layer" is
    the order of named_parameters, which is that of computation in a chain.
    """
    shared = isinstance(probe.model, (models.VGG, models.AllConv, models.DeepLinear))
    others = shift_in_chain(probe, old, new, layers) if shared else {}
    result = {}
    for layer in layers:
        other = others.get(layer)
        if other is None:
            names = list(old)
            mixed = {k: new[k] for k in names[: names.index(layer)]}
            mixed |= {k: old[k] for k in names[names.index(layer) :]}
            weight = mixed[layer] = old[layer].detach().requires_grad_()
            (other,) = torch.autograd.grad(probe.loss(mixed), weight)
        g = grads[layer]
        cosine = F.cosine_similarity(g.flatten(), other.flatten(), dim=0)
        result[layer] = (distance([g], [other]).item(), cosine.item())
    return result


def shift_in_chain(probe, old, new, layers):
    """{layer: G'} with one pass through the updated layers: at each probed layer the activation
    so far enters the rest of the network, whose weights are the old ones."""
    model, result = probe.model, {}
    convolutional = not isinstance(model, models.DeepLinear)
    devices = [probe.x.device] if probe.x.is_cuda else []

    def call(modules, weights, h):
        """Compose body modules [(name, module)] with these weights on copies of their buffers."""
        for name, module in modules:
            own = {k: weights[f"body.{name}.{k}"] for k, _ in module.named_parameters()}
            own |= {k: b.clone() for k, b in module.named_buffers()}
            h = functional_call(module, own, (h,))
        return h

    def gradient(wanted, out, **fc):
        h = models.pool(out) if convolutional else out
        fc = {"weight": old["fc.weight"], "bias": old.get("fc.bias")} | fc
        loss = objective(F.linear(h, **fc), probe.y, [wanted], probe.decay)
        return torch.autograd.grad(loss, wanted)[0]

    torch.manual_seed(probe.seed)
    body = list(model.body.named_children())
    h = model.normalize(probe.x) if convolutional else probe.x
    for i, (name, _) in enumerate(body):
        for layer in (key for key in layers if key.startswith(f"body.{name}.")):
            weight = old[layer].detach().requires_grad_()
            with torch.random.fork_rng(devices):  # the noise of the layers to come, for each anew
                out = call(body[i:], old | {layer: weight}, h)
                result[layer] = gradient(weight, out)
        with torch.no_grad():
            h = call(body[i : i + 1], new, h)
    if "fc.weight" in layers:
        weight = old["fc.weight"].detach().requires_grad_()
        result["fc.weight"] = gradient(weight, h, weight=weight)
    return result


@torch.no_grad()
def activations(probe, params, units):
    """{slot: values of one unit over the batch and all positions}; units: slot -> channel."""
    caught, hooks = {}, []
    for slot, unit in units.items():

        def hook(module, inputs, out, slot=slot, unit=unit):
            caught[slot] = out[:, unit].flatten().clone()

        hooks.append(probe.model.get_submodule(slot).register_forward_hook(hook))
    try:
        probe.forward(params)
    finally:
        for handle in hooks:
            handle.remove()
    return caught


def measure(model, old, grads, batches, step, lr, targets, args):
    """Everything at one step, which has just moved `model` from `old` along `grads`.

    Returns a dict of floats and lists for log.jsonl and {slot: values} for the histograms.
    """
    new = {k: p.detach() for k, p in model.named_parameters()}
    seed = run.seed_key(args.seed, "step", step)
    probe = Probe(model, *batches(step), seed, args.weight_decay)
    if grads is None:
        grads = probe.gradient(old)[1]
    etas = [factor * lr for factor in args.step_sizes]
    row = landscape(probe, old, grads, grads, etas)
    if args.random:
        rng = run.generator(args.seed, "direction", step)
        noise = [torch.randn(g.shape, dtype=g.dtype, generator=rng).to(g.device) for g in grads]
        zeros = [torch.zeros_like(g) for g in grads]
        scale = distance(grads, zeros) / distance(noise, zeros)
        found = landscape(probe, old, grads, [scale * n for n in noise], etas)
        row |= {f"random_{k}": v for k, v in found.items()}
    shift = covariate_shift(probe, old, new, dict(zip(old, grads, strict=True)), targets["layers"])
    row["shift"] = {targets["layers"][k]: v for k, v in shift.items()}
    values = activations(probe, old, targets["units"])
    following = Probe(model, *batches(step + 1), run.seed_key(args.seed, "step", step + 1), 0)
    following = activations(following, new, targets["units"])
    row["slots"] = {}
    for slot, a in values.items():
        q = a.double().quantile(a.new_tensor([0.05, 0.5, 0.95]).double()).tolist()
        (var, mean), (var2, mean2) = (torch.var_mean(v, correction=0) for v in (a, following[slot]))
        row["slots"][targets["slots"][slot]] = {
            "mean": mean.item(), "var": var.item(), "quantiles": q,
            "mean_step": abs(mean2 - mean).item(), "var_step": abs(var2 - var).item(),
        }  # fmt: skip
    return row, values


class Gaussian:
    """The linear network's task: x ~ N(0, I) (1000,10), y = A x, A Gaussian; all in one batch."""

    per_epoch = 1000  # steps between checkpoints; there are no epochs

    batch_size = 1000

    def __init__(self, seed, device, width=10, samples=1000):
        self.seed = seed
        rng = run.generator(seed, "gaussian")
        a = torch.randn(width, width, generator=rng, dtype=torch.float64)
        x = torch.randn(samples, width, generator=rng, dtype=torch.float64)
        self.x, self.y = x.to(device), (x @ a.T).to(device)

    def __call__(self, step):
        return self.x, self.y


def build(norm, args, dataset, device):
    """A network for this run; where it starts from Glorot's, all normalisers get equal weights."""
    torch.manual_seed(run.seed_key(args.seed, "init"))
    if dataset is None:
        model = models.build(args.arch, norm).double()
    else:
        model = models.build(args.arch, norm, **dataset.model_kwargs)
    if isinstance(model, (models.VGG, models.DeepLinear)):
        torch.manual_seed(run.seed_key(args.seed, "init"))
        models.init_glorot(model)
    return model.to(device, memory_format=torch.channels_last)


def find_targets(args, dataset):
    """What to probe: {"layers": {weight name: number}, "slots": {name: number}, "units": {slot:
    channel}}. Raises UserError for a layer or slot that the network does not have."""
    model = build("bn", args, dataset, "cpu")
    kinds = (torch.nn.Conv2d, torch.nn.Linear)
    weights = [f"{n}.weight" for n, m in model.named_modules() if isinstance(m, kinds)]
    norms = torch.nn.modules.batchnorm._BatchNorm
    slots = {n: m.num_features for n, m in model.named_modules() if isinstance(m, norms)}
    if not slots:
        raise run.UserError(f"--arch {args.arch}: has no place for a normaliser")
    found = {}
    for which, have, k in (("layers", weights, 0), ("slots", list(slots), 1)):
        n, chosen = len(have), getattr(args, which)
        usual = PROBED.get(args.arch.split("-")[0], [(max(1, 3 * n // 8), max(1, 3 * n // 4))] * 2)
        chosen = range(1, n + 1) if chosen == "all" else chosen or usual[k]
        if max(chosen) > n:
            raise run.UserError(f"--{which} {max(chosen)}: {args.arch} has {n}, from 1 on")
        found[which] = {have[i - 1]: i for i in chosen}
    share = torch.rand(len(slots), generator=run.generator(args.seed, "unit")).tolist()
    units = {name: int(r * slots[name]) for name, r in zip(slots, share, strict=True)}
    return found | {"units": {name: units[name] for name in found["slots"]}}


# --- figures ------------------------------------------------------------------------------------

LINEAR_AXIS = ("accuracy", "test", "shift_cos", "slot")  # of charts; the others are logarithmic


def charts(row):
    """{chart: (value, low, high)} of one row of log.jsonl; a value without a band is all three."""
    result = {k: (row[k],) * 3 for k in ("loss", "accuracy", "test") if k in row}
    for kind in ("", "random_"):
        for chart, key in (("landscape", "loss_at"), ("predictiveness", "difference_at")):
            band = [v for v in row.get(kind + key, []) if v is not None]
            if band:
                result[kind + chart] = (sum(band) / len(band), min(band), max(band))
        if kind + "beta" in row:
            result[kind + "beta"] = (row[kind + "beta"],) * 3
    for layer, (length, cosine) in row.get("shift", {}).items():
        result[f"shift_l2_{layer}"], result[f"shift_cos_{layer}"] = (length,) * 3, (cosine,) * 3
    for slot, v in row.get("slots", {}).items():
        low, middle, high = v["quantiles"]
        result[f"slot_{slot}"] = (middle, low, high)
        for key in ("mean_step", "var_step"):
            result[f"{key}_{slot}"] = (v[key],) * 3
    return {k: v for k, v in result.items() if None not in v}


def tensorboard_charts(rows):
    """The charts of `run.custom_scalars`: margins for the measurements that have a band."""
    banded = {}
    for row in rows:
        for chart, (_, low, high) in charts(row).items():
            banded[chart] = banded.get(chart, False) or low < high
    return {chart: ([chart],) for chart, has_band in banded.items() if has_band}


def draw(folder, history, factors):
    """One SVG per chart with all runs, and one per run of the gradient difference against the step
    size (the paper's Fig. 11). history: {run: [row, ...]}; factors: the step sizes / lr."""
    folder.mkdir(exist_ok=True)
    curves = {}
    for name, rows in history.items():
        for row in rows:
            for chart, point in charts(row).items():
                curves.setdefault(chart, {}).setdefault(name, []).append((row["step"], *point))
        rows, lines = [r for r in rows if None not in r.get("difference_at", [None])], {}
        for row in rows[:: max(1, len(rows) // 5)]:
            points = zip(factors, row["difference_at"], strict=True)
            lines[f"step {row['step']}"] = [(e, d, d, d) for e, d in points]
        title = f"gradient difference over eta / lr, {name}"
        run.line_chart(folder / f"stepsize_{name}.svg", title, lines, log=True)
    for chart, lines in curves.items():
        log = not chart.startswith(LINEAR_AXIS)
        run.line_chart(folder / f"{chart}.svg", chart, lines, log)


# --- training -----------------------------------------------------------------------------------


class Task(NamedTuple):
    """What the networks are trained, measured and held out on."""

    batches: object  # data.Batches or Gaussian: this process's rows
    whole: object  # the same with the rows of all processes, for the measurements
    held_out: data.Images  # None for the linear network
    targets: dict  # what is probed, see find_targets


def train(stage, model, lr, args, task, rundir, precision, history):
    """Train `model` in place at a fixed rate, measuring. Returns its final metrics.

    stage: name of the norm and the rate. history: the run's rows of log.jsonl, appended to; "step"
    counts the updates made.
    """
    fused = precision.device.type == "cuda"
    optimizer = torch.optim.SGD(model.parameters(), lr, args.momentum, fused=fused)
    loop = run.Loop(rundir, stage, model, optimizer, precision, task.batches, steps=args.steps)
    history[:] = [r for r in history if r["step"] < loop.start + ("beta" not in r)]
    # The gradient of the trajectory, where a probe has the same: in fp32, one process's noise.
    same = precision.name == "fp32" and run.world() == 1
    for step in loop:
        x, y = task.batches(step)

        with precision.autocast():
            out = loop.net(x)
        loss = objective(out, y, list(model.parameters()), args.weight_decay)

        loop.backward(loss)
        measured = args.measure_every and step % args.measure_every == 0
        if measured:
            old = {k: p.detach().clone() for k, p in model.named_parameters()}
            grads = [p.grad for p in model.parameters()] if same else None
        loop.step(lr)
        shown = {"accuracy": run.accuracy(out, y)} if task.held_out else {}
        loop.log(loss=loss, **shown)
        if measured:
            loop.check()  # sync point
            row, values = measure(model, old, grads, task.whole, step, lr, task.targets, args)
            record(rundir, stage, history, {"step": step, **row})
            for slot, activation in values.items():
                tag = f"slot_{task.targets['slots'][slot]}"
                rundir.writer(stage).add_histogram(tag, activation.float(), step)
        if loop.logs:
            means = {k: loop.means[k] for k in ("loss", *shown)}
            record(rundir, stage, history, {"step": loop.done, **means})

        if loop.evaluates:
            found = {}
            if task.held_out:
                found = run.evaluate(model, task.held_out, precision)
                record(rundir, stage, history, {"step": loop.done, "test": 100 - found["error"]})
            loop.report(**{k: v for k, v in found.items() if k == "error"})
    return loop.metrics


def record(rundir, stage, history, row):
    """Append a row of measurements to the history, log.jsonl and TensorBoard's curves."""
    row = finite(row)
    history.append(row)
    rundir.log(run=stage, **row)
    for chart, (value, low, high) in charts(row).items():
        if chart not in ("loss", "accuracy"):
            ends = {f"{chart}/low": low, f"{chart}/high": high} if low < high else {}
            rundir.scalars(stage, row["step"], {chart: value} | ends)


# --- main ---------------------------------------------------------------------------------------


def finite(value):
    """Lists, tuples and dicts of numbers with None for what JSON cannot hold (nan, inf)."""
    if isinstance(value, dict):
        return {k: finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_history(folder, names):
    """{run: rows} of an earlier log.jsonl; a step measured twice counts once, the later."""
    history = {name: {} for name in names}
    if (folder / "log.jsonl").exists():
        for line in (folder / "log.jsonl").read_text().splitlines():
            row = json.loads(line)
            if row.get("run") and "event" not in row:
                name = row.pop("run")
                history.setdefault(name, {})[row["step"], "beta" in row] = row
    return {name: list(rows.values()) for name, rows in history.items()}


def summarise(rows):
    """Medians over the measured steps of one run, {name: number}."""
    points = {}
    for row in rows:
        for chart, (value, low, high) in charts(row).items():
            points.setdefault(chart, []).append(value)
            if chart.endswith(("landscape", "predictiveness")):
                points.setdefault(f"{chart}_width", []).append(high - low)
                points.setdefault(f"{chart}_high", []).append(high)
    skip = ("loss", "accuracy", "test", "slot")
    medians = {k: statistics.median(v) for k, v in points.items() if not k.startswith(skip)}
    last = {k: v[-1] for k, v in points.items() if k in skip}
    return last | medians


def main(args):
    device = run.get_device(args.device)
    precision = run.Precision(args.precision, device)
    if precision.name == "fp16":
        raise run.UserError("--precision fp16: steps that its scaler skips would be measured")
    linear = args.dataset == "gaussian"
    # Whatever may refuse an option comes before the run directory.
    if linear:
        if run.world() > 1:
            raise run.UserError("--arch dln25: one batch of 1000 small vectors, for one process")
        dataset = held_out = None
        batches = whole = Gaussian(args.seed, device)
    else:
        dataset = data.from_args(args, device)
        held_out = dataset.val or dataset.test
        settings = (dataset.train, args.batch_size, args.seed, args.augment, dataset.flip)
        batches = data.Batches(*settings)
        whole = data.Batches(*settings, whole=True)
    todo = {f"{norm}-lr{lr:g}": (norm, lr) for lr in args.lrs for norm in args.norms}
    for norm in args.norms:
        build(norm, args, dataset, "cpu")
    task = Task(batches, whole, held_out, find_targets(args, dataset))
    rundir = run.RunDir(args, __file__, precision, None, ["loss" if linear else "error"])
    history = read_history(rundir.dir, todo)

    ends = {}
    for name, (norm, lr) in todo.items():
        model = build(norm, args, dataset, device)
        try:
            ends[name] = train(name, model, lr, args, task, rundir, precision, history[name])
        except run.Diverged as error:  # a result, not an error
            ends[name] = {"diverged": error.step}
            rundir.log(run=name, event="diverged", step=error.step)
            print(f"{name}: diverged at step {error.step}")
    summaries = {name: summarise(rows) | ends.get(name, {}) for name, rows in history.items()}
    final = {f"{k}/{name}": v for name, summary in summaries.items() for k, v in summary.items()}
    final |= {f"error/{name}": v["error"] for name, v in ends.items() if "error" in v}
    for name, rows in history.items():
        if name in todo:
            run.custom_scalars(rundir.writer(name), tensorboard_charts(rows))
    rundir.close(final)
    if run.rank() == 0:
        draw(rundir.dir / "figures", history, args.step_sizes)
        result = {"command": " ".join(sys.argv), "options": vars(args), "runs": summaries}
        text = json.dumps(result | {"versions": run.versions()}, indent=1)
        (rundir.dir / "summary.json").write_text(text + "\n")

    first, slot = (next(iter(task.targets[k].values())) for k in ("layers", "slots"))
    columns = {
        "loss": "loss", "train %": "accuracy", "test %": "test", "diverged": "diverged",
        "loss band, lower is smoother": "landscape_width",
        "gradient change, lower is smoother": "predictiveness_high", "beta": "beta",
        f"shift l2 {first}": f"shift_l2_{first}", "cos": f"shift_cos_{first}",
        "mean moves": f"mean_step_{slot}",
    }  # fmt: skip
    columns = {k: v for k, v in columns.items() if any(v in s for s in summaries.values())}
    rows = [[n, *(s.get(key, "-") for key in columns.values())] for n, s in summaries.items()]
    print(f"\n{run.table(rows, ['run', *columns], '.4g')}")
    print(
        f"{args.dataset}, {args.arch}, seed {args.seed}; loss and accuracies at the end, else the"
    )
    print(f"median over the measured steps; figures in {rundir.dir}/figures")
    if not linear:
        learnt = {k: v["test"] for k, v in summaries.items() if "test" in v}
        run.warn_of_chance(learnt, len(dataset.classes))
    print("\nPaper: with BatchNorm the loss and its gradient change less along a step.")
    print(f"Here: {verdict(summaries)}")
    return final


def verdict(summaries):
    """One sentence made of the table's numbers: loss band and gradient change of each run."""
    words = []
    for name, summary in summaries.items():
        if "landscape_width" in summary:
            band, change = summary["landscape_width"], summary["predictiveness_high"]
            words.append((band, f"{name} loss band {band:.3g}, gradient change {change:.3g}"))
    if not words:
        return "nothing was measured."
    return "; ".join(text for _, text in sorted(words)) + " (the smoothest loss first)."


if __name__ == "__main__":
    run.cli(main, parse_args)
