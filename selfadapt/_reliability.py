"""Which pixels a pseudo label can be trusted in: the masks M_p and M_f of Eq. 1.

Per group (a class, or a regression channel) a running percentile of doubt is kept, and pixels
below it count. ACTIS (Rumberger et al. 2023) does this for the confidence of classes; section
2.1 of the paper extends it to regression through the spread across views.
"""

import math

import torch
from torch import Tensor

from selfadapt import _ranks as ranks

MAX_SAMPLE = 2**16
"""Percentiles are taken over at most about that many values, on a regular lattice of pixels."""
WITHOUT_SIGN = 2**31 - 1
"""Of the bits of a float32, all but the sign (NaN and 0 may have one)."""


def group_quantiles(doubt: Tensor, group: Tensor, groups: int, shares: Tensor) -> Tensor:
    """Per group the smallest value that `shares` of its members, on all ranks, do not exceed.

    Args:
        doubt: `[B, K, H, W]`.
        group: same shape, integers in `range(groups)`.
        groups: number of groups.
        shares: `[Q]`, each in [0, 1].

    Returns:
        `[Q, groups]`; NaN for a group without members.
    """
    stride = math.ceil(math.sqrt(max(1.0, ranks.count() * doubt.numel() / MAX_SAMPLE)))
    doubt = ranks.gather(doubt[..., ::stride, ::stride].flatten())
    group = ranks.gather(group[..., ::stride, ::stride].flatten())
    # one sort by group, then by doubt: the bits of numbers from 0 up are in their order
    bits = doubt.float().clamp(min=0).view(torch.int32).long() & WITHOUT_SIGN
    ordered = ((group.long() << 32) | bits).sort().values
    size = torch.zeros(groups, dtype=torch.long, device=doubt.device)
    size.scatter_add_(0, group, torch.ones_like(group))
    first = size.cumsum(0) - size
    exact = shares[:, None] * (size - 1).clamp(min=0)
    rank = (exact - 0.01).ceil().long()  # 0.8 * 10 must give 8 in float32, too
    found = ordered[(first + rank).clamp(max=doubt.numel() - 1)] & WITHOUT_SIGN
    found = found.int().view(torch.float32)
    return torch.where(size > 0, found, torch.nan)


class RunningThreshold:
    """The running percentile of one head: state `[groups]`, NaN where a group was never seen.

    Args:
        groups: number of groups.
        keep: share of a group's pixels that the running threshold keeps on average.
        floor: share that is kept in every batch, so that the loss never runs empty.
        momentum: of the running average; the first batch that has a group sets its threshold.
    """

    def __init__(
        self, groups: int, keep: float, floor: float, momentum: float, device: torch.device
    ) -> None:
        kind = torch.float32  # whatever torch's default is
        self.threshold = torch.full((groups,), torch.nan, dtype=kind, device=device)
        self._shares = torch.tensor([keep, min(floor, keep)], dtype=kind, device=device)
        self._momentum = momentum

    def update(self, doubt: Tensor, group: Tensor) -> Tensor:
        """Take in one batch, `[B, K, H, W]` each; return its mask of reliable pixels (bool)."""
        groups = len(self.threshold)
        now, floor = group_quantiles(doubt, group, groups, self._shares)
        moved = torch.lerp(now, self.threshold, self._momentum)
        moved = torch.where(self.threshold.isnan(), now, moved)
        self.threshold = torch.where(now.isnan(), self.threshold, moved)
        return doubt <= torch.maximum(self.threshold, floor)[group]
