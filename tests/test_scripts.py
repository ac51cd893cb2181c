"""What DESIGN promises of the scripts as texts: who imports whom, one order of sections, and shared
blocks that stay the same."""

import ast
import difflib
import importlib.metadata
import re
import sys

import pytest
import reading

import ct
import fixup_penalty
import nofrost
from common import run

SCRIPTS = ("ct.py", "nofrost.py", "fixup_penalty.py", "bn_ablation.py")
OWN = {"parse_args", "build", "train", "main", "make_task", "verdict", "report"}  # one per script
BANNERS = ["options", "method", "training", "main"]


def text(name):
    return (run.ROOT / name).read_text()


def functions(name):
    """{(name, its arguments): source} of a script's functions."""
    nodes = [n for n in ast.parse(text(name)).body if isinstance(n, ast.FunctionDef)]
    return {(n.name, ast.unparse(n.args)): ast.get_source_segment(text(name), n) for n in nodes}


def test_functions_alike_are_the_same():
    """Of one name and one list of arguments there is one text."""
    found = {}
    for script in SCRIPTS:
        for key, source in functions(script).items():
            found.setdefault(key, {})[script] = source
    for (name, _), sources in found.items():
        assert name in OWN or len(set(sources.values())) == 1, f"{name}: {', '.join(sources)}"


def test_one_schedule():
    """The rate is the same function of the step wherever no option changes it."""
    for step in range(100):
        rates = {script.lr_at(step, 100, 0.1, 10) for script in (ct, nofrost, fixup_penalty)}
        assert len(rates) == 1


@pytest.mark.parametrize("script", SCRIPTS)
def test_sections_in_order(script):
    lines = [line.strip("# -") for line in text(script).splitlines() if line[:5] == "# ---"]
    assert [line for line in lines if line != "figures"] == BANNERS
    assert {"parse_args", "main"} <= {name for name, _ in functions(script)}


@pytest.mark.parametrize("folder", ["", "eval", "common"])
def test_imports(folder):
    """The packages of requirements.txt (Pillow comes with torchvision) and `common`; speed.py looks
    for other attack libraries to measure."""
    allowed = {"torch", "torchvision", "numpy", "tensorboard", "PIL", "common"}
    for path in (run.ROOT / folder).glob("**/*.py" if folder else "*.py"):
        found = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                found |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                found.add(node.module.split(".")[0])
        others = {"torchattacks", "foolbox"} if path.name.startswith("speed") else set()
        if path.name.startswith(("headline", "speed", "table", "figures")):
            others |= {"eval"}  # one program in several files
        assert found - allowed - others <= sys.stdlib_module_names, path.name


def test_lowest_versions():
    """requirements.txt names what is imported, from the lowest version on that was tested."""
    lines = [line for line in text("requirements.txt").splitlines() if not line.startswith("#")]
    bounds = dict(line.split(">=") for line in lines)
    assert bounds.keys() == {"torch", "torchvision", "numpy", "tensorboard", "pytest"}
    tested = dict(
        re.findall(r"^\| (\w+) \| ([\d.]+) \| [\d.]+ \|$", text("common/README.md"), re.M)
    )
    assert tested.keys() == bounds.keys()
    for name, bound in bounds.items():
        lowest = [int(part) for part in bound.split(".")]
        assert [int(part) for part in tested[name].split(".")][: len(lowest)] == lowest, name
        here = re.findall(r"\d+", importlib.metadata.version(name))[: len(lowest)]
        assert [int(part) for part in here] >= lowest, name


FRAME = (
    r"    optimizer = torch\.optim\.SGD\(",
    r"    loop = run\.Loop\(",
    r"    for step in loop:",
    r"        x, y = .*batches\(step\)\n\n",
    r"\n\n        loop\.backward\(loss\)",
    r"        loop\.step\(",
    r"        loop\.log\(",
    r"\n\n        if loop\.evaluates:",
    r"            loop\.report\(",
    r"    return loop\.metrics",
)


@pytest.mark.parametrize("script", SCRIPTS)
def test_frame_of_the_loops(script):
    """The lines around the method are the same, in the same order, in all four scripts."""
    train = reading.source_of_train(text(script))
    place = 0
    for line in FRAME:
        found = re.compile(line).search(train, place)
        assert found, f"{script}: {line!r} is missing, or not in its place"
        place = found.start() + 1


@pytest.mark.parametrize("script", SCRIPTS)
def test_scripts_are_short(script):
    """The lines of a script, and the lines and tokens of train(); see tests/reading.py."""
    for found, most in zip(reading.measure(script), reading.BUDGETS[script], strict=True):
        assert found <= most


def test_the_loop_is_short():
    name, most = reading.LOOP
    assert reading.lines(name) <= most


def test_sentences_are_short():
    assert not reading.long_sentences()


def test_a_long_sentence_is_found():
    words = " ".join(["word"] * 26)
    source = f'"""Short.\n\n{words}."""\nx = 1  # short\n# {words[:60]}\n# {words[60:]}\n'
    texts = [text for _, text in reading.paragraphs(source)]
    assert [len(s.split()) for t in texts for s in reading.sentences(t)] == [1, 26, 1, 26]


def test_ct_and_fixup_differ_by_their_method():
    """At most 40 changed lines inside train()."""
    a, b = (reading.source_of_train(text(s)).splitlines() for s in ("ct.py", "fixup_penalty.py"))
    changed = [line for line in difflib.ndiff(a, b) if line[:2] in ("- ", "+ ")]
    assert len(changed) <= 40


@pytest.mark.parametrize("script", SCRIPTS)
def test_commands_that_are_told_are_quoted(script):
    """`run.command` quotes a path with a space, a text put together by hand does not."""
    assert not re.search(r"f\".*python [a-z_/]+\.py [^\"]*\{", text(script))
