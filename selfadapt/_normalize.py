"""Pure functions of pixels: normalisation, gray, the order of axes."""

import zlib
from typing import Any

import numpy as np
import skimage
import torch
from numpy.typing import NDArray
from torch import Tensor

from selfadapt._errors import ImageError, first_line

Image = NDArray[Any]


FINE, VAST = 2.0**-15, 1e30
"""Single precision has 24 bits: of values whose span is below FINE of their size, less than 9 are
left to tell them apart. It ends at 3e38, and squares and sums of values beyond VAST come there."""


SAMPLED = 2**16
"""Percentiles that tell whether contrast is lost come of about so many pixels."""


def in_single(image: Image, whole: Image) -> tuple[Image, Image]:
    """An image `[C, H, W]`, and the whole of it, in float32 without losing its contrast.

    Where single precision cannot hold the values (an offset many times the contrast, too large or
    too small numbers), each channel has its percentile 1 in `whole` taken off, and
    spans 1 up to percentile 99.
    """
    if not whole.size:
        return _single(image), _single(whole)
    wide = np.longdouble  # holds integers of 64 bits, where it is longer than float64
    ends = [end((1, 2), keepdims=True).astype(wide) for end in (whole.min, whole.max)]
    size, low, high = np.maximum(*map(abs, ends)), *ends
    if (size > 1 / FINE).any() or (high - low < 1 / VAST).any():  # else nothing can be lost
        flat = whole.reshape(len(whole), -1)
        some = flat[:, :: -(-flat.shape[1] // SAMPLED)].astype(wide)
        inner = [np.percentile(some, q, axis=1)[:, None, None] for q in (1, 99)]
        even = inner[0] < inner[1]  # a few outliers, such as padding with 0, hide no offset
        low, high = (np.where(even, a, b) for a, b in zip(inner, ends, strict=True))
    span = high - low
    lost = (span > 0) & ((span < FINE * size) | (size > VAST) | (span < 1 / VAST))
    offset, unit = np.where(lost, low, 0), np.where(lost, span, 1)

    def held(each: Image) -> Image:
        if not lost.any():
            return _single(each)
        # a few outliers may lie beyond what the others are brought to
        return _single(np.clip((each.astype(wide) - offset) / unit, -VAST, VAST))

    part = held(image)
    return part, part if whole is image else held(whole)


def _single(image: Image) -> Image:
    return image.astype(np.float32, copy=False)


def normalize_percentile(
    image: Image, low: float = 1.0, high: float = 99.0, whole: Image | None = None
) -> Image:
    """Per channel of `[C, H, W]`: percentile `low` to 0 and `high` to 1, not clipped; float32.

    A channel that holds one value only becomes zero. `whole` are the pixels `[C, h, w]` whose
    percentiles are taken, where `image` is a part of something larger.
    """
    image, whole = in_single(image, image if whole is None else whole)
    bottom, top = np.percentile(whole, (low, high), axis=(1, 2), keepdims=True)
    span = top - bottom
    if (span == 0).any():  # more than 98 % of the pixels are equal: fall back on the full range
        bottom = np.where(span == 0, whole.min((1, 2), keepdims=True), bottom)
        span = np.where(span == 0, np.ptp(whole, axis=(1, 2), keepdims=True), span)
    scaled = (image - bottom) / np.where(span == 0, 1, span)
    return np.asarray(scaled, np.float32)


def normalize_standard(image: Image, whole: Image | None = None) -> Image:
    """Per channel of `[C, H, W]`: zero mean and unit variance (of `whole`, if given); float32."""
    image, whole = in_single(image, image if whole is None else whole)
    spread = whole.std((1, 2), keepdims=True)
    centred = image - whole.mean((1, 2), keepdims=True)
    return np.asarray(centred / np.where(spread == 0, 1, spread), np.float32)


def to_gray(image: Image) -> Image:
    """Luminance (ITU-R 601) of RGB `[3, H, W]` as `[1, H, W]`; a single channel stays as it is."""
    if image.shape[0] not in (1, 3):
        raise ImageError(
            f"gray was asked for, but the image has {image.shape[0]} channels: it takes 1 or 3."
        )
    image = image.astype(np.float32)
    if image.shape[0] == 3:
        image = np.tensordot(np.array([0.299, 0.587, 0.114], np.float32), image, 1)[None]
    return image


def resize_image(image: Image, size: tuple[int, int]) -> Image:
    """`[C, H, W]` at another size, bilinear, low-passed first where it gets smaller; float32."""
    shape = (len(image), *size)
    return np.asarray(
        skimage.transform.resize(image, shape, order=1, anti_aliasing=True, preserve_range=True),
        np.float32,
    )


def as_channels_first(array: Any, channel_axis: int | None, name: str = "the image") -> Image:
    """`[C, H, W]` from `[H, W]` or from three axes of which `channel_axis` is the channels.

    Raises:
        ImageError: these are no numbers or other axes; `name` is named in the message.
    """
    try:
        image = np.asarray(array.float() if _has_no_equal(array) else array)
    except Exception as error:  # a sparse tensor, one on a GPU, lists of unequal length, ...
        raise ImageError(f"{name} is no array of numbers: {first_line(error)}") from None
    if image.dtype.kind not in "buif":
        raise ImageError(f"{name} holds {image.dtype}, not numbers that a network can take.")
    if image.ndim in (2, 3) and not image.size:
        raise ImageError(f"{name} has shape {image.shape}: there is no pixel in it.")
    if image.ndim == 2:
        return image[None]
    if image.ndim != 3:
        raise ImageError(
            f"{name} has shape {image.shape}: an image has two axes, or three with channel_axis."
        )
    if channel_axis is None:
        raise ImageError(
            f"{name} has shape {image.shape}: say which axis holds the channels, "
            "e.g. channel_axis=-1 for [H, W, C] or channel_axis=0 for [C, H, W]."
        )
    if not (isinstance(channel_axis, int) and -3 <= channel_axis <= 2):
        raise ImageError(f"channel_axis={channel_axis} is no axis of an image with three: -3 to 2.")
    return np.moveaxis(image, channel_axis, 0)


def _has_no_equal(array: Any) -> bool:
    """Whether NumPy lacks the type of a tensor."""
    return isinstance(array, Tensor) and array.dtype == torch.bfloat16


def is_constant(image: Image) -> bool:
    """Whether there is nothing to see: no pixel, or one value throughout."""
    return bool(image.size == 0 or image.min() == image.max())


def checksum(image: Image) -> str:
    """Of type, shape and pixels, to tell one image from another."""
    return f"{image.dtype} {image.shape} {zlib.crc32(np.ascontiguousarray(image).tobytes()):08x}"
