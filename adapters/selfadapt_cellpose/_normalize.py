"""Cellpose's normalisation of a part of an image, by what is known of the whole."""

import logging
import math
from collections.abc import Mapping
from functools import cache
from typing import Any

import numpy as np
from cellpose import transforms
from numpy.typing import NDArray

logger = logging.getLogger(__name__)

LOCAL = ("lowhigh", "sharpen_radius", "smooth_radius", "tile_norm_blocksize")
"""With any of these a pixel depends on its surroundings, or on nothing: parts go by themselves."""

LEAST_SIDE = 16
"""Cellpose takes axes that are shorter for channels or depth."""


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
