"""Which series of a TIFF file are images, and which are small copies of another one."""

import logging
import math
import re
from collections.abc import Iterator, Sequence

import numpy as np
import tifffile
from numpy.typing import NDArray

from selfadapt._normalize import resize_image

logger = logging.getLogger(__name__)

SMALL_COPIES = {"thumbnail", "label", "macro", "overview", "preview"}
"""Words in the names of series that slide scanners store beside the image."""
MASK, ALIKE, COMPARED, COMPARABLE = 4, 0.7, 16, 2**24
"""Bit of what TIFF calls a transparency mask; correlation of an image with a small copy of it; of
how many pages one may be a copy, and of how many pixels at most."""


def all_series(tiff: tifffile.TiffFile) -> list[tuple[tuple[int, int], tifffile.TiffPageSeries]]:
    """Each with its number and level: any page of half the size is a level to tifffile, whatever
    it shows, where no format says what the levels are.
    """
    return [
        ((number, level), series)
        for number, first in enumerate(tiff.series)
        for level, series in enumerate(first.levels)
        if level == 0
        or (
            first.kind == "generic"
            and not (series.keyframe.is_reduced or series.keyframe.is_subifd)
        )
    ]


def full_series(series: Sequence[tifffile.TiffPageSeries], name: str) -> list[int]:
    """Indices of those that are no small copy of another one."""
    sizes = [_plane_size(each) for each in series]
    # the next larger one first: it is the least work, and shows the same for sure
    by_size = sorted(zip(sizes, series, strict=True), key=lambda pair: math.prod(pair[0]))
    largest = by_size[-1][0]
    kept = [
        index
        for index, each in enumerate(series)
        if not (
            (_words(each.name) & SMALL_COPIES and math.prod(sizes[index]) < math.prod(largest))
            or each.keyframe.is_reduced
            or each.keyframe.subfiletype & MASK
            or any(
                _is_copy(sizes[index], size) and len(each) <= len(other) and _alike(each, other)
                for size, other in by_size
            )
        )
    ]
    if kept and len(kept) < len(series):
        logger.warning(
            "%s: %d of %d series are left out as small copies (thumbnails) or masks of the image.",
            name,
            len(series) - len(kept),
            len(series),
        )
    return kept or list(range(len(series)))


def _words(name: str) -> set[str]:
    return set(re.findall("[a-z]+", name.lower()))


def _plane_size(series: tifffile.TiffPageSeries) -> tuple[int, int]:
    by_axis = dict(zip(series.axes, series.shape, strict=True))
    return by_axis.get("Y", 1), by_axis.get("X", 1)


def _is_copy(small: tuple[int, int], large: tuple[int, int]) -> bool:
    """Whether one size is at most half of another (rounded up), and of its shape."""
    (height, width), (rows, columns) = small, large
    same_shape = abs(height * columns - width * rows) <= max(rows, columns)
    return 2 * (height - 1) < rows and 2 * (width - 1) < columns and same_shape


def _alike(small: tifffile.TiffPageSeries, large: tifffile.TiffPageSeries) -> bool:
    """Whether the first page of one shows what one of the other shows, as a thumbnail does."""
    if math.prod(_plane_size(large)) > COMPARABLE:  # too much to read: a slide
        return True
    try:
        (copy,) = _gray_pages(small, 1)
        return any(_shows(copy, page) for page in _gray_pages(large, COMPARED))
    except Exception:  # damaged: it is named where it is read
        return False


def _gray_pages(series: tifffile.TiffPageSeries, most: int) -> Iterator[NDArray[np.float32]]:
    """Some of the pages, evenly spread, `[H, W]` each."""
    letters = series.keyframe.axes
    others = tuple(axis for axis, letter in enumerate(letters) if letter not in "YX")
    for page in series.pages[:: -(-len(series.pages) // most)]:
        if page is not None:  # one that lies in a file that is missing
            yield np.asarray(page.asarray(), np.float32).mean(others)


def _shows(copy: NDArray[np.float32], page: NDArray[np.float32]) -> bool:
    """Whether a small image is a larger one, made smaller in one way or another."""
    height, width = copy.shape
    rows = np.arange(height) * page.shape[0] // height
    columns = np.arange(width) * page.shape[1] // width

    def is_like(other: NDArray[np.float32]) -> bool:
        return bool(np.corrcoef(copy.ravel(), other.ravel())[0, 1] > ALIKE)

    # smoothing a large page takes seconds, and is rarely needed
    return is_like(page[np.ix_(rows, columns)]) or is_like(
        resize_image(page[None], (height, width))[0]
    )
