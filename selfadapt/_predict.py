"""What a network says about one image: outputs, bottleneck embedding, instances."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

if TYPE_CHECKING:
    from selfadapt._adapter import Adapter

from selfadapt._errors import OutputError
from selfadapt._symmetry import Symmetry
from selfadapt._tiles import resize_labels

COPIED_SIDE = 256
"""Largest side of the middle of an image of which flipped and turned copies are made."""


@dataclass(frozen=True)
class Prediction:
    """One image's prediction, on the CPU.

    Args:
        outputs: raw outputs by head, float32 `[channels, H / grid, W / grid]`.
        embedding: mean of the bottleneck over all positions, `[D]`, not normalised; None where
            the adapter names no bottleneck.
        instances: int32 `[H, W]` at the scale of `decode`, 0 is background; None where the adapter
            cannot decode.
        copies: pairs of instances: those of the middle of the image, and those found in a flipped
            or turned copy of it, mapped back.
    """

    outputs: Mapping[str, Tensor]
    embedding: Tensor | None
    instances: NDArray[np.int32] | None
    copies: Sequence[tuple[NDArray[np.int32], NDArray[np.int32]]] = ()


@torch.no_grad()
def predict(
    adapter: "Adapter", model: nn.Module, image: Tensor, symmetries: Sequence[Symmetry] = ()
) -> Prediction:
    """Run `model` in eval mode on one prepared image `[C, H, W]` of any size.

    `model` is one of the adapter's networks (initial, student or teacher); its training mode is
    restored afterwards. `symmetries` say which `Prediction.copies` are made.
    """
    image = image.to(next(model.parameters()).device)
    with evaluating(model), _pooled_bottlenecks(adapter.embedding_module(model)) as pooled:
        outputs = adapter.forward_tiled(model, image)
    embedding = torch.cat(pooled).mean(0) if pooled else None
    if not adapter.can_decode:
        return Prediction(outputs, embedding, None)
    instances = adapter.decode(outputs)
    copies = _copies(adapter, model, image, instances, symmetries) if symmetries else ()
    return Prediction(outputs, embedding, instances, copies)


def _copies(
    adapter: "Adapter",
    model: nn.Module,
    image: Tensor,
    instances: NDArray[np.int32],
    symmetries: Sequence[Symmetry],
) -> list[tuple[NDArray[np.int32], NDArray[np.int32]]]:
    """See `Prediction.copies`; only the middle, since every copy is decoded, which takes time."""
    middle = centre_crop(image, COPIED_SIDE).contiguous()
    with evaluating(model):
        if middle.shape != image.shape:
            instances = adapter.decode(adapter.forward_tiled(model, middle))
        height, width = instances.shape
        copies = []
        for g in symmetries:
            found = adapter.decode(adapter.forward_tiled(model, g.move(middle).contiguous()))
            back = g.inverse.move(torch.from_numpy(found)).contiguous().numpy()
            copies.append((instances, resize_labels(back, (height, width))))
    return copies


def centre_crop(image: Tensor, side: int) -> Tensor:
    """At most `side` x `side` pixels from the middle of `[C, H, W]`."""
    top, left = (max(size - side, 0) // 2 for size in image.shape[-2:])
    return image[:, top : top + side, left : left + side]


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode inside, every layer's own mode afterwards."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


@contextmanager
def _pooled_bottlenecks(module: nn.Module | None) -> Iterator[list[Tensor]]:
    """Collect the output of `module`, averaged over positions, `[B, D]` per call of it."""
    pooled: list[Tensor] = []
    if module is None:
        yield pooled
        return
    handle = module.register_forward_hook(lambda _, __, output: pooled.append(_pool(output)))
    try:
        yield pooled
    finally:
        handle.remove()


def _pool(output: Any) -> Tensor:
    """Mean over positions of a map `[B, D, H, W]`, of tokens `[B, N, D]` or of `[B, D]`.

    Encoders that return a list of feature maps give their bottleneck last.
    """
    while isinstance(output, list | tuple):
        output = output[-1]
    if not isinstance(output, Tensor) or output.ndim not in (2, 3, 4):
        raise OutputError(
            "the embedding module gives no feature map [B, D, H, W], tokens [B, N, D] or vector "
            "[B, D]: let `embedding_module` return another layer."
        )
    axes: dict[int, tuple[int, ...]] = {2: (), 3: (1,), 4: (2, 3)}
    flat = output.detach().float()
    return (flat.mean(axes[output.ndim]) if axes[output.ndim] else flat).cpu()
