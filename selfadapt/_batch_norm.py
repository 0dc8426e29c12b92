"""Batch-norm layers and the statistics that they normalise with."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from selfadapt import _ranks as ranks
from selfadapt._adapter import Adapter
from selfadapt._network import copy_network

BatchNorm = nn.modules.batchnorm._BatchNorm
Tracking = nn.modules.batchnorm._NormBase
_TRACKING = ("BatchNorm", "SyncBatchNorm", "InstanceNorm")


def batch_norms(model: nn.Module) -> list[BatchNorm]:
    """Batch-norm layers that keep running statistics (none are seen in TorchScript)."""
    layers = (module for module in model.modules() if isinstance(module, BatchNorm))
    return [layer for layer in layers if layer.running_mean is not None]


def freeze_statistics(model: nn.Module) -> None:
    """Let layers of a model in train mode use, and keep, their running statistics.

    These are those of batch norm, and of instance norm where it tracks them.
    """
    for module in model.modules():
        scripted = getattr(module, "original_name", "")
        if isinstance(module, Tracking) or scripted.startswith(_TRACKING):
            module.eval()


def set_training(model: nn.Module, frozen: Iterable[nn.Module], policy: str) -> None:
    """Train mode where something is learnt, then the batch-norm policy.

    Some models override `train`, so the order matters.
    """
    model.train()
    for part in frozen:
        part.eval()
    if policy == "batch":
        for layer in batch_norms(model):
            layer.train()
    else:
        freeze_statistics(model)


@contextmanager
def single_values_frozen(model: nn.Module) -> Iterator[None]:
    """Inside, layers that see one value per channel use their running statistics.

    Batch norm in train mode fails on one crop where its map has one pixel: behind global pooling,
    or at the bottom of a deep network. TorchScript runs its layers where no hook reaches.
    """
    handles = [layer.register_forward_pre_hook(_freeze_single) for layer in batch_norms(model)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _freeze_single(layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    images = inputs[0]
    if images.numel() == images.shape[1]:
        layer.eval()


@torch.no_grad()
def adabn(adapter: Adapter, batches: Iterable[Tensor], share: float = 1.0) -> nn.Module:
    """A copy of the network whose batch-norm layers hold the mean statistics of `batches`.

    Adaptive batch normalisation (Li et al. 2016, arXiv 1603.04779). Weights stay as they are, and
    so does a network without batch norm.

    Args:
        adapter: the model.
        batches: prepared crops, float `[B, C, S, S]` each, of as many images as possible: means
            of few crops vary, and the network with them (`adapt` takes 64 batches).
        share: of the new statistics, in (0, 1]; the trained ones make up the rest (Schneider et
            al. 2020, arXiv 2006.16971, Eq. 1).
    """
    device = next(adapter.model.parameters()).device
    model = copy_network(adapter.model, device).eval()
    layers = batch_norms(model)
    usual = [layer.momentum for layer in layers]
    for layer in layers:
        layer.momentum = None  # the plain mean over batches, of which there are none so far
        if layer.num_batches_tracked is not None:
            layer.num_batches_tracked.zero_()
        layer.train()
    with single_values_frozen(model):
        for images in batches if layers else ():
            adapter.forward(model, images.to(device))
    ranks.average(b for layer in layers for b in layer.buffers() if b.is_floating_point())
    for layer, momentum in zip(layers, usual, strict=True):
        layer.momentum = momentum
    return mixed(adapter.model, model.eval(), share)


@torch.no_grad()
def mixed(trained: nn.Module, measured: nn.Module, share: float) -> nn.Module:
    """A copy of `measured` with `share` of its batch-norm statistics, the rest of `trained`."""
    model = copy_network(measured, next(measured.parameters()).device)
    for layer, before in zip(batch_norms(model), batch_norms(trained), strict=True):
        for new, old in zip(layer.buffers(), before.buffers(), strict=True):
            if new.is_floating_point():  # all but the count of batches
                new.lerp_(old, 1 - share)
    return model
