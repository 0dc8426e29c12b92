"""Steps of bioimage.io before and after a network, found by what they compute."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import scipy
import torch
from torch import Tensor

from selfadapt._adapter import Adapter
from selfadapt._errors import ModelError
from selfadapt._heads import Head
from selfadapt._normalize import Image
from selfadapt._traced import near

EPS = 1e-6
"""bioimageio.core adds it to what it divides by."""


class Step(NamedTuple):
    """One step in the words of the format, and what it computes of `[C, H, W]`."""

    words: dict[str, Any]
    apply: Callable[[Image], Image]


def preprocessing(adapter: Adapter, image: Image) -> list[dict[str, Any]]:
    """The steps by which an image `[C, H, W]` goes in as the adapter prepares it.

    They are tried on the image and on one with other values in each channel.

    Raises:
        ModelError: none do.
    """
    for steps in _ways_in(adapter.input.low, adapter.input.high, adapter.input.invert):
        if all(_same(steps, each, adapter.prepare(each)) for each in (image, others_of(image))):
            return [step.words for step in steps]
    raise ModelError(
        f"images go into {type(adapter).__name__} in a way that bioimage.io has no steps for: it "
        "has percentiles, standardisation (inverted, too) and values as they are, and rounds where "
        "the values of an image span less than 0.01."
    )


def others_of(image: Image) -> Image:
    """The same to see as in `[C, H, W]`, in values that differ by channel."""
    channel = np.arange(len(image), dtype=np.float32)[:, None, None]
    return np.asarray((channel + 2) * image + 7 * (channel + 1))


def postprocessing(name: str, head: Head, raw: Tensor) -> list[dict[str, Any]]:
    """The step that makes of raw output `[C, H, W]` the values of a head.

    Raises:
        ModelError: none does.
    """
    ways: tuple[list[Step], ...] = (
        [],
        [Step({"id": "sigmoid"}, scipy.special.expit)],
        [
            Step(
                {"id": "softmax", "kwargs": {"axis": "channel"}},
                lambda x: scipy.special.softmax(x, axis=0),
            )
        ],
    )
    for steps in ways:
        if _same(steps, raw.numpy(), head.values(raw).numpy()):
            return [step.words for step in steps]
    raise ModelError(
        f"head {name!r} ({type(head).__name__}) means something that bioimage.io has no step for: "
        "it has sigmoid, softmax and values as they are."
    )


def _same(steps: Sequence[Step], given: Image, wanted: Image) -> bool:
    for step in steps:
        given = step.apply(given)
    return near(torch.from_numpy(np.asarray(given, np.float32)), torch.from_numpy(wanted))


def _ways_in(low: float, high: float, invert: bool) -> list[list[Step]]:
    if invert:  # percentiles of a negative change places; statistics are of what is given
        low, high = 100 - high, 100 - low
    ways: list[list[Step]] = [] if invert else [[]]
    for names, axes in ((["y", "x"], (1, 2)), (["channel", "y", "x"], (0, 1, 2))):
        scale_range, standardise = _scale_range(names, axes, low, high), _standardise(names, axes)
        ways.append([scale_range, *[_negative(1.0)] * invert])
        ways.append([standardise, *[_negative(0.0)] * invert])
    return ways


def _scale_range(names: list[str], axes: tuple[int, ...], low: float, high: float) -> Step:
    def apply(image: Image) -> Image:
        bottom, top = np.percentile(image, (low, high), axis=axes, keepdims=True)
        return np.asarray((image - bottom) / (top - bottom + EPS))

    kwargs = {"axes": names, "min_percentile": low, "max_percentile": high}
    return Step({"id": "scale_range", "kwargs": kwargs}, apply)


def _standardise(names: list[str], axes: tuple[int, ...]) -> Step:
    def apply(image: Image) -> Image:
        centred = image - image.mean(axes, keepdims=True)
        return np.asarray(centred / (image.std(axes, keepdims=True) + EPS))

    return Step({"id": "zero_mean_unit_variance", "kwargs": {"axes": names}}, apply)


def _negative(top: float) -> Step:
    kwargs = {"gain": -1.0, "offset": top}
    return Step({"id": "scale_linear", "kwargs": kwargs}, lambda image: top - image)
