"""Published sizes, the contract of every network, and other projects' weights at their accuracy."""

import pytest
import torch

from common import data, models, run
from common.run import UserError

# Parameters with BatchNorm, 10 classes, 32 px: He et al. 2016 (0.27 M ... 1.7 M, to the unit as in
# akamaster/pytorch_resnet_cifar10), kuangliu/pytorch-cifar for 18/34/50, Zagoruyko & Komodakis
# 2016 (36.5 M, 11.0 M, 2.7 M, 2.2 M), google-research/augmix for the last three.
PUBLISHED = {
    "resnet20": 269_722, "resnet32": 464_154, "resnet44": 658_586, "resnet56": 853_018,
    "resnet110": 1_727_962, "resnet18": 11_173_962, "resnet34": 21_282_122,
    "resnet50": 23_520_842, "wrn28": 36_479_194, "wrn16-8": 10_961_370, "wrn16-4": 2_748_890,
    "wrn40-2": 2_243_546, "allconv": 1_409_674, "densenet40": 1_059_298, "resnext29": 6_807_882,
}  # fmt: skip
IMAGENET = {"resnet18": 11_689_512, "resnet34": 21_797_672, "resnet50": 25_557_032}
SMALL = ["resnet8", "resnet18", "wrn10-1", "allconv", "densenet40", "resnext29"]


def count(model):
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("arch", PUBLISHED)
def test_parameter_count(arch):
    with torch.device("meta"):
        assert (
            count(models.constructor(arch)(models.Layers("bn"), 10, (0.5,), (0.5,), 32))
            == (PUBLISHED[arch])
        )


@pytest.mark.parametrize("arch", IMAGENET)
def test_parameter_count_imagenet(arch):
    with torch.device("meta"):
        model = models.constructor(arch)(models.Layers("bn"), 1000, (0.5,), (0.5,), 224)
    assert count(model) == IMAGENET[arch]


@pytest.mark.parametrize("norm", ["bn", "gn", "none"])
@pytest.mark.parametrize("arch", SMALL)
def test_contract(arch, norm):
    """features and head compose to forward; logits and features are fp32 under autocast too."""
    model = models.build(arch, norm, num_classes=7).eval()
    x = torch.rand(2, 3, 32, 32)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        logits, h = model(x, with_features=True)
        assert torch.equal(model(x), logits) and torch.equal(model.head(h), logits)
    assert logits.shape == (2, 7) and logits.dtype == h.dtype == torch.float32
    assert h.shape == (2, model.fc.in_features) and logits.isfinite().all()
    kinds = {"bn": torch.nn.BatchNorm2d, "gn": torch.nn.GroupNorm}
    found = {k for k, kind in kinds.items() if any(isinstance(m, kind) for m in model.modules())}
    assert found == {norm} - {"none"}


@pytest.mark.parametrize("arch", SMALL)
def test_without_norm_starts_sane(arch):
    """Without any norm, no explosion or collapse at the start: features vary, gradients are finite
    and one SGD step at the default rate lowers the loss of its own batch."""
    model = models.build(arch, "none").eval()  # eval: no dropout
    x, y = torch.rand(8, 3, 32, 32), torch.arange(8)
    logits, h = model(x, with_features=True)
    assert 1e-3 < h.std(0).mean() < 30, h.std(0).mean()
    loss = torch.nn.functional.cross_entropy(logits, y)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    torch.optim.SGD(model.parameters(), 0.01).step()
    assert torch.nn.functional.cross_entropy(model(x), y) < loss


def test_residual_branches_start_at_zero():
    model = models.build("wrn16-1", "none").eval()
    block = model.block2[1]
    x = torch.randn(2, 32, 8, 8)
    assert torch.equal(block(x), x)


def test_normalisation_is_inside_and_saved():
    """The same weights see (x - mean) / std, and the buffers travel in the state_dict."""
    mean, std = (0.1, 0.2, 0.3), (0.5, 0.6, 0.7)
    a = models.build("resnet8", mean=mean, std=std).eval()
    b = models.build("resnet8", mean=(0.0,) * 3, std=(1.0,) * 3).eval()
    keep = {k: v for k, v in b.state_dict().items() if k.startswith("normalize.")}
    b.load_state_dict(a.state_dict() | keep)
    x = torch.rand(2, 3, 32, 32)
    y = (x - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    torch.testing.assert_close(a(x), b(y))
    assert {"normalize.mean", "normalize.std"} <= a.state_dict().keys()


def test_torchvision_resnets_agree():
    """Same outputs as torchvision's resnet18 and resnet50 with the same weights."""
    torchvision = pytest.importorskip("torchvision")
    x = torch.rand(1, 3, 96, 96)
    for arch in ("resnet18", "resnet50"):
        theirs = getattr(torchvision.models, arch)(weights=None, num_classes=5).eval()
        ours = models.build(arch, num_classes=5, image_size=224, mean=(0.0,) * 3, std=(1.0,) * 3)
        models.load_foreign(ours, theirs.state_dict())
        with torch.inference_mode():
            torch.testing.assert_close(ours(x), theirs(x))


@pytest.mark.parametrize(
    ("arch", "file", "accuracy"),
    [
        ("resnet20", "resnet20-12fca82f.th", 91.73),
        pytest.param("resnet56", "resnet56-4bfd9763.th", 93.39, marks=pytest.mark.slow),
    ],
)
def test_third_party_accuracy(arch, file, accuracy, shared, cifar10_dir):
    """akamaster's networks score their published accuracy on the whole real CIFAR-10 test set."""
    test = data.load("cifar10", cifar10_dir).test
    model = models.build(arch, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
    state = run.load_checkpoint(shared / "checkpoints" / file, foreign=True)
    error = run.evaluate(models.load_foreign(model, state), *test)["error"]
    assert round(100 - error, 2) == accuracy


@pytest.mark.parametrize(
    ("kwargs", "text"),
    [
        ({"arch": "resnet21"}, "there are resnet8"),
        ({"arch": "wrn17-2"}, "depth 6n"),
        ({"arch": "resnet20", "norm": "batch"}, "resnet20 takes bn"),
        ({"arch": "resnet20", "num_classes": 0}, "class"),
        ({"arch": "resnet20", "image_size": 0}, "8 px"),
    ],
)
def test_bad_build(kwargs, text):
    with pytest.raises(UserError, match=text):
        models.build(**kwargs)


def test_foreign_state_of_another_network():
    state = models.build("resnet8").state_dict()
    with pytest.raises(UserError, match=r"no resnet20: \d+ entries differ"):
        models.load_foreign(models.build("resnet20"), state)
