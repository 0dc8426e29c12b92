"""Instances from the common sets of semantic heads."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage
from skimage.feature import peak_local_max
from skimage.measure import label
from skimage.segmentation import relabel_sequential, watershed
from torch import Tensor

from selfadapt import ConfigError, Head

Map = NDArray[np.float32]


_RANGES = {
    "threshold": (0, 1), "min_size": (0, 1e9), "min_distance": (1, 1e4), "smoothing": (0, 1e3)
}  # fmt: skip


@dataclass(frozen=True)
class Decode:
    """How heads become instances.

    The names of the heads choose the recipe: `foreground` alone (connected components),
    `foreground` and `boundary` (what is left between boundaries, grown back), `foreground` and
    `distance` (watershed from the peaks of the distance), or `classes`, one softmax over
    background, foreground and, as a third class, boundary.

    Args:
        threshold: foreground is where its probability exceeds this.
        min_size: smaller instances, in pixels, are dropped.
        min_distance: two peaks of the distance are at least that many pixels apart.
        smoothing: standard deviation of the Gaussian that smooths the distance first, in pixels.
    """

    threshold: float = 0.5
    min_size: int = 15
    min_distance: int = 3
    smoothing: float = 1.0

    def __post_init__(self) -> None:
        for name, (least, most) in _RANGES.items():
            value = getattr(self, name)
            if type(value) not in (int, float) or not least <= value <= most:
                raise ConfigError(
                    f"{name}={value!r} is not allowed: it must be from {least} to {most:g}."
                )

    @staticmethod
    def knows(heads: Sequence[str]) -> bool:
        """Whether there is a recipe for heads of these names."""
        return set(heads) in (
            {"foreground"},
            {"foreground", "boundary"},
            {"foreground", "distance"},
            {"classes"},
        )

    def __call__(
        self, outputs: Mapping[str, Tensor], heads: Mapping[str, Head]
    ) -> NDArray[np.int32]:
        """Instances `[H, W]` from the raw outputs `[channels, H, W]` of one image."""
        maps = {name: heads[name].values(raw).numpy() for name, raw in outputs.items()}
        if "classes" in maps:
            classes = maps.pop("classes")
            maps["foreground"] = classes[1:].sum(0, keepdims=True)
            if len(classes) > 2:
                maps["boundary"] = classes[2:3]
        inside = maps["foreground"][0] > self.threshold
        if "boundary" in maps:
            seeds = label(inside & (maps["boundary"][0] <= self.threshold), connectivity=1)
            instances = watershed(maps["boundary"][0], seeds, mask=inside)
        elif "distance" in maps:
            instances = self._from_distance(maps["distance"][0], inside)
        else:
            instances = label(inside, connectivity=1)
        sizes = np.bincount(instances.ravel())
        instances = np.where(sizes[instances] < self.min_size, 0, instances)
        return np.asarray(relabel_sequential(instances)[0], np.int32)

    def _from_distance(self, distance: Map, inside: NDArray[np.bool_]) -> NDArray[np.int32]:
        distance = ndimage.gaussian_filter(distance, self.smoothing)
        parts = label(inside, connectivity=1)
        peaks = peak_local_max(
            distance, min_distance=self.min_distance, labels=parts, exclude_border=False
        )
        seeds = np.zeros(inside.shape, np.int32)
        seeds[tuple(peaks.T)] = np.arange(1, len(peaks) + 1)
        instances: NDArray[np.int32] = watershed(-distance, seeds, mask=inside)
        return instances
