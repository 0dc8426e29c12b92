"""Pure functions of pixels: normalisation, gray, the order of axes."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from selfadapt._errors import ImageError

Image = NDArray[Any]


def normalize_percentile(image: Image, low: float = 1.0, high: float = 99.0) -> Image:
    """Per channel of `[C, H, W]`: percentile `low` to 0 and `high` to 1, not clipped; float32.

    A channel that holds one value only becomes zero.
    """
    image = image.astype(np.float32)
    bottom, top = np.percentile(image, (low, high), axis=(1, 2), keepdims=True)
    span = top - bottom
    if (span == 0).any():  # more than 98 % of the pixels are equal: fall back on the full range
        bottom = np.where(span == 0, image.min((1, 2), keepdims=True), bottom)
        span = np.where(span == 0, np.ptp(image, axis=(1, 2), keepdims=True), span)
    scaled = (image - bottom) / np.where(span == 0, 1, span)
    return np.asarray(scaled, np.float32)


def normalize_standard(image: Image) -> Image:
    """Per channel of `[C, H, W]`: zero mean and unit variance; float32."""
    image = image.astype(np.float32)
    spread = image.std((1, 2), keepdims=True)
    centred = image - image.mean((1, 2), keepdims=True)
    return np.asarray(centred / np.where(spread == 0, 1, spread), np.float32)


def to_gray(image: Image, *, invert: bool = False) -> Image:
    """Luminance (ITU-R 601) of RGB `[3, H, W]` as `[1, H, W]`; a single channel stays as it is.

    `invert` makes stained, dark nuclei bright, as fluorescence networks expect them.
    """
    if image.shape[0] not in (1, 3):
        raise ImageError(
            f"gray was asked for, but the image has {image.shape[0]} channels: it takes 1 or 3."
        )
    image = image.astype(np.float32)
    if image.shape[0] == 3:
        image = np.tensordot(np.array([0.299, 0.587, 0.114], np.float32), image, 1)[None]
    return image.max() - image if invert else image


def as_channels_first(array: Any, channel_axis: int | None, name: str = "the image") -> Image:
    """`[C, H, W]` from `[H, W]` or from three axes of which `channel_axis` is the channels.

    Raises:
        ImageError: these are no numbers or other axes; `name` is named in the message.
    """
    image = np.asarray(array)
    if image.dtype.kind not in "buif":
        raise ImageError(f"{name} holds {image.dtype}, not numbers that a network can take.")
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
    return np.moveaxis(image, channel_axis, 0)


def is_constant(image: Image) -> bool:
    """Whether there is nothing to see: no pixel, or one value throughout."""
    return bool(image.size == 0 or image.min() == image.max())
