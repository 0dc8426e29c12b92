"""From an image as it was read to what the network takes."""

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from selfadapt._errors import ImageError
from selfadapt._normalize import Image, is_constant

if TYPE_CHECKING:
    from selfadapt._adapter import Adapter


def check_image(image: Image, name: str) -> None:
    """Raise ImageError for NaN, infinity, or a single value throughout."""
    if not np.isfinite(image).all():
        raise ImageError(f"{name} contains NaN or infinity: replace them before adapting.")
    if is_constant(image):
        raise ImageError(f"{name} is constant: there is nothing to see in it, leave it out.")


def prepare(adapter: "Adapter", image: Image, name: str) -> Tensor:
    """The checked network input of one image `[C, H, W]`, as float32 `[C', H', W']`.

    Raises:
        ImageError: the image is constant or not finite, or has another number of channels than
            the network takes. `name` is named in the message.
    """
    if image.ndim != 3:
        raise ImageError(
            f"{name} has shape {image.shape}, not [C, H, W]: give image[None] for one channel."
        )
    check_image(image, name)
    prepared = np.ascontiguousarray(adapter.prepare(image), dtype=np.float32)
    if adapter.channels is not None and prepared.shape[0] != adapter.channels:
        raise ImageError(
            f"{name} has {image.shape[0]} channel(s), prepared {prepared.shape[0]}, but the "
            f"network takes {adapter.channels}: choose the channels, or the adapter's option "
            "that converts them (gray='yes' or 'inverted', shell: --gray, where it has one)."
        )
    return torch.from_numpy(prepared)
