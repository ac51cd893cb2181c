"""Fixtures shared by all tests: a small thread count, the folder with real data, real CIFAR-10."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
SHARED = Path(os.environ.get("SHARED_DIR", ROOT.parent / "shared"))


def pytest_configure(config):
    """On a machine with a GPU, too, the suite computes on the CPU, where runs repeat bit for bit.
    `pytest -m gpu` runs the tests that need one."""
    if config.option.markexpr != "gpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


@pytest.fixture(scope="session")
def shared():
    """The folder beside the checkout: golden files, sample trees, third-party checkpoints."""
    if not SHARED.is_dir():
        pytest.skip("needs ../shared (golden files, real data, third-party checkpoints)")
    return SHARED


@pytest.fixture(scope="session")
def cifar10_dir(shared, tmp_path_factory):
    """A data directory with all of the real CIFAR-10."""
    return prepared("cifar10", shared, tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="session")
def cifar100_dir(shared, tmp_path_factory):
    """A data directory with all of the real CIFAR-100."""
    return prepared("cifar100", shared, tmp_path_factory.mktemp("data"))


def prepared(name, shared, folder):
    command = [sys.executable, str(shared / "data" / "prepare.py"), name, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"{name} could not be prepared: {done.stderr.strip().splitlines()[-1]}")
    return folder


@pytest.fixture(autouse=True)
def same_everywhere():
    """The same global seed for every test, and full use of the cores left to the test itself."""
    torch.manual_seed(0)
