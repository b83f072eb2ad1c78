"""--help of the edge's commands: an example, a text for each flag, and the default of each that takes a value."""

import argparse
import importlib
from typing import Final

import pytest

from tests.support.commands import call

COMMANDS: Final = (
    "edge.build",
    "edge.bundle",
    "edge.daemon",
    "edge.demo",
    "edge.doctor",
    "edge.fleet.__main__",
    "edge.generate",
    "edge.measure.bench",
    "host.export.__main__",
)


class Stop(Exception):
    """Instead of running a command."""


def parser_of(module: str, monkeypatch: pytest.MonkeyPatch) -> argparse.ArgumentParser:
    """What the command's `main` parses its line with."""
    found: list[argparse.ArgumentParser] = []

    def stop(self: argparse.ArgumentParser, *_: object, **__: object) -> None:
        found.append(self)
        raise Stop

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", stop)
    with pytest.raises(Stop):
        call(importlib.import_module(module).main)
    return found[0]


def flags(parser: argparse.ArgumentParser) -> list[argparse.Action]:
    """With those of sub-commands."""
    found = []
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            found += [flag for below in action.choices.values() for flag in flags(below)]
        elif action.option_strings and action.dest != "help":
            found.append(action)
    return found


@pytest.mark.parametrize("module", COMMANDS)
def test_help_explains_every_flag(module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    parser = parser_of(module, monkeypatch)
    assert "python -m" in f"{parser.epilog}{parser.description}"
    silent = [flag.option_strings[0] for flag in flags(parser) if not flag.help]
    assert silent == []
    without_default = [
        flag.option_strings[0]
        for flag in flags(parser)
        if flag.nargs != 0 and not flag.required and "default" not in str(flag.help) and flag.default is not None
    ]
    assert without_default == []
