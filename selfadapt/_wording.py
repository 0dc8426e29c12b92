"""Errors of the shell's parser, in the words of who types."""

import argparse
import re
from collections.abc import Sequence
from dataclasses import fields
from difflib import get_close_matches
from typing import Any, Literal, get_args, get_origin

from jsonargparse import ArgumentParser, Namespace

from selfadapt._adapter import Adapter
from selfadapt._config import Config
from selfadapt._errors import ConfigError

LIST = "a list such as [2, 3]"
KINDS = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "text",
    Sequence: LIST,
    list: LIST,
    tuple: LIST,
    dict: "names and values such as {name: 1}",
}
"""Types of arguments, in words."""
CHOICE = re.compile(r"invalid choice: (.*) \(choose from (.*)\)")
VALUE = re.compile(r'Parser key "([\w.]+)":(.*)(?:Given|Got) value: (.*)', re.DOTALL)
SETTING = re.compile(
    r"""(?:(?<=\s)|(?<=\s\()|^)(\w+)="""
    r"""('[^']*'|"[^"]*"|\([^)]*\)|\[[^]]*]|True|False|None|-?(?:inf|nan|\d[\d.e+-]*\d|\d))"""
    r"""(?=[.,;:)]*(?:\s|$))(\sis\snot\sallowed)?"""
)
"""`name=value` in a message for those who write Python; not in the name of a file."""
FLAG = re.compile(r"--(\w+)")
NAME = re.compile(r"(?<![/\\.])\b[a-z0-9]+(?:_[a-z0-9]+)+\b(?!/)")
"""Of a setting, where it cannot be an English word."""
QUOTES = "'\""
PYTHON = re.compile(r"\b(True|False|None)\b(?! of)")


class Help(argparse.HelpFormatter):
    """Types in words, and defaults as they are typed."""

    def _get_help_string(self, action: argparse.Action) -> str:
        words = ["required"] if action.required and action.option_strings else []
        if not str(action.metavar).startswith("{"):  # which says the choices
            words += [word for word in kinds_of(type_of(action)) if word != KINDS[str]]
        told = [" or ".join(words)] if words else []
        plain = (None, argparse.SUPPRESS)
        if action.option_strings and action.nargs != 0 and action.default not in plain:
            told.append(f"default: {typed(action.default)}")
        about = str(action.help or "").removesuffix(".")
        return (f"{about} ({', '.join(told)})" if told else about).replace("%", "%%")


class Parser(ArgumentParser):
    """A parser that says which flag is wrong, what it takes, and an example.

    Attributes:
        kind: the adapter whose options are among its flags; not there if none was named.
    """

    kind: type[Adapter]

    def format_help(self, formatter: argparse.HelpFormatter | None = None) -> str:
        """As of the base class, with flags as they are typed."""
        for action in self.shown:
            if isinstance(action.metavar, str):
                action.metavar = action.metavar.replace(",null}", "}")
        return FLAG.sub(lambda found: flag_of(found[1]), super().format_help(formatter))

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

    def in_flags(self, message: str) -> str:
        """What is wrong with a setting, `name=value` in Python, in the flags of this command.

        A message that names the flag itself stays as it is; so do names of files, and what is
        written as `Name(name=value)`.
        """

        def said(found: re.Match[str]) -> str:
            name, value, refused = found.groups()
            before = message[: found.start()].rpartition("/")
            if before[1] and ":" not in before[2]:  # still the name of a file
                return found[0]
            if not self._has_flag(name) or re.search(rf"--{name}\b|{flag_of(name)}\b", message):
                return found[0]
            return f"{flag_of(name)} {PYTHON.sub(typed_word, value)}{refused or ''}"

        told = SETTING.sub(said, message)
        found = SETTING.match(message)
        if told == message or found is None or not found[3]:
            return told
        rule = PYTHON.sub(typed_word, NAME.sub(self._flagged, told)).removesuffix(".")
        example = "" if "such as" in rule else self._example(found[1])
        if example.endswith(f" {typed(found[2]).strip(QUOTES)}"):  # the default of an old run
            example = ""
        return f"{rule}{example} (see: {self.prog} --help)"

    def _has_flag(self, name: str) -> bool:
        return any(action.dest == name and action.option_strings for action in self._actions)

    def _flagged(self, found: re.Match[str]) -> str:
        return flag_of(found[0]) if self._has_flag(found[0]) else found[0]

    def _example(self, name: str) -> str:
        """How a flag is typed, with its default or else a word that it takes."""
        default = self.get_default(name)
        if default is None:
            action = next(action for action in self._actions if action.dest == name)
            default = next(iter(words_of(type_of(action))), None)
        return "" if default is None else f", such as {flag_of(name)} {typed(default)}"

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
            flag = before.removeprefix("argument ") if before.startswith("argument --") else ""
            takes = f"it is one of {found[2].replace(chr(39), '')}"
            example = self._example(flag.removeprefix("--")) if flag else ""
            return f"{flag} {found[1]} is not allowed: {takes}{example}".lstrip()
        if rest == "expected one argument":
            return without_value(message)
        return message

    def _wrong_value(self, name: str, reasons: str, value: str) -> str:
        action = next((each for each in self._actions if each.dest == name), None)
        kinds = kinds_of(type_of(action)) if action else []
        if not kinds:
            return f"{flag_of(name)} {value.strip()!r} is not allowed:{reasons.rstrip()}"
        takes = f"it takes {' or '.join(kinds)}{self._example(name)}"
        return f"{flag_of(name)} {value.strip()!r} is not allowed: {takes}"

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


def words_of(kind: Any) -> list[str]:
    """The words among what an argument of a type takes: "auto", "none", "true", ..."""
    if kind is bool:
        return ["true", "false"]
    if get_origin(kind) is Literal:
        return [str(value) for value in get_args(kind)]
    return [word for each in get_args(kind) for word in words_of(each)]


def kinds_of(kind: Any) -> list[str]:
    """What an argument of a type takes, in words; empty for a type that nobody has foreseen."""
    if get_origin(kind) is Literal:
        return [", ".join(words_of(kind))]
    plain = get_origin(kind) or kind
    if plain in KINDS:
        return [KINDS[plain]]
    return [word for each in get_args(kind) for word in kinds_of(each)]


def typed(value: object) -> str:
    """A value as it is typed.

    >>> typed(True), typed(None), typed(0.5)
    ('true', 'null', '0.5')
    """
    return PYTHON.sub(typed_word, str(value))


def typed_word(found: re.Match[str]) -> str:
    """As it is typed: `true` for Python's True."""
    return "null" if found[0] == "None" else found[0].lower()


def flag_of(name: str) -> str:
    """As it is typed: `--batch-size` for `batch_size`."""
    return f"--{name.replace('_', '-')}"
