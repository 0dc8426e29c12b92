"""What a shell needs to complete commands and flags with the tab key."""

import argparse
from collections.abc import Mapping, Sequence
from typing import Any

import shtab

from selfadapt._wording import Parser, flag_of, type_of, words_of

SHELLS = tuple(shtab.SUPPORTED_SHELLS)
PATHS = ("model", "images", "masks", "validation", "out", "config", "json", "table", "run")
"""Arguments that take a file or a folder."""


def completion(shell: str, parsers: Mapping[str, Sequence[Parser]], adapters: Sequence[str]) -> str:
    """A script that makes a shell complete `selfadapt`.

    Args:
        shell: one of `SHELLS`.
        parsers: of each command, by its name, one or more: what any of them knows is completed.
        adapters: names that --adapter takes.
    """
    whole = argparse.ArgumentParser("selfadapt")
    whole.add_argument("--version", action="store_true")
    commands = whole.add_subparsers()
    listed = {"adapter": list(adapters)}
    for name, several in parsers.items():
        about = several[-1].description
        plain = commands.add_parser(name, help=about, description=about, add_help=False)
        actions: dict[str, list[argparse.Action]] = {}
        for action in (each for parser in several for each in parser.shown):
            actions.setdefault(action.dest, []).append(action)
        for dest, same in actions.items():
            found = [word for each in same for word in each.choices or words_of(type_of(each))]
            _add(plain, same[0], listed.get(dest) or list(dict.fromkeys(found)))
    return str(shtab.complete(whole, shell))


def _add(parser: argparse.ArgumentParser, action: argparse.Action, words: Sequence[str]) -> None:
    """An argument as typed in a shell, with nothing but what is completed."""
    names = [flag_of(action.dest)] if action.option_strings else [action.dest]
    added: Any
    if action.nargs == 0 or action.dest == "print_config":  # that may have a value
        added = parser.add_argument(*names, action="store_true", help=action.help)
    else:
        added = parser.add_argument(*names, choices=words or None, help=action.help)
    if action.dest in PATHS:
        added.complete = shtab.FILE
