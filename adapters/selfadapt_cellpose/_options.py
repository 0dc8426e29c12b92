"""Options of the adapter, checked before any work."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from cellpose import transforms

from selfadapt import ConfigError


def check_options(
    diameter: float | None,
    channels: Sequence[int] | None,
    flow_threshold: float,
    cellprob_threshold: float,
    min_size: int,
) -> None:
    if diameter is not None and not (math.isfinite(diameter) and diameter > 0):
        raise ConfigError(
            f"diameter={diameter} is not allowed: give the diameter of the cells in pixels, above "
            "0, or leave it out for the model's own."
        )
    if channels is not None and (
        len(channels) != 2 or not all(isinstance(c, int) and c >= 0 for c in channels)
    ):
        raise ConfigError(
            f"channels={channels!r} is not allowed: give two numbers, the channel to segment and "
            "that of the nuclei (0 gray or none, 1 red, 2 green, 3 blue), e.g. (0, 0) or (2, 3)."
        )
    if not (math.isfinite(flow_threshold) and flow_threshold >= 0):
        raise ConfigError(f"flow_threshold={flow_threshold} is not allowed: it must be 0 or more.")
    if not math.isfinite(cellprob_threshold):
        raise ConfigError(
            f"cellprob_threshold={cellprob_threshold} is not allowed: it must be a finite number."
        )
    if min_size < -1:
        raise ConfigError(f"min_size={min_size} is not allowed: it must be 0 or more.")


def check_normalization(parameters: Mapping[str, Any]) -> None:
    """Try them, as Cellpose checks them only when it normalises."""
    try:
        transforms.normalize_img(np.arange(48, dtype=np.float32).reshape(4, 4, 3), **parameters)
    except (TypeError, ValueError) as error:
        raise ConfigError(
            f"normalize and invert as {dict(parameters)} are not allowed by Cellpose: {error}."
        ) from None
