"""The network of this package. The file lies in packages of bioimage.io, and needs SMP only."""

from collections.abc import Sequence
from typing import Any

import segmentation_models_pytorch as smp
from torch import Tensor, nn


class Network(nn.Module):
    """A network of segmentation_models_pytorch, its channels cut into heads.

    Args:
        architecture: name of its class.
        heads: number of channels of each head, in their order.
        **config: what its class takes.
    """

    def __init__(self, architecture: str, heads: Sequence[int], **config: Any) -> None:
        super().__init__()
        self.network = getattr(smp, architecture)(**config)
        self.heads = list(heads)

    def forward(self, images: Tensor) -> Tensor | tuple[Tensor, ...]:
        masks = self.network(images)
        if isinstance(masks, tuple | list):  # labels beside the masks
            masks = masks[0]
        cut: tuple[Tensor, ...] = masks.split(self.heads, 1)
        return cut if len(cut) > 1 else cut[0]
