"""`--help` of the host's commands: a text, an example, and a help with its default for every flag."""

import argparse
from collections.abc import Callable, Iterator
from typing import NoReturn, get_args

import pytest

from host import generate
from host.bench import __main__ as bench
from host.data import prepare
from host.evaluate import __main__ as evaluate
from host.experiments import baseline, compare, remask
from host.train import trainer
from host.train.run_folder import Stage
from tests.support.commands import call

MAINS: dict[str, Callable[[], None]] = {
    "data": prepare.main,
    "train": trainer.main,
    "evaluate": evaluate.main,
    "generate": generate.main,
    "bench": bench.main,
    "baseline": baseline.main,
    "compare": compare.main,
    "experiments.remask": remask.main,
}


class Shown(Exception):
    """Instead of running a command."""


def parser_of(main: Callable[[], None]) -> argparse.ArgumentParser:
    found: list[argparse.ArgumentParser] = []

    def parse_args(parser: argparse.ArgumentParser, *_: object, **__: object) -> NoReturn:
        found.append(parser)
        raise Shown

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Shown):
        patch.setattr(argparse.ArgumentParser, "parse_args", parse_args)
        call(main)
    return found[0]


def actions_of(parser: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    """Of a parser and of its sub-commands."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                yield from actions_of(command)
        elif not isinstance(action, argparse._HelpAction):
            yield action


@pytest.mark.parametrize("name", MAINS)
def test_help_has_a_text_an_example_and_every_default(name: str) -> None:
    parser = parser_of(MAINS[name])
    shown = parser.format_help()
    assert parser.description and "example" in shown
    actions = list(actions_of(parser))
    assert actions
    for action in actions:
        flag = "/".join(action.option_strings) or action.dest
        assert action.help, f"{flag} has no help"
        takes_value = action.nargs != 0 and action.option_strings and not action.required
        if takes_value and "default" not in action.help:
            assert action.default is None, f"the help of {flag} lacks its default"


def test_help_of_training_says_what_each_stage_trains_and_which_take_pictures() -> None:
    actions = {action.dest: action for action in actions_of(parser_of(trainer.main))}
    for stage in get_args(Stage):
        assert f"{stage}: " in (actions["stage"].help or "")
    for stage in ("pictures", "conditions", "reads"):
        assert f"--stage {stage}" in (actions["pictures"].help or "")
    assert set(actions["stage"].choices or ()) == set(get_args(Stage))
