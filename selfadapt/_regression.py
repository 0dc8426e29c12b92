"""Heads that give values: where the views agree on one, it is trusted."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional

from selfadapt._config import Config
from selfadapt._errors import OutputError
from selfadapt._heads import Head
from selfadapt._symmetry import Grid, Symmetry


class Regression(Head):
    """Heads whose votes are real values. Doubt is their standard deviation across views.

    Args:
        joint: one standard deviation for all channels (their root mean square) instead of one
            per channel.
        within: name of the head, `Binary()` or `Categorical(n, background=k)`, outside of whose
            objects the network was not trained to give anything: there, the loss does not count.
    """

    def __init__(
        self,
        *,
        joint: bool = False,
        within: str | None = None,
        weight: float = 1.0,
        grid: int | Grid = 1,
    ) -> None:
        super().__init__(weight=weight, grid=grid)
        self.joint = joint
        if within is not None:  # runs of before know no such attribute
            self.within = within

    @property
    def groups(self) -> int:
        return 1 if self.joint else self.channels

    def values(self, raw: Tensor) -> Tensor:
        return raw

    def pseudo_label(self, votes: Tensor, targets: str) -> Tensor:
        return votes.mean(0)

    def doubt(self, votes: Tensor) -> tuple[Tensor, Tensor]:
        mean, variance = votes.mean(0), torch.zeros_like(votes[0])
        for vote in votes:  # view by view: many times as fast as torch's var, and without copies
            variance += (vote - mean).square()
        variance /= len(votes)
        if self.joint:
            variance = variance.mean(1, keepdim=True).expand_as(variance)
        group = torch.arange(self.channels, device=votes.device).view(-1, 1, 1)
        group = torch.zeros_like(group) if self.joint else group
        return variance.sqrt(), group.expand_as(variance)

    def loss(self, raw: Tensor, label: Tensor) -> Tensor:
        return functional.mse_loss(raw, label, reduction="none")

    def coefficient(self, config: Config) -> float:
        return config.balance * self.weight

    def kept_share(self, config: Config) -> float:
        return config.keep_regression


class Scalar(Regression):
    """Values that no symmetry changes: distances, heights, densities."""

    def __init__(
        self,
        channels: int = 1,
        *,
        joint: bool = False,
        within: str | None = None,
        weight: float = 1.0,
        grid: int | Grid = 1,
    ) -> None:
        super().__init__(joint=joint, within=within, weight=weight, grid=grid)
        self.channels = channels


class Vector(Regression):
    """A vector (dy, dx) in the image plane: it turns and flips with the image."""

    channels = 2

    def act(self, g: Symmetry, field: Tensor) -> Tensor:
        matrix = field.new_tensor(g.matrix)
        return torch.einsum("ij,...jhw->...ihw", matrix, field)

    def readings(self) -> Mapping[str, Head]:
        return {
            "x comes before y": _XFirst(),
            "they do not turn with the image": Scalar(2),
        }


class _XFirst(Vector):
    """A vector (dx, dy)."""

    def act(self, g: Symmetry, field: Tensor) -> Tensor:
        return super().act(g, field.flip(-3)).flip(-3)


class Rays(Regression):
    """Star-convex distances along `channels` rays (StarDist). Symmetries permute the rays.

    Ray `k` points to `(sin, cos)` of `2 pi k / n` as (row, column), StarDist's own convention,
    or to `(cos, sin)` with `row_first=True`, as some ports have it. Only symmetries that map
    rays onto rays are exact: all eight where n is a multiple of 4, else four or two.
    """

    def __init__(
        self,
        channels: int,
        *,
        row_first: bool = False,
        joint: bool = False,
        within: str | None = None,
        weight: float = 1.0,
        grid: int | Grid = 1,
    ) -> None:
        super().__init__(joint=joint, within=within, weight=weight, grid=grid)
        if channels < 3:
            raise OutputError(f"channels={channels} is not allowed: a star needs three rays.")
        self.channels = channels
        self.row_first = row_first

    def _sources(self, g: Symmetry) -> list[int] | None:
        """Which old ray each new ray is, or None where they fall between rays."""
        turn = 2 * math.pi / self.channels
        sources = []
        for k in range(self.channels):
            along, across = math.cos(k * turn), math.sin(k * turn)
            row, column = (along, across) if self.row_first else (across, along)
            (yy, yx), (xy, xx) = g.inverse.matrix
            row, column = yy * row + yx * column, xy * row + xx * column
            across, along = (column, row) if self.row_first else (row, column)
            source = math.atan2(across, along) / turn
            if abs(source - round(source)) > 1e-6:
                return None
            sources.append(round(source) % self.channels)
        return sources

    def represents(self, g: Symmetry) -> bool:
        return self._sources(g) is not None

    def readings(self) -> Mapping[str, Head]:
        other = not self.row_first
        return {
            f"row_first={other}": Rays(self.channels, row_first=other),
            "they do not turn with the image": Scalar(self.channels),
        }

    def act(self, g: Symmetry, field: Tensor) -> Tensor:
        sources = self._sources(g)
        if sources is None:
            raise OutputError(
                f"{self.channels} rays cannot express {g}: use one of the head's `symmetries`."
            )
        return field[..., sources, :, :]
