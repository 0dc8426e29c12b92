"""Images in zarr arrays and OME-Zarr images, plates and collections."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import zarr

from selfadapt._errors import ImageError
from selfadapt._lazy import LazyImage, array_axes, failing, list_axes, naming
from selfadapt._normalize import Image


def is_zarr(folder: Path) -> bool:
    try:
        return any((folder / marker).exists() for marker in ("zarr.json", ".zarray", ".zgroup"))
    except OSError:  # it may not be looked into
        return False


def open_zarr(path: Path) -> "zarr.Array[Any] | zarr.Group":
    with naming(path.name):
        return zarr.open(path, mode="r")


def list_zarr(
    node: "zarr.Array[Any] | zarr.Group", name: str, channel_axis: int | None
) -> Iterator[LazyImage]:
    """Images of an array, of an OME-Zarr image, or of all those in a plate or a collection."""
    with naming(name):
        if isinstance(node, zarr.Array):
            axes = _named_axes(node) or array_axes(node.ndim, channel_axis)
            images = list(list_axes(_Zarr(node, name), axes, name, ""))
        else:
            images = list(_multiscales(node, name, ""))
    yield from images


class _Zarr:
    """An array whose errors name the file."""

    def __init__(self, array: Any, name: str) -> None:
        if not isinstance(array, zarr.Array):
            raise ImageError(f"{name} names a data set that is no array: it is damaged.")
        if array.dtype.kind not in "buif":
            raise ImageError(f"{name} holds {array.dtype}, not numbers that a network can take.")
        told: Any = array.metadata.to_dict()
        codecs = [told.get(key) for key in ("codecs", "compressor", "filters")]
        if "pickle" in json.dumps(codecs, default=str).lower():
            raise ImageError(f"{name} is packed as Python objects, which could run code: refused.")
        self._array, self._name = array, name
        self.shape = array.shape

    def __getitem__(self, index: Any) -> Image:
        with naming(self._name):
            return np.asarray(self._array[index])


def _multiscales(group: zarr.Group, name: str, part: str) -> Iterator[LazyImage]:
    """Each image in a group of OME-Zarr, at full resolution."""
    attributes: Any = group.attrs.asdict()
    attributes = attributes.get("ome", attributes)
    if scales := attributes.get("multiscales"):
        axes = "".join(map(_letter, scales[0].get("axes", "tczyx")))
        array = _Zarr(group[_inside(scales[0]["datasets"][0]["path"], name)], name)
        yield from list_axes(array, axes, name, part)
        return
    if "plate" in attributes:
        paths = [well["path"] for well in attributes["plate"]["wells"]]
    elif "well" in attributes:
        paths = [image["path"] for image in attributes["well"]["images"]]
    elif "labels" in attributes:
        paths = attributes["labels"]
    elif "bioformats2raw.layout" in attributes:
        paths = sorted((key for key in group.group_keys() if key.isdecimal()), key=int)
    else:
        raise ImageError(
            f"{name} is a zarr group without OME-Zarr 'multiscales': give one of its arrays."
        )
    for path in paths:
        label = "-".join([part, *str(path).split("/")] if part else str(path).split("/"))
        try:
            with naming(f"{name} {label}"):
                child: Any = group[_inside(path, name)]
                images = list(_multiscales(child, name, label))
        except ImageError as error:  # the others are images all the same
            images = [failing(name, error, label)]
        yield from images


TYPES = {"channel": "C", "time": "T"}
"""What OME-Zarr calls axes whose names are free."""


def _letter(axis: Any) -> str:
    """Of an axis of OME-Zarr: its name where that is a letter, else its type; U where unknown."""
    name = str(axis if isinstance(axis, str) else axis["name"]).lower()
    if name in ("t", "c", "z", "y", "x"):
        return name.upper()
    kind = axis.get("type") if isinstance(axis, dict) else None
    words = {"channel": "C", "channels": "C", "row": "Y", "column": "X", "col": "X"}
    return TYPES.get(str(kind), words.get(name, "U"))


def _named_axes(array: Any) -> str | None:
    """Axes of a bare zarr array that names them all, as zarr 3 and xarray do."""
    names = getattr(array.metadata, "dimension_names", None)
    names = names or array.attrs.asdict().get("_ARRAY_DIMENSIONS")
    if (
        not isinstance(names, list | tuple)
        or len(names) != array.ndim
        or not all(isinstance(name, str) for name in names)
    ):
        return None
    axes = "".join(map(_letter, names))
    return axes if {"Y", "X"} <= set(axes) else None


def _inside(path: Any, name: str) -> str:
    if not isinstance(path, str) or path.startswith("/") or ".." in path.split("/"):
        raise ImageError(f"{name} names {path!r}, which is no path inside of it.")
    return path
