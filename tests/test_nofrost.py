"""nofrost.py: its loss and augmentation by hand, short runs in-process, and its wrong options."""

import json
import math
import shlex
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision.transforms import functional as vision

import nofrost
from common import attacks, data, models, run
from common.data import shapes, streams
from common.run import UserError
from eval import adversarial

FAST = "--norm nf --image-size 32 --eps 8 --lr 0.1 --arch resnet8 --epochs 2".split()
FAST += "--batch-size 32 --attack-steps 2 --probe-images 20".split()
FAST += "--robust-images 5 --eval-every 1 --precision fp32 --device cpu".split()


@pytest.fixture(autouse=True)
def small_shapes(monkeypatch):
    monkeypatch.setattr(data.sets, "SHAPES_SIZES", {"train": 96, "test": 40})


def train(out, *options):
    return nofrost.main(nofrost.parse_args([*FAST, "--out", str(out), *options]))


def weights(path):
    return torch.load(path, weights_only=True)["model"]


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data.sets, "SHAPES_SIZES", {"train": 96, "test": 40})
        out = tmp_path_factory.mktemp("nofrost") / "run"
        return out, train(out)


def test_full_run(finished):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    out, final = finished
    assert set(final) == {f"{k}/nf" for k in ("error", "pgd-20", "apgd-ce", "apgd-t")}
    assert final["error/nf"] <= final["apgd-ce/nf"] <= final["apgd-t/nf"]
    assert all(0 <= v <= 100 for v in final.values())
    checkpoint = run.load_checkpoint(out / "last.pt")
    assert (checkpoint["norm"], checkpoint["step"], checkpoint["method"]) == ("nf", 6, "nofrost")
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert [x["epoch"] for x in lines if "epoch" in x] == [1, 2]
    events = EventAccumulator(str(out / "nf"), size_guidance={"images": 0}).Reload()
    tags = {"loss", "accuracy", "error", "pgd_error", "lr", "grad_norm", "images_per_s"}
    tags |= {"loss_clean", "loss_adv", "zero_grad", "robust_accuracy", "final/error"}
    assert tags <= set(events.Tags()["scalars"])
    (picture,) = events.Images("attack")
    assert picture.step == 6 and picture.width > 2 * picture.height


def test_the_line_after_a_run_attacks_as_the_run_did(tmp_path, capsys):
    """The command of AutoAttack names the run's checkpoint, norm and radius, and is a valid one."""
    options = ["--epochs", "1", "--limit", "32", "--robust-images", "0"]
    train(tmp_path / "r", *options, "--attack-norm", "l2", "--eps", "12.5")
    (line,) = (x for x in capsys.readouterr().out.splitlines() if "--attacks standard" in x)
    args = adversarial.parse_args(shlex.split(line)[2:])
    assert (args.norm, args.eps, len(args.attacks)) == ("l2", 12.5, 4)  # AutoAttack has four
    assert run.load_checkpoint(args.checkpoints[0])["method"] == "nofrost"


def test_several_networks_in_one_run(tmp_path, capsys):
    final = train(tmp_path / "r", "--norm", "nf", "--norms", "nf", "--epochs", "1", "--lam", "1")
    assert set(final) == {f"{k}/nf" for k in ("error", "pgd-20", "apgd-ce", "apgd-t")}
    args = ["--norms", "nf,dual-bn", "--epochs", "1", "--out", str(tmp_path / "s"), *FAST[2:]]
    final = nofrost.main(nofrost.parse_args(args))
    networks = ("nf", "dual-bn", "dual-bn, clean statistics")
    assert {key.partition("/")[2] for key in final} == set(networks)
    assert {path.name for path in (tmp_path / "s").glob("*.pt")} == {"nf.pt", "dual-bn.pt"}
    out = capsys.readouterr().out
    assert "warning: nf is at chance" in out and "Here: nf against dual-bn: " in out


def test_default_norms():
    parse = nofrost.parse_args
    assert parse([]).norms == ["nf", "bn", "dual-bn"]
    assert parse(["--lam", "0"]).norms == ["nf", "bn"]
    assert parse(["--dataset", "cifar10"]).norms == ["nf"]
    assert parse(["--norm", "bn"]).norms == ["bn"]


def test_sentence_of_a_comparison():
    columns = {"clean": {"a": 90.0, "b": 80.0}, "robust": {"a": 50.0, "b": 51.0}}
    text = run.compare(columns, {"clean": 1000, "robust": 100})
    assert text == (
        "a against b: 10.0 points more clean accuracy and "
        "no difference in robust accuracy shows (-1.0)."
    )
    assert run.compare(columns, {"clean": 1000, "robust": 0}).endswith("clean accuracy.")


def test_resume_is_exact(finished, tmp_path, monkeypatch):
    real = run.RunDir.save

    def save(self, name, checkpoint):
        real(self, name, checkpoint)
        if checkpoint["step"] == 3:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(run.RunDir, "save", save)
        train(tmp_path / "r")
    nofrost.main(nofrost.parse_args(["--resume", str(tmp_path / "r")]))
    assert same(weights(tmp_path / "r" / "last.pt"), weights(finished[0] / "last.pt"))


@pytest.mark.parametrize("stop", [2, 4])
def test_average_of_weights(tmp_path, monkeypatch, stop):
    """The checkpoint holds the average by its definition, and resumes exactly."""
    taken, averages = [], []
    real = run.RunDir.save

    def save(self, name, checkpoint):
        real(self, name, checkpoint)
        for found, part in ((taken, "trained"), (averages, "model")):
            found.append({k: v.clone() for k, v in checkpoint[part].items()})

    options = ["--ema", "0.5", "--norm", "bn", "--limit", "32", "--epochs", "4"]
    with monkeypatch.context() as patch:
        patch.setattr(run.RunDir, "save", save)
        final = train(tmp_path / "whole", *options)
    assert len(taken) == 4  # one step an epoch
    start = nofrost.build("bn", nofrost.parse_args([*FAST, *options]), data.load("shapes"), "cpu")
    average = start.state_dict()
    for step, trained in enumerate(taken[:3], start=1):
        kept = min(0.5, (1 + step) / (10 + step))
        for name, value in trained.items():
            new = torch.lerp(value, average[name], kept) if value.is_floating_point() else value
            average[name] = new
    assert all(torch.allclose(averages[2][k], v, atol=1e-6) for k, v in average.items())
    assert same(taken[3], averages[3]) and not same(taken[2], averages[2])

    def interrupt(self, name, checkpoint):
        real(self, name, checkpoint)
        if checkpoint["step"] == stop:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(run.RunDir, "save", interrupt)
        train(tmp_path / "r", *options)
    assert nofrost.main(nofrost.parse_args(["--resume", str(tmp_path / "r")])) == final
    assert same(weights(tmp_path / "r" / "last.pt"), weights(tmp_path / "whole" / "last.pt"))


@pytest.mark.parametrize("options", [
    ["--norm", "dual-bn"], ["--norm", "bn", "--attack-mode", "train"], ["--norm", "gn"],
    ["--norm", "in", "--val-size", "20"], ["--norm", "ln"], ["--norm", "none", "--lam", "1"],
    ["--loss", "trades"], ["--loss", "trades", "--norm", "bn"], ["--lam", "0"],
    ["--agc", "0.02", "--dropout", "0.2", "--drop-path", "0.1", "--schedule", "epoch"],
    ["--attack-norm", "l2", "--eps", "128"], ["--streams", "clean,tda,adv"],
    ["--arch", "wrn10-1", "--precision", "bf16"],
])  # fmt: skip
def test_options_train(tmp_path, options):
    final = train(tmp_path / "r", "--epochs", "1", "--robust-images", "0", *options)
    (name,) = nofrost.parse_args([*FAST, *options]).norms
    assert math.isfinite(final[f"error/{name}"])
    assert (f"error/{name}, clean statistics" in final) == ("dual-bn" in options)
    assert (tmp_path / "r" / "best.pt").exists() == ("--val-size" in options)


def test_lam_0_takes_no_attack_and_ignores_its_options(tmp_path, monkeypatch):
    calls = []
    real = attacks.pgd
    monkeypatch.setattr(attacks, "pgd", lambda *a, **kw: calls.append(kw) or real(*a, **kw))
    train(tmp_path / "a", "--lam", "0", "--eps", "2")
    judged = [kw for kw in calls if "return_stats" not in kw]
    assert len(calls) == len(judged)
    train(tmp_path / "b", "--lam", "0", "--eps", "9", "--streams", "clean")
    assert same(weights(tmp_path / "a" / "last.pt"), weights(tmp_path / "b" / "last.pt"))


def test_streams_in_any_order():
    """lam belongs to adv wherever it stands, and the robust accuracy is that of adv."""
    assert options("--streams", "adv,clean", "--lam", "0.9").streams == ["clean", "adv"]
    assert options("--streams", "tda,adv,clean").streams == ["clean", "tda", "adv"]


def test_without_attacks_the_clean_error_chooses(tmp_path):
    """Under PGD such a network has nothing to compare: 0 % or noise, epoch after epoch."""
    train(tmp_path / "r", "--lam", "0", "--val-size", "30", "--epochs", "4",
          "--robust-images", "0")  # fmt: skip
    lines = [json.loads(line) for line in (tmp_path / "r" / "log.jsonl").read_text().splitlines()]
    errors = [x["eval"]["error"] for x in lines if "epoch" in x]
    chosen = run.load_checkpoint(tmp_path / "r" / "best.pt")
    assert len(errors) == 4 and chosen["metrics"]["error"] == min(errors)
    assert chosen["step"] == 2 * (1 + errors.index(min(errors)))


def test_log_has_what_was_measured(tmp_path):
    """The error of an epoch without an evaluation is not the one of an epoch before."""
    train(tmp_path / "r", "--eval-every", "2", "--robust-images", "0")
    text = (tmp_path / "r" / "log.jsonl").read_text().splitlines()
    rows = [x["eval"] for x in map(json.loads, text) if "epoch" in x]
    assert ["error" in row for row in rows] == [False, True]
    assert ["pgd_error" in row for row in rows] == [False, True]


@pytest.mark.parametrize(
    ("warmup", "wanted"),
    [
        ("1", [0, 1, 2, 3, 3, 3, 6, 6, 6]),
        ("0.67", [0, 1, 2, 3, 3, 3, 6, 6, 6]),
        ("0.4", [0, 1, 1, 3, 3, 3, 6, 6, 6]),
    ],
)
def test_warm_up_is_by_steps_under_both_schedules(tmp_path, monkeypatch, warmup, wanted):
    """By epochs the rate is that of the step at which the epoch began, after the warm-up."""
    seen = []
    real = nofrost.lr_at

    def spy(step, total, peak, warmup, hold):
        seen.append(real(step, total, peak, warmup, hold))
        spy.by_steps = [real(s, total, peak, warmup) for s in wanted]
        return seen[-1]

    monkeypatch.setattr(nofrost, "lr_at", spy)
    common = ("--lam", "0", "--epochs", "3", "--robust-images", "0")
    train(tmp_path / "r", *common, "--warmup", warmup, "--schedule", "epoch")
    assert seen == spy.by_steps


def test_imagenet_with_batchnorm_is_the_authors():
    """resnet50 in the place of nf_resnet50, and branches that start at zero."""
    args = nofrost.parse_args(["--dataset", "imagenet", "--norm", "bn"])
    assert args.arch == "resnet50"
    assert nofrost.parse_args(["--dataset", "imagenet"]).arch == "nf_resnet50"
    for norm in ("bn", "dual-bn", "gn"):
        kwargs = {"num_classes": 3, "image_size": 64}
        model = nofrost.build(norm, args, SimpleNamespace(model_kwargs=kwargs), "cpu")
        gains = [v for k, v in model.named_parameters() if "bn3" in k and k.endswith("weight")]
        assert len(gains) == (32 if norm == "dual-bn" else 16)
        assert all((v == (norm == "gn")).all() for v in gains)


def test_imagenet_s_nf_network_is_the_authors_beside_others():
    """--norms nf,bn trains resnet50 twice; the one without a normaliser starts as nf_resnet50."""
    kwargs = {"num_classes": 1000, "image_size": 224}
    starts = []
    for arch in ("resnet50", "nf_resnet50"):
        torch.manual_seed(0)
        starts.append(models.build(arch, "nf", **kwargs).state_dict())
    assert starts[0].keys() == starts[1].keys()
    assert all(torch.equal(value, starts[1][name]) for name, value in starts[0].items())


# --- the loss -------------------------------------------------------------------------------------


def options(*text):
    return nofrost.parse_args([*FAST, *text])


def test_mixture_by_hand():
    logits = {k: torch.randn(6, 10) for k in ("clean", "adv")}
    labels = {k: torch.arange(6) for k in logits}
    loss, terms = nofrost.objective(logits, labels, options("--lam", "0.3"))
    for name, z in logits.items():  # (1 - 0.1) NLL + 0.1 (-mean_k log p_k)
        log_p = F.log_softmax(z, 1)
        by_hand = -(0.9 * log_p[torch.arange(6), labels[name]] + 0.1 * log_p.mean(1)).mean()
        assert terms[name].item() == pytest.approx(by_hand.item(), rel=1e-6)
    assert loss.item() == pytest.approx((0.7 * terms["clean"] + 0.3 * terms["adv"]).item())


def test_streams_are_averaged():
    logits = {k: torch.randn(6, 10) for k in ("clean", "deepaug", "tda", "adv")}
    labels = {k: torch.arange(6) for k in logits}
    loss, terms = nofrost.objective(logits, labels, options())
    assert loss.item() == pytest.approx(sum(terms.values()).item() / 4)


def test_trades_by_hand():
    logits = {k: torch.randn(6, 10) for k in ("clean", "adv")}
    labels = {k: torch.arange(6) for k in logits}
    loss, _ = nofrost.objective(logits, labels, options("--loss", "trades", "--beta", "2"))
    p, q = (logits[k].softmax(1) for k in ("clean", "adv"))
    by_hand = (
        F.cross_entropy(logits["clean"], labels["clean"]) + 2 * (p * (p / q).log()).sum(1).mean()
    )
    assert loss.item() == pytest.approx(by_hand.item(), rel=1e-5)


@pytest.mark.parametrize("loss", ["mixture", "trades"])
def test_attack_raises_its_loss_within_the_ball(loss):
    args = options("--loss", loss, "--attack-steps", "5")
    model = models.build("resnet8", "nf")
    torch.nn.init.ones_(model.stages[0][0].conv2.gain)
    model.train()
    x, y = torch.rand(16, 3, 32, 32), torch.randint(10, (16,))
    precision = run.Precision("fp32", "cpu")
    x_adv, _ = nofrost.perturb(model, x, y, args, precision, 0)
    assert (x_adv.double() - x).abs().max() <= 8 / 255 and model.training
    noise = x + torch.randn(x.shape).sign() * 8 / 255
    images = {"x": x, "adv": x_adv, "noise": noise}
    logits = {k: run.predict(model, v) for k, v in images.items()}
    if loss == "trades":
        clean = F.log_softmax(logits["x"], 1)
        adv, other = (attacks.kl_loss(logits[k], clean) for k in ("adv", "noise"))
    else:
        adv, other = (F.cross_entropy(logits[k], y, reduction="none") for k in ("adv", "noise"))
    assert (adv > other).all()
    again, _ = nofrost.perturb(model, x, y, args, precision, 0)
    other, _ = nofrost.perturb(model, x, y, args, precision, 1)
    assert torch.equal(x_adv, again) and not torch.equal(x_adv, other)


def test_streams_share_or_divide_statistics():
    """bn: two batches, one set of statistics; dual-bn: one each; neither sees a joint batch."""
    x = {"clean": torch.rand(8, 3, 32, 32), "adv": torch.rand(8, 3, 32, 32) / 2}
    precision = run.Precision("fp32", "cpu")
    model = models.build("resnet8", "bn").train()
    nofrost.forward(model, x, "bn", options(), precision)
    assert model.bn1.num_batches_tracked == 2
    both = models.build("resnet8", "dual-bn").train()
    both.load_state_dict({k: v for k, v in both.state_dict().items()})
    nofrost.forward(both, x, "dual-bn", options(), precision)
    for part, image in ((both.bn1.clean, x["clean"]), (both.bn1.adversarial, x["adv"])):
        out = both.conv1(both.normalize(image))
        assert part.num_batches_tracked == 1
        assert torch.allclose(part.running_mean, 0.1 * out.mean((0, 2, 3)), atol=1e-5)


def test_without_batch_norm_one_forward_is_two():
    model = models.build("resnet8", "nf").eval()
    x = {"clean": torch.rand(4, 3, 32, 32), "adv": torch.rand(5, 3, 32, 32)}
    logits = nofrost.forward(model, x, "nf", options(), run.Precision("fp32", "cpu"))
    assert torch.allclose(logits["clean"], model(x["clean"]), atol=1e-6)
    assert torch.allclose(logits["adv"], model(x["adv"]), atol=1e-6)


def test_adaptive_clipping_by_hand():
    layer = torch.nn.Linear(3, 2)
    net = torch.nn.ModuleDict({"body": layer, "fc": torch.nn.Linear(2, 2)})
    net["fc"].weight.grad = torch.full((2, 2), 9.0)
    layer.weight.data = torch.tensor([[3.0, 4.0, 0.0], [0.0, 0.0, 0.0]])
    layer.bias.data = torch.tensor([3.0, 4.0])
    layer.weight.grad = torch.tensor([[6.0, 8.0, 0.0], [0.0, 1.0, 0.0]])
    layer.bias.grad = torch.tensor([0.03, 0.04])
    run.clip_adaptively(net, 0.02)
    assert (net["fc"].weight.grad == 9).all()
    # row 1: 10 > 0.02 * 5; row 2: 1 > 0.02 * 1e-3; bias: 0.05 < 0.02 * 5
    assert torch.allclose(layer.weight.grad, torch.tensor([[0.06, 0.08, 0], [0, 2e-5, 0]]))
    assert torch.equal(layer.bias.grad, torch.tensor([0.03, 0.04]))


def with_gradients(arch):
    """A network with dense, transposed, one-dimensional and fc parameters, and their gradients."""
    torch.manual_seed(1)
    net = models.build(arch, "nf").to(memory_format=torch.channels_last)
    net.turned = torch.nn.Linear(6, 5)
    net.turned.weight = torch.nn.Parameter(torch.randn(6, 5).t())
    for p in net.parameters():
        p.grad = torch.randn_like(p) * torch.rand(len(p)).view(-1, *[1] * (p.ndim - 1))
    return net


@pytest.mark.parametrize("together", [False, True])
def test_adaptive_clipping_as_written_out(together):
    """Unit by unit, to the last bits; gradients keep their layout. Some are clipped, some not."""
    net = with_gradients("resnet8")
    expected, clipped = {}, []
    for name, p in net.named_parameters():
        rows, weights = (v.double().flatten(1) if v.ndim > 1 else v.double()[None]
                         for v in (p.grad, p.detach()))  # fmt: skip
        out = rows.clone()
        for row, weight in zip(out, weights, strict=True):
            largest = 0.4 * max(weight.norm().item(), 1e-3)
            if row.norm() > largest and not name.startswith("fc."):
                row *= largest / row.norm()
                clipped.append(name)
        expected[name] = out.view(p.shape)
    strides = [p.grad.stride() for p in net.parameters() if p.ndim == 4]
    run.clip_adaptively(net, 0.4, together=together)
    for name, p in net.named_parameters():
        room = 4 * torch.finfo(torch.float32).eps * expected[name].abs().max()
        assert (p.grad.double() - expected[name]).abs().max() <= room, name
    assert strides == [p.grad.stride() for p in net.parameters() if p.ndim == 4]
    assert 0 < len(clipped) < sum(len(p) for p in net.parameters() if p.ndim > 1)


def test_adaptive_clipping_takes_no_more_kernels_in_a_deeper_network():
    counts = []
    for arch in ("resnet20", "resnet44"):
        net = with_gradients(arch)
        with Kernels() as kernels:
            run.clip_adaptively(net, 0.4, together=True)
        counts.append(kernels.count)
    assert 0 < counts[0] == counts[1]


class Kernels(TorchDispatchMode):
    """Counts operations on tensors, but for those that only make a view."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += not func.is_view
        return func(*args, **(kwargs or {}))


# --- texture debiasing ----------------------------------------------------------------------------


@pytest.mark.parametrize("turns", [-0.5, -0.2, 0.0, 0.13, 0.5])
def test_hue_is_torchvisions(turns):
    x = torch.cat([torch.rand(4, 3, 16, 16), torch.rand(1, 1, 16, 16).expand(1, 3, 16, 16)])
    x[0, :, 0, 0], x[0, :, 0, 1] = torch.tensor([1.0, 0.0, 1.0]), torch.tensor([0.5, 0.5, 0.2])
    expected = vision.adjust_hue(x, turns)
    assert torch.allclose(streams.turn_hue(x, torch.full((5, 1, 1), turns)), expected, atol=1e-5)


def test_debias_texture():
    x = torch.rand(400, 3, 8, 8)
    assert torch.allclose(streams.grey(x), vision.rgb_to_grayscale(x), atol=1e-6)
    out = data.debias_texture(x, run.generator("t"))
    assert torch.equal(out, data.debias_texture(x, run.generator("t")))
    assert out.min() >= 0 and out.max() <= 1
    kept = (out == x).flatten(1).all(1).float().mean()
    greyed = ((out.amax(1) - out.amin(1)).flatten(1).amax(1) < 1e-6).float().mean()
    # 0.5 are not chosen; of the others 0.2 keep their colours and 0.2 turn grey. 3 deviations.
    assert abs(kept - (0.5 + 0.5 * 0.2 * 0.8)) < 3 * (0.58 * 0.42 / 400) ** 0.5
    assert 0.02 < greyed < 0.2


def write_tree(folder, classes):
    from PIL import Image

    for i, name in enumerate(classes):
        (folder / name).mkdir(parents=True)
        for j in range(4):
            Image.new("RGB", (32, 32), (20 * i + j,) * 3).save(folder / name / f"{j}.png")


def test_deepaug_stream(tmp_path):
    write_tree(tmp_path / "deep", shapes.CLASSES)
    named = ["--streams", "clean,deepaug,tda,adv", "--deepaug-dir", str(tmp_path / "deep")]
    args, dataset = options(*named), data.load("shapes")
    images = streams.stream_images("deepaug", dataset, args.deepaug_dir)
    assert images.x.shape == (40, 3, 32, 32) and torch.equal(images.x[:, 0, 0, 0] // 20, images.y)
    assert streams.stream_images("tda", dataset) is dataset.train
    final = train(tmp_path / "r", *named, "--epochs", "1", "--robust-images", "0")
    assert math.isfinite(final["error/nf"])


@pytest.mark.parametrize("classes, word", [(["cat"], "cat"), ([], "no images")])
def test_deepaug_that_does_not_fit(tmp_path, classes, word):
    (tmp_path / "deep").mkdir()
    write_tree(tmp_path / "deep", classes)
    named = ["--streams", "clean,deepaug,adv", "--deepaug-dir", str(tmp_path / "deep")]
    with pytest.raises(UserError, match=word):
        train(tmp_path / "r", *named)
    assert not (tmp_path / "r").exists()


# --- recipe, guards, bad input --------------------------------------------------------------------


def test_recipe_of_the_authors(monkeypatch):
    monkeypatch.setattr(data, "NAMES", (*data.NAMES, "imagenet"))
    args = nofrost.parse_args(["--dataset", "imagenet"])
    expected = {
        "arch": "nf_resnet50", "norms": ["nf"], "epochs": 90, "batch_size": 256, "lr": 0.1,
        "momentum": 0.9, "weight_decay": 5e-5, "schedule": "epoch", "warmup": 0, "clip": 0,
        "dropout": 0.25, "drop_path": 0.1, "label_smoothing": 0.1, "lam": 0.5, "eps": 8,
        "attack_steps": 10, "alpha": None,
    }  # fmt: skip
    assert {k: getattr(args, k) for k in expected} == expected
    assert attacks.default_alpha(8, 10) == 1.0


def test_collapse_warns(tmp_path, monkeypatch, capsys):
    errors = iter([40.0, 75.0, 86.0, 94.0])
    found = lambda *a, **kw: {"pgd-10": next(errors)}  # noqa: E731
    monkeypatch.setattr(attacks, "robust_errors", found)
    train(tmp_path / "r", "--robust-images", "0")
    assert "fell from 60.0 to 25.0 %" in capsys.readouterr().out
    train(tmp_path / "near-chance", "--robust-images", "0")
    assert "fell" not in capsys.readouterr().out


def test_divergence_stops_and_keeps_the_last_good(tmp_path, monkeypatch):
    real, calls = nofrost.objective, []

    def objective(*args):
        calls.append(0)
        loss, terms = real(*args)
        return loss * (math.nan if len(calls) == 5 else 1), terms

    monkeypatch.setattr(nofrost, "objective", objective)
    with pytest.raises(run.Diverged, match=r"step 4 .*lr 0\..*gradient norm"):
        train(tmp_path / "r")
    checkpoint = run.load_checkpoint(tmp_path / "r" / "last.pt")
    assert checkpoint["step"] == 3
    assert all(v.isfinite().all() for v in checkpoint["model"].values())


@pytest.mark.parametrize("options, word", [
    (["--lam", "1.5"], "from 0"), (["--streams", "adv"], "clean, and any of"),
    (["--streams", "clean,clean"], "once"), (["--streams", "clean,blur"], "deepaug, tda, adv"),
    (["--streams", "clean,deepaug,adv"], "--deepaug-dir"), (["--eps", "0"], "above 0"),
    (["--loss", "trades", "--streams", "clean,tda,adv"], "no --streams"),
    (["--loss", "trades", "--norm", "dual-bn"], "no dual-bn"),
    (["--loss", "trades", "--lam", "0.9"], "trades has --beta"), (["--beta", "3"], "with --loss"),
    (["--streams", "clean,tda,adv", "--lam", "0.9"], "streams their mean"),
    (["--norm", "dual-bn", "--lam", "0"], "half of it is idle"),
    (["--norm", "dual-bn", "--streams", "clean"], "half of it is idle"),
    (["--norm", "l1"], "invalid choice: 'l1'"), (["--norms", "bn"], "give one of them"),
    (["--eps", "300"], "not in"), (["--eps", "99999", "--attack-norm", "l2"], "not in"),
    (["--arch", "allconv"], "there are resnet"), (["--arch", "nf_resnet50", "--norm", "bn"], "nf"),
    (["--arch", "allconv", "--norm", "none", "--drop-path", "0.1"], "no blocks"),
    (["--batch-size", "2", "--streams", "clean,tda,deepaug", "--deepaug-dir", "x"], "streams"),
])  # fmt: skip
def test_bad_options(tmp_path, options, word):
    with pytest.raises(UserError, match=word):
        train(tmp_path / "r", *options)
    assert not (tmp_path / "r").exists()


def test_error_is_one_line_and_status_2():
    done = subprocess.run(
        [sys.executable, nofrost.__file__, "--streams", "adv"], capture_output=True, text=True
    )
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "clean" in done.stderr


def test_eps_of_another_unit_is_a_warning(capsys):
    """8/255 given as 0.0314; without adversarial training eps has no effect."""
    nofrost.parse_args([*FAST, "--eps", "0.0314"])
    assert "warning: eps 0.0314 is in units of 1/255" in capsys.readouterr().out
    nofrost.parse_args([*FAST, "--eps", "0.0314", "--lam", "0"])
    nofrost.parse_args([*FAST, "--eps", "8"])
    assert "warning" not in capsys.readouterr().out
