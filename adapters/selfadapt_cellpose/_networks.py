"""What must be known of Cellpose's networks, told apart by their parts, not by their class."""

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import checkpoint as recompute

from selfadapt import ConfigError, ModelError


def is_transformer(net: nn.Module) -> bool:
    """Whether it is a network of Cellpose 4 (CPSAM, CPDINO)."""
    return hasattr(net, "W2")


def bottleneck(net: nn.Module) -> nn.Module:
    """The deepest layer; not the style, which Cellpose 4 fills with zeros or random numbers."""
    if is_transformer(net):
        encoder = net.get_submodule("encoder")
        return encoder.get_submodule("neck" if hasattr(encoder, "neck") else "norm")
    levels = net.get_submodule("downsample.down")
    return list(levels.children())[-1]


def check_network(net: nn.Module) -> None:
    """Raise ModelError for a network without these parts."""
    if not is_transformer(net) and not hasattr(net, "downsample"):
        raise ModelError(
            f"a {type(net).__name__} is neither a CPnet of Cellpose 3 nor a network of Cellpose 4."
        )
    if net.nout != 3:
        raise ModelError(f"the network has {net.nout} outputs, not Cellpose's 3 (flows, cellprob).")


def check_kind(net: Any, channels: Sequence[int] | None, *, checkpoint: bool) -> None:
    """Raise ConfigError for an option that is none of this kind of network."""
    transformer = is_transformer(net)
    if channels is not None and transformer:
        raise ConfigError(
            f"channels={tuple(channels)} is an option of Cellpose 3; version 4 takes up to "
            "three channels in any order: leave it out."
        )
    if channels is not None and net.nchan != 2:
        raise ConfigError(
            f"channels={tuple(channels)} is for networks of two channels, and this one has "
            f"{net.nchan}: leave it out."
        )
    if checkpoint and not transformer:
        raise ConfigError("checkpoint=True is an option of Cellpose 4: leave it out.")


def make_trainable(net: Any, *, checkpoint: bool) -> None:
    """float32, no MKL-DNN tensors, parameters that nothing is learnt by frozen.

    `checkpoint`: the encoder's blocks are computed twice, to save memory.
    """
    net.float()
    if is_transformer(net):
        net.dtype = torch.float32
        freeze_unused(net)
    else:
        net.mkldnn = False
    if checkpoint:
        checkpoint_blocks(net)


@contextmanager
def no_word_on_sparse_tensors() -> Iterator[None]:
    """Cellpose's dynamics build them, and torch asks the user whether to check them."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Sparse invariant checks", UserWarning)
        yield


def freeze_unused(net: nn.Module) -> None:
    """Freeze the parameters that the loss gives no gradient to.

    The patch embedding of Cellpose 4.2 is one: its forward reads `weight.data`. AdamW's decay and
    L2-SP would move such parameters although nothing is learnt. They are found by a backward pass
    on the meta device, which computes shapes only.
    """
    meta = {
        name: tensor.detach().to("meta").requires_grad_(tensor.requires_grad)
        for name, tensor in net.state_dict(keep_vars=True).items()
    }
    net.eval()
    with torch.device("meta"):
        outputs = torch.func.functional_call(net, meta, (torch.zeros(1, 3, 256, 256),))[0]
        outputs.sum().backward()
    for name, parameter in net.named_parameters():
        parameter.requires_grad_(meta[name].grad is not None)


def checkpoint_blocks(net: nn.Module) -> None:
    """Recompute the encoder's blocks in the backward pass instead of keeping what is inside."""
    for block in net.get_submodule("encoder.blocks").children():
        kind = type(block)

        def forward(self: nn.Module, *args: Any, kind: Any = kind) -> Tensor:
            if not torch.is_grad_enabled():
                return kind.forward(self, *args)  # type: ignore[no-any-return]
            return recompute.checkpoint(kind.forward, self, *args, use_reentrant=False)  # type: ignore[no-any-return]

        # a subclass rather than a wrapper: names in the state dict and copies stay as they are
        block.__class__ = type(f"Checkpointed{kind.__name__}", (kind,), {"forward": forward})
