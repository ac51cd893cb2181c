"""Trainings give the bits that they gave before the scripts were written on run.Loop.

tests/golden/refactor.json was written by commit 0c909dd, in which nofrost.py and bn_ablation.py
still had their own loops. It holds the SHA-256 of the final weights of every checkpoint, and the
rows of log.jsonl: CPU, fp32, one thread. The runs of two processes are of later commits, see
"exceptions" there. `python tests/test_golden.py --write ROOT TWO TWO-BN TWO-FIXUP`: checkouts.
"""

import hashlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
GOLDEN = Path(__file__).resolve().parent / "golden" / "refactor.json"

ALL = "--dataset shapes --precision fp32 --device cpu --batch-size 16 --limit 80 --seed 3 "
ALL += "--momentum 0.9 --weight-decay 0.0005 --log-every 2 --save-every 1 "
CT = ALL + "--image-size 24 --warmup 1 --clip 1 --lr 0.05 --teacher-lr 0.1 --teacher-clip 1 "
CT += "--eval-every 1 --corrupted-images 0 --no-baseline "
FIXUP = ALL + "--image-size 16 --warmup 1 --clip 1 --lr 0.05 --schedule cosine --eval-every 1 "
FIXUP += "--corrupted-images 0 --penalty-weight 0.01 --penalty-reduction sum --arch resnet8 "
NOFROST = ALL + "--image-size 16 --warmup 1 --clip 1 --lr 0.05 --schedule step --eval-every 1 "
NOFROST += "--robust-images 0 --probe-images 20 --eps 4 --attack-steps 2 --attack-norm linf "
NOFROST += "--attack-mode eval --agc 0 --dropout 0 --drop-path 0 --epochs 2 --arch wrn10-1 "
BN = (
    ALL
    + "--image-size 32 --arch vgg11-4 --lrs 0.05 --steps 8 --eval-every 8 --log-every 5 --layers 5 "
)
BN += "--slots 3 --step-sizes 0.5,1,2,4 "
COMMANDS = {
    "ct": f"ct {CT} --arch resnet8 --norm bn --lam 1 --distance cosine --match features "
    "--student-init fresh --epochs 2 --teacher-epochs 1 --augment",
    "ct-alone": f"ct {CT} --arch wrn10-1 --norm bn --lam 0 --epochs 2 --no-augment",
    "ct-kl": f"ct {CT} --arch wrn10-1 --norm gn --lam 2 --distance kl --match logits "
    "--temperature 4 --student-init teacher --epochs 1 --teacher-epochs 2 --augment",
    "fixup": f"fixup_penalty {FIXUP} --norm fixup --init fixup --penalty embedding --dropout 0 "
    "--mixup 0 --scalar-lr 0.1 --epochs 2 --augment",
    "fixup-mixup": f"fixup_penalty {FIXUP} --norm none --init he --penalty logits --dropout 0.2 "
    "--mixup 1 --epochs 2 --augment",
    "fixup-bn": f"fixup_penalty {FIXUP} --norm bn --init he --penalty none --dropout 0 --mixup 0 "
    "--epochs 2 --no-augment",
    "nofrost": f"nofrost {NOFROST} --norm nf --lam 0.5 --loss mixture --label-smoothing 0.1 "
    "--streams clean,adv --augment",
    "nofrost-dual": f"nofrost {NOFROST} --norm dual-bn --lam 0.5 --loss mixture "
    "--label-smoothing 0.1 --streams clean,adv --augment",
    "nofrost-trades": f"nofrost {NOFROST} --norm bn --loss trades --beta 6 --label-smoothing 0 "
    "--streams clean,adv --no-augment",
    "nofrost-tda": f"nofrost {NOFROST} --norm none --loss mixture --label-smoothing 0.1 "
    "--streams clean,tda,adv --augment",
    "bn": f"bn_ablation {BN} --norms bn --measure-every 3 --no-random --no-augment",
    "bn-none": f"bn_ablation {BN} --norms none --measure-every 0 --no-random --augment",
    "bn-noisy": f"bn_ablation {BN} --norms noisy-bn --measure-every 3 --random --no-augment",
}
TWO = {  # two processes, gloo
    "two": f"ct {CT} --arch resnet8 --norm gn --lam 0 --epochs 2 --augment",
    "two-bn": f"ct {CT} --arch resnet8 --norm bn --lam 1 --distance cosine --match features "
    "--student-init fresh --epochs 2 --teacher-epochs 1 --augment",
    "two-fixup": f"fixup_penalty {FIXUP} --norm fixup --init fixup --penalty embedding --dropout 0 "
    "--mixup 1 --scalar-lr 0.1 --epochs 2 --augment",
}
FAST = ("ct", "fixup", "nofrost", "bn")
EXCEPTIONS = {
    "limit": "80 divides evenly among the 10 classes: of another --limit, 64 say, 1616e5b draws "
    "with the seed which classes get one image more, so that other images are trained on.",
    "bn rows": "65e7960 also logs the loss at the end of an epoch, here every 5 steps, so it takes "
    "its next mean over fewer steps: the commands have --log-every 5.",
    "two": "written by a58bb73: in 0c909dd ct.py and fixup_penalty.py no longer took their rows of "
    "a batch, so every process trained on all of it, with the bits of one process (2160f8ab for "
    "--norm none); 4a287c8 gave each its own rows again. Norm gn, whose start 0c909dd left alone.",
    "two-fixup": "written by bffb419: it holds from there on what two processes train.",
    "two-bn": "written by the commit that gave BatchNorm one exchange a layer and pass. It adds up "
    "the squares of each process around that process's own mean, so the last bits differ.",
}
SIZES = {"train": 200, "test": 60}
WORDS = ("loss", "error", "distance", "penalty", "test")
RENAMED = {"eval pgd_probe_error": "eval pgd_error"}  # in nofrost.py
LEFT_OUT = ("eval loss",)  # no longer logged


def train(command, out, *more):
    """Run a command in this process, with the scripts that sys.path finds."""
    script, *argv = command.split()
    module = __import__(script)
    from common import data

    getattr(data, "sets", data).SHAPES_SIZES.update(SIZES)
    module.main(module.parse_args([*argv, "--out", str(out), *more]))


def train_twice(command, root, out):
    """Run a command in two processes, with the scripts in `root`."""
    script, *argv = command.split()
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    words = [*launch, f"{script}.py", *argv, "--out", str(out)]
    done = subprocess.run(
        words, cwd=root, text=True, capture_output=True, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stdout + done.stderr


def weights_hash(path):
    """SHA-256 of the names, sorted, and the raw bytes of a checkpoint's weights."""
    digest = hashlib.sha256()
    for name, value in sorted(torch.load(path, weights_only=True)["model"].items()):
        digest.update(name.encode())
        digest.update(value.contiguous().numpy().tobytes())
    return digest.hexdigest()


def values_of(row):
    """{name: repr} of the numbers of a row of log.jsonl that belong to the training."""
    flat = row | {f"eval {k}": v for k, v in (row.get("eval") or {}).items()}
    chosen = {k: v for k, v in flat.items() if any(w in k for w in WORDS)}
    chosen = {RENAMED.get(k, k): v for k, v in chosen.items() if k not in LEFT_OUT}
    return {k: repr(v) for k, v in sorted(chosen.items()) if isinstance(v, (int, float, list))}


def fingerprint(out):
    """{"weights": {file: hash}, "log": {"network step": {name: repr}}} of a run directory."""
    log = {}
    for line in (out / "log.jsonl").read_text().splitlines():
        row = json.loads(line)
        values = values_of(row)
        if "step" in row and "event" not in row and values:
            name = row.get("run") or row.get("stage") or "network"
            log.setdefault(f"{name} {row['step']}", {}).update(values)
    files = [p for p in sorted(out.glob("*.pt")) if not p.stem.endswith(".1")]  # .1: the one before
    weights = {p.name: weights_hash(p) for p in files}
    return {"weights": weights, "log": log}


@pytest.fixture(scope="module")
def golden():
    found = json.loads(GOLDEN.read_text())
    if found["torch"] != torch.__version__:
        pytest.skip(f"the hashes are of torch {found['torch']}, this is {torch.__version__}")
    return found["commands"]


@pytest.fixture(autouse=True)
def one_thread(monkeypatch):
    """And the size of the data set restored after each test."""
    from common import data

    monkeypatch.setattr(data.sets, "SHAPES_SIZES", dict(data.sets.SHAPES_SIZES))
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def check(found, expected):
    assert found["weights"] == expected["weights"]
    rows = dict(found["log"])
    for key in found["log"]:  # nofrost.py's rows did not name their network
        rows["network " + key.split()[1]] = rows[key]
    for key, values in expected["log"].items():
        assert {k: rows[key].get(k) for k in values} == values, key


@pytest.mark.parametrize(
    "name", [pytest.param(k, marks=() if k in FAST else pytest.mark.slow) for k in COMMANDS]
)
def test_bits_are_those_before_the_loop(name, golden, tmp_path):
    train(COMMANDS[name], tmp_path / "run")
    check(fingerprint(tmp_path / "run"), golden[name])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ct-alone", "nofrost", "bn"])
def test_bits_after_a_kill_in_the_middle(name, golden, tmp_path, monkeypatch):
    """The process ends in the middle of an epoch; --resume repeats it from the last checkpoint."""
    from common import run

    class Killed(BaseException):
        pass

    calls, step = [], run.Loop.step

    def killed(self, *args, **options):
        calls.append(1)
        if len(calls) == 7:
            raise Killed
        return step(self, *args, **options)

    monkeypatch.setattr(run.Loop, "step", killed)
    with pytest.raises(Killed):
        train(COMMANDS[name], tmp_path / "run")
    train(COMMANDS[name], tmp_path / "run", "--resume", str(tmp_path / "run"))
    assert fingerprint(tmp_path / "run")["weights"] == golden[name]["weights"]


@pytest.mark.slow
@pytest.mark.parametrize("name", TWO)
def test_bits_of_two_processes(name, golden, tmp_path):
    train_twice(TWO[name], ROOT, tmp_path / "run")
    check(fingerprint(tmp_path / "run"), golden[name])


def write(root, *roots_of_two):
    """The fingerprints of the commands under the code in `root`; those of TWO in their own."""
    sys.path.insert(0, str(root))
    torch.set_num_threads(1)
    found = {}
    for name, command in COMMANDS.items():
        with tempfile.TemporaryDirectory() as folder:
            train(command, Path(folder) / "run")
            found[name] = fingerprint(Path(folder) / "run")
    for (name, command), place in zip(TWO.items(), roots_of_two, strict=True):
        with tempfile.TemporaryDirectory() as folder:
            train_twice(command, place, f"{folder}/run")
            found[name] = fingerprint(Path(folder) / "run")
    content = {"torch": torch.__version__, "commit": "0c909dd", "exceptions": EXCEPTIONS}
    return json.dumps(content | {"commands": found}, indent=1) + "\n"


if __name__ == "__main__":
    if sys.argv[1:2] != ["--write"] or len(sys.argv) != 6:
        sys.exit("usage: python tests/test_golden.py --write ROOT TWO TWO-BN TWO-FIXUP")
    sys.path = [p for p in sys.path if Path(p or ".").resolve() != ROOT]
    GOLDEN.write_text(write(*(Path(p).resolve() for p in sys.argv[2:])))
