"""Over-parameterised regression: closed forms against fp64 pseudo-inverses, and the claims."""

import json

import pytest
import torch

from common.run import UserError
from eval import theory


def options(*argv):
    return theory.parse_args(list(argv))


@pytest.mark.parametrize("ratio", [1.5, 4, 20])
def test_two_features_closed_form(ratio):
    exact = theory.two_features(2.0, 2 / ratio, 0.3)
    data = theory.two_features_numeric(2.0, 2 / ratio, 0.3)
    for name in theory.SOLUTIONS:
        for key in ("theta", "share", "growth"):
            assert data[name][key] == pytest.approx(exact[name][key], rel=1e-9), (name, key)
    assert data["ratio"] == pytest.approx(exact["ratio"], rel=1e-9)
    assert exact["plain"]["share"] < exact["normalised"]["share"] == 0.5


def test_growth_tends_to_a_quarter_of_the_fourth_power():
    for ratio, tolerance in ((10, 0.03), (100, 3e-4), (1000, 3e-6)):
        assert theory.two_features(1, 1 / ratio)["ratio"] == pytest.approx(ratio**4 / 4, tolerance)


def test_the_error_grows_by_as_much_as_stated():
    """Monte Carlo over the shift, not only tau^2 theta_2^2 again."""
    exact = theory.two_features(1.0, 0.25, tau=0.5)
    g = torch.Generator().manual_seed(0)
    z, noise = torch.randn(2, 400_000, dtype=torch.float64, generator=g)
    for name in theory.SOLUTIONS:
        one, two = exact[name]["theta"]
        predicted = one * z + two * (0.25 * z + 0.5 * noise)
        growth = (predicted - z).square().mean().item()
        assert growth == pytest.approx(exact[name]["growth"], rel=0.02)


def test_solutions_interpolate_and_are_least():
    g = torch.Generator().manual_seed(1)
    x = torch.randn(8, 30, dtype=torch.float64, generator=g)
    y = torch.randn(8, dtype=torch.float64, generator=g)
    sigma = torch.rand(30, dtype=torch.float64, generator=g) + 0.1
    plain, normalised = theory.solve(x, y), theory.solve(x, y, sigma)
    null = torch.linalg.svd(x).Vh[8:]  # directions that do not change the fit
    for theta, weight in ((plain, torch.ones(30)), (normalised, sigma)):
        torch.testing.assert_close(x @ theta, y)
        # first-order condition of min ||weight theta||^2 along the null space of x
        gradient = null @ (weight**2 * theta)
        assert gradient.abs().max() < 1e-10
    # lstsq on the normalised features is an independent route to the same solution
    route = torch.linalg.lstsq(x / sigma, y[:, None], driver="gelsd").solution[:, 0] / sigma
    torch.testing.assert_close(normalised, route)
    kernel = x / sigma**2 @ x.T
    torch.testing.assert_close(normalised, x.T @ torch.linalg.solve(kernel, y) / sigma**2)


@pytest.mark.parametrize("argv", [(), ("--low", "1000", "--sigma-low", "0.3", "--rho", "0.8")])
def test_many_features_agree_with_the_formula(argv):
    args = options("--samples", "40", "--features", "6000", "--trials", "4", *argv)
    expected = theory.predict(args)
    trials = [theory.measure(args, trial) for trial in range(args.trials)]
    for name in theory.SOLUTIONS:
        for quantity, tolerance in (("share", 0.05), ("low", 0.35), ("all", 0.2)):
            mean = sum(t[name][quantity] for t in trials) / len(trials)
            assert mean == pytest.approx(expected[name][quantity], rel=tolerance), (name, quantity)


def test_normalising_leans_on_low_variance_features_and_pays_when_they_shift():
    args = options("--features", "2000", "--trials", "3")
    for trial in range(3):
        result = theory.measure(args, trial)
        plain, normalised = result["plain"], result["normalised"]
        assert normalised["share"] > 20 * plain["share"]
        assert normalised["low"] > 10 * plain["low"]
        assert normalised["clean"] < 1.1 * plain["clean"]


def test_expected_error_against_samples():
    args = options("--samples", "20", "--features", "200")
    sigma, low = theory.scales(args)
    x, y = theory.draw(args, sigma, args.samples, "train")
    theta = theory.solve(x, y, sigma)
    x, y = theory.draw(args, sigma, 20_000, "test")
    noise = torch.randn(x.shape, dtype=x.dtype, generator=torch.Generator().manual_seed(0))
    error = (x @ theta - y).square().mean().item()
    assert error == pytest.approx(theory.expected_error(args, theta, sigma), rel=0.05)
    x[:, low] += args.tau * noise[:, low]
    error = (x @ theta - y).square().mean().item()
    assert error == pytest.approx(theory.expected_error(args, theta, sigma, low), rel=0.05)


def test_main_prints_returns_and_writes(tmp_path, capsys):
    file = tmp_path / "theory.json"
    argv = ("--features", "300", "--trials", "2", "--json", str(file))
    result = theory.main(options(*argv))
    assert result == theory.main(options(*argv))  # --seed decides everything
    text = capsys.readouterr().out
    assert "limit" in text and "share of low-variance features" in text
    written = json.loads(file.read_text())
    assert written["many_features"] == result["many_features"]
    assert {"command", "versions", "options"} <= written.keys()


@pytest.mark.parametrize(
    "argv",
    [
        ("--features", "50"),
        ("--low", "4000"),
        ("--sigma-low", "2"),
        ("--rho", "1.5"),
        ("--json", "."),
        ("--json", "/dev/null/x.json"),
    ],
)
def test_bad_input(argv, monkeypatch):
    monkeypatch.setattr(theory, "two_features_numeric", lambda *a, **k: pytest.fail("work began"))
    with pytest.raises(UserError, match=argv[0]):
        theory.main(options(*argv))


def test_few_shifted_features():
    """So few that a list of their numbers would index several dimensions of a tensor."""
    args = options("--features", "60", "--low", "3", "--tau", "2")
    theta = torch.arange(60, dtype=torch.float64)
    sigma = torch.zeros(60, dtype=torch.float64)
    shifted = torch.arange(57, 60)
    expected = 1 + 4 * (57**2 + 58**2 + 59**2)
    assert theory.expected_error(args, theta, sigma, shifted) == expected
    theory.main(args)


def test_the_last_sentence_is_made_of_the_study():
    words = theory.in_networks()
    assert "BatchNorm has 4.2 % accuracy, LayerNorm 88.3 %, NF without normaliser 0.0 %" in words
