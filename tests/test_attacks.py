"""The PGD loop: its bounds, what it leaves behind, its precision, and other people's PGD."""

import functools
import importlib.util
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from common import attacks, data, models, run
from common.attacks import fastnet, pgd, unit_noise
from common.attacks.pgd import L2
from common.run import UserError

BF16 = run.Precision("bf16")
FP16 = run.Precision("fp16")


def make_net(arch="resnet8", norm="bn", seed=0):
    """A network with statistics, gains and shifts as after training, in eval mode."""
    torch.manual_seed(seed)
    net = models.build(arch, norm)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.3)
            module.running_var.uniform_(0.3, 2)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, 0, 0.3)
    nn.init.normal_(net.fc.weight)
    return net.eval()


def make_images(n=6, size=32, seed=0):
    """Images whose pixels are 0 or 1 to a large part, and labels."""
    g = torch.Generator().manual_seed(seed)
    x = torch.rand(n, 3, size, size, generator=g).mul_(1.6).sub_(0.3).clamp_(0, 1)
    return x, torch.randint(10, (n,), generator=g)


def distance(x_adv, x, norm):
    """Distances (N,) in exact arithmetic: fp64 holds the difference of two fp32 numbers."""
    delta = (x_adv.double() - x.double()).flatten(1)
    return delta.abs().amax(1) if norm == "linf" else delta.norm(dim=1)


class Dead(nn.Module):
    """Logits that do not depend on the image, with a gradient of zero."""

    def forward(self, x):
        return torch.zeros(len(x), 10) + 0 * x.flatten(1)[:, :10]


def correct(net, x, y):
    with torch.no_grad():
        return net(x).argmax(1) == y


# --- ball, box, start -----------------------------------------------------------------------------


@pytest.mark.parametrize("precision", [None, BF16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(
    "norm, eps", [("linf", 0.01), ("linf", 8), ("linf", 31), ("l2", 0.5), ("l2", 128), ("l2", 900)]
)
def test_inside_ball_and_box_to_the_last_ulp(norm, eps, precision):
    net, (x, y) = make_net(), make_images()
    for alpha in (None, 2 * eps):
        x_adv = pgd(net, x, y, eps, alpha, 3, norm, precision=precision)
        assert x_adv.dtype == torch.float32 and x_adv.shape == x.shape
        assert distance(x_adv, x, norm).max().item() <= eps / 255
        assert x_adv.min() >= 0 and x_adv.max() <= 1
        assert distance(x_adv, x, norm).max().item() > 0.9 * eps / 255 or eps == 900
    if norm == "linf":
        assert (x_adv - x).abs().max().item() <= eps / 255


@pytest.mark.parametrize("eps", [0.5, 128.0, 765.0, 3000.0])
def test_l2_projection_is_exact_at_imagenet_size(eps):
    x = torch.rand(2, 3, 224, 224).round(decimals=1)
    ball = L2(x, eps / 255, eps / 255)
    for scale in (1e-3, 1.0, 30.0):
        adv = ball.start(scale * torch.randn_like(x))
        assert distance(adv, x, "l2").max().item() <= eps / 255


def test_eps_of_255_reaches_any_image():
    x, y = make_images()
    x_adv = pgd(make_net(), x, y, eps=255, alpha=255, steps=1, random_start=False)
    assert ((x_adv == 0) | (x_adv == 1)).float().mean() > 0.99


def test_images_a_rounding_error_outside_the_box_are_accepted():
    x, y = make_images()
    x_adv = pgd(make_net(), x.clamp(min=-3e-8) - 3e-8, y, steps=2)
    assert x_adv.min() >= 0


def test_random_start_is_uniform_in_the_linf_ball():
    x = torch.full((40, 3, 16, 16), 0.5)
    x_adv = pgd(Dead(), x, torch.zeros(40).long(), eps=8, steps=1, norm="linf")
    u = ((x_adv - x) * 255 / 8).flatten().double().sort().values
    law = torch.linspace(-1, 1, len(u), dtype=torch.float64)
    assert (u - law).abs().max() < 4 / len(u) ** 0.5  # Kolmogorov-Smirnov, p about 3e-4
    columns = ((x_adv - x) * 255 / 8).flatten(1)
    assert columns.mean(1).abs().max() < 5 * (1 / 3 / 768) ** 0.5  # images are independent
    assert columns.std(0).min() > 0.3


@pytest.mark.parametrize("shape", [(1, 2, 2), (3, 8, 8)])
def test_random_start_is_uniform_in_the_l2_ball(shape):
    n, d = 4000, shape[0] * shape[1] * shape[2]
    x = torch.full((n, *shape), 0.5)
    net = nn.Sequential(nn.Flatten(), nn.Linear(d, 3))
    nn.init.zeros_(net[1].weight)
    x_adv = pgd(net, x, torch.zeros(n).long(), eps=60, steps=1, norm="l2")
    delta = (x_adv.double() - x).flatten(1) * 255 / 60
    volume = delta.norm(dim=1).pow(d).sort().values  # uniform on [0,1]
    assert (volume - torch.linspace(0, 1, n, dtype=torch.float64)).abs().max() < 2 / n**0.5
    assert delta.mean(0).abs().max() < 5 / (n * d) ** 0.5


def test_deterministic_under_a_generator_and_by_noise():
    net, (x, y) = make_net(), make_images()
    for norm in ("linf", "l2"):
        a, b, c = (
            pgd(net, x, y, steps=2, norm=norm, generator=run.generator(seed, "attack"))
            for seed in (0, 0, 1)
        )
        assert torch.equal(a, b) and not torch.equal(a, c)
        noise = unit_noise(x.shape, norm, run.generator(0, "attack"))
        assert torch.equal(pgd(net, x, y, steps=2, norm=norm, noise=noise), a)


def test_noise_of_a_global_batch_can_be_sliced():
    """Two processes with half a batch each start where one process with all of it does."""
    x, y = make_images()
    noise = unit_noise(x.shape, "l2", run.generator(0))
    whole = pgd(Dead(), x, y, 64, norm="l2", noise=noise)
    parts = [pgd(Dead(), x[i::2], y[i::2], 64, norm="l2", noise=noise[i::2]) for i in (0, 1)]
    for i in (0, 1):
        assert torch.equal(parts[i], whole[i::2])


def test_default_alpha():
    assert attacks.default_alpha(8, 10) == 1.0  # eps 8, 10 steps: NoFrost's 1/255
    assert attacks.default_alpha(16, 10) == 2.0  # the 1.25 eps and eps + 4 meet
    assert attacks.default_alpha(32, 10) == 3.6
    net, (x, y) = make_net(), make_images()
    a = pgd(net, x, y, eps=4, steps=5, random_start=False)
    assert torch.equal(a, pgd(net, x, y, eps=4, alpha=1.0, steps=5, random_start=False))


# --- the attack itself ----------------------------------------------------------------------------


def input_gradient(net, x, y):
    x = x.clone().requires_grad_()
    return torch.autograd.grad(F.cross_entropy(net(x), y, reduction="sum"), x)[0]


def test_one_step_is_fgsm():
    net, (x, y) = make_net(), make_images()
    x_adv = pgd(net, x, y, eps=8, steps=1, random_start=False)
    expected = (x + 8 / 255 * input_gradient(net, x, y).sign()).clamp(0, 1)
    assert ((x_adv - expected).abs() < 1e-6).float().mean() > 0.999


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_agrees_with_a_loop_written_out(norm):
    net, (x, y) = make_net(), make_images()
    eps, alpha = (8 / 255, 2 / 255) if norm == "linf" else (0.5, 0.1)
    x_adv = pgd(net, x, y, eps * 255, alpha * 255, 5, norm, random_start=False)
    slow = x.clone()
    for _ in range(5):
        g = input_gradient(net, slow, y)
        if norm == "linf":
            slow = (slow + alpha * g.sign()).clamp(x - eps, x + eps).clamp(0, 1)
        else:
            g = g / g.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
            delta = slow + alpha * g - x
            length = delta.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
            slow = (x + delta * (eps / length).clamp(max=1)).clamp(0, 1)
    assert ((x_adv - slow).abs() < 1e-4).float().mean() > 0.99


@pytest.mark.parametrize("loss", ["ce", "cw", "dlr"])
def test_more_steps_and_restarts_only_help(loss):
    """The loss climbs with the steps. Restarts never bring back an image that was broken."""
    net, (x, _) = make_net(), make_images(10)
    with torch.no_grad():
        y = net(x).argmax(1)
    noise = unit_noise((4, *x.shape), generator=run.generator(0))
    settings = {"eps": 0.6, "loss": loss}
    few, many = (
        pgd(net, x, y, **settings, steps=k, noise=noise[0], return_stats=True)[1]["loss"]
        for k in (2, 6)
    )
    assert many > few
    one = correct(net, pgd(net, x, y, **settings, steps=3, noise=noise[0]), y)
    four = correct(net, pgd(net, x, y, **settings, steps=3, noise=noise, restarts=4), y)
    assert not (four & ~one).any()
    assert 0 < four.sum() <= one.sum() < len(y)


def test_restarts_keep_the_highest_loss_among_equals():
    net, (x, _) = make_net(), make_images()
    with torch.no_grad():
        y = net(x).argmax(1)
    noise = unit_noise((3, *x.shape), generator=run.generator(0))

    def losses(x_adv):
        with torch.no_grad():
            return F.cross_entropy(net(x_adv), y, reduction="none")

    runs = [losses(pgd(net, x, y, eps=0.01, steps=1, noise=noise[i])) for i in range(3)]
    kept = losses(pgd(net, x, y, eps=0.01, steps=1, noise=noise, restarts=3))
    assert torch.allclose(kept, torch.stack(runs).amax(0))


def test_targeted_moves_towards_the_target():
    net, (x, y) = nn.Sequential(nn.Flatten(), nn.Linear(192, 10)), make_images(40, 8)
    target = (y + 3) % 10
    with torch.no_grad():
        before = {loss: f(net(x), y, target) for loss, f in attacks.LOSSES.items()}
    for loss, f in attacks.LOSSES.items():
        x_adv = pgd(net, x, y, 200, loss=loss, target=target, restarts=2)
        assert (f(net(x_adv), y, target) > before[loss]).float().mean() >= 0.95
        share = correct(net, x_adv, target).float().mean()
        assert share > (0.3 if loss == "dlr" else 0.9)  # dlr also rises when its divisor falls


def test_losses_as_published():
    """CW with confidence 50; DLR of Croce & Hein 2020, eq. 6 and 7, written out per sample."""
    torch.manual_seed(1)
    logits, y, t = torch.randn(50, 7) * 3, torch.randint(7, (50,)), torch.randint(7, (50,))
    logits[0, y[0]] -= 90
    for i in range(50):
        row, one = logits[i].tolist(), slice(i, i + 1)
        top = sorted(row, reverse=True)
        args = logits[one], y[one]
        other = max(v for k, v in enumerate(row) if k != y[i])
        rest = max(v for k, v in enumerate(row) if k != t[i])
        for found, expected in (
            (attacks.cw_loss(*args), min(other - row[y[i]], 50)),
            (attacks.cw_loss(*args, t[one]), min(row[t[i]] - rest, 50)),
            (attacks.dlr_loss(*args), -(row[y[i]] - other) / (top[0] - top[2])),
            (
                attacks.dlr_loss(*args, t[one]),
                -(row[y[i]] - row[t[i]]) / (top[0] - (top[2] + top[3]) / 2),
            ),
        ):
            assert found.item() == pytest.approx(expected, rel=1e-4, abs=1e-5)


def test_loss_of_the_callers():
    """TRADES maximises KL(f(x) || f(x_adv)); y is then whatever the function takes."""
    net, (x, _) = make_net(), make_images()
    with torch.no_grad():
        p = net(x).softmax(1)

    def kl(logits, p, target):
        return F.kl_div(logits.log_softmax(1), p, reduction="none").sum(1)

    x_adv = pgd(net, x, p, 8, steps=3, loss=kl)
    with torch.no_grad():
        assert kl(net(x_adv), p, None).min() > 1e-3


# --- what it leaves behind ------------------------------------------------------------------------


def snapshot(net):
    return (
        [m.training for m in net.modules()],
        [(p, p.requires_grad, p.grad, p.clone()) for p in net.parameters()],
        [(b, b.clone()) for b in net.buffers()],
        [sorted(vars(m)) for m in net.modules()],
        [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in net.modules()],
    )


def assert_untouched(net, before):
    modes, parameters, buffers, attributes, hooks = snapshot(net)
    assert modes == before[0]
    for new, old in zip(parameters, before[1], strict=True):
        assert new[0] is old[0] and new[1:3] == old[1:3] and torch.equal(new[3], old[3])
    for new, old in zip(buffers, before[2], strict=True):
        assert new[0] is old[0] and torch.equal(new[1], old[1])
    assert attributes == before[3] and hooks == before[4]


def make_mixed():
    """Some submodules in eval mode, some parameters frozen, as fine-tuning has it."""
    net = make_net().train()
    net.layer2.eval()
    net.layer3[0].bn1.eval()
    net.conv1.weight.requires_grad_(requires_grad=False)
    return net


@pytest.mark.parametrize("mode", ["eval", "train"])
def test_model_is_left_as_found(mode):
    net, (x, y) = make_mixed(), make_images()
    before = snapshot(net)
    x.requires_grad_()
    kept = x.detach().clone()
    x_adv = pgd(net, x, y, steps=2, mode=mode, restarts=2, precision=BF16)
    assert_untouched(net, before)
    assert torch.equal(x, kept) and x.grad is None and not x_adv.requires_grad


@pytest.mark.parametrize("mode", ["eval", "train"])
@pytest.mark.parametrize("call", [0, 1])
def test_model_is_left_as_found_after_an_exception(mode, call):
    net, (x, y) = make_mixed(), make_images()
    before, calls = snapshot(net), []

    def loss(logits, y, target):
        calls.append(1)
        if len(calls) > call:
            raise KeyboardInterrupt
        return logits.sum(1)

    with pytest.raises(KeyboardInterrupt):
        pgd(net, x, y, loss=loss, mode=mode)
    assert_untouched(net, before)


def test_modes_during_the_attack():
    net, (x, y) = make_mixed(), make_images()
    seen = []
    net.layer3.register_forward_hook(lambda m, *_: seen.append([k.training for k in m.modules()]))
    pgd(net, x, y, steps=2)
    assert not any(map(any, seen))
    seen.clear()
    pgd(net, x, y, steps=2, mode="train")
    assert all(seen[-1]) and all(seen[-2])


def test_train_mode_normalises_by_the_batch():
    net, (x, y) = make_net(), make_images()
    net.train()
    expected = (x + 8 / 255 * input_gradient(net, x, y).sign()).clamp(0, 1)
    x_adv = pgd(net.eval(), x, y, 8, steps=1, random_start=False, mode="train")
    assert ((x_adv - expected).abs() < 1e-6).float().mean() > 0.99


@pytest.mark.parametrize("mode", ["eval", "train"])
def test_a_backward_pass_may_be_pending(mode):
    """Logits of the clean batch first, then the attack, then the step: NoFrost's order."""
    net, (x, y) = make_net().train(), make_images()
    loss = F.cross_entropy(net(x), y)
    pgd(net, x, y, steps=1, mode=mode)
    loss.backward()
    assert all(p.grad is not None for p in net.parameters())


def test_under_no_grad_and_inference_mode():
    net, (x, y) = make_net(), make_images()
    noise = unit_noise(x.shape)
    expected = pgd(net, x, y, steps=2, noise=noise)
    with torch.no_grad():
        assert torch.equal(pgd(net, x, y, steps=2, noise=noise), expected)
    with torch.inference_mode():
        x, y, noise = x.clone(), y.clone(), noise.clone()
        assert torch.equal(pgd(net, x, y, steps=2, noise=noise), expected)
    with torch.autocast("cpu", torch.bfloat16):  # precision None is fp32 even here
        assert torch.equal(pgd(net, x, y, steps=2, noise=noise), expected)


def test_wrappers_are_taken_off(tmp_path):
    net, (x, y) = make_net(), make_images()
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1
    )
    try:
        ddp = nn.parallel.DistributedDataParallel(net)
        compiled = torch.compile(ddp)
        for wrapped in (ddp, compiled, torch.compile(net), nn.DataParallel(net)):
            assert attacks.unwrap(wrapped) is net
        ddp.register_forward_hook(lambda *_: pytest.fail("the wrapper was called"))
        pgd(ddp, x, y, steps=1)
    finally:
        torch.distributed.destroy_process_group()


# --- precision and the prepared network -----------------------------------------------------------


@pytest.mark.parametrize("precision, dtype", [(BF16, torch.bfloat16), (FP16, torch.float16)])
def test_network_runs_in_low_precision_and_the_rest_in_fp32(precision, dtype):
    net, (x, y) = make_net(norm="gn"), make_images()
    inside, outside = set(), set()
    net.layer2.register_forward_hook(lambda m, args, out: inside.add(out.dtype))

    def loss(logits, y, target):
        outside.add(logits.dtype)
        return F.cross_entropy(logits, y, reduction="none")

    noise = unit_noise(x.shape)
    x_adv, stats = pgd(
        net, x, y, 8, steps=3, precision=precision, loss=loss, noise=noise, return_stats=True
    )
    assert dtype in inside and outside == {torch.float32}
    assert x_adv.dtype == torch.float32 and stats["zero_grad"] < 0.01
    exact = pgd(net, x, y, 8, steps=3, noise=noise)
    assert ((x_adv - exact).abs() < 1e-4).float().mean() > 0.75
    with torch.no_grad():
        low, full = (F.cross_entropy(net(images), y).item() for images in (x_adv, exact))
    assert low == pytest.approx(full, rel=0.05)


def test_fp16_gradients_are_scaled_out_of_underflow(monkeypatch):
    """At a confident prediction the gradient is 1e-9, zero in fp16: the attack would not move."""
    net = nn.Sequential(nn.Flatten(), nn.Linear(12, 3))
    with torch.no_grad():
        net[1].weight.normal_(0, 0.1)
        net[1].bias.copy_(torch.tensor([17.0, 0, 0]))
    x, y = torch.rand(5, 3, 2, 2), torch.zeros(5).long()
    share = {}
    for scale in (1.0, fastnet.FP16_SCALE):
        monkeypatch.setattr(fastnet, "FP16_SCALE", scale)
        share[scale] = pgd(net, x, y, precision=FP16, return_stats=True)[1]["zero_grad"]
    assert share[1.0] > 0.5 and share[256.0] < 0.1


def test_zero_gradients_are_counted():
    x, y = make_images()
    for norm in ("linf", "l2"):
        x_adv, stats = pgd(Dead(), x, y, norm=norm, random_start=False, return_stats=True)
        assert stats["zero_grad"] == 1 and torch.equal(x_adv, x)
        assert stats["loss"].item() == pytest.approx(torch.tensor(10.0).log().item())
    half = nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 10))
    with torch.no_grad():
        half[1].weight[:, : 3 * 16 * 32] = 0
    assert pgd(half, x, y, return_stats=True)[1]["zero_grad"] == 0.5


def test_nan_gradients_do_not_reach_the_images():
    class Broken(nn.Module):
        def forward(self, x):
            return torch.cat([x.flatten(1)[:, :2] * torch.nan, x.flatten(1)[:, 2:10]], 1)

    x, y = make_images()
    for norm in ("linf", "l2"):
        x_adv, stats = pgd(Broken(), x, y, norm=norm, steps=2, return_stats=True)
        assert x_adv.isfinite().all() and stats["zero_grad"] == 1


@pytest.mark.parametrize(
    "arch, norm, folds",
    [("resnet8", "bn", 7), ("wrn16-1", "bn", 6), ("vgg11", "bn", 8), ("resnet8", "none", 0)],
)
def test_batch_norm_folded_into_convolutions_is_the_same_function(arch, norm, folds):
    net, (x, _) = make_net(arch, norm), make_images()
    _, plan, layout = fastnet.probe(net, x[:1])
    assert layout == torch.channels_last
    assert sum(found is not None for found, _ in plan.values()) == folds
    with torch.no_grad():
        expected = net(x)
        with fastnet.patched(plan, torch.float32):
            assert torch.allclose(net(x), expected, rtol=1e-4, atol=1e-4)
            norms = [m for m in net.modules() if isinstance(m, nn.BatchNorm2d)]
            assert sum("forward" in vars(m) for m in norms) == folds
        assert torch.equal(net(x), expected)


class Odd(nn.Module):
    """BatchNorms that must not be folded: the convolution is used twice, or its output is."""

    def __init__(self, kind):
        super().__init__()
        self.kind = kind
        self.conv, self.bn = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)
        if kind == "hook":
            self.conv.register_forward_hook(lambda m, args, out: out * 2)

    def forward(self, x):
        out = self.conv(x)
        if self.kind == "shared":
            out = out + self.conv(x.flip(2))
            return self.bn(out).mean((2, 3))
        if self.kind == "skip":
            return (self.bn(out) + out).mean((2, 3))
        if self.kind == "method":
            return self.bn(out).mean((2, 3)) + out.amax((2, 3))
        if self.kind == "twice":
            return (self.bn(out) + self.bn(out.neg())).mean((2, 3))
        return self.bn(out).mean((2, 3))


@pytest.mark.parametrize("kind", ["shared", "skip", "method", "twice", "hook"])
def test_what_cannot_be_folded_is_not(kind):
    net, (x, _) = Odd(kind).eval(), make_images()
    net.bn.running_mean.normal_()
    _, plan, _ = fastnet.probe(net, x[:1])
    assert all(found is None for found, _ in plan.values())
    with torch.no_grad():
        expected = net(x)
        with fastnet.patched(plan, torch.float32):
            assert torch.allclose(net(x), expected, atol=1e-5)


def test_batch_norm_of_a_temporary_is_not_folded():
    """A tensor that lives shortly may have the id of one that comes after it."""

    class PreActivation(nn.Module):
        def __init__(self):
            super().__init__()
            self.norms = nn.ModuleList(nn.BatchNorm2d(3) for _ in range(20))
            self.convs = nn.ModuleList(nn.Conv2d(3, 3, 3, padding=1) for _ in range(20))

        def forward(self, x):
            for norm, conv in zip(self.norms, self.convs, strict=True):
                shifted = x + 1
                x = norm(shifted)
                del shifted
                x = conv(x)
            return x.mean((2, 3))

    net, (x, _) = PreActivation().eval(), make_images()
    _, plan, _ = fastnet.probe(net, x[:1])
    assert len(plan) == 20 and not any(norm for norm, _ in plan.values())


def test_networks_that_flatten_with_view():
    class Old(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.fc = nn.Conv2d(3, 8, 3), nn.Linear(8 * 30 * 30, 10)

        def forward(self, x):
            return self.fc(self.conv(x).view(x.size(0), -1))

    x, y = make_images()
    for images in (x, x.contiguous(memory_format=torch.channels_last)):
        x_adv = pgd(Old(), images, y, steps=2, precision=BF16)
        assert distance(x_adv, x, "linf").max() > 0


def test_vectors_can_be_attacked():
    x, y = torch.rand(7, 5), torch.randint(4, (7,))
    for norm in ("linf", "l2"):
        x_adv = pgd(nn.Linear(5, 4), x, y, 20, norm=norm, loss="dlr")
        assert distance(x_adv, x, norm).max().item() <= 20 / 255


def test_an_empty_batch_comes_back_empty():
    x, y = make_images()
    assert pgd(make_net(), x[:0], y[:0]).shape == (0, 3, 32, 32)


# --- wrong arguments ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "wrong, says",
    [
        ({"eps": 0}, "pixel units"),
        ({"eps": -1}, "pixel units"),
        ({"eps": 256}, "pixel units"),
        ({"eps": float("nan")}, "pixel units"),
        ({"eps": 1e6, "norm": "l2"}, "pixel units"),
        ({"alpha": 0}, "alpha"),
        ({"steps": 0}, "steps"),
        ({"steps": 2.5}, "steps"),
        ({"restarts": 0}, "restarts"),
        ({"restarts": 2, "random_start": False}, "random start"),
        ({"norm": "l1"}, "linf, l2"),
        ({"loss": "mse"}, "ce, cw, dlr"),
        ({"mode": "test"}, "eval, train"),
        ({"x": make_images()[0] * 255}, "within"),
        ({"x": make_images()[0] - 0.5}, "within"),
        ({"x": make_images()[0] * torch.nan}, "within"),
        ({"x": make_images()[0].mul(255).byte()}, "float32"),
        ({"x": make_images()[0].half()}, "float32"),
        ({"y": torch.full((6,), 10)}, "classes"),
        ({"y": torch.zeros(5).long()}, "one per image"),
        ({"y": torch.zeros(6)}, "one per image"),
        ({"target": torch.full((6,), -1)}, "classes"),
        ({"noise": torch.zeros(5, 3, 32, 32)}, "noise"),
        ({"model": nn.Sequential(nn.Flatten(), nn.Linear(3072, 2)), "loss": "dlr"}, "classes"),
    ],
    ids=str,
)
def test_wrong_arguments_are_one_line(wrong, says):
    x, y = make_images()
    settings = {"model": make_net(), "x": x, "y": y.clamp(max=1)} | wrong
    with pytest.raises(UserError, match=says) as error:
        pgd(**settings)
    assert "\n" not in str(error.value)


def test_a_model_without_gradient_is_refused():
    class Detached(nn.Module):
        def forward(self, x):
            return x.detach().flatten(1)[:, :10]

    with pytest.raises(UserError, match="detaches"):
        pgd(Detached(), *make_images())


# --- trained networks, other people's PGD ---------------------------------------------------------


@functools.cache
def cifar10_test(folder):
    with open(folder / "cifar-10-batches-py" / "test_batch", "rb") as file:
        batch = pickle.load(file, encoding="latin1")
    x = torch.from_numpy(batch["data"]).view(-1, 3, 32, 32).float() / 255
    return x, torch.tensor(batch["labels"])


@functools.cache
def third_party(shared, arch):
    """A ResNet trained by others (ImageNet's mean and std), on real CIFAR-10."""
    (file,) = (shared / "checkpoints").glob(f"{arch}-*.th")
    net = models.build(arch, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
    models.load_foreign(net, run.load_checkpoint(file, foreign=True))
    return net.eval()


def attack_all(attack, x, y, size=250):
    parts = [attack(x[i : i + size], y[i : i + size], i) for i in range(0, len(x), size)]
    return torch.cat(parts)


def accuracy(net, x, y):
    return 100 - run.evaluate(net, data.Images(x, y))["error"]


def ours(net, x, y, **settings):
    noise = unit_noise(x.shape, generator=run.generator(0))
    attack = functools.partial(pgd, net, **settings)
    return attack_all(lambda a, b, i: attack(a, b, noise=noise[i : i + len(a)]), x, y)


def test_iterations_and_restarts_weaken_a_trained_network(shared, cifar10_dir):
    x, y = (t[:100] for t in cifar10_test(cifar10_dir))
    net = third_party(shared, "resnet20")
    clean = accuracy(net, x, y)
    fgsm = accuracy(net, pgd(net, x, y, 1, steps=1, random_start=False, precision=BF16), y)
    pgd10 = accuracy(net, pgd(net, x, y, 1, steps=10, precision=BF16), y)
    assert clean > 85 and pgd10 <= fgsm < clean - 20


@pytest.mark.slow
@pytest.mark.parametrize("arch, eps", [("resnet20", 0.5), ("resnet20", 1.0), ("resnet56", 0.5)])
def test_bf16_gives_the_robust_accuracy_of_fp32(shared, cifar10_dir, arch, eps):
    """Within 0.3 points, from the same starts, judged in fp32."""
    x, y = (t[:2000] for t in cifar10_test(cifar10_dir))
    net = third_party(shared, arch)
    exact, low = (accuracy(net, ours(net, x, y, eps=eps, precision=p), y) for p in (None, BF16))
    print(f"{arch} eps {eps}: fp32 {exact:.2f}, bf16 {low:.2f}")
    assert abs(exact - low) <= 0.3


@pytest.mark.slow
@pytest.mark.parametrize("library", ["torchattacks", "foolbox"])
@pytest.mark.parametrize("arch, eps", [("resnet20", 0.5), ("resnet56", 0.5)])
def test_agrees_with_other_libraries(shared, cifar10_dir, library, arch, eps):
    """Within 0.5 points of robust accuracy: same images, steps and alpha."""
    oracle = pytest.importorskip(library)
    x, y = (t[:1000] for t in cifar10_test(cifar10_dir))
    net, alpha = third_party(shared, arch), attacks.default_alpha(eps, 10) / 255
    if library == "torchattacks":
        theirs = oracle.PGD(net, eps=eps / 255, alpha=alpha, steps=10, random_start=True)
    else:
        other = oracle.attacks.LinfPGD(abs_stepsize=alpha, steps=10, random_start=True)
        wrapped = oracle.PyTorchModel(net, bounds=(0, 1), device="cpu")

        def theirs(x, y):
            return other(wrapped, x, y, epsilons=eps / 255)[1]

    found = accuracy(net, ours(net, x, y, eps=eps, precision=BF16), y)
    expected = accuracy(net, attack_all(lambda a, b, i: theirs(a, b), x, y), y)
    print(f"{library} {arch} eps {eps}: theirs {expected:.2f}, ours {found:.2f}")
    assert abs(found - expected) <= 0.5


def test_speed_compares_with_what_is_installed(capsys):
    spec = importlib.util.spec_from_file_location("eval_speed", run.ROOT / "eval" / "speed.py")
    speed = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(speed)
    options = ["attacks", "--arch", "resnet8", "--batch-size", "4", "--steps", "1", "--repeat", "1"]
    threads = torch.get_num_threads()
    try:
        times = speed.main(speed.parse_args(options))["attacks"]
    finally:
        torch.set_num_threads(threads)
    assert {"pgd fp32", "written out fp32"} <= times.keys() and min(times.values()) > 0
    text = capsys.readouterr().out
    assert all(name in text for name in times)
