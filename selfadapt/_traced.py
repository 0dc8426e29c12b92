"""A network and its adapter's `forward` as one TorchScript module, which needs neither of them."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from selfadapt._adapter import Adapter
from selfadapt._errors import ModelError, first_line
from selfadapt._symmetry import Grid

NEAR = 1e-4
"""Outputs that differ by less, as a share of the largest one, are the same."""


class _Heads(nn.Module):
    """Gives the heads of an adapter in their order; of a single one the tensor itself."""

    def __init__(self, adapter: Adapter) -> None:
        super().__init__()
        self.network = adapter.model
        self._adapter = adapter

    def forward(self, images: Tensor) -> Any:
        outputs = self._adapter.forward(self.network, images.clone())  # some work in place
        heads = tuple(outputs[name] for name in self._adapter.outputs)
        return heads if len(heads) > 1 else heads[0]


@torch.no_grad()
def trace(adapter: Adapter, image: Tensor) -> tuple[torch.jit.ScriptModule, Grid]:
    """The network in TorchScript, `[B, C, H, W]` to one tensor for each head, and its least size.

    It was traced, and then compared with the network at several sizes and numbers of images.

    Args:
        adapter: around a network in eval mode, in float32 on the CPU.
        image: a prepared image `[C, H, W]`, of a size that the network takes.

    Raises:
        ModelError: it cannot be traced, or what was traced is another network at other sizes.
    """
    heads = _Heads(adapter).eval()
    wanted = _run(heads, image)
    try:
        with torchscript_quiet():
            traced = torch.jit.trace(heads, image[None], check_trace=False)
    except Exception as error:
        raise ModelError(
            f"the network cannot be written as TorchScript ({_last_line(error)}): its `forward` "
            "must be made of torch's functions, and give tensors."
        ) from None
    tiled = adapter.forward_tiled(adapter.model, image)
    if not all(near(a[0], tiled[name]) for name, a in zip(adapter.outputs, wanted, strict=True)):
        raise ModelError(
            f"{type(adapter).__name__}.forward_tiled gives other outputs than one pass of "
            "`forward` over the image, which is all that a package has."
        )
    least = _least(heads, adapter, image)
    sizes = [least]
    if adapter.fixed_size is None:
        (height, width), (rows, columns) = image.shape[1:], adapter.multiples
        sizes.append((height + rows, width + 2 * columns))
    for size in sizes:
        some = _repeated(image, size)
        batch = torch.stack([some, 2 * some.flip(-1)])
        wanted = tuple(map(torch.cat, zip(*(_run(heads, each) for each in batch), strict=True)))
        try:
            same = all(map(near, _as_tuple(traced(batch)), wanted))
        except RuntimeError:  # a size that became a constant
            same = False
        if not same:
            raise ModelError(
                f"the network in TorchScript gives other outputs for images of {list(some.shape)}: "
                "its `forward` computes with numbers that it takes from the image or its size, "
                "which tracing makes constants. Say that in torch's functions; give fixed_size, if "
                "it takes images of one size."
            )
    return traced, least


def _run(heads: nn.Module, image: Tensor) -> tuple[Tensor, ...]:
    try:
        return _as_tuple(heads(image[None]))
    except Exception as error:  # of the network's own code, or of torch within it
        raise ModelError(
            f"the network cannot be run on an image of {list(image.shape)} ({_last_line(error)}): "
            "channels, size_multiple and fixed_size say what it takes."
        ) from None


def near(one: Tensor, other: Tensor) -> bool:
    """Whether two outputs are the same, but for rounding."""
    return one.shape == other.shape and bool(
        ((one - other).abs() <= NEAR * other.abs().max().clamp(min=1e-6)).all()
    )


def _least(heads: nn.Module, adapter: Adapter, image: Tensor) -> Grid:
    """The smallest size that the network takes; some need more than one multiple."""
    if adapter.fixed_size is not None:
        return adapter.fixed_size, adapter.fixed_size
    rows, columns = adapter.multiples
    sides = [2**k for k in range(16) if 2**k <= max(adapter.tile // max(rows, columns), 1)]
    for k in sides:
        with suppress(ModelError):
            outputs = _run(heads, _repeated(image, (rows * k, columns * k)))
            if all(bool(output.isfinite().all()) for output in outputs):
                return rows * k, columns * k
    raise ModelError(
        f"the network takes no image of up to {adapter.tile} pixels: channels, size_multiple and "
        "fixed_size say what it takes."
    )


def _repeated(image: Tensor, size: Grid) -> Tensor:
    """`[C, H, W]` cut, or repeated, to another size."""
    times = [-(-want // have) for want, have in zip(size, image.shape[1:], strict=True)]
    return image.repeat(1, *times)[:, : size[0], : size[1]]


def _as_tuple(outputs: Any) -> tuple[Tensor, ...]:
    return outputs if isinstance(outputs, tuple) else (outputs,)


def _last_line(error: Exception) -> str:
    """Of an error of torch, whose TorchScript puts a traceback before it."""
    return (str(error).strip() or first_line(error)).splitlines()[-1].strip()


@contextmanager
def torchscript_quiet() -> Iterator[None]:
    """Torch deprecates TorchScript, and warns of what `trace` compares anyway."""
    with warnings.catch_warnings():
        for kind in (FutureWarning, DeprecationWarning, torch.jit.TracerWarning):  # type: ignore[attr-defined]
            warnings.simplefilter("ignore", kind)
        yield


def save_traced(traced: torch.jit.ScriptModule, path: Path) -> None:
    """Write a TorchScript file."""
    with torchscript_quiet():
        torch.jit.save(traced, str(path))
