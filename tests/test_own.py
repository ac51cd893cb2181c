"""Networks of the user's, named as FILE.py:NAME, in evaluations and trainings."""

import importlib.util
import json
import sys

import numpy as np
import pytest
import torch

from common import models, run
from common.models import evaluation
from common.run import UserError

SOURCE = """
import torch
from torch import nn
from beside import width

class Net(nn.Module):
    def __init__(self, num_classes=10):
        super().__init__()
        self.conv = nn.Conv2d(3, width, 3, stride=2, bias=False)
        self.bn = nn.BatchNorm2d(width)
        self.linear = nn.Linear(width, num_classes)

    def forward(self, x):
        return self.linear(self.bn(self.conv(x)).relu().mean((2, 3)))

class Pair(Net):
    def forward(self, x):
        return super().forward(x), x

class Dict(Net):
    def forward(self, x):
        return {"logits": super().forward(x)}

class Map(Net):
    def forward(self, x):
        return self.conv(x)

def with_norm(norm="bn"):
    net = Net()
    net.bn = {"bn": nn.BatchNorm2d, "none": lambda c: nn.Identity()}[norm](width)
    return net

def make():
    torch.manual_seed(5)
    return Net()

def needs(depth, width, k=1):
    return Net()

def fails():
    return Net() + 1

def number():
    return 3

def leaves():
    raise SystemExit(3)

def keyword(*, depth):
    return Net()

class Flat(Net):
    def forward(self, x):
        return super().forward(x)[:, 0]

class Summed(Net):
    def forward(self, x):
        return super().forward(x).sum(0, keepdim=True)

class Nothing(Net):
    def forward(self, x):
        return None

class NoKey(Net):
    def forward(self, x):
        return {"out": super().forward(x)}

class Detached(Net):
    def forward(self, x):
        return super().forward(x).detach()

def for_224():
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * 224 * 224, 10))

complete = make()
constant = 7
"""


def load_script(name):
    path = run.ROOT / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name.replace("/", "_"), path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A data directory with a small cifar10.npz, and my.py with what lies beside it."""
    rng = np.random.default_rng(0)
    x = rng.integers(256, size=(60, 32, 32, 3), dtype=np.uint8)
    y = np.arange(60) % 10
    np.savez(tmp_path / "cifar10.npz", x_train=x, y_train=y, x_test=x[:20], y_test=y[:20])
    (tmp_path / "my.py").write_text(SOURCE)
    (tmp_path / "beside.py").write_text("width = 6\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    yield tmp_path
    sys.modules.pop("beside", None)


def networks(folder, *words):
    """`for_evaluation` of a command line."""
    parser = run.Parser(__file__, "")
    evaluation.add_arguments(parser)
    return models.for_evaluation(parser.parse_args(list(map(str, words))), torch.device("cpu"))


def test_a_function_of_the_users(folder):
    """The network complete, as CHECKPOINT and as --arch; the results go beside the file."""
    name = f"{folder}/my.py:make"
    x = torch.rand(4, 3, 32, 32)
    outputs = []
    for words in ([name], ["--arch", name]):
        found, dataset = networks(folder, *words, "--dataset", "cifar10")
        ((label, model, facts),) = found
        assert (label, dataset) == ("my:make", "cifar10") and not model.training
        assert facts["num_classes"] == 10 and facts["method"] == "own"
        assert str(models.place_of(facts)) == f"{folder}/my-make"
        outputs.append(model(x))
    assert torch.equal(*outputs)
    model = networks(folder, f"{folder}/my.py:complete", "--dataset", "cifar10")[0][0][1]
    assert torch.equal(model(x), outputs[0])


@pytest.mark.parametrize("name", ["Net", "Pair", "Dict"])
def test_outputs_of_three_kinds(folder, name):
    """A tensor, a tuple that begins with the logits, a dict; with --mean and --std and without."""
    torch.manual_seed(1)
    spec = importlib.util.spec_from_file_location("theirs", folder / "my.py")
    theirs = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(theirs)
    net = theirs.Net().eval()
    torch.save({"state_dict": {f"module.{k}": v for k, v in net.state_dict().items()}},
               folder / "w.pt")  # fmt: skip
    words = ["--arch", f"{folder}/my.py:{name}", "--dataset", "cifar10"]
    x = torch.rand(4, 3, 32, 32)
    for statistics in ([], ["--mean", "0.4,0.5,0.6", "--std", "0.2,0.3,0.4"]):
        by_option = networks(folder, *words, "--weights", folder / "w.pt", *statistics)[0][0]
        label, model, _ = networks(folder, folder / "w.pt", *words, *statistics)[0][0]
        seen = x
        if statistics:
            seen = (x - torch.tensor([0.4, 0.5, 0.6]).view(3, 1, 1)) / torch.tensor(
                [0.2, 0.3, 0.4]
            ).view(3, 1, 1)
        assert label == "w" and torch.equal(model(x), by_option[1](x))
        torch.testing.assert_close(model(x), net(seen))
        assert torch.equal(run.predict(model, x), model(x))
    with pytest.raises(UserError, match="--mean and --std go together"):
        networks(folder, folder / "w.pt", *words, "--mean", "0.5,0.5,0.5")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("my.py:none", r"my\.py does not define none; it defines .*Net.*make"),
        ("my.py:needs", r"my\.py:needs needs arguments \(depth, width\): give them defaults"),
        ("my.py:constant", r"is a int; name a function or a class"),
        ("my.py:number", "gives a int; it has to give a torch.nn.Module"),
        ("my.py:fails", r"my\.py, line 41: fails: TypeError: unsupported operand"),
        ("my.py:leaves", r"my\.py, line 47: leaves: SystemExit: 3"),
        ("my.py:keyword", r"my\.py:keyword needs arguments \(depth\): give them defaults"),
        ("my.py:Flat", r"my\.py:Flat: the model returned \(2,\) where logits"),
        ("my.py:Summed", r"of 2 images it gives \(1, 10\), where logits \(2, 10\) are needed"),
        ("my.py:Nothing", r"my\.py:Nothing: the model returned NoneType where logits"),
        ("my.py:NoKey", r"my\.py:NoKey: .* or a dict with the key"),
        ("my.py:Map", r"my\.py:Map: the model returned \(2, 6, 15, 15\) where logits"),
        ("my.py:for_224", r"on images \(2, 3, 32, 32\): RuntimeError"),
        ("no.py:make", r"no\.py: no such file"),
        ("broken.py:make", r"broken\.py, line 2: SyntaxError"),
        ("imports.py:make", r"imports\.py, line 1: ModuleNotFoundError: No module named"),
    ],
)
def test_what_is_wrong_with_the_file(folder, name, message):
    (folder / "broken.py").write_text("x = 1\ndef (:\n")
    (folder / "imports.py").write_text("import not_there_at_all\n")
    with pytest.raises(UserError, match=message) as caught:
        networks(folder, f"{folder}/{name}", "--dataset", "cifar10")
    assert "\n" not in str(caught.value)


def test_weights_of_another_network_are_refused(folder):
    torch.save({"conv.weight": torch.zeros(1)}, folder / "w.pt")
    words = ["--arch", f"{folder}/my.py:make", "--dataset", "cifar10"]
    with pytest.raises(UserError, match=r"the state_dict is no .*my\.py:make: .* entries differ"):
        networks(folder, folder / "w.pt", *words)
    with pytest.raises(UserError, match="goes with --dataset"):
        networks(folder, f"{folder}/my.py:make")
    with pytest.raises(UserError, match="a checkpoint is required"):
        networks(folder)


def test_every_evaluation_takes_it(folder):
    """Corruptions, attacks and smoothness of the same network, each with results of its own."""
    network = [f"{folder}/my.py:Dict", "--dataset", "cifar10", "--data-dir", str(folder)]
    more = {
        "corruptions": ["--corruptions", "fog", "--severities", "1", "--adapt", "4"],
        "adversarial": ["--attacks", "fgsm"],
        "smoothness": ["--measures", "gradient,logits", "--limit", "10"],
    }
    for name, options in more.items():
        script = load_script(f"eval/{name}")
        script.main(script.parse_args([*network, *options, "--device", "cpu"]))
        assert json.loads((folder / f"my-Dict.{name}.json").read_text())["dataset"] == "cifar10"


@pytest.mark.parametrize(
    ("name", "options"),
    [("adversarial", ["--attacks", "fgsm"]), ("smoothness", ["--measures", "hessian"])],
)
def test_an_output_without_a_gradient(folder, name, options):
    """One line before any work; the logits alone can be looked at."""
    script = load_script(f"eval/{name}")
    network = [f"{folder}/my.py:Detached", "--dataset", "cifar10", "--data-dir", str(folder)]
    with pytest.raises(UserError, match="detaches its output from its input"):
        script.main(script.parse_args([*network, *options, "--limit", "10", "--device", "cpu"]))
    if name == "smoothness":
        more = ["--measures", "logits", "--limit", "10", "--device", "cpu"]
        assert script.main(script.parse_args([*network, *more]))["images"] == 10


@pytest.mark.parametrize("classes", [1, 7])
def test_another_number_of_classes(folder, classes):
    source = f"from my import Net\ndef make():\n    return Net({classes})\n"
    (folder / "other.py").write_text(source)
    network = [f"{folder}/other.py:make", "--dataset", "cifar10", "--data-dir", str(folder)]
    for name in ("corruptions", "adversarial", "smoothness"):
        script = load_script(f"eval/{name}")
        with pytest.raises(UserError, match=rf"cifar10 has 10 classes, .*other.* {classes}"):
            script.main(script.parse_args([*network, "--device", "cpu"]))


@pytest.mark.parametrize("text", ["1.5", "-0.1", "0,0", "nan", "0,inf", "x", "", "0,,1"])
def test_gamma_outside_the_unit_interval(text):
    for name in ("corruptions", "adversarial"):
        script = load_script(f"eval/{name}")
        with pytest.raises((UserError, SystemExit)) as caught:
            script.parse_args(["a.pt", "--gamma", text])
        code = caught.value.code if isinstance(caught.value, SystemExit) else 2
        assert code == 2


def test_training_and_its_checkpoint(folder, monkeypatch, capsys):
    """ct.py trains it; the checkpoint is evaluated where --arch names the file, and only there."""
    monkeypatch.chdir(folder)
    ct = load_script("ct")
    options = "--dataset cifar10 --data-dir . --lam 1 --norm bn --epochs 1 --teacher-epochs 1 "
    options += "--batch-size 20 --corrupted-images 0 --no-baseline --device cpu --precision fp32"
    ct.main(ct.parse_args(["--arch", "my.py:with_norm", *options.split()]))
    (path,) = folder.glob("runs/*/last.pt")
    assert "my-with_norm" in path.parent.name
    with pytest.raises(UserError, match=r"name it with --arch my\.py:with_norm"):
        networks(folder, path)
    label, model, facts = networks(folder, path, "--arch", "my.py:with_norm")[0][0]
    assert label == path.parent.name and facts["dataset"] == "cifar10"
    saved = torch.load(path, weights_only=True)["model"]
    assert torch.equal(model.net.conv.weight, saved["net.conv.weight"])
    logits, h = model(torch.rand(2, 3, 32, 32), with_features=True)
    assert h.shape == (2, 6) and torch.equal(model.head(h), logits)


def test_norms_of_a_users_network(folder):
    """NAME gets the norm where it has a parameter for it; another one than bn needs that."""
    name = f"{folder}/my.py"
    plain = models.build(f"{name}:with_norm", "none", 10)
    assert not models.batch_norms(plain) and models.batch_norms(models.build(f"{name}:with_norm"))
    assert models.build(f"{name}:Net", "bn", 7).spec["num_classes"] == 7
    with pytest.raises(UserError, match="cannot be built with norm none: give it a parameter norm"):
        models.build(f"{name}:Net", "none", 10)
    with pytest.raises(UserError, match=r"it gives \(2, 10\), where logits \(2, 7\)"):
        models.build(f"{name}:make", "bn", 7)


def test_safetensors_are_refused_with_the_line_that_converts(tmp_path):
    (tmp_path / "w.safetensors").write_bytes(b"x")
    with pytest.raises(UserError, match=r"python -c .*load_file\('w\.safetensors'\), 'w\.pt'\)"):
        run.load_checkpoint(tmp_path / "w.safetensors", foreign=True)
