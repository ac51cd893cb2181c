"""The feature maps of every family, and attention transfer as common/README.md writes it."""

import importlib
import itertools
import json
import re

import pytest
import torch
import torch.nn.functional as F

from common import models, run
from common.models.layers import Normalize
from common.run import UserError

# name, norm: resolutions of 32 pixels' maps
FAMILIES = {
    ("resnet8", "bn"): (32, 16, 8),
    ("resnet18", "gn"): (32, 16, 8, 4),
    ("resnet50", "none"): (32, 16, 8, 4),
    ("wrn10-1", "bn"): (32, 16, 8),
    ("wrn10-1", "nf"): (32, 16, 8),
    ("wrn10-1", "fixup"): (32, 16, 8),
    ("resnet8", "fixup"): (32, 16, 8),
    ("resnet8", "dual-bn"): (32, 16, 8),
    ("nf_resnet26", "nf"): (32, 16, 8, 4),
    ("allconv", "bn"): (32, 16, 6),
    ("densenet40", "none"): (32, 16, 8),
    ("resnext29", "bn"): (32, 16, 8),
    ("vgg11-8", "bn"): (32, 16, 8, 4, 2),
}
TORCHVISION = {  # 64 pixels
    "resnet18": (16, 8, 4, 2),
    "vgg11": (64, 32, 16, 8, 4),
    "densenet121": (32, 16, 8, 4, 2),
    "mobilenet_v3_small": (32, 16, 8, 4, 2),
    "efficientnet_b0": (32, 16, 8, 4, 2),
    "convnext_tiny": (16, 8, 4, 2),
    "regnet_y_400mf": (16, 8, 4, 2),
    "squeezenet1_1": (31, 15, 7, 3),
    "shufflenet_v2_x0_5": (32, 8, 4, 2),
}


def documented():
    """The names that the Python of "Your own method" in common/README.md defines."""
    text = (run.ROOT / "common" / "README.md").read_text().split("## Your own method")[1]
    names = {"torch": torch, "F": F}
    exec(re.search(r"```python\n(.*?)```", text, re.S)[1], names)
    return names


@pytest.mark.parametrize(("arch", "norm"), FAMILIES)
def test_maps_of_every_family(arch, norm):
    """One map for each resolution; logits, features and gradients are those without them."""
    model = models.build(arch, norm, num_classes=7).train()
    x = torch.rand(4, 3, 32, 32)
    logits, maps = model.eval()(x, with_stages=True)
    assert [tuple(m.shape[2:]) for m in maps] == [(n, n) for n in FAMILIES[arch, norm]]
    assert all(m.ndim == 4 and len(m) == 4 and m.isfinite().all() for m in maps)
    assert torch.equal(model(x), logits)
    both = model(x, with_features=True, with_stages=True)
    plain, h = model(x, with_features=True)
    assert torch.equal(both[0], plain) and torch.equal(both[1], h)
    assert all(torch.equal(a, b) for a, b in zip(both[2], maps, strict=True))
    for part in torch.autograd.grad(logits.sum(), maps):
        assert part.isfinite().all()


@pytest.mark.parametrize("name", TORCHVISION)
def test_maps_of_torchvision(name):
    from torchvision.models import get_model

    model = models.Own(get_model(name, weights=None), name, (0.5,) * 3, (0.5,) * 3).eval()
    x = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        logits, maps = model(x, with_stages=True)
        assert torch.equal(model(x), logits)
    assert [m.shape[2] for m in maps] == list(TORCHVISION[name])


@pytest.mark.parametrize(("arch", "norm"), FAMILIES)
def test_attention_transfer(arch, norm):
    """The loss of the README: 0 between a network and itself, and less after steps down its slope.
    The teacher is of another family with as many stages, where there is one."""
    attention_transfer = documented()["attention_transfer"]
    torch.manual_seed(1)
    student = models.build(arch, norm).eval()  # eval: no dropout, no batch statistics
    stages = len(FAMILIES[arch, norm])
    teacher = models.build({3: "resnet8", 4: "resnet18", 5: "vgg11-4"}[stages], "bn").eval()
    x = torch.rand(4, 3, 32, 32)
    if arch == "allconv":  # its last maps have 6 x 6 pixels, for two of its layers do not pad
        teacher = models.build("allconv", "bn").eval()
    with torch.no_grad():
        _, wanted = teacher(x, with_stages=True)
        _, same = student(x, with_stages=True)
    assert attention_transfer(same, same) == 0
    values = []
    for _ in range(4):
        _, maps = student(x, with_stages=True)
        assert attention_transfer([3 * m for m in maps], wanted).item() == pytest.approx(
            attention_transfer(maps, wanted).item(), rel=1e-4
        )
        loss = attention_transfer(maps, wanted)
        gradients = torch.autograd.grad(loss, student.parameters(), allow_unused=True)
        size = sum(g.square().sum() for g in gradients if g is not None).sqrt()
        values.append(loss.item())
        with torch.no_grad():
            for p, g in zip(student.parameters(), gradients, strict=True):
                if g is not None:
                    p -= 0.01 * loss * g / size**2  # a hundredth of the way by the slope
    assert all(b < a for a, b in itertools.pairwise(values)), values


def test_attention_is_the_published_one():
    """Zagoruyko and Komodakis 2017: the mean square over channels, as a vector of length 1."""
    first, second = torch.rand(2, 3, 4, 4), torch.rand(2, 5, 4, 4)
    expected = 0
    for i in range(2):
        a, b = (m[i].square().sum(0).flatten() for m in (first, second))
        expected += (a / a.norm() - b / b.norm()).square().sum() / 2
    value = documented()["attention_transfer"]([first], [second])
    torch.testing.assert_close(value, expected)


def test_a_method_on_maps_is_one_graph():
    """torch.compile takes the network and its maps without a break."""
    torch.compiler.reset()
    model = models.build("wrn10-1", "bn").eval()
    fast = torch.compile(model, backend="eager", fullgraph=True)
    x = torch.rand(2, 3, 32, 32)
    for ours, theirs in zip(fast(x, with_stages=True)[1], model.maps(x), strict=True):
        torch.testing.assert_close(ours, theirs)
    torch.compiler.reset()


class Named(torch.nn.Module):
    """A user's network: its trunk has another name than usual."""

    stages = ("body.a", "body.b")

    def __init__(self):
        super().__init__()
        self.body = torch.nn.ModuleDict(
            {"a": torch.nn.Conv2d(3, 4, 3), "b": torch.nn.Conv2d(4, 4, 3, stride=2)}
        )
        self.fc = torch.nn.Linear(4, 10)

    def forward(self, x):
        return self.fc(self.body["b"](self.body["a"](x)).mean((2, 3)))


def test_a_users_network_names_its_stages():
    net = Named()
    model, x = models.Own(net, "my.py:Named"), torch.rand(2, 3, 32, 32)
    logits, h, maps = model(x, with_features=True, with_stages=True)
    assert [m.shape[-1] for m in maps] == [30, 14]
    assert torch.equal(maps[1].mean((2, 3)), h) and torch.equal(model.head(h), logits)
    net.stages = ("body.c",)
    with pytest.raises(UserError, match=r"stages names body\.c, which is no module"):
        model(x, with_stages=True)
    flat = models.Own(torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3072, 10)), "my:flat")
    with pytest.raises(UserError, match=r"has no feature maps .* give it an attribute stages"):
        flat(x, with_stages=True)
    with pytest.raises(UserError, match="no feature maps"):
        models.build("dln25", "bn").maps(torch.rand(2, 10))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert isinstance(models.Own(net, "a", (0,) * 3, (1,) * 3).normalize, Normalize)


def test_a_copy_of_ct_with_another_loss(tmp_path, monkeypatch):
    """The four steps of the README: the copy trains, and its checkpoint is read."""
    text = (run.ROOT / "common" / "README.md").read_text().split("## Your own method")[1]
    functions = re.search(r"```python\n(.*?)```", text, re.S)[1]
    source = (run.ROOT / "ct.py").read_text()
    begin = source.index("            logits, f_s = loop.net(x, with_features=True)")
    end = source.index("        loop.backward(loss)")
    loss = """            logits, maps = loop.net(x, with_stages=True)
        loss_cls = F.cross_entropy(logits, y)
        loss_ct = torch.zeros_like(loss_cls)
        if teacher is not None:
            with torch.no_grad(), precision.autocast():
                _, wanted = teacher(x, with_stages=True)
            loss_ct = attention_transfer(maps, wanted)
        loss = loss_cls + args.lam * loss_ct

"""
    changed = source[:begin] + loss + source[end:]
    changed = changed.replace("\ndef train(", f"\n{functions}\n\ndef train(", 1)
    (tmp_path / "my_method.py").write_text(changed)
    monkeypatch.syspath_prepend(str(tmp_path))
    mine = importlib.import_module("my_method")
    options = "--dataset shapes --limit 64 --batch-size 16 --epochs 2 --teacher-epochs 1 --lam 100 "
    options += (
        "--arch resnet8 --corrupted-images 0 --no-baseline --device cpu --image-size 24 --out "
    )
    mine.main(mine.parse_args([*options.split(), str(tmp_path / "run")]))
    rows = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    distances = [row["distance"] for row in rows if "distance" in row]
    assert max(distances) > 0
    checkpoint = run.load_checkpoint(tmp_path / "run" / "last.pt")
    assert models.from_checkpoint(checkpoint)(torch.rand(2, 3, 32, 32)).shape == (2, 10)
