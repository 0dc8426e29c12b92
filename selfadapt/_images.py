"""Where images come from, read lazily: arrays, files, folders, zarr, a torch Dataset."""

import logging
import math
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial
from itertools import product
from pathlib import Path
from typing import Any

import imageio.v3 as iio
import numpy as np
import tifffile
import zarr
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset

from selfadapt._errors import ImageError, first_line
from selfadapt._normalize import Image, as_channels_first

logger = logging.getLogger(__name__)

SUFFIXES = (".tif", ".tiff", ".png", ".jpg", ".jpeg")
MASKS = "_cp_masks"
"""What Cellpose adds to the name of an image for its masks, which it writes beside the image."""
LARGE, WINDOW = 2048, 1024
"""An image with a side above LARGE is adapted to in windows of at most WINDOW a side."""
SAMPLED_WINDOWS, SAMPLED_PIXELS = 64, 2**20
"""Statistics of such an image come from at most so many windows, evenly spread, and pixels."""


@dataclass(frozen=True)
class LazyImage:
    """An image that is read when asked for.

    Args:
        name: the file or item that it comes from.
        read: gives the pixels, `[C, H, W]`, in the type they are stored in.
        part: which index of other axes, and which window, of that file; "" for all of it.
        size: (height, width), where it is known without reading.
        read_window: gives the pixels of some rows and columns, where they can be read alone.
        is_window: whether it is a window of a larger image (and may therefore be blank).
        read_whole: of a window, gives pixels `[C, 1, N]` of the whole image, evenly spread.
    """

    name: str
    read: Callable[[], Image]
    part: str = ""
    size: tuple[int, int] | None = None
    read_window: Callable[[slice, slice], Image] | None = None
    is_window: bool = False
    read_whole: Callable[[], Image] | None = None

    def __str__(self) -> str:
        return f"{self.name} {self.part}".strip()

    @property
    def stem(self) -> str:
        """A file name for what is made of this image, without suffix."""
        known = Path(self.name).suffix.lower() in SUFFIXES
        stem = Path(self.name).stem if known else self.name
        return re.sub(r"[^\w. ()+-]", "_", "-".join([stem, *self.part.split()]))

    def whole(self) -> Image | None:
        """Of a window, pixels of the image that it belongs to; None for an image."""
        return self.read_whole() if self.read_whole else None

    def windows(self) -> "list[LazyImage]":
        """The image itself, or equal windows of it if a side is longer than 2048 pixels.

        A window has at most 1024 pixels a side. `whole` says how it is to be normalised: as a part
        of its image.
        """
        if self.size is None or self.read_window is None or max(self.size) <= LARGE:
            return [self]
        read = self.read_window
        rows, columns = (_even_slices(size) for size in self.size)
        sample = cache(partial(_sampled, read, list(product(rows, columns))))
        return [
            LazyImage(
                self.name,
                partial(read, r, c),
                f"{self.part} window{i},{j}".strip(),
                (r.stop - r.start, c.stop - c.start),
                is_window=True,
                read_whole=sample,
            )
            for (i, r), (j, c) in product(enumerate(rows), enumerate(columns))
        ]


def _sampled(read: Callable[[slice, slice], Image], places: Sequence[tuple[slice, slice]]) -> Image:
    """Pixels of evenly spread windows, drawn at random with a fixed seed, `[C, 1, N]`."""
    chosen = places[:: -(-len(places) // SAMPLED_WINDOWS)]
    rng = np.random.default_rng(0)
    parts = []
    for place in chosen:
        window = read(*place)
        flat = window.reshape(len(window), -1)
        most = SAMPLED_PIXELS // len(chosen)
        if flat.shape[1] > most:
            flat = flat[:, rng.integers(flat.shape[1], size=most)]
        parts.append(flat)
    return np.asarray(np.concatenate(parts, 1)[:, None])


def _even_slices(size: int) -> list[slice]:
    count = -(-size // WINDOW)
    return [slice(k * size // count, (k + 1) * size // count) for k in range(count)]


def open_images(images: Any, *, channel_axis: int | None = None) -> list[LazyImage]:
    """List the images of a source without reading their pixels.

    Args:
        images: one of
            - a folder (its TIFF, PNG and JPEG files, by name), a file, or a list of files;
            - a path to a zarr array or OME-Zarr image, or an open zarr array;
            - a list of arrays, each one image; or one array, an image or a stack of images:
              its last two axes, or three with `channel_axis`, are those of an image;
            - a torch Dataset with a length, whose items, or the first of each tuple, are images
              (tensors: channels first).
            Axes of TIFF and OME-Zarr files that are neither rows, columns nor channels (time,
            depth, position) give one image per index.
        channel_axis: position of the channels in one image with three axes, where the source
            does not say it itself, as PNG, JPEG, TIFF and OME-Zarr files and tensors do.

    Raises:
        ImageError: there are no images, a file cannot be read, or axes are ambiguous.
    """
    if channel_axis is not None and not -3 <= channel_axis <= 2:
        raise ImageError(f"channel_axis={channel_axis} is no axis of an image with three: -3 to 2.")
    found = list(_list_images(images, channel_axis))
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


def _list_images(images: Any, channel_axis: int | None) -> Iterator[LazyImage]:
    if isinstance(images, str | Path):
        yield from _list_path(Path(images), channel_axis)
    elif isinstance(images, zarr.Array | zarr.Group):
        yield from _list_zarr(images, "zarr", channel_axis)
    elif isinstance(images, IterableDataset):
        raise ImageError(
            "an IterableDataset has no length: give a Dataset with __len__, or feed batches to "
            "SelfAdaptation in your own loop."
        )
    elif isinstance(images, Dataset):
        yield from _list_items(images, channel_axis)
    elif isinstance(images, np.ndarray | Tensor):
        axis = 0 if isinstance(images, Tensor) and images.ndim > 2 else channel_axis
        yield from _list_axes(images, _array_axes(images.ndim, axis), "image")
    elif isinstance(images, Iterable):
        for index, image in enumerate(images):
            if isinstance(image, LazyImage):
                yield image
            elif isinstance(image, str | Path):
                yield from _list_path(Path(image), channel_axis)
            elif isinstance(image, zarr.Array | zarr.Group):
                yield from _list_zarr(image, f"image {index}", channel_axis)
            else:
                name = f"image {index}"
                yield _plane(_as_image(image, channel_axis, name), name, "", {}, 0)
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


def _list_path(path: Path, channel_axis: int | None) -> Iterator[LazyImage]:
    if not path.exists():
        raise ImageError(f"there is no file or folder {str(path)!r}.")
    if path.is_dir():
        if _is_zarr(path):
            yield from _list_zarr(zarr.open(path, mode="r"), path.name, channel_axis)
            return
        entries = sorted(path.iterdir())
        stems = {entry.stem for entry in entries if entry.suffix.lower() in SUFFIXES}
        for entry in entries:
            if entry.stem.endswith(MASKS) and entry.stem.removesuffix(MASKS) in stems:
                logger.warning("%s holds the masks of another image: left out.", entry.name)
            elif entry.is_file() and entry.suffix.lower() in SUFFIXES:
                yield from _list_file(entry, channel_axis)
            elif entry.is_dir() and _is_zarr(entry):
                yield from _list_path(entry, channel_axis)
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
        axes = _array_axes(len(shape), channel_axis)
    yield from _list_axes(_Tiff(path, shape), axes, path.name)


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


def _list_zarr(
    node: zarr.Array[Any] | zarr.Group, name: str, channel_axis: int | None
) -> Iterator[LazyImage]:
    if isinstance(node, zarr.Array):
        yield from _list_axes(node, _array_axes(node.ndim, channel_axis), name)
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
    yield from _list_axes(array, axes, name)


def _array_axes(ndim: int, channel_axis: int | None) -> str:
    """Axes of a bare array: those of an image last, stacks (Q) in front."""
    image = ["Y", "X"]
    if channel_axis is not None:
        image.insert(channel_axis % 3, "C")
    return "Q" * (ndim - len(image)) + "".join(image)


def _list_axes(array: Any, axes: str, name: str) -> Iterator[LazyImage]:
    """One image per index of all axes but rows Y, columns X and channels C or S."""
    kept = [letter for letter in axes if letter in "YXCS"]
    known = "".join(sorted(kept)) in ("XY", "CXY", "SXY")
    if not known or len(axes) != len(array.shape):
        raise ImageError(
            f"{name} of shape {tuple(array.shape)} has the axes {axes}: an image has two axes, or "
            "three with channel_axis."
        )
    if kept.index("Y") > kept.index("X"):
        raise ImageError(f"{name} has the axes {axes}: rows (Y) must come before columns (X).")
    channels = next((i for i, letter in enumerate(kept) if letter in "CS"), None)
    others = [axis for axis, letter in enumerate(axes) if letter not in "YXCS"]
    for index in product(*(range(array.shape[axis]) for axis in others)):
        where = dict(zip(others, index, strict=True))
        part = " ".join(f"{axes[axis]}{i}" for axis, i in where.items())
        yield _plane(array, name, part, where, channels)


def _plane(
    array: Any, name: str, part: str, fixed: dict[int, int], channel_axis: int | None
) -> LazyImage:
    """One image of `array`, whose other axes are `fixed` at an index each.

    `channel_axis` counts the axes that are not fixed.
    """
    free = [axis for axis in range(len(array.shape)) if axis not in fixed]
    spatial = free if channel_axis is None else [a for a in free if a != free[channel_axis]]

    def read(rows: slice, columns: slice) -> Image:
        index: list[Any] = [fixed.get(axis, slice(None)) for axis in range(len(array.shape))]
        index[spatial[0]], index[spatial[1]] = rows, columns
        return as_channels_first(np.asarray(array[tuple(index)]), channel_axis, name)

    size = array.shape[spatial[0]], array.shape[spatial[1]]
    return LazyImage(name, partial(read, slice(None), slice(None)), part, size, read)
