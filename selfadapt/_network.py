"""Networks as such: copies, devices, which parameters adapt, telling one from another."""

import copy
import re
import zlib
from itertools import chain
from typing import TypeVar

import torch
from torch import nn

from selfadapt._errors import ConfigError, first_line

Network = TypeVar("Network", bound=nn.Module)

_NORMS = (
    nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm
)  # fmt: skip


def copy_network(network: Network, device: torch.device, *, frozen: bool = False) -> Network:
    """A float32 copy on `device` with parameters of its own; `frozen`: eval mode, no gradients.

    Copies of TorchScript parameters hang on the graph of the original until they are detached.
    """
    copied = copy.deepcopy(network)
    for mine, theirs in zip(copied.parameters(), network.parameters(), strict=True):
        mine.detach_().requires_grad_(theirs.requires_grad and not frozen)
    return copied.to(device, torch.float32).train(network.training and not frozen)


def is_finite(network: nn.Module) -> bool:
    """Whether no parameter and no buffer is NaN or infinite."""
    return all(
        bool(tensor.isfinite().all()) for tensor in chain(network.parameters(), network.buffers())
    )


def pick_device(name: str) -> torch.device:
    """The device of that name; "auto" is CUDA where it is available, else the CPU."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
        return torch.device(name)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"device {name!r} cannot be used here: {first_line(error)}") from None


def select_parameters(model: nn.Module, trainable: str) -> list[str]:
    """Names of the parameters that adapt; those the model itself has frozen never do."""
    free = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    if trainable == "norm":
        layers = [name for name, module in model.named_modules() if isinstance(module, _NORMS)]
        chosen = [name for name in free if name.rpartition(".")[0] in layers]
    elif trainable == "all":
        chosen = free
    else:
        chosen = [name for name in free if re.search(trainable, name)]
    if not chosen:
        raise ConfigError(
            f"trainable={trainable!r} selects no parameter of the network; its first are "
            f"{', '.join(free[:3]) or 'all frozen'}."
        )
    return chosen


def fingerprint(model: nn.Module) -> dict[str, str]:
    """Shape and checksum of every tensor, to tell one network from another."""
    return {
        name: f"{tuple(tensor.shape)} {zlib.crc32(tensor.cpu().numpy().tobytes()):08x}"
        for name, tensor in model.state_dict().items()
    }
