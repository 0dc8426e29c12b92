"""Options of the adapter, checked before any work."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
from cellpose import transforms

from selfadapt import ConfigError, ImageError


def check_options(
    diameter: float | Literal["auto"] | None,
    channels: Sequence[int] | None,
    flow_threshold: float,
    cellprob_threshold: float,
    min_size: int,
) -> None:
    if diameter not in (None, "auto") and not (
        isinstance(diameter, int | float) and math.isfinite(diameter) and diameter > 0
    ):
        raise ConfigError(
            f"diameter={diameter!r} is not allowed: give the diameter of the cells in pixels, "
            'above 0, "auto", or leave it out for the model\'s own.'
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


def check_tiles(
    niter: int | None,
    tile_overlap: float,
    bsize: int | None,
    max_size_fraction: float,
    *,
    fixed: int | None,
) -> None:
    if niter is not None and not (type(niter) is int and niter > 0):
        raise ConfigError(f"niter={niter!r} is not allowed: give iterations, 1 or more.")
    if not 0.05 <= tile_overlap <= 0.5:  # beyond, Cellpose takes these
        raise ConfigError(f"tile_overlap={tile_overlap} is not allowed: it must be 0.05 to 0.5.")
    if bsize is not None and (
        type(bsize) is not int or bsize % 16 or bsize < 16 or fixed not in (None, bsize)
    ):
        rule = f"{fixed}, which the network takes alone" if fixed else "a multiple of 16"
        raise ConfigError(f"bsize={bsize!r} is not allowed: it must be {rule}.")
    if not 0 < max_size_fraction <= 1:
        raise ConfigError(
            f"max_size_fraction={max_size_fraction} is not allowed: it must be above 0, and at "
            "most 1."
        )


def check_normalization(parameters: Mapping[str, Any], channels: int) -> None:
    """Try them on so many channels, as Cellpose checks them only when it normalises."""
    pixels = np.arange(16 * channels, dtype=np.float32).reshape(4, 4, channels)
    try:
        transforms.normalize_img(pixels, **parameters)
    except (TypeError, ValueError) as error:
        raise ConfigError(
            f"normalize and invert as {dict(parameters)} are not allowed by Cellpose: {error}."
        ) from None


def check_channels(count: int, choice: Sequence[int] | None, taken: int | None) -> None:
    """Raise ImageError unless an image of `count` channels goes with the options.

    `taken` is what the network takes; None for a network of version 4, which takes up to three.
    """
    most = taken or 3
    if choice is None and count > most:
        remedy = (
            "give channels, e.g. (0, 0) for gray or (2, 3) for green cells, blue nuclei "
            "(shell: --channels '[0,0]')"
        )
        if taken is None:
            remedy = "choose some of them"
        raise ImageError(f"the image has {count} channels, and the network takes {most}: {remedy}.")
    if choice is None and taken is not None and count not in (1, most):
        raise ImageError(
            f"the image has {count} channels, and the network takes {most}: give images of "
            "one or of that many channels."
        )
    if choice is not None and not max(choice) <= count <= 5:
        raise ImageError(
            f"channels={tuple(choice)} does not fit an image with {count} channel(s): gray "
            "images need no channels, and Cellpose takes up to 5."
        )


def evaluation(normalization: Mapping[str, Any], **told: tuple[Any, Any]) -> str:
    """What `eval` must be told, where an option (its first value) is not the default (second)."""
    usual: dict[str, Any] = {"normalize": True, "invert": False}
    changed = {k: v for k, v in normalization.items() if usual.get(k, ...) != v}
    by_dictionary = not changed.keys() <= usual.keys()  # then eval takes both from it
    told |= {
        "normalize": (changed if by_dictionary else normalization["normalize"], True),
        "invert": (not by_dictionary and normalization["invert"], False),
    }
    order = ["channels", "diameter", "normalize", "invert"]
    names = [*order, *(name for name in told if name not in order)]
    options = [f", {name}={told[name][0]!r}" for name in names if told[name][0] != told[name][1]]
    return f".eval(image{''.join(options)})" if options else ""
