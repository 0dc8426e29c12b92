"""A batch of crops: whether the network takes it, and how much of it at once."""

from collections.abc import Callable

import torch
from torch import Tensor

from selfadapt._adapter import Adapter
from selfadapt._errors import ImageError

CPU_PIXELS = 2**16
"""A CPU is fastest with about that many pixels of crops at once: with more, what is computed leaves
its caches, and 64 crops of 96 take 1.4 to 2 times as long (benchmarks/parts.py)."""


def checked(images: Tensor, adapter: Adapter, device: torch.device) -> Tensor:
    """The batch on the device, in single precision.

    Raises:
        ImageError: these are no crops `[B, C, S, S]` as the adapter's network takes them.
    """
    if not isinstance(images, Tensor) or images.is_complex() or images.is_sparse:
        raise ImageError(
            f"a batch that is a {type(images).__name__} was given: a dense tensor of real "
            "numbers [B, C, S, S] is needed."
        )
    if not images.is_floating_point():
        raise ImageError(
            f"a batch of {images.dtype} was given: crops of prepared images are floats "
            "(`prepare(adapter, image, name)` makes one of an image)."
        )
    if images.ndim != 4 or images.shape[2] != images.shape[3] or not images.shape[0]:
        raise ImageError(
            f"a batch of shape {list(images.shape)} was given: square crops [B, C, S, S] are "
            "needed, since quarter turns exchange height and width."
        )
    if adapter.channels not in (None, images.shape[1]):
        raise ImageError(
            f"the batch has {images.shape[1]} channels, the network takes {adapter.channels}."
        )
    side = images.shape[-1]
    if side % adapter.side_multiple or adapter.fixed_size not in (None, side):
        rule = adapter.fixed_size or f"a multiple of {adapter.side_multiple}"
        raise ImageError(f"crops of {side} pixels were given; the network takes {rule}.")
    return images.to(device, torch.float32, non_blocking=True)


def in_parts(forward: Callable[[Tensor], dict[str, Tensor]], images: Tensor) -> dict[str, Tensor]:
    """Outputs of `images`, with no more of them at once than suits the device."""
    most = max(1, CPU_PIXELS // images[0, 0].numel())
    if images.device.type != "cpu" or len(images) <= most:
        return forward(images)
    parts = [forward(part) for part in images.split(most)]
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
