"""What must be known of Cellpose's networks, told apart by their parts, not by their class."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from selfadapt import ModelError


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


def make_trainable(net: Any) -> None:
    """float32, no MKL-DNN tensors, parameters that nothing is learnt by frozen."""
    net.float()
    if is_transformer(net):
        net.dtype = torch.float32
        freeze_unused(net)
    else:
        net.mkldnn = False


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
            return checkpoint(kind.forward, self, *args, use_reentrant=False)  # type: ignore[no-any-return]

        # a subclass rather than a wrapper: names in the state dict and copies stay as they are
        block.__class__ = type(f"Checkpointed{kind.__name__}", (kind,), {"forward": forward})
