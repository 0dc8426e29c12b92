"""Between what is done in another thread and the widget. Needs neither napari nor Qt."""

import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from typing import Any

from selfadapt import ConfigError, Event, RunCancelledError

BUSY = threading.Lock()
"""Held by the run that is at work, also when its window is gone: there is one at a time."""


@dataclass(frozen=True)
class Done:
    """A job has ended with this."""

    result: Any


@dataclass(frozen=True)
class Failed:
    """A job has ended with this error."""

    error: Exception


Said = Event | str | Done | Failed


class Talk:
    """Between a run in another thread and the widget, which asks what is new.

    Args:
        asked_elsewhere: another one who may want the run to end.
    """

    def __init__(self, asked_elsewhere: Callable[[], bool] = lambda: False) -> None:
        self._said: SimpleQueue[Said] = SimpleQueue()
        self._cancelled = threading.Event()
        self.asked_elsewhere = asked_elsewhere

    def cancel(self) -> None:
        """The run ends at its next step."""
        self._cancelled.set()

    @property
    def cancelled(self) -> bool:
        """Whether the run is to end."""
        return self._cancelled.is_set() or self.asked_elsewhere()

    def say(self, what: Said) -> bool:
        """From the run; True if it is to end, as `adapt` asks of a callback."""
        self._said.put(what)
        return self.cancelled

    def news(self) -> list[Said]:
        """What was said since the last time."""
        found: list[Said] = []
        while True:
            try:
                found.append(self._said.get_nowait())
            except Empty:
                return found

    def refuse_cancelled(self) -> None:
        """Raise RunCancelledError if the run is to end."""
        if self.cancelled:
            raise RunCancelledError("cancelled before there was anything to show.")


def do(job: Callable[[Talk], Any], talk: Talk, lock: threading.Lock = BUSY) -> None:
    """Do a job, and say how it has ended, whatever happens; refused while another has the lock."""
    if not lock.acquire(blocking=False):
        busy = "another run is at work, or ends just now: try again when it has ended."
        talk.say(Failed(ConfigError(busy)))
        return
    handler = _Listener(talk)
    logger = logging.getLogger("selfadapt")
    logger.addHandler(handler)
    ending: Said
    try:
        ending = Done(job(talk))
    except Exception as error:  # of other people's code, too: the widget must hear of it
        ending = Failed(error)
    finally:
        logger.removeHandler(handler)
        lock.release()
    talk.say(ending)


class _Listener(logging.Handler):
    """Passes the library's warnings on."""

    def __init__(self, talk: Talk) -> None:
        super().__init__(logging.WARNING)
        self._talk = talk

    def emit(self, record: logging.LogRecord) -> None:
        self._talk.say(record.getMessage())
