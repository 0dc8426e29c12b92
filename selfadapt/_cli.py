"""The shell: selfadapt demo | adapt | segment | evaluate | check | calibrate | export | ..."""

import io
import logging
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from importlib.metadata import version
from typing import NamedTuple

from torch.distributed import is_torchelastic_launched

from selfadapt._completion import SHELLS, completion
from selfadapt._errors import SelfAdaptError
from selfadapt._options import make_parser
from selfadapt._registry import adapters
from selfadapt._shell_images import (
    evaluate_command,
    evaluate_parser,
    segment_command,
    segment_parser,
)
from selfadapt._shell_network import (
    calibrate_command,
    calibrate_parser,
    check_command,
    check_parser,
    export_command,
    export_parser,
)
from selfadapt._shell_run import (
    adapt_command,
    adapt_parser,
    adapters_command,
    adapters_parser,
    demo_command,
    demo_parser,
    report_command,
    report_parser,
    select_command,
    select_parser,
)
from selfadapt._wording import Parser

RESUMED = ("demo", "adapt", "segment")
"""Commands that take --resume."""
NOT_TRUSTED = 3
"""Exit code where the verdict is that a network is not to be trusted."""


def completion_parser(_: Sequence[str]) -> Parser:
    parser = make_parser("completion", completion_command.__doc__)
    parser.add_argument("shell", choices=SHELLS, help="which shell it is for")
    return parser


def completion_command(words: Sequence[str]) -> None:
    """Print what lets a shell complete commands and flags with the tab key."""
    shell = completion_parser(words).parse_args(words).shell
    found = adapters()
    ready = [["--adapter", name] for name, missing in found.items() if missing is None]
    parsers = {}
    for name, command in COMMANDS.items():
        plain = command.parser(["--help"])
        more = ready if plain.takes("adapter") else []
        parsers[name] = [plain, *(command.parser(words) for words in more)]
    print(completion(shell, parsers, list(found)))


class Command(NamedTuple):
    """What the first word names."""

    parser: Callable[[Sequence[str]], Parser]
    run: Callable[[Sequence[str]], bool | None]


COMMANDS = {
    "demo": Command(demo_parser, demo_command),
    "adapt": Command(adapt_parser, adapt_command),
    "segment": Command(segment_parser, segment_command),
    "evaluate": Command(evaluate_parser, evaluate_command),
    "check": Command(check_parser, check_command),
    "calibrate": Command(calibrate_parser, calibrate_command),
    "select": Command(select_parser, select_command),
    "export": Command(export_parser, export_command),
    "report": Command(report_parser, report_command),
    "adapters": Command(adapters_parser, adapters_command),
    "completion": Command(completion_parser, completion_command),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code.

    0; 2 for an error that the user can mend; 3 where it has worked, and the network is not to be
    trusted on these images.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] in ("-h", "--help"):
        print(_usage())
        return 0 if words else 2
    if words[0] == "--version":
        print(f"selfadapt {version('selfadapt')}")
        return 0
    name, *rest = [_underscored(word) for word in words]
    if name not in COMMANDS:
        return _fail(f"there is no command {name!r}; there are {', '.join(COMMANDS)}.")
    several = int(os.environ.get("WORLD_SIZE", "1")) > 1 and is_torchelastic_launched()
    if several and name != "adapt":
        return _fail(f"{name} works in one process: start it without torchrun.")
    try:
        with _sigterm_as_interrupt(), _quiet(several and os.environ["RANK"] != "0"):
            trusted = COMMANDS[name].run(rest)
    except SelfAdaptError as error:
        return _fail(_in_flags(COMMANDS[name], rest, str(error)))
    except OSError as error:
        return _fail(f"{error.filename or ''}: {error.strerror or error}".lstrip(": "))
    except KeyboardInterrupt:
        resumes = f"; `{name}` goes on with --resume" * (name in RESUMED)
        return _fail(f"interrupted{resumes}.", 130)
    # torchrun takes any other code than 0 for a crash
    return NOT_TRUSTED if trusted is False and not several else 0


@contextmanager
def _sigterm_as_interrupt() -> Iterator[None]:
    """So that what is begun is tidied up, temporary folders too."""
    try:
        before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    except ValueError:  # not in the main thread
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def _quiet(wanted: bool) -> Iterator[None]:
    """Of several processes the first one speaks."""
    if not wanted:
        yield
        return
    logging.getLogger("selfadapt").setLevel(logging.ERROR)
    with redirect_stdout(io.StringIO()):
        yield


def _underscored(word: str) -> str:
    """A flag by its name in Python: `--batch-size=8` is `--batch_size=8`."""
    flag, equals, value = word.partition("=")
    return f"--{flag[2:].replace('-', '_')}{equals}{value}" if flag[:2] == "--" else word


def _in_flags(command: Command, words: Sequence[str], message: str) -> str:
    """A message in the flags of a command, if the words name its adapter."""
    try:
        return command.parser(words).in_flags(message)
    except SelfAdaptError:
        return message


def _fail(message: str, code: int = 2) -> int:
    print(f"selfadapt: {' '.join(message.split())}", file=sys.stderr)
    return code


def _usage() -> str:
    lines = [f"  {name:10} {command.run.__doc__}" for name, command in COMMANDS.items()]
    return "usage: selfadapt COMMAND [options]; selfadapt COMMAND --help\n\n" + "\n".join(lines)
