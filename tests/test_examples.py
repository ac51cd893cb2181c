"""The examples (`>>>`) in the docstrings of the five doors, run as they stand."""

import doctest
import importlib
import pkgutil

import torch

import common

DOORS = ("models", "data", "corruptions", "attacks", "run")
MODULES = [
    module.name
    for module in pkgutil.walk_packages(common.__path__, "common.")
    if module.name.split(".")[1] in DOORS
]


def examples(name):
    """The doctests of a module's own functions and classes, with what the module itself imports."""
    module = importlib.import_module(name)
    return [test for test in doctest.DocTestFinder().find(module) if test.examples]


def test_examples_do_what_they_say():
    """As printed, after torch.manual_seed(0)."""
    for name in MODULES:
        for test in examples(name):
            torch.manual_seed(0)
            failed, tried = doctest.DocTestRunner(verbose=False).run(test)
            assert tried and not failed, test.name


def test_what_users_call_has_an_example():
    """The functions that the READMEs name for Python."""
    found = {test.name for name in MODULES for test in examples(name)}
    assert found >= {
        "common.attacks.autoattack.autoattack",
        "common.corruptions.engine.corrupt",
        "common.corruptions.measure.corruption_table",
        "common.corruptions.transform.Corrupt",
    }
