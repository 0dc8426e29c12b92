"""Outlines of instances, along the edges of their pixels."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import scipy
import skimage
from numpy.typing import NDArray

from selfadapt._matching import ranked

Ring = NDArray[np.intp]
"""Corners (x, y) of pixels `[N, 2]`, the first not repeated; pixel (row, column) covers
column to column + 1 in x, row to row + 1 in y."""
Polygon = list[Ring]
"""The outer ring (of positive area), then the holes (negative)."""


def outlines(labels: NDArray[Any]) -> Iterator[tuple[int, list[Polygon]]]:
    """Each label of a label image, and the polygons that its pixels fill exactly.

    Args:
        labels: integers `[H, W]`, 0 is background.

    Yields:
        (label, a polygon for each part), labels in their order. Pixels that touch by a corner only
        are parts of their own, so that no ring touches itself: valid by OGC Simple Features.

    >>> [(label, parts[0][0].tolist()) for label, parts in outlines(np.array([[0, 7, 7]]))]
    [(7, [[1, 1], [1, 0], [3, 0], [3, 1]])]
    """
    ranks, _ = ranked(labels)
    values = np.unique(labels[labels > 0]).tolist()
    for rank, (value, box) in enumerate(
        zip(values, scipy.ndimage.find_objects(ranks), strict=True), 1
    ):
        parts, count = scipy.ndimage.label(ranks[box] == rank)
        corner = np.array([box[1].start, box[0].start])
        rings = [_rings(parts == part) for part in range(1, count + 1)]
        yield value, [[ring + corner for ring in part] for part in rings]


def _rings(part: NDArray[np.bool_]) -> Polygon:
    """The outer ring and the holes of pixels that hang together by their edges."""
    rings: Polygon = []
    for line in skimage.measure.find_contours(np.pad(part, 1).astype(float), 0.5):
        # the line goes from the middle of an edge to that of the next one: in each step it passes
        # the corner between them, in the middle of four pixels
        corners = np.floor((line[1:] + line[:-1]) / 2).astype(np.intp)[:, ::-1]
        turns = (np.roll(corners, 1, 0) != np.roll(corners, -1, 0)).all(1)
        rings += _untied(corners[turns])
    return sorted(rings, key=area, reverse=True)


def _untied(corners: Ring) -> Iterator[Ring]:
    """A ring cut where it touches itself, which only a ring around holes and bays does."""
    path: list[tuple[int, int]] = []
    place: dict[tuple[int, int], int] = {}
    for x, y in corners.tolist():
        if (start := place.get((x, y))) is not None:
            yield np.array(path[start:])
            for corner in path[start + 1 :]:
                del place[corner]
            del path[start + 1 :]
        else:
            place[x, y] = len(path)
            path.append((x, y))
    yield np.array(path)


def area(ring: Ring) -> int:
    """In pixels; negative for holes."""
    x, y = ring.T
    return int(x @ np.roll(y, -1) - y @ np.roll(x, -1)) // 2
