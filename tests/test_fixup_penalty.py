"""fixup_penalty.py and its networks: Fixup as published, penalty, growth, noise, whole runs."""

import json
import math
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import fixup_penalty as script
from common import data, models, run
from common.run import UserError

FAST = "--epochs 2 --batch-size 32 --arch wrn10-1 --corrupted-images 0 --device cpu --limit 0"
FAST += " --image-size 32 --augment --penalty-reduction mean --eval-every 1"


@pytest.fixture(autouse=True)
def small_shapes(monkeypatch):
    monkeypatch.setattr(data.sets, "SHAPES_SIZES", {"train": 96, "test": 40})


def main(out, *options):
    return script.main(
        script.parse_args([*FAST.split(), "--precision", "fp32", "--out", str(out), *options])
    )


def weights(path):
    return torch.load(path, weights_only=True)["model"]


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def lines(out, **fields):
    """Lines of log.jsonl with these values."""
    every = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [x for x in every if fields.items() <= x.items()]


# --- Fixup ----------------------------------------------------------------------------------------

# The authors' networks (hongyi-zhang/Fixup), counted there: 10 classes for CIFAR, else 1000.
PUBLISHED = {
    ("resnet20", 32): 268_393, ("resnet32", 32): 461_959, ("resnet44", 32): 655_525,
    ("resnet56", 32): 849_091, ("resnet110", 32): 1_720_138, ("resnet18", 224): 11_679_954,
    ("resnet34", 224): 21_780_730, ("resnet50", 224): 25_504_026,
}  # fmt: skip


@pytest.mark.parametrize("arch", ["vgg11-b", "dln25", "vgg11-4", "resnet8"])
def test_he_takes_any_last_layer(arch):
    """One linear layer with a bias, several, or none."""
    model = models.build(arch, "none")
    models.init_he(model)
    assert not any(p.any() for name, p in model.fc.named_parameters() if name.endswith("bias"))


@pytest.mark.parametrize(("arch", "size"), PUBLISHED)
def test_fixup_parameter_count(arch, size):
    model = models.build(arch, "fixup", 10 if size == 32 else 1000, size)
    assert sum(p.numel() for p in model.parameters()) == PUBLISHED[arch, size]


@pytest.mark.parametrize("arch", ["resnet110", "resnet50", "resnet18", "wrn16-2", "resnext29"])
def test_fixup_logits_are_zero_at_the_start(arch):
    x = torch.rand(2, 3, 32, 32)
    logits, h = models.build(arch, "fixup")(x, with_features=True)
    assert torch.equal(logits, torch.zeros(2, 10)) and h.std() > 1e-3


@pytest.mark.parametrize(
    ("arch", "blocks", "power"),
    [("resnet56", 27, -0.5), ("wrn28-2", 12, -0.5), ("resnet50", 16, -0.25)],
)
def test_fixup_scales(arch, blocks, power):
    """He (fan-out) times L^(-1/(2m-2)) inside a branch, zero at its end, plain He elsewhere."""
    model = models.build(arch, "fixup")
    branches = [m for m in model.modules() if hasattr(m, "branch")]
    assert len(branches) == blocks
    for block in branches:
        *inner, last = (getattr(block, name).weight for name in block.branch)
        assert not last.any() and block.scale.item() == 1
        for w in inner:
            he = (2 / (w.shape[0] * w[0, 0].numel())) ** 0.5
            assert w.std().item() == pytest.approx(he * blocks**power, rel=0.15)
    names = [n for n, p in model.named_parameters() if p.numel() == 1]
    per_block = 7 if arch == "resnet50" else 5
    assert (
        len(names) == per_block * blocks + 2
    )  # and those before the first ReLU and the classifier


def test_fixup_block_by_hand():
    """x + scale * conv2(relu(conv1(x + 1a) + 1b) + 2a) + 2b on 1x1 images, then ReLU."""
    block = models.FixupBasicBlock(models.Layers("fixup"), 1, 1, 1, "A")
    block.conv1.weight.data.zero_()[0, 0, 1, 1] = 2.0
    block.conv2.weight.data.zero_()[0, 0, 1, 1] = 3.0
    values = {"bias1a": 0.5, "bias1b": -1.0, "bias2a": 0.25, "bias2b": 4.0, "scale": 0.5}
    for name, value in values.items():
        getattr(block, name).data.fill_(value)
    x = torch.tensor([1.0, -2.0]).view(2, 1, 1, 1)
    expected = [1 + 0.5 * 3 * (2 * 1.5 - 1 + 0.25) + 4, -2 + 0.5 * 3 * 0.25 + 4]
    torch.testing.assert_close(block(x).flatten(), torch.tensor(expected))


def test_fixup_shortcut_shares_the_first_bias_and_pads_at_the_end():
    block = models.FixupBasicBlock(models.Layers("fixup"), 2, 4, 2, "A")
    block.conv2.weight.data.zero_()
    block.bias1a.data.fill_(1.0)
    x = torch.rand(1, 2, 4, 4)
    out = block(x)
    assert torch.equal(out[:, :2], x[:, :, ::2, ::2] + 1) and not out[:, 2:].any()


def test_scalars_have_their_own_rate():
    model = models.build("wrn16-1", "fixup")
    groups = models.fixup_groups(model, 0.1)
    assert [g["lr_scale"] for g in groups] == [1.0, 0.1]
    slow = {id(p) for p in groups[1]["params"]}
    names = {n for n, p in model.named_parameters() if id(p) in slow}
    scalars = {n for n, p in model.named_parameters() if p.numel() == 1}
    assert names == scalars | {"fc.bias"} and len(groups[0]["params"]) == 12 + 2 + 1 + 1
    assert len(models.fixup_groups(models.build("wrn16-1", "none"), 0.1)) == 1


# --- penalty, dropout, mixup ----------------------------------------------------------------------


def test_penalty_by_hand():
    h, z = torch.tensor([[1.0, 2.0], [0.0, 3.0]]), torch.tensor([[1.0], [2.0]])
    assert script.penalty("embedding", h, z, "mean").item() == pytest.approx((5 / 2 + 9 / 2) / 2)
    assert script.penalty("embedding", h, z, "sum").item() == pytest.approx((5 + 9) / 2)
    assert script.penalty("logits", h, z, "mean").item() == pytest.approx(2.5)
    assert script.penalty("none", h, z, "mean").item() == 0


def test_dropout_is_an_adaptive_penalty():
    """E[CE] with dropout p on h exceeds CE by p/(2(1-p)) sum_i h_i^2 w_i'(diag q - qq')w_i, to
    second order in W h."""
    model = models.build("resnet8").train()
    model.features = lambda x: x
    model.fc.weight.data.mul_(0.3)
    h, y, p = torch.rand(1, 64), torch.tensor([3]), 0.3
    logits, w = model.head(h), model.fc.weight  # w_i: columns of w (K,D)
    q = logits.softmax(1)[0]
    curvature = (w * ((torch.diag(q) - torch.outer(q, q)) @ w)).sum(0)
    expected = p / (2 * (1 - p)) * (h[0].square() * curvature).sum().item()
    many = h.expand(400_000, -1)
    losses = F.cross_entropy(model(many, dropout=p), y.expand(len(many)), reduction="none").double()
    measured = losses.mean().item() - F.cross_entropy(logits, y).item()
    noise = losses.std().item() * len(many) ** -0.5
    assert noise < 0.1 * expected and abs(measured - expected) < 3 * noise + 0.02 * expected
    model.eval()
    assert torch.equal(model(h, dropout=p), logits)


def test_mixup_mixes_images_and_keeps_both_labels():
    """One share per batch, Beta(1, 1) on average uniform; a function of (seed, step) alone."""
    x, y = torch.eye(4).view(4, 4, 1, 1), torch.arange(4)
    mixed, first, second, share = data.mixup(x, y, 1.0, 0, 7)
    wanted = share * F.one_hot(first, 4) + (1 - share) * F.one_hot(second, 4)
    torch.testing.assert_close(mixed.flatten(1), wanted.float())
    assert torch.equal(first, y) and sorted(second.tolist()) == [0, 1, 2, 3]
    state = torch.get_rng_state()
    again = data.mixup(x, y, 1.0, 0, 7)
    assert torch.equal(again[0], mixed) and torch.equal(state, torch.get_rng_state())
    shares = torch.tensor([data.mixup(x, y, 1.0, 0, step)[3] for step in range(2000)])
    assert shares.mean().item() == pytest.approx(0.5, abs=0.02)  # sd of the mean: 0.0065
    assert shares.std().item() == pytest.approx(12**-0.5, abs=0.02)


# --- growth ---------------------------------------------------------------------------------------


def blocks_of(norm, init, seeds):
    """Mean square after every block of wrn28-2 (3 stages of 4), mean over seeds."""
    total = 0
    for seed in range(seeds):
        torch.manual_seed(seed)
        model = models.build("wrn28-2", norm)
        models.INITS[init](model)
        found = models.mean_squares(model, torch.rand(2, 3, 32, 32))["blocks"]
        total = total + torch.tensor(found, dtype=torch.float64).view(3, 4) / seeds
    return total


def test_growth_laws():
    """From block to block within a stage: x2 without BatchNorm (2^L), +1 with it (L+1), x1 with
    Fixup. Zero padding takes its share: at side s, 3x3 weights see f = (1 - 2/(3s))^2 of the whole
    on average, twice in a branch without BatchNorm and once after BatchNorm's last layer."""
    seen = (1 - 2 / (3 * torch.tensor([32, 16, 8]).double())).square()
    none = blocks_of("none", "he", 16)
    ratios = (none[:, -1] / none[:, 0]) ** (1 / 3)
    torch.testing.assert_close(ratios[:2], 1 + seen[:2].square(), rtol=0.03, atol=0)
    assert 1 + seen[2].square() < ratios[2] < 2  # 8x8: most of the energy is off the border
    bn = blocks_of("bn", "he", 8)
    torch.testing.assert_close((bn[:, -1] - bn[:, 0]) / 3, seen, rtol=0.1, atol=0)
    fixup = blocks_of("fixup", "fixup", 1)
    torch.testing.assert_close(fixup, fixup[:, :1].expand(3, 4))


# --- normalisers ----------------------------------------------------------------------------------


def correlated(images, seed, channels=2, size=4):
    """Activations (N,C,H,W), skewed, with correlated positions, channels and images of unequal
    contrast; mean and variance are known by a large sample only."""
    rng = torch.Generator().manual_seed(seed)
    z = torch.randn(images, channels, size + 2, size + 2, generator=rng)
    z = F.avg_pool2d(z, 3, 1) * 3 + 0.7 * torch.randn(images, channels, 1, 1, generator=rng)
    z = z * (1 + 0.3 * torch.rand(images, 1, 1, 1, generator=rng))
    z[:, 1] += 0.5 * z[:, 0]
    return F.leaky_relu(z, 0.5) + 3


def test_noise_has_the_law_of_batch_statistics():
    """Standard deviation and correlation of (mu_B - mu)/sigma and sigma_B/sigma - 1 over many real
    batches, against those drawn from one large batch."""
    n = 64
    every = correlated(n * 1200, 0)
    var, mu = torch.var_mean(every, (0, 2, 3), correction=0)
    batches = every.view(-1, n, *every.shape[1:])
    batch_var, batch_mu = torch.var_mean(batches, (1, 3, 4), correction=0)
    real = torch.cat([(batch_mu - mu) / var.sqrt(), (batch_var / var).sqrt() - 1], 1)
    layer = models.BatchNoise(2, images=n)
    x = correlated(4000, 1)
    drawn = torch.stack([torch.cat(layer.draw(x)[2:]) for _ in range(1200)])
    torch.testing.assert_close(drawn.std(0), real.std(0), rtol=0.1, atol=0)
    torch.testing.assert_close(drawn.T.corrcoef(), real.T.corrcoef(), rtol=0, atol=0.1)
    positions = every[0, 0].numel()  # as if independent, the law would be far off
    assert (real.std(0)[:2] > 2 * (n * positions) ** -0.5).all()


def test_noise_of_independent_values_is_the_textbook_law():
    """var u = 1/n, var v = (kurtosis - 1)/(4n) for n independent values, here uniform (1.8)."""
    x = torch.rand(5_000, 1, 1, 1)
    layer = models.BatchNoise(1, images=50)
    u, v = torch.stack([torch.cat(layer.draw(x)[2:]) for _ in range(2000)]).var(0).tolist()
    assert u == pytest.approx(1 / 50, rel=0.1) and v == pytest.approx(0.8 / 200, rel=0.1)


def test_noise_is_batch_norms_to_first_order():
    """sigma * (BatchNorm of the batch - population BatchNorm) is what the layer adds for its own u
    and v; nothing in evaluation; no gradient through the statistics."""
    every = correlated(20_000, 0).double()
    x = every[:256]
    var, mu = torch.var_mean(every, (0, 2, 3), correction=0, keepdim=True)
    batch_var, batch_mu = torch.var_mean(x, (0, 2, 3), correction=0, keepdim=True)
    sigma, u, v = var.sqrt(), (batch_mu - mu) / var.sqrt(), (batch_var / var).sqrt() - 1
    exact = sigma * ((x - batch_mu) / batch_var.sqrt() - (x - mu) / sigma)
    layer = models.BatchNoise(2)
    layer.draw = lambda x: tuple(t.flatten() for t in (mu, sigma, u, v))
    added = layer(x) - x
    assert (added - exact).std() < 0.1 * exact.std()
    assert torch.equal(layer.eval()(x), x)
    x = x.float().requires_grad_()
    torch.manual_seed(1)
    layer = models.BatchNoise(2)
    layer(x).sum().backward()
    torch.manual_seed(1)
    v = layer.draw(x)[3].view(1, 2, 1, 1)
    torch.testing.assert_close(x.grad, (1 - v).expand_as(x))


def test_population_statistics_are_constants():
    """The first batch is normalised by itself, the next by the average before it; no gradient
    flows through either, and evaluation uses the same averages."""
    layer = models.NORMS["bn-population"](2)
    a, b = (correlated(32, s).requires_grad_() for s in (0, 1))
    mean, std = a.mean((0, 2, 3)).view(-1, 1, 1), a.std((0, 2, 3), correction=0).view(-1, 1, 1)
    torch.testing.assert_close(layer(a), (a - mean) / std, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(layer.running_mean, mean.flatten())
    out = layer(b)
    torch.testing.assert_close(out, (b - mean) / std, rtol=1e-4, atol=1e-4)
    weight = torch.randn(out.shape)
    (out * weight).sum().backward()
    torch.testing.assert_close(b.grad, weight / std.detach(), rtol=1e-4, atol=1e-4)
    wanted = 0.9 * mean.flatten() + 0.1 * b.mean((0, 2, 3))
    torch.testing.assert_close(layer.running_mean, wanted)
    torch.testing.assert_close(layer.eval()(b).mean((0, 2, 3)), (b.mean((0, 2, 3)) - wanted)
                               / layer.running_var.sqrt(), rtol=1e-4, atol=1e-4)  # fmt: skip


def test_auxiliary_statistics():
    """With the batch itself as auxiliary images, training outputs are BatchNorm's at every depth;
    an image's output does not depend on the others of its batch; averages come from there only."""
    aux, x = torch.rand(16, 3, 32, 32), torch.rand(8, 3, 32, 32)
    plain = models.build("resnet8", "bn").train()
    model = models.build("resnet8", "bn-aux").train()
    model.load_state_dict(plain.state_dict())
    models.measure_statistics(model, aux)
    torch.testing.assert_close(model(aux), plain(aux), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(model(x)[:3], model(x[:3]), rtol=1e-4, atol=1e-4)
    ours, theirs = model.bn1, plain.bn1
    assert ours.num_batches_tracked == 1  # `first`: the averages are the statistics themselves
    torch.testing.assert_close(ours.running_mean, theirs.running_mean / 0.1)


# --- runs -----------------------------------------------------------------------------------------

VARIANTS = "none,none+penalty,fixup+penalty+dropout,bn,bn-population,bn-aux,noise"


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """One call with many variants."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data.sets, "SHAPES_SIZES", {"train": 96, "test": 40})
        out = tmp_path_factory.mktemp("fixup") / "run"
        return out, main(out, "--variants", VARIANTS, "--mixup", "0")


def test_variants_in_one_directory(finished):
    out, final = finished
    names = VARIANTS.split(",")
    for name in names:
        checkpoint = run.load_checkpoint(out / f"{name}.pt")
        assert checkpoint["norm"] == name.split("+")[0] and checkpoint["step"] == 6
        assert models.from_checkpoint(checkpoint)(torch.rand(1, 3, 32, 32)).isfinite().all()
        assert 0 <= final[f"error/{name}"] <= 100 and final[f"final_layer/{name}"] > 0
        (start,) = lines(out, stage=name, epoch=0)
        assert start["embedding"] > 0
        if name.startswith("fixup"):
            assert start["logits"] == 0
        assert len(list((out / name).glob("events.out.*"))) == 1


def test_tensorboard_has_the_variants_together(finished):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for name in VARIANTS.split(","):
        events = EventAccumulator(str(finished[0] / name)).Reload()
        tags = set(events.Tags()["scalars"])
        names = {"loss", "accuracy", "error", "embedding", "logits", "penalty", "lr"}
        assert names | {"final/error", "final/final_layer"} <= tags
        assert [e.step for e in events.Scalars("embedding")] == [0, 3, 6]
        assert [e.step for e in events.Scalars("final/error")] == [6]


def test_weight_0_is_the_network_without_penalty(finished, tmp_path):
    main(tmp_path / "r", "--norm", "none", "--penalty", "embedding", "--penalty-weight", "0")
    assert same(weights(tmp_path / "r" / "last.pt"), weights(finished[0] / "none.pt"))
    other = weights(finished[0] / "none+penalty.pt")
    assert not same(other, weights(finished[0] / "none.pt"))


def test_same_seed_same_weights_alone_or_with_others(finished, tmp_path):
    main(tmp_path / "r", "--norm", "noise")
    assert same(weights(tmp_path / "r" / "last.pt"), weights(finished[0] / "noise.pt"))


@pytest.mark.parametrize("stop", ["none+penalty", "fixup+penalty+dropout", "bn-aux"])
def test_resume_is_exact(finished, tmp_path, monkeypatch, stop):
    """Interrupted after the first epoch of a variant and resumed: the same weights, bit for bit."""
    out, final = finished
    real = run.RunDir.save

    def save(self, name, checkpoint):
        real(self, name, checkpoint)
        if checkpoint["stage"] == stop and checkpoint["step"] == 3:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(run.RunDir, "save", save)
        main(tmp_path / "r", "--variants", f"{stop},bn")
    assert (
        script.main(script.parse_args(["--resume", str(tmp_path / "r")]))[f"error/{stop}"]
        == (final[f"error/{stop}"])
    )
    for name in (stop, "bn"):
        assert same(weights(tmp_path / "r" / f"{name}.pt"), weights(out / f"{name}.pt"))


def test_tune_then_retrain_on_everything(tmp_path, monkeypatch):
    """The validation split chooses; the networks of the table see all images, one per seed."""
    sizes = []
    batches = data.Batches.__init__

    def spy(self, images, *rest, **named):
        sizes.append(len(images.y))
        batches(self, images, *rest, **named)

    monkeypatch.setattr(data.Batches, "__init__", spy)
    monkeypatch.setattr(script, "TUNED", {"lr": (0.05, 1e9), "penalty_weight": (0.01, 0.1)})
    options = "--tune --val-size 20 --seeds 3"
    final = main(
        tmp_path / "r", *options.split(), "--epochs", "1", "--norm", "none", "--penalty", "logits"
    )
    trials = lines(tmp_path / "r", event="trial")
    assert len(trials) == 4 and {t["penalty_weight"] for t in trials} == {0.01, 0.1}
    assert all(t["val_error"] == 100 for t in trials if t["lr"] == 1e9)
    (tuned,) = lines(tmp_path / "r", event="tuned")
    assert tuned["val_error"] == min(t["val_error"] for t in trials) and tuned["lr"] == 0.05
    assert sizes[::2] == [76] * 5 + [96] * 3  # the check of the options, four trials, three seeds
    (result,) = lines(tmp_path / "r", event="result", metric="error")
    assert final["error/none+logits"] == sorted(result["values"])[1] and len(result["values"]) == 3
    a, b = (weights(tmp_path / "r" / f"none+logits-s{s}.pt") for s in (0, 1))
    assert not same(a, b)
    seeds = [run.load_checkpoint(tmp_path / "r" / f"none+logits-s{s}.pt")["args"] for s in (0, 1)]
    assert [options["seed"] for options in seeds] == [0, 1]
    chosen = {name: tuned[name] for name in ("lr", "penalty_weight")}
    assert all(chosen.items() <= options.items() for options in seeds)
    assert all(options["tuned"] == list(chosen) for options in seeds)
    used = run.load_checkpoint(tmp_path / "r" / "none+logits-s0.pt")
    assert used["optimizer"]["param_groups"][0]["lr_scale"] == 1.0


@pytest.mark.parametrize(
    "options",
    [
        "--norm fixup --mixup 1 --schedule steps --precision bf16",
        "--norm none --init glorot --arch vgg11-4 --penalty embedding --penalty-reduction sum",
        "--norm none --init fixup --arch resnet8",
        "--norm noise --corrupted-images 2",
    ],
)
def test_options_train(tmp_path, options):
    final = main(tmp_path / "r", *options.split(), "--epochs", "1")
    assert all(math.isfinite(v) for v in final.values())


def test_schedules():
    rates = [script.lr_at(s, 100, 0.1, 10) for s in range(100)]
    assert rates[9] == pytest.approx(0.1) and rates[55] == pytest.approx(0.05)
    steps = [script.lr_at(s, 100, 0.1, 0, "steps") for s in (0, 49, 50, 74, 75, 99)]
    assert steps == pytest.approx([0.1, 0.1, 0.01, 0.01, 0.001, 0.001])


def test_defaults_are_the_protocol():
    args = script.parse_args("--dataset cifar10 --tune --seeds 10".split())
    assert (args.arch, args.epochs, args.val_size, args.seeds) == ("wrn28", 200, 5000, 10)
    assert script.parse_args("--dataset svhn --tune".split()).val_size == 3257
    assert script.parse_args("--dataset shapes-shortcut --tune".split()).val_size == 200
    assert script.parse_args("--dataset cifar10.1 --tune".split()).val_size == 5000
    own = script.options_of("fixup+penalty+dropout", args)
    assert (own.norm, own.init, own.penalty, own.dropout) == ("fixup", "fixup", "embedding", 0.3)
    own = script.options_of("none+glorot+logits", args)
    assert (own.norm, own.init, own.penalty, own.dropout) == ("none", "glorot", "logits", 0.0)


def test_svhn_is_an_npz_and_not_mirrored(tmp_path):
    with pytest.raises(UserError, match=r"svhn\.npz: missing; SVHN is read from an \.npz"):
        data.load("svhn", tmp_path)
    x = np.zeros((20, 32, 32, 3), np.uint8)
    x[:, :, :16] = 255  # the left half is white
    y = np.arange(20) % 10
    np.savez(tmp_path / "svhn.npz", x_train=x, y_train=y, x_test=x, y_test=y)
    dataset = data.load("svhn", tmp_path)
    assert len(dataset.classes) == 10 and not dataset.flip
    batch, _ = data.Batches(dataset.train, 20, 0, augment=True, flip=dataset.flip)(0)
    assert (batch[:, :, 8:24, 8] == 1).all() and (batch[:, :, 8:24, 24] == 0).all()


# --- bad input ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ("--penalty-weight -1", "at least 0"),
        ("--penalty-weight nan", "at least 0"),
        ("--dropout 1", "below 1"),
        ("--seeds 0", "above 0"),
        ("--penalty l1", "invalid choice"),
        ("--norm bn --variants none", "give one"),
        ("--norm dual-bn", "half of it is idle"),
        ("--norm fixup --init he", "fixup is an initialisation"),
        ("--dropout 0.5 --variants none,bn", r"no variant has \+dropout"),
        ("--penalty logits --variants none", r"no variant has \+penalty"),
        ("--growth 10,16", "eval/growth.py"),
        ("--tune-epochs=3", "is gone: a trial is as long as a training"),
    ],
)
def test_bad_options(options, text):
    with pytest.raises(UserError, match=text):
        script.parse_args(options.split())


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ("--norm bn --init fixup", "takes no normaliser: norm fixup or none, not bn"),
        ("--norm fixup --init he", "fixup is an initialisation"),
        ("--variants fixup+bn", r"one normaliser \(bn, gn, none"),
        ("--variants dropout", "one normaliser"),
        ("--variants none+batch", r"\+penalty, \+embedding"),
        ("--norm bn-aux --mixup 1", "not mixed"),
        ("--norm fixup --arch vgg11", "VGG has no residual branch; possible are resnet"),
        ("--norm fixup --arch allconv", "AllConv has no residual branch"),
        ("--norm none --init fixup --arch densenet40", "DenseNet has no residual branch"),
        ("--batch-size 97", "only 96 images"),
    ],
)
def test_bad_runs_leave_nothing(tmp_path, options, text):
    with pytest.raises(UserError, match=text):
        main(tmp_path / "r", *options.split())
    assert not (tmp_path / "r").exists()


def test_divergence_stops_before_the_checkpoint(tmp_path):
    with pytest.raises(run.Diverged, match=r"at step \d+ \(lr"):
        main(tmp_path / "r", "--norm", "none", "--lr", "1e30", "--warmup", "0")
    assert not (tmp_path / "r" / "last.pt").exists()


def test_error_is_one_line_and_status_2(tmp_path):
    command = [
        sys.executable,
        str(run.ROOT / "fixup_penalty.py"),
        "--norm",
        "bn",
        "--init",
        "fixup",
    ]
    done = subprocess.run(
        [*command, "--limit", "200"], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: --init fixup takes no normaliser")
    assert done.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []
