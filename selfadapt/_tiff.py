"""Images in TIFF files, by tifffile: series, stacks, palettes, alpha, what is cut off or a bomb."""

import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tifffile
import zarr
from numpy.typing import NDArray
from PIL.Image import getmodebands

from selfadapt._copies import all_series, full_series
from selfadapt._errors import ImageError
from selfadapt._lazy import LARGE, LazyImage, array_axes, failing, list_indexed, naming
from selfadapt._normalize import Image
from selfadapt._pictures import palette_of, to_rgb

logger = logging.getLogger(__name__)

ASSOCIATED_OR_NOT = (1, 2)
"""What TIFF calls samples that are alpha."""
CONVERTED: dict[int, str] = {
    tifffile.PHOTOMETRIC.SEPARATED: "CMYK",
    tifffile.PHOTOMETRIC.YCBCR: "YCbCr",
    tifffile.PHOTOMETRIC.CIELAB: "LAB",
}
"""Samples that are no intensities of red, green and blue, and what Pillow calls them."""
PLAIN = {1, 5, 8, 32773, 32946, 34925, 34926, 50000}
"""Compressions that keep YCbCr; of JPEG and the like, red, green and blue are decoded."""
APERIO = 33003
"""Compression that itself means YCbCr."""
MOST_BYTES, MOST_PACKED = 2**26, 3000
"""A TIFF that declares more than both that many bytes and MOST_PACKED times its own is refused:
deflate packs to 1 : 1032 at best, LZW to 1 : 2730, and reading it would fill the memory."""


@dataclass(frozen=True)
class _Tiff:
    """A series of a TIFF file, opened at each access; of a large one only a part is decoded.

    Args:
        path: the file.
        series: which one, and which level of it (one that tifffile takes for a copy may be none).
        shape: of what indexing gives: without alpha, and with the colours of a palette.
        white: the value that stands for black, where a file counts from white to black.
        palette: colours `[values, 3]`, or grays `[values, 1]`, that the stored values stand for.
        samples: axis of the samples, and those that are kept where alpha is not the last.
        mode: axis of samples that become red, green and blue, and Pillow's name for such.
    """

    path: Path
    series: tuple[int, int]
    shape: tuple[int, ...]
    white: int | None = None
    palette: NDArray[Any] | None = None
    samples: tuple[int, tuple[int, ...]] | None = None
    mode: tuple[int, str] | None = None

    def __getitem__(self, index: Any) -> Image:
        stored = index if self.palette is None else index[:-1]
        if self.samples is not None:
            axis, kept = self.samples
            parts = [self._read((*index[:axis], sample, *index[axis + 1 :])) for sample in kept]
            return np.stack(parts, axis=sum(isinstance(part, slice) for part in index[:axis]))
        if self.mode is not None:
            axis, mode = self.mode
            pixels = self._read((*index[:axis], slice(0, getmodebands(mode)), *index[axis + 1 :]))
            at = sum(isinstance(part, slice) for part in index[:axis])
            return np.moveaxis(to_rgb(np.moveaxis(pixels, at, -1), mode), -1, at)
        return self._read(stored)

    def _read(self, stored: Any) -> Image:
        with naming(self.path.name), _Told(), tifffile.TiffFile(self.path) as tiff:
            number, level = self.series
            series = tiff.series[number].levels[level]
            if math.prod(series.shape) <= LARGE**2 and _is_whole(stored):
                whole = series.asarray()
                if whole.shape != series.shape:
                    raise ValueError(f"it holds {whole.size} values, not {series.shape}")
                pixels = np.asarray(whole[stored])
            elif series.dataoffset is not None and series.keyframe.parent is tiff:
                # often in one strip, all of which zarr would read for each window
                mapped: Any = tifffile.memmap(self.path, series=number, level=level, mode="r")
                pixels = np.array(mapped[stored], mapped.dtype.newbyteorder("="))
            else:
                lazy: Any = zarr.open(series.aszarr(level=0), mode="r")
                pixels = np.asarray(lazy[stored])
        if self.white is not None:
            pixels = ~pixels if pixels.dtype == bool else pixels.dtype.type(self.white) - pixels
        return pixels if self.palette is None else self.palette[pixels]


def _is_whole(index: Sequence[Any]) -> bool:
    """Whether all of a series is asked for: of a stack, other pages may be damaged."""
    return all(isinstance(part, slice) for part in index)


def list_tiff(path: Path, channel_axis: int | None, labels: bool) -> Iterator[LazyImage]:
    """Every series is images. Small copies of another one are left out, with a word."""
    with naming(path.name), _Told() as told, tifffile.TiffFile(path) as tiff:
        len(tiff.pages)  # walks through the file
        _refuse_cut_off(tiff, told, path)
        if not tiff.series:
            raise ImageError(f"{path.name} holds no image: it is damaged.")
        listed = all_series(tiff)
        kept = full_series([series for _, series in listed], path.name)
        described = [
            (
                index,
                *_describe_series(*listed[index], path, labels),
                _owners(tiff, listed[index][1]),
            )
            for index in kept
        ]
    for index, array, axes, owners in described:
        if channel_axis is not None and len(array.shape) > 2 and not {"C", "S"} & set(axes):
            axes = array_axes(len(array.shape), channel_axis)
        part = f"series{index}" if len(described) > 1 else ""
        for image, where in list_indexed(array, axes, path.name, part):
            holders = _of_image(owners, where)
            held = [who for who in holders if who != MISSING]
            if len(held) < len(holders):
                lost = ImageError(f"{image} lies in several files, and one of them is missing.")
                image = failing(path.name, lost, image.part)
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


def _describe_series(
    place: tuple[int, int], series: tifffile.TiffPageSeries, path: Path, labels: bool
) -> tuple[_Tiff, str]:
    page, shape, axes = series.keyframe, list(series.shape), series.axes
    _refuse_bomb(series.dtype.itemsize * math.prod(shape), path)
    samples = None
    if "S" in axes:
        count = shape[axes.index("S")]
        extra = [0] * (count - len(page.extrasamples)) + [int(kind) for kind in page.extrasamples]
        if page.is_shaped and page.planarconfig == tifffile.PLANARCONFIG.SEPARATE:
            # tifffile says so of any three or four planes that it is given without a word
            if labels:
                axes = axes.replace("S", "Q")
            if labels or series.dtype != np.uint8:
                extra = [0] * count
            elif 2 in extra:
                logger.warning(
                    "%s: its last plane is taken for alpha, as the file says, and left out. If it "
                    "holds %d images, save them with photometric='minisblack'.",
                    path.name,
                    count,
                )
        samples = [k for k, kind in enumerate(extra) if kind not in ASSOCIATED_OR_NOT]
        shape[series.axes.index("S")] = len(samples)
        if samples == list(range(len(samples))):  # alpha is last, as nearly always
            samples = None
    mode = None if labels else _mode(page)
    if mode is not None:
        count = shape[axes.index("S")] if "S" in axes else 1
        if series.dtype != np.uint8 or count != getmodebands(mode):
            raise ImageError(
                f"{path.name} holds {mode} as {count} x {series.dtype}, which cannot be converted: "
                "save it as RGB."
            )
        shape[axes.index("S")] = 3
    white, palette = None, None
    turned_over = page.photometric == tifffile.PHOTOMETRIC.MINISWHITE and not labels
    if series.dtype.kind == "b" and page.software.startswith("tifffile"):
        turned_over = False  # it says so of every bilevel image, whatever that means
    if turned_over:  # of signed types the ends are -1 - x, and of floats -x
        white = {"i": -1, "f": 0}.get(series.dtype.kind, 2**page.bitspersample - 1)
    if page.photometric == tifffile.PHOTOMETRIC.PALETTE and not labels:
        palette = palette_of(page.colormap)
    if palette is not None:
        shape.append(palette.shape[1])
        axes += "S"
    few = None if samples is None else (axes.index("S"), tuple(samples))
    told = None if mode is None else (axes.index("S"), mode)
    return _Tiff(path, place, tuple(shape), white, palette, few, told), axes


def _mode(page: tifffile.TiffPage) -> str | None:
    """What Pillow calls samples that are to be converted to red, green and blue."""
    if page.compression == APERIO and page.samplesperpixel == 3:
        return "YCbCr"
    mode = CONVERTED.get(page.photometric)
    return None if mode == "YCbCr" and page.compression not in PLAIN else mode


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
