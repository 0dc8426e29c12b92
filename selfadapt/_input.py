"""How an image goes into a network: scale, polarity, channels, normalisation. And the way there."""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Protocol, Self

import numpy as np
import torch
from torch import Tensor

from selfadapt._errors import ConfigError, ImageError
from selfadapt._normalize import Image, in_single, is_constant, to_gray

LEAST_SCALE = 0.01
"""Beyond it nothing is left of an image, or no memory holds it."""


@dataclass(frozen=True, kw_only=True)
class Input:
    """How images go in, the same for all adapters; it applies in the order of the fields' use.

    Args:
        channels: which channels of an image are taken, by index from 0; None for all of them.
        gray: whether colour, of three channels, becomes luminance.
        invert: whether dark objects are made bright.
        low: percentile of a channel of the whole image that becomes 0.
        high: percentile of a channel of the whole image that becomes 1.
        scale: pixels of the network per pixel of the image, from 0.01 to 100; 0.5 where objects
            are twice as large as those that the network knows.
        tta: whether flipped and turned copies go in, too, and the mean of all is taken (test-time
            augmentation): up to eight times the work.

    Raises:
        ConfigError: a value is out of range.

    >>> Input(scale=0.5).size(101, 60)
    (50, 30)
    """

    scale: float = 1.0
    tta: bool = False
    invert: bool = False
    channels: tuple[int, ...] | None = None
    gray: bool = False
    low: float = 1.0
    high: float = 99.0

    def __post_init__(self) -> None:
        number = isinstance(self.scale, int | float) and not isinstance(self.scale, bool)
        if not (number and LEAST_SCALE <= self.scale <= 1 / LEAST_SCALE):
            raise ConfigError(
                f"scale={self.scale!r} is not allowed: it must lie between {LEAST_SCALE} and "
                f"{1 / LEAST_SCALE:.0f}."
            )
        numbers = all(type(value) in (int, float) for value in (self.low, self.high))
        if not (numbers and 0 <= self.low < self.high <= 100):
            raise ConfigError(
                f"percentiles {self.low} and {self.high} are not allowed: they lie between 0 and "
                "100, the lower one first."
            )
        for name in ("invert", "gray", "tta"):
            if not isinstance(value := getattr(self, name), bool):
                raise ConfigError(
                    f"{name}={value!r} is not allowed: it must be True or False (gray='inverted' "
                    "of old is gray=True, invert=True)."
                )
        chosen = self.channels
        if chosen is not None and not (
            isinstance(chosen, tuple) and chosen and all(type(c) is int for c in chosen)
        ):
            raise ConfigError(
                f"channels={chosen!r} is not allowed: give indices such as (0, 2), or None."
            )

    def to_dict(self) -> dict[str, Any]:
        """For a file."""
        return asdict(self) | {"channels": self.channels and list(self.channels)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """From `to_dict`, once it was in a file.

        Raises:
            ConfigError: it is damaged, or of another version.
        """
        try:
            channels = data.get("channels")
            chosen = None if channels is None else tuple(channels)
            return cls(**{**data, "channels": chosen})
        except (AttributeError, TypeError) as error:
            raise ConfigError(f"{data} does not say how images go in: {error}.") from None

    def size(self, height: int, width: int) -> tuple[int, int]:
        """Height and width for the network of an image of that size."""
        return max(round(height * self.scale), 1), max(round(width * self.scale), 1)

    def select(self, image: Image) -> Image:
        """The channels of `[C, H, W]` that are taken."""
        if self.channels is not None:
            if not all(-len(image) <= c < len(image) for c in self.channels):
                raise ImageError(
                    f"channels {self.channels} were asked for, and the image has {len(image)}: "
                    "they count from 0."
                )
            image = image[list(self.channels)]
        return to_gray(image) if self.gray else image

    def apply(
        self,
        image: Image,
        whole: Image,
        normalise: Callable[[Image, Image], Image],
        rescale: Callable[[Image, tuple[int, int]], Image],
    ) -> Image:
        """Take channels and polarity of `[C, H, W]`, then normalise and rescale it.

        `whole` has the channels of the image that `image` is a part of, in any number of pixels.
        """
        image, whole = in_single(image, whole)
        part, whole = self.select(image), self.select(whole)
        if self.invert:
            whole = whole.astype(np.float32)
            top = whole.max((1, 2), keepdims=True)
            part, whole = top - part.astype(np.float32), top - whole
        normalised = normalise(part, whole)
        size = self.size(*image.shape[1:])
        return normalised if size == image.shape[1:] else rescale(normalised, size)


class Preparing(Protocol):
    """What `prepare` asks of an adapter."""

    channels: int | None
    auto: frozenset[str]

    def prepare(self, image: Image, whole: Image | None = None) -> Image: ...


def check_settled(adapter: Preparing) -> None:
    """Raise ConfigError where it is still to be found how images go in."""
    if adapter.auto:
        raise ConfigError(
            f"{' and '.join(sorted(adapter.auto))} must be found in the images first: take what "
            "selfadapt.calibrate(adapter, images) returns, or say it."
        )


def refuse_not_finite(image: Image, name: str) -> None:
    """Raise ImageError for NaN or infinity."""
    if not np.isfinite(image).all():
        raise ImageError(f"{name} contains NaN or infinity: replace them first.")


def check_image(image: Image, name: str) -> None:
    """Raise ImageError for NaN, infinity, or a single value throughout."""
    refuse_not_finite(image, name)
    if is_constant(image):
        raise ImageError(f"{name} is constant: there is nothing to see in it, leave it out.")


def prepare(adapter: Preparing, image: Image, name: str, whole: Image | None = None) -> Tensor:
    """The checked network input of one image `[C, H, W]`, as float32 `[C', H', W']`.

    Args:
        adapter: knows how images go into its network.
        image: an image, or a window of one.
        name: what error messages call it.
        whole: of a window, pixels `[C, h, w]` of the whole image, all or a sample of them: it is
            normalised as `segment` will normalise the whole image.

    Raises:
        ConfigError: the adapter's scale or polarity is "auto", and was not found yet.
        ImageError: the image is constant or not finite, or has another number of channels than
            the network takes.
    """
    check_settled(adapter)
    if image.ndim != 3:
        raise ImageError(
            f"{name} has shape {image.shape}, not [C, H, W]: give image[None] for one channel."
        )
    check_image(image, name)
    prepared = np.ascontiguousarray(adapter.prepare(image, whole), dtype=np.float32)
    refuse_not_finite(prepared, f"what becomes of {name} for the network")
    if adapter.channels is not None and prepared.shape[0] != adapter.channels:
        raise ImageError(
            f"{name} has {image.shape[0]} channel(s), prepared {prepared.shape[0]}, but the "
            f"network takes {adapter.channels}: "
            + (
                "give images with as many, as the network was trained on, and say channel_axis if "
                "an axis of an array holds them."
                if prepared.shape[0] < adapter.channels
                else "choose the channels, or the adapter's option that converts them (gray=True, "
                "shell: --gray true, where it has one)."
            )
        )
    return torch.from_numpy(prepared)
