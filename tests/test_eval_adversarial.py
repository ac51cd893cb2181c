"""eval/adversarial.py: the table, the second look at every image, resuming, warnings, mistakes."""

import importlib.util
import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import nn

from common import attacks, data, models, run
from common.run import UserError

SCRIPT = run.ROOT / "eval" / "adversarial.py"


def load_script():
    spec = importlib.util.spec_from_file_location("eval_adversarial", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


script = load_script()


def checkpoint(path, seed=0, norm="bn", dataset="cifar10", classes=10):
    torch.manual_seed(seed)
    model = models.build("resnet8", norm, num_classes=classes)
    with torch.no_grad():
        model.fc.weight *= 20  # confident, so that some images withstand
    state = model.spec | {"dataset": dataset, "model": model.state_dict()}
    path.parent.mkdir(parents=True, exist_ok=True)
    run.save_checkpoint(path, state | {"method": "ct", "args": {"seed": seed, "out": "/x"}})
    return model.eval()


@pytest.fixture
def folder(tmp_path):
    """cifar10.npz with 16 test images, 14 of them labelled as the network r/last.pt sees them."""
    model = checkpoint(tmp_path / "r" / "last.pt")
    rng = np.random.default_rng(0)
    x = rng.integers(256, size=(30, 4, 4, 3), dtype=np.uint8).repeat(8, 1).repeat(8, 2)
    y = np.arange(30) % 10
    y[:14] = run.predict(model, torch.from_numpy(x[:14]).permute(0, 3, 1, 2)).argmax(1)
    y[14:16] = (
        run.predict(model, torch.from_numpy(x[14:16]).permute(0, 3, 1, 2)).argmin(1)
    ).numpy()
    np.savez(
        tmp_path / "cifar10.npz",
        x_train=x,
        y_train=np.arange(30) % 10,
        x_test=x[:16],
        y_test=y[:16],
    )
    return tmp_path


def arguments(folder, *options):
    out = ["--data-dir", folder, "--json", folder / "out.json", "--device", "cpu"]
    paths = [] if options and str(options[0]).endswith(".pt") else [folder / "r" / "last.pt"]
    return script.parse_args([str(v) for v in [*paths, *options, *out]])


def evaluate(folder, *options):
    result = script.main(arguments(folder, *options))
    assert json.loads((folder / "out.json").read_text()) == result
    return result


def without_times(result):
    for entry in result["checkpoints"]:
        for facts in entry["runs"].values():
            facts.pop("seconds")
            assert facts.pop("cpu_seconds") >= 0
    return {k: v for k, v in result.items() if k != "command"}


# --- numbers --------------------------------------------------------------------------------------


def test_rows_are_those_of_the_attacks(folder, capsys):
    """Each row equals the attack on the images that are right; the worst is their union."""
    names = ["fgsm", "pgd-3", "apgd-ce-5"]
    args = ("--attacks", ",".join(names), "--eps", "0.6", "--save", folder / "adv.pt")
    result = evaluate(folder, *args)
    entry = result["checkpoints"][0]
    model = models.from_checkpoint(run.load_checkpoint(folder / "r"))
    x, y = data.load("cifar10", folder).test
    right = (run.predict(model, x).argmax(1) == y).nonzero()[:, 0]
    assert entry["accuracy"]["clean"] == 100 * len(right) / 16 == 87.5
    robust = torch.ones(len(right), dtype=torch.bool)
    for name in names:
        adv, fooled, _ = attacks.attack(model, x[right], y[right], name, 0.6, index=right)
        assert entry["accuracy"][name] == 100 * int((~fooled).sum()) / 16
        robust &= ~fooled
        saved = run.load_checkpoint(folder / "adv.pt", foreign=True)["networks"]["r"][name]
        assert torch.equal(saved["rows"], right[fooled])
        assert torch.equal(saved["images"], adv[fooled])
    assert 0 < robust.sum() < len(right)
    assert entry["accuracy"]["worst of all"] == 100 * int(robust.sum()) / 16
    assert entry["largest_perturbation"] == pytest.approx(0.6, abs=1e-6) and entry["nan"] == 0
    assert "out" not in entry["options"]
    text = capsys.readouterr().out
    assert "largest perturbation 0.6/255, 0 NaN, values 0" in text and "seed 0, fp32" in text
    assert not (folder / "out.json.state").exists()
    events = list((folder / "adversarial").glob("events*"))
    assert len(events) == 1 and b"strongest/r" in events[0].read_bytes()


def test_standard_is_a_cascade(folder, monkeypatch):
    """The four attacks in order, each on what the one before left standing, with K-1 targets."""
    seen = []
    original = attacks.attack

    def short(model, x, y, name, eps, norm, seed, index, *rest):
        seen.append((name, index.tolist()))
        quick = {
            "apgd-ce": "apgd-ce-4",
            "apgd-t": "apgd-t-4",
            "fab-t": "fab-t-4",
            "square": "square-30",
        }
        return original(model, x, y, quick[name], eps, norm, seed, index, *rest)

    monkeypatch.setattr(attacks, "attack", short)
    result = evaluate(folder, "--eps", "0.3", "--batch-size", "5")
    accuracy = result["checkpoints"][0]["accuracy"]
    rows = [f"AutoAttack: {name}" for name in attacks.STANDARD]
    assert list(accuracy) == ["clean", *rows, "worst of all"]
    values = [accuracy[row] for row in ["clean", *rows]]
    assert values == sorted(values, reverse=True) and values[0] > values[-1] > 0
    assert accuracy["worst of all"] == values[-1]
    for k, name in enumerate(attacks.STANDARD):
        asked = [i for n, index in seen if n == name for i in index]
        assert len(asked) == len(set(asked)) == round(values[k] * 16 / 100)
        assert all(len(index) <= 5 for n, index in seen if n == name)


def test_side_by_side_and_bf16(folder, capsys):
    checkpoint(folder / "b" / "baseline.pt", 1, "none")
    options = ("--attacks", "apgd-ce-3", "--precision", "bf16", "--norm", "l2", "--eps", "20")
    result = evaluate(folder, folder / "r" / "last.pt", folder / "b" / "baseline.pt", *options)
    assert [c["norm"] for c in result["checkpoints"]] == ["bn", "none"]
    assert result["norm"] == "l2" and result["precision"] == "bf16"
    text = capsys.readouterr().out
    assert "b/baseline" in text and "worst" not in text
    header = next(line for line in text.splitlines() if line.startswith("accuracy"))
    assert header.split() == ["accuracy", "r", "b/baseline"]


def test_table_over_seeds(folder):
    """eval/tables.py: mean and standard deviation of each attack's accuracy over the seeds."""
    spec = importlib.util.spec_from_file_location("eval_tables", SCRIPT.with_name("tables.py"))
    tables = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tables)
    checkpoint(folder / "s1" / "last.pt", 1)
    paths = folder / "r" / "last.pt", folder / "s1" / "last.pt"
    result = evaluate(folder, *paths, "--attacks", "fgsm,bim-2", "--eps", "0.3")
    (row,) = tables.main(tables.parse_args([str(folder / "out.json")])).values()
    a, b = (entry["accuracy"]["bim-2"] for entry in result["checkpoints"])
    assert row["bim-2"] == f"{(a + b) / 2:.2f} +- {abs(a - b) / 2**0.5:.2f}" and row["n"] == 2
    assert list(row) == ["clean", "fgsm", "bim-2", "worst of all", "n"]


def test_foreign_network(folder):
    """The state_dict of another project, by --arch and its normalisation, scores the same."""
    state = run.load_checkpoint(folder / "r")["model"]
    torch.save({k: v for k, v in state.items() if "normalize" not in k}, folder / "other.pt")
    own = evaluate(folder, "--attacks", "fgsm", "--eps", "1")
    half = "0.5,0.5,0.5"
    options = ("--arch", "resnet8", "--dataset", "cifar10", "--mean", half, "--std", half)
    other = evaluate(folder, folder / "other.pt", *options, "--attacks", "fgsm", "--eps", "1")
    assert own["checkpoints"][0]["accuracy"] == other["checkpoints"][0]["accuracy"]


def test_torchvision_by_name(monkeypatch, tmp_path):
    """Weights from the cache, normalisation inside; a name or a file that is not there."""
    import torchvision

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    with pytest.raises(UserError, match="put https"):
        models.from_torchvision("mobilenet_v3_small")
    with pytest.raises(UserError, match="has no weights"):
        models.from_torchvision("resnet51")
    net = torchvision.models.mobilenet_v3_small().eval()
    weights = torchvision.models.get_model_weights("mobilenet_v3_small").IMAGENET1K_V1
    (tmp_path / "checkpoints").mkdir()
    torch.save(net.state_dict(), tmp_path / "checkpoints" / weights.url.rpartition("/")[2])
    model = models.from_torchvision("mobilenet_v3_small")
    assert model.spec["num_classes"] == 1000 and model.spec["image_size"] == 224
    x = torch.rand(2, 3, 224, 224)
    mean = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
    std = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    torch.testing.assert_close(model(x), net((x - mean) / std))


# --- resuming -------------------------------------------------------------------------------------

OPTIONS = ("--attacks", "pgd-2,apgd-ce-4,square-20", "--eps", "0.6", "--batch-size", "5")


def interrupt(folder, monkeypatch, after):
    """Evaluate and press Ctrl-C after so many batches."""
    original, calls = attacks.attack, [0]

    def stopping(*args, **options):
        if calls[0] == after:
            raise KeyboardInterrupt
        calls[0] += 1
        return original(*args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(attacks, "attack", stopping)
        with pytest.raises(KeyboardInterrupt):
            evaluate(folder, *OPTIONS)


@pytest.mark.parametrize("after", [1, 5])
def test_resume_is_exact(folder, monkeypatch, after):
    """Table and images equal those of an uninterrupted run bit for bit; nothing is done twice."""
    whole = without_times(evaluate(folder, *OPTIONS, "--save", folder / "whole.pt"))
    interrupt(folder, monkeypatch, after)
    assert len(list((folder / "out.json.state").glob("*.pt"))) == after
    original, calls = attacks.attack, [0]

    def counting(*args, **options):
        calls[0] += 1
        return original(*args, **options)

    monkeypatch.setattr(attacks, "attack", counting)
    resumed = without_times(evaluate(folder, *OPTIONS, "--resume", "--save", folder / "resumed.pt"))
    assert resumed == whole and calls[0] == 9 - after
    saved = [run.load_checkpoint(folder / f"{n}.pt", foreign=True) for n in ("whole", "resumed")]
    for row in ("pgd-2", "apgd-ce-4", "square-20"):
        a, b = (s["networks"]["r"][row] for s in saved)
        assert torch.equal(a["rows"], b["rows"]) and torch.equal(a["images"], b["images"])
    assert not (folder / "out.json.state").exists()


def test_resume_refuses_what_differs(folder, monkeypatch):
    interrupt(folder, monkeypatch, 2)
    with pytest.raises(UserError, match="unfinished evaluation: --resume"):
        evaluate(folder, *OPTIONS)
    for change, text in (
        (("--eps", "0.7"), "another eps"),
        (("--norm", "l2"), "another norm"),
        (("--seed", "1"), "another seed"),
        (("--batch-size", "6"), "another batch size"),
        (("--attacks", "pgd-3"), "another attacks"),
        (("--precision", "bf16"), "another precision"),
        (("--limit", "10"), "another data"),
    ):
        with pytest.raises(UserError, match=text):
            evaluate(folder, *OPTIONS, *change, "--resume")
    checkpoint(folder / "r" / "last.pt", seed=3)
    with pytest.raises(UserError, match="another model"):
        evaluate(folder, *OPTIONS, "--resume")
    evaluate(folder, *OPTIONS, "--overwrite")
    with pytest.raises(UserError, match="no unfinished evaluation"):
        evaluate(folder, *OPTIONS, "--resume")


@pytest.mark.parametrize("settings", [None, "", '{"eps": 8', "[]"])
def test_batches_without_settings_are_not_used(folder, monkeypatch, settings):
    """A kill between the first writes leaves batches of which nobody knows what they are."""
    whole = without_times(evaluate(folder, *OPTIONS))
    (folder / "out.json").unlink()
    interrupt(folder, monkeypatch, 2)
    state = folder / "out.json.state"
    for batch in state.glob("*.pt"):
        batch.write_bytes(b"of another network")
    (state / "settings.json").unlink()
    if settings is not None:
        (state / "settings.json").write_text(settings)
    assert without_times(evaluate(folder, *OPTIONS, "--resume")) == whole


# --- trust ----------------------------------------------------------------------------------------


def test_images_that_do_not_fool_are_no_table(folder, monkeypatch):
    """An attack that reports success where there is none is found out, and nothing is written."""
    original = attacks.attack

    def boasting(model, x, y, *rest):
        _, fooled, facts = original(model, x, y, *rest)
        return run.to_float(x).float(), torch.ones_like(fooled), facts

    monkeypatch.setattr(attacks, "attack", boasting)
    with pytest.raises(UserError, match="14 of 14 adversarial images are classified correctly"):
        evaluate(folder, "--attacks", "fgsm")
    assert not (folder / "out.json").exists()


def test_images_outside_the_ball_are_no_table(folder, monkeypatch):
    original = attacks.attack

    def far(model, x, y, name, eps, *rest):
        return original(model, x, y, name, 1.1 * eps, *rest)

    monkeypatch.setattr(attacks, "attack", far)
    with pytest.raises(UserError, match=r"leave the ball .* 8.8/255"):
        evaluate(folder, "--attacks", "fgsm")


class Wrapped(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.net, self.function = nn.Sequential(nn.Flatten(), nn.Linear(12, 4)), function

    def forward(self, x):
        return self.function(self.net(x))


@pytest.mark.parametrize(
    "function, text",
    [
        (lambda z: z + 0.1 * torch.rand_like(z), "the network is random"),
        (lambda z: z.softmax(1), "probabilities, not logits"),
        (lambda z: z / 0, "not finite"),
        (lambda z: z, None),
    ],
)
def test_questions_before_the_attacks(function, text):
    flags = script.inspect(Wrapped(function), torch.rand(6, 3, 2, 2))
    assert len(flags) == (text is not None)
    assert text is None or text in flags[0]


def test_warnings_from_the_table():
    plan = script.attack_names("standard")
    rows = [row for row, _, _ in plan]
    honest = dict(zip(["clean", *rows], [90, 50, 49, 49, 49], strict=True))
    masked = honest | {rows[3]: 40}
    assert script.compare_rows(plan, honest) == []
    assert "9.00 points that the attacks by gradient miss" in script.compare_rows(plan, masked)[0]
    plan = script.attack_names("sweep,square-10,pgd-100")
    rows, names, _ = zip(*plan, strict=True)
    assert list(names) == ["pgd-20", "pgd-50", "pgd-100", "square-10", "pgd-100"]
    steady = dict(zip(["clean", *rows], [90, 50, 45, 44.9, 60, 30], strict=True))
    assert script.compare_rows(plan, steady) == []  # pgd-100 by itself has another step
    falling = steady | {"sweep: pgd-100": 43}
    (flag,) = script.compare_rows(plan, falling)
    assert "sweep: pgd: accuracy still falls from 45.00 to 43.00 between 50 and 100 steps" in flag
    assert "Square" in script.compare_rows(plan, steady | {"square-10": 10})[0].title()


def test_zero_and_broken_are_warnings(folder, monkeypatch, capsys):
    original = attacks.attack

    def dead(*args):
        adv, fooled, facts = original(*args)
        return adv, fooled, facts | {"zero": 3, "broken": 2}

    monkeypatch.setattr(attacks, "attack", dead)
    result = evaluate(folder, "--attacks", "apgd-ce-2")
    zero, broken = result["checkpoints"][0]["warnings"]
    assert "apgd-ce-2: 3 images have a zero gradient" in zero
    assert "apgd-ce-2: 2 images count as misclassified because their logits" in broken
    assert "warning: r: apgd-ce-2: 3 images" in capsys.readouterr().out


def test_the_sweep_has_one_step(folder, monkeypatch):
    seen = []
    original = attacks.attack

    def short(model, x, y, name, eps, norm, seed, index, precision, alpha, *rest):
        seen.append((name, alpha))
        return original(model, x, y, "pgd-1", eps, norm, seed, index, precision, alpha, *rest)

    monkeypatch.setattr(attacks, "attack", short)
    evaluate(folder, "--attacks", "sweep,pgd-100")
    assert seen == [("pgd-20", 0.5), ("pgd-50", 0.5), ("pgd-100", 0.5), ("pgd-100", None)]
    seen.clear()
    evaluate(folder, "--attacks", "sweep", "--alpha", "2", "--overwrite")
    assert {alpha for _, alpha in seen} == {2}


def test_progress_is_shown_for_every_attack(folder, monkeypatch):
    shares = {}

    def show(self, share):
        shares.setdefault(self.title, []).append(share)

    monkeypatch.setattr(script.Progress, "show", show)
    names = "fgsm,bim-2,pgd-2,cw-2,mim-2,apgd-ce-2,fab-t-2,square-2"
    evaluate(folder, "--attacks", names, "--eps", "0.1")
    assert len(shares) == 8 and all(max(s) == 1 for s in shares.values())


def test_two_runs_of_one_name(folder):
    """Labels by path: as keys of the results, of --save and in TensorBoard they must differ."""
    checkpoint(folder / "other" / "r" / "last.pt", seed=1)
    paths = [folder / "r" / "last.pt", folder / "other" / "r" / "last.pt"]
    evaluate(folder, *paths, "--attacks", "fgsm", "--save", folder / "adv.pt")
    saved = run.load_checkpoint(folder / "adv.pt", foreign=True)["networks"]
    assert list(saved) == [str(path) for path in paths]
    link = folder / "link.pt"
    link.symlink_to(paths[0])
    for again in (paths[0], link, folder / "r", folder / "other" / ".." / "r" / "last.pt"):
        with pytest.raises(UserError, match=r"is the same checkpoint as .*last\.pt"):
            evaluate(folder, paths[0], again, "--attacks", "fgsm")


def test_attacks_that_need_more_classes(folder):
    """Before anything runs: camelyon17, for one, has two classes and DLR needs four."""
    x = np.random.default_rng(0).integers(256, size=(30, 32, 32, 3), dtype=np.uint8)
    y = np.arange(30) % 2
    np.savez(folder / "cifar10.npz", x_train=x, y_train=y, x_test=x, y_test=y)
    checkpoint(folder / "two" / "last.pt", classes=2)
    with pytest.raises(UserError, match=r"apgd-t: its loss needs 4 classes, here are 2: take apgd"):
        evaluate(folder, folder / "two" / "last.pt")
    np.savez(folder / "cifar10.npz", x_train=x, y_train=y * 0, x_test=x, y_test=y * 0)
    checkpoint(folder / "one" / "last.pt", classes=1)
    with pytest.raises(UserError, match="here are 1, which no attack can change"):
        evaluate(folder, folder / "one" / "last.pt", "--attacks", "apgd-ce")
    np.savez(folder / "cifar10.npz", x_train=x, y_train=y, x_test=x, y_test=y)
    assert not (folder / "out.json.state").exists()
    names = "apgd-ce-2,fab-t-2,square-5"
    assert evaluate(folder, folder / "two" / "last.pt", "--attacks", names)["attacks"]


# --- series, mixtures, costs ----------------------------------------------------------------------


def test_fast_says_what_it_is(folder, capsys):
    """Two attacks, the second on what the first left; passes and seconds in table and JSON."""
    result = evaluate(folder, "--attacks", "fast", "--eps", "0.3")
    (entry,) = result["checkpoints"]
    assert result["attacks"] == ["fast: apgd-ce", "fast: apgd-malt", "worst of all"]
    first, second = (entry["runs"][row] for row in result["attacks"][:2])
    assert first["attacked"] == 14 and second["attacked"] == 14 - first["took"] > 0
    assert entry["accuracy"]["worst of all"] == 100 * (second["attacked"] - second["took"]) / 16
    assert first["forward_passes"] == first["backward_passes"] > 14
    assert second["backward_passes"] <= second["attacked"] * (9 + 5 * 101)
    assert second["forward_passes"] > second["backward_passes"] > second["attacked"] * 9
    assert "not AutoAttack" in entry["warnings"][1]
    text = capsys.readouterr().out
    assert "warning: fast is APGD-CE and APGD towards 5 classes, not AutoAttack" in text
    assert f"(took {first['took']} of 14 images" in text and "backward" in text


def test_apgd_is_the_beginning_of_autoattack(folder):
    """apgd-t gets what apgd-ce left standing."""
    short = evaluate(folder, "--attacks", "apgd", "--eps", "0.3")
    assert short["attacks"] == ["apgd: apgd-ce", "apgd: apgd-t", "worst of all"]
    first, second = (short["checkpoints"][0]["runs"][row] for row in short["attacks"][:2])
    assert second["attacked"] == first["attacked"] - first["took"]
    assert second["attacked"] > 0 and first["attacked"] == 14
    assert short["checkpoints"][0]["accuracy"]["worst of all"] == 100 * (
        (second["attacked"] - second["took"]) / 16
    )


def test_restarts_in_the_table(folder):
    result = evaluate(folder, "--attacks", "pgd-2-3,pgd-t-2", "--eps", "0.3")
    runs = result["checkpoints"][0]["runs"]
    assert runs["pgd-2-3"]["backward_passes"] == 14 * 2 * 3
    assert runs["pgd-t-2"]["backward_passes"] <= 14 * 2 * 9


def test_gamma_mixes_the_statistics_of_dual_bn(folder):
    """gamma 1 is the adversarial set, gamma 0 the clean one, 0.5 the mean of all numbers."""
    path = folder / "d" / "last.pt"
    model = checkpoint(path, norm="dual-bn")
    norms = [m for m in model.modules() if isinstance(m, models.DualBatchNorm)]
    with torch.no_grad():
        for norm in norms:
            for part in (norm.clean, norm.adversarial):
                part.running_mean.normal_(0, 0.2)
                part.weight.uniform_(0.5, 1.5)
    state = run.load_checkpoint(path)
    run.save_checkpoint(path, state | {"model": model.state_dict()})
    options = ("--attacks", "fgsm", "--eps", "0.1", "--overwrite")
    result = evaluate(folder, path, *options, "--gamma", "0,0.5,1")
    entries = result["checkpoints"]
    assert [entry["gamma"] for entry in entries] == [0, 0.5, 1]
    plain = evaluate(folder, path, *options)["checkpoints"][0]["accuracy"]
    assert entries[2]["accuracy"] == plain
    half = models.from_checkpoint(run.load_checkpoint(path)).eval()
    assert models.mix_statistics(half, 0.5)
    x = torch.rand(4, 3, 32, 32)
    models.use_statistics(model, "clean")
    with torch.no_grad():
        for norm in norms:
            pairs = zip(norm.clean.parameters(), norm.adversarial.parameters(), strict=True)
            for own, other in pairs:
                own.add_(other).div_(2)
            for name in ("running_mean", "running_var"):
                getattr(norm.clean, name).add_(getattr(norm.adversarial, name)).div_(2)
        torch.testing.assert_close(half(x), model(x), rtol=1e-4, atol=1e-4)
    with pytest.raises(UserError, match=r"--gamma mixes the two sets .* of dual-bn; r has one"):
        evaluate(folder, "--gamma", "0.5", "--attacks", "fgsm")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("1.5", "from 0 to 1"),
        ("-0.1", "from 0 to 1"),
        ("nan", "from 0 to 1"),
        ("0.5,0.5", "0.5 is there twice"),
    ],
)
def test_gamma_outside_its_range(folder, text, reason):
    with pytest.raises(UserError, match=reason):
        arguments(folder, f"--gamma={text}")


def test_a_random_network_is_attacked_by_the_mean():
    net = Wrapped(lambda z: z + 0.1 * torch.rand_like(z))
    (flag,) = script.inspect(net, torch.rand(6, 3, 2, 2), 20)
    assert "attacked and judged by the mean of 20 passes" in flag


def test_few_images_decided_by_rounding_count_as_robust(folder, monkeypatch):
    """One of 14 fooled images is classified correctly when it is judged again."""
    original, calls = attacks.judge, []

    def judge(model, x, y, batch_size=500, eot=1):
        lead, scale = original(model, x, y, batch_size, eot)
        calls.append(batch_size)
        if batch_size == 166:  # the second look
            lead[0] = -1
        return lead, scale

    monkeypatch.setattr(attacks, "judge", judge)
    result = evaluate(folder, "--attacks", "apgd-ce-5", "--eps", "8")
    (entry,) = result["checkpoints"]
    assert entry["accuracy"]["apgd-ce-5"] == 100 / 16 and 166 in calls
    assert entry["runs"]["apgd-ce-5"]["differ_when_judged_again"] == 1
    assert "1 images count as robust" in entry["warnings"][0]
    sums = dict.fromkeys(script.COUNTS, 0)
    assert len(script.attack_flags("t", "r", sums | {"differ": 3}, 297)) == 1
    with pytest.raises(UserError, match="4 of 301 adversarial images"):
        script.attack_flags("t", "r", sums | {"differ": 4}, 297)


def test_images_are_not_held_to_the_end():
    """Of 30 batches the strongest images alone stay in memory, each position once."""
    found = script.Found(40)
    for b in range(30):
        lead = torch.tensor([float(b), 0.5])
        batch = {
            "positions": torch.tensor([b % 20, 20 + b]), "leads": lead,
            "images": torch.full((2, 3, 2, 2), b / 30), "largest": 0.01, "nan": 0,
            "low": 0.0, "high": 1.0,
        }  # fmt: skip
        found.add("a", f"0-0-{b}", batch)
    assert found.images == 60 and len(found.fooled["a"]) == 60
    assert [lead for lead, _, _ in found.strongest] == [29, 28, 27, 26, 25, 24, 23, 22]
    held = [v for v in vars(found).values() if isinstance(v, torch.Tensor)]
    assert not held


def test_no_image_is_classified_correctly(folder):
    """No attack runs; the table, the images and the pictures are written nevertheless."""
    x = np.random.default_rng(0).integers(256, size=(20, 32, 32, 3), dtype=np.uint8)
    model = models.from_checkpoint(run.load_checkpoint(folder / "r"))
    predicted = run.predict(model, torch.from_numpy(x).permute(0, 3, 1, 2)).argmax(1)
    y = ((predicted + 1) % 10).numpy()
    y[:10], y_train = y[:10], np.arange(20) % 10
    np.savez(folder / "cifar10.npz", x_train=x, y_train=y_train, x_test=x, y_test=y)
    result = evaluate(folder, "--attacks", "fgsm,apgd-ce-2", "--save", folder / "adv.pt")
    (entry,) = result["checkpoints"]
    assert set(entry["accuracy"].values()) == {0.0}
    assert entry["runs"]["fgsm"]["attacked"] == 0
    assert run.load_checkpoint(folder / "adv.pt", foreign=True)["networks"] == {"r": {}}


# --- results --------------------------------------------------------------------------------------


def test_eps_of_another_unit_is_a_warning(folder, capsys):
    result = evaluate(folder, "--attacks", "fgsm", "--eps", "0.0314")
    assert "give --eps 8.007" in result["checkpoints"][0]["warnings"][0]
    assert "warning: eps 0.0314 is in units of 1/255" in capsys.readouterr().out
    options = ("--norm", "l2", "--eps", "0.5", "--overwrite")
    result = evaluate(folder, "--attacks", "fgsm", *options)
    assert "give --eps 127.5" in result["checkpoints"][0]["warnings"][0]
    assert evaluate(folder, "--attacks", "fgsm", "--overwrite")["checkpoints"][0]["warnings"] == []


def test_results_of_other_settings_are_not_replaced(folder):
    first = evaluate(folder, "--attacks", "fgsm", "--eps", "1")
    for options, text in (
        (("--eps", "2"), r"another eps \(1.0, now 2.0\): --overwrite"),
        (("--eps", "1", "--limit", "10"), "another data"),
        (("--eps", "1", "--seed", "1"), "another seed"),
    ):
        with pytest.raises(UserError, match=text):
            evaluate(folder, "--attacks", "fgsm", *options)
    assert json.loads((folder / "out.json").read_text()) == first
    evaluate(folder, "--attacks", "fgsm", "--eps", "1")
    assert evaluate(folder, "--attacks", "fgsm", "--eps", "2", "--overwrite")["eps"] == 2


def test_what_cannot_be_written_is_known_before_the_work(folder, monkeypatch):
    monkeypatch.setattr(attacks, "attack", lambda *a: pytest.fail("an attack ran"))
    (folder / "file").write_text("")
    for options, text in (
        (("--json", folder), "is a folder"),
        (("--json", folder / "file" / "o.json"), "give --json elsewhere"),
        (("--tensorboard", folder / "file" / "t"), "give --tensorboard elsewhere"),
        (("--save", folder / "file" / "adv.pt"), "give --save elsewhere"),
    ):
        out = [] if "--json" in options else ["--json", str(folder / "o.json")]
        every = [folder / "r", "--attacks", "fgsm", *options, "--data-dir", folder, *out]
        with pytest.raises(UserError, match=text):
            script.main(script.parse_args([str(v) for v in every]))
    assert not list(folder.glob("*.state"))


def test_a_checkpoint_in_a_folder_that_cannot_be_written(folder, monkeypatch, capsys):
    """Results and pictures go to the working directory, and a line says so."""
    here = folder / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    original = run.results.try_folder

    def read_only(place, option):
        if place.resolve().is_relative_to(folder / "r"):
            raise UserError("cannot write")
        original(place, option)

    monkeypatch.setattr(run.results, "try_folder", read_only)
    every = [str(folder / "r" / "last.pt"), "--attacks", "fgsm", "--data-dir", str(folder)]
    script.main(script.parse_args(every))
    assert json.loads((here / "r.last.adversarial.json").read_text())["attacks"] == ["fgsm"]
    assert list((here / "adversarial").glob("events*"))
    assert "the results go to" in capsys.readouterr().out
    assert sorted(p.name for p in (folder / "r").iterdir()) == ["last.pt"]


def test_two_evaluations_of_one_file(folder):
    """The second is refused, --overwrite or not, and leaves the first's batches alone."""
    code = (
        "import sys, time; sys.path.insert(0, sys.argv[1]); from common import run\n"
        "r = run.Results('adversarial', 'x.pt', {}, sys.argv[2]); print('held', flush=True)\n"
        "sys.stdin.read()"
    )
    command = [sys.executable, "-c", code, str(run.ROOT), str(folder / "out.json")]
    (folder / "out.json.state").mkdir()
    (folder / "out.json.state" / "0-0-0.pt").write_text("")
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as first:
        assert first.stdout.readline() == "held\n"
        with pytest.raises(UserError, match="another process is writing"):
            evaluate(folder, "--attacks", "fgsm", "--overwrite")
        assert (folder / "out.json.state" / "0-0-0.pt").exists()
        first.stdin.close()
    assert evaluate(folder, "--attacks", "fgsm", "--overwrite")
    assert not list(folder.glob(".out.json*"))


# --- mistakes -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options, text",
    [
        (["--eps", "0"], r"eps 0 is not in \(0, 255\]"),
        (["--eps", "256"], "eps 256 is not in"),
        (["--eps", "nan"], "eps nan is not in"),
        (["--eps", "20000", "--norm", "l2"], "whole box is 14134/255 across"),
        (["--attacks", "pdg-20"], "there is no attack 'pdg-20'"),
        (["--attacks", "pgd,pgd"], "pgd is there twice"),
        (["--attacks", "pgd-5,pgd-05"], "pgd-05 is pgd-5: name each once"),
        (["--limit", "17"], "--limit 17: there are only 16"),
        (["--arch", "resnet8"], "--arch goes with"),
        (["--attacks", "fgsm", "--json", "/proc/x/y.json"], "cannot write"),
    ],
)
def test_bad_options(folder, options, text):
    with pytest.raises(UserError, match=text):
        out = [] if "--json" in options else ["--json", str(folder / "o.json")]
        every = [str(folder / "r"), *options, "--data-dir", str(folder), *out]
        script.main(script.parse_args(every))


def test_classes_of_another_data_set(folder):
    checkpoint(folder / "c" / "last.pt", classes=7)
    with pytest.raises(UserError, match=r"cifar10 has 10 classes, last\.pt 7"):
        evaluate(folder, folder / "c" / "last.pt")


def test_one_line_on_the_command_line(folder):
    command = [sys.executable, str(SCRIPT), str(folder / "none.pt"), "--data-dir", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.splitlines() == [f"error: {folder / 'none.pt'}: no such checkpoint"]
