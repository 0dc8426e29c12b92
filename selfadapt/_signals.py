"""What several segmentations of the same pixels say about each other. Pure functions of labels.

Counts are kept per place: a quarter of a window of an image. Sums of them give scores, and their
scatter tells how far a score can be trusted, with one image as with many.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from selfadapt._matching import Matches, matched, ranked
from selfadapt._predict import Labels

PLACES = 4
"""Places of one window: its quarters."""
Counts = NDArray[np.int64]
"""True positives, false positives and false negatives by place, `[places, 3]`."""


def middles(labels: Labels) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Mean row and mean column of each instance of `[H, W]`, in the order of labels."""
    rows, columns = np.nonzero(labels)
    which = ranked(labels)[0][rows, columns] - 1
    size = np.bincount(which)
    return np.bincount(which, rows) / size, np.bincount(which, columns) / size


def places(labels: Labels) -> NDArray[np.intp]:
    """The quarter in which each instance of `[H, W]` has its middle, in the order of labels.

    >>> places(np.array([[1, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 7], [0, 0, 0, 7]])).tolist()
    [0, 3]
    """
    rows, columns = middles(labels)
    lower, right = rows >= labels.shape[0] / 2, columns >= labels.shape[1] / 2
    return 2 * lower.astype(np.intp) + right


def instances(labels: Labels) -> Counts:
    """Number of instances by place, `[places]`."""
    counts: Counts = np.bincount(places(labels), minlength=PLACES)
    return counts


def by_window(counts: Counts) -> Counts:
    """Sums of `[places]` over the places of each window, `[windows]`."""
    sums: Counts = counts.reshape(-1, PLACES).sum(1)
    return sums


def agreement(reference: Labels, others: Sequence[Labels], iou: float) -> Counts:
    """How far instances are found again in each of the others; counts add up over these.

    An instance counts where it lies in its own label image. 0 is background.

    >>> first, second = np.array([[1, 1, 0, 2]]), np.array([[1, 1, 0, 0]])
    >>> agreement(first, [first, second], 0.5).sum(0).tolist()
    [3, 0, 1]
    """
    counts = np.zeros((PLACES, 3), np.int64)
    here = places(reference)
    for other in others:
        found, valid = matched(reference, other, iou)
        counts[:, 0] += np.bincount(here[found], minlength=PLACES)
        counts[:, 1] += np.bincount(places(other)[~valid], minlength=PLACES)
        counts[:, 2] += np.bincount(here[~found], minlength=PLACES)
    return counts


def pooled(counts: Counts) -> Matches:
    """Counts of all places as one comparison, with its scores; these are NaN where undefined."""
    return Matches(*map(int, counts.sum(0)))


def sizes(labels: Labels) -> NDArray[np.int64]:
    """Area of each instance in pixels, in the order of labels."""
    areas: NDArray[np.int64] = np.bincount(ranked(labels)[0].ravel())[1:]
    return areas
