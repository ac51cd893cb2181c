"""Published sizes, the contract of every network, and other projects' weights at their accuracy."""

import argparse
import math

import pytest
import torch

from common import data, models, run
from common.models import evaluation, weights
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
SMALL = ["resnet8", "resnet18", "wrn10-1", "allconv", "allconv-8", "densenet40", "resnext29"]


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


def test_start_without_a_normaliser():
    """He fan-in at the stem and at every widening; the inner convolution of a branch times
    L^(-1/2), the last one at half its scale (the published start is fan-out)."""
    torch.manual_seed(0)
    model = models.build("wrn16-4", "none")
    for conv, scale in (
        (model.conv1, 1),
        (model.block2[0].shortcut, 1),
        (model.block2[0].conv1, 6**-0.5),
        (model.block3[1].conv2, 0.5),
    ):
        he = (2 / conv.weight[0].numel()) ** 0.5
        assert conv.weight.std().item() == pytest.approx(he * scale, rel=0.1)


@pytest.mark.parametrize("norm", ["none", "nf"])
def test_the_signal_reaches_the_head_at_any_depth(norm):
    """Mean square of the embedding at the start: alike for 8 and 110 layers, 16 and 640 channels.
    With BatchNorm it grows from 0.5 (resnet8) to 16 (resnet110)."""
    x, found = torch.rand(8, 3, 32, 32), []
    for arch in ("wrn10-1", "wrn16-4", "wrn40-2", "resnet8", "resnet56", "resnet110"):
        torch.manual_seed(0)
        _, h = models.build(arch, norm).train()(x, with_features=True)
        found.append(h.square().mean().item())
    assert max(found) < 6 * min(found) and min(found) > 0.005


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


HALF = (0.5, 0.5, 0.5)


@pytest.mark.parametrize(
    ("mean", "std"),
    [
        ((125.3, 123.0, 113.9), (63.0, 62.1, 66.7)), (HALF, (63.0, 62.1, 66.7)),
        ((-0.1, 0.5, 0.5), HALF), (HALF, (0.5, 0.0, 0.5)), (HALF, (-0.5, 0.5, 0.5)),
        ((math.nan, 0.5, 0.5), HALF), (HALF, (math.nan, 0.5, 0.5)), (HALF, (math.inf, 0.5, 0.5)),
    ],
)  # fmt: skip
def test_statistics_that_are_not_of_images_in_0_1(mean, std):
    """Refused wherever they come from: arguments, another project's buffers, a checkpoint."""
    with pytest.raises(UserError, match=r"not of images in \[0,1\]"):
        models.build("resnet8", mean=mean, std=std)
    model = models.build("resnet8", mean=HALF, std=HALF)
    state = model.state_dict() | {
        "normalize.mean": torch.tensor(mean).view(1, 3, 1, 1),
        "normalize.std": torch.tensor(std).view(1, 3, 1, 1),
    }
    with pytest.raises(UserError, match=r"not of images in \[0,1\]"):
        models.from_checkpoint(model.spec | {"model": state})
    _, found = weights.without_statistics(state)
    with pytest.raises(UserError, match=r"not of images in \[0,1\]"):
        models.build("resnet8", mean=found[0], std=found[1])


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
    error = run.evaluate(models.load_foreign(model, state), test)["error"]
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


# --- normaliser-free networks and the normalisers of nofrost.py -----------------------------------

NORM_FREE = {"nf_resnet26": 15_995_176, "nf_resnet50": 25_557_032}  # as timm's


@pytest.mark.parametrize("arch", NORM_FREE)
def test_norm_free_resnets_have_timms_size(arch):
    assert count(models.build(arch, "nf", 1000, 224)) == NORM_FREE[arch]


@pytest.mark.parametrize("arch", NORM_FREE)
def test_norm_free_resnets_are_timms(arch):
    """With timm's weights the same outputs."""
    ours = models.build(arch, "nf", 1000, 224, (0.0,) * 3, (1.0,) * 3)
    theirs = pytest.importorskip("timm").create_model(arch).eval()
    with torch.no_grad():  # away from the start, where branches are exactly zero
        for p in theirs.parameters():
            p.add_(0.1 * torch.randn_like(p) * (p.std() if p.numel() > 1 and p.std() > 0 else 1))
    models.load_foreign(ours, theirs.state_dict())
    x = torch.rand(2, 3, 224, 224)
    with torch.inference_mode():
        assert (ours(x) - theirs(x)).abs().max() < 1e-5


@pytest.mark.parametrize("arch", ["resnet18", "resnet20", "wrn16-2", "nf_resnet26"])
def test_norm_free_nets_keep_the_variance(arch):
    """For small images: no normaliser inside, branches on at the start (timm's ImageNet nets: off),
    signal neither lost nor blown up with every branch on (Brock et al. 2021), gradients finite."""
    model = models.build(arch, "nf")
    kinds = (torch.nn.modules.batchnorm._NormBase, torch.nn.GroupNorm, torch.nn.LayerNorm)
    assert not any(isinstance(m, kinds) for m in model.modules())
    x = torch.randn(16, 3, 1, 1).expand(-1, -1, 32, 32)  # pooling would shrink white noise
    blocks = [m for m in model.modules() if hasattr(m, "branch")]
    stem = model.stem(x)
    start = model.stages(stem)
    gain = 0 if arch == "nf_resnet26" else 1
    assert all(getattr(m, m.branch[-1]).gain.eq(gain).all() for m in blocks)
    for block in blocks:
        torch.nn.init.ones_(getattr(block, block.branch[-1]).gain)
    spread = model.stages(stem).var().item()
    assert 0.3 < spread < 3 and torch.equal(start, model.stages(stem)) == (gain == 1)
    model(x[:2]).square().sum().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_scaled_weight_standardisation_by_hand():
    conv = models.ScaledStdConv2d(5, 4, 3)
    torch.nn.init.normal_(conv.gain)
    w = conv.weight.flatten(1)
    mean, var = w.mean(1, keepdim=True), w.var(1, correction=0, keepdim=True)
    expected = conv.gamma * conv.gain.flatten(1) * (w - mean) / (45 * (var + 1e-5)).sqrt()
    assert torch.allclose(conv.standardized().flatten(1), expected, atol=1e-6)
    assert conv.gamma == pytest.approx((2 / (1 - 1 / torch.pi)) ** 0.5, rel=1e-3)


@pytest.mark.parametrize("norm", ["in", "ln", "dual-bn"])
@pytest.mark.parametrize("arch", ["resnet8", "wrn10-1"])
def test_other_normalisers(arch, norm):
    model = models.build(arch, norm)
    model(torch.rand(4, 3, 32, 32)).sum().backward()
    unused = {n for n, p in model.named_parameters() if p.grad is None}
    assert all(".clean." in n for n in unused) and bool(unused) == (norm == "dual-bn")


def test_dual_statistics_are_apart():
    model, x = models.build("resnet8", "dual-bn").train(), torch.rand(8, 3, 32, 32)
    models.use_statistics(model, "clean")
    model(x)
    assert model.bn1.clean.num_batches_tracked == 1
    assert model.bn1.adversarial.num_batches_tracked == 0
    model.eval()
    clean = model(x)
    models.use_statistics(model, "adversarial")
    assert not torch.allclose(model(x), clean)


@pytest.mark.parametrize("arch, norm", [("resnet20", "bn"), ("wrn16-1", "bn"), ("resnet20", "nf")])
def test_stochastic_depth(arch, norm):
    """Rates rise linearly; a dropped image's branch is zero, a kept one's is 1/(1-p) as large."""
    model = models.build(arch, norm)
    blocks = [m for m in model.modules() if hasattr(m, "branch")]
    models.set_drop_path(model, 0.4)
    rates = [block.drop_path for block in blocks]
    assert rates == pytest.approx([0.4 * i / (len(blocks) - 1) for i in range(len(blocks))])
    x, block = torch.ones(2000, 4, 1, 1), blocks[-1].train()
    out = models.drop_path(x, block).flatten(1)
    assert (out == out[:, :1]).all() and out.unique().tolist() == pytest.approx([0, 1 / 0.6])
    assert abs((out[:, 0] == 0).float().mean() - 0.4) < 4 * (0.24 / 2000) ** 0.5
    assert torch.equal(models.drop_path(x, block.eval()), x)


@pytest.mark.parametrize("arch, norm, text", [
    ("nf_resnet50", "bn", "no normaliser, so --norm nf"), ("vgg11", "nf", "not for vgg11"),
])  # fmt: skip
def test_norm_free_pairs_that_do_not_exist(arch, norm, text):
    with pytest.raises(UserError, match=text):
        models.build(arch, norm)


@pytest.mark.parametrize("key", [None, "state_dict", "model_state_dict", "model_state"])
def test_foreign_weights_under_the_usual_keys(key):
    """The weights are found under every usual key, beside other entries."""
    theirs = models.build("resnet8")
    content = {key: theirs.state_dict(), "epoch": 3} if key else theirs.state_dict()
    ours = models.load_foreign(models.build("resnet8"), content)
    assert torch.equal(ours.conv1.weight, theirs.conv1.weight)


@pytest.mark.parametrize(
    "content",
    [[1], torch.zeros(3), 3, None, {}, {"state_dict": None}, {"model": [1]}, {3: torch.ones(1)}],
)
def test_foreign_file_without_weights(content):
    """Any content that is no dict of tensors is refused in one line."""
    with pytest.raises(run.UserError, match="holds no weights by name") as caught:
        models.load_foreign(models.build("resnet8"), content)
    assert "\n" not in str(caught.value)


def test_foreign_entry_that_is_no_tensor():
    state = models.build("resnet8").state_dict() | {"fc.bias": [0.0] * 10}
    with pytest.raises(run.UserError, match=r"1 entries differ, as fc\.bias"):
        models.load_foreign(models.build("resnet8"), state)


def test_refused_object_is_named(tmp_path):
    """A file with an argparse.Namespace beside the weights: its class is named, nothing runs."""
    content = {"state_dict": {}, "args": argparse.Namespace(a=1)}
    torch.save(content, tmp_path / "w.pt")
    with pytest.raises(run.UserError, match=r"argparse\.Namespace, refused.*state_dict") as caught:
        run.load_checkpoint(tmp_path / "w.pt", foreign=True)
    assert "\x1b" not in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["125.3,123,113.9", "nan,0.5,0.5", "inf,0,0", "-0.1,0,0", "1,1"])
def test_mean_of_another_unit(text):
    for read in (evaluation.triple, evaluation.deviations):
        with pytest.raises(argparse.ArgumentTypeError):
            read(text)
    assert evaluation.triple("0,0.5,1") == (0, 0.5, 1)


def test_deviation_of_zero():
    with pytest.raises(argparse.ArgumentTypeError, match="divides by zero"):
        evaluation.deviations("0.2,0,0.2")
    assert evaluation.deviations("0.2,0.3,1") == (0.2, 0.3, 1)


def test_stem_of_foreign_weights():
    """The stem in the file decides: 7x7 is the one for photographs, on any data set."""
    for built, dataset in ((224, "pacs"), (32, "pacs"), (64, "tiny-imagenet"), (224, "imagenet")):
        state = models.build("resnet18", "bn", 7, built).state_dict()
        assert weights.image_size_of(state, dataset) == built


def test_weights_of_another_network_in_a_checkpoint():
    """Each is one line with its reason; a number of classes that fills memory is not tried."""
    model = models.build("resnet8")
    content = model.spec | {"format": 1, "model": model.state_dict()}
    names = sorted(content["model"])
    for change, text in (
        ({"arch": "resnet14"}, "no resnet14 with norm bn"),
        ({"num_classes": 10**12}, "num_classes is 10000"),
        ({"model": {}}, "num_classes is 10"),
        (
            {"model": content["model"] | {names[0]: torch.ones(2, 3)}},
            f"1 entries differ, as {names[0]}",
        ),
        ({"model": content["model"] | {"x": torch.ones(1)}}, "1 entries differ, as x"),
    ):
        with pytest.raises(UserError, match=text):
            models.from_checkpoint(content | change)
    del content["norm"]
    with pytest.raises(UserError, match="has no norm"):
        models.from_checkpoint(content)
