"""Heads that say what a pixel is: its votes are probabilities, and confidence is trusted."""

import torch
from torch import Tensor
from torch.nn import functional

from selfadapt._config import Config
from selfadapt._errors import OutputError
from selfadapt._heads import Head
from selfadapt._symmetry import Grid


class Classification(Head):
    """Heads whose votes are probabilities. Doubt is one minus the confidence of the decision.

    Args:
        channels: number of channels.
        logits: whether the network gives logits (else probabilities).
    """

    def __init__(
        self, channels: int, *, logits: bool = True, weight: float = 1.0, grid: int | Grid = 1
    ) -> None:
        super().__init__(weight=weight, grid=grid)
        if channels < 1:
            raise OutputError(f"channels={channels} is not allowed: a head has at least one.")
        self.channels = channels
        self.logits = logits

    def coefficient(self, config: Config) -> float:
        return self.weight

    def kept_share(self, config: Config) -> float:
        return config.keep_classification

    @property
    def tells_objects(self) -> bool:
        return self.channels == 1

    def inside(self, label: Tensor) -> Tensor:
        return label if self.tells_objects else super().inside(label)

    def objection(self, raw: Tensor) -> str | None:
        low, high = float(raw.min()), float(raw.max())
        within = low >= 0 and high <= 1
        if self.logits and within and high > low:
            return (
                f"is declared to give logits, and gives values from {low:.2g} to {high:.2g}, as "
                "probabilities are: is logits=False (shell: --activated true) meant?"
            )
        if not self.logits and not within:
            return (
                f"is declared to give probabilities, and gives values from {low:.2g} to "
                f"{high:.2g}: is logits=True (shell: --activated false) meant?"
            )
        return None


class Binary(Classification):
    """Independent yes / no channels: one logit (or probability) each.

    >>> Binary().values(torch.zeros(1, 1, 1, 1)).item()
    0.5
    """

    def __init__(
        self, channels: int = 1, *, logits: bool = True, weight: float = 1.0, grid: int | Grid = 1
    ) -> None:
        super().__init__(channels, logits=logits, weight=weight, grid=grid)

    @property
    def groups(self) -> int:
        return 2 * self.channels

    def values(self, raw: Tensor) -> Tensor:
        return raw.sigmoid() if self.logits else raw

    def raw(self, values: Tensor) -> Tensor:
        return values.logit(1e-6) if self.logits else values

    def pseudo_label(self, votes: Tensor, targets: str) -> Tensor:
        mean = votes.mean(0)
        return (mean > 0.5).to(mean.dtype) if targets == "hard" else mean

    def doubt(self, votes: Tensor) -> tuple[Tensor, Tensor]:
        mean = votes.mean(0)
        channel = torch.arange(self.channels, device=mean.device).view(-1, 1, 1)
        return torch.minimum(mean, 1 - mean), 2 * channel + (mean > 0.5)

    def loss(self, raw: Tensor, label: Tensor) -> Tensor:
        logit = raw if self.logits else torch.logit(raw, eps=1e-6)
        return functional.binary_cross_entropy_with_logits(logit, label, reduction="none")


class Categorical(Classification):
    """Mutually exclusive classes: a softmax over the channels.

    Args:
        channels: number of classes.
        logits: whether the network gives logits (else probabilities).
        background: the class, from 0, that is no object, for heads that are `within` this one.
    """

    background: int | None = None

    def __init__(
        self,
        channels: int,
        *,
        logits: bool = True,
        background: int | None = None,
        weight: float = 1.0,
        grid: int | Grid = 1,
    ) -> None:
        super().__init__(channels, logits=logits, weight=weight, grid=grid)
        if background is not None:  # runs of before know no such attribute
            if background not in range(channels):
                raise OutputError(
                    f"background={background!r} is not allowed: it is a class from 0 to "
                    f"{channels - 1}."
                )
            self.background = background

    @property
    def tells_objects(self) -> bool:
        return self.background is not None

    def inside(self, label: Tensor) -> Tensor:
        if self.background is None:
            return super().inside(label)
        return 1 - label[..., self.background : self.background + 1, :, :]

    @property
    def groups(self) -> int:
        return self.channels

    def values(self, raw: Tensor) -> Tensor:
        return raw.softmax(-3) if self.logits else raw

    def raw(self, values: Tensor) -> Tensor:
        return values.clamp(min=1e-6).log() if self.logits else values

    def pseudo_label(self, votes: Tensor, targets: str) -> Tensor:
        mean = votes.mean(0)
        if targets == "soft":
            return mean
        return torch.zeros_like(mean).scatter_(1, mean.argmax(1, keepdim=True), 1.0)

    def doubt(self, votes: Tensor) -> tuple[Tensor, Tensor]:
        confidence, label = votes.mean(0).max(1, keepdim=True)
        return 1 - confidence, label

    def loss(self, raw: Tensor, label: Tensor) -> Tensor:
        log_p = raw.log_softmax(1) if self.logits else raw.clamp(min=1e-6).log()
        return -(label * log_p).sum(1, keepdim=True)
