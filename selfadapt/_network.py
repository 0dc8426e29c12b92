"""Networks as such: copies, devices, which parameters adapt, telling one from another."""

import copy
import re
import threading
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter

from selfadapt._errors import ConfigError, ModelError, first_line

Network = TypeVar("Network", bound=nn.Module)

_NORMS = (
    nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm
)  # fmt: skip
_WRAPPERS = (nn.DataParallel, nn.parallel.DistributedDataParallel)


@dataclass(frozen=True)
class NetworkSource:
    """Python that builds a network without selfadapt, for who opens a package of it.

    Args:
        file: a module, which is copied into the package.
        name: its class or function that gives the `nn.Module`, from `[B, C, H, W]` to the heads in
            their order: a tuple, or a tensor where there is one.
        kwargs: what it is called with; what JSON can hold.
        state: the weights, by the names of that module.
        needs: what pip must install for it, beside torch.
    """

    file: Path
    name: str
    kwargs: Mapping[str, Any]
    state: Mapping[str, Tensor]
    needs: tuple[str, ...] = ()


def uncompiled(network: nn.Module) -> nn.Module:
    """The network itself, of one that `torch.compile` has wrapped."""
    plain: nn.Module = getattr(network, "_orig_mod", network)
    return plain


def compiled_in_place(network: nn.Module) -> bool:
    """Whether `network.compile()` was called on it or a part, which copies of it forget."""
    parts = network.modules()
    return any(getattr(part, "_compiled_call_impl", None) is not None for part in parts)


def copy_network(network: Network, device: torch.device, *, frozen: bool = False) -> Network:
    """A float32 copy on `device` with parameters of its own; `frozen`: eval mode, no gradients.

    Copies of TorchScript parameters hang on the graph of the original until they are detached. So
    do tensors that the old `weight_norm` and `spectral_norm` compute in each forward and keep,
    which cannot be copied: they are replaced, and computed anew.
    """
    computed = (
        value
        for module in network.modules()
        for value in vars(module).values()
        if isinstance(value, Tensor) and not value.is_leaf
    )
    copied = copy.deepcopy(network, {id(value): value.detach().clone() for value in computed})
    for mine, theirs in zip(copied.parameters(), network.parameters(), strict=True):
        mine.detach_().requires_grad_(theirs.requires_grad and not frozen)
    return copied.to(device, torch.float32).train(network.training and not frozen)


def check_network(network: object, *, finite: bool = True) -> None:
    """Raise ModelError unless this is a network that can be copied, kept and used.

    `finite` says whether all weights are looked at, too.
    """
    if not isinstance(network, nn.Module):
        raise ModelError(
            f"the adapter's model is {'missing' if network is None else type(network).__name__}: "
            "set `self.model` to the trained network, a torch.nn.Module."
        )
    refuse_wrapped(
        network, "give what is inside, `model.module`, and wrap the adapted network again"
    )
    if any(isinstance(parameter, UninitializedParameter) for parameter in network.parameters()):
        raise ModelError("the network has lazy layers without weights: run it once before.")
    if next(network.parameters(), None) is None:
        raise ModelError("the network has no parameters: there is nothing to adapt.")
    if not all(isinstance(value, Tensor) for value in network.state_dict().values()):
        raise ModelError(
            "the network has an extra state (get_extra_state), which snapshots cannot keep: make "
            "buffers of it."
        )
    if finite and not is_finite(network):
        raise ModelError("weights or buffers of the network are NaN or infinite: load it anew.")


def refuse_wrapped(network: nn.Module, remedy: str) -> None:
    """Raise ModelError where the network is inside a wrapper for several devices."""
    if isinstance(network, _WRAPPERS):
        raise ModelError(f"the network is wrapped in {type(network).__name__}: {remedy}.")


@torch.no_grad()
def is_finite(network: nn.Module) -> bool:
    """Whether no parameter is NaN or infinite, and no buffer NaN (masks of attention are -inf)."""
    return all(bool(tensor.isfinite().all()) for tensor in network.parameters()) and not any(
        bool(tensor.isnan().any()) for tensor in network.buffers()
    )


def pick_device(name: str) -> torch.device:
    """The device of that name; "auto" is CUDA where it is available, else the CPU."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ConfigError(
            f"device={name!r} is not allowed: it must be auto or a device of torch, such as cpu, "
            "cuda or cuda:1."
        ) from None
    try:
        torch.zeros(1, device=device).item()  # "meta" has no values
    except (RuntimeError, AssertionError) as error:
        reason = first_line(error).partition(". ")[0].removesuffix(".")
        raise ConfigError(f"device={name!r} cannot be used here: {reason}.") from None
    return device


_SEEDED = threading.RLock()
"""Layers draw from generators that all threads share: of two runs in one process, one waits."""


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Layers draw random numbers from this seed; the caller's random state is untouched."""
    on_cuda = device.type == "cuda"
    with _SEEDED, torch.random.fork_rng([device] if on_cuda else []):
        torch.default_generator.manual_seed(seed)
        if on_cuda:
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
        yield


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


def frozen_parts(module: nn.Module) -> list[nn.Module]:
    """The largest parts with parameters of which none adapts: their dropout has nothing to do."""
    parameters = list(module.parameters())
    if parameters and not any(parameter.requires_grad for parameter in parameters):
        return [module]
    return [part for child in module.children() for part in frozen_parts(child)]


def fingerprint(model: nn.Module) -> dict[str, str]:
    """Shape and checksum of every tensor, to tell one network from another."""
    return {
        name: f"{tuple(tensor.shape)} {zlib.crc32(_bytes(tensor)):08x}"
        for name, tensor in model.state_dict().items()
    }


def _bytes(tensor: Tensor) -> bytes:
    """NumPy knows no bfloat16."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def checksum_of(model: nn.Module) -> str:
    """Of all tensors, to tell one network from another."""
    told = repr(sorted(fingerprint(model).items()))
    return f"{zlib.crc32(told.encode()):08x}"
