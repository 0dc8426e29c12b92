"""What a network says about one image: outputs, bottleneck embedding, instances."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, Protocol, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from selfadapt._errors import ModelError, OutputError, SelfAdaptError, first_line
from selfadapt._input import Input
from selfadapt._network import seeded
from selfadapt._spec import OutputSpec
from selfadapt._tiles import resize_labels
from selfadapt._views import mean_outputs

Labels = NDArray[np.int32]
Told = TypeVar("Told")


class Predicting(Protocol):
    """What `predict` asks of an adapter."""

    outputs: OutputSpec
    size_multiple: int | tuple[int, int]

    @property
    def padding(self) -> Literal["symmetric", "reflect"]: ...

    @property
    def can_decode(self) -> bool: ...

    @property
    def input(self) -> Input: ...

    def forward(self, model: nn.Module, images: Tensor) -> dict[str, Tensor]: ...

    def forward_tiled(self, model: nn.Module, image: Tensor) -> dict[str, Tensor]: ...

    def embedding_module(self, model: nn.Module) -> nn.Module | None: ...

    def decode(self, outputs: Mapping[str, Tensor], size: tuple[int, int]) -> Labels: ...


@dataclass(frozen=True)
class Prediction:
    """One image's prediction, on the CPU.

    Args:
        outputs: raw outputs by head, float32 `[channels, H / grid, W / grid]`.
        embedding: mean of the bottleneck over all positions, `[D]`, not normalised; None where
            the adapter names no bottleneck.
        instances: int32 `[H, W]`, 0 is background; None where the adapter cannot decode.
    """

    outputs: Mapping[str, Tensor]
    embedding: Tensor | None
    instances: Labels | None


@torch.no_grad()
def predict(
    adapter: Predicting, model: nn.Module, image: Tensor, size: tuple[int, int] | None = None
) -> Prediction:
    """Run `model` in eval mode on one prepared image `[C, H, W]` of any size.

    `model` is one of the adapter's networks (initial, student or teacher); its training mode is
    restored afterwards. `size` is that of the instances: height and width of the image before it
    was prepared; by default those of `image`.
    """
    image = image.to(next(model.parameters()).device)
    with evaluating(model), _watched(_bottleneck(adapter, model), _pool) as pooled:
        outputs = raw_outputs(adapter, model, image)
    embedding = torch.cat(pooled).mean(0) if pooled else None
    if not adapter.can_decode:
        return Prediction(outputs, embedding, None)
    size = size or (image.shape[1], image.shape[2])
    return Prediction(outputs, embedding, decoded(adapter, outputs, size))


def decoded(adapter: Predicting, outputs: Mapping[str, Tensor], size: tuple[int, int]) -> Labels:
    """Instances `[H, W]`; none where an output is not finite, which no `decode` need expect.

    Raises:
        OutputError: `decode` fails, or gives something else.
    """
    if not all(bool(output.isfinite().all()) for output in outputs.values()):
        return np.zeros(size, np.int32)
    try:
        labels = adapter.decode(outputs, size)
    except SelfAdaptError:
        raise
    except Exception as error:  # of the adapter's own code
        raise OutputError(
            f"`decode` of {type(adapter).__name__} fails: {type(error).__name__}: "
            f"{first_line(error)}"
        ) from error
    if not isinstance(labels, np.ndarray) or labels.ndim != 2 or labels.dtype.kind not in "iu":
        given = f"{labels.dtype} {list(labels.shape)}" if isinstance(labels, np.ndarray) else "none"
        raise OutputError(
            f"`decode` of {type(adapter).__name__} gives a {type(labels).__name__} ({given}): an "
            "array of integers [H, W] is needed."
        )
    return resize_labels(labels, size)


def raw_outputs(adapter: Predicting, model: nn.Module, image: Tensor) -> dict[str, Tensor]:
    """Outputs of one prepared image in the network's own terms; as `Input.tta` says, their mean.

    Raises:
        OutputError: the network fails on it, or its outputs are not those of the heads.
    """
    try:
        if not adapter.input.tta:
            return adapter.forward_tiled(model, image)
        return mean_outputs(
            lambda copy: adapter.forward_tiled(model, copy), image, adapter.outputs, adapter.padding
        )
    except SelfAdaptError:
        raise
    except Exception as error:  # of the network's own code, or of torch within it
        channels, height, width = image.shape
        raise OutputError(
            f"the network fails on an image of {channels} channel(s), {height} x {width}, padded "
            f"to multiples of size_multiple={adapter.size_multiple}: {first_line(error)}"
        ) from error


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode inside, every layer's own mode afterwards.

    Layers that draw at random all the same (dropout that is kept alive) draw from a seed of their
    own: looks can be compared, and the caller's random state is untouched.
    """
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with seeded(0, next(model.parameters()).device):
            yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def _bottleneck(adapter: Predicting, model: nn.Module) -> nn.Module | None:
    try:
        module = adapter.embedding_module(model)
    except AttributeError as error:
        raise ModelError(
            f"`embedding_module` of {type(adapter).__name__} fails: {first_line(error)}. Let it "
            "return one of the network's layers, or None."
        ) from error
    if module is not None and not isinstance(module, nn.Module):
        raise ModelError(
            f"`embedding_module` of {type(adapter).__name__} gives a {type(module).__name__}: let "
            "it return one of the network's layers, or None."
        )
    return module


@contextmanager
def _watched(module: nn.Module | None, told: Callable[[Any], Told]) -> Iterator[list[Told]]:
    """Collect what `told` says of the output of `module`, per call of it; nothing of no module."""
    found: list[Told] = []
    if module is None:
        yield found
        return
    handle = module.register_forward_hook(lambda _, __, output: found.append(told(output)))
    try:
        yield found
    finally:
        handle.remove()


def learns_before_bottleneck(adapter: Predicting, model: nn.Module, images: Tensor) -> bool:
    """Whether anything that adapts lies before the bottleneck: else it stays as it is."""

    def learns(output: Any) -> bool:
        return bool(_last_map(output).requires_grad)

    with _watched(_bottleneck(adapter, model), learns) as found:
        adapter.forward(model.eval(), images.clone())  # some work in place
    return any(found)


def _last_map(output: Any) -> Any:
    """What a layer gives; encoders with a list of feature maps give their bottleneck last."""
    while isinstance(output, list | tuple):
        output = output[-1]
    return output


def _pool(output: Any) -> Tensor:
    """Mean over positions of a map `[B, D, H, W]`, of tokens `[B, N, D]` or of `[B, D]`."""
    output = _last_map(output)
    if not isinstance(output, Tensor) or output.ndim not in (2, 3, 4):
        raise OutputError(
            "the embedding module gives no feature map [B, D, H, W], tokens [B, N, D] or vector "
            "[B, D]: let `embedding_module` return another layer."
        )
    axes: dict[int, tuple[int, ...]] = {2: (), 3: (1,), 4: (2, 3)}
    flat = output.detach().float()
    return (flat.mean(axes[output.ndim]) if axes[output.ndim] else flat).cpu()
