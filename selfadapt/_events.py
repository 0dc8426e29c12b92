"""What a run says while it is at work: to a progress bar, to loggers, to other tools."""

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Self

from torch import Tensor
from tqdm import tqdm

from selfadapt import _ranks as ranks
from selfadapt._errors import RunCancelledError
from selfadapt._predict import Labels


@dataclass(frozen=True)
class Preview:
    """A window of a held-out image, as networks see it.

    Attributes:
        name: of the image, and where the window lies in it.
        pixels: prepared, float32 `[C, H, W]`.
        before: instances of the initial network, int32 `[h, w]` in pixels of the image; None where
            none can be decoded.
        after: those of the network that was looked at.
        source: name of the image or file (`LazyImage.name`).
        rows: which ones of the image the window has.
        columns: the same.
    """

    name: str
    pixels: Tensor
    before: Labels | None
    after: Labels | None
    source: str
    rows: slice
    columns: slice


@dataclass(frozen=True)
class Event:
    """Something that `adapt`, `calibrate` or `estimate_quality` has begun or done.

    Attributes:
        kind: "stage": it begins; "step": one more is done; "look": a network was measured.
        stage: "calibration", "adaptation" or "check".
        done: steps of the stage that are done: ways to take the images in, optimiser steps of all
            loops, or windows that were segmented.
        total: how many it has; it may end earlier.
        candidate: the network: "initial", a loop such as "default", ...; "" outside of adaptation.
        iteration: steps of the loop that this network has behind it.
        figures: of a step the loss, its parts and the share of reliable pixels, as tensors without
            gradient (to turn one into a number waits for the device); of a look what was measured.
        previews: of a look, the held-out windows.
    """

    kind: Literal["stage", "step", "look"]
    stage: str
    done: int
    total: int
    candidate: str = ""
    iteration: int = 0
    figures: Mapping[str, Any] = field(default_factory=dict)
    previews: Sequence[Preview] = ()


Callback = Callable[[Event], Any]
"""Called in the thread of the run; one that returns True cancels it."""


class Teller:
    """Tells a progress bar and a callback of a run.

    Args:
        progress: whether a bar is shown. Where stderr is no terminal it is drawn once a minute.
        callback: see `adapt`.
    """

    def __init__(self, *, progress: bool, callback: Callback | None = None) -> None:
        self._progress, self._callback = progress, callback
        self._cancel = False
        self._bar: tqdm[Any] | None = None
        self._shown: dict[str, str] = {}

    def __call__(self, event: Event) -> None:
        """Tell.

        Raises:
            RunCancelledError: the callback wants it.
        """
        if ranks.rank() == 0:
            if self._progress:
                self._draw(event)
            self._cancel |= self._callback is not None and self._callback(event) is True
        # several processes agree at looks: no step waits for the others' word
        agree = ranks.count() == 1 or event.kind == "look"
        if agree and ranks.first(lambda: self._cancel):
            raise RunCancelledError("cancelled before there was anything to return.")

    def _draw(self, event: Event) -> None:
        if event.kind == "stage":
            self.close()
            often = 0.1 if sys.stderr.isatty() else 60
            unit = UNITS[event.stage]
            self._bar = tqdm(total=event.total, unit=unit, leave=False, mininterval=often)
            self._shown = {}
        if self._bar is not None:
            self._bar.update(event.done - self._bar.n)
            if event.kind == "look":
                self._shown |= {k: f"{event.figures[k]:.3g}" for k in SHOWN if k in event.figures}
                self._bar.set_postfix(self._shown, refresh=False)

    def close(self) -> None:
        """Take the bar away."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def silent(event: Event) -> None:
    """Tell nobody."""


UNITS = {"calibration": "scale", "adaptation": "it", "check": "window"}
"""Of the bar, by stage."""
SHOWN = ("d_emb", "agreement", "stability", "instances")
"""Figures of the last look, beside the bar."""
