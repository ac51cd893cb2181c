"""Why normalised features lean on low-variance ones: over-parameterised linear regression.

The setting is the Counterbalancing Teacher paper's (Taghanaki et al. 2022, arXiv 2207.01548): more
features than samples, training data fitted exactly by the solution of least norm. The paper's
abstract states the conclusion; definitions and formulas below are our derivation, not a quotation.

Solutions. X (n,d), y (n,), n < d. Standard deviations s_j of the features, D = diag(s).

    plain       theta = argmin ||theta||   subject to X theta = y          = X^+ y
    normalised  theta = argmin ||D theta|| subject to X theta = y          = D^-1 (X D^-1)^+ y

The second is the least-norm solution on features divided by s_j, written in the original features.
Without normalisation a coefficient costs theta_j^2 whatever its feature's scale, so the signal goes
to features with a large variance; with it the price is s_j^2 theta_j^2, the same for all features.

Share of the low-variance features L in the fitted values y = X theta:
    share = <y, X_L theta_L> / <y, y>.

Shift. At test time every feature of L (or every feature) gets independent noise of variance tau^2;
the expected squared error grows by tau^2 ||theta_L||^2 (or tau^2 ||theta||^2).

Two features (exact), x = (s1 z, s2 z), y = z, s1 > s2, L = {2}:
    plain       theta = (s1, s2) / (s1^2 + s2^2)   share s2^2 / (s1^2 + s2^2)
    normalised  theta = (1/s1, 1/s2) / 2           share 1/2
    growth of the error, normalised over plain: ((s1^2 + s2^2) / (2 s2^2))^2 -> (s1/s2)^4 / 4.

Many features (d >> n), x_j = s_j (rho z + sqrt(1 - rho^2) e_j), z and e_j standard normal, y = z;
s_j = s1 for d_H features and s2 for d_L. Then X X^T and X D^-2 X^T concentrate on their means and,
with
    S = sum_j w_j, S_L the same over L, Q = sum_j w_j^2 (w_j = s_j^2 plain, w_j = 1 normalised),
    q = n / (rho^2 n + 1 - rho^2),
    share = S_L / S,   ||theta_L||^2 = q sum_L (w_j / s_j)^2 / S^2,
    in-domain error = ((1 - rho^2) / (rho^2 n + 1 - rho^2))^2 + (1 - rho^2) q Q / S^2.
So normalisation averages over more features, which lowers the in-domain error. It pays for that
with coefficients of 1/s2 on the low-variance ones, and these raise the error under a shift.

    python eval/theory.py                 # two tables, a few seconds
    python eval/theory.py --sigma-low 0.03 --tau 0.05 --json theory.json
"""

import json
import statistics
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from common import run

RESULTS = Path(__file__).parent / "results"

SOLUTIONS = ("plain", "normalised")
QUANTITIES = {
    "share": "share of low-variance features (%)",
    "clean": "error, in domain",
    "low": "error, low-variance features shifted",
    "all": "error, all features shifted",
}


def parse_args(argv=None):
    parser = run.Parser(__file__, __doc__)
    parser.add_argument("--samples", type=run.positive(int), default=50, help="n")
    parser.add_argument("--features", type=run.positive(int), default=4000, help="d, above n")
    parser.add_argument(
        "--low", type=run.positive(int), help="low-variance features (default: d/2)"
    )
    parser.add_argument("--sigma-high", type=run.positive(float), default=1.0, help="s1")
    parser.add_argument("--sigma-low", type=run.positive(float), default=0.1, help="s2")
    parser.add_argument("--rho", type=run.positive(float), default=0.5, help="signal in a feature")
    parser.add_argument("--tau", type=run.nonnegative(float), default=2.0, help="size of the shift")
    parser.add_argument("--trials", type=run.positive(int), default=10, help="random draws")
    parser.add_argument("--seed", type=run.nonnegative(int), default=0, help="random seed")
    parser.add_argument("--json", metavar="FILE", help="write the numbers here")
    args = parser.parse_args(argv)
    args.low = args.low or max(args.features // 2, 1)
    if args.features <= args.samples:
        raise run.UserError(
            f"--features {args.features}: must exceed --samples {args.samples}, or nothing is "
            "over-parameterised"
        )
    if args.low >= args.features:
        raise run.UserError(f"--low {args.low}: must be below --features {args.features}")
    if args.sigma_low > args.sigma_high:
        raise run.UserError(f"--sigma-low {args.sigma_low}: above --sigma-high {args.sigma_high}")
    if args.rho > 1:
        raise run.UserError(f"--rho {args.rho}: a correlation, at most 1")
    return args


# --- numerical solutions ------------------------------------------------------------------------


def solve(x, y, sigma=None):
    """Least-norm theta (d,) with x theta = y, x (n,d); `sigma` (d,) normalises the features."""
    if sigma is None:
        return torch.linalg.pinv(x) @ y
    return torch.linalg.pinv(x / sigma) @ y / sigma


def low_share(x, y, theta, low):
    """<y, X_L theta_L> / <y, y>; low: indices of L."""
    return ((x[:, low] @ theta[low]) @ y / (y @ y)).item()


# --- two features -------------------------------------------------------------------------------


def two_features(sigma_high, sigma_low, tau=1.0):
    """Closed form: {solution: dict(theta, share, growth)} and the ratio of the growths."""
    total = sigma_high**2 + sigma_low**2
    thetas = {
        "plain": (sigma_high / total, sigma_low / total),
        "normalised": (0.5 / sigma_high, 0.5 / sigma_low),
    }
    result = {
        name: {"theta": theta, "share": theta[1] * sigma_low, "growth": (tau * theta[1]) ** 2}
        for name, theta in thetas.items()
    }
    result["ratio"] = (total / (2 * sigma_low**2)) ** 2
    return result


def two_features_numeric(sigma_high, sigma_low, tau=1.0, n=20, seed=0):
    """The same from data: x = (s1 z, s2 z) has rank one, so many solutions fit and one is least."""
    z = torch.randn(n, dtype=torch.float64, generator=run.generator(seed, "two features"))
    sigma = torch.tensor([sigma_high, sigma_low], dtype=torch.float64)
    x = z[:, None] * sigma
    result = {}
    for name, scale in (("plain", None), ("normalised", sigma)):
        theta = solve(x, z, scale)
        growth = (tau * theta[1]).square().item()
        share = low_share(x, z, theta, [1])
        result[name] = {"theta": tuple(theta.tolist()), "share": share, "growth": growth}
    result["ratio"] = result["normalised"]["growth"] / result["plain"]["growth"] if tau else None
    return result


# --- many features ------------------------------------------------------------------------------


def scales(args):
    """s_j (d,), the low-variance ones last, and their indices."""
    sigma = torch.full((args.features,), args.sigma_high, dtype=torch.float64)
    sigma[-args.low :] = args.sigma_low
    return sigma, torch.arange(args.features - args.low, args.features)


def draw(args, sigma, n, *key):
    """x (n,d) and y (n,) of the many-feature model."""
    g = run.generator(args.seed, "theory", *key)
    z = torch.randn(n, 1, dtype=torch.float64, generator=g)
    e = torch.randn(n, len(sigma), dtype=torch.float64, generator=g)
    return sigma * (args.rho * z + (1 - args.rho**2) ** 0.5 * e), z[:, 0]


def expected_error(args, theta, sigma, shifted=()):
    """E (y - x theta)^2 over new samples, features `shifted` carrying noise of variance tau^2."""
    weight = sigma * theta
    error = (1 - args.rho * weight.sum()) ** 2 + (1 - args.rho**2) * weight.square().sum()
    shifted = torch.tensor([int(k) for k in shifted], dtype=torch.int64)
    return (error + args.tau**2 * theta[shifted].square().sum()).item()


def measure(args, trial):
    """One random draw: {solution: {quantity: value}}."""
    sigma, low = scales(args)
    x, y = draw(args, sigma, args.samples, trial)
    result = {}
    for name, scale in (("plain", None), ("normalised", sigma)):
        theta = solve(x, y, scale)
        result[name] = {
            "share": 100 * low_share(x, y, theta, low),
            "clean": expected_error(args, theta, sigma),
            "low": expected_error(args, theta, sigma, low),
            "all": expected_error(args, theta, sigma, range(args.features)),
        }
    return result


def predict(args):
    """The closed form of the docstring for d >> n, in the shape of `measure`'s result."""
    sigma, low = scales(args)
    n, noise = args.samples, 1 - args.rho**2
    q = n / (args.rho**2 * n + noise)
    result = {}
    for name, w in (("plain", sigma.square()), ("normalised", torch.ones_like(sigma))):
        total = w.sum()
        theta2 = q * (w / sigma).square() / total**2  # E theta_j^2
        clean = (noise * q / n) ** 2 + noise * q * w.square().sum() / total**2
        result[name] = {
            "share": 100 * (w[low].sum() / total).item(),
            "clean": clean.item(),
            "low": (clean + args.tau**2 * theta2[low].sum()).item(),
            "all": (clean + args.tau**2 * theta2.sum()).item(),
        }
    return result


# --- the tables ---------------------------------------------------------------------------------


def in_networks():
    """A sentence from the study of eval/shortcut.py: who leans on such a feature in training."""
    ends = {}
    for row in json.loads((RESULTS / "shortcut_shapes.json").read_text())["rows"]:
        ends.setdefault(row["norm"], []).append(row["curve"][-1]["swapped"])
    bn, ln, nf = (statistics.mean(ends[norm]) for norm in ("bn", "ln", "nf"))
    return (
        "Trained networks on a faint grating that tells the class: once it is that of another\n"
        f"class, BatchNorm has {bn:.1f} % accuracy, LayerNorm {ln:.1f} %, NF without normaliser "
        f"{nf:.1f} %.\n"
        "The closed form speaks of the first; the last shows that it is not the only way."
    )


def main(args):
    """Print both tables; returns what --json writes."""
    target = run.try_file(args.json, "--json") if args.json else None

    two, rows = [], []
    for ratio in (1, 2, 5, 10, 30, 100):
        exact = two_features(1.0, 1 / ratio)
        data = two_features_numeric(1.0, 1 / ratio, seed=args.seed)
        shares = [100 * source[name]["share"] for name in SOLUTIONS for source in (exact, data)]
        two.append({"ratio": ratio, "closed_form": exact, "numeric": data})
        limit = ratio**4 / 4
        rows.append([ratio, *(format(s, ".3f") for s in shares)])
        rows[-1] += [format(v, ".6g") for v in (exact["ratio"], data["ratio"], limit)]
    header = ["s1/s2", "plain", "(data)", "normalised", "(data)", "growth", "(data)", "limit"]
    print("Two features: share of the low-variance one (%), and how many times more the")
    print("error grows with normalised features when it shifts; limit = (s1/s2)^4 / 4\n")
    print(run.table(rows, header))

    trials = [measure(args, trial) for trial in range(args.trials)]
    expected = predict(args)
    many, rows = {}, []
    for quantity, meaning in QUANTITIES.items():
        row = [meaning]
        for name in SOLUTIONS:
            values = torch.tensor([t[name][quantity] for t in trials], dtype=torch.float64)
            mean, sd = values.mean().item(), values.std(correction=0).item()
            many.setdefault(name, {})[quantity] = {
                "mean": mean,
                "sd": sd,
                "closed_form": expected[name][quantity],
            }
            row += [f"{mean:.4g} +- {sd:.2g}", format(expected[name][quantity], ".4g")]
        rows.append(row)
    low = args.low
    print(f"\n{args.features - low} features of standard deviation {args.sigma_high}, ", end="")
    print(f"{low} of {args.sigma_low}, {args.samples} samples,")
    print(f"shift of variance {args.tau}^2, mean +- sd of {args.trials} draws; E y^2 = 1\n")
    header = ["", "plain", "(formula)", "normalised", "(formula)"]
    print(run.table(rows, header, width=run.window()))

    plain, normalised = (100 * two[-1]["closed_form"][name]["share"] for name in SOLUTIONS)
    ratio = two[-1]["ratio"]
    print(f"\nWith s1/s2 = {ratio:g} the fit gives {plain:.2g} % to the low-variance feature, and")
    print(f"{normalised:.2g} % once features are normalised.\n{in_networks()}")

    options = {k: v for k, v in vars(args).items() if k != "json"}
    result = {"options": options, "two_features": two, "many_features": many}
    if target:
        command = " ".join(["python eval/theory.py", *sys.argv[1:]])
        run.write_json(target, {"command": command, **result, "versions": run.versions()})
    return result


if __name__ == "__main__":
    run.cli(main, parse_args)
