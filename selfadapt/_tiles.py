"""Images of any size through a network that takes tiles."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from skimage.transform import resize
from torch import Tensor

from selfadapt._heads import OutputSpec

OVERLAP = 0.25
"""Least overlap of neighbouring tiles, as a share of their side."""


def predict_tiled(
    predict: Callable[[Tensor], Mapping[str, Tensor]],
    image: Tensor,
    spec: OutputSpec,
    *,
    tile: int,
    multiple: int,
    fixed: bool,
) -> dict[str, Tensor]:
    """Predict `[C, H, W]` tile by tile and blend the overlaps with smooth weights.

    Args:
        predict: network on `[1, C, h, w]`, giving raw outputs by head name.
        image: on the network's device.
        spec: heads, for their channels and grids.
        tile: largest side of a tile in pixels; an image that fits goes through in one piece.
        multiple: sides the network takes are multiples of this.
        fixed: the network takes `tile` x `tile` only.

    Returns:
        Raw float32 outputs by head, `[channels, ceil(H / grid), ceil(W / grid)]`, on the CPU.
    """
    height, width = image.shape[-2:]
    sides = [tile if fixed else min(tile, round_up(n, multiple)) for n in (height, width)]
    whole_cells = [round_up(n, g) for n, g in zip((height, width), spec.grid, strict=True)]
    padded = pad_far_side(image, [max(pair) for pair in zip(whole_cells, sides, strict=True)])
    starts = [
        list(_starts(size, side, step))
        for size, side, step in zip(padded.shape[-2:], sides, spec.grid, strict=True)
    ]
    sums: dict[str, Tensor] = {}
    weights: dict[str, Tensor] = {}
    for y in starts[0]:
        for x in starts[1]:
            outputs = predict(padded[None, :, y : y + sides[0], x : x + sides[1]])
            spec.check(outputs, (sides[0], sides[1]))
            for name, head in spec.items():
                part = outputs[name][0].float().cpu()
                weight = _window(part.shape[-2], part.shape[-1])
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


def pad_far_side(image: Tensor, sizes: Sequence[int]) -> Tensor:
    """Mirror `[C, H, W]` at its bottom and right edge until it has at least the given sizes."""
    missing = [max(size - have, 0) for size, have in zip(sizes, image.shape[-2:], strict=True)]
    if not any(missing):
        return image
    pixels = np.pad(
        image.cpu().numpy(), [(0, 0), (0, missing[0]), (0, missing[1])], mode="symmetric"
    )
    return torch.from_numpy(pixels).to(image.device)


def resize_labels(labels: NDArray[Any], size: tuple[int, int]) -> NDArray[np.int32]:
    """Instances `[H, W]` at another size, each pixel that of its nearest neighbour."""
    if labels.shape != size:
        labels = resize(labels, size, order=0, preserve_range=True, anti_aliasing=False)
    return labels.astype(np.int32)


def _starts(size: int, side: int, step: int) -> Iterator[int]:
    """Evenly spread tile corners on the output lattice; the last tile ends at the far side."""
    count = 1 if size == side else 1 + -(-(size - side) // int(side * (1 - OVERLAP)))
    for k in range(count):
        start = round(k * (size - side) / max(count - 1, 1))
        yield start // step * step


def _window(height: int, width: int) -> Tensor:
    """Blending weights, largest in the middle of a tile and never zero."""
    sides = [
        torch.signal.windows.general_hamming(n + 2)[1:-1].clamp(min=1e-3) for n in (height, width)
    ]
    return sides[0][:, None] * sides[1]
