"""What the student learns from: the merged votes of the teacher, where they can be relied on."""

from collections.abc import Mapping

import torch
from torch import Tensor

from selfadapt._config import Config
from selfadapt._reliability import RunningThreshold
from selfadapt._spec import OutputSpec


def make_thresholds(
    spec: OutputSpec, config: Config, device: torch.device
) -> dict[str, RunningThreshold]:
    """One of each head, that has seen nothing yet."""
    return {
        name: RunningThreshold(
            head.groups,
            head.kept_share(config),
            config.keep_floor,
            config.mask_momentum,
            device,
        )
        for name, head in spec.items()
    }


def labels_and_masks(
    votes: Mapping[str, Tensor],
    spec: OutputSpec,
    thresholds: Mapping[str, RunningThreshold],
    config: Config,
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Pseudo labels `[B, C, H, W]` and reliability masks by head; the thresholds move on."""
    labels, masks = {}, {}
    for name, vote in votes.items():
        labels[name] = spec[name].pseudo_label(vote, config.targets)
        doubt, group = spec[name].doubt(vote)
        reliable = thresholds[name].update(doubt, group)
        masks[name] = reliable if config.mask else torch.ones_like(reliable)
    return labels, masks
