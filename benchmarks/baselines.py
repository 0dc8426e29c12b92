"""What selfadapt is compared with in `evidence.py`, on the same networks and images.

`tta`: no adaptation, the mean over flips and quarter turns. `tent`: entropy minimisation of the
normalisation layers' scale and shift, like TENT (Wang et al. 2021) but offline: per pixel
(regression heads have no entropy), statistics of each batch while it adapts, and after that the
running ones, so that one network segments every image. AdaBN is part of selfadapt, and mean
teacher a setting of it, see `evidence.py`.
"""

from collections.abc import Iterable, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from selfadapt import Adapter, Binary, Categorical, Config
from selfadapt._network import copy_network, select_parameters


def tta(adapter: Adapter) -> Adapter:
    """The adapter with predictions averaged over all symmetries of its heads."""
    return adapter.with_input(replace(adapter.input, tta=True))


def tent(adapter: Adapter, batches: Iterable[Tensor], config: Config) -> Adapter:
    """One pass of entropy minimisation, statistics of each batch, AdamW as in `config`."""
    device = next(adapter.model.parameters()).device
    model = copy_network(adapter.model, device).train()
    names = select_parameters(model, "norm")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in names)
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad],
        lr=config.learning_rate,
        weight_decay=config.weight_decay,
    )
    for images in batches:
        outputs = adapter.forward(model, images.to(device))
        loss = torch.stack(list(_entropies(adapter, outputs).values())).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return adapter.with_model(model.eval())


def _entropies(adapter: Adapter, outputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    entropies = {}
    for name, head in adapter.outputs.items():
        p = head.values(outputs[name]).clamp(1e-6, 1 - 1e-6)
        if isinstance(head, Binary):
            entropies[name] = -(p * p.log() + (1 - p) * (1 - p).log()).mean()
        if isinstance(head, Categorical):
            entropies[name] = -(p * p.log()).sum(1).mean()
    return entropies
