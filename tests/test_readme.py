"""The READMEs: every command parses, tables cite their files, and numbers are those of the JSON."""

import importlib.util
import json
import re
import shlex

import pytest

from common import run
from eval import shortcut

READMES = ("README.md", "common/README.md", "eval/README.md", "eval/results/README.md")
RESULTS = run.ROOT / "eval" / "results"
MEASURED = re.compile(r"\d\.\d|\+-")


def text(name):
    return (run.ROOT / name).read_text()


def commands():
    """[(README, script, its arguments)] of the indented lines that start a script."""
    found = []
    for name in READMES:
        for line in text(name).replace("\\\n", " ").splitlines():
            words = shlex.split(line) if line.startswith("    ") else []
            script = next((i for i, word in enumerate(words) if word.endswith(".py")), None)
            if words and words[0] in ("python", "torchrun") and script is not None:
                found.append((name, words[script], words[script + 1 :]))
    return found


def load(script):
    spec = importlib.util.spec_from_file_location("documented", run.ROOT / script)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_commands_are_found():
    scripts = {script for _, script, _ in commands()}
    assert {"ct.py", "nofrost.py", "fixup_penalty.py", "bn_ablation.py"} <= scripts
    assert {"eval/corruptions.py", "eval/adversarial.py", "eval/tables.py"} <= scripts


@pytest.mark.parametrize(("readme", "script", "arguments"), commands())
def test_commands_parse(readme, script, arguments, tmp_path, monkeypatch):
    module = load(script)
    monkeypatch.chdir(tmp_path)
    assert vars(module.parse_args(arguments))


@pytest.mark.parametrize("name", READMES)
def test_files_that_are_named_exist(name):
    for found in re.findall(r"`(?:eval/results/)?(\w[\w-]*\.json)`", text(name)):
        assert (RESULTS / found).is_file() or found in ("args.json",), found
    for link in re.findall(r"\]\(([^)#]+)\)", text(name)):
        if "://" not in link:
            assert (run.ROOT / name).parent.joinpath(link).is_file(), link


def uncited(section):
    """Whether a section has a table with measured numbers and names no JSON file before it."""
    cited = False
    for line in section.splitlines():
        cited = cited or ".json`" in line
        if line.startswith("|") and MEASURED.search(line) and not cited:
            return True
    return False


@pytest.mark.parametrize("name", ["README.md", "eval/results/README.md"])
def test_tables_cite_their_file(name):
    sections = re.split(r"^## ", text(name), flags=re.M)[1:]
    assert [s.splitlines()[0] for s in sections if uncited(s)] == []
    assert uncited("table\n| a | 1.5 |") and not uncited("`a.json`\n| a | 1.5 |")


def rows_of(name, first):
    """The cells of the README's rows that start with `first`."""
    lines = [line for line in text(name).splitlines() if line.startswith(f"| {first} |")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_numbers_of_nofrost_are_those_of_the_file():
    content = json.loads((RESULTS / "nofrost_cifar10.json").read_text())
    seeds = [part["checkpoints"] for part in content.values()]
    titles = {1: "BatchNorm (`--norm bn`)", 2: "two sets of statistics (`dual-bn`)",
              4: "normal training, bn (`--lam 0`)"}  # fmt: skip
    attacks = ("clean", "pgd-20", "pgd-100", "apgd-ce", "worst of all")
    for i, title in titles.items():
        (cells,) = rows_of("eval/results/README.md", title)
        found = [", ".join(f"{s[i]['accuracy'][a]:.1f}" for s in seeds) for a in attacks]
        assert cells[2:] == found, title


def test_numbers_of_fixup_are_those_of_the_file():
    content = json.loads((RESULTS / "fixup_penalty_cifar10.json").read_text())
    for variant, values in content["median"].items():
        (cells,) = rows_of("eval/results/README.md", f"`{variant}`")
        seeds = [content["runs"][f"{variant}-s{seed}"]["error"] for seed in range(3)]
        each = ", ".join(f"{error:.1f}" for error in seeds)
        assert cells[1] == f"{values['error']:.1f} ({each})", variant
        assert abs(float(cells[2]) - values["corrupted"]) < 0.051, variant


def test_numbers_of_fixup_on_few_images_are_those_of_the_file():
    content = json.loads((RESULTS / "fixup_penalty_4000.json").read_text())
    for row in content["rows"]:
        size = f"{row['final_layer']:.3g}"
        cells = [f"{row['error']:.2f}", f"{row['corrupted']:.2f}", f"{row['train_accuracy']:.1f}"]
        expected = f"| {' | '.join([row['network'], *cells, size])} |"
        assert expected in text("eval/results/README.md")


def test_numbers_of_the_ablation_are_those_of_the_file():
    runs = json.loads((RESULTS / "bn_ablation_vgg16-16_cifar10.json").read_text())["runs"]
    for label, norm in (("without", "none"), ("with", "bn")):
        values = runs[f"{norm}-lr0.1"]
        accuracy, width = values["accuracy"]["5000"], values["median"]["landscape_width"]
        assert f"| {label} BatchNorm | {accuracy:.0f} | {width:.2f} |" in text("README.md")


def test_numbers_of_the_first_run_are_those_of_the_file():
    rows = json.loads((RESULTS / "ct_first_run.json").read_text())["rows"]
    columns = ("clean", "corrupted", "shortcut removed", "shortcut swapped")
    for row in (row for row in rows if row["threads"] == 2):
        printed = f"    {row['network']} +" + " +".join(f"{row[c]:.2f}" for c in columns)
        assert re.search(printed, text("README.md")), row
    *most, last = (f"{row[columns[-1]]:.2f}" for row in rows if row["threads"] == 1)
    assert f"On one thread the last column is {', '.join(most)} and {last} %" in text("README.md")


def test_numbers_of_plain_shapes_are_those_of_the_file():
    rows = json.loads((RESULTS / "shapes_plain.json").read_text())["rows"]
    for network, title in (("teacher", "teacher, without"), ("baseline", "baseline, with")):
        own = [row for row in rows if row["network"] == network]
        errors = [", ".join(f"{r['error']:.2f}" for r in own if r["threads"] == n) for n in (1, 2)]
        expected = f"| {title} BatchNorm | {own[0]['epochs']} | {' | '.join(errors)} |"
        assert expected in text("eval/results/README.md")


@pytest.mark.parametrize("study", ["shapes", "cifar10", "recipe"])
def test_numbers_of_the_shortcut_are_those_of_the_files(study):
    rows = shortcut.read(RESULTS / f"shortcut_{study}.json")
    assert shortcut.markdown(rows) in text("eval/results/README.md")


def test_numbers_of_the_question_are_those_of_the_file():
    content = json.loads((RESULTS / "headline_question_small.json").read_text())
    columns = ("clean error %", "15 corruptions, error %", "adapted, error %")
    found = {row["row"]: row["seeds"].values() for row in content["rows"]}
    for name in ("BatchNorm", "none", "CT", "GroupNorm", "BatchNorm + AugMix", "CT + AugMix"):
        (cells,) = (row for row in rows_of("README.md", name) if len(row) == 5)
        for cell, column in zip(cells[1:], (*columns, "Linf 1/255, accuracy %"), strict=True):
            measured = run.mean_sd([own.get(column) for own in found[name]])
            assert cell == ("nothing to adapt" if measured == "-" else measured), (name, column)


def test_the_first_page_is_short():
    assert len(text("README.md").encode()) <= 9 * 1024


@pytest.mark.parametrize("name", READMES)
def test_sentences_are_short(name):
    lines = [line for line in text(name).splitlines() if not line.startswith(("|", "    ", "#"))]
    prose = re.sub(r"```.*?```", "", "\n".join(lines), flags=re.S)
    for paragraph in prose.split("\n\n"):
        for sentence in re.split(r"(?<=[.:;!?)])\s+", " ".join(paragraph.split())):
            assert len(sentence.split()) <= 28, sentence
