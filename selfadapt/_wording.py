"""Errors of the shell's parser, in the words of who types."""

import argparse
import re
from collections.abc import Sequence
from dataclasses import fields
from difflib import get_close_matches
from typing import Any

from jsonargparse import ArgumentParser, Namespace

from selfadapt._adapter import Adapter
from selfadapt._config import Config
from selfadapt._errors import ConfigError

KINDS = {"int": "a whole number", "float": "a number", "bool": "true or false", "str": "text"}
EXPECTED = re.compile(r"Expected an? (?:<class '(\w+)'>|(?:typing\.)?Literal\[([^]]*)\])")
CHOICE = re.compile(r"invalid choice: (.*) \(choose from (.*)\)")
VALUE = re.compile(r'Parser key "([\w.]+)":(.*)(?:Given|Got) value: (.*)', re.DOTALL)


class Parser(ArgumentParser):
    """A parser that says which flag is wrong, what it takes, and an example.

    Attributes:
        kind: the adapter whose options are among its flags; not there if none was named.
    """

    kind: type[Adapter]

    def parse_args(self, words: Sequence[str]) -> Namespace:  # type: ignore[override]
        """As of the base class.

        Raises:
            ConfigError: the words, or the config file that they name, are not understood.
        """
        try:
            return super().parse_args(words)
        except argparse.ArgumentError as error:
            told = self._in_words(str(error))
            raise ConfigError(f"{told} (see: {self.prog} --help)") from None

    def takes(self, name: str) -> bool:
        """Whether it has an argument of that name."""
        return any(action.dest == name for action in self._actions)

    @property
    def shown(self) -> list[argparse.Action]:
        """The arguments that --help lists."""
        return [action for action in self._actions if action.help != argparse.SUPPRESS]

    def _in_words(self, message: str) -> str:
        before, _, rest = message.partition(": ")
        if found := VALUE.match(message):
            return self._wrong_value(*found.groups())
        if before == "the following arguments are required":
            return "; ".join(self._missing(name) for name in rest.split(", "))
        if before == "unrecognized arguments":
            return self._unknown(rest.split())
        if found := CHOICE.match(rest):
            return f"{found[1]} is not allowed: it is one of {found[2].replace(chr(39), '')}"
        if rest == "expected one argument":
            return without_value(message)
        return message

    def _wrong_value(self, name: str, reasons: str, value: str) -> str:
        kinds = [
            KINDS.get(kind, "") if kind else literals.replace("'", "")
            for kind, literals in EXPECTED.findall(reasons)
            if kind != "NoneType"
        ]
        if not kinds or not all(kinds):
            return f"{flag_of(name)} {value.strip()!r} is not allowed:{reasons.rstrip()}"
        default = self.get_default(name)
        example = "" if default is None else f", such as {flag_of(name)} {str(default).lower()}"
        takes = " or ".join(kinds)
        return f"{flag_of(name)} {value.strip()!r} is not allowed: it takes {takes}{example}"

    def _missing(self, name: str) -> str:
        action = next((a for a in self._actions if a.dest == name), None)
        flag = flag_of(name) if action is None or action.option_strings else name.upper()
        return f"{flag} is missing" + (f": {action.help}" if action and action.help else "")

    def _unknown(self, words: list[str]) -> str:
        flags = [word.partition("=")[0] for word in words if word.startswith("--")]
        if not flags:
            return f"{words[0]!r} is one word too many"
        name = flags[0].removeprefix("--")
        known = [a.dest for a in self._actions if a.option_strings]
        if close := get_close_matches(name, known, 1):
            hint = f": did you mean {flag_of(close[0])}?"
        elif name in {field.name for field in fields(Config)}:
            hint = ": it is a setting of `selfadapt adapt`"
        else:
            hint = ""
        return f"`{self.prog}` knows no {flag_of(name)}{hint}"


def without_value(message: str) -> str:
    """What argparse's "argument --images: expected one argument" means."""
    return f"{message.partition(':')[0].removeprefix('argument ')} takes a value: give one after it"


def type_of(action: argparse.Action) -> Any:
    """The type that an argument was declared with; None if it has none."""
    return getattr(action, "_typehint", None)


def flag_of(name: str) -> str:
    """As it is typed: `--batch-size` for `batch_size`."""
    return f"--{name.replace('_', '-')}"
