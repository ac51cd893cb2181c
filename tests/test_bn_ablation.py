"""bn_ablation.py: the paper's theorems in fp64, measurements against brute force, the script."""

import copy
import json
import math
import subprocess
import sys
import xml.etree.ElementTree

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

import bn_ablation
from common import data, models, run
from common.run import UserError

M, GAMMA, BETA = 12, 1.7, -0.3  # batch size and BatchNorm's constants for the theorems


def unit(seed=0):
    """One unit of a layer: pre-activations y (M,), BatchNorm's mean, sigma, y_hat and z; fp64."""
    y = 3 * torch.randn(M, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) + 1
    y.requires_grad_()
    sigma = y.var(correction=0).sqrt()
    y_hat = (y - y.mean()) / sigma
    return y, sigma, y_hat, GAMMA * y_hat + BETA


def plain_loss(seed=0):
    """A smooth non-convex loss of one unit's activations (M,) -> scalar."""
    a, b = torch.randn(
        2, M, dtype=torch.float64, generator=torch.Generator().manual_seed(seed + 99)
    )
    mix = torch.randn(M, M, dtype=torch.float64, generator=torch.Generator().manual_seed(seed + 7))
    return lambda z: (torch.tanh(mix @ z / 3) * a).sum() + (b * z.square()).sum() / 5


def derivatives(seed):
    """Gradient of the plain loss at z, of the normalised loss at y, both Hessians, sigma, y_hat."""
    y, sigma, y_hat, z = unit(seed)
    loss = plain_loss(seed)

    def normalised(y):
        return loss(GAMMA * (y - y.mean()) / y.var(correction=0).sqrt() + BETA)

    at = z.detach()
    g, g_hat = torch.func.grad(loss)(at), torch.func.grad(normalised)(y.detach())
    h, h_hat = torch.func.hessian(loss)(at), torch.func.hessian(normalised)(y.detach())
    return g, g_hat, h, h_hat, sigma.detach(), y_hat.detach()


# --- theorems -----------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(5))
def test_facts_c1_and_c2(seed):
    y, sigma, y_hat, z = unit(seed)
    g = torch.randn(M, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    (found,) = torch.autograd.grad(z, y, g, retain_graph=True)
    claim = GAMMA / (M * sigma) * (M * g - g.sum() - y_hat * (g @ y_hat))
    torch.testing.assert_close(found, claim)
    jacobian = torch.stack([torch.autograd.grad(v, y, retain_graph=True)[0] for v in y_hat])
    claim = (torch.eye(M) - 1 / M - torch.outer(y_hat, y_hat) / M) / sigma
    torch.testing.assert_close(jacobian, claim)


@pytest.mark.parametrize("seed", range(5))
def test_theorem_4_1_is_an_identity(seed):
    g, g_hat, _, _, sigma, y_hat = derivatives(seed)
    right = g @ g - g.sum() ** 2 / M - (g @ y_hat) ** 2 / M
    torch.testing.assert_close(g_hat @ g_hat, GAMMA**2 / sigma**2 * right)
    assert g_hat @ g_hat <= GAMMA**2 / sigma**2 * (g @ g)


@pytest.mark.parametrize("seed", range(5))
def test_theorem_4_2(seed):
    """First form: an identity. Second form where H preserves relative norms, which a multiple of
    the identity does, and gamma <= sigma (the theorem's use: the gradient shrinks)."""
    g, g_hat, h, h_hat, sigma, y_hat = derivatives(seed)
    size = g_hat @ g_hat
    right = GAMMA**2 / sigma**2 * (g_hat @ h @ g_hat)
    right -= GAMMA / (M * sigma**2) * (g @ y_hat) * size
    torch.testing.assert_close(g_hat @ h_hat @ g_hat, right)
    if sigma >= GAMMA:
        c = 0.7
        exact = GAMMA**2 / sigma**2 * c * size - GAMMA / (M * sigma**2) * (g @ y_hat) * size
        bound = GAMMA**2 / sigma**2 * (c * (g @ g) - (g @ y_hat) / (M * GAMMA) * size)
        assert exact <= bound


def test_observation_4_3_same_activations():
    y, sigma, y_hat, _ = unit()
    torch.testing.assert_close(sigma * y_hat + y.mean(), y)


@pytest.mark.parametrize("seed", range(5))
def test_theorem_4_4(seed):
    """max over ||X||_2 <= lambda of ||X^T v||^2 is lambda^2 ||v||^2; with Theorem 4.1 the minimax
    statement follows with lambda^2 on all terms and 1/m, as in the paper's proof (the printed
    theorem has neither)."""
    g, g_hat, _, _, sigma, y_hat = derivatives(seed)
    lam, generator = 2.5, torch.Generator().manual_seed(seed)
    for v in (g, g_hat):
        best = 0
        for _ in range(50):
            x = torch.randn(M, 5, dtype=torch.float64, generator=generator)
            x = lam * x / torch.linalg.matrix_norm(x, 2)
            best = max(best, (x.T @ v).square().sum().item())
        attained = lam * torch.outer(v, torch.ones(5, dtype=torch.float64) / 5**0.5) / v.norm()
        assert torch.linalg.matrix_norm(attained, 2).item() == pytest.approx(lam)
        assert best <= lam**2 * (v @ v).item() * (1 + 1e-12)
        torch.testing.assert_close((attained.T @ v).square().sum(), lam**2 * (v @ v))
    worst, worst_hat = lam**2 * (g @ g), lam**2 * (g_hat @ g_hat)
    right = worst - lam**2 * M * g.mean() ** 2 - lam**2 / M * (g @ y_hat) ** 2
    torch.testing.assert_close(worst_hat, GAMMA**2 / sigma**2 * right)


def test_theorem_c_1_at_the_worst_input():
    """With X X^T = lambda^2 I, which the maximum over ||X||_2 <= lambda contains, the smoothness of
    the weights' gradient is lambda^4 times that of Theorem 4.2."""
    g, g_hat, h, h_hat, sigma, y_hat = derivatives(3)
    lam = 1.3
    x = lam * torch.linalg.qr(torch.randn(20, M, dtype=torch.float64)).Q.T  # (M, 20)
    in_weights = (x.T @ g_hat) @ (x.T @ h_hat @ x) @ (x.T @ g_hat)
    kappa = (g_hat @ g_hat) * (g @ y_hat) / (M * GAMMA)
    right = GAMMA**2 / sigma**2 * (lam**4 * (g_hat @ h @ g_hat) - lam**4 * kappa)
    torch.testing.assert_close(in_weights, right)


@pytest.mark.parametrize("seed", range(5))
def test_lemma_4_5(seed):
    g = torch.Generator().manual_seed(seed)
    optimum, start = torch.randn(2, 30, dtype=torch.float64, generator=g)
    start = start if start @ optimum > 0 else -start
    k = (optimum @ start) / (optimum @ optimum)
    left = (start - k * optimum).square().sum()
    gain = ((optimum @ optimum) - (optimum @ start)) ** 2 / (optimum @ optimum)
    torch.testing.assert_close(left, (start - optimum).square().sum() - gain)
    # k W* is as good as W*: BatchNorm does not see the scale of the weights
    x = torch.randn(50, 30, dtype=torch.float64, generator=g)
    scaled, plain = (F.batch_norm(x @ w[:, None], None, None, training=True, eps=1e-300)
                     for w in (k * optimum, optimum))  # fmt: skip
    torch.testing.assert_close(scaled, plain)


# --- normalisers --------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(64, 4), (8, 4, 5, 5)])
@pytest.mark.parametrize("p", [1, 2, math.inf])
def test_lp_normalisation(p, shape):
    layer, x = models.LpNorm(4, p), 2 + 3 * torch.randn(shape)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([1.0, 2, 3, 4]))
        layer.bias.fill_(0.5)
    out = layer(x)
    flat = x.transpose(0, 1).flatten(1)
    size = {1: flat.abs().mean(1), 2: flat.square().mean(1).sqrt(), math.inf: flat.abs().amax(1)}[p]
    want = layer.weight[:, None] * (flat - flat.mean(1, keepdim=True)) / size[:, None] + 0.5
    torch.testing.assert_close(out.transpose(0, 1).flatten(1), want, rtol=1e-4, atol=1e-4)
    for _ in range(200):
        layer(x)
    layer.eval()
    torch.testing.assert_close(layer(x), out, rtol=1e-3, atol=1e-3)


def test_noisy_batch_norm():
    layer, plain = models.NoisyBatchNorm(2000), torch.nn.BatchNorm2d(2000)
    x = torch.randn(8, 2000, 4, 4)
    torch.manual_seed(1)
    out, clean = layer(x).detach(), plain(x).detach()
    for key, value in plain.state_dict().items():  # running statistics see no noise
        torch.testing.assert_close(layer.state_dict()[key], value)
    flat, clean = (v.transpose(0, 1).flatten(1) for v in (out, clean))
    mu, sigma = flat.mean(1), flat.std(1)  # of a channel: its own at every step
    assert mu.min() > -0.75 and mu.max() < 0.75
    assert mu.std() == pytest.approx((1 / 12) ** 0.5, rel=0.15)  # U(-0.5, 0.5)
    noise = (flat - clean)[:, :].std().item()
    assert 0.3 < noise < 0.4
    assert 1.0 < sigma.mean() < 1.25
    torch.manual_seed(1)
    assert torch.equal(layer(x), out)
    assert not torch.equal(layer(x), out)
    layer.eval(), plain.eval()
    plain.load_state_dict(layer.state_dict())
    assert torch.equal(layer(x), plain(x))


# --- measurements -------------------------------------------------------------------------------


def options(tmp_path, *argv):
    return bn_ablation.parse_args(["--out", str(tmp_path / "run"), "--device", "cpu", *argv])


class OneBatch:
    """The same batch at every step."""

    def __init__(self, x, y):
        self.xy = (x, y)

    def __call__(self, step):
        return self.xy


def setting(arch="vgg11-4", norm="bn", decay=1e-3, n=16):
    """(model in training mode, probe, parameters, gradients) on shapes or Gaussian data."""
    torch.manual_seed(0)
    model = models.build(arch, norm).train()
    if arch == "dln25":
        model, batches = model.double(), data.Gaussian(0, "cpu", samples=50)
        x, y = batches(0)
    else:
        x, y = data.shapes.make(n)
        x = run.to_float(x)
    probe = bn_ablation.Probe(model, x, y, 123, decay)
    old = {k: p.detach().clone() for k, p in model.named_parameters()}
    return model, probe, old, probe.gradient(old)[1]


def brute_force(model, x, y, seed, decay, params):
    """Loss and gradients of a copy that is really moved to `params`."""
    model = copy.deepcopy(model)
    model.load_state_dict({k: v for k, v in params.items()}, strict=False)
    torch.manual_seed(seed)
    loss = bn_ablation.objective(model(x), y, list(model.parameters()), decay)
    loss.backward()
    return loss.item(), [p.grad for p in model.parameters()]


@pytest.mark.parametrize("arch, norm", [
    ("vgg11-4", "bn"), ("vgg11-4", "noisy-bn"), ("resnet8", "none"), ("dln25", "l1"),
])  # fmt: skip
def test_landscape_against_moved_copies(arch, norm):
    model, probe, old, grads = setting(arch, norm)
    before = copy.deepcopy(model.state_dict())
    etas = [1e-7, 1e-6] if arch == "dln25" else [0.05, 0.2]
    row = bn_ablation.landscape(probe, old, grads, grads, etas)
    betas = []
    for i, eta in enumerate(etas):
        moved = {k: p - eta * g for (k, p), g in zip(old.items(), grads, strict=True)}
        loss, there = brute_force(model, probe.x, probe.y, 123, 1e-3, moved)
        gap = sum((a - b).double().square().sum() for a, b in zip(grads, there, strict=True)) ** 0.5
        step = eta * sum(g.double().square().sum() for g in grads) ** 0.5
        assert row["loss_at"][i] == pytest.approx(loss, rel=1e-5)
        assert row["difference_at"][i] == pytest.approx(gap.item(), rel=1e-3)
        betas.append((gap / step).item())
    assert row["beta"] == pytest.approx(max(betas), rel=1e-3)
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key])
    assert all(p.grad is None for p in model.parameters())


def test_beta_of_a_quadratic_is_known():
    """L = 0.5 sum h_i w_i^2 has the gradient difference eta H g along any step."""
    h = torch.tensor([1.0, 4.0, 9.0], dtype=torch.float64)

    class Quadratic:
        def gradient(self, params):
            return (0.5 * h * params["w"] ** 2).sum(), [h * params["w"]]

    w = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    g = h * w
    row = bn_ablation.landscape(Quadratic(), {"w": w}, [g], [g], [0.01, 0.1])
    assert row["beta"] == pytest.approx(((h * g).norm() / g.norm()).item())
    assert row["difference_at"] == pytest.approx([0.01 * (h * g).norm().item()] * 1
                                                 + [0.1 * (h * g).norm().item()])  # fmt: skip


@pytest.mark.parametrize("arch, norm", [
    ("vgg11-4", "bn"), ("vgg11-4", "noisy-bn"), ("vgg11-4", "linf"), ("resnet8", "bn"),
    ("allconv", "noisy-bn"), ("dln25", "bn"),
])  # fmt: skip
def test_covariate_shift_is_definition_2_1(arch, norm):
    """Against copies with the layers before the probed one really updated; the chains' shared pass
    (with noise and dropout) as well as the general one."""
    model, probe, old, grads = setting(arch, norm, n=4)
    lr = 1e-6 if arch == "dln25" else 0.1
    new = {k: p - lr * g for (k, p), g in zip(old.items(), grads, strict=True)}
    kinds = (torch.nn.Conv2d, torch.nn.Linear)
    layers = [f"{n}.weight" for n, m in model.named_modules() if isinstance(m, kinds)]
    layers = [layers[i] for i in (0, 1, len(layers) // 2, len(layers) - 1)]
    by_name = dict(zip(old, grads, strict=True))
    found = bn_ablation.covariate_shift(probe, old, new, by_name, layers)
    for layer in layers:
        place = list(old).index(layer)
        mixed = {k: (new if i < place else old)[k] for i, k in enumerate(old)}
        _, there = brute_force(model, probe.x, probe.y, 123, 1e-3, mixed)
        g, other = by_name[layer].flatten(), there[place].flatten()
        length, cosine = found[layer]
        assert length == pytest.approx((g - other).norm().item(), rel=1e-3, abs=1e-6)
        assert cosine == pytest.approx(F.cosine_similarity(g, other, 0).item(), abs=1e-3)
    assert found[layers[0]][0] == pytest.approx(0, abs=1e-5)  # nothing precedes the first layer
    assert found[layers[-1]][0] > 0


def test_activations_are_the_slots_outputs():
    model, probe, old, _ = setting()
    found = bn_ablation.activations(probe, old, {"body.1": 2})["body.1"]
    first = model.body[1](model.body[0](model.normalize(probe.x)))
    torch.testing.assert_close(found, first[:, 2].flatten())
    assert not model.body[1]._forward_hooks
    assert found.mean().item() == pytest.approx(0, abs=1e-5)


# --- the script ---------------------------------------------------------------------------------

SMALL = ("--arch", "vgg11-4", "--limit", "160", "--batch-size", "32", "--steps", "6",
         "--measure-every", "2", "--log-every", "2", "--eval-every", "6",
         "--lrs", "0.1")  # fmt: skip


@pytest.fixture(autouse=True)
def small_shapes(monkeypatch):
    monkeypatch.setitem(data.SHAPES_SIZES, "train", 300)
    monkeypatch.setitem(data.SHAPES_SIZES, "test", 100)


def test_measuring_leaves_the_trajectory_alone(tmp_path):
    """Bit for bit, for every normaliser and with dropout-like noise."""
    norms = "none,bn,noisy-bn,l1"
    for folder, every in (("with", "1"), ("without", "0")):
        argv = ("--norms", norms, "--steps", "3", "--measure-every", every)
        args = options(tmp_path / folder, *SMALL, *argv)
        bn_ablation.main(args)
    for norm in norms.split(","):
        file = f"run/{norm}-lr0.1.pt"
        a, b = (run.load_checkpoint(tmp_path / f / file)["model"] for f in ("with", "without"))
        assert a.keys() == b.keys()
        assert all(torch.equal(a[k], b[k]) for k in a), norm


def test_one_directory_shows_all_runs(tmp_path):
    args = options(tmp_path, *SMALL, "--norms", "none,bn", "--lrs", "0.1,0.05", "--layers", "all")
    final = bn_ablation.main(args)
    names = {f"{norm}-lr{lr}" for norm in ("none", "bn") for lr in ("0.1", "0.05")}
    for name in names:
        assert 0 <= final[f"error/{name}"] <= 100
        assert final[f"beta/{name}"] > 0 and final[f"landscape_width/{name}"] > 0
        assert final[f"shift_l2_1/{name}"] < 1e-4 < final[f"shift_l2_9/{name}"]
    folder = tmp_path / "run"
    assert len(list(folder.glob("*/events.out.*"))) == 4
    rows = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    measured = [r for r in rows if "beta" in r]
    assert len(measured) == 4 * 3 and {len(r["loss_at"]) for r in measured} == {4}
    assert {"random_beta", "random_loss_at", "shift", "slots"} <= measured[0].keys()
    for chart in ("landscape", "predictiveness", "random_landscape", "shift_cos_9", "loss"):
        root = xml.etree.ElementTree.parse(folder / "figures" / f"{chart}.svg").getroot()
        assert sum(child.text in names for child in root) == 4  # the legend
    assert (folder / "figures" / "stepsize_bn-lr0.1.svg").exists()
    summary = json.loads((folder / "summary.json").read_text())
    assert set(summary["runs"]) == names and "git" in summary["versions"]
    again = [sys.executable, str(run.ROOT / "eval" / "figures.py"), str(folder), "--out"]
    subprocess.run([*again, str(tmp_path / "again")], check=True)
    for figure in (folder / "figures").iterdir():
        assert (tmp_path / "again" / figure.name).read_text() == figure.read_text()

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.plugins.custom_scalar import layout_pb2

    events = EventAccumulator(str(folder / "bn-lr0.1")).Reload()
    tags = events.Tags()
    assert {"landscape/low", "loss", "final/error"} <= set(tags["scalars"])
    assert any(tag.startswith("slot_") for tag in tags["histograms"])
    (event,) = events.Tensors("custom_scalars__config__")
    layout = layout_pb2.Layout.FromString(event.tensor_proto.string_val[0])
    margins = {c.title: c.margin.series for c in layout.category[0].chart if c.margin.series}
    assert {"landscape", "predictiveness", "random_landscape"} <= margins.keys()
    assert all(s.lower in tags["scalars"] for s in margins["landscape"])


def test_same_start_and_order_for_all_norms():
    args = bn_ablation.parse_args(["--arch", "vgg11-4"])
    dataset = data.load("shapes")
    nets = [bn_ablation.build(norm, args, dataset, "cpu") for norm in ("none", "bn", "linf")]
    for net in nets[1:]:
        torch.testing.assert_close(net.fc.weight, nets[0].fc.weight)
        torch.testing.assert_close(net.body[4].weight, nets[0].body[4].weight)


def test_resume_equals_uninterrupted_and_adds_runs(tmp_path, monkeypatch):
    argv = (*SMALL, "--norms", "noisy-bn", "--batch-size", "80")  # two steps an epoch
    whole = bn_ablation.main(options(tmp_path / "a", *argv))
    calls, measure = [], bn_ablation.measure

    def stop(*args):
        calls.append(args)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return measure(*args)

    monkeypatch.setattr(bn_ablation, "measure", stop)
    with pytest.raises(KeyboardInterrupt):
        bn_ablation.main(options(tmp_path / "b", *argv))
    monkeypatch.setattr(bn_ablation, "measure", measure)
    folder = tmp_path / "b" / "run"
    resumed = bn_ablation.main(bn_ablation.parse_args(["--resume", str(folder)]))
    assert resumed == whole
    more = bn_ablation.main(bn_ablation.parse_args(["--resume", str(folder), "--norms", "bn"]))
    assert more["beta/noisy-bn-lr0.1"] == whole["beta/noisy-bn-lr0.1"] and "beta/bn-lr0.1" in more


def test_divergence_is_reported_and_the_next_run_starts(tmp_path, capsys):
    final = bn_ablation.main(options(tmp_path, *SMALL, "--norms", "none", "--lrs", "1e9,0.1"))
    assert 0 < final["diverged/none-lr1e+09"] < 6
    assert "mean_step_3/none-lr1e+09" in final  # what was measured before stays
    assert "error/none-lr0.1" in final
    assert "diverged at step" in capsys.readouterr().out
    log = (tmp_path / "run" / "log.jsonl").read_text()
    assert '"event": "diverged"' in log and "NaN" not in log and "Infinity" not in log


def test_a_divergence_is_remembered_when_a_network_is_added(tmp_path):
    args = options(tmp_path, *SMALL, "--norms", "none", "--lrs", "1e9")
    step = bn_ablation.main(args)["diverged/none-lr1e+09"]
    log = tmp_path / "run" / "log.jsonl"
    log.write_text(log.read_text() + '{"run": "none-lr1e+09", "st')  # as a kill leaves it
    argv = ["--resume", str(tmp_path / "run"), "--norms", "bn", "--lrs", "0.1"]
    final = bn_ablation.main(bn_ablation.parse_args(argv))
    assert final["diverged/none-lr1e+09"] == step and "error/bn-lr0.1" in final


def test_the_sentence_leaves_out_what_has_no_gradient():
    columns = {"loss band": {"a": 2.0, "b": 1.0}, "gradient change": {"a": 3.0}}
    assert bn_ablation.verdict(columns).startswith("a loss band 2, gradient change 3 (")
    assert bn_ablation.verdict({"loss band": {"a": 2.0}}) == "nothing was measured."


def test_a_run_of_the_linear_network_goes_on(tmp_path):
    """Its data set and decay are those in args.json; --dataset gaussian means the same network."""
    argv = ["--steps", "2", "--measure-every", "0", "--norms", "none"]
    bn_ablation.main(options(tmp_path, "--dataset", "gaussian", *argv))
    args = bn_ablation.parse_args(["--resume", str(tmp_path / "run"), "--norms", "none,bn"])
    assert (args.arch, args.dataset, args.weight_decay) == ("dln25", "gaussian", 0)
    assert "loss/bn-lr1e-06" in bn_ablation.main(args)
    with pytest.raises(UserError, match="--dataset gaussian: unknown"):
        bn_ablation.main(options(tmp_path, "--dataset", "gaussian", "--arch", "vgg11-4"))


def test_linear_network(tmp_path):
    argv = ("--arch", "dln25", "--norms", "none,bn", "--steps", "200", "--log-every", "100")
    final = bn_ablation.main(options(tmp_path, *argv))
    assert final["loss/bn-lr1e-06"] < final["loss/none-lr1e-06"] < 6e4
    assert final["landscape_width/bn-lr1e-06"] < final["landscape_width/none-lr1e-06"]
    rows = run.read_history(tmp_path / "run", [])["none-lr1e-06"]
    first = next(r for r in rows if "beta" in r)
    assert list(first["shift"]) == ["9", "17"] and list(first["slots"]) == ["1", "11", "24"]
    assert 1e4 < first["loss_at"][0] < 2e5  # 0.5 * sum of squares, as the paper's plots


def test_what_measuring_costs():
    """Arithmetic of one measurement with four step sizes: 12 % of 100 training steps with two
    layers, and at most one more training step for every layer more."""
    args = bn_ablation.parse_args(["--arch", "vgg16-4"])
    torch.manual_seed(0)
    model = models.build("vgg16-4", "bn").train()
    x, y = data.shapes.make(8)
    batches = OneBatch(run.to_float(x), y)
    old = {k: p.detach().clone() for k, p in model.named_parameters()}

    def flops(function):
        with FlopCounterMode(display=False) as counter:
            function()
        return counter.get_total_flops()

    def step():
        F.cross_entropy(model(batches.xy[0]), y).backward()

    training = 100 * flops(step)
    grads = [p.grad for p in model.parameters()]
    dataset = data.load("shapes")
    costs = {}
    for layers in (None, "all"):
        args.layers = layers
        targets = bn_ablation.find_targets(args, dataset)

        def measure(targets=targets):
            bn_ablation.measure(model, old, grads, batches, 0, 0.1, targets, args)

        costs[len(targets["layers"])] = flops(measure)
    two, every = costs
    assert costs[two] / training <= 0.12
    assert 0 < costs[every] - costs[two] <= (every - two) * training / 100


# --- bad input ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "argv, words",
    [
        (("--step-sizes", "1,0.5"), "--step-sizes"),
        (("--step-sizes", "1,1"), "--step-sizes"),
        (("--step-sizes", "0,1"), "--step-sizes"),
        (("--step-sizes", "a"), "--step-sizes"),
        (("--layers", "40"), "--layers 40: vgg11-4 has 9"),
        (("--layers", "two"), "--layers"),
        (("--slots", "9"), "--slots 9: vgg11-4 has 8"),
        (("--norms", "bn,batch"), "batch"),
        (("--norms", "bn,nf"), "--norms bn,nf: choose from none, bn, noisy-bn"),
        (("--norms", "dual-bn"), "choose from"),
        (("--lrs", "fast"), "--lrs"),
        (("--arch", "vgg12"), "vgg12"),
        (("--compile",), "--compile"),
        (("--arch", "dln25", "--dataset", "cifar10"), "--dataset: dln25"),
        (("--arch", "dln25", "--weight-decay", "0.1"), "dln25 has its own data, no decay"),
        (("--precision", "fp16"), "--precision fp16"),
        (("--steps", "0"), "--steps"),
        (("--batch-size", "1000"), "--batch-size"),
    ],
)
def test_bad_input(tmp_path, argv, words):
    with pytest.raises(UserError, match=words):
        bn_ablation.main(options(tmp_path, *SMALL, *argv))
    assert not (tmp_path / "run").exists()


def test_network_without_normaliser_slots(tmp_path, monkeypatch):
    class Bare(models.Net):
        def __init__(self, *unused):
            super().__init__()
            self.fc = torch.nn.Linear(3, 10)

        def features(self, x):
            return models.pool(x)

    monkeypatch.setitem(models.ARCHS, "bare", Bare)
    with pytest.raises(UserError, match="no place for a normaliser"):
        bn_ablation.main(options(tmp_path, *SMALL, "--arch", "bare"))
