"""What selfadapt is compared with in `evidence.py`, on the same networks and images.

`tta`: no adaptation, the mean over flips and quarter turns. `tent`: entropy minimisation of the
normalisation layers' scale and shift, like TENT (Wang et al. 2021) but offline: per pixel
(regression heads have no entropy), statistics of each batch while it adapts, and after that the
running ones, so that one network segments every image. AdaBN is part of selfadapt, and mean
teacher a setting of it, see `evidence.py`.
"""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from selfadapt import Adapter, Binary, Categorical, Config
from selfadapt._network import copy_network, select_parameters
from selfadapt_cellpose import CellposeAdapter


def tta(adapter: Adapter) -> Adapter:
    """The adapter with predictions averaged over all symmetries of its heads."""

    class Averaged(type(adapter)):  # type: ignore[misc]
        def forward_tiled(self, model: nn.Module, image: Tensor) -> dict[str, Tensor]:
            sums: dict[str, Tensor] = {}
            grid, symmetries = self.outputs.grid, self.outputs.symmetries
            for g in symmetries:
                for name, raw in super().forward_tiled(model, g.move(image, grid)).items():
                    head = self.outputs[name]
                    value = head.transform(g.inverse, head.values(raw), self.outputs.step(name))
                    sums[name] = sums.get(name, torch.zeros(())) + value / len(symmetries)
            for name, head in self.outputs.items():
                if isinstance(head, Binary) and head.logits:
                    sums[name] = sums[name].logit(1e-6)
                if isinstance(head, Categorical) and head.logits:
                    sums[name] = sums[name].clamp(min=1e-6).log()
            return sums

        def segment(self, image, *, channel_axis=None):  # type: ignore[no-untyped-def]
            if isinstance(self, CellposeAdapter):  # Cellpose's own eval would not average
                return Adapter.segment(self, image, channel_axis=channel_axis)
            return super().segment(image, channel_axis=channel_axis)

    averaged = adapter.with_model(adapter.model)
    averaged.__class__ = Averaged
    return averaged


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
