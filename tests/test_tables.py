"""eval/tables.py groups by settings, averages over seeds, and refuses what does not compare."""

import importlib.util
import json
import re

import pytest
import torch

from common import run
from common.run import UserError
from eval import table_files

spec = importlib.util.spec_from_file_location("tables", run.ROOT / "eval" / "tables.py")
tables = importlib.util.module_from_spec(spec)
spec.loader.exec_module(tables)


def write(path, entries, **facts):
    result = dict.fromkeys(table_files.CORRUPTION_FACTS, "x") | {"checkpoints": entries} | facts
    path.write_text(json.dumps(result))
    return str(path)


def entry(norm, seed, error, lam=0.0):
    options = {"seed": seed, "lam": lam, "distance": "mse" if lam else f"ignored {seed}"}
    return {"norm": norm, "options": options, "clean": {"error": error, "ece": 1.0},
            "mean_corruption_error": 2 * error}  # fmt: skip


def test_rows_over_seeds(tmp_path, capsys):
    a = write(tmp_path / "a.json", [entry("bn", 0, 10.0), entry("none", 0, 30.0)])
    b = write(tmp_path / "b.json", [entry("bn", 1, 12.0), entry("bn", 0, 9.0, lam=1.0)])
    rows = tables.main(tables.parse_args([a, b]))
    values = [(r["clean error"], r["mean corruption error"], r["n"]) for r in rows.values()]
    assert values == [("11.00 +- 1.41", "22.00 +- 2.83", 2), ("30.00", "60.00", 1),
                      ("9.00", "18.00", 1)]  # fmt: skip
    assert all("norm" in name and "lam" in name for name in rows)
    assert all(r["extra (4)"] == "-" for r in rows.values())
    tables.main(tables.parse_args([a, "--markdown"]))
    assert "| norm bn | 10.00 | 20.00 |" in capsys.readouterr().out


def test_files_that_do_not_compare(tmp_path):
    a = write(tmp_path / "a.json", [entry("bn", 0, 10.0)], images=100)
    b = write(tmp_path / "b.json", [entry("bn", 1, 10.0)], images=200)
    with pytest.raises(UserError, match=r"differ in images \(100, 200\)"):
        tables.main(tables.parse_args([a, b]))


@pytest.mark.parametrize("content", ["", "[]", "{}", "no json", '{"settings": {}, "a": [1]}'])
def test_not_a_result(tmp_path, content):
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(UserError, match=r"no results of .* a JSON of .*training$"):
        tables.main(tables.parse_args([str(tmp_path / "a.json")]))


def test_a_network_counts_once(tmp_path, capsys):
    a = write(tmp_path / "a.json", [entry("bn", 0, 10.0) | {"checkpoint": "runs/a/last.pt"}])
    b = write(tmp_path / "b.json", [entry("bn", 0, 10.0) | {"checkpoint": "copy.pt"}])
    rows = tables.main(tables.parse_args([a, a, b]))
    assert [(r["clean error"], r["n"]) for r in rows.values()] == [("10.00", 1)]
    assert "each counts once" in capsys.readouterr().err
    same = [entry("bn", 0, error) | {"weights": "d1"} for error in (10.0, 10.1)]
    c = write(tmp_path / "c.json", same)
    assert [r["n"] for r in tables.main(tables.parse_args([c])).values()] == [1]


def test_folders_names_and_seeds(tmp_path, capsys):
    (tmp_path / "runs" / "a").mkdir(parents=True)
    write(tmp_path / "runs" / "a" / "last.corruptions.json", [entry("bn", 0, 10.0)])
    write(tmp_path / "runs" / "last.corruptions.json", [entry("bn", 1, 12.0)])
    (tmp_path / "runs" / "args.json").write_text("{}")
    line = [str(tmp_path / "runs"), "--names", "baseline", "--per-seed", "--csv"]
    assert tables.main(tables.parse_args(line))["baseline"]["n"] == 2
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].startswith("baseline,11.00 +- 1.41,22.00 +- 2.83,-")
    assert lines[2].startswith("  seed 0,10.00,") and lines[3].startswith("  seed 1,12.00,")
    with pytest.raises(UserError, match="2 names for 1 rows"):
        tables.main(tables.parse_args([line[0], "--names", "a,b"]))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no results of eval"):
        tables.main(tables.parse_args([str(tmp_path / "empty")]))


def test_latex_and_scatter(tmp_path, capsys):
    a = write(tmp_path / "a.json", [entry("bn", 0, 10.0), entry("none", 0, 30.0)])
    svg = tmp_path / "a.svg"
    columns = "clean error,mean corruption error"
    line = [a, "--latex", "--names", "a & b,c_d", "--scatter", columns, str(svg)]
    tables.main(tables.parse_args(line))
    out = capsys.readouterr().out
    assert r"a \& b & 10.00 & 20.00 &" in out and r"c\_d" in out and r"\bottomrule" in out
    assert svg.read_text().count("<circle") == 2 and "clean error (%)" in svg.read_text()
    with pytest.raises(UserError, match="two of these columns"):
        tables.main(tables.parse_args([a, "--scatter", "clean,other", str(svg)]))


RESULTS = run.ROOT / "eval" / "results"
PUBLISHED = {  # a cell of each file that a table of the READMEs is made of
    "autoattack_agreement": ("cascade l2 eps 38, rows 0-199", "theirs", "11.00"),
    "bn_ablation_dln25": ("norm l2", "loss at 10000 steps", "6068.60"),
    "bn_ablation_vgg16-16_cifar10": ("norm bn, lr 0.1", "loss band", "0.17"),
    "bn_ablation_vgg16-16_cifar10_h200_s0": ("norm noisy-bn, lr 0.5", "beta", "3.03"),
    "bn_ablation_vgg16-16_cifar10_h200_s1": ("norm none, lr 0.1", "loss band", "1.93"),
    "ct_cifar10_bn": ("all", "mean corruption error", "35.38 +- 0.84"),
    "domains_pacs_sample": ("baseline", "sketch", "20.54"),
    "domains_shapes": ("student", "average", "10.03"),
    "fast_attacks": ("ResNet-20 (akamaster)", "share of the time %", "14.40"),
    "fixup_penalty_cifar10": ("fixup+penalty", "ECE", "2.96 +- 0.25"),
    "headline_question_small": ("GroupNorm", "clean error %", None),
    "nofrost_cifar10": ("norm bn, lam 0.5", "worst of all", "20.17 +- 0.71"),
    "nofrost_cifar10_train": ("nf", "clean error", "41.81 +- 0.30"),
    "devices": ("BatchNorm on a CPU", "adapted, error", "28.45"),
    "ct_first_run": ("CT, threads 1", "shortcut swapped", "62.75"),
    "growth": ("norm none, wrn40-1", "embedding", None),
    "fixup_penalty_4000": ("fixup+penalty", "final layer", "0.96"),
    "shapes_plain": ("teacher, threads 1", "clean error", None),
    "shortcut_cifar10": ("norm bn, levels 1.0", "grating swapped", None),
    "shortcut_shapes": ("norm fixup", "clean", None),
    "smoothness_bn_ablation": ("norm bn", "parameter hessian", "1116.55"),
    "smoothness_ct": ("norm none, lam 0.0", "lipschitz", "18.22"),
    "smoothness_fixup_penalty": ("bn", "gradient l1", "1.10"),
    "smoothness_nofrost": ("nf", "margin", "3.86"),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_results_are_read(name):
    """The cell is that of the README, or, in files that are measured again from time to time, that
    of the file; every row's title is short."""
    row, column, cell = PUBLISHED[name]
    rows = tables.main(tables.parse_args([str(RESULTS / f"{name}.json"), "--markdown"]))
    assert rows[row][column] == (cell or by_hand(name))
    assert all(len(title) < 50 for title in rows)


def by_hand(name):
    """The mean and deviation of the cell in PUBLISHED from the content of its file."""
    content = json.loads((RESULTS / f"{name}.json").read_text())
    if name.startswith("headline"):
        (found,) = (row for row in content["rows"] if row["row"] == "GroupNorm")
        values = [seed["clean error %"] for seed in found["seeds"].values()]
    elif name == "growth":
        found = [n for n in content["networks"] if (n["norm"], n["depth"]) == ("none", 40)]
        values = [network["embedding"] for network in found]
    elif name == "shapes_plain":
        values = [
            r["error"] for r in content["rows"] if (r["network"], r["threads"]) == ("teacher", 1)
        ]
    elif name == "shortcut_cifar10":
        rows = [row for row in content["rows"] if (row["norm"], row["levels"]) == ("bn", 1)]
        values = [row["curve"][-1]["swapped"] for row in rows]
    else:
        rows = [row for row in content["rows"] if row["norm"] == "fixup"]
        values = [row["curve"][-1]["clean"] for row in rows]
    return run.mean_sd(values)


def test_every_file_of_the_readmes_tables_is_in_the_test_above():
    """Only records of speed, searches, theory, curves and smoke runs are no tables of networks."""
    known = {path.stem for path in RESULTS.glob("*.json") if table_files.is_result(path)}
    others = {path.stem for path in RESULTS.glob("*.json")} - known
    assert set(PUBLISHED) <= known
    allowed = r"speed_.*|.*_search|theory|trees_imagenette|corruption_engine_resnet20"
    allowed += "|growth|loss_bands"  # curves, for figures
    cited = (run.ROOT / "README.md").read_text() + (RESULTS / "README.md").read_text()
    others = [name for name in sorted(others) if f"`{name}.json`" in cited]
    assert [name for name in others if not re.fullmatch(allowed, name)] == []


def test_a_folder_gives_a_table_for_each_kind(tmp_path, capsys):
    attack = dict.fromkeys(table_files.ATTACK_FACTS, "x") | {"eps": 8.0, "attacks": ["pgd-20"]}
    attacked = entry("bn", 0, 10.0) | {"accuracy": {"clean": 90.0, "pgd-20": 5.0}}
    (tmp_path / "a.adversarial.json").write_text(json.dumps(attack | {"checkpoints": [attacked]}))
    write(tmp_path / "a.corruptions.json", [entry("bn", 0, 10.0)])
    write(tmp_path / "b.corruptions.json", [entry("bn", 0, 20.0)], images=7)
    rows = tables.main(tables.parse_args([str(tmp_path)]))
    assert rows["adversarial: all"]["pgd-20"] == "5.00"
    out = capsys.readouterr().out
    assert out.count("mean corruption error") == 2 and "x x, 7 images" in out
    files = [str(tmp_path / f"{name}.json") for name in ("a.adversarial", "a.corruptions")]
    with pytest.raises(UserError, match="are of adversarial and of corruptions"):
        tables.main(tables.parse_args(files))
    with pytest.raises(UserError, match=r"are for one table, here are 3 \(adversarial"):
        tables.main(tables.parse_args([str(tmp_path), "--names", "a"]))


def test_titles_are_short():
    """Of the options that differ, the fewest that tell the rows apart."""
    options = [
        {"method": "ct", "norm": "bn", "lam": 5.0, "warmup": 1, "clip": 1, "distance": "mse"},
        {"method": "nofrost", "norm": "bn", "attack_steps": 7, "agc": 0.1, "clip": 0},
        {"method": "nofrost", "norm": "nf", "attack_steps": 7, "agc": 0.1, "clip": 0},
    ]
    assert run.row_titles(options) == ["method ct, norm bn", "method nofrost, norm bn",
                                       "method nofrost, norm nf"]  # fmt: skip
    stages = [{"stage": s, "norm": n} for s, n in (("teacher", "none"), ("student", "bn"))]
    assert run.row_titles(stages) == ["teacher", "student"]
    assert run.row_titles([{"lam": 1}, {"lam": 2}, {"lam": 2, "arch": "x"}]) == [
        "lam 1", "lam 2", "x, lam 2"]  # fmt: skip
    assert run.row_titles([{"a": 1}]) == ["all"]


def test_scatter_of_attacks(tmp_path):
    svg = tmp_path / "trade-off.svg"
    line = [str(RESULTS / "nofrost_cifar10.json"), "--scatter", "clean,apgd-ce", str(svg)]
    tables.main(tables.parse_args(line))
    text = svg.read_text()
    assert text.count("<circle") == 5 and "apgd-ce (%)" in text and "norm dual-bn" in text


def test_digest_is_of_the_weights():
    first = torch.nn.Linear(2, 3)
    second = torch.nn.Linear(2, 3)
    assert run.weights_digest(first) != run.weights_digest(second)
    second.load_state_dict(first.state_dict())
    assert run.weights_digest(first) == run.weights_digest(second)


def test_adapted_statistics_are_a_row_of_their_own():
    """The same network with and without --adapt or --gamma is never averaged with itself."""
    plain = entry("bn", 0, 10.0) | {"weights": "d1"}
    kinds = [{}, {"adapt": 32, "adapt_source": 16}, {"adapt": 8, "adapt_source": 16}, {"gamma": 0}]
    found = tables.grouped([plain | kind for kind in kinds])
    assert [len(entries) for _, entries in found] == [1, 1, 1, 1]


def test_an_unfinished_training_is_a_row_of_its_own():
    """A seed that stands at step 175 of 400 is never averaged with those that ended."""
    entries = [entry("bn", seed, 10.0) | {"weights": f"d{seed}"} for seed in range(3)]
    entries[1]["unfinished"] = "step 175 of 400"
    found = tables.grouped(entries)
    assert [[e["weights"] for e in group] for _, group in found] == [["d0", "d2"], ["d1"]]
    titles = run.row_titles([options for options, _ in found])
    assert titles == ["all", "unfinished step 175 of 400"]


def test_fast_takes_a_quarter_of_the_time_and_leaves_no_image_more():
    """On every network of the file, and the table of eval/results/README.md is that of the file."""
    content = json.loads((RESULTS / "fast_attacks.json").read_text())
    readme = (RESULTS / "README.md").read_text()
    for row in content["rows"]:
        numbers = row["seeds"]["0"]
        standard, fast = row["standard"], row["fast"]
        assert fast["left"] == standard["left"] == numbers["fast: images left"]
        share = 100 * fast["cpu_seconds"] / standard["cpu_seconds"]
        assert share < 25 and f"{share:.1f}" == f"{numbers['share of the time %']:.1f}"
        cells = [numbers["radius, 1/255"], numbers["images"], standard["left"], fast["left"]]
        cells = [f"{cell:g}" for cell in cells]
        cells += [f"{part['cpu_seconds']:.1f}" for part in (standard, fast)]
        assert f"| {row['row']} | {' | '.join(cells)} | {share:.1f} % |" in readme


def test_recipes_of_a_study_are_rows_of_their_own(tmp_path):
    """Named by their change where they have one. What was trained is no column."""
    rows = tables.main(tables.parse_args([str(RESULTS / "shortcut_recipe.json")]))
    numbers = ["clean", "grating removed", "grating swapped"]
    assert all(list(row) == [*numbers, "n"] for row in rows.values())
    assert len(rows) == 14 and all(title.startswith("norm") for title in rows)
    assert "norm bn, change half the rate" in rows
    end = {"step": 9, "loss": 1.0, "clean": 90.0, "without": 80.0, "swapped": 70.0}
    older = {"data": "cifar10", "norm": "bn", "levels": 1.0, "epochs": 8, "images": 20_000}
    usual = {"change": "usual", "lr": 0.1, "clip": 0.0, "batch_size": 128}
    others = [{"epochs": 1}, {"images": 256}, {"lr": 0.2}, {"clip": 1.0}, {"batch_size": 64}]
    rows = [older | {"seed": 0}, older | usual | {"seed": 1}]
    rows += [older | usual | other | {"seed": 2} for other in others]
    content = {"rows": [row | {"curve": [end]} for row in rows]}
    (tmp_path / "a.json").write_text(json.dumps(content))
    found = tables.main(tables.parse_args([str(tmp_path / "a.json")]))
    assert [row["n"] for row in found.values()] == [2, 1, 1, 1, 1, 1]


def test_a_column_that_a_seed_lacks_is_over_the_others(tmp_path):
    numbers = [{"clean error": 10.0, "pgd": 50.0}, {"clean error": 12.0, "pgd": None}]
    columns = {name: (name,) for name in numbers[0]}
    (row,) = tables.rows_of(columns, ["net"], [({}, numbers)], per_seed=False)
    assert row == ["net", "11.00 +- 1.41", "50.00 (1 of 2)", 2]


def network(seed, method="ct", **options):
    return {"method": method, "weights": f"{method}{seed}", "options": {"seed": seed} | options}


def sizes(*entries):
    """How many networks each row has, by any order of the entries the same."""
    found = sorted(len(group) for _, group in tables.grouped(entries))
    assert found == sorted(len(group) for _, group in tables.grouped(entries[::-1]))
    return found


@pytest.mark.parametrize("name", sorted(run.NOT_OPTIONS))
def test_how_a_network_was_trained_is_no_method(name):
    """Seeds on another machine, or watched otherwise, are seeds; a batch of another size is not."""
    first, second = network(0), network(1)
    second["options"][name] = "x"
    assert sizes(first, second) == [2]
    assert sizes(network(0, batch_size=32), network(1, batch_size=64)) == [1, 1]


def test_an_option_that_came_later_is_off_in_older_networks():
    """Never on: an older network is no seed of those with cutout, were they alone with it."""
    older, later = network(0), network(1, policy="none", ema=0.0, shortcut=None)
    assert sizes(older, later) == [2]
    assert sizes(older, network(1, policy="cutout")) == [1, 1]
    assert sizes(older, later, network(2, policy="cutout")) == [1, 2]
    titles = run.row_titles([o for o, _ in tables.grouped([older, network(1, policy="cutout")])])
    assert titles == ["all", "policy cutout"]
    others = [network(0, "nofrost", lam=0.5), network(1, "ct", lam=0.0)]
    assert [options.get("lam") for options, _ in tables.grouped(others)] == [0.5, 0.0]
    assert [options.get("ema") for options, _ in tables.grouped([later, others[0]])] == [0.0, None]


def test_domains_of_one_seed_are_one_entry():
    """Also where they were trained on different machines or by different versions."""
    own = [{"compile": True, "policy": "none"}, {"compile": None}]
    entries = [
        network(0, test_domain=domain, **options) | {"seed": 0, "accuracy": {domain: 50.0}}
        for domain, options in zip(("photo", "sketch"), own, strict=True)
    ]
    content = {"checkpoints": entries, "dataset": "pacs", "precision": "fp32"}
    (found,) = table_files.of_domains(content, entries).entries
    assert found["accuracy"] == {"photo": 50.0, "sketch": 50.0}


def test_a_run_of_several_seeds_or_networks_is_read_as_one_of_each(tmp_path, capsys):
    """fixup_penalty.py --seeds 3 names the networks fixup-s0, fixup-s1 ...; 5 and 5.0 are equal."""
    several = [network(0, variants=["fixup", "bn"], lr=5) | {"stage": f"bn-s{s}"} for s in (0, 1)]
    several[1]["weights"] = "another"
    alone = network(2, variants=["bn"], lr=5.0) | {"stage": "bn"}
    assert sizes(*several, alone) == [3]
    assert [tables.seed_of(entry, 9) for entry in (*several, alone)] == ["0", "1", 2]
    norms = [network(0, norm="nf") | {"norm": "nf"}, network(1, norms=["nf"]) | {"norm": "nf"}]
    assert sizes(*norms) == [2]
    assert sizes(network(0, variants=["bn"]), network(1, variants=["bn", "fixup"])) == [1, 1]
