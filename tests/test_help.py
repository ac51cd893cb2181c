"""--help of every script: each option says what it is, and its default once."""

import argparse
import importlib.util
import re

import pytest

from common import run

SCRIPTS = [*run.ROOT.glob("*.py"), *run.ROOT.glob("eval/*.py")]
SCRIPTS = sorted(path for path in SCRIPTS if "parse_args(argv" in path.read_text())


class Found(Exception):
    pass


def parser_of(path, monkeypatch):
    """The parser that a script builds."""

    def stop(self, *args):
        raise Found(self)

    spec = importlib.util.spec_from_file_location(f"help_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", stop)
    with pytest.raises(Found) as found:
        module.parse_args([])
    return found.value.args[0]


def options(parser):
    """(parser, action) of a parser and of its commands."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                yield from options(command)
        elif action.help != argparse.SUPPRESS:
            yield parser, action


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_options_explain_themselves(path, monkeypatch):
    for parser, action in options(parser_of(path, monkeypatch)):
        name = "/".join(action.option_strings) or action.dest
        assert action.help, f"{name} has no help"
        shown = parser._get_formatter()._expand_help(action)
        assert "None" not in shown, f"{name}: {shown}"
        assert len(re.findall("default", shown)) <= 1, f"{name}: {shown}"
        if action.option_strings and action.default not in (None, argparse.SUPPRESS):
            assert "default" in shown, f"{name}: {shown}"


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_usage_names_the_positional_arguments(path, monkeypatch):
    parser = parser_of(path, monkeypatch)
    usage = parser.format_usage()
    names = [action for action in parser._actions if not action.option_strings]
    assert usage.startswith(f"usage: {path.name} [options]")
    shown = usage.split("[options]")[1]
    for action in names:
        choices = [] if action.metavar else action.choices
        words = [*map(str, choices or ())] or [action.metavar or action.dest]
        assert all(word in shown for word in words)
    assert bool(shown.split()) == bool(names)
    words = [line.split()[-1] for line in parser.format_help().split("examples:")[0].splitlines()
             if line.split()]  # fmt: skip
    assert not [word for word in words if re.fullmatch(r"-?-?[a-z]+-", word)]  # broken at a hyphen


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_usage_fits_a_line(path, monkeypatch):
    assert len(parser_of(path, monkeypatch).format_usage().splitlines()) <= 2
