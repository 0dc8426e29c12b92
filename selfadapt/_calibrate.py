"""How images should go in, found without labels: many inputs, one network.

Objects that a network really sees are found again when an image is turned, and at a scale that is
a little other. So every scale of a grid is tried, in both polarities, on a few windows, and what is
found most alike is taken (docs/method.md).
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations, count
from typing import Any

import numpy as np

from selfadapt._adapter import Adapter
from selfadapt._errors import CheckpointError, ConfigError
from selfadapt._events import Callback, Event, Teller, silent
from selfadapt._images import open_windows
from selfadapt._input import Input
from selfadapt._look import STEP
from selfadapt._masks import refuse_masks
from selfadapt._trials import FEWEST, WINDOWS, Place, Trial, choose_places, tried

logger = logging.getLogger(__name__)

POWERS = range(-6, 5)
SCALES = tuple(round(STEP**k, 3) for k in POWERS)
"""Pixels of the network per pixel of the image that are tried."""
FOUND = frozenset({"scale", "invert"})
"""What is always found, where it is open; channels only where there are too many."""
COARSE_WINDOWS = 1
"""Channels and ranges are chosen on so few, and on every other scale."""
SPARSE = 99.9
"""Upper percentile that is tried where few pixels are bright."""
CLEARLY = 2.0
"""A way is clearly better if its score is that many times as high."""
LEAST_SIDE = 24
"""Images are not made smaller than that, in pixels of the network."""


@dataclass(frozen=True)
class Calibration:
    """What `search` has found.

    Attributes:
        adapter: the given one with images going in as chosen.
        trials: all ways that were tried.
        chosen: the way that is taken.
        best: the best of all, which what the user has said may rule out.
        found: whether the network finds anything again; if not, the given way is kept.
    """

    adapter: Adapter
    trials: Sequence[Trial]
    chosen: Trial
    best: Trial
    found: bool

    @property
    def doubted(self) -> bool:
        """Whether another way is clearly better than what the user has said."""
        return self.found and self.best.score > CLEARLY * self.chosen.score

    def __str__(self) -> str:
        most = max(trial.instances for trial in self.trials)
        if not self.found and 0 < most < FEWEST:
            return (
                f"at most {most} objects are found in any way, too few to choose by: images go in "
                f"as they are ({self._told(self.chosen)})"
            )
        if not self.found:
            return (
                "nothing is found again at any scale: images go in as they are "
                f"({self._told(self.chosen)}), and nothing that this network finds here is to be "
                "trusted"
            )
        other = f"; clearly better would be: {self._told(self.best)}" if self.doubted else ""
        return f"{self._told(self.chosen)}{other}"

    def _told(self, trial: Trial) -> str:
        options = self.adapter.with_input(trial.input).input_options()
        return trial.told({k: v for k, v in options.items() if not hasattr(trial.input, k)})

    def to_dict(self) -> dict[str, Any]:
        """For a file."""
        return {
            "found": self.found,
            "words": str(self),
            "chosen": self.chosen.to_dict(),
            "trials": [trial.to_dict() for trial in self.trials],
        }


def calibrate(
    adapter: Adapter,
    images: Any,
    *,
    channel_axis: int | None = None,
    progress: bool = True,
    callback: Callback | None = None,
) -> Adapter:
    """The adapter with scale, polarity and channels as they suit the images; needs no labels.

    What was said stays (`Adapter.settled`); a warning tells if another way is clearly better.
    Where nothing is found again in any way, everything stays, and a warning says so.

    Args:
        adapter: the network.
        images: any source that `open_images` takes; up to eight of them are looked at.
        channel_axis: see `open_images`.
        progress: whether a progress bar is shown.
        callback: is told of each way that was tried, by an `Event`; returning True cancels.

    Raises:
        SelfAdaptError: the images cannot be used, or the adapter cannot decode instances.
        RunCancelledError: the callback wanted it.
    """
    with Teller(progress=progress, callback=callback) as tell:
        return search(adapter, images, tell, channel_axis=channel_axis).adapter


def search(
    adapter: Adapter,
    images: Any,
    tell: Callable[[Event], None] = silent,
    *,
    channel_axis: int | None = None,
) -> Calibration:
    """See `calibrate`; with all that was tried. `tell` is told of each way, and may raise."""
    if not adapter.can_decode:
        raise ConfigError(
            f"{type(adapter).__name__} cannot decode instances, and scale and polarity are judged "
            "by these: say them, or override its `decode`."
        )
    sources = open_windows(images, channel_axis=channel_axis)
    refuse_masks(sources)
    places = choose_places(sources)
    scales = _scales(adapter, places)
    opened = settle(adapter, adapter.input)  # nothing is found yet, and `prepare` asks
    selections = [
        way
        for selection in _selections(adapter, len(places[0].image))
        for way in [selection, *_ranges(adapter, places, selection)]
    ]
    polarities = [False, True] if "invert" in adapter.adjustable else [adapter.input.invert]
    coarse = scales[::2] * (len(selections) > 1)
    steps = len(polarities) * (len(selections) * len(coarse) + len(scales))
    done = count(1)
    tell(Event("stage", "calibration", 0, steps))

    def step() -> None:
        tell(Event("step", "calibration", next(done), steps))

    def trials(way: Input, scales: Sequence[float], windows: int) -> list[Trial]:
        return [
            trial
            for invert in polarities
            for trial in tried(
                opened,
                places,
                [replace(_turned(way, invert=invert), scale=scale) for scale in scales],
                step,
                windows,
            )
        ]

    if coarse:  # which channels and which range is settled first, on less

        def promise(way: Input) -> float:
            return max(trial.score for trial in trials(way, coarse, COARSE_WINDOWS))

        selections = [max(selections, key=promise)]
    return _choose(adapter, trials(selections[0], scales, WINDOWS))


def _choose(adapter: Adapter, trials: Sequence[Trial]) -> Calibration:
    """The best of the trials that agree with what the user has said."""
    ours = adapter.input
    said = adapter.said.items()
    allowed = [
        trial for trial in trials if all(getattr(trial.input, name) == v for name, v in said)
    ]
    best = max(trials, key=lambda trial: trial.score)
    chosen = max(allowed, key=lambda trial: trial.score)
    found = best.score > 0
    if chosen.score == 0:
        chosen = Trial.nothing(ours)
    calibration = Calibration(settle(adapter, chosen.input), trials, chosen, best, found)
    if not found or calibration.doubted:
        logger.warning("Calibration: %s.", calibration)
    return calibration


def go_on(adapter: Adapter, saved: Mapping[str, Any]) -> Adapter:
    """The adapter with the input that a run has found; what the user says now is kept.

    Args:
        adapter: as it was opened for the run's model.
        saved: `Input.to_dict`.
    """
    try:
        input = Input.from_dict(saved)
    except (TypeError, ConfigError) as error:
        raise CheckpointError(f"what the run says of its input is damaged ({error}).") from None
    return settle(adapter, replace(input, **adapter.said))


def settle(adapter: Adapter, input: Input) -> Adapter:
    """The adapter with images going in in that way, and nothing left open."""
    adapter = adapter.with_input(input)
    adapter.settled, adapter.auto = adapter.settled | FOUND, frozenset()
    return adapter


def _scales(adapter: Adapter, places: Sequence[Place]) -> list[float]:
    """The scales to be tried, about the one that was said; the images stay large enough."""
    ours = adapter.input.scale
    if "scale" not in adapter.adjustable:
        return [ours]
    if "scale" in adapter.settled:
        return [ours * STEP**k for k in POWERS]
    shortest = min(min(place.image.shape[1:]) for place in places)
    least = max(adapter.side_multiple, LEAST_SIDE) / shortest
    return [scale for scale in SCALES if scale >= least] or [ours]


def _selections(adapter: Adapter, count: int) -> list[Input]:
    """Which channels can be taken, where the images have more than the network takes."""
    base, taken = adapter.input, adapter.channels
    selects = {"channels", "gray"} <= adapter.adjustable - adapter.settled
    if not selects or taken is None or count <= taken:
        return [base]
    selections = [replace(base, channels=c) for c in combinations(range(count), taken)]
    return [replace(base, gray=True), *selections] if (count, taken) == (3, 1) else selections


def _ranges(adapter: Adapter, places: Sequence[Place], way: Input) -> list[Input]:
    """Another range of the normalisation, where the pixels say that the usual one is spoilt.

    Where bright objects are fewer than the pixels above the upper percentile, it ends further up.
    """
    if not {"low", "high"} <= adapter.adjustable - adapter.settled or way.high >= SPARSE:
        return []
    percentiles = [
        np.percentile(way.select(place.whole), (50, way.high, SPARSE)) for place in places
    ]
    middle, top, further = np.median(percentiles, axis=0)
    return [replace(way, high=SPARSE)] if further - middle > 2 * (top - middle) else []


def _turned(way: Input, *, invert: bool) -> Input:
    """The same range of gray values, of the negative if `invert` says so."""
    if invert and way.high == SPARSE:
        return replace(way, invert=True, low=round(100 - way.high, 1), high=round(100 - way.low, 1))
    return replace(way, invert=invert)
