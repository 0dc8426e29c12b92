"""The diameter of cells, from what a network finds."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from selfadapt import LazyImage, ModelError

ESTIMATED_FROM = 8
"""A diameter is estimated from at most that many images."""


def evenly(images: Sequence[LazyImage]) -> Sequence[LazyImage]:
    """Some of the images, evenly spread."""
    return images[:: -(-len(images) // ESTIMATED_FROM)]


def median_diameter(
    segment: Callable[..., NDArray[np.int32]], images: Sequence[LazyImage]
) -> float:
    """Median diameter, in pixels, of the discs that are as large as the instances found.

    Raises:
        ModelError: there are none.
    """
    labels: list[NDArray[Any]] = [segment(image.read(), channel_axis=0) for image in images]
    areas = np.concatenate([np.unique(each[each > 0], return_counts=True)[1] for each in labels])
    if not len(areas):
        raise ModelError(
            "the diameter cannot be estimated: the network finds no instance in "
            f"{images[0]} and {len(images) - 1} others. Give the diameter."
        )
    return 2 * math.sqrt(float(np.median(areas)) / math.pi)
