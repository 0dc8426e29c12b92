"""Images that are read when asked for, and how they lie in arrays of more axes."""

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from selfadapt._errors import ImageError, first_line
from selfadapt._normalize import Image, as_channels_first

TIFF = (".tif", ".tiff", ".btf", ".tf8", ".lsm", ".stk", ".svs", ".ndpi", ".qptiff", ".scn")
PICTURES = (".png", ".jpg", ".jpeg", ".bmp")
MICROSCOPES = {".czi": "bioio-czi", ".nd2": "bioio-nd2", ".lif": "bioio-lif"}
"""Formats of microscopes, and the plugin of bioio that reads each."""
SUFFIXES = (*TIFF, *PICTURES, *MICROSCOPES)
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
        corner: of a window, its first row and column in the image.
    """

    name: str
    read: Callable[[], Image]
    part: str = ""
    size: tuple[int, int] | None = None
    read_window: Callable[[slice, slice], Image] | None = None
    is_window: bool = False
    read_whole: Callable[[], Image] | None = None
    corner: tuple[int, int] = (0, 0)

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

    def sample(self) -> Image:
        """Pixels `[C, h, w]` by which parts of an image that is no window are normalised.

        All of them, or a sample where a side is longer than 2048 pixels.
        """
        sampled = self.windows()[0].whole()
        return self.read() if sampled is None else sampled

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
                corner=(r.start, c.start),
            )
            for (i, r), (j, c) in product(enumerate(rows), enumerate(columns))
        ]


def failing(name: str, error: ImageError, part: str = "") -> LazyImage:
    """An image whose error comes when it is read, as the others must not suffer."""
    return LazyImage(name, partial(_fail, error), part)


def _fail(error: ImageError) -> Image:
    raise error


@contextmanager
def naming(name: str) -> Iterator[None]:
    """Whatever a decoder raises in here becomes an ImageError that names the file."""
    try:
        yield
    except ImageError:
        raise
    except Exception as error:  # every decoder raises its own kinds
        reason = f"there is no {error}" if isinstance(error, KeyError) else first_line(error)
        raise ImageError(f"{name} cannot be read as an image: {reason.rstrip('.')}.") from None


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


MOST_CHANNELS, NARROW = 4, 32
"""A last axis no longer than that, behind one of unknown meaning, is no row of pixels; nor is one
shorter than the other that is a quarter of those before it, or less."""
MOST_PLANES, MOST_VALUES = 10**7, 2**44
"""More images, or more values, in one array are no measurement but damaged metadata."""


def array_axes(ndim: int, channel_axis: int | None) -> str:
    """Axes of a bare array: those of an image last, stacks (Q) in front."""
    image = ["Y", "X"]
    if channel_axis is not None:
        image.insert(channel_axis % 3, "C")
    return "Q" * (ndim - len(image)) + "".join(image)


def list_axes(array: Any, axes: str, name: str, part: str = "") -> Iterator[LazyImage]:
    """One image per index of all axes but rows Y, columns X, channels C and samples S.

    `part` is what the array is of the file.
    """
    return (image for image, _ in list_indexed(array, axes, name, part))


def list_indexed(
    array: Any, axes: str, name: str, part: str = ""
) -> Iterator[tuple[LazyImage, Mapping[int, int]]]:
    """As `list_axes`; with each image comes its index by axis."""
    shape = tuple(array.shape)
    kept = sorted(letter for letter in axes if letter in "YXCS")
    known = kept in (["X", "Y"], ["C", "X", "Y"], ["S", "X", "Y"], ["C", "S", "X", "Y"])
    if not known or len(axes) != len(shape):
        raise ImageError(
            f"{name} of shape {shape} has the axes {axes}: an image has two axes, or three with "
            "channel_axis."
        )
    others = [axis for axis, letter in enumerate(axes) if letter not in "YXCS"]
    count = math.prod(shape[axis] for axis in others)
    if count > MOST_PLANES or math.prod(shape) > MOST_VALUES:
        raise ImageError(f"{name} declares the shape {shape}, more than can be: it is damaged.")
    width, least = shape[axes.index("X")], min(shape[axes.index("Y")], count)
    narrow = width <= MOST_CHANNELS or (width < NARROW and 4 * width <= least)
    if {"Q", "I"} & set(axes) and narrow:  # of unknown meaning
        raise ImageError(
            f"{name} of shape {shape} would be {count} images of {shape[axes.index('Y')]} x "
            f"{shape[axes.index('X')]} pixels: if its last axis holds channels, "
            "say channel_axis=-1."
        )
    for index in product(*(range(shape[axis]) for axis in others)):
        where = dict(zip(others, index, strict=True))
        words = [part, *(f"{axes[axis]}{i}" for axis, i in where.items())]
        yield plane(array, axes, name, " ".join(words).strip(), where), where


def plane(
    array: Any, axes: str, name: str, part: str = "", fixed: Mapping[int, int] | None = None
) -> LazyImage:
    """One image of `array`, whose other axes are `fixed` at an index each."""
    shape, fixed = tuple(array.shape), fixed or {}
    letters = [letter for axis, letter in enumerate(axes) if axis not in fixed]
    order = [letters.index(letter) for letter in "CSYX" if letter in letters]

    def read(rows: slice, columns: slice) -> Image:
        part_of = {"Y": rows, "X": columns}
        index = tuple(
            fixed[axis] if axis in fixed else part_of.get(letter, slice(0, shape[axis]))
            for axis, letter in enumerate(axes)
        )
        pixels = np.transpose(np.asarray(array[index]), order)
        count = math.prod(pixels.shape[:-2])
        return as_channels_first(pixels.reshape(count, *pixels.shape[-2:]), 0, name)

    size = shape[axes.index("Y")], shape[axes.index("X")]
    return LazyImage(name, partial(read, slice(None), slice(None)), part, size, read)
