"""Instances against instances: one-to-one matching by IoU. It serves the FN rate and the AP."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy
from numpy.typing import ArrayLike, NDArray

from selfadapt._errors import ImageError


@dataclass(frozen=True)
class Matches:
    """Counts of one comparison; counts of several images add up with `+` (pooled scores).

    Scores are NaN where nothing was there to be counted.
    """

    tp: int = 0
    fp: int = 0
    fn: int = 0

    def __add__(self, other: "Matches") -> "Matches":
        return Matches(self.tp + other.tp, self.fp + other.fp, self.fn + other.fn)

    @property
    def ap(self) -> float:
        """TP / (TP + FP + FN), what Cellpose and StarDist call AP (StarDist: `accuracy`)."""
        return _ratio(self.tp, self.tp + self.fp + self.fn)

    @property
    def precision(self) -> float:
        """TP / (TP + FP)."""
        return _ratio(self.tp, self.tp + self.fp)

    @property
    def recall(self) -> float:
        """TP / (TP + FN)."""
        return _ratio(self.tp, self.tp + self.fn)

    @property
    def f1(self) -> float:
        """2 TP / (2 TP + FP + FN)."""
        return _ratio(2 * self.tp, 2 * self.tp + self.fp + self.fn)

    @property
    def fn_rate(self) -> float:
        """FN / (TP + FN), Eq. 3."""
        return _ratio(self.fn, self.tp + self.fn)


def _ratio(part: int, whole: int) -> float:
    return part / whole if whole else float("nan")


def match(
    reference: ArrayLike, predicted: ArrayLike, ious: Sequence[float] = (0.5,)
) -> list[Matches]:
    """Match the instances of two label images at each IoU threshold.

    Args:
        reference: integers `[H, W]`, 0 is background; labels need not be consecutive.
        predicted: the same shape.
        ious: thresholds in (0, 1]; a pair matches at IoU >= threshold.

    Returns:
        One `Matches` per threshold. Pairs are chosen one to one, as many as possible, and
        among those with the largest total IoU.

    Raises:
        ImageError: shapes differ or the arrays are no label images.

    >>> match([[1, 1, 0, 2]], [[5, 5, 0, 0]])
    [Matches(tp=1, fp=0, fn=1)]
    """
    both = overlaps(reference, predicted)
    matches = []
    for threshold in ious:
        tp = len(both.pairs(threshold)[0])
        matches.append(Matches(tp, both.columns - tp, both.rows - tp))
    return matches


def matched(
    reference: ArrayLike, predicted: ArrayLike, iou: float = 0.5
) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Which instances of two label images `match` pairs, in the order of their labels.

    >>> [each.tolist() for each in matched([[1, 1, 0, 2]], [[5, 5, 0, 0]])]
    [[True, False], [True]]
    """
    return overlaps(reference, predicted).matched(iou)


def ranked(labels: NDArray[Any]) -> tuple[NDArray[np.intp], int]:
    """Labels as 1, 2, ... in their order, 0 staying background, and how many there are.

    >>> ranked(np.array([[0, 7, 7, 3]]))
    (array([[0, 2, 2, 1]]), 2)
    """
    top = int(labels.max(initial=0))
    if top <= labels.size:  # a table: many times as fast as sorting
        present = np.zeros(top + 1, bool)
        present[labels.astype(np.intp).ravel()] = True
        present[0] = True
        table = present.cumsum() - 1
        return table[labels.astype(np.intp)], int(table[-1])
    background = labels.dtype.type(0)  # a plain 0 would make floats of 64-bit numbers
    values, inverse = np.unique(np.append(labels.ravel(), background), return_inverse=True)
    return inverse[:-1].reshape(labels.shape), len(values) - 1


def _labels(array: ArrayLike) -> NDArray[Any]:
    labels = np.asarray(array)
    if labels.ndim != 2 or labels.dtype.kind not in "iub" or (labels.size and labels.min() < 0):
        raise ImageError(
            f"got {labels.dtype} of shape {labels.shape} where a label image was meant: give whole "
            "numbers [H, W], 0 for background and one number per instance, none of them negative."
        )
    return labels


@dataclass(frozen=True)
class Overlaps:
    """Every two instances that touch, as sparse matrices: IoU, and which share of each it is."""

    row: NDArray[np.intp]
    column: NDArray[np.intp]
    iou: NDArray[np.float64]
    of_row: NDArray[np.float64]
    of_column: NDArray[np.float64]
    rows: int
    columns: int

    def pairs(self, threshold: float) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
        """Rows and columns of the pairs that match, one to one."""
        near = self.iou >= threshold
        row, column, iou = self.row[near], self.column[near], self.iou[near]
        rivals = _rivals(row, column)
        alone = np.bincount(rivals)[rivals] == 1
        kept = [np.flatnonzero(alone)]  # all of them, above an IoU of 0.5
        rest = np.flatnonzero(~alone)
        rest = rest[np.argsort(rivals[rest], kind="stable")]
        for group in np.split(rest, np.flatnonzero(np.diff(rivals[rest])) + 1):
            kept.append(group[_best(row[group], column[group], iou[group])])
        chosen = np.sort(np.concatenate(kept))
        return row[chosen], column[chosen]

    def matched(self, threshold: float) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
        """Which rows, and which columns, match."""
        row, column = self.pairs(threshold)
        found, valid = np.zeros(self.rows, bool), np.zeros(self.columns, bool)
        found[row], valid[column] = True, True
        return found, valid


def _rivals(row: NDArray[np.intp], column: NDArray[np.intp]) -> NDArray[np.intp]:
    """To which group each pair belongs; pairs of two groups have no instance in common."""
    first = row.max(initial=-1) + 1
    size = first + column.max(initial=-1) + 1
    graph = scipy.sparse.coo_array(
        (np.ones(len(row), bool), (row, first + column)), shape=(size, size)
    )
    _, groups = scipy.sparse.csgraph.connected_components(graph, directed=False)
    group: NDArray[np.intp] = groups[row]
    return group


def _best(
    row: NDArray[np.intp], column: NDArray[np.intp], iou: NDArray[np.float64]
) -> NDArray[np.intp]:
    """Which pairs to choose, one to one."""
    rows, r = np.unique(row, return_inverse=True)
    columns, c = np.unique(column, return_inverse=True)
    score = np.zeros((len(rows), len(columns)))
    which = np.zeros(score.shape, np.intp)
    # a match outweighs any sum of IoUs, so the number of matches comes first
    score[r, c] = 1 + iou / (2 * min(score.shape))
    which[r, c] = np.arange(len(row))
    r, c = scipy.optimize.linear_sum_assignment(score, maximize=True)
    chosen: NDArray[np.intp] = which[r, c][score[r, c] > 0]
    return chosen


def overlaps(reference: ArrayLike, predicted: ArrayLike) -> Overlaps:
    """Where the instances of two label images overlap; rows are `reference`'s, in their order."""
    first, other = _labels(reference), _labels(predicted)
    if first.shape != other.shape:
        raise ImageError(
            f"label images of {first.shape} and {other.shape} cannot be compared: both must have "
            "the size of the image."
        )
    (first, rows), (other, columns) = ranked(first), ranked(other)
    codes, overlap = _counted(first.ravel() * (columns + 1) + other.ravel())
    row, column = codes // (columns + 1), codes % (columns + 1)
    both = (row > 0) & (column > 0)  # row and column 0 are background
    row, column, overlap = row[both], column[both], overlap[both]
    area_of_row = np.bincount(first.ravel(), minlength=rows + 1)[row]
    area_of_column = np.bincount(other.ravel(), minlength=columns + 1)[column]
    iou = overlap / (area_of_row + area_of_column - overlap)
    shares = overlap / area_of_row, overlap / area_of_column
    return Overlaps(row - 1, column - 1, iou, *shares, rows, columns)


def _counted(codes: NDArray[np.intp]) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """The codes that occur, and how often."""
    if codes.max(initial=0) <= 8 * codes.size:
        counts = np.bincount(codes)
        occurring = np.flatnonzero(counts)
        return occurring, counts[occurring]
    return np.unique(codes, return_counts=True)
