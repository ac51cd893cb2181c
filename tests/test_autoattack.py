"""The evaluation attacks: as published, inside the ball, stronger than PGD, repeatable."""

import copy
import functools
import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from common import attacks, data, models, run
from common.attacks import attack, distance, parse
from common.attacks.apgd import checkpoints
from common.attacks.autoattack import nearest_classes, towards_each
from common.attacks.fab import nearest
from common.attacks.square import bumps, pyramid, side
from common.data import shapes
from common.run import UserError

BF16 = run.Precision("bf16")
QUICK = [
    "fgsm",
    "bim-3",
    "pgd-3",
    "mim-3",
    "cw-3",
    "apgd-ce-8",
    "apgd-dlr-8",
    "apgd-t-4",
    "fab-t-4",
]


class Small(nn.Module):
    """Three convolutions, enough to learn something of the drawn shapes."""

    def __init__(self, classes=10):
        super().__init__()
        self.norm = models.Normalize((0.5,) * 3, (0.25,) * 3)
        widths = [3, 12, 24, 24]
        pairs = list(itertools.pairwise(widths))
        self.convs = nn.ModuleList(nn.Conv2d(a, b, 3, 2, 1, bias=False) for a, b in pairs)
        self.bns = nn.ModuleList(nn.BatchNorm2d(b) for _, b in pairs)
        self.fc = nn.Linear(24, classes)

    def forward(self, x):
        x = self.norm(x)
        for conv, bn in zip(self.convs, self.bns, strict=True):
            x = F.relu(bn(conv(x)))
        return self.fc(x.mean((2, 3)))


@functools.cache
def trained():
    """(network, images, labels): trained for two seconds on 256 images, 64 of these."""
    torch.manual_seed(0)
    net = Small()
    x, y = shapes.make(256, seed=0, split="train")
    x = x.float() / 255
    optimizer = torch.optim.Adam(net.parameters(), 1e-2)
    for step in range(150):
        rows = torch.randperm(256, generator=run.generator(step))[:128]
        optimizer.zero_grad()
        F.cross_entropy(net(x[rows]), y[rows]).backward()
        optimizer.step()
    return net.eval(), x[:64], y[:64]


def linear(classes=4, size=6, seed=0, scale=1.0):
    """A linear classifier of 3 x size x size images, and images well inside the box."""
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Flatten(), nn.Linear(3 * size * size, classes))
    x = torch.rand(5, 3, size, size) * 0.4 + 0.3
    return net, x, net(x).argmax(1)


class Counter(nn.Module):
    """Notes how many images each pass of the network had."""

    def __init__(self, net):
        super().__init__()
        self.net, self.rows = net, []

    def forward(self, x):
        self.rows.append(len(x))
        return self.net(x)


# --- as published ---------------------------------------------------------------------------------


def test_checkpoints_as_published():
    """p_j of section 3.1: 0, .22, .41, .57, .70, .80, .87, .93, .99."""
    assert checkpoints(100) == [22, 41, 57, 70, 80, 87, 93, 99]
    assert checkpoints(1000) == [220, 410, 570, 700, 800, 870, 930, 990]
    assert checkpoints(20) == [5, 9, 12, 14, 16, 18, 19, 20]  # ceilings


def test_step_size_is_halved_when_the_loss_stops_rising():
    """A loss with a gradient and no change: condition 1 holds at w_1, w_2, ..., and the attack
    goes on from its first point with half the step and the gradient it had there."""
    points, calls = [], [0]

    class Flat(nn.Module):
        def forward(self, x):
            points.append(x.detach().clone())
            calls[0] += 1
            pull = x.flatten(1).sum(1, keepdim=True) * (-1) ** calls[0]
            flat = pull - pull.detach()
            return torch.cat([flat + 1, -flat, -flat - 1, -flat - 2], 1)

    x = torch.full((1, 3, 2, 2), 0.5)
    attack(Flat(), x, torch.tensor([0]), "apgd-ce", eps=64)
    points = torch.cat(points)[1:-1]  # without the probe and the check: x_0 ... x_100
    assert len(points) == 101
    starts = [w for w in checkpoints(100) if w < 99]
    eps, start = 64 / 255, points[0]
    for k, w in enumerate(starts, 1):
        # After w_k: from x_0 by the momentum of eq. 1, 0.75 of the step 2 eps / 2^k and 0.25 of
        # the way from x_(w-1).
        z = (start + (points[1] - start).sign() * 2 * eps / 2**k).clamp(0.5 - eps, 0.5 + eps)
        expected = start + 0.75 * (z - start) + 0.25 * (start - points[w - 1])
        torch.testing.assert_close(points[w + 1], expected.clamp(0.5 - eps, 0.5 + eps))


def test_dlr_by_hand():
    z = torch.tensor([[5.0, 1.0, 3.0, 2.0, 0.0]])
    y, t = torch.tensor([0]), torch.tensor([3])
    assert attacks.dlr_loss(z, y).item() == pytest.approx(-(5 - 3) / (5 - 2))
    assert attacks.dlr_loss(z, torch.tensor([2])).item() == pytest.approx((5 - 3) / (5 - 2))
    assert attacks.dlr_loss(z, y, t).item() == pytest.approx((2 - 5) / (5 - (2 + 1) / 2))


def test_square_side_as_published():
    """p 0.8, halved after 10, 50, 200, 500, 1000, 2000 and 4000 queries, on 32 x 32 pixels."""
    queries = (0, 10, 11, 50, 51, 201, 501, 1001, 2001, 4001)
    sides = [side(q, 32, 32, "linf") for q in queries]
    expected = [0.8, 0.8, 0.4, 0.4, 0.2, 0.1, 0.05, 0.025, 0.0125, 0.00625]
    assert sides == [round((p * 1024) ** 0.5) for p in expected]
    assert all(side(q, 32, 32, "l2") % 2 for q in queries)
    assert side(4999, 32, 32, "l2") == 3
    assert side(0, 4, 9, "linf") == 4


@pytest.mark.parametrize("s", [3, 5, 8])
def test_bumps_by_definition(s):
    """eta of the Square paper: sums of 1/j^2 over nested rectangles, one up, one down."""
    eta = bumps(s)
    assert eta.shape == (2, s, s) and torch.equal(eta[0].T, eta[1])
    assert eta[0].norm().item() == pytest.approx(1, abs=1e-6)
    assert (eta[0][: s // 2] > 0).all() and (eta[0][s // 2 :] < 0).all()
    bump = pyramid(5, 5)
    assert bump[2, 2].item() == pytest.approx(1 + 1 / 4 + 1 / 9)
    assert bump[0, 4].item() == pytest.approx(1 / 9)


# --- the nearest point and FAB --------------------------------------------------------------------


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_nearest_is_the_projection(norm):
    """Onto the plane, within the box; compared with bisection on the step length in fp64."""
    g = torch.Generator().manual_seed(1)
    p = torch.rand(40, 60, generator=g)
    p[:, ::7] = 0.0
    w = torch.randn(40, 60, generator=g)
    w[:, 3] = 0
    value = torch.randn(40, generator=g) * torch.logspace(-3, 2, 40)
    d = nearest(p, w, value, norm)
    assert (p + d >= -1e-6).all() and (p + d <= 1 + 1e-6).all()
    w, p, value = w.double(), p.double(), value.double()
    u = torch.where(value[:, None] > 0, -w, w)
    room = torch.where(u > 0, 1 - p, p)
    speed = torch.ones_like(u) if norm == "linf" else u.abs()
    feasible = (u.abs() * room).sum(1) > value.abs()
    assert 20 < feasible.sum() < 40
    low, high = torch.zeros(40, 1).double(), torch.full((40, 1), 1e6).double()
    for _ in range(200):
        t = (low + high) / 2
        enough = (u.abs() * torch.minimum(t * speed, room)).sum(1, keepdim=True) >= value.abs()[
            :, None
        ]
        low, high = torch.where(enough, low, t), torch.where(enough, t, high)
    expected = u.sign() * torch.minimum(high * speed, room)
    torch.testing.assert_close(d[feasible].double(), expected[feasible], atol=2e-5, rtol=1e-4)
    reached = ((w * d.double()).sum(1) + value)[feasible]
    assert reached.abs().max() < 1e-4
    full = u.sign() * room
    torch.testing.assert_close(d[~feasible].double(), full[~feasible], atol=1e-6, rtol=0)


@pytest.mark.parametrize("norm, dual", [("linf", 1), ("l2", 2)])
def test_fab_finds_the_closed_form_distance(norm, dual):
    """Of a linear classifier: min over t of |(w_t - w_y).x + b_t - b_y| / ||w_t - w_y||_dual."""
    net, x, y = linear()
    with torch.no_grad():
        z, w = net(x), net[1].weight
    exact = torch.full((len(x),), torch.inf)
    for t in range(4):
        gap = (z.gather(1, y[:, None])[:, 0] - z[:, t]) / (w[t] - w[y]).norm(dual, dim=1)
        exact = torch.where(y == t, exact, torch.minimum(exact, gap))
    found = torch.full((len(x),), torch.inf)
    with attacks.victim(net, x) as victim:
        order = attacks.without(victim.logits(x), y).topk(3, 1).indices
        for k in range(3):
            adv, size = attacks.fab(victim, x, y, None, norm, 30, order[:, k])
            near = distance(adv, x, norm)
            assert torch.equal(near[size.isfinite()], size[size.isfinite()])
            assert ((net(adv).argmax(1) != y) == size.isfinite()).all()
            found = torch.minimum(found, size.float())
    assert (found >= exact * (1 - 1e-4)).all()
    assert (found <= exact * 1.01).all()


def test_every_attack_agrees_with_the_exact_radius():
    """A linear classifier, two classes of which compete, falls just above its distance and not
    just below, whatever the attack."""
    net, x, _ = linear(seed=3)
    with torch.no_grad():
        z, w = net(x), net[1].weight
        net[1].bias[0] += (z[:, 1] - z[:, 0]).median()
        net[1].bias[2:] = -5
        z = net(x)
    radius = 255 * (z[:, 0] - z[:, 1]).abs() / (w[0] - w[1]).norm(1)
    clear = radius > 0.5  # CLEAR, of a largest logit of 5, is not small beside nearer ones
    x, y, radius = x[clear], z.argmax(1)[clear], radius[clear]
    assert y.unique().tolist() == [0, 1]
    for name in ("bim-40", "pgd-40", "cw-40", "mim", "apgd-ce", "apgd-dlr", "apgd-t", "fab-t-40"):
        for i in range(len(x)):
            one, r = (x[i : i + 1], y[i : i + 1], name), radius[i].item()
            assert attack(net, *one, eps=1.02 * r, alpha=r / 10)[1].item(), name
            assert not attack(net, *one, eps=0.98 * r, alpha=r / 10)[1].item(), name


# --- on a trained network -------------------------------------------------------------------------


def test_the_network_is_trained():
    net, x, y = trained()
    assert (net(x).argmax(1) == y).all()


@pytest.mark.parametrize("precision", [None, BF16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("norm, eps", [("linf", 0.5), ("linf", 8), ("l2", 40)])
def test_inside_ball_and_box_to_the_last_ulp(norm, eps, precision):
    net, x, y = trained()
    x, y = x[:12], y[:12]
    x = torch.where(x < 0.2, 0.0, x)  # some pixels at the edge of the box
    for name in [*QUICK, "square-30"]:
        adv, fooled, _ = attack(net, x, y, name, eps, norm, precision=precision)
        assert adv.dtype == torch.float32 and adv.shape == x.shape
        assert distance(adv, x, norm).max().item() <= eps / 255, name
        assert adv.min() >= 0 and adv.max() <= 1
        wrong = net(adv).argmax(1) != y
        assert (wrong | ~fooled).all() and (wrong == fooled).float().mean() > 0.9


def robust(name, eps, norm="linf", **options):
    net, x, y = trained()
    return 100 * (~attack(net, x, y, name, eps, norm, **options)[1]).double().mean().item()


@pytest.mark.parametrize("norm, eps", [("linf", 1.2), ("l2", 30)])
def test_no_weaker_than_pgd(norm, eps):
    """Where PGD leaves between a tenth and nine tenths; one image of 64 is 1.6 points."""
    pgd = robust("pgd-40", eps, norm)
    assert 10 < pgd < 90
    for name in ("apgd-ce-40", "apgd-dlr-40", "apgd-t-30", "fab-t-30"):
        assert robust(name, eps, norm) <= pgd + 1.6, name
    assert robust("mim-10", eps, norm) < 100 and robust("cw-40", eps, norm) <= pgd + 1.6
    assert pgd <= robust("square-200", 6 * eps, norm) < 99  # without gradients


def test_bf16_agrees_with_fp32():
    for name in ("apgd-ce-20", "square-100"):
        assert abs(robust(name, 1.2, precision=BF16) - robust(name, 1.2)) <= 3.2


def test_model_is_left_as_it_was():
    net, x, y = trained()
    net = copy.deepcopy(net).train()
    state = copy.deepcopy(net.state_dict())
    for name in ("apgd-ce-3", "fab-t-2", "square-5", "pgd-2"):
        attack(net, x[:4], y[:4], name)
    assert net.training and all(p.requires_grad and p.grad is None for p in net.parameters())
    assert all(torch.equal(v, state[k]) for k, v in net.state_dict().items())
    assert not any("forward" in vars(m) for m in net.modules())


# --- repeatable -----------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_seed_decides_and_the_batch_does_not(norm):
    """Same seed, same images; an image attacked alone gets the same random numbers."""
    net, x, y = trained()
    x, y = x[:6], y[:6]
    for name in ("pgd-3", "apgd-ce-5", "apgd-t-3", "square-20"):
        a, fooled, _ = attack(net, x, y, name, 1, norm)
        torch.manual_seed(5)
        assert torch.equal(a, attack(net, x, y, name, 1, norm)[0]), name
        assert not torch.equal(a, attack(net, x, y, name, 1, norm, seed=1)[0]), name
        index = torch.tensor([4, 5])
        b, alone, _ = attack(net, x[4:], y[4:], name, 1, norm, index=index)
        assert torch.equal(fooled[4:], alone)
        same = (a[4:] - b).abs() < 1e-5
        assert same.float().mean() > 0.99, name  # but for signs of gradients near zero


def test_memory_formats_and_dtypes():
    """channels_last, uint8, fp64 and half-precision images and networks give the same result."""
    net, x, y = trained()
    x8 = (x[:8] * 255).round().to(torch.uint8)
    x, y = x8.float() / 255, y[:8]
    for name in ("apgd-ce-5", "fab-t-3", "square-20", "pgd-3"):
        expected = attack(net, x, y, name, 1)[0]
        same = functools.partial(torch.testing.assert_close, atol=1e-6, rtol=0)
        same(attack(net, x.contiguous(memory_format=torch.channels_last), y, name, 1)[0], expected)
        same(
            attack(copy.deepcopy(net).to(memory_format=torch.channels_last), x, y, name, 1)[0],
            expected,
        )
        same(attack(net, x8, y, name, 1)[0], expected)
        same(attack(net, x.double(), y, name, 1)[0], expected)
        same(attack(copy.deepcopy(net).double(), x, y, name, 1)[0], expected)
        half = copy.deepcopy(net).bfloat16()
        adv, fooled, _ = attack(half, x, y, name, 1)
        assert ((half.float()(adv).argmax(1) != y) | ~fooled).all()


# --- counts ---------------------------------------------------------------------------------------


def test_square_asks_as_often_as_it_may():
    """An image that stands gets its queries, no more; the fooled ones are asked no further."""
    net, x, y = linear()
    for eps, queries, expected in ((1e-3, 40, 5 * 40), (255, 40, None)):
        counter = Counter(net)
        _, fooled, _ = attack(counter, x, y, f"square-{queries}", eps)
        asked = sum(counter.rows) - 1 - len(x)  # the probe with one image, the check in fp32
        if expected:
            assert not fooled.any() and asked == expected
        else:
            assert fooled.all() and asked < 5 * queries


def test_apgd_leaves_what_it_has_fooled():
    net, x, y = trained()
    counter = Counter(net)
    _, fooled, _ = attack(counter, x, y, "apgd-ce-20", 1.2)
    full = len(x) * 21
    assert fooled.any() and sum(counter.rows) < 0.9 * full + 1 + len(x)


@pytest.mark.parametrize("classes, targets", [(4, 3), (10, 9), (14, 9)])
def test_targets_by_the_number_of_logits(classes, targets):
    """K - 1 target classes below 10, else 9; the likeliest first, never the label."""
    net, x, y = linear(classes)
    seen = []

    def attempt(rows, target, k, tick):
        seen.append(target.clone())
        return x[rows], torch.zeros(len(rows), dtype=torch.bool)

    with attacks.victim(net, x) as victim:
        towards_each(victim, x, y, attempt)
    order = net(x).argsort(1, descending=True)
    assert torch.equal(torch.stack(seen, 1), order[:, 1 : targets + 1])


@pytest.mark.parametrize("name", [*QUICK, "apgd-ce-3"])
def test_zero_gradients_are_counted(name):
    """Images, each once, whatever the number of targets: 2 of 5 here, none of a trained network."""

    class Half(nn.Module):
        """Logits of a linear classifier, without a gradient where the first pixel is dark."""

        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.fc = nn.Linear(192, 10)

        def forward(self, x):
            out, dark = self.fc(x.flatten(1)), x[:, 0, 0, 0] < 0.5
            return torch.where(dark[:, None], out.detach() + 0 * out, out)

    net, x = Half(), torch.rand(5, 3, 8, 8)
    x[:, 0, 0, 0] = torch.tensor([0.1, 0.9, 0.1, 0.9, 0.9])
    y = net(x).argmax(1)
    adv, _, facts = attack(net, x, y, name)
    assert facts["zero"] == 2 and adv.isfinite().all()
    assert attack(trained()[0], *(v[:3] for v in trained()[1:]), name)[2]["zero"] == 0


@pytest.mark.parametrize("name", [*QUICK[:-1], "square-30"])  # FAB's first point lies too far
def test_logits_that_are_nan_are_no_robustness(name):
    """A network that overflows as soon as it leaves the clean image classifies nothing there."""
    x = torch.rand(4, 3, 8, 8) * 0.5 + 0.2
    weights = torch.linspace(0.5, 1, 192)
    sums = x.flatten(1) @ weights

    class Fragile(nn.Module):
        def forward(self, x):
            inputs = x.flatten(1)
            out = torch.cat([inputs[:, :1] * 0.01 + 5, inputs[:, 1:6]], 1)
            clean = ((inputs @ weights)[:, None] - sums).abs().amin(1) < 1e-4
            return torch.where(clean[:, None], out, torch.full_like(out, torch.nan))

    y = torch.zeros(4).long()
    assert (attacks.judge(Fragile(), x, y)[0] <= 0).all()
    _, fooled, facts = attack(Fragile(), x, y, name)
    assert fooled.all() and facts["broken"] == 4


def test_infinite_logits_decide():
    logits = torch.tensor([[1.0, torch.inf], [torch.inf, 1.0], [torch.inf, torch.inf]])
    lead, scale = attacks.lead_of_wrong(logits, torch.zeros(3).long())
    assert lead.tolist() == [torch.inf, -torch.inf, torch.inf] and scale.tolist() == [0, 0, 0]


def test_alpha_is_not_of_fgsm():
    net, x, y = trained()
    plain, given = (attack(net, x[:8], y[:8], "fgsm", alpha=alpha)[0] for alpha in (None, 1))
    assert torch.equal(plain, given) and distance(given, x[:8], "linf").max() > 7.9 / 255


def test_fp16_gradients_do_not_underflow():
    """At a confident prediction the gradient is 1e-9: zero in fp16, were the loss not scaled."""

    net, x = nn.Sequential(nn.Flatten(), nn.Linear(12, 3)), torch.ones(5, 3, 2, 2)
    with torch.no_grad():
        net[1].weight.normal_(0, 0.1, generator=torch.Generator().manual_seed(0))
        net[1].bias.copy_(torch.tensor([16.0, 0, 0]))
    grads = []
    for precision in (None, run.Precision("fp16")):
        with attacks.victim(net, x, precision) as victim:
            grads.append(victim.gradient(x, attacks.ce_loss, torch.zeros(5).long(), None)[2])
    assert 0 < grads[0].abs().max() < 1e-6
    assert (grads[1] != 0).all()
    torch.testing.assert_close(grads[1], grads[0], rtol=0.3, atol=1e-9)


# --- mistakes -------------------------------------------------------------------------------------


def test_names():
    assert parse("pgd") == ("pgd", 20, 1) and parse("apgd-ce-7") == ("apgd-ce", 7, 1)
    assert parse("square") == ("square", 5000, 1) and parse("apgd-t") == ("apgd-t", 100, 1)
    assert parse("pgd-50-10") == ("pgd", 50, 10) and parse("pgd-t-5") == ("pgd-t", 5, 1)
    for name in ("apgd", "pgd-0", "pgd-5-0", "pgd-x", "fgsm-2", "fgsm-1", "", "square--5"):
        with pytest.raises(UserError, match="there is no attack"):
            parse(name)


@pytest.mark.parametrize(
    "change, text",
    [
        ({"eps": 0}, "eps 0 is not in"),
        ({"eps": 256.0}, "eps 256.0 is not in"),
        ({"norm": "l1"}, "unknown norm 'l1'"),
        ({"x": torch.full((2, 3, 6, 6), 1.5)}, "not within"),
        ({"x": torch.full((2, 3, 6, 6), float("nan"))}, "not within"),
        ({"y": torch.tensor([0, 9])}, "y has classes 0..9"),
        ({"y": torch.tensor([0])}, "y must be 2"),
    ],
)
def test_bad_arguments(change, text):
    net, x, y = linear()
    options = {"x": x[:2], "y": y[:2], "name": "apgd-ce-2"} | change
    with pytest.raises(UserError, match=text):
        attack(net, **options)


def test_too_few_classes_for_dlr():
    for classes, name in ((2, "apgd-dlr-2"), (3, "apgd-t-2")):
        net, x, y = linear(classes)
        with pytest.raises(UserError, match="needs"):
            attack(net, x, y, name)
        assert attack(net, x, y, "fab-t-20", 255)[1].all()


def test_no_images():
    net, x, y = linear()
    adv, fooled, _ = attack(net, x[:0], y[:0], "apgd-ce-2")
    assert adv.shape == (0, 3, 6, 6) and fooled.shape == (0,)


# --- other people's code --------------------------------------------------------------------------

IMAGES = 400  # 2 of them are half a point; tens of minutes on one core


def reference(model, x, y, name, eps, norm):
    """Fooled (N,) by the authors' implementation, one restart, the settings of `standard`."""
    theirs = pytest.importorskip("autoattack", reason="needs github.com/fra31/auto-attack")
    norm = {"linf": "Linf", "l2": "L2"}[norm]
    suite = theirs.AutoAttack(model, norm, eps / 255, seed=0, verbose=False, device="cpu")
    suite.attacks_to_run = [name]
    return suite.run_standard_evaluation(x, y, bs=50)


def torchattacks(model, x, y, name, eps, norm):
    """APGD of torchattacks."""
    theirs = pytest.importorskip("torchattacks")
    options = {"norm": {"linf": "Linf", "l2": "L2"}[norm], "eps": eps / 255, "n_restarts": 1}
    loss = name.removeprefix("apgd-")
    kind = theirs.APGDT if loss == "t" else functools.partial(theirs.APGD, loss=loss)
    return kind(model, steps=100, **options)(x, y)


@pytest.mark.slow
@pytest.mark.parametrize("norm, eps", [("linf", 1), ("l2", 38)])
@pytest.mark.parametrize("oracle", [reference, torchattacks])
def test_agrees_with_other_implementations(oracle, norm, eps, shared, cifar10_dir):
    """Accuracy of akamaster's ResNet-20 under each attack, within half a point."""
    model = models.build("resnet20", mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
    state = run.load_checkpoint(shared / "checkpoints" / "resnet20-12fca82f.th", foreign=True)
    models.load_foreign(model, state)
    test = data.load("cifar10", cifar10_dir).test
    x, y = test.x[:IMAGES].float() / 255, test.y[:IMAGES]
    right = attacks.judge(model, x, y)[0] <= 0
    x, y = x[right], y[right]
    others = ("fab-t", "square") if oracle is reference else ()
    for name in ("apgd-ce", "apgd-dlr", "apgd-t", *others):
        radius = eps * (4 if name == "square" else 1)  # where more than a few fall
        theirs = oracle(model, x, y, name, radius, norm)
        fooled = attacks.judge(model, theirs, y)[0] > 0
        ours = attack(model, x, y, name, radius, norm)[1]
        assert abs(int(ours.sum()) - int(fooled.sum())) <= 0.005 * IMAGES, name


# --- restarts, targets, algorithms, the library ---------------------------------------------------


def test_restarts_and_targets_by_name():
    """pgd-5-4: 5 steps from 4 starts, the first of them pgd-5's; pgd-t aims at every class."""
    one, four = robust("pgd-5", 1.2), robust("pgd-5-4", 1.2)
    assert four <= one and robust("pgd-t-10", 1.2) <= robust("pgd-10", 1.2)
    net, x, y = trained()
    facts = {n: attack(net, x[:8], y[:8], n, 0.01)[2] for n in ("pgd-5-4", "pgd-t-3", "apgd-ce-6")}
    assert facts["pgd-5-4"]["forward"] == facts["pgd-5-4"]["backward"] == 8 * 5 * 4
    assert facts["pgd-t-3"]["backward"] == 8 * 3 * 9
    assert facts["apgd-ce-6"]["backward"] == 8 * 7
    with pytest.raises(UserError, match="only pgd and cw have restarts"):
        parse("apgd-ce-10-2")


def test_the_nearest_classes_first():
    """apgd-malt aims first at the class that a linear network reaches by the shortest step."""
    net, x, y = linear(6)
    with torch.no_grad():
        z, w = net(x), net[1].weight
    gap = (z.gather(1, y[:, None]) - z) / (w[None] - w[y][:, None]).abs().sum(2)
    expected = gap.scatter(1, y[:, None], torch.inf).argsort(1)[:, :3]
    with attacks.victim(net, x) as victim:
        assert torch.equal(nearest_classes(victim, x, y, 3), expected)


def test_fast_attacks_are_as_strong_as_apgd_t():
    standard = robust("apgd-t", 1.2)
    assert robust("apgd-malt", 1.2) <= standard + 1.6


def test_cudnn_does_not_time_every_size_of_batch(monkeypatch):
    """Attacks run with benchmark off; the judge with deterministic algorithms and without TF32,
    whatever the attack's precision. Afterwards the settings are as before (gpu.md, S3, W2, S5)."""
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    monkeypatch.setattr(cudnn, "benchmark", True)
    monkeypatch.setattr(cudnn, "allow_tf32", False)
    seen = set()

    class Watched(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = linear()[0]

        def forward(self, x):
            kind = "attack" if x.requires_grad else "judge"
            settings = cudnn.benchmark, cudnn.deterministic, cudnn.allow_tf32, matmul.allow_tf32
            seen.add((kind, *settings))
            return self.net(x)

    _, x, y = linear()
    for name in ("apgd-ce-2", "pgd-2"):
        for precision, tf32 in ((None, False), (run.Precision("tf32"), True)):
            seen.clear()
            attack(Watched(), x, y, name, precision=precision)
            assert {s for s in seen if s[0] == "attack"} == {("attack", False, False, tf32, tf32)}
            assert ("judge", False, True, False, False) in seen
    assert cudnn.benchmark and not cudnn.allow_tf32 and not matmul.allow_tf32


def test_tf32_is_fp32_on_a_cpu():
    net, x, y = trained()
    a, b = (
        attack(net, x[:8], y[:8], "apgd-ce-5", 1, precision=p)[0]
        for p in (None, run.Precision("tf32"))
    )
    assert torch.equal(a, b)


def test_autoattack_as_a_function():
    """Accuracy and images of the four attacks, in any of the forms that networks have."""
    net, x, y = trained()
    net = copy.deepcopy(net).train()
    x, y = x[:20], (y[:20] + (torch.arange(20) == 3)) % 10  # one that is wrong from the start
    short = ("apgd-ce-10", "apgd-t-5", "fab-t-5", "square-50")
    accuracy, adv = attacks.autoattack(net, x, y, eps=1.2, attacks=short)
    standing = torch.arange(20) != 3
    for name in short:
        rows = standing.nonzero()[:, 0]
        standing[rows] &= ~attack(net, x[rows], y[rows], name, 1.2, index=rows)[1]
    assert accuracy == 100 * standing.double().mean().item() and 0 < accuracy < 95
    net.eval()
    assert torch.equal((net(adv).argmax(1) == y), standing) and net.training is False
    assert torch.equal(adv[standing], x[standing]) and torch.equal(adv[3], x[3])
    assert distance(adv, x, "linf").max().item() <= 1.2 / 255
    again, same = attacks.autoattack(
        lambda v: (net(v), 0), x, y.int(), eps=1.2, attacks=short, batch_size=7
    )
    assert again == accuracy and (same - adv).abs().max() < 2.4 / 255
    assert attacks.autoattack(net, x[:0], y[:0])[0] == 0


def test_eps_that_is_clearly_a_fraction():
    """8/255 as 0.0314 and an L2 radius of 0.5 are other units; usual radii are not."""
    assert "--eps 8.007" in attacks.check_eps(0.0314)
    assert "--eps 127.5" in attacks.check_eps(0.5, "l2")
    for eps, norm in ((0.5, "linf"), (1, "linf"), (8, "linf"), (8, "l2"), (128, "l2")):
        assert attacks.check_eps(eps, norm) is None


def test_alpha_that_is_clearly_a_fraction():
    """2/255 as 0.0078 moves no image across a ball of 8; a small step in a small ball does."""
    assert "--alpha 1.989" in attacks.check_eps(8, "linf", 0.0078)
    assert "--alpha 14.99" in attacks.check_eps(128, "l2", 0.0588)
    for eps, alpha in ((8, None), (8, 0.8), (8, 0.1), (0.5, 0.0078)):
        assert attacks.check_eps(eps, "linf", alpha) is None


def test_an_empty_batch_in_l2():
    """gpu.md, B3: the bound on eps does not depend on the number of images."""
    net, x, y = linear()
    assert attacks.pgd(net, x[:0], y[:0], 128, norm="l2").shape == (0, 3, 6, 6)
    assert attack(net, x[:0], y[:0], "pgd-2", 128, "l2")[0].shape == (0, 3, 6, 6)
    with pytest.raises(UserError, match="not in"):
        attacks.pgd(net, x[:0], y[:0], 1e6, norm="l2")


def test_grey_levels_are_divided_by_a_tensor(monkeypatch):
    """CUDA would multiply by the reciprocal of a number (gpu.md, B1)."""
    seen, real = [], torch.Tensor.div_

    def div_(self, other, **options):
        seen.append(other)
        return real(self, other, **options)

    monkeypatch.setattr(torch.Tensor, "div_", div_)
    levels = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    found = run.to_float(levels)
    assert [isinstance(v, torch.Tensor) and v.device == levels.device for v in seen] == [True]
    assert torch.equal(found.flatten(), torch.arange(256).float() / 255)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_lengths_are_those_of_fp64(norm):
    """Bit for bit, of fp32 and fp64 rows, of zero, of NaN and of no rows."""
    rows = torch.randn(6, 3, 5, 5)
    rows[1], rows[2, 0, 0, 0], rows[3] = 0, torch.nan, 1e-42
    for delta in (rows, rows.double(), rows[:0]):
        order = torch.inf if norm == "linf" else 2
        expected = torch.linalg.vector_norm(delta.double().flatten(1), order, dim=1)
        found = attacks.rows.lengths(delta, norm)
        assert found.dtype == torch.float64
        torch.testing.assert_close(found, expected, rtol=0 if norm == "linf" else 1e-15, atol=0,
                                   equal_nan=True)  # fmt: skip
