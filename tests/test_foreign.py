"""State_dicts of other projects: the names that their files define, and what the network computes.

Each project below is written down as the names and shapes in its state_dict, and as the function of
an image that its code computes from them (torch.nn.functional alone). RobustBench, TRADES and MAIR
share the block of the PyTorch Wide ResNet; kuangliu, MAIR and RobustBench the ResNet.
"""

import pytest
import torch
import torch.nn.functional as F

from common import data, models, run
from common.models import evaluation, published


class Names:
    """A state_dict in the making. Every call adds entries and returns nothing."""

    def __init__(self):
        self.state = {}

    def conv(self, name, c_in, c_out, kernel, groups=1, bias=False):
        self.state[f"{name}.weight"] = torch.randn(c_out, c_in // groups, kernel, kernel) / (
            kernel * (c_in // groups) ** 0.5
        )
        if bias:
            self.state[f"{name}.bias"] = torch.randn(c_out) / 4

    def norm(self, name, channels):
        self.state[f"{name}.weight"] = 1 + torch.rand(channels)
        self.state[f"{name}.bias"] = torch.randn(channels) / 4
        self.state[f"{name}.running_mean"] = torch.randn(channels) / 4
        self.state[f"{name}.running_var"] = 1 + torch.rand(channels)
        self.state[f"{name}.num_batches_tracked"] = torch.tensor(7)

    def linear(self, name, c_in, c_out):
        self.state[f"{name}.weight"] = torch.randn(c_out, c_in) / c_in**0.5
        self.state[f"{name}.bias"] = torch.randn(c_out)


def batch_norm(x, s, name):
    return F.batch_norm(
        x, s[f"{name}.running_mean"], s[f"{name}.running_var"], s[f"{name}.weight"],
        s[f"{name}.bias"],
    )  # fmt: skip


def conv(x, s, name, stride=1, padding=1, groups=1):
    return F.conv2d(x, s[f"{name}.weight"], s.get(f"{name}.bias"), stride, padding, groups=groups)


def linear(x, s, name):
    return F.linear(x, s[f"{name}.weight"], s[f"{name}.bias"])


# --- the Wide ResNet of TRADES, RobustBench and MAIR ----------------------------------------------

WIDE, DEEP = 2, 2  # WRN-16-2


def wide_names(sub_block):
    """block1.layer.0.bn1, ..., block1.layer.0.convShortcut; TRADES adds sub_block1, unused."""
    names, c_in = Names(), 16
    names.conv("conv1", 3, 16, 3)
    blocks = ["block1", *(["sub_block1"] if sub_block else []), "block2", "block3"]
    width = dict(zip(("block1", "block2", "block3"), (32, 64, 128), strict=True))
    width["sub_block1"] = 32
    for block in blocks:
        before = 16 if block == "sub_block1" else c_in
        for i in range(DEEP):
            at = f"{block}.layer.{i}"
            start = before if i == 0 else width[block]
            names.norm(f"{at}.bn1", start)
            names.conv(f"{at}.conv1", start, width[block], 3)
            names.norm(f"{at}.bn2", width[block])
            names.conv(f"{at}.conv2", width[block], width[block], 3)
            if i == 0:
                names.conv(f"{at}.convShortcut", start, width[block], 1)
        c_in = width[block]
    names.norm("bn1", 128)
    names.linear("fc", 128, 10)
    return names.state


def wide(x, s):
    x = conv(x, s, "conv1")
    for number in (1, 2, 3):
        for i in range(DEEP):
            at, stride = f"block{number}.layer.{i}", 2 if i == 0 and number > 1 else 1
            active = batch_norm(x, s, f"{at}.bn1").relu()
            out = conv(active, s, f"{at}.conv1", stride)
            out = conv(batch_norm(out, s, f"{at}.bn2").relu(), s, f"{at}.conv2")
            x = out + (conv(active, s, f"{at}.convShortcut", stride, 0) if i == 0 else x)
    return linear(batch_norm(x, s, "bn1").relu().mean((2, 3)), s, "fc")


# --- the ResNets of kuangliu, RobustBench and MAIR, and chenyaofo's -------------------------------


def resnet_names(widths, depth, shortcut, head, bottleneck=False):
    """layer1.0.conv1, ..., layer2.0.<shortcut>.0 and .1, and the head."""
    names, c_in, growth = Names(), widths[0], 4 if bottleneck else 1
    names.conv("conv1", 3, widths[0], 3)
    names.norm("bn1", widths[0])
    for number, width in enumerate(widths, 1):
        for i in range(depth):
            at = f"layer{number}.{i}"
            sizes = [(c_in, width, 3), (width, width, 3)]
            if bottleneck:
                sizes = [(c_in, width, 1), (width, width, 3), (width, 4 * width, 1)]
            for k, size in enumerate(sizes, 1):
                names.conv(f"{at}.conv{k}", *size)
                names.norm(f"{at}.bn{k}", size[1])
            if c_in != width * growth:
                names.conv(f"{at}.{shortcut}.0", c_in, width * growth, 1)
                names.norm(f"{at}.{shortcut}.1", width * growth)
            c_in = width * growth
    names.linear(head, c_in, 10)
    return names.state


def resnet(x, s, stages, depth, shortcut, head, bottleneck=False):
    x = batch_norm(conv(x, s, "conv1"), s, "bn1").relu()
    for number in range(1, stages + 1):
        for i in range(depth):
            at, stride = f"layer{number}.{i}", 2 if i == 0 and number > 1 else 1
            if bottleneck:  # the 3x3 convolution carries the stride
                out = batch_norm(conv(x, s, f"{at}.conv1", 1, 0), s, f"{at}.bn1").relu()
                out = batch_norm(conv(out, s, f"{at}.conv2", stride), s, f"{at}.bn2").relu()
                out = batch_norm(conv(out, s, f"{at}.conv3", 1, 0), s, f"{at}.bn3")
            else:
                out = batch_norm(conv(x, s, f"{at}.conv1", stride), s, f"{at}.bn1").relu()
                out = batch_norm(conv(out, s, f"{at}.conv2"), s, f"{at}.bn2")
            if f"{at}.{shortcut}.0.weight" in s:
                x = conv(x, s, f"{at}.{shortcut}.0", stride, 0)
                x = batch_norm(x, s, f"{at}.{shortcut}.1")
            x = (out + x).relu()
    return linear(x.mean((2, 3)), s, head)


# --- VGG ------------------------------------------------------------------------------------------

VGG11 = (64, "M", 128, "M", 256, 256, "M", 512, 512, "M", 512, 512, "M")


def vgg_names(heads):
    """features.0 (a convolution with a bias), features.1 (its norm), ..., and the heads."""
    names, c_in, k = Names(), 3, 0
    for width in VGG11:
        if width == "M":
            k += 1
            continue
        names.conv(f"features.{k}", c_in, width, 3, bias=True)
        names.norm(f"features.{k + 1}", width)
        c_in, k = width, k + 3
    for i, head in enumerate(heads):
        names.linear(head, 512, 10 if i == len(heads) - 1 else 512)
    return names.state


def vgg(x, s, heads):
    k = 0
    for width in VGG11:
        if width == "M":
            x, k = F.max_pool2d(x, 2), k + 1
        else:
            x = conv(x, s, f"features.{k}")
            x, k = batch_norm(x, s, f"features.{k + 1}").relu(), k + 3
    x = x.flatten(1)
    for head in heads[:-1]:
        x = linear(x, s, head).relu()
    return linear(x, s, heads[-1])


# --- AugMix's ResNeXt, as RobustBench has it ------------------------------------------------------


def resnext_names():
    names, c_in = Names(), 64
    names.conv("conv_1_3x3", 3, 64, 3)
    names.norm("bn_1", 64)
    for number, width in enumerate((64, 128, 256), 1):
        inner = 4 * (width * 32 // 64)
        for i in range(3):
            at = f"stage_{number}.{i}"
            names.conv(f"{at}.conv_reduce", c_in, inner, 1)
            names.norm(f"{at}.bn_reduce", inner)
            names.conv(f"{at}.conv_conv", inner, inner, 3, groups=4)
            names.norm(f"{at}.bn", inner)
            names.conv(f"{at}.conv_expand", inner, 4 * width, 1)
            names.norm(f"{at}.bn_expand", 4 * width)
            if i == 0:
                names.conv(f"{at}.downsample.0", c_in, 4 * width, 1)
                names.norm(f"{at}.downsample.1", 4 * width)
            c_in = 4 * width
    names.linear("classifier", 1024, 10)
    return names.state


def resnext(x, s):
    x = batch_norm(conv(x, s, "conv_1_3x3"), s, "bn_1").relu()
    for number in (1, 2, 3):
        for i in range(3):
            at, stride = f"stage_{number}.{i}", 2 if i == 0 and number > 1 else 1
            out = batch_norm(conv(x, s, f"{at}.conv_reduce", 1, 0), s, f"{at}.bn_reduce").relu()
            out = conv(out, s, f"{at}.conv_conv", stride, groups=4)
            out = batch_norm(out, s, f"{at}.bn").relu()
            out = batch_norm(conv(out, s, f"{at}.conv_expand", 1, 0), s, f"{at}.bn_expand")
            if i == 0:
                x = batch_norm(conv(x, s, f"{at}.downsample.0", stride, 0), s, f"{at}.downsample.1")
            x = (out + x).relu()
    return linear(x.mean((2, 3)), s, "classifier")


# --- the projects ---------------------------------------------------------------------------------

MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2471, 0.2435, 0.2616)
THREE = ("classifier.0", "classifier.3", "classifier.6")


def prefixed(state, prefix):
    return {prefix + name: value for name, value in state.items()}


def buffers(mean, std, shape, **more):
    values = {mean: torch.tensor(MEAN).view(shape), std: torch.tensor(STD).view(shape)}
    return values | {name: torch.tensor(value) for name, value in more.items()}


def trades():
    """Saved of DataParallel, with a second first block that its forward pass leaves out."""
    state = wide_names(sub_block=True)
    return "wrn16-2", prefixed(state, "module."), state, wide, False


def robustbench_wide():
    """mu and sigma are buffers; training wrote the file, so all may stand below state_dict."""
    state = wide_names(sub_block=True)
    own = state | buffers("mu", "sigma", (1, 3, 1, 1))
    return "wrn16-2", {"state_dict": prefixed(own, "module.")}, state, wide, True


def robustbench_resnext():
    state = resnext_names()
    return "resnext29", state | buffers("mu", "sigma", (1, 3, 1, 1)), state, resnext, True


def robustbench_resnet50():
    state = resnet_names((64, 128, 256, 512), 1, "shortcut", "linear", bottleneck=True)
    state = resnet50_of(state)
    own = prefixed(state | buffers("mu", "sigma", (1, 3, 1, 1)), "model.")
    return "resnet50", own, state, resnet50, True


DEPTHS50 = (3, 4, 6, 3)


def resnet50_of(first):
    """The names of three, four, six and three blocks, from those of one block a stage."""
    names = Names()
    names.state = first
    for number, (width, depth) in enumerate(zip((64, 128, 256, 512), DEPTHS50, strict=True), 1):
        for i in range(1, depth):
            at, sizes = f"layer{number}.{i}", [(4 * width, width, 1), (width, width, 3),
                                               (width, 4 * width, 1)]  # fmt: skip
            for k, size in enumerate(sizes, 1):
                names.conv(f"{at}.conv{k}", *size)
                names.norm(f"{at}.bn{k}", size[1])
    return names.state


def resnet50(x, s):
    x = batch_norm(conv(x, s, "conv1"), s, "bn1").relu()
    for number, depth in enumerate(DEPTHS50, 1):
        for i in range(depth):
            at, stride = f"layer{number}.{i}", 2 if i == 0 and number > 1 else 1
            out = batch_norm(conv(x, s, f"{at}.conv1", 1, 0), s, f"{at}.bn1").relu()
            out = batch_norm(conv(out, s, f"{at}.conv2", stride), s, f"{at}.bn2").relu()
            out = batch_norm(conv(out, s, f"{at}.conv3", 1, 0), s, f"{at}.bn3")
            if i == 0:
                x = batch_norm(conv(x, s, f"{at}.shortcut.0", stride, 0), s, f"{at}.shortcut.1")
            x = (out + x).relu()
    return linear(x.mean((2, 3)), s, "linear")


def mair_wide():
    """RobModel keeps n_classes, mean and std beside `model`, and does not normalise by them until
    add_normalize; the file holds it as rmodel. Here the network was saved after add_normalize."""
    state = wide_names(sub_block=False)
    own = prefixed(state, "model.1.") | buffers("model.0.mean", "model.0.std", (3,), n_classes=10)
    return "wrn16-2", {"rmodel": own, "record_info": "x"}, state, wide, True


def mair_resnet18():
    """In parallel: model.module. before the names."""
    state = resnet_names((64, 128, 256, 512), 2, "shortcut", "linear")
    own = prefixed(state, "model.module.") | buffers("mean", "std", (3,), n_classes=10)

    def function(x, s):
        return resnet(x, s, 4, 2, "shortcut", "linear")

    return "resnet18", {"rmodel": own}, state, function, True


def kuangliu_resnet18():
    state = resnet_names((64, 128, 256, 512), 2, "shortcut", "linear")

    def function(x, s):
        return resnet(x, s, 4, 2, "shortcut", "linear")

    return "resnet18", {"net": prefixed(state, "module."), "acc": 93.0, "epoch": 3}, state, \
        function, False  # fmt: skip


def kuangliu_vgg11():
    state = vgg_names(["classifier"])
    content = {"net": prefixed(state, "module."), "acc": 92.0, "epoch": 3}
    return "vgg11", content, state, lambda x, s: vgg(x, s, ["classifier"]), False


def chenyaofo_resnet20():
    state = resnet_names((16, 32, 64), 3, "downsample", "fc")
    return "resnet20", state, state, lambda x, s: resnet(x, s, 3, 3, "downsample", "fc"), False


def chenyaofo_vgg11():
    state = vgg_names(THREE)
    return "vgg11", state, state, lambda x, s: vgg(x, s, THREE), False


PROJECTS = (
    trades, robustbench_wide, robustbench_resnext, robustbench_resnet50, mair_wide, mair_resnet18,
    kuangliu_resnet18, kuangliu_vgg11, chenyaofo_resnet20, chenyaofo_vgg11,
)  # fmt: skip


def networks(*words):
    parser = run.Parser(__file__, "")
    evaluation.add_arguments(parser)
    return models.for_evaluation(parser.parse_args(list(map(str, words))), torch.device("cpu"))[0]


@pytest.mark.parametrize("project", PROJECTS, ids=lambda project: project.__name__)
def test_the_file_of_a_project_is_its_function(tmp_path, project):
    """Loaded by name, our network gives their logits; mean and deviation come from the file where
    it has them, else from the options."""
    arch, content, state, function, has_statistics = project()
    torch.save(content, tmp_path / "w.pt")
    words = [tmp_path / "w.pt", "--arch", arch, "--dataset", "cifar10"]
    if not has_statistics:
        words += ["--mean", ",".join(map(str, MEAN)), "--std", ",".join(map(str, STD))]
    ((_, model, facts),) = networks(*words)
    x = torch.rand(2, 3, 32, 32)
    seen = (x - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
    with torch.no_grad():
        theirs = function(seen, state)
        torch.testing.assert_close(model(x), theirs, rtol=1e-4, atol=1e-4 * theirs.abs().max())
    assert facts["method"] == "foreign" and facts["num_classes"] == 10


def test_another_function_of_like_names_is_refused(tmp_path):
    """A name too many, and a pre-activation ResNet, whose shortcut has no norm."""
    _, _, state, _, _ = chenyaofo_resnet20()
    torch.save(state | {"extra.weight": torch.ones(1)}, tmp_path / "w.pt")
    words = ["--arch", "resnet20", "--dataset", "cifar10", "--mean", "0,0,0", "--std", "1,1,1"]
    with pytest.raises(run.UserError, match=r"no resnet20-b: 1 entries differ, as extra\.weight"):
        networks(tmp_path / "w.pt", *words)
    _, content, _, _, _ = kuangliu_resnet18()
    preact = {k: v for k, v in content["net"].items() if "shortcut.1" not in k}
    torch.save(preact, tmp_path / "w.pt")
    with pytest.raises(run.UserError, match=r"no resnet18: .* entries differ"):
        networks(tmp_path / "w.pt", "--arch", "resnet18", *words[2:])


# --- mean and deviation ---------------------------------------------------------------------------


def test_wrong_statistics_of_a_network_of_others(shared, cifar10_dir, capsys):
    """akamaster's ResNet-20 was trained with ImageNet's mean and deviation; with others the
    evaluation says what it would have with those."""
    file = shared / "checkpoints" / "resnet20-12fca82f.th"
    test = data.load("cifar10", cifar10_dir).test
    x, y = test.x[:500], test.y[:500]
    right = ["--mean", "0.485,0.456,0.406", "--std", "0.229,0.224,0.225"]
    for words, doubted in ((["--mean", "0,0,0", "--std", "1,1,1"], True), (right, False)):
        found = networks(file, "--arch", "resnet20", "--dataset", "cifar10", *words)
        model = found[0][1]
        before = {name: value.clone() for name, value in model.state_dict().items()}
        ((_, _, facts),) = models.check_statistics(found, x, y)
        assert ("doubt" in facts) == doubted
        assert all(torch.equal(value, before[k]) for k, value in model.state_dict().items())
        given = published.accuracy(model, x, y)
        if doubted:
            ((_, better, _),) = networks(file, "--arch", "resnet20", "--dataset", "cifar10", *right)
            best = published.accuracy(better, x, y)
            assert given < 60 and best > 90
            start = f"{given:.1f} % of 500 clean images with this mean and deviation, "
            pair = f"{best:.1f} % with --mean 0.485,0.456,0.406 --std 0.229,0.224,0.225"
            assert facts["doubt"].startswith(start) and pair in facts["doubt"]
            assert facts["doubt"].endswith("probably trained with one of these")
            assert "--mean 0,0,0" not in facts["doubt"] and "0.5,0.5" not in facts["doubt"]
            assert facts["doubt"] in capsys.readouterr().out


def test_no_usual_pair_helps():
    """An untrained network: it says what was published, and that another training explains it."""
    model = models.build("resnet20").eval()
    facts = {"arch": "resnet20", "dataset": "cifar10", "method": "foreign"}
    x, y = torch.rand(40, 3, 32, 32), torch.arange(40) % 10
    text = published.doubts(model, facts, x, y)
    assert "where He et al. 2016 reports 91.2 % for resnet20" in text or "91.3 %" in text
    assert "no usual mean and deviation does better" in text
    assert published.doubts(model, facts | {"method": "ct"}, x, y) is None
    assert published.doubts(model, facts | {"arch": "resnet8"}, x, y) is None
    assert published.doubts(model, facts, x[:0], y[:0]) is None


def test_published_accuracies_of_torchvision():
    from torchvision.models import get_model_weights

    for (dataset, arch), (accuracy, _) in published.PUBLISHED.items():
        if dataset == "imagenet":
            meta = get_model_weights(arch).IMAGENET1K_V1.meta
            assert accuracy == pytest.approx(meta["_metrics"]["ImageNet-1K"]["acc@1"], abs=0.005)
