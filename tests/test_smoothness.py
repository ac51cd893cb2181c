"""eval/smoothness.py: each measure against a closed form, and the table of a pair."""

import importlib.util
import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from common import attacks, models, run
from common.run import UserError

SCRIPT = run.ROOT / "eval" / "smoothness.py"


def load_script():
    spec = importlib.util.spec_from_file_location("eval_smoothness", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


script = load_script()


def linear(classes=4, seed=0):
    """A linear classifier of 3x4x4 images, images well inside the box, its own labels."""
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Flatten(), nn.Linear(48, classes)).eval()
    x = torch.rand(6, 3, 4, 4) * 0.2 + 0.4
    return net, x, net(x).argmax(1)


def test_gradient_norms_by_hand():
    """dL/dx = W^T (p - e_y)."""
    net, x, y = linear()
    grad = (net(x).softmax(1) - F.one_hot(y, 4)) @ net[1].weight
    l1, l2 = script.gradient_norms(net, x, y)
    torch.testing.assert_close(l1, grad.abs().sum(1) / 255)
    torch.testing.assert_close(l2, grad.norm(dim=1))


def test_lipschitz_of_a_linear_network():
    """max over signs of ||W s||_1: enumerated for three inputs."""
    torch.manual_seed(1)
    net = nn.Sequential(nn.Flatten(), nn.Linear(3, 4)).eval()
    x = torch.full((5, 3, 1, 1), 0.5)
    signs = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0])] * 3)
    exact = (signs @ net[1].weight.T).abs().sum(1).max().item() / 255
    found = script.lipschitz(net, x, 8, 40, 0, torch.arange(5))
    assert (found <= exact * (1 + 1e-4)).all()
    assert found.max().item() == pytest.approx(exact, rel=1e-3)  # a start may end in another corner


def test_decision_margin_of_a_linear_network():
    """min over t of (z_y - z_t) / ||w_t - w_y||_1; 0 for what is misclassified."""
    net, x, y = linear()
    with torch.no_grad():
        z, w = net(x), net[1].weight
    gaps = [
        (z.gather(1, y[:, None])[:, 0] - z[:, t]) / (w[t] - w[y]).norm(1, dim=1) for t in range(4)
    ]
    exact = 255 * torch.stack(gaps, 1).scatter(1, y[:, None], torch.inf).min(1).values
    found = script.decision_margin(net, x, y, 10, 9).float()
    assert (found >= exact * (1 - 1e-4)).all() and (found <= exact * 1.005).all()
    wrong = (y + 1) % 4
    assert script.decision_margin(net, x, wrong, 3, 9).tolist() == [0] * 6
    rough = script.decision_margin(net, x, y, 10, 1).float()  # towards the likeliest class alone
    assert (rough >= found - 1e-4).all()


def test_spread_of_infinite_values():
    """The mean is of the finite ones; what JSON cannot hold is None."""
    found = script.spread(torch.tensor([1.0, 2.0, 3e-9, torch.inf, torch.inf]))
    assert found["mean"] == pytest.approx(1) and found["infinite"] == 2
    assert found["values"] == [1.0, 2.0, 3e-9, None, None]
    assert found["quantiles"]["0.25"] == 1 and found["quantiles"]["0.5"] == 2
    assert found["quantiles"]["0.95"] is None
    json.dumps(found, allow_nan=False)
    empty = script.spread(torch.full((2,), torch.inf))
    assert empty["mean"] is None and empty["infinite"] == 2


def test_two_runs_of_one_name(folder, capsys):
    checkpoint(folder / "other" / "bn" / "last.pt", "bn")
    paths = [str(folder / "bn"), str(folder / "other" / "bn")]
    options = [*paths, *QUICK, "--measures", "logits", "--data-dir", str(folder)]
    assert len(script.main(script.parse_args(options))["checkpoints"]) == 2
    text = capsys.readouterr().out
    assert next(line for line in text.splitlines() if line.split() == [f"{p}" for p in paths])


def test_logit_margin_by_hand():
    class Constant(nn.Module):
        def forward(self, x):
            return torch.tensor([[1.0, 4.0, 2.5], [1.0, 4.0, 2.5]])

    found = script.logit_margin(Constant(), torch.zeros(2, 3, 1, 1), torch.tensor([1, 0]))
    assert found.tolist() == [1.5, -3.0]


def test_hessians_of_a_linear_network():
    """In the image: W^T (diag p - p p^T) W; in the parameters: the mean over images of
    (diag p - p p^T) x (h h^T) with h = (x, 1). Both dense, by eigenvalues."""
    net, x, y = linear(3)
    with torch.no_grad():
        p, w = net(x).softmax(1).double(), net[1].weight.double()
    core = torch.diag_embed(p) - p[:, :, None] * p[:, None]
    exact = torch.linalg.eigvalsh(w.T @ core @ w)[:, -1]
    found = script.image_hessian(net, x, y, 100, 0, torch.arange(6))
    torch.testing.assert_close(found.double(), exact, rtol=1e-3, atol=1e-8)
    h = torch.cat([x.flatten(1), torch.ones(6, 1)], 1).double()
    blocks = [torch.kron(c, torch.outer(v, v)) for c, v in zip(core, h, strict=True)]
    exact = torch.linalg.eigvalsh(sum(blocks) / 6)[-1].item()
    for size in (6, 4):
        assert script.parameter_hessian(net, x, y, size, 100, 0) == pytest.approx(exact, rel=1e-3)
    assert all(p.grad is None and p.requires_grad for p in net.parameters())


def test_power_iteration_finds_a_negative_eigenvalue():
    matrix = torch.diag(torch.tensor([1.0, -5.0, 2.0]))
    found = script.power_iteration(lambda v: matrix @ v, torch.ones(3), 60, torch.dot)
    assert found.item() == pytest.approx(-5, rel=1e-5)


def test_surface_of_a_linear_network():
    """The centre is the loss itself; along the gradient it rises as cross-entropy of W(x + a s)."""
    net, x, y = linear()
    offsets, surface = script.loss_surface(net, x, y, 4, 5, 0)
    assert offsets.tolist() == [-8, -4, 0, 4, 8] and surface.shape == (5, 5)
    assert surface[2, 2].item() == pytest.approx(F.cross_entropy(net(x), y).item(), rel=1e-5)
    sign = script.input_gradient(net, x, y).sign()
    ahead = F.cross_entropy(net(x + 8 / 255 * sign), y).item()
    assert surface[4, 2].item() == pytest.approx(ahead, rel=1e-5)
    assert (surface[:, 2].diff() > 0).all()


def test_ligs_by_hand():
    """Of two classes dL/dx points along w_1 - w_0 everywhere: cosine 1. Of L = -log p with a
    gradient that turns with the point, the mean of the cosines at the same noise."""
    net, x, y = linear(2)
    found = script.ligs(net, x, y, 8, 3, 0, torch.arange(6))
    torch.testing.assert_close(found, torch.ones(6), rtol=1e-5, atol=1e-5)
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(48, 16), nn.Tanh(), nn.Linear(16, 4)).eval()
    with torch.no_grad():
        net[1].weight *= 10
    found = script.ligs(net, x, y, 32, 2, 0, torch.arange(6))
    expected = torch.zeros(6)
    for k in range(2):
        noise = attacks.start_noise(x, "linf", 0, torch.arange(6), "ligs", k)
        pair = [script.input_gradient(net, v, y) for v in (x, (x + 32 / 255 * noise).clamp(0, 1))]
        expected += F.cosine_similarity(*(g.flatten(1) for g in pair)) / 2
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert found.max() < 0.99


# --- the script -----------------------------------------------------------------------------------


def checkpoint(path, norm, classes=10):
    torch.manual_seed(0)
    model = models.build("resnet8", norm, num_classes=classes)
    nn.init.normal_(model.fc.weight)
    path.parent.mkdir(parents=True, exist_ok=True)
    state = model.spec | {"dataset": "cifar10", "model": model.state_dict(), "method": "ct"}
    run.save_checkpoint(path, state)


@pytest.fixture
def folder(tmp_path):
    rng = np.random.default_rng(0)
    x = rng.integers(256, size=(20, 32, 32, 3), dtype=np.uint8)
    y = np.arange(20) % 10
    np.savez(tmp_path / "cifar10.npz", x_train=x, y_train=y, x_test=x, y_test=y)
    for norm in ("bn", "none"):
        checkpoint(tmp_path / norm / "last.pt", norm)
    return tmp_path


QUICK = (
    "--limit 10 --fab-steps 2 --steps 4 --iterations 2 --surface-points 3 --targets 2 --device cpu"
).split()


def test_a_pair_side_by_side(folder, capsys):
    out = folder / "out.json"
    paths = [str(folder / norm) for norm in ("bn", "none")]
    options = [*paths, *QUICK, "--data-dir", str(folder), "--json", str(out)]
    result = script.main(script.parse_args(options))
    assert json.loads(out.read_text()) == result
    text = capsys.readouterr().out
    assert "nats per unit^2" in text and "decision margin, median (1/255)" in text
    header = next(line for line in text.splitlines() if line.split() == ["bn", "none"])
    assert header
    for entry in result["checkpoints"]:
        found = entry["measures"]
        assert set(found) == {
            "gradient l1", "gradient l2", "ligs", "lipschitz", "margin", "logit margin",
            "image hessian", "parameter hessian", "surface",
        }  # fmt: skip
        assert len(found["margin"]["values"]) == 10 and min(found["margin"]["values"]) >= 0
        values = sorted(found["logit margin"]["values"])
        median = (values[4] + values[5]) / 2
        assert found["logit margin"]["quantiles"]["0.5"] == pytest.approx(median, abs=1e-5)
        assert math.isfinite(found["parameter hessian"])
    first, second = (e["measures"] for e in result["checkpoints"])
    assert first["gradient l2"] != second["gradient l2"]
    svg = out.with_suffix(".svg").read_text()
    assert svg.count("<path") == 18 and svg.count('font-weight="bold"') == 2
    assert list((folder / "smoothness").glob("events*"))
    again = script.main(script.parse_args(options))
    assert again["checkpoints"] == result["checkpoints"]  # the seed decides


def test_some_measures(folder):
    options = [str(folder / "bn"), *QUICK, "--measures", "logits,gradient"]
    result = script.main(script.parse_args([*options, "--data-dir", str(folder)]))
    found = result["checkpoints"][0]["measures"]
    assert set(found) == {"logit margin", "gradient l1", "gradient l2"}
    assert (folder / "bn" / "last.smoothness.json").is_file()


def test_logits_that_are_not_finite(folder, capsys):
    """A table, valid JSON and a warning instead of a traceback, for every measure."""
    state = run.load_checkpoint(folder / "bn")
    state["model"]["fc.weight"][3] *= torch.nan
    run.save_checkpoint(folder / "bn" / "last.pt", state)
    options = [str(folder / "bn"), *QUICK, "--data-dir", str(folder)]
    result = script.main(script.parse_args(options))
    (entry,) = result["checkpoints"]
    assert entry["clean"]["error"] == 100 and "logits of 10 of 10 images" in entry["warnings"][0]
    assert "warning: bn: the logits of 10 of 10" in capsys.readouterr().out
    text = (folder / "bn" / "last.smoothness.json").read_text()
    assert "NaN" not in text and "Infinity" not in text and json.loads(text) == result


def test_results_of_other_settings_are_not_replaced(folder):
    options = [str(folder / "bn"), *QUICK, "--measures", "logits", "--data-dir", str(folder)]
    script.main(script.parse_args([*options, "--eps", "4"]))
    with pytest.raises(UserError, match=r"another eps \(4.0, now 0.03\): --overwrite"):
        script.main(script.parse_args([*options, "--eps", "0.03"]))
    again = script.main(script.parse_args([*options, "--eps", "0.03", "--overwrite"]))
    assert "--eps 7.65" in again["checkpoints"][0]["warnings"][0]
    (folder / "bn" / "last.smoothness.json").write_text("no json")
    with pytest.raises(UserError, match="is no results file"):
        script.main(script.parse_args(options))


def test_unwritable_json_is_known_before_the_work(folder, monkeypatch):
    monkeypatch.setattr(script, "measure", lambda *a: pytest.fail("a measure ran"))
    options = [str(folder / "bn"), *QUICK, "--data-dir", str(folder)]
    with pytest.raises(UserError, match="is a folder"):
        script.main(script.parse_args([*options, "--json", str(folder)]))
    (folder / "file").write_text("")
    with pytest.raises(UserError, match="give --tensorboard elsewhere"):
        script.main(script.parse_args([*options, "--tensorboard", str(folder / "file" / "x")]))


@pytest.mark.parametrize(
    "options, text",
    [
        (["--eps", "0"], "eps 0 is not in"),
        (["--eps", "300"], "eps 300 is not in"),
        (["--measures", "gradient,curvature"], "--measures curvature: choose from"),
        (["--limit", "21"], "there are only 20"),
        (["--arch", "resnet8"], "--arch goes with"),
    ],
)
def test_bad_options(folder, options, text):
    with pytest.raises(UserError, match=text):
        script.main(script.parse_args([str(folder / "bn"), "--data-dir", str(folder), *options]))


def test_classes_of_another_data_set(folder):
    checkpoint(folder / "c" / "last.pt", "bn", 7)
    with pytest.raises(UserError, match=r"cifar10 has 10 classes, last\.pt 7"):
        script.main(script.parse_args([str(folder / "c" / "last.pt"), "--data-dir", str(folder)]))
