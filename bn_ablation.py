"""How does batch normalisation help optimisation? One network trained with and without, and probed.

Paper: Santurkar, Tsipras, Ilyas, Madry, "How Does Batch Normalization Help Optimization?",
NeurIPS 2018, arXiv 1805.11604. A network is trained for every pair of --norms and --lrs, with the
same seed and data order. The VGG and the linear network start from the same weights too. Every
--measure-every steps this is measured, with weights w, loss L of the batch and its gradient g at w:

    landscape        L(w - eta g) over the step sizes eta: the band of Fig. 4a
    predictiveness   ||grad L(w) - grad L(w - eta g)|| over eta: the band of Fig. 4b
    effective beta   largest ||grad L(w) - grad L(w - eta g)|| / ||eta g||, Fig. 4c
    random_*         the same along a random direction of g's length
    covariate shift  ||G - G'|| and cos(G, G') of Definition 2.1 for --layers: G' is the gradient of
                     a layer once all before it have made their step, on the same batch
    activations      one unit of each of --slots: histogram, quantiles, mean and variance, and how
                     far these move in one step (from this step and batch to the next)

Measurements run on copies, through torch.func.functional_call. They do not change the training by
a bit. Figures go to <run>/figures as SVG, bands to TensorBoard's CUSTOM SCALARS.

The paper leaves open or contradicts itself on, and here:
  1. VGG         vgg16: 13 convolutions, the normaliser before each ReLU, one linear layer
  2. loss        includes 0.5 * --weight-decay * ||weights||^2, as the paper's plots suggest
  3. gradients   of the same batch at both points, as in the text. Late in training the gradient
                 is gone after the smallest step. Then beta is 1 / (smallest eta), the 20 of Fig. 4c
  4. linear net  loss 0.5 * sum of squares, no normaliser after the last matrix, fp64
  5. noise       as in models.NoisyBatchNorm; l1, l2, linf as in models.LpNorm
  6. start       Glorot's for a VGG of any norm. Residual networks without a normaliser start as in
                 ct.py, by He's fan-in with scaled branches; in fixup_penalty.py by fan-out
  7. precision   fp32 by default: the differences measured are of the size of bf16's rounding

    python bn_ablation.py                                      # embedded shapes data, minutes
    python bn_ablation.py --dataset cifar10 --lrs 0.1,0.5      # the paper's, 15,000 steps each
    python bn_ablation.py --arch dln25 --norms none,bn,l1,l2,linf
    python bn_ablation.py --resume runs/a --norms l1,l2        # add runs to its figures
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch.func import functional_call

from common import data, models, run

# --- options ------------------------------------------------------------------------------------

VGG = {
    "arch": "vgg16", "steps": 15_000, "lrs": [0.1], "step_sizes": [0.5, 1.0, 2.0, 4.0],
    "eval_every": 500, "weight_decay": 5e-4,
}  # fmt: skip
DEFAULTS = {
    "shapes": VGG | {"arch": "vgg11-16", "steps": 600, "lrs": [0.3], "eval_every": 50},
    "gaussian": VGG | {
        "arch": "dln25", "steps": 10_000, "lrs": [1e-6], "step_sizes": [0.01, 0.1, 1.0, 10.0, 30.0],
        "weight_decay": 0.0,
    },
    "folders": VGG,
}  # fmt: skip
NORMS = ("none", "bn", "noisy-bn", "l1", "l2", "linf", "gn")
NOT_LINEAR = ("dataset", "weight_decay", "batch_size", "limit", "val_size", "image_size", "augment")
PROBED = {"vgg16": ((5, 10), (3, 11)), "dln25": ((9, 17), (1, 11, 24))}  # the paper's figures


def places(text):
    """argparse type: numbers from 1 with commas between them, or "all"."""
    return text if text == "all" else run.listed(run.positive(int))(text)


def parse_args(argv=None):
    positive, nonnegative = run.positive, run.nonnegative
    parser = run.Parser(__file__, __doc__)
    data.add_arguments(parser, "gaussian")
    add = parser.add_argument_group("model and optimisation").add_argument
    add("--arch", help="network; dln25 is linear, on Gaussian data")
    usual = ["none", "bn", "noisy-bn"]
    add("--norms", type=run.listed(str), default=usual, help=f"networks, of {', '.join(NORMS)}")
    add("--lrs", type=run.listed(positive(float)), help="fixed rates, each with every norm")
    add("--steps", type=positive(int), help="length of a training")
    add("--batch-size", type=positive(int), default=128, help="images of a step")
    add("--momentum", type=nonnegative(float), default=0.0, help="0 is plain SGD")
    add("--weight-decay", type=nonnegative(float), help="factor of the L2 term")
    add = parser.add_argument_group("method").add_argument
    add("--measure-every", type=nonnegative(int), default=50, help="steps; 0 never measures")
    add("--step-sizes", type=run.listed(positive(float)), help="eta / lr, increasing")
    add("--layers", type=places, help="of the covariate shift: 5,10 or all (default: two)")
    add("--slots", type=places, help="normalisers whose output is recorded (default: two)")
    add("--random", action=run.Flag, default=True, help="measure along a random direction too")
    add = parser.add_argument_group("evaluation").add_argument
    add("--eval-every", type=positive(int), metavar="STEPS", help="steps between evaluations")
    add("--seeds", type=positive(int), default=1, help="number of seeds, from --seed on")
    run.add_arguments(parser, DEFAULTS, compiles=False)
    parser.set_defaults(precision="fp32", augment=False)
    args = run.parse(parser, argv)
    if args.arch == "dln25" or args.dataset == "gaussian":
        given = {k: v for k, v in args.differs.items() if k in NOT_LINEAR}
        for key in (k for k, v in given.items() if v not in ("gaussian", 0)):  # as --resume has it
            raise run.UserError(f"--{key.replace('_', '-')}: dln25 has its own data, no decay")
        args.dataset = "gaussian"
    run.fill(args, run.defaults_for(DEFAULTS, args.dataset))
    wrong = {
        f"--step-sizes {args.step_sizes}: must increase":
            sorted(set(args.step_sizes)) != args.step_sizes,
        f"--norms {','.join(args.norms)}: choose from {', '.join(NORMS)}":
            not set(args.norms) <= set(NORMS),
        "--compile: not for bn_ablation.py, whose probes look into the network": args.compile,
    }  # fmt: skip
    run.refuse(wrong)
    args.compile = False
    return args


# --- method -------------------------------------------------------------------------------------


def objective(out, y, weights, decay):
    """L: cross-entropy, or half the squared error summed, plus the L2 term on matrices/kernels."""
    loss = 0.5 * (out - y).square().sum() if y.is_floating_point() else F.cross_entropy(out, y)
    if decay:
        loss = loss + 0.5 * decay * sum(w.square().sum() for w in weights if w.dim() > 1)
    return loss


def length(tensors):
    """Euclidean length of a list of tensors, 0-d."""
    return torch.stack([t.square().sum() for t in tensors]).sum().sqrt()


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
    """Losses L(w - eta d) and gradient differences ||grad L(w) - grad L(w - eta d)||, one per eta.
    beta: the largest difference per distance moved. d: `direction`, like `grads`. Floats."""
    losses, differences = [], []
    for eta in etas:
        moved = {k: p - eta * d for (k, p), d in zip(params.items(), direction, strict=True)}
        loss, there = probe.gradient(moved)
        losses.append(loss)
        differences.append(length([g - h for g, h in zip(grads, there, strict=True)]))
    step = length(direction).item()
    losses, differences = torch.stack(losses).tolist(), torch.stack(differences).tolist()
    ratios = [d / (eta * step or math.inf) for d, eta in zip(differences, etas, strict=True)]
    return {"loss_at": losses, "difference_at": differences, "beta": max(ratios)}


def covariate_shift(probe, old, new, grads, layers):
    """{layer: (||G - G'||, cos(G, G'))}, Definition 2.1, for weights named in `layers`.

    old, new: name -> parameter before and after the step; grads: name -> G. "Before a layer" is
    the order of named_parameters, which is that of computation in a chain.
    """
    names, result = list(old), {}
    for layer in layers:
        before = names[: names.index(layer)]
        weight = old[layer].detach().requires_grad_()
        mixed = old | {k: new[k] for k in before} | {layer: weight}
        (other,) = torch.autograd.grad(probe.loss(mixed), weight)
        g = grads[layer]
        cosine = F.cosine_similarity(g.flatten(), other.flatten(), dim=0)
        result[layer] = (length([g - other]).item(), cosine.item())
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

    Returns a dict of floats and lists for log.jsonl and {tag: values} for the histograms.
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
        scale = length(grads) / length(noise)
        found = landscape(probe, old, grads, [scale * n for n in noise], etas)
        row |= {f"random_{k}": v for k, v in found.items()}
    shift = covariate_shift(probe, old, new, dict(zip(old, grads, strict=True)), targets["layers"])
    row["shift"] = {targets["layers"][k]: v for k, v in shift.items()}
    values = activations(probe, old, targets["units"])
    after = Probe(model, *batches(step + 1), run.seed_key(args.seed, "step", step + 1), 0)
    following = activations(after, new, targets["units"])
    row["slots"], histograms = {}, {}
    for slot, number in targets["slots"].items():
        a = histograms[f"slot_{number}"] = values[slot].float()
        q = a.double().quantile(a.new_tensor([0.05, 0.5, 0.95]).double()).tolist()
        (var, mean), (var2, mean2) = (torch.var_mean(v, correction=0) for v in (a, following[slot]))
        row["slots"][number] = {
            "mean": mean.item(), "var": var.item(), "quantiles": q,
            "mean_step": abs(mean2 - mean).item(), "var_step": abs(var2 - var).item(),
        }  # fmt: skip
    return row, histograms


def build(norm, args, dataset, device):
    """A network for this run; where it starts from Glorot's, all normalisers get equal weights."""
    torch.manual_seed(run.seed_key(args.seed, "init"))
    model = models.build(args.arch, norm, **dataset.model_kwargs)
    if args.arch == "dln25":
        model.double()
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


# --- training -----------------------------------------------------------------------------------


class Task(NamedTuple):
    """What the networks are trained, measured and held out on."""

    batches: data.Batches  # this process's rows
    whole: data.Batches  # the rows of all processes, for the measurements
    held_out: data.Images  # None for the linear network
    targets: dict  # what is probed, see find_targets


def make_task(dataset, args):
    if args.arch == "dln25":
        return Task(dataset, dataset, None, find_targets(args, dataset))
    settings = (dataset.train, args.batch_size, args.seed, args.augment, dataset.flip)
    batches, whole = data.Batches(*settings), data.Batches(*settings, whole=True)
    return Task(batches, whole, dataset.val or dataset.test, find_targets(args, dataset))


def train(stage, model, lr, args, task, rundir, precision):
    """Train `model` in place at a fixed rate, measuring. Returns its final metrics."""
    fused = precision.device.type == "cuda"
    optimizer = torch.optim.SGD(model.parameters(), lr, args.momentum, fused=fused)
    loop = run.Loop(rundir, stage, model, optimizer, precision, task.batches, steps=args.steps)
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
            found = measure(model, old, grads, task.whole, step, lr, task.targets, args)
            run.record(rundir, stage, step, *found)
        if loop.logs:
            run.record(rundir, stage, loop.done, {k: loop.means[k] for k in ("loss", *shown)})

        if loop.evaluates:
            metrics = {}
            if task.held_out:
                metrics["error"] = run.evaluate(model, task.held_out, precision)["error"]
                run.record(rundir, stage, loop.done, {"test": 100 - metrics["error"]})
            loop.report(**metrics)
    return loop.metrics


# --- main ---------------------------------------------------------------------------------------


def main(args):
    if args.seeds > 1:
        return run.each_seed(main, args, run.band_columns, first="run", floats=".4g")
    device = run.get_device(args.device)
    precision = run.Precision(args.precision, device)
    if precision.name == "fp16":
        raise run.UserError("--precision fp16: steps that its scaler skips would be measured")
    linear = args.arch == "dln25"
    if linear and run.world() > 1:
        raise run.UserError("--arch dln25: one batch of 1000 small vectors, for one process")
    dataset = data.Gaussian(args.seed, device) if linear else data.from_args(args, device)
    task = make_task(dataset, args)
    for norm in args.norms:  # whatever may refuse an option comes before the run directory
        run.check_processes(build(norm, args, dataset, "cpu"))
    rundir = run.RunDir(args, __file__, precision, None, ["loss" if linear else "error"])

    ends = {}
    names = {f"{norm}-lr{lr:g}": (norm, lr) for lr in args.lrs for norm in args.norms}
    rundir.plan(**dict.fromkeys(names, args.steps / task.batches.per_epoch))
    for name, (norm, lr) in names.items():
        model = build(norm, args, dataset, device)
        try:
            ends[name] = train(name, model, lr, args, task, rundir, precision)
        except run.Diverged as error:  # a result, not an error
            ends[name] = {"diverged": error.step}
            rundir.log(run=name, event="diverged", step=error.step)
            print(f"{name}: diverged at step {error.step}")
        run.lay_out_bands(rundir, name)
    return report(ends, len(dataset.classes), args, rundir)


def report(ends, num_classes, args, rundir):
    """Print the table of the run and what it says; returns {"<metric>/<network>": value}."""
    figures, summaries = run.write_bands(rundir, ends, args)
    metrics = run.by_metric(summaries)
    rundir.close(final := run.final_numbers(metrics))

    columns = run.band_columns(metrics)
    run.warn_of_chance(columns.get("test %", {}), num_classes)
    run.print_table(columns, "run", ".4g")
    print(f"{args.dataset}, {args.arch}, seed {args.seed}; loss and accuracies at the end, else")
    print("median over the measured steps; loss band and gradient change: lower is smoother")
    print(f"figures: {figures.resolve()}")
    paper = "with BatchNorm the loss and its gradient change less along a step."
    following = {
        "bands in CUSTOM SCALARS": "tensorboard",
        "linear network, 5 minutes": "bn_ablation.py --arch dln25 --norms none,bn,l1",
        "real images, 10 minutes": "bn_ablation.py --dataset cifar10 --arch vgg11-16 --steps 3000",
    }
    run.print_findings(paper, verdict(columns), args, rundir.dir, following)
    return final


def verdict(columns):
    """One sentence made of the table's numbers: loss band and gradient change of each run."""
    bands, changes = columns.get("loss band", {}), columns.get("gradient change", {})
    order = sorted(bands.keys() & changes.keys(), key=bands.get)
    if not order:
        return "nothing was measured."
    words = [f"{k} loss band {bands[k]:.3g}, gradient change {changes[k]:.3g}" for k in order]
    return "; ".join(words) + " (the smoothest loss first)."


if __name__ == "__main__":
    run.cli(main, parse_args)
