"""Checkpoints: plain dicts of tensors, numbers and strings, and what made them."""

import functools
import os
import platform
import re
import subprocess
from pathlib import Path

import torch

from common.run.errors import UserError

FORMAT = 1  # of checkpoints; raised when a reader would misunderstand an older file
ROOT = Path(__file__).resolve().parent.parent.parent


def git_hash():
    """Commit of the checkout, with "+" when tracked files differ from it; "" without one.

    The commit of a repository around the checkout says nothing about this code: "" for that too.
    """

    def git(*command):
        done = subprocess.run(["git", "-C", str(ROOT), *command], capture_output=True, text=True)
        return done.stdout.strip() if done.returncode == 0 else ""

    try:
        top = git("rev-parse", "--show-toplevel")
        if not top or Path(top).resolve() != ROOT:
            return ""
        head = git("rev-parse", "--short=12", "HEAD")
        return head + ("+" if head and git("status", "--porcelain", "-uno") else "")
    except OSError:
        return ""


@functools.cache
def versions():
    """What a number depends on besides its command."""
    import numpy
    import torchvision

    return {
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "torchvision": str(torchvision.__version__),
        "numpy": str(numpy.__version__),
        "git": git_hash(),
    }


def older(path, age):
    """The name that the checkpoint `path` has when `age` others were written after it."""
    return path.with_name(f"{path.stem}.{age}{path.suffix}") if age else path


def on_host(state):
    """The state, dicts and lists of tensors and numbers, with the tensors of a GPU on the CPU.

    All copies are under way into pinned memory before the host waits, once for each device.
    """
    devices = set()

    def copied(value):
        if isinstance(value, dict):
            return {key: copied(part) for key, part in value.items()}
        if isinstance(value, (list, tuple)):
            return type(value)(map(copied, value))
        if not isinstance(value, torch.Tensor) or value.device.type != "cuda":
            return value
        devices.add(value.device)
        host = torch.empty_like(value, device="cpu", pin_memory=True)
        return host.copy_(value, non_blocking=True)

    state = copied(state)
    for device in devices:
        torch.cuda.synchronize(device)
    return state


def save_checkpoint(path, checkpoint, keep=1):
    """Write a dict of tensors, numbers, strings, lists and dicts; the name appears when all is
    on disk. Raises UserError where the file cannot be written; an older file then stays.

    keep: of the files written under this name, as many stay: last.pt, last.1.pt (the one before).
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(temporary, "wb") as file:
            torch.save({"format": FORMAT, **checkpoint}, file)
            file.flush()
            os.fsync(file.fileno())
        if path.exists():
            for age in range(keep - 1, 1, -1):
                if older(path, age - 1).exists():
                    os.replace(older(path, age - 1), older(path, age))
            if keep > 1:
                older(path, 1).unlink(missing_ok=True)
                try:
                    os.link(path, older(path, 1))  # so that `path` is there at every moment
                except OSError:  # a file system without links
                    os.replace(path, older(path, 1))
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # RuntimeError: what torch.save makes of a full disk
        reason = getattr(error, "strerror", None) or str(error).strip().split("\n")[0][:100]
        left = "; the one before it is whole" if path.exists() else ""
        raise UserError(f"cannot write {path}: {reason}{left}") from None
    finally:
        temporary.unlink(missing_ok=True)


# Types of the fields that every reader of a checkpoint relies on.
FIELDS = {
    "format": int, "arch": str, "norm": str, "num_classes": int, "image_size": int, "dataset": str,
    "method": str, "step": int, "args": dict, "model": dict, "optimizer": dict, "scaler": dict,
    "metrics": dict, "total": int,
}  # fmt: skip


def wrong_field(checkpoint):
    """Name of a field of the checkpoint that has another type than FIELDS says; else None."""
    for name, kind in FIELDS.items():
        value = checkpoint.get(name, kind())
        if not isinstance(value, kind) or isinstance(value, bool):
            return name
    for name in ("args", "model"):
        if not all(isinstance(key, str) for key in checkpoint.get(name, ())):
            return name
    if not all(isinstance(value, torch.Tensor) for value in checkpoint["model"].values()):
        return "model"
    return None


def load_checkpoint(path, device="cpu", foreign=False):
    """Read a checkpoint without executing anything in it (weights_only).

    foreign=True returns any such file's content, for state_dicts of other projects.
    """
    path = Path(path)
    if path.is_dir():
        path = path / "last.pt"
    if not path.is_file():
        raise UserError(f"{path}: no such checkpoint")
    if path.suffix == ".safetensors":
        line = f"torch.save(load_file('{path.name}'), '{path.stem}.pt')"
        raise UserError(
            f'{path}: convert it first: python -c "import torch; from safetensors.torch import '
            f'load_file; {line}"'
        )
    try:
        checkpoint = torch.load(path, map_location=device, weights_only=True)
    except Exception as error:  # torch raises half a dozen types for broken files
        found = re.search(r"GLOBAL ([\w.]+)", str(error))
        if found:  # an object of a class, which only executing the file could make
            raise UserError(
                f"{path}: holds an object of {found[1]}, refused; where the file is trusted, save "
                "its state_dict alone"
            ) from None
        reason = str(error).strip().split("\n")[0][:100] or type(error).__name__
        raise UserError(
            f"{path}: truncated, or not a file of plain tensors; refused ({reason})"
        ) from None
    if foreign:
        return checkpoint
    if not isinstance(checkpoint, dict) or not {"format", "arch", "model"} <= checkpoint.keys():
        raise UserError(
            f"{path}: not a checkpoint of this project; for the state_dict of another one give "
            "--arch, --dataset, --mean and --std to an eval script"
        )
    name = wrong_field(checkpoint)
    if name:
        raise UserError(
            f"{path}: its {name} is {str(checkpoint[name])[:40]!r}, which no training writes; take "
            "an intact copy"
        )
    if checkpoint["format"] > FORMAT:
        raise UserError(f"{path}: written by a newer version (format {checkpoint['format']})")
    return checkpoint
