"""Odd inputs, drawn from a seed: each script ends with status 0, or with 2 and one line.

A case draws a script and one oddity: a damaged or strange checkpoint, a damaged run to resume,
arrays or corrupted arrays that break the contract, a tree of odd pictures, values of an option, or
an environment. Nothing else may happen: no traceback, no signal, no second line of error, no file
half written. Case k is drawn from the
seed k, so a fault comes again by `pytest "tests/test_odd_inputs.py::test_odd_input[7]"`.
"""

import contextlib
import importlib.util
import io
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image

from common import data, models, run
from common.run import UserError

PATIENCE = 300  # seconds after which a case counts as hanging
SIDE = 32
DATA = "--data-dir data --device cpu --seed 1"
TRAINERS = {
    "ct.py": "--dataset cifar10 --arch resnet8 --lam 0 --no-baseline --corrupted-images 0 "
    "--epochs 1 --batch-size 10 --precision fp32 --out run",
    "nofrost.py": "--dataset cifar10 --arch wrn10-1 --norms nf --epochs 1 --batch-size 10 "
    "--attack-steps 1 --probe-images 4 --robust-images 0 --precision fp32 --out run",
    "fixup_penalty.py": "--dataset cifar10 --arch resnet8 --norm none --epochs 1 --limit 0 "
    "--batch-size 10 --corrupted-images 0 --precision fp32 --out run",
    "bn_ablation.py": "--dataset cifar10 --arch vgg11-4 --norms bn --lrs 0.05 --steps 2 "
    "--batch-size 10 --measure-every 0 --eval-every 2 --log-every 2 --no-random --out run",
}
LONGER = {  # a run of TRAINERS goes on for so long
    "ct.py": "--epochs 2", "nofrost.py": "--epochs 2", "fixup_penalty.py": "--epochs 2",
    "bn_ablation.py": "--steps 4",
}  # fmt: skip
EVALUATIONS = {
    "eval/adversarial.py": "net.pt --attacks fgsm --limit 10 --json out.json",
    "eval/corruptions.py": "net.pt --corruptions contrast --severities 1 --limit 10 "
    "--json out.json",
    "eval/smoothness.py": "net.pt --measures logits --limit 10 --json out.json",
}
TOOLS = {
    "eval/theory.py": "--features 60 --trials 1 --json out.json",
    "eval/tables.py": "results.json",
    "eval/growth.py": "--dataset cifar10 --depths 10 --norms bn --images 8 --data-dir data",
}
# Options that say how long a run is, or choose a larger one: of these small values alone.
LONG = {"epochs", "steps", "seeds", "trials", "samples", "features", "low", "depths", "layers"}
SKIPPED = {"help", "compile", "capture", "dataset", "device", "tune", "baseline", "random"}
SHORT = ["", "0", "1", "2", "-1", "1.5", "nan", "inf", "1e-30", "x", "1,2", ",", "1,,2", "0x10"]
SHORT += ["1_0", "\u00b2", "True", "None", " ", "--", "bn", "a b", "\U0001f642"]
ODD = [*SHORT, "1e30", "99999999999999999999", "-0.0", "1e400", "../x", "/dev/null", "~", "x" * 300]
ODD += [".", "data", "net.pt", "results.json", "/dev/full/x", "linf", "a\nb", "%s", "{}", "\udcff"]


def load(path):
    """The module of a script."""
    name = "odd_" + path.replace("/", "_").removesuffix(".py")
    spec = importlib.util.spec_from_file_location(name, run.ROOT / path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def scripts():
    return {path: load(path) for path in (*TRAINERS, *EVALUATIONS, *TOOLS)}


# --- whole inputs -----------------------------------------------------------------------------


def arrays(rng):
    """40 training and 20 test images of ten classes, as an .npz holds them."""
    content = {}
    for split, count in (("train", 40), ("test", 20)):
        shape = (count, SIDE, SIDE, 3)
        content[f"x_{split}"] = rng.integers(256, size=shape, dtype=np.uint8)
        content[f"y_{split}"] = np.arange(count) % 10
    return content


def network():
    """The content of a checkpoint as a training writes it."""
    torch.manual_seed(0)
    model = models.build("resnet8", "bn", num_classes=10)
    facts = {"dataset": "cifar10", "method": "ct", "args": {"seed": 0, "dataset": "cifar10"}}
    return model.spec | facts | {"model": model.state_dict()}


@pytest.fixture(scope="module")
def whole(tmp_path_factory, scripts):
    """A folder with whole inputs: data/cifar10.npz, data/CIFAR-10-C, net.pt, results.json, and a
    run of each trainer, as runs/ct."""
    folder = tmp_path_factory.mktemp("whole")
    (folder / "data").mkdir()
    np.savez(folder / "data" / "cifar10.npz", **arrays(np.random.default_rng(0)))
    run.save_checkpoint(folder / "net.pt", network())
    error = {"contrast": [50.0]}
    result = {"checkpoints": [{"checkpoint": "net.pt", "options": {"seed": 0}, "error": error}]}
    (folder / "results.json").write_text(json.dumps({"dataset": "cifar10", **result}))
    released(folder / "data" / "CIFAR-10-C")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for script in TRAINERS:
            out = ["--out", f"runs/{script.removesuffix('.py')}"]
            status, err = in_process(scripts[script], [*options_of(script), *out])
            assert status == 0, err
    return folder


def released(folder):
    """Three corruptions of the 20 test images, as CIFAR-10-C has them."""
    folder.mkdir()
    rng = np.random.default_rng(1)
    np.save(folder / "labels.npy", np.tile(np.arange(20) % 10, 5))
    for name in ("contrast", "fog", "spatter"):
        np.save(
            folder / f"{name}.npy", rng.integers(256, size=(100, SIDE, SIDE, 3), dtype=np.uint8)
        )


# --- odd inputs: each changes the files of the folder and returns (script, options, environment) --


def damage(path, rng):
    """Change, cut or empty a file."""
    content = bytearray(path.read_bytes())
    kind = rng.randrange(4)
    if kind == 0:
        del content[rng.randrange(len(content)) :]
    elif kind == 1:
        content = bytearray()
    else:
        for _ in range(rng.randrange(1, 40)):
            place = len(content) if kind == 2 else min(len(content), 400)
            content[rng.randrange(place)] = rng.randrange(256)
    path.write_bytes(content)


def strange_value(rng):
    """A value that no field of a checkpoint should have."""
    return rng.choice([
        None, -1, 0, 10**12, 2.5, float("nan"), "", "x", "bn", [], {}, [1, [2]], {"a": {1: None}},
        torch.zeros(()), torch.full((3,), torch.nan), torch.zeros(2, 0), torch.tensor([1 + 1j]),
        True, b"x", (0.5, 0.5), (0.5, 0.5, 0.0), ("a", "b", "c"),
    ])  # fmt: skip


def odd_checkpoint(folder, rng):
    """net.pt is damaged, lacks a field, or has a strange one."""
    path, content = folder / "net.pt", network()
    kind = rng.randrange(6)
    if kind == 0:
        damage(path, rng)
    elif kind == 1:
        torch.save(strange_value(rng), path)
    elif kind == 2:
        content[rng.choice(sorted(content))] = strange_value(rng)
        torch.save(content | {"format": 1} if "format" not in content else content, path)
        change_saved(path, {}, folder)
    elif kind == 3:
        change_saved(path, {rng.choice(sorted(saved(folder))): strange_value(rng)}, folder)
    elif kind == 4:
        state = dict(content["model"])
        name = rng.choice(sorted(state))
        value = state[name]
        cut = value.flatten()[:0]
        state[name] = rng.choice([strange_value(rng), cut, value.to(torch.int8)])
        change_saved(path, {"model": state}, folder)
    else:
        state = dict(content["model"])
        del state[rng.choice(sorted(state))]
        change_saved(path, {"model": rng.choice([state, {}, list(state)])}, folder)
    script = rng.choice([*EVALUATIONS, "ct.py"])
    more = ["--teacher", "net.pt", "--lam", "1"] if script == "ct.py" else []
    return script, more, {}


def saved(folder):
    return torch.load(folder / "whole.pt", weights_only=True)


def change_saved(path, change, folder):
    """Write the whole checkpoint to `path` with some fields changed."""
    torch.save(saved(folder) | change, path)


def odd_arrays(folder, rng):
    """cifar10.npz breaks its contract."""
    path = folder / "data" / "cifar10.npz"
    content = arrays(np.random.default_rng(0))
    key = rng.choice(sorted(content))
    split = key[1:]
    x, y = f"x{split}", f"y{split}"
    kind = rng.randrange(9)
    if kind == 0:
        damage(path, rng)
        return rng.choice([*TRAINERS, *EVALUATIONS, "eval/growth.py"]), [], {}
    if kind == 1:
        del content[key]
    elif kind == 2:
        kinds = ["float32", "int64", "bool", "S4", "complex64", "uint64", "int8", "float16"]
        content[key] = content[key].astype(rng.choice(kinds))
    elif kind == 3:
        content[key] = rng.choice([content[key][:0], content[key][:1], content[key][..., None]])
    elif kind == 4:
        size = rng.choice([1, 2, 3, 7, 31, 64])
        content[x] = np.zeros((len(content[x]), size, size, rng.choice([1, 3, 4])), np.uint8)
    elif kind == 5:
        content[y] = content[y] + rng.choice([1, -1, 5, 10**6, 2**40])
    elif kind == 6:
        content[y] = np.full_like(content[y], rng.choice([0, 9, 255, -1]))
    elif kind == 7:
        classes = rng.choice([["a"], list("abcdefghij"), [["a"] * 10], [""] * 10, "x", [1.5] * 10])
        content["classes"] = np.array(classes)
    else:
        content[x] = content[x].transpose(0, 3, 1, 2)
    np.savez(path, **content)
    return rng.choice([*TRAINERS, *EVALUATIONS, "eval/growth.py"]), [], {}


def odd_corrupted(folder, rng):
    """A file of CIFAR-10-C is damaged, or its array breaks the contract."""
    place = folder / "data" / "CIFAR-10-C"
    path = place / rng.choice(["contrast.npy", "labels.npy"])
    array = np.load(path)
    kind = rng.randrange(8)
    if kind == 0:
        damage(path, rng)
    elif kind == 1:
        path.unlink()
    elif kind == 2:
        kinds = ["float32", "int64", "bool", "S4", "complex64", "uint16", "int8", "object"]
        np.save(path, array.astype(rng.choice(kinds)))
    elif kind == 3:
        np.save(path, rng.choice([array[:0], array[:20], array[:99], array[..., None], array[0]]))
    elif kind == 4:
        sides = rng.choice([(1, 1), (32, 31), (64, 64)])
        np.save(place / "contrast.npy", np.zeros((100, *sides, rng.choice([1, 3, 4])), np.uint8))
    elif kind == 5:
        labels = np.tile(np.arange(20) % 10, 5)
        labels[rng.randrange(100)] = rng.choice([255, -1, 3, 10, 2**40])
        np.save(place / "labels.npy", rng.choice([labels, np.tile(labels[:20] + 1, 5)]))
    elif kind == 6:
        np.save(place / "labels.npy", np.tile(rng.choice([[0] * 20, [255] * 20, [-1] * 20]), 5))
    else:
        content = rng.choice(["{}", "[", "[]", '{"seed": 1, "frost": 2, "sha256": 3}', "\0"])
        (place / "manifest.json").write_text(content)
    chosen = rng.choice(["contrast", "all", "contrast,fog", "fog,spatter"])
    return "eval/corruptions.py", ["--corruptions", chosen], {}


def odd_resume(folder, rng):
    """A run that is resumed is damaged, lacks a file, or is another script's."""
    script = rng.choice(list(TRAINERS))
    name = script.removesuffix(".py")
    place = folder / "runs" / name
    shutil.copytree(folder / "whole-runs", folder / "runs")
    checkpoints = sorted(path.name for path in place.glob("*.pt"))
    kind = rng.randrange(9)
    if kind < 2:
        damage(place / rng.choice(checkpoints), rng)
    elif kind == 2:
        damage(place / rng.choice(["args.json", "log.jsonl", f"{name}.py"]), rng)
    elif kind == 3:
        (place / rng.choice([*checkpoints, "args.json", "log.jsonl", f"{name}.py"])).unlink()
    elif kind == 4:
        options = json.loads((place / "args.json").read_text())
        values = [None, [], {}, "x", "", -1, 0, 1.5, True, [[1]], {"a": 1}, 10**30, "bn", [None]]
        options[rng.choice(sorted(options))] = rng.choice(values)
        (place / "args.json").write_text(json.dumps(options))
    elif kind == 5:
        (place / "args.json").write_text(rng.choice(["null", "[]", "3", '"x"', "{}", "\ud7ff{"]))
    elif kind == 6:
        path = place / rng.choice(checkpoints)
        content = torch.load(path, weights_only=True)
        content[rng.choice(sorted(content))] = strange_value(rng)
        torch.save(content, path)
    elif kind == 7:
        place = folder / "runs" / rng.choice([t.removesuffix(".py") for t in TRAINERS])
    else:
        path = place / rng.choice([*checkpoints, "args.json", "log.jsonl"])
        path.unlink()
        rng.choice([path.mkdir, lambda: path.symlink_to(path), lambda: os.mkfifo(path)])()
    usual = options_of(script)
    at = usual.index("--out")
    usual[at : at + 2] = rng.choice([
        ["--resume", str(place.relative_to(folder))],
        ["--resume", "auto", "--out", str(place.relative_to(folder))],
    ])  # fmt: skip
    return script, [*usual, *LONGER[script].split()], {}


def picture(path, rng):
    """Write an odd file: strange mode, size or content, cut or with bytes changed."""
    mode = rng.choice(["RGB", "L", "1", "P", "RGBA", "CMYK", "I;16", "LA", "F", "I"])
    size = rng.choice([(1, 1), (1, 90), (40, 40), (33, 20), (200, 3)])
    image = Image.effect_noise(size, 90).convert("L")
    if mode in ("I;16", "F", "I"):
        image = Image.fromarray((np.array(image) * 200.0).astype(
            {"I;16": "uint16", "F": "float32", "I": "int32"}[mode]
        ))  # fmt: skip
    elif mode != "L":
        image = image.convert("RGB" if mode == "CMYK" else mode).convert(mode)
    try:
        image.save(path)
    except (OSError, ValueError, KeyError):  # this format has no such mode
        image.convert("L").convert("RGB").save(path)
    if rng.random() < 0.5:
        damage(path, rng)


def odd_pictures(folder, rng):
    """A tree of two classes: some whole pictures, some odd ones, strange names and places."""
    suffixes = ["jpg", "png", "gif", "bmp", "tiff", "webp", "ppm"]
    for split in ("train", "val"):
        for name in ("a", "b"):
            place = folder / "data" / split / name
            place.mkdir(parents=True)
            for k in range(rng.choice([0, 1, 4, 8])):
                Image.effect_noise((40, 36), 90).convert("RGB").save(place / f"{k}.png")
            for k in range(rng.randrange(5)):
                picture(place / f"odd{k}.{rng.choice(suffixes)}", rng)
    kind = rng.randrange(8)
    place = folder / "data" / rng.choice(["train", "val"])
    if kind == 0:
        (place / "a" / "folder.jpg").mkdir()
    elif kind == 1:
        (place / "a" / "loop").symlink_to(place)
    elif kind == 2:
        (place / "a" / "nothing.png").symlink_to(place / "gone.png")
    elif kind == 3:
        (place / "above.png").write_bytes(b"")
    elif kind == 4:
        shutil.rmtree(place)
    elif kind == 5:
        (place / "a" / "b\u00fccher \U0001f642.png").write_bytes(b"GIF89a")
    elif kind == 6:
        os.rename(place / "b", os.fsencode(place) + b"/b\xff")
    else:
        os.mkfifo(place / "a" / "pipe.png")
    more = ["--dataset", "folder", "--image-size", "32", "--batch-size", "2", "--workers", "0"]
    script = rng.choice([*TRAINERS, "eval/growth.py"])
    return script, more, {}


def odd_options(folder, rng, scripts):
    """One or two options of a script with odd values."""
    script = rng.choice([*TRAINERS, *TRAINERS, *EVALUATIONS, *TOOLS])
    actions = []
    original = run.Parser.parse_known_args

    def listen(parser, args=None, namespace=None):
        actions.extend(a for a in parser._actions if a.dest not in SKIPPED)
        return original(parser, args, namespace)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run.Parser, "parse_known_args", listen)
        with contextlib.suppress(UserError, SystemExit):
            scripts[script].parse_args([])
    more = []
    for _ in range(rng.choice([1, 1, 2])):
        action = rng.choice(actions)
        value = rng.choice(SHORT if action.dest in LONG else ODD)
        if not action.option_strings:
            more.append(value)
        elif action.nargs == 0:
            more.append(action.option_strings[0] + rng.choice(["", "=x"]))
        elif action.nargs == 2:
            more += [action.option_strings[0], value, rng.choice(ODD)]
        else:
            more.append(f"{action.option_strings[0]}={value}")
    return script, more, {}


def odd_environment(folder, rng):
    """An environment variable that is strange, for a whole process."""
    name, value = rng.choice([
        ("RANK", "x"), ("RANK", ""), ("RANK", "-1"), ("WORLD_SIZE", "two"), ("WORLD_SIZE", ""),
        ("LOCAL_RANK", "x"), ("TORCHELASTIC_RESTART_COUNT", "x"), ("PYTHONIOENCODING", "ascii"),
        ("PYTHONIOENCODING", "latin-1"), ("LC_ALL", "C"), ("LANG", "xx_YY"), ("HOME", ""),
        ("HOME", "/dev/null"), ("TMPDIR", "/nowhere"), ("TORCH_HOME", "/dev/null"),
        ("COLUMNS", "0"), ("COLUMNS", "1"), ("COLUMNS", "x"), ("TERM", "dumb"), ("NO_COLOR", "1"),
        ("PYTHONWARNINGS", "error::FutureWarning"), ("PYTHONOPTIMIZE", "2"), ("TZ", "x"),
        ("PYTHONUNBUFFERED", "1"), ("PATH", ""), ("MASTER_PORT", "x"), ("PYTHONHASHSEED", "7"),
    ])  # fmt: skip
    environment = {name: value}
    if name == "MASTER_PORT":
        environment |= {"MASTER_ADDR": "localhost", "WORLD_SIZE": "2", "RANK": "0"}
    script = rng.choice([*TRAINERS, *EVALUATIONS, *TOOLS])
    return script, rng.choice([[], [], ["--help"]]), environment


class Hanging(BaseException):
    """A case that does not end. No `except Exception` may hide it."""


# --- running and judging ------------------------------------------------------------------------


def options_of(script):
    usual = (TRAINERS | EVALUATIONS | TOOLS)[script].split()
    return usual if script in TOOLS else [*usual, *DATA.split()]


def in_process(module, argv):
    """(status, stderr) of a script run by `run.cli` here. Exceptions pass."""
    out, err = io.StringIO(), io.StringIO()
    numbers = [getattr(signal, n) for n in ("SIGTERM", "SIGINT", "SIGUSR1", "SIGHUP")]
    before = {number: signal.getsignal(number) for number in numbers}
    status = 0

    def too_long(*_):
        raise Hanging(f"still runs after {PATIENCE} s")

    signal.signal(signal.SIGALRM, too_long)
    signal.alarm(PATIENCE)
    streams = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = out, err
    try:
        run.cli(module.main, lambda: module.parse_args(argv))
    except SystemExit as end:
        status = end.code or 0
    finally:
        signal.alarm(0)
        sys.stdout, sys.stderr = streams
        for number, handler in before.items():
            signal.signal(number, handler)
    return status, err.getvalue()


def in_a_process(script, argv, environment, folder):
    command = [sys.executable, str(run.ROOT / script), *argv]
    done = subprocess.run(
        command, cwd=folder, env=os.environ | environment, capture_output=True, timeout=PATIENCE
    )
    return done.returncode, done.stderr.decode(errors="replace")


def no_download(cls, name, folder):
    raise UserError(f"{name}: not in {folder}, and no case may download it")


def check_files(folder, before):
    """What the run wrote is whole: checkpoints load, JSON parses, nothing temporary is left."""
    for path in folder.rglob("*"):
        if path in before or not path.is_file():
            continue
        name = path.name
        assert ".part" not in name and name != ".args.json" and ".tmp" not in name, name
        if name.endswith(".pt"):
            run.load_checkpoint(path, foreign=True)
        elif name.endswith(".json"):
            json.loads(path.read_text())
        elif name.endswith(".jsonl"):
            for line in path.read_text().splitlines():
                json.loads(line)
        elif name.endswith(".npz"):
            assert zipfile.is_zipfile(path), name
    made = folder / "run"
    assert not made.is_dir() or (made / "args.json").is_file(), "a run directory without options"


KINDS = (
    odd_checkpoint, odd_resume, odd_arrays, odd_corrupted, odd_pictures, odd_options, odd_options,
    odd_options,
)  # fmt: skip


@pytest.mark.parametrize(
    "case", [*range(50), *(pytest.param(k, marks=pytest.mark.slow) for k in range(50, 1050))]
)
def test_odd_input(case, whole, scripts, tmp_path, monkeypatch):
    rng = random.Random(case)
    folder = tmp_path / "here"
    shutil.copytree(whole, folder, ignore=shutil.ignore_patterns("runs"))
    shutil.copy(folder / "net.pt", folder / "whole.pt")
    (folder / "whole-runs").symlink_to(whole / "runs")
    monkeypatch.chdir(folder)
    for variable in ("RANK", "WORLD_SIZE", "TORCHELASTIC_RESTART_COUNT"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(data.arrays, "download", no_download)
    kind = odd_environment if case % 25 == 24 else rng.choice(KINDS)
    more = (scripts,) if kind is odd_options else ()
    script, options, environment = kind(folder, rng, *more)
    argv = options if kind is odd_resume else [*options_of(script), *options]
    told = f"{kind.__name__}: {environment} {script} {' '.join(map(repr, argv))}"
    print(told)
    before = set(folder.rglob("*"))
    if environment:
        status, err = in_a_process(script, argv, environment, folder)
    else:
        status, err = in_process(scripts[script], argv)
    print("status", status)
    assert status in (0, 2), f"{told}\n{err[-1500:]}"
    assert "Traceback" not in err, f"{told}\n{err[-1500:]}"
    if status == 2:
        said = ("note: ", "skipped ", "warning: ")
        lines = [line for line in err.splitlines() if not line.startswith(said)]
        assert len(lines) == 1 and lines[0].startswith("error: "), f"{told}\n{err[-1500:]}"
        assert len(lines[0]) > len("error: ") + 8
    check_files(folder, before)
