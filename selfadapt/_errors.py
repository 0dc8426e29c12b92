"""What went wrong on the user's side. The shell prints these as one line and exits with 2."""

from collections.abc import Iterator
from contextlib import contextmanager


def first_line(error: BaseException) -> str:
    """What a foreign error says, in one line, for a message of ours."""
    return (str(error) or type(error).__name__).splitlines()[0]


def sentence(text: str) -> str:
    """In one line, with a capital letter and a full stop.

    >>> sentence("nothing is found")
    'Nothing is found.'
    """
    text = " ".join(text.split())
    return f"{text[:1].upper()}{text[1:]}{'' if text.endswith(('.', '!', '?')) else '.'}"


class SelfAdaptError(Exception):
    """Base class of all errors that the user can mend."""


class ConfigError(SelfAdaptError, ValueError):
    """A setting is out of range, or settings do not fit together."""


class ImageError(SelfAdaptError, ValueError):
    """Images are missing, unreadable or not what the network takes."""


class OutputError(SelfAdaptError, ValueError):
    """The network's output does not fit the declared heads."""


class ModelError(SelfAdaptError, ValueError):
    """A model or its file is not what the adapter takes."""


class CheckpointError(SelfAdaptError, ValueError):
    """A run directory or checkpoint is damaged, foreign, or belongs to another run."""


class RunCancelledError(SelfAdaptError):
    """A callback has cancelled before there was anything to return."""


class AdapterNotFoundError(SelfAdaptError, LookupError):
    """No installed package provides the adapter, or the library it needs is missing."""


@contextmanager
def refuse_damage(what: object) -> Iterator[None]:
    """Inside, what a file of a run holds is taken at its word; where that fails, it is damaged.

    Raises:
        CheckpointError: it does not hold what a run writes.
    """
    try:
        yield
    except SelfAdaptError:
        raise
    except _OF_DAMAGE as error:
        raise CheckpointError(
            f"{what} is damaged, or of another version ({first_line(error)}): start in a new "
            "folder."
        ) from None


_OF_DAMAGE = (
    ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError
)  # fmt: skip
