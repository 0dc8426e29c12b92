"""Images as Cellpose takes and normalises them, and parts by what is known of the whole."""

import logging
import math
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import numpy as np
from cellpose import transforms
from numpy.typing import NDArray

from selfadapt import ImageError, in_single
from selfadapt_cellpose._options import check_channels

logger = logging.getLogger(__name__)

LOCAL = ("lowhigh", "sharpen_radius", "smooth_radius", "tile_norm_blocksize")
"""With any of these a pixel depends on its surroundings, or on nothing: parts go by themselves."""

LEAST_SIDE = 16
"""Cellpose takes axes that are shorter for channels or depth."""


def check_size(image: NDArray[Any], scale: float, diameter: float | None) -> None:
    """Raise ImageError where nothing is left of `[C, H, W]` at that scale."""
    if min(image.shape[1:]) * scale < 1:
        raise ImageError(
            f"an image of {image.shape[1]} x {image.shape[2]} pixels is too small for cells of "
            f"{diameter} pixels: give their diameter in these images."
        )


def single(
    image: NDArray[Any], whole: NDArray[Any], parameters: Mapping[str, Any]
) -> tuple[NDArray[Any], NDArray[Any]]:
    """As Cellpose itself where values are taken as they are: shifted, they were others."""
    if parameters["normalize"] and parameters.get("lowhigh") is None:
        return in_single(image, whole)
    return image, whole


def for_cellpose(
    image: NDArray[Any], choice: Sequence[int] | None, taken: int | None
) -> tuple[NDArray[np.float32], dict[str, Any]]:
    """A copy of `[C, H, W]` as Cellpose takes it, and which channels of it to take."""
    count = len(image)
    check_channels(count, choice, taken)
    options: dict[str, Any] = {"channel_axis": None if count == 1 else 0}
    if taken is not None:
        options |= {"channels": choice, "nchan": taken}
    # a copy: Cellpose normalises float32 in place
    return (image[0] if count == 1 else image).astype(np.float32), options


def normalize(
    image: NDArray[Any],
    whole: NDArray[Any] | None,
    parameters: Mapping[str, Any],
    *,
    choice: Sequence[int] | None,
    taken: int | None,
) -> NDArray[np.float32]:
    """The channels `[H, W, C]` that the network takes of `[C, H, W]`, normalised as in `eval`.

    `whole` is a sample of the image that this is a part of; `choice` and `taken` are the channels
    that were chosen, and how many the network takes.
    """
    image, sampled = single(image, image if whole is None else whole, parameters)
    pixels, options = for_cellpose(image, choice, taken)
    converted: NDArray[np.float32] = transforms.convert_image(pixels, **options)
    if not parameters["normalize"]:
        return converted
    if whole is None:
        normalised: NDArray[np.float32] = transforms.normalize_img(converted[None], **parameters)[0]
        return normalised
    pixels, options = for_cellpose(squared(sampled), choice, taken)
    return normalize_part(converted, transforms.convert_image(pixels, **options), parameters)


def normalize_part(
    part: NDArray[np.float32], whole: NDArray[np.float32], parameters: Mapping[str, Any]
) -> NDArray[np.float32]:
    """`transforms.normalize_img` of `[H, W, C]` with the percentiles of `whole`, `[h, w, C]`."""
    local = [name for name in LOCAL if np.any(parameters.get(name) or 0)]
    if local:
        if local != ["lowhigh"]:
            _warn(", ".join(local))
        normalised: NDArray[np.float32] = transforms.normalize_img(part[None], **parameters)[0]
        return normalised
    percentiles = parameters.get("percentile") or (1.0, 99.0)
    low, high = np.percentile(whole, percentiles, axis=(0, 1))
    flat = high - low <= 1e-3  # these become 0, as in `normalize99`
    scaled = np.where(flat, 0, (part - low) / np.where(flat, 1, high - low))
    if parameters["invert"]:
        scaled = 1 - scaled
    empty = np.ptp(whole, axis=(0, 1)) == 0  # these stay as they are
    return np.where(empty, part, scaled).astype(np.float32)


@cache
def _warn(options: str) -> None:
    logger.warning(
        "With %s, windows of large images are normalised by themselves, not as `eval` normalises "
        "the whole: adapt to smaller images, or without.",
        options,
    )


def squared(sample: NDArray[Any]) -> NDArray[Any]:
    """Pixels `[C, 1, N]` in another shape: of a thin image, Cellpose takes the wrong axis."""
    if min(sample.shape[1:]) >= LEAST_SIDE:
        return sample
    flat = sample.reshape(len(sample), -1)
    side = max(math.isqrt(flat.shape[1]), LEAST_SIDE)
    return np.stack([np.resize(channel, (side, side)) for channel in flat])
