"""What makes attacks fast: any kind of network, folding by value, graphs that are kept."""

import contextlib
import gc

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from common import attacks, models, run
from common.attacks import fastnet, pgd
from common.run import UserError


def images(n=4, size=32):
    g = torch.Generator().manual_seed(0)
    return torch.rand(n, 3, size, size, generator=g), torch.arange(n)


def with_statistics(norm, arch="resnet8"):
    torch.manual_seed(0)
    net = models.build(arch, norm)
    for module in net.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.running_mean.normal_(0, 0.3)
            module.running_var.uniform_(0.3, 2)
    return net.eval()


# --- any network ----------------------------------------------------------------------------------


def outputs(net):
    """The same logits as a tuple, a list, a dict and from a plain function."""

    class As(nn.Module):
        def __init__(self, form):
            super().__init__()
            self.net, self.form = net, form

        def forward(self, x):
            return self.form(self.net(x))

    forms = {
        "tuple": lambda z: (z, z.sum()),
        "list": lambda z: [z],
        "dict": lambda z: {"loss": 0.0, "logits": z},
    }
    return {name: As(form) for name, form in forms.items()} | {"function": lambda x: net(x)}


@pytest.mark.parametrize("form", ["tuple", "list", "dict", "function"])
def test_outputs_of_other_make(form):
    """Tuples, dicts and plain functions give the images of the plain network."""
    net, (x, y) = with_statistics("none"), images()
    model, start = outputs(net)[form], attacks.unit_noise(x.shape)
    expected = pgd(net, x, y, steps=2, noise=start)
    assert torch.equal(pgd(model, x, y, steps=2, noise=start), expected)
    for name in ("apgd-ce-3", "square-5", "pgd-2", "fab-t-2"):
        a, b = (attacks.attack(m, x, y, name, 2) for m in (net, model))
        assert torch.equal(a[0], b[0]) and torch.equal(a[1], b[1])


@pytest.mark.parametrize("kind", [torch.int32, torch.uint8, torch.int16])
def test_labels_of_any_integer_type(kind):
    net, (x, y) = with_statistics("none"), images()
    start = attacks.unit_noise(x.shape)
    for loss in ("ce", "cw", "dlr"):
        expected = pgd(net, x, y, steps=2, noise=start, loss=loss)
        assert torch.equal(pgd(net, x, y.to(kind), steps=2, noise=start, loss=loss), expected)
        target = (y + 1) % 10
        expected = pgd(net, x, y, steps=2, noise=start, loss=loss, target=target)
        found = pgd(net, x, y.to(kind), steps=2, noise=start, loss=loss, target=target.to(kind))
        assert torch.equal(found, expected)
    expected = attacks.attack(net, x, y, "apgd-t-2")[0]
    assert torch.equal(attacks.attack(net, x, y.to(kind), "apgd-t-2")[0], expected)


@pytest.mark.parametrize(
    "model, says",
    [
        (lambda x: x, r"returned \(1, 3, 32, 32\) where logits"),
        (lambda x: {"features": x}, "returned NoneType where logits"),
        (lambda x: None, "returned NoneType"),
        ("resnet", "str is no model"),
    ],
)
def test_what_is_no_model_is_told_in_one_line(model, says):
    for call in (pgd, lambda *a: attacks.attack(*a, "apgd-ce-2")):
        with pytest.raises(UserError, match=says) as error:
            call(model, *images())
        assert "\n" not in str(error.value)


# --- folding --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "norm, folds", [("bn", 7), ("noisy-bn", 7), ("bn-population", 7), ("dual-bn", 7), ("gn", 0)]
)
def test_every_norm_that_is_batch_norm_in_eval_mode_is_folded(norm, folds):
    net, (x, _) = with_statistics(norm), images()
    expected = net(x)
    with fastnet.prepared(net, x) as fast:
        assert sum(found is not None for found, _ in fast.plan.values()) == folds
        torch.testing.assert_close(fast(x), expected, rtol=1e-4, atol=1e-4)


def test_synchronised_batch_norm_is_folded():
    """As it is under torchrun: a class whose eval forward is BatchNorm's."""
    net, (x, _) = with_statistics("bn"), images()
    assert any(type(module) is models.BatchNorm for module in net.modules())
    with fastnet.prepared(net, x) as fast:
        assert sum(found is not None for found, _ in fast.plan.values()) == 7


@pytest.mark.parametrize("norm", ["bn", "dual-bn"])
def test_norms_that_no_convolution_takes_in(norm):
    """As on a GPU: x * scale + shift in their place gives the same logits and gradient, whose
    layout stays, and follows the weights of the network after `refresh`."""
    net, (x, _) = with_statistics(norm, "wrn10-1"), images()
    x = x.contiguous(memory_format=torch.channels_last)
    _, plan, _ = fastnet.probe(net, x[:1])
    norms = fastnet.loose(net, plan)
    folded = sum(n is not None for n, _ in plan.values())
    used = 7 if norm == "bn" else 14  # BatchNorms of WRN-10-1
    assert len(norms) == used - folded > 0

    def look():
        inputs = x.clone().requires_grad_()
        logits = net(inputs)
        return logits.detach(), torch.autograd.grad(logits.square().sum(), inputs)[0]

    for weights in (None, 1.3):
        plain = look()
        with fastnet.as_affine(norms, torch.float32) as refresh:
            for a, b in zip(look(), plain, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
            if weights is None:
                for module in norms:
                    module.weight.data.mul_(1.3)
                refresh()
                changed = look()
        if weights is None:
            torch.testing.assert_close(changed[0], look()[0], rtol=1e-4, atol=1e-5)
    assert not any("forward" in vars(module) for module in net.modules())
    probe = torch.rand(2, 16, 8, 8).contiguous(memory_format=torch.channels_last).requires_grad_()
    with fastnet.as_affine(norms, torch.float32):
        module = next(m for m in norms if m.num_features == 16)
        (grad,) = torch.autograd.grad(module(probe).square().sum(), probe)
    assert grad.is_contiguous(memory_format=torch.channels_last)


def test_a_norm_with_an_eval_of_its_own_is_not_folded():
    class Louder(nn.BatchNorm2d):
        def forward(self, x):
            return 2 * super().forward(x)

    net = nn.Sequential(nn.Conv2d(3, 8, 3), Louder(8), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    net.eval()
    x, _ = images()
    expected = net(x)
    with fastnet.prepared(net, x) as fast:
        assert [norm for norm, _ in fast.plan.values()] == [None]
        torch.testing.assert_close(fast(x), expected)


def test_standardised_convolutions_are_standardised_once(monkeypatch):
    """A norm-free network, and its first convolution reads the images in fp32 (gpu.md, W5)."""
    torch.manual_seed(0)
    net, (x, y) = models.build("resnet8", "nf").eval(), images()
    expected = net(x)
    count, original = [], models.ScaledStdConv2d.standardized
    monkeypatch.setattr(
        models.ScaledStdConv2d, "standardized", lambda self: count.append(self) or original(self)
    )
    layers = sum(isinstance(m, models.ScaledStdConv2d) for m in net.modules())
    pgd(net, x, y, steps=5)
    assert len(count) == 2 * layers  # the probe, and once for the attack
    first = next(m for m in net.modules() if isinstance(m, models.ScaledStdConv2d))
    seen = []
    real = F.conv2d
    monkeypatch.setattr(
        F, "conv2d", lambda x, w, *a: seen.append((w.shape[1], x.dtype)) or real(x, w, *a)
    )
    with fastnet.prepared(net, x, run.Precision("bf16")) as fast:
        seen.clear()
        low = fast(x)
    assert {dtype for channels, dtype in seen if channels == 3} == {torch.float32}
    assert {dtype for channels, dtype in seen if channels > 3} == {torch.bfloat16}
    assert first.in_channels == 3
    torch.testing.assert_close(low, expected, rtol=0.1, atol=0.1)


# --- a random network -----------------------------------------------------------------------------


def test_eot_attacks_the_mean_of_many_passes():
    class Noisy(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc, self.calls = nn.Linear(12, 4), 0

        def forward(self, x):
            self.calls += 1
            return self.fc(x.flatten(1)) + torch.randn(len(x), 4)

    torch.manual_seed(0)
    net, x = Noisy(), torch.rand(5, 3, 2, 2)
    one, many = [], []
    for _ in range(40):
        for eot, kept in ((1, one), (16, many)):
            with fastnet.prepared(net, x, eot=eot) as fast:
                kept.append(fast(x).detach())
    ratio = torch.stack(one).std(0).mean() / torch.stack(many).std(0).mean()
    assert 3.2 < ratio < 4.8  # the square root of 16
    net.calls = 0
    pgd(net, x, torch.arange(5) % 4, steps=3, eot=8)
    assert net.calls == 1 + 3 * 8
    _, _, facts = attacks.attack(net, x, torch.arange(5) % 4, "pgd-3", eot=8)
    assert facts["forward"] == facts["backward"] == 5 * 3 * 8


# --- graphs ---------------------------------------------------------------------------------------


@pytest.fixture
def recorded(monkeypatch):
    """CUDA graphs pretended on a CPU: what was recorded runs again."""
    made, streams = [], []

    def record(function, stream):
        made.append(function)
        streams.append(stream)
        pairs = zip(streams[::2], streams[1::2], strict=False)
        assert all(forward is backward for forward, backward in pairs)  # autograd wants it
        replay = torch.enable_grad()(function)
        replay()
        return replay

    monkeypatch.setattr(fastnet, "record", record)
    monkeypatch.setattr(torch.cuda, "Stream", object)
    return made


def captured(graphs, net, x):
    with attacks.frozen(net) as module:
        return graphs.get(module, x, contextlib.nullcontext, torch.float32)


def test_captured_passes_give_logits_and_gradients(recorded):
    """After the weights changed too: the same graph, with the present weights."""
    net, (x, y) = with_statistics("bn"), images()
    graphs = attacks.Graphs()
    for change in (0, 0.1):
        with torch.no_grad():
            net.conv1.weight += change
            net.fc.bias += change
        a = x.clone().requires_grad_()
        expected = net(a)
        (gradient,) = torch.autograd.grad(F.cross_entropy(expected, y), a)
        fast = captured(graphs, net, x)
        b = (x + 0).requires_grad_()
        logits = fast(b)
        (found,) = torch.autograd.grad(F.cross_entropy(logits, y), b)
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(found, gradient, rtol=1e-3, atol=1e-5)
    assert len(recorded) == 2  # one capture of two passes


def test_graphs_know_the_state_of_the_network_and_stay_few(recorded):
    """The statistics in use of dual-bn belong to the key; no more than `most` are kept."""
    net, (x, _) = with_statistics("dual-bn"), images()
    graphs = attacks.Graphs(most=2)
    for statistics in ("adversarial", "clean"):
        models.use_statistics(net, statistics)
        torch.testing.assert_close(captured(graphs, net, x)(x), net(x), rtol=1e-4, atol=1e-4)
    assert len(recorded) == 4 and len(graphs.kept) == 2
    models.use_statistics(net, "adversarial")
    captured(graphs, net, x)
    assert len(recorded) == 4  # found again
    for n in (1, 2, 3):
        captured(graphs, net, x[:n])
        assert len(graphs.kept) == 2


def test_graphs_know_the_classes_of_the_modules(recorded):
    """A module that became another kind of module is another network."""
    net, (x, _) = with_statistics("bn"), images()
    graphs = attacks.Graphs()
    captured(graphs, net, x)

    class Negative(torch.nn.Linear):
        def forward(self, h):
            return -super().forward(h)

    net.fc.__class__ = Negative
    torch.testing.assert_close(captured(graphs, net, x)(x), net(x), rtol=1e-4, atol=1e-4)
    assert len(recorded) == 4


def test_capture_watches_this_thread_alone(monkeypatch):
    """A loader's thread that pins memory must not break a capture (gpu.md, B2)."""
    options = []

    @contextlib.contextmanager
    def graph(*args, **kwargs):
        options.append(kwargs)
        yield

    class Fake:
        def wait_stream(self, other):
            pass

        def replay(self):
            pass

    entered = []
    monkeypatch.setattr(torch.cuda, "current_stream", Fake)
    monkeypatch.setattr(
        torch.cuda, "stream", lambda s: entered.append(s) or contextlib.nullcontext()
    )
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Fake)
    monkeypatch.setattr(torch.cuda, "graph", graph)
    calls = []
    side = Fake()
    fastnet.record(lambda: calls.append(1), side)()
    assert options == [{"stream": side, "capture_error_mode": "thread_local"}]
    assert len(calls) == 2 and entered == [side]


def test_a_failed_capture_is_one_line(monkeypatch):
    @contextlib.contextmanager
    def graph(*args, **kwargs):
        yield
        raise RuntimeError("CUDA error: operation not permitted\nmore lines")

    Fake = type("Fake", (), {"wait_stream": lambda self, other: None})
    monkeypatch.setattr(torch.cuda, "current_stream", Fake)
    monkeypatch.setattr(torch.cuda, "stream", lambda s: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Fake)
    monkeypatch.setattr(torch.cuda, "graph", graph)
    with pytest.raises(run.UserError, match=r"not permitted\): use --no-capture"):
        fastnet.record(lambda: None, Fake())


def test_a_network_is_looked_at_once(monkeypatch):
    """Its look is kept while it is as it was; a network that is gone leaves nothing behind."""
    looks = []
    look = fastnet.look
    monkeypatch.setattr(fastnet, "look", lambda *args: looks.append(1) or look(*args))
    net, x = models.build("resnet8", "dual-bn").eval(), torch.rand(2, 3, 32, 32)
    gc.collect()
    before = len(fastnet.SEEN)
    for _ in range(3):
        fastnet.probe(net, x[:1])
    assert len(looks) == 1
    models.use_statistics(net, "clean")
    _, plan, _ = fastnet.probe(net, x[:1])
    assert len(looks) == 2 and all(norm is not None for norm, _ in plan.values())
    net.fc = torch.nn.Linear(net.fc.in_features, 3)
    assert fastnet.probe(net, x[:1])[0] == 3 and len(looks) == 3
    fastnet.probe(net, x[:1, :, :16, :16])
    assert len(looks) == 4
    net.bn1.clean.running_mean = net.bn1.clean.running_var = None  # from now on of the batch
    assert all(norm is not net.bn1.clean for norm, _ in fastnet.probe(net, x[:1])[1].values())
    assert len(looks) == 5
    handle = net.fc.register_forward_hook(lambda *args: None)  # who knows what a hook does
    fastnet.probe(net, x[:1])
    fastnet.probe(net, x[:1])
    assert len(looks) == 7
    handle.remove()
    del net, plan
    gc.collect()
    assert len(fastnet.SEEN) == before
