"""Images of any size through a network that takes tiles."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import skimage
import torch
from numpy.typing import NDArray
from torch import Tensor

from selfadapt._spec import OutputSpec
from selfadapt._symmetry import Grid

OVERLAP = 0.25
"""Least overlap of neighbouring tiles, as a share of their side, where the multiples allow it."""
FAINT = 1e-6
"""Weight of what is near a tile's edge, where it sees too little of the image."""


def predict_tiled(
    predict: Callable[[Tensor], Mapping[str, Tensor]],
    image: Tensor,
    spec: OutputSpec,
    *,
    tile: int,
    multiples: Grid,
    fixed: bool,
    padding: Literal["symmetric", "reflect"] = "symmetric",
) -> dict[str, Tensor]:
    """Predict `[C, H, W]` tile by tile and blend the middle of the overlaps.

    The outer third of an overlap is left to the other tile. Where the network takes any size, the
    corners of tiles are multiples of what it takes: pooling sees the same pixels together as in
    the whole image.

    Args:
        predict: network on `[1, C, h, w]`, giving raw outputs by head name.
        image: on the network's device.
        spec: heads, for their channels and grids.
        tile: largest side of a tile in pixels; an image that fits goes through in one piece.
        multiples: height and width that the network takes are multiples of these.
        fixed: the network takes `tile` x `tile` only.
        padding: how the far side is padded, in words of `numpy.pad`.

    Returns:
        Raw float32 outputs by head, `[channels, ceil(H / grid), ceil(W / grid)]`, on the CPU.
    """
    height, width = image.shape[-2:]
    steps = spec.grid if fixed else multiples
    fits = [round_up(n, step) for n, step in zip((height, width), steps, strict=True)]
    largest = [tile if fixed else max(tile // step, 1) * step for step in steps]
    sides = largest if fixed else [min(pair) for pair in zip(largest, fits, strict=True)]
    padded = pad_far_side(image, [max(pair) for pair in zip(fits, sides, strict=True)], padding)
    starts = [
        list(_starts(size, side, step))
        for size, side, step in zip(padded.shape[-2:], sides, steps, strict=True)
    ]
    sums: dict[str, Tensor] = {}
    weights: dict[str, Tensor] = {}
    for y in starts[0]:
        for x in starts[1]:
            outputs = predict(padded[None, :, y : y + sides[0], x : x + sides[1]])
            spec.check(outputs, (sides[0], sides[1]))
            for name, head in spec.items():
                part = outputs[name][0].float().cpu()
                down, right = (
                    _ramp(n, inner_start=at > 0, inner_end=at + side < whole)
                    for n, at, side, whole in zip(
                        part.shape[-2:], (y, x), sides, padded.shape[-2:], strict=True
                    )
                )
                weight = down[:, None] * right
                rows, columns = (n // g for n, g in zip(padded.shape[-2:], head.grid, strict=True))
                total = sums.setdefault(name, torch.zeros(len(part), rows, columns))
                norm = weights.setdefault(name, torch.zeros(rows, columns))
                top, left = y // head.grid[0], x // head.grid[1]
                window = np.s_[..., top : top + part.shape[-2], left : left + part.shape[-1]]
                total[window] += part * weight
                norm[window] += weight
    return {
        name: (sums[name] / weights[name])[
            :, : -(-height // head.grid[0]), : -(-width // head.grid[1])
        ]
        for name, head in spec.items()
    }


def round_up(size: int, multiple: int) -> int:
    """The smallest multiple that is at least `size`."""
    return -(-size // multiple) * multiple


def pad_far_side(
    image: Tensor, sizes: Sequence[int], mode: Literal["symmetric", "reflect"] = "symmetric"
) -> Tensor:
    """Mirror `[C, H, W]` at its bottom and right edge until it has at least the given sizes."""
    missing = [max(size - have, 0) for size, have in zip(sizes, image.shape[-2:], strict=True)]
    if not any(missing):
        return image
    pixels = np.pad(image.cpu().numpy(), [(0, 0), (0, missing[0]), (0, missing[1])], mode=mode)
    return torch.from_numpy(pixels).to(image.device)


def resize_labels(labels: NDArray[Any], size: tuple[int, int]) -> NDArray[np.int32]:
    """Instances `[H, W]` at another size, each pixel that of its nearest neighbour."""
    if labels.shape != size:
        labels = skimage.transform.resize(
            labels, size, order=0, preserve_range=True, anti_aliasing=False
        )
    return labels.astype(np.int32)


def _starts(size: int, side: int, step: int) -> Iterator[int]:
    """Tile corners, multiples of `step`; the last tile ends at the far side."""
    stride = max(int(side * (1 - OVERLAP)) // step, 1) * step
    yield from range(0, size - side, stride)
    yield size - side


def _ramp(size: int, *, inner_start: bool, inner_end: bool) -> Tensor:
    """Weights along one side of a tile, rising over the middle third of the least overlap.

    They fall, but never to zero, towards edges that lie inside of the image.
    """
    place = torch.arange(size)
    to_edge = torch.full((size,), torch.inf)
    if inner_start:
        to_edge = torch.minimum(to_edge, place)
    if inner_end:
        to_edge = torch.minimum(to_edge, place.flip(0))
    third = max(size * OVERLAP / 3, 1.0)
    return (to_edge / third - 1).clamp(FAINT, 1)
