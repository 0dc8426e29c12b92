"""Where images come from, read lazily: arrays, files, folders, zarr, a torch Dataset."""

from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset

from selfadapt._errors import ImageError
from selfadapt._files import list_guarded, list_path, refuse_missing
from selfadapt._lazy import SUFFIXES, LazyImage, array_axes, list_axes, plane
from selfadapt._normalize import Image, as_channels_first
from selfadapt._zarr import list_zarr


def open_images(
    images: Any, *, channel_axis: int | None = None, labels: bool = False
) -> list[LazyImage]:
    """List the images of a source without reading their pixels.

    A file that cannot be read is listed, too, and raises when it is.

    Args:
        images: one of
            - a folder (its TIFF, PNG, JPEG and BMP files and zarr folders, by name, and CZI, ND2
              and LIF files where bioio reads them), a file, or a list of files; hidden files, and
              what Cellpose and others have made of the images beside them, are left out;
            - a path to a zarr array, OME-Zarr image, plate or collection, or an open zarr array;
            - a list of arrays, each one image; or one array, an image or a stack of images:
              its last two axes, or three with `channel_axis`, are those of an image;
            - a torch Dataset with a length, whose items, or the first of each tuple, are images
              (tensors: channels first).
            Axes of files that are neither rows, columns nor channels (time, depth, position) give
            one image per index, and so does each series or scene; small copies of another one
            (thumbnails, pyramids) do not.
        channel_axis: position of the channels in one image with three axes, where the source
            does not say it itself, as PNG, JPEG, TIFF and OME-Zarr files and tensors do.
        labels: whether they are label images: colours of a palette are not looked up, and nothing
            beside them is left out.

    Raises:
        ImageError: there are no images, a file cannot be read, or axes are ambiguous.
    """
    if channel_axis is not None and not -3 <= channel_axis <= 2:
        raise ImageError(f"channel_axis={channel_axis} is no axis of an image with three: -3 to 2.")
    found = list(_list_images(images, channel_axis, labels))
    if not found:
        raise ImageError(
            f"no images in {_describe(images)}: give a folder with files of type "
            f"{', '.join(SUFFIXES)}, a zarr array, arrays or a torch Dataset."
        )
    return found


def open_windows(images: Any, *, channel_axis: int | None = None) -> Sequence[LazyImage]:
    """As `open_images`; of large images their windows."""
    listed = open_images(images, channel_axis=channel_axis)
    return [window for image in listed for window in image.windows()]


def _describe(images: Any) -> str:
    return repr(str(images)) if isinstance(images, str | Path) else f"the {type(images).__name__}"


def _list_images(images: Any, channel_axis: int | None, labels: bool) -> Iterator[LazyImage]:
    if isinstance(images, str | Path):
        yield from list_path(Path(images), channel_axis, labels=labels)
    elif isinstance(images, zarr.Array | zarr.Group):
        yield from list_zarr(images, "zarr", channel_axis)
    elif isinstance(images, IterableDataset):
        raise ImageError(
            "an IterableDataset has no length: give a Dataset with __len__, or feed batches to "
            "SelfAdaptation in your own loop."
        )
    elif isinstance(images, Dataset):
        yield from _list_items(images, channel_axis)
    elif isinstance(images, np.ndarray | Tensor):
        axis = 0 if isinstance(images, Tensor) and images.ndim > 2 else channel_axis
        yield from list_axes(images, array_axes(images.ndim, axis), "image")
    elif isinstance(images, Iterable):
        for index, image in enumerate(images):
            if isinstance(image, LazyImage):
                yield image
            elif isinstance(image, str | Path):
                refuse_missing(Path(image))
                yield from list_guarded(Path(image), channel_axis, labels=labels)
            elif isinstance(image, zarr.Array | zarr.Group):
                yield from list_zarr(image, f"image {index}", channel_axis)
            else:
                name = f"image {index}"
                yield plane(_as_image(image, channel_axis, name), "CYX", name)
    else:
        raise ImageError(f"images cannot be read from a {type(images).__name__}.")


def _as_image(image: Any, channel_axis: int | None, name: str) -> Image:
    return as_channels_first(image, 0 if isinstance(image, Tensor) else channel_axis, name)


def _list_items(dataset: Dataset[Any], channel_axis: int | None) -> Iterator[LazyImage]:
    def read(index: int) -> Image:
        item = dataset[index]
        image = item[0] if isinstance(item, tuple | list) else item
        return _as_image(image, channel_axis, f"item {index}")

    for index in range(len(dataset)):  # type: ignore[arg-type]
        yield LazyImage(f"item {index}", partial(read, index))
