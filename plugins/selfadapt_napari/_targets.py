"""Layers as images for the core, and where labels of them belong. Needs neither napari nor Qt."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from selfadapt import ImageError, LazyImage

Labels = NDArray[np.int32]
Index = tuple[int, ...]
Together = Literal["images", "channels"]
PLACED = ("scale", "translate", "rotate", "shear", "affine", "units")
"""What says where the pixels of a layer lie in the world, by napari's names."""


@dataclass(frozen=True)
class Target:
    """Pixels of image layers, and where labels of them belong, as it was when asked.

    What becomes of the layers afterwards changes nothing: they may even be deleted.

    Attributes:
        name: of the layer, or of those whose pixels are channels of one image.
        arrays: the pixels of one layer, or of several equal in shape that are channels.
        channel_axis: axis of the arrays that holds channels (of RGB the last), if there is one.
        placed: arguments of `add_labels`.
    """

    name: str
    arrays: Sequence[Any]
    channel_axis: int | None
    placed: Mapping[str, Any]

    @property
    def shape(self) -> tuple[int, ...]:
        """That of labels: rows and columns last; no axis for RGB, and one plane for channels."""
        shape = list(self.arrays[0].shape)
        if self.channel_axis is not None:
            shape[self.channel_axis] = 1
        return tuple(shape[: self._axes])

    @property
    def _axes(self) -> int:
        """Axes of the layer, to napari; colours are none."""
        ndim: int = self.arrays[0].ndim
        return ndim - (self.channel_axis == ndim - 1)

    def blank(self) -> Labels:
        """Labels without an instance."""
        return np.zeros(self.shape, np.int32)

    def planes(self) -> Iterator[tuple[Index, LazyImage]]:
        """Every image `[C, H, W]` of it, with the index that gives its labels, `[H, W]`."""
        *before, height, width = self.shape
        for index in np.ndindex(*before):
            yield (
                index,
                LazyImage(
                    self.image_name(index),
                    partial(self._read, index, slice(None), slice(None)),
                    size=(height, width),
                    read_window=partial(self._read, index),
                ),
            )

    def image_name(self, index: Index) -> str:
        """By which messages and previews call a plane."""
        if not index:
            return self.name
        # no "[1]" at its end: napari calls a second layer of one name so
        return f"{self.name}, plane {', '.join(map(str, index))}"

    def _read(self, index: Index, rows: slice, columns: slice) -> NDArray[Any]:
        where: list[Any] = [*index, rows, columns]
        axis = self.channel_axis
        if axis is None:
            return np.stack([np.asarray(array[tuple(where)]) for array in self.arrays])
        if axis == len(where):  # RGB
            where.append(slice(0, 3))  # what is behind is opacity
            return np.moveaxis(np.asarray(self.arrays[0][tuple(where)]), -1, 0)
        where[axis] = slice(None)  # all other axes in front are single numbers, which go
        return np.asarray(self.arrays[0][tuple(where)])


def targets_of(
    layers: Sequence[Any], together: Together = "images", channel_axis: int | None = None
) -> list[Target]:
    """Targets of image layers.

    Args:
        layers: napari's, in their order; of several resolutions the finest counts.
        together: whether each has images of its own, or all are channels of the same images.
        channel_axis: axis, from 0 on, along which a layer that is not RGB holds channels.

    Raises:
        ImageError: there is no layer; the layers do not fit together, or have no such axis.
    """
    if not layers:
        raise ImageError("there is no image layer: open an image, or select its layer.")
    found = [_target(layer, channel_axis) for layer in layers]
    if together == "images" or len(found) == 1:
        return found
    if any(target.channel_axis is not None for target in found):
        raise ImageError("layers that are channels of one image must not have channels themselves.")
    if len({target.shape for target in found}) > 1:
        told = ", ".join(f"{target.name} {list(target.shape)}" for target in found)
        raise ImageError(f"channels of one image have one shape, and these have not: {told}.")
    name = " + ".join(target.name for target in found)
    return [Target(name, [target.arrays[0] for target in found], None, found[0].placed)]


def _target(layer: Any, channel_axis: int | None) -> Target:
    array = layer.data[0] if layer.multiscale else layer.data
    placed = {name: getattr(layer, name) for name in PLACED if hasattr(layer, name)}
    if layer.rgb:
        return Target(layer.name, [array], array.ndim - 1, placed)
    if channel_axis is None:
        return Target(layer.name, [array], None, placed)
    if not 0 <= channel_axis < array.ndim - 2:
        raise ImageError(
            f"layer {layer.name!r} of shape {tuple(array.shape)} has no channels along axis "
            f"{channel_axis}: the last two axes are rows and columns."
        )
    return Target(layer.name, [array], channel_axis, placed | _stretched(layer, channel_axis))


def _stretched(layer: Any, axis: int) -> dict[str, Any]:
    """A single plane of labels, made as thick as all channels, so that it is seen on each."""
    count = layer.data[0].shape[axis] if layer.multiscale else layer.data.shape[axis]
    scale, translate = np.array(layer.scale, float), np.array(layer.translate, float)
    translate[axis] += (count - 1) / 2 * scale[axis]
    scale[axis] *= count
    return {"scale": scale, "translate": translate}


def images_of(targets: Sequence[Target]) -> list[LazyImage]:
    """All images, for the core."""
    return [image for target in targets for _, image in target.planes()]


def places_of(targets: Sequence[Target]) -> dict[str, tuple[Target, Index]]:
    """By the name of an image, where its labels belong."""
    return {image.name: (target, at) for target in targets for at, image in target.planes()}
