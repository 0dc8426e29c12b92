"""Instances against instances: one-to-one matching by IoU. It serves the FN rate and the AP."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import linear_sum_assignment

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
    iou = _iou_matrix(_labels(reference), _labels(predicted))
    return [_match_at(iou, threshold) for threshold in ious]


def matched(
    reference: ArrayLike, predicted: ArrayLike, iou: float = 0.5
) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Which instances of two label images `match` pairs, in the order of their labels.

    >>> [each.tolist() for each in matched([[1, 1, 0, 2]], [[5, 5, 0, 0]])]
    [[True, False], [True]]
    """
    overlap = _iou_matrix(_labels(reference), _labels(predicted))
    rows, columns = _pairs_at(overlap, iou)
    found = tuple(np.zeros(count, bool) for count in overlap.shape)
    found[0][rows], found[1][columns] = True, True
    return found[0], found[1]


def _labels(array: ArrayLike) -> NDArray[Any]:
    labels = np.asarray(array)
    if labels.ndim != 2 or labels.dtype.kind not in "iub" or (labels.size and labels.min() < 0):
        raise ImageError(
            f"got {labels.dtype} of shape {labels.shape} where a label image was meant: give "
            "whole numbers [H, W], 0 for background and one number per instance."
        )
    return labels


def _iou_matrix(reference: NDArray[Any], predicted: NDArray[Any]) -> NDArray[np.float64]:
    if reference.shape != predicted.shape:
        raise ImageError(
            f"label images of {reference.shape} and {predicted.shape} cannot be compared: both "
            "must have the size of the image."
        )
    rows, row = np.unique(np.append(reference.ravel(), 0), return_inverse=True)
    columns, column = np.unique(np.append(predicted.ravel(), 0), return_inverse=True)
    counts = np.bincount(row * len(columns) + column, minlength=len(rows) * len(columns))
    overlap = counts.reshape(len(rows), len(columns)).astype(float)
    union = overlap.sum(1, keepdims=True) + overlap.sum(0, keepdims=True) - overlap
    union[0, 0] = max(union[0, 0], 1.0)
    iou: NDArray[np.float64] = (overlap / union)[1:, 1:]  # row and column 0 are background
    return iou


def _match_at(iou: NDArray[np.float64], threshold: float) -> Matches:
    n_reference, n_predicted = iou.shape
    tp = len(_pairs_at(iou, threshold)[0])
    return Matches(tp, n_predicted - tp, n_reference - tp)


def _pairs_at(iou: NDArray[np.float64], threshold: float) -> tuple[NDArray[Any], NDArray[Any]]:
    """Rows and columns of the pairs that match."""
    if not iou.size:
        return np.empty(0, int), np.empty(0, int)
    matches = iou >= threshold
    # a match outweighs any sum of IoUs, so the number of matches comes first
    score = matches + iou / (2 * min(iou.shape))
    rows, columns = linear_sum_assignment(score, maximize=True)
    paired = matches[rows, columns]
    return rows[paired], columns[paired]
