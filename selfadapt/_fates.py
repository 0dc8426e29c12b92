"""What became of each instance: the same, lost, gained, split or merged."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from selfadapt._matching import overlaps

Fate = Literal["same", "gained", "lost", "split", "merged"]
FATES: tuple[Fate, ...] = ("same", "gained", "lost", "split", "merged")


@dataclass(frozen=True)
class Fates:
    """Of all instances of two label images, in the order of their labels.

    Attributes:
        before: of each of the first image "split", "merged", "same" or "lost".
        after: of each of the second "merged", "split", "same" or "gained".
        counts: how many are the same, gained or lost; how many of before are split, and how many
            of after have been merged.
    """

    before: list[Fate]
    after: list[Fate]
    counts: dict[Fate, int]


def fates(before: ArrayLike, after: ArrayLike, iou: float = 0.5) -> Fates:
    """Compare two label images of one size.

    An object of before is split if two or more of after lie in it, each with more than half of its
    own area; objects of before are merged if two or more lie so in one of after. Of the others,
    those that `match` pairs are the same, and the rest is lost or gained. An object that is both
    split and a part of a merger counts as what it has the parts of.

    Args:
        before: integers `[H, W]`, 0 is background.
        after: the same shape.
        iou: least IoU of what is the same.

    Raises:
        ImageError: shapes differ or the arrays are no label images.

    >>> fates([[1, 1, 1, 1, 0, 2]], [[5, 5, 7, 7, 0, 0]]).counts
    {'same': 0, 'gained': 0, 'lost': 1, 'split': 1, 'merged': 0}
    """
    both = overlaps(before, after)
    inside = both.of_column > 0.5  # in one at most, and so below
    split, pieces = _gathered(both.row[inside], both.column[inside], both.rows, both.columns)
    inside = both.of_row > 0.5
    merged, parts = _gathered(both.column[inside], both.row[inside], both.columns, both.rows)
    same_before, same_after = both.matched(iou)
    earlier = _named(("split", split), ("merged", parts), ("same", same_before), rest="lost")
    later = _named(("merged", merged), ("split", pieces), ("same", same_after), rest="gained")
    counts: dict[Fate, int] = {
        "same": earlier.count("same"),
        "gained": later.count("gained"),
        "lost": earlier.count("lost"),
        "split": int(split.sum()),
        "merged": int(merged.sum()),
    }
    return Fates(earlier, later, counts)


def summed(counts: Iterable[dict[Fate, int]]) -> dict[Fate, int]:
    """The counts of several images together."""
    every = list(counts)
    return {fate: sum(each[fate] for each in every) for fate in FATES}


def _gathered(
    whole: NDArray[np.intp], part: NDArray[np.intp], wholes: int, parts: int
) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Which objects two or more others lie in, and which these are."""
    several = np.bincount(whole, minlength=wholes) > 1
    belongs = np.zeros(parts, bool)
    belongs[part] = several[whole]
    return several, belongs


def _named(*cases: tuple[Fate, NDArray[np.bool_]], rest: Fate) -> list[Fate]:
    """For each object the first of the cases that holds."""
    names = np.select([holds for _, holds in cases], [fate for fate, _ in cases], rest)
    fates: list[Fate] = names.tolist()
    return fates
