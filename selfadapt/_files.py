"""Images in files and folders: TIFF, PNG, JPEG, zarr. Nothing is read that is not asked for."""

import logging
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import imageio.v3 as iio
import numpy as np
import tifffile
import zarr

from selfadapt._errors import ImageError, first_line
from selfadapt._lazy import LARGE, SUFFIXES, LazyImage, array_axes, list_axes
from selfadapt._normalize import Image, as_channels_first

logger = logging.getLogger(__name__)

MASKS = "_cp_masks"
"""What Cellpose adds to the name of an image for its masks, which it writes beside the image."""


def list_path(path: Path, channel_axis: int | None) -> Iterator[LazyImage]:
    if not path.exists():
        raise ImageError(f"there is no file or folder {str(path)!r}.")
    if path.is_dir():
        if _is_zarr(path):
            yield from list_zarr(zarr.open(path, mode="r"), path.name, channel_axis)
            return
        entries = sorted(path.iterdir())
        stems = {entry.stem for entry in entries if entry.suffix.lower() in SUFFIXES}
        for entry in entries:
            if entry.stem.endswith(MASKS) and entry.stem.removesuffix(MASKS) in stems:
                logger.warning("%s holds the masks of another image: left out.", entry.name)
            elif entry.is_file() and entry.suffix.lower() in SUFFIXES:
                yield from _list_file(entry, channel_axis)
            elif entry.is_dir() and _is_zarr(entry):
                yield from list_path(entry, channel_axis)
    else:
        yield from _list_file(path, channel_axis)


def _is_zarr(folder: Path) -> bool:
    return any((folder / marker).exists() for marker in ("zarr.json", ".zarray", ".zgroup"))


def _list_file(path: Path, channel_axis: int | None) -> Iterator[LazyImage]:
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        raise ImageError(f"{path.name} is no image that can be read: {', '.join(SUFFIXES)} are.")
    if suffix not in (".tif", ".tiff"):
        yield LazyImage(path.name, partial(_read_picture, path))
        return
    try:
        with tifffile.TiffFile(path) as tiff:
            axes, shape = tiff.series[0].axes, tiff.series[0].shape
    except Exception as error:  # every decoder raises its own kinds
        raise _unreadable(path, error) from None
    if channel_axis is not None and len(shape) > 2 and not {"C", "S"} & set(axes):
        axes = array_axes(len(shape), channel_axis)
    yield from list_axes(_Tiff(path, shape), axes, path.name)


@dataclass(frozen=True)
class _Tiff:
    """A TIFF file, opened at each access; of a stack or a large image only a part is decoded."""

    path: Path
    shape: tuple[int, ...]

    def __getitem__(self, index: Any) -> Image:
        try:
            with tifffile.TiffFile(self.path) as tiff:
                if math.prod(self.shape) <= LARGE**2:
                    return np.asarray(tiff.series[0].asarray()[index])
                lazy: Any = zarr.open(tiff.series[0].aszarr(), mode="r")
                return np.asarray(lazy[index])
        except Exception as error:
            raise _unreadable(self.path, error) from None


def _unreadable(path: Path, error: Exception) -> ImageError:
    return ImageError(f"{path.name} cannot be read as an image: {first_line(error)}")


def _read_picture(path: Path) -> Image:
    """PNG or JPEG. An alpha channel is no measurement and is left out."""
    try:
        pixels = np.asarray(iio.imread(path.read_bytes(), extension=path.suffix.lower()))
    except Exception as error:
        raise _unreadable(path, error) from None
    if pixels.ndim == 3 and pixels.shape[-1] in (2, 4):
        pixels = pixels[..., :-1]
    if pixels.ndim == 3 and pixels.shape[-1] == 1:
        pixels = pixels[..., 0]
    return as_channels_first(pixels, -1, path.name)


def list_zarr(
    node: zarr.Array[Any] | zarr.Group, name: str, channel_axis: int | None
) -> Iterator[LazyImage]:
    if isinstance(node, zarr.Array):
        yield from list_axes(node, array_axes(node.ndim, channel_axis), name)
        return
    attributes: Any = node.attrs.asdict()
    scales = attributes.get("ome", attributes).get("multiscales")
    if not scales:
        raise ImageError(
            f"{name} is a zarr group without OME-Zarr 'multiscales': give one of its arrays."
        )
    axes = "".join(
        str(axis if isinstance(axis, str) else axis["name"])[0].upper()
        for axis in scales[0].get("axes", "tczyx")
    )
    array = node[scales[0]["datasets"][0]["path"]]  # the first data set has full resolution
    yield from list_axes(array, axes, name)
