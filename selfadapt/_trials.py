"""What a network finds where images go in in one way, compared with the same in other ways."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import scipy
from torch import Tensor

from selfadapt._adapter import Adapter
from selfadapt._crops import evenly
from selfadapt._errors import ImageError
from selfadapt._input import Input, prepare
from selfadapt._lazy import LazyImage
from selfadapt._look import copies, found_in_copy
from selfadapt._matching import Matches
from selfadapt._normalize import Image, is_constant
from selfadapt._predict import Labels, predict
from selfadapt._signals import agreement, sizes
from selfadapt._symmetry import D4

SIDE = 256
"""Side of a window in pixels of the network, at any scale."""
WINDOWS = 4
"""As many pixels as in that many windows are segmented in each way, and once more, turned."""
PLACES = 8
"""Windows lie at up to that many places, in as many images as there are."""
FEWEST = 10
"""Fewer instances do not speak for a way."""
DOUBT = 5
"""Instances that are taken to be there and not to be found again, in each figure."""
SAMPLE = 2**16
"""Pixels that stand for a whole image when a window is normalised."""


@dataclass(frozen=True)
class Place:
    """A point of an image about which windows are cut: the smaller the scale, the larger they are.

    Attributes:
        name: of the image.
        image: all of it, `[C, H, W]`.
        whole: a sample of what it is normalised by, `[C, 1, N]`.
        middle: row and column.
    """

    name: str
    image: Image
    whole: Image
    middle: tuple[int, int]

    def cut(self, side: float) -> tuple[slice, slice]:
        """Rows and columns of the window with sides of so many pixels, or of the whole image."""
        parts = []
        for at, n in zip(self.middle, self.image.shape[1:], strict=True):
            length = min(max(round(side), 1), n)
            first = min(max(at - length // 2, 0), n - length)
            parts.append(slice(first, first + length))
        return parts[0], parts[1]


@dataclass(frozen=True)
class Trial:
    """What a network finds where images go in in one way.

    Attributes:
        input: the way.
        turned: instances of a turned copy against those of the windows, at an IoU of 0.5.
        scaled: those at the next scales against those of the windows, at an IoU of 0.5.
        alike: the same at an IoU of 0.8.
        instances: how many there are.
        area: share of the pixels that belong to one.
        diameter: median of them, in pixels of the image; NaN without instances.
    """

    input: Input
    turned: Matches
    scaled: Matches
    alike: Matches
    instances: int
    area: float
    diameter: float

    @classmethod
    def nothing(cls, input: Input) -> Self:
        """Nothing was found."""
        return cls(input, Matches(), Matches(), Matches(), 0, 0.0, math.nan)

    @property
    def score(self) -> float:
        """How far the same things are found again: by this the ways are compared; 0 to 1.

        Agreement of turned copies, times that of scales squared, times a tenth root of the area,
        as docs/evidence.md has measured. Each agreement is doubted by `DOUBT` imaginary failures;
        fewer than `FEWEST` instances say nothing.
        """
        if self.instances < FEWEST:
            return 0.0
        turned, scaled, alike = (
            counts.tp / (counts.tp + counts.fp + counts.fn + DOUBT)
            for counts in (self.turned, self.scaled, self.alike)
        )
        return float(turned * ((scaled + alike) / 2) ** 2 * self.area**0.1)

    def told(self, own: Mapping[str, Any]) -> str:
        """In words, with what the family calls the scale, such as Cellpose's diameter."""
        how = self.input
        words = " ".join(
            f"{name} {value:.3g}" if isinstance(value, int | float) else f"{name} {value}"
            for name, value in own.items()
        )
        told = [f"scale {how.scale:.3g}" + f" ({words})" * bool(words)]
        if not math.isnan(self.diameter):
            told.append(f"finds objects of about {self.diameter:.0f} px")
        if (how.low, how.high) not in ((1.0, 99.0), (1.0, 99.8)):
            told.append(f"percentiles {how.low:g} to {how.high:g}")
        told += ["inverted (dark made bright)"] * how.invert + ["as gray"] * how.gray
        if how.channels is not None:
            told.append(f"channel {', '.join(map(str, how.channels))}")
        return ", ".join(told)

    def to_dict(self) -> dict[str, Any]:
        """For a file; what is not a number becomes null."""
        diameter = None if math.isnan(self.diameter) else round(self.diameter, 1)
        figures = {"score": round(self.score, 4), "instances": self.instances}
        return {"input": self.input.to_dict(), **figures, "diameter": diameter}


def choose_places(sources: Sequence[LazyImage]) -> list[Place]:
    """Up to `PLACES` points, evenly over the images, where there is most to be seen.

    Raises:
        ImageError: all images are constant.
    """
    chosen = evenly(sources, PLACES, blank_images=False)
    if not chosen:
        raise ImageError("all images are constant: there is nothing to see in them.")
    each = -(-PLACES // len(chosen))
    rounds: list[list[Place]] = [[] for _ in range(each)]
    for source in chosen:
        image = source.read()
        whole = source.whole()
        sample = _sample(image if whole is None else whole)
        for k, middle in enumerate(_busiest(image, each)):
            rounds[k].append(Place(str(source), image, sample, middle))
    return [place for some in rounds for place in some][:PLACES]


def _sample(image: Image) -> Image:
    flat = image.reshape(len(image), -1)
    step = -(-flat.shape[1] // SAMPLE)
    return flat[:, None, ::step]


def _busiest(image: Image, most: int) -> list[tuple[int, int]]:
    """Where the gray values vary most, the best first; no two near each other."""
    gray = image.mean(0, dtype=np.float32)
    gray = np.clip(gray, *np.percentile(gray, (1, 99)))
    side = SIDE // 2
    means = [scipy.ndimage.uniform_filter(each, side, mode="nearest") for each in (gray, gray**2)]
    varies = means[1] - means[0] ** 2
    for axis, n in enumerate(gray.shape):  # windows that lie inside
        margin = min(side // 2, (n - 1) // 2)
        edge = np.moveaxis(varies, axis, 0)
        edge[:margin] = edge[n - margin :] = -np.inf
    found: list[tuple[int, int]] = []
    while len(found) < most and np.isfinite(varies).any():
        row, column = map(int, np.unravel_index(varies.argmax(), varies.shape))
        found.append((row, column))
        varies[max(row - side, 0) : row + side, max(column - side, 0) : column + side] = -np.inf
    return found


def tried(
    adapter: Adapter,
    places: Sequence[Place],
    inputs: Sequence[Input],
    step: Callable[[], Any],
    windows: int,
) -> Iterator[Trial]:
    """One trial per input; these differ in their scales only, which rise.

    `step` is called after each scale, and `windows` bounds the pixels of one.
    """
    seen: list[list[_Seen]] = []
    for input in inputs:
        at = adapter.with_input(input)
        pixels = 0.0
        found: list[_Seen] = []
        for place in places:
            cut = place.cut(SIDE / input.scale)
            pixels += _area(cut) * input.scale**2
            if found and pixels > windows * SIDE**2:
                break
            found.append(_Seen(cut, *_segmented(at, place, cut)))
        seen.append(found)
        step()
    for k, (input, found) in enumerate(zip(inputs, seen, strict=True)):
        neighbours = [seen[i] for i in (k - 1, k + 1) if 0 <= i < len(seen)]
        yield _trial(input, found, neighbours)


def _area(cut: tuple[slice, slice]) -> int:
    rows, columns = (part.stop - part.start for part in cut)
    return int(rows * columns)


@dataclass(frozen=True)
class _Seen:
    """Instances of one window, and of its turned copy, turned back."""

    cut: tuple[slice, slice]
    plain: Labels
    turned: Labels

    def inside(self, cut: tuple[slice, slice]) -> Labels:
        """The part of the window that lies in a smaller one of the same place."""
        parts = [
            slice(inner.start - own.start, inner.stop - own.start)
            for inner, own in zip(cut, self.cut, strict=True)
        ]
        return self.plain[parts[0], parts[1]]


def _segmented(adapter: Adapter, place: Place, cut: tuple[slice, slice]) -> tuple[Labels, Labels]:
    image = place.image[:, cut[0], cut[1]]
    size = image.shape[1], image.shape[2]
    if is_constant(image):
        return np.zeros(size, np.int32), np.zeros(size, np.int32)
    pixels = prepare(adapter, image, place.name, place.whole)
    symmetries = adapter.outputs.symmetries
    g = D4[1] if D4[1] in symmetries else next(iter(copies(symmetries)), D4[0])

    def find(pixels: Tensor, size: tuple[int, int]) -> Labels:
        found = predict(adapter, adapter.model, pixels, size).instances
        assert found is not None
        return found

    return find(pixels, size), found_in_copy(find, g, pixels, size)


def _trial(input: Input, found: Sequence[_Seen], neighbours: Sequence[Sequence[_Seen]]) -> Trial:
    counts = np.zeros((3, 3), np.int64)
    for own in found:
        counts[0] += agreement(own.plain, [own.turned], 0.5).sum(0)
    for others in neighbours:
        for own, other in zip(found, others, strict=False):
            smaller = min(own.cut, other.cut, key=_area)  # the one lies inside of the other
            here, there = own.inside(smaller), other.inside(smaller)
            for row, iou in ((1, 0.5), (2, 0.8)):
                counts[row] += agreement(here, [there], iou).sum(0)
    areas = np.concatenate([sizes(own.plain) for own in found])
    pixels = sum(own.plain.size for own in found)
    diameter = 2 * math.sqrt(float(np.median(areas)) / math.pi) if len(areas) else math.nan
    turned, scaled, alike = (Matches(*map(int, row)) for row in counts)
    share = float(areas.sum() / pixels)
    return Trial(input, turned, scaled, alike, len(areas), share, diameter)
