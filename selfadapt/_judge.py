"""Which network is kept: looks at held-out images, and one decision over all of them."""

import copy
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise, product
from typing import Any

import numpy as np
from torch import Tensor, nn

from selfadapt import _ranks as ranks
from selfadapt._adapter import Adapter
from selfadapt._errors import ConfigError, OutputError
from selfadapt._events import Event, Preview, silent
from selfadapt._images import open_images
from selfadapt._input import prepare
from selfadapt._lazy import LazyImage
from selfadapt._look import Look, Views, views
from selfadapt._monitors import EmbeddingDrift, FalseNegativeRate, Monitor
from selfadapt._network import is_finite
from selfadapt._normalize import checksum
from selfadapt._predict import Labels, predict
from selfadapt._quality import estimate
from selfadapt._signals import middles
from selfadapt._verdict import Thresholds, Verdict, decide, order

logger = logging.getLogger(__name__)

PER_IMAGE = 3
"""More windows of one image are not seen: a look would take too long."""


@dataclass(frozen=True)
class Window:
    """A part of a held-out image: rows and columns in pixels of the image."""

    image: int
    rows: slice
    columns: slice

    @property
    def size(self) -> tuple[int, int]:
        """Height and width."""
        return self.rows.stop - self.rows.start, self.columns.stop - self.columns.start

    def __str__(self) -> str:
        return f"[{self.rows.start}:{self.rows.stop}, {self.columns.start}:{self.columns.stop}]"


class Judge:
    """Looks at networks on held-out target images, and decides between them. Needs no labels.

        judge = Judge("held_out/")
        first = judge.look(adapter, run.initial)
        later = judge.look(adapter, run.exported)
        verdict = judge.decide(first, [later])

    The first look finds the windows that all looks see, where the first network finds most
    instances, and is what later looks are compared with.

    Args:
        images: held-out images, any source that `open_images` takes.
        monitors: what to measure beside, or instead of, the paper's two.
        windows: at most that many are seen; of each image three, of a single one as many as
            `thresholds` asks for.
        side: of a window, in pixels of the network.
        thresholds: what is asked of a network that is to take the place of the first one.
        channel_axis: see `open_images`.

    Raises:
        ConfigError: windows or side are below 1.
        ImageError: there are no images, or they cannot be read.
    """

    def __init__(
        self,
        images: Any,
        *,
        monitors: Sequence[Monitor] = (),
        windows: int = 12,
        side: int = 256,
        thresholds: Thresholds = Thresholds(),  # noqa: B008
        channel_axis: int | None = None,
    ) -> None:
        if windows < 1 or side < 1:
            raise ConfigError(f"windows={windows}, side={side}: both must be 1 or more.")
        self.sources: Sequence[LazyImage] = open_images(images, channel_axis=channel_axis)
        defaults: dict[str, Monitor] = {m.name: m for m in (EmbeddingDrift(), FalseNegativeRate())}
        given = {monitor.name: copy.copy(monitor) for monitor in monitors}
        self._asked = list(given.values())
        self.monitors = list((defaults | given).values())
        self._most, self._side, self.thresholds = windows, side, thresholds
        self._first: list[Views] | None = None
        self._last: list[Views] = []
        self._adapter: Adapter | None = None
        self._pixels: list[Tensor] = []
        self.windows: list[Window] = []
        self.fingerprints: list[str] = []
        """Name and checksum of each held-out image; there after the first look."""

    @property
    def examples(self) -> list[tuple[str, Tensor, tuple[int, int]]]:
        """Name, prepared pixels and size in the image of each window that was looked at."""
        return [
            (f"{self.sources[w.image]} {w}", pixels, w.size)
            for w, pixels in zip(self.windows, self._pixels, strict=True)
        ]

    @property
    def previews(self) -> list[Preview]:
        """The windows with what the first network and the last one that was looked at find."""
        seen = zip(self.examples, self.windows, self._first or (), self._last, strict=True)
        return [
            Preview(name, pixels, before.plain.instances, now.plain.instances, *self._place(window))
            for (name, pixels, _), window, before, now in seen
        ]

    def _place(self, window: Window) -> tuple[str, slice, slice]:
        """Name of the image, rows and columns in it, also where what was seen is a part of it."""
        source = self.sources[window.image]
        rows, columns = (
            slice(part.start + first, part.stop + first)
            for part, first in zip((window.rows, window.columns), source.corner, strict=True)
        )
        return source.name, rows, columns

    def look(
        self, adapter: Adapter, model: nn.Module, tell: Callable[[Event], None] = silent
    ) -> Look:
        """Measure a network.

        Args:
            adapter: how images go into it.
            model: the adapter's own network, or another of its architecture.
            tell: is told of each window, and may raise.

        Raises:
            ImageError: a held-out image cannot be used.
            ConfigError: a monitor that was asked for cannot see anything (first look only).
        """
        self._prepare(adapter, model)
        pairs = ranks.share(list(zip(self._pixels, self.windows, strict=True)))
        tell(Event("stage", "check", 0, len(pairs)))
        ours = []
        for pixels, window in pairs:
            ours.append(views(adapter, model, pixels, window.size))
            tell(Event("step", "check", len(ours), len(pairs)))
        seen = ranks.unite(ours)
        if self._first is None:
            for monitor in self._asked:
                monitor.check(adapter, [view.plain for view in seen])
            self._first = seen
        self._last = seen
        for monitor in self.monitors:
            monitor.reset()
            for before, now in zip(self._first, seen, strict=True):
                monitor.update(before.plain, now.plain)
        finite = is_finite(model) and all(
            bool(output.isfinite().all()) for view in seen for output in view.plain.outputs.values()
        )
        figures = {monitor.name: monitor.compute() for monitor in self.monitors}
        return Look.of(seen, self._first, finite=finite, **figures)

    def _prepare(self, adapter: Adapter, model: nn.Module) -> None:
        """Read and prepare the windows; choose them, at the first look."""
        if adapter is self._adapter:
            return
        choosing = not self.windows
        most = max(PER_IMAGE, self.thresholds.windows // len(self.sources))
        per_image = min(max(self._most // len(self.sources), 1), most)
        pixels: list[Tensor] = []
        for index, source in enumerate(self.sources[: self._most]):
            image = source.read()
            size = image.shape[1], image.shape[2]
            prepared = prepare(adapter, image, str(source), source.whole())
            if choosing:
                self.fingerprints.append(f"{source} {checksum(image)}")
                try:
                    found = predict(adapter, model, prepared, size).instances
                except OutputError as error:
                    raise OutputError(f"{source}: {error}") from error
                side = self._side / adapter.input.scale
                chosen = choose_windows(size, side, found, per_image)
                self.windows += [Window(index, rows, columns) for rows, columns in chosen]
            scale = [new / old for new, old in zip(prepared.shape[1:], size, strict=True)]
            for window in self.windows:
                if window.image == index:
                    cut = [
                        slice(round(part.start * by), round(part.stop * by))
                        for part, by in zip((window.rows, window.columns), scale, strict=True)
                    ]
                    pixels.append(prepared[:, cut[0], cut[1]].clone())  # no view of all of it
        self._adapter, self._pixels = adapter, pixels

    def warn_of_few_windows(self) -> None:
        """Say, after the first look, that there are too few windows for anything to be kept."""
        if len(self.windows) < self.thresholds.windows:
            logger.warning(
                "The held-out images have %d window%s, and nothing is kept that was seen in fewer "
                "than %d: give more or larger images, or more of them for validation.",
                len(self.windows),
                "s" * (len(self.windows) != 1),
                self.thresholds.windows,
            )

    def decide(
        self,
        first: Look,
        others: Sequence[Look],
        tried: int | None = None,
        loops: Sequence[str] | None = None,
    ) -> Verdict:
        """Which look's network is to be kept: a pure function of what was measured.

        Another network takes the place of the first one only if what it finds is more stable under
        other scales, by more than noise and the number of candidates explain, and if nothing that
        is independent of that speaks against it: `objection` names all that is asked.

        Args:
            first: the look at the first network.
            others: those at networks that can be kept.
            tried: how many there were, if some cannot be kept any more.
            loops: of which loop each of the others is, in the order of their steps: of those of
                one loop that could be kept, the latest is. Early looks are flukes more often.
        """
        return decide(first, others, self.thresholds, tried, loops)

    def order(self, first: Look, others: Sequence[Look]) -> list[int]:
        """Indices of the others, the most promising first: which runs go on, none being kept."""
        return order(first, others, self.thresholds)

    def trusts(self, look: Look) -> bool:
        """Whether anything speaks for what a network finds."""
        return estimate(look).trusted


def choose_windows(
    size: tuple[int, int], side: float, found: Labels | None, most: int
) -> list[tuple[slice, slice]]:
    """Of an even division of an image, the parts with most instances; of equal ones the middle.

    Args:
        size: height and width of the image.
        side: about that of a part.
        found: instances of the whole image; None where there are none to be had.
        most: number of parts.
    """
    edges = [np.linspace(0, n, max(round(n / side), 1) + 1).round().astype(int) for n in size]
    rows, columns = ([slice(a, b) for a, b in pairwise(each.tolist())] for each in edges)
    parts = list(product(rows, columns))
    inside = np.zeros(len(parts))
    if found is not None:
        inside = np.histogram2d(*middles(found), bins=edges)[0].ravel()
    off = [
        sum(abs((part.start + part.stop) / n - 1) for part, n in zip(both, size, strict=True))
        for both in parts
    ]
    best = sorted(range(len(parts)), key=lambda k: (-inside[k], off[k]))
    return [parts[k] for k in sorted(best[:most])]
