"""Images in files and folders. Nothing is read that is not asked for.

TIFF is read by tifffile, zarr by zarr, PNG, JPEG and BMP by Pillow, and what microscopes write by
bioio, where it is installed. bioio does not read the others: it takes whole planes where a window
of a slide is asked for, and knows no alpha (docs/benchmarks.md).
"""

import io
import json
import logging
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import imagecodecs
import numpy as np
import tifffile
import zarr
from numpy.typing import NDArray
from PIL import Image as Pillow

from selfadapt._errors import ImageError, first_line
from selfadapt._lazy import (
    LARGE,
    MICROSCOPES,
    PICTURES,
    SUFFIXES,
    TIFF,
    LazyImage,
    array_axes,
    list_axes,
)
from selfadapt._masks import is_made_of
from selfadapt._normalize import Image, as_channels_first

logger = logging.getLogger(__name__)

SMALL_COPIES = {"thumbnail", "label", "macro", "overview", "preview"}
"""Words in the names of series that slide scanners store beside the image."""
ASSOCIATED_OR_NOT = (1, 2)
"""What TIFF calls samples that are alpha."""
MOST_BYTES, MOST_PACKED = 2**26, 3000
"""A TIFF that declares more than both that many bytes and MOST_PACKED times its own is refused:
deflate packs to 1 : 1032 at best, LZW to 1 : 2730, and reading it would fill the memory."""


def list_paths(
    paths: Iterable[Path], channel_axis: int | None, *, labels: bool
) -> Iterator[LazyImage]:
    """As `list_path`, for each; whatever is wrong with one shows when it is read."""
    for path in paths:
        _refuse_missing(path)
        yield from _guarded(path.name, partial(list_path, path, channel_axis, labels=labels))


def list_path(path: Path, channel_axis: int | None, *, labels: bool) -> Iterator[LazyImage]:
    """Images of a file or folder; `labels` says that they are label images."""
    _refuse_missing(path)
    if not path.is_dir():
        yield from _list_file(path, channel_axis, labels)
    elif _is_zarr(path):
        yield from list_zarr(_open_zarr(path), path.name, channel_axis)
    else:
        entries = sorted(path.iterdir())
        names = {entry.name for entry in entries if _suffix(entry) in SUFFIXES or _is_zarr(entry)}
        for entry in entries:
            yield from _list_entry(entry, names, channel_axis, labels)


def _list_entry(
    entry: Path, names: set[str], channel_axis: int | None, labels: bool
) -> Iterator[LazyImage]:
    """What one entry of a folder gives; what is left out is named, if it could be an image."""
    if entry.name.startswith("."):  # hidden: systems and editors put such files there
        return
    if entry.is_dir() and _is_zarr(entry):
        if labels or not is_made_of(entry.name, names):
            yield from _guarded(entry.name, partial(list_path, entry, channel_axis, labels=labels))
        else:
            _say_made(entry.name)
    elif (suffix := _suffix(entry)) in MICROSCOPES and not _readable(suffix):
        logger.warning("%s: left out. %s", entry.name, _remedy(suffix))
    elif suffix not in SUFFIXES:
        return
    elif entry.is_dir():
        logger.warning("%s is a folder: left out. Give it by itself.", entry.name)
    elif not entry.exists():
        logger.warning("%s is a link to nothing: left out.", entry.name)
    elif not entry.is_file():  # a pipe would wait for ever
        logger.warning("%s is no file: left out.", entry.name)
    elif not labels and is_made_of(entry.name, names):
        _say_made(entry.name)
    else:
        yield from _guarded(entry.name, partial(_list_file, entry, channel_axis, labels))


def _say_made(name: str) -> None:
    logger.warning("%s was made of another image (masks, flows, ...): left out.", name)


def _refuse_missing(path: Path) -> None:
    try:
        exists = path.exists()
    except (OSError, ValueError) as error:  # a name that no file can have
        raise ImageError(f"{str(path)!r} is no name of a file: {first_line(error)}") from None
    if not exists:
        raise ImageError(f"there is no file or folder {str(path)!r}.")


def _guarded(name: str, listing: Callable[[], Iterator[LazyImage]]) -> Iterator[LazyImage]:
    """The images; or one whose error comes when it is read, as the others must not suffer."""
    try:
        yield from list(listing())
    except ImageError as error:
        yield LazyImage(name, partial(_fail, error))


def _fail(error: ImageError) -> Image:
    raise error


def _suffix(path: Path) -> str:
    return path.suffix.lower()


def _list_file(path: Path, channel_axis: int | None, labels: bool) -> Iterator[LazyImage]:
    suffix = _suffix(path)
    if suffix in PICTURES:
        yield LazyImage(path.name, partial(_read_picture, path, labels))
    elif suffix in TIFF:
        yield from _list_tiff(path, channel_axis, labels)
    elif suffix in MICROSCOPES:
        yield from _list_scenes(path)
    else:
        raise ImageError(f"{path.name} is no image that can be read: {', '.join(SUFFIXES)} are.")


def _unreadable(name: str, error: Exception) -> ImageError:
    return ImageError(f"{name} cannot be read as an image: {first_line(error)}")


# --- TIFF ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Tiff:
    """A series of a TIFF file, opened at each access; of a large one only a part is decoded.

    Args:
        path: the file.
        series: which one.
        shape: of what indexing gives: without alpha, and with the colours of a palette.
        white: the value that stands for black, where a file counts from white to black.
        palette: colours `[values, 3]` that the stored values stand for.
        samples: axis of the samples, and those that are kept where alpha is not the last.
    """

    path: Path
    series: int
    shape: tuple[int, ...]
    white: int | None = None
    palette: NDArray[Any] | None = None
    samples: tuple[int, tuple[int, ...]] | None = None

    def __getitem__(self, index: Any) -> Image:
        stored = index if self.palette is None else index[:-1]
        if self.samples is not None:
            axis, kept = self.samples
            parts = [self._read((*index[:axis], sample, *index[axis + 1 :])) for sample in kept]
            return np.stack(parts, axis=sum(isinstance(part, slice) for part in index[:axis]))
        return self._read(stored)

    def _read(self, stored: Any) -> Image:
        try:
            with _Told(), tifffile.TiffFile(self.path) as tiff:
                series = tiff.series[self.series]
                if math.prod(series.shape) <= LARGE**2 and _is_whole(stored):
                    whole = series.asarray()
                    if whole.shape != series.shape:
                        raise ValueError(f"it holds {whole.size} values, not {series.shape}")
                    pixels = np.asarray(whole[stored])
                else:
                    lazy: Any = zarr.open(series.aszarr(level=0), mode="r")
                    pixels = np.asarray(lazy[stored])
        except Exception as error:
            raise _unreadable(self.path.name, error) from None
        if self.white is not None:
            pixels = ~pixels if pixels.dtype == bool else pixels.dtype.type(self.white) - pixels
        return pixels if self.palette is None else self.palette[pixels]


def _is_whole(index: Sequence[Any]) -> bool:
    """Whether all of a series is asked for: of a stack, other pages may be damaged."""
    return all(isinstance(part, slice) for part in index)


def _list_tiff(path: Path, channel_axis: int | None, labels: bool) -> Iterator[LazyImage]:
    """Every series is images. Small copies of another one are left out, with a word."""
    try:
        with _Told() as told, tifffile.TiffFile(path) as tiff:
            len(tiff.pages)  # walks through the file
            _refuse_cut_off(tiff, told, path)
            if not tiff.series:
                raise ImageError(f"{path.name} holds no image: it is damaged.")
            kept = _full_series(tiff.series, path.name)
            described = [
                (*_describe_series(tiff, path, index, labels), _owners(tiff, tiff.series[index]))
                for index in kept
            ]
    except ImageError:
        raise
    except Exception as error:  # every decoder raises its own kinds
        raise _unreadable(path.name, error) from None
    for array, axes, owners in described:
        if channel_axis is not None and len(array.shape) > 2 and not {"C", "S"} & set(axes):
            axes = array_axes(len(array.shape), channel_axis)
        part = f"series{array.series}" if len(described) > 1 else ""
        for image, where in list_axes(array, axes, path.name, part):
            holders = _of_image(owners, where)
            held = [who for who in holders if who != MISSING]
            if len(held) < len(holders):
                lost = ImageError(f"{image} lies in several files, and one of them is missing.")
                image = LazyImage(path.name, partial(_fail, lost), image.part)
            if not held or held[0] == OWN:  # of several files, that with its first plane lists it
                yield image


OWN, OTHER, MISSING = 1, 0, -1
"""Who holds a plane: this file, another one of the same image (OME-TIFF, MMStack), or none."""


def _owners(tiff: tifffile.TiffFile, series: tifffile.TiffPageSeries) -> NDArray[np.int8]:
    """Of each plane of a series, by the axes before those of a page."""
    pages = list(series.pages)
    lead = series.shape[: len(series.shape) - len(series.keyframe.shape)]
    if math.prod(lead) != len(pages):  # one page stands for all that lie behind it
        return np.full(lead, OWN, np.int8)
    who = [MISSING if p is None else OWN if p.parent is tiff else OTHER for p in pages]
    return np.array(who, np.int8).reshape(lead)


def _of_image(owners: NDArray[np.int8], where: Mapping[int, int]) -> list[int]:
    index = tuple(where.get(axis, slice(None)) for axis in range(owners.ndim))
    return [int(who) for who in np.ravel(owners[index])]


def _full_series(series: Sequence[tifffile.TiffPageSeries], name: str) -> list[int]:
    """Indices of those that are no small copy of another one."""
    sizes = [_plane_size(each) for each in series]
    kept = [
        index
        for index, each in enumerate(series)
        if not (
            _words(each.name) & SMALL_COPIES
            or each.keyframe.is_reduced
            or any(
                _is_copy(sizes[index], size) and len(each) <= len(other)
                for size, other in zip(sizes, series, strict=True)
            )
        )
    ]
    if kept and len(kept) < len(series):
        logger.warning(
            "%s: %d of %d series are left out as small copies (thumbnails) of the image.",
            name,
            len(series) - len(kept),
            len(series),
        )
    return kept or list(range(len(series)))


def _words(name: str) -> set[str]:
    return set(re.findall("[a-z]+", name.lower()))


def _plane_size(series: tifffile.TiffPageSeries) -> tuple[int, int]:
    by_axis = dict(zip(series.axes, series.shape, strict=True))
    return by_axis.get("Y", 1), by_axis.get("X", 1)


def _is_copy(small: tuple[int, int], large: tuple[int, int]) -> bool:
    """Whether one size is at most half of another, and of its shape, but for rounding."""
    (height, width), (rows, columns) = small, large
    same_shape = abs(height * columns - width * rows) <= max(rows, columns)
    return 2 * height <= rows and 2 * width <= columns and same_shape


def _describe_series(
    tiff: tifffile.TiffFile, path: Path, index: int, labels: bool
) -> tuple[_Tiff, str]:
    series = tiff.series[index]
    page, shape, axes = series.keyframe, list(series.shape), series.axes
    _refuse_bomb(series.dtype.itemsize * math.prod(shape), path)
    samples = None
    if "S" in axes:
        count = shape[axes.index("S")]
        extra = [0] * (count - len(page.extrasamples)) + [int(kind) for kind in page.extrasamples]
        samples = [k for k, kind in enumerate(extra) if kind not in ASSOCIATED_OR_NOT]
        shape[axes.index("S")] = len(samples)
        if samples == list(range(len(samples))):  # alpha is last, as nearly always
            samples = None
    white, palette = None, None
    turned_over = page.photometric == tifffile.PHOTOMETRIC.MINISWHITE and not labels
    if series.dtype.kind == "b" and page.software.startswith("tifffile"):
        turned_over = False  # it says so of every bilevel image, whatever that means
    if turned_over and series.dtype.kind in "bu":
        white = 2**page.bitspersample - 1
    if page.photometric == tifffile.PHOTOMETRIC.PALETTE and not labels:
        palette = _palette(page.colormap)
    if palette is not None:
        shape.append(3)
        axes += "S"
    place = None if samples is None else (axes.index("S"), tuple(samples))
    return _Tiff(path, index, tuple(shape), white, palette, place), axes


def _palette(colours: NDArray[Any] | None) -> NDArray[Any] | None:
    """Colours `[values, 3]`; None where they only tint an intensity, as ImageJ's tables do."""
    if colours is None or (np.diff(colours.astype(np.int64), axis=1) >= 0).all():
        return None
    return (colours // 257).astype(np.uint8).T if (colours % 257 == 0).all() else colours.T


def _refuse_bomb(declared: int, path: Path) -> None:
    size = path.stat().st_size
    if declared > max(MOST_BYTES, MOST_PACKED * size):
        raise ImageError(
            f"{path.name} has {size:,} bytes and declares {declared:,}: it is damaged, or made to "
            "fill the memory."
        )


class _Told(logging.Filter):
    """Keeps what tifffile logs, which reads a file whose end is missing as one with fewer pages.

    What matters of it becomes our errors; the rest is of no use to whoever only has the file.
    """

    def __init__(self) -> None:
        super().__init__()
        self.messages: list[str] = []

    def filter(self, record: logging.LogRecord) -> bool:
        self.messages.append(record.getMessage())
        return False

    def __enter__(self) -> "_Told":
        tifffile.logger().addFilter(self)
        return self

    def __exit__(self, *_: object) -> None:
        tifffile.logger().removeFilter(self)


def _refuse_cut_off(tiff: tifffile.TiffFile, told: _Told, path: Path) -> None:
    ends = [0]
    for series in tiff.series:
        page = series.keyframe
        if series.dataoffset is not None:
            ends.append(series.dataoffset + series.nbytes)
        if page.dataoffsets:
            ends.append(page.dataoffsets[-1] + page.databytecounts[-1])
    if max(ends) > path.stat().st_size or "invalid page offset" in " ".join(told.messages):
        raise ImageError(f"{path.name} is cut off: its end is missing. Copy it anew.")


# --- PNG, JPEG, BMP ------------------------------------------------------------------------------


_CONVERTED = {"CMYK", "YCbCr", "LAB", "HSV"}
"""Modes of Pillow whose values are no intensities of red, green and blue."""


def _colours_of(picture: Pillow.Image) -> NDArray[Any]:
    """Of a palette, `[3, 256]` as TIFF has them."""
    packed = np.array(picture.getpalette("RGB") or [], np.uint16).reshape(-1, 3)
    used = packed[np.minimum(np.arange(256), len(packed) - 1)]  # the last colour goes on
    return np.asarray(used.T * 257)


def _read_picture(path: Path, labels: bool) -> Image:
    """Pixels at the depth they are stored in. An alpha channel is no measurement: left out."""
    try:
        packed = path.read_bytes()
        with Pillow.open(io.BytesIO(packed)) as picture:
            if picture.format == "PNG" and packed[24] == 16:
                pixels = imagecodecs.png_decode(packed)  # of colour Pillow makes 8 bits
            elif picture.mode == "P":
                pixels = np.asarray(picture)
                colours = _colours_of(picture)
                if not labels and (palette := _palette(colours)) is not None:
                    pixels = palette[pixels]
            elif picture.mode in _CONVERTED:
                pixels = np.asarray(picture.convert("RGB"))
            else:
                pixels = np.asarray(picture)
    except Exception as error:
        raise _unreadable(path.name, error) from None
    if pixels.ndim == 3 and pixels.shape[-1] in (2, 4):
        pixels = pixels[..., :-1]
    if pixels.ndim == 3 and pixels.shape[-1] == 1:
        pixels = pixels[..., 0]
    return as_channels_first(pixels, -1, path.name)


# --- zarr ----------------------------------------------------------------------------------------


def _is_zarr(folder: Path) -> bool:
    return any((folder / marker).exists() for marker in ("zarr.json", ".zarray", ".zgroup"))


def _open_zarr(path: Path) -> "zarr.Array[Any] | zarr.Group":
    try:
        return zarr.open(path, mode="r")
    except Exception as error:  # damaged metadata fail in many ways
        raise _unreadable(path.name, error) from None


def list_zarr(
    node: "zarr.Array[Any] | zarr.Group", name: str, channel_axis: int | None
) -> Iterator[LazyImage]:
    """Images of an array, of an OME-Zarr image, or of all those in a plate or a collection."""
    try:
        if isinstance(node, zarr.Array):
            described = [("", node, _named_axes(node) or array_axes(node.ndim, channel_axis))]
        else:
            described = list(_multiscales(node, name, ""))
        arrays = [(part, _Zarr(array, name), axes) for part, array, axes in described]
    except ImageError:
        raise
    except Exception as error:
        raise _unreadable(name, error) from None
    for part, array, axes in arrays:
        yield from (image for image, _ in list_axes(array, axes, name, part))


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
        try:
            return np.asarray(self._array[index])
        except Exception as error:
            raise _unreadable(self._name, error) from None


def _multiscales(group: zarr.Group, name: str, part: str) -> Iterator[tuple[str, Any, str]]:
    """(part, array at full resolution, axes) of each image in a group of OME-Zarr."""
    attributes: Any = group.attrs.asdict()
    attributes = attributes.get("ome", attributes)
    if scales := attributes.get("multiscales"):
        axes = "".join(map(_letter, scales[0].get("axes", "tczyx")))
        yield part, group[_inside(scales[0]["datasets"][0]["path"], name)], axes
        return
    if "plate" in attributes:
        paths = [well["path"] for well in attributes["plate"]["wells"]]
    elif "well" in attributes:
        paths = [image["path"] for image in attributes["well"]["images"]]
    elif "bioformats2raw.layout" in attributes:
        paths = sorted((key for key in group.group_keys() if key.isdecimal()), key=int)
    else:
        raise ImageError(
            f"{name} is a zarr group without OME-Zarr 'multiscales': give one of its arrays."
        )
    for path in paths:
        child: Any = group[_inside(path, name)]
        label = "-".join([part, *str(path).split("/")] if part else str(path).split("/"))
        yield from _multiscales(child, name, label)


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
    """Axes of a bare zarr array of version 3 that names them all."""
    names = getattr(array.metadata, "dimension_names", None)
    if not names or not all(isinstance(name, str) for name in names):
        return None
    axes = "".join(map(_letter, names))
    return axes if {"Y", "X"} <= set(axes) else None


def _inside(path: Any, name: str) -> str:
    if not isinstance(path, str) or path.startswith("/") or ".." in path.split("/"):
        raise ImageError(f"{name} names {path!r}, which is no path inside of it.")
    return path


# --- bioio: what microscopes write ---------------------------------------------------------------


def _readable(suffix: str) -> bool:
    return find_spec("bioio") is not None and (
        find_spec(MICROSCOPES[suffix].replace("-", "_")) is not None
    )


def _remedy(suffix: str) -> str:
    return f"To read {suffix} files: pip install 'selfadapt[{suffix[1:]}]'"


@dataclass(frozen=True)
class _Scene:
    """A scene of a file that bioio reads, opened at each access."""

    path: Path
    scene: int
    shape: tuple[int, ...]

    def __getitem__(self, index: Any) -> Image:
        from bioio import BioImage  # seconds, and only here

        try:
            image = BioImage(self.path)
            image.set_scene(self.scene)
            return np.asarray(image.dask_data[index].compute(scheduler="synchronous"))
        except Exception as error:
            raise _unreadable(self.path.name, error) from None


def _list_scenes(path: Path) -> Iterator[LazyImage]:
    if not _readable(_suffix(path)):
        raise ImageError(f"{path.name} cannot be read. {_remedy(_suffix(path))}")
    from bioio import BioImage

    try:
        image = BioImage(path)
        scenes = []
        for index in range(len(image.scenes)):
            image.set_scene(index)
            scenes.append((_Scene(path, index, tuple(image.shape)), str(image.dims.order)))
    except Exception as error:
        raise _unreadable(path.name, error) from None
    for scene, axes in scenes:
        part = f"series{scene.scene}" if len(scenes) > 1 else ""
        yield from (image for image, _ in list_axes(scene, axes, path.name, part))
