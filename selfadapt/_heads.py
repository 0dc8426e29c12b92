"""What a network predicts per pixel. A head answers everything that the method asks of an output.

The core never asks what kind a head is. A new head subclasses `Classification` or `Regression`
and overrides `act` (and `represents` where some symmetries are not exact).
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional

from selfadapt._config import Config
from selfadapt._errors import OutputError
from selfadapt._symmetry import D4, Grid, Symmetry


class Head(ABC):
    """One output of a network, `[B, channels, H / grid, W / grid]`.

    Args:
        weight: factor of this head in the loss.
        grid: image pixels per output pixel, one number or (rows, columns). Output pixel
            `(i, j)` belongs to image pixel `(i * grid, j * grid)`.
    """

    channels: int
    """Number of output channels."""
    within: str | None = None
    """Name of a head that tells objects: the loss counts in proportion to its `inside`."""

    def __init__(self, *, weight: float = 1.0, grid: int | Grid = 1) -> None:
        self.weight = weight
        self.grid: Grid = (grid, grid) if isinstance(grid, int) else grid
        if min(self.grid) < 1:
            raise OutputError(f"grid={grid!r} is not allowed: it must be 1 or more.")

    def __repr__(self) -> str:
        values = ", ".join(f"{name}={value!r}" for name, value in sorted(vars(self).items()))
        return f"{type(self).__name__}({values})"

    def represents(self, g: Symmetry) -> bool:
        """Whether this head's channels can express the image under `g` exactly."""
        return True

    def act(self, g: Symmetry, field: Tensor) -> Tensor:
        """Mix the channels of `[..., C, H, W]`, whose pixels have been moved by `g` already."""
        return field

    def readings(self) -> "Mapping[str, Head]":
        """What the channels might be by mistake, in words, and a head that acts so.

        `check_adapter` tries them on the trained network.
        """
        return {}

    @property
    def symmetries(self) -> tuple[Symmetry, ...]:
        """The symmetries under which averaging is exact for this head."""
        square = self.grid[0] == self.grid[1]
        return tuple(g for g in D4 if self.represents(g) and (square or not g.transposes))

    def transform(self, g: Symmetry, field: Tensor, step: Grid = (1, 1)) -> Tensor:
        """The output map that belongs to the image moved by `g`: pixels moved, channels mixed."""
        return self.act(g, g.move(field, step))

    @property
    @abstractmethod
    def groups(self) -> int:
        """Number of groups of pixels with a reliability threshold of their own."""

    @abstractmethod
    def values(self, raw: Tensor) -> Tensor:
        """Turn raw network output `[..., C, H, W]` into what may be averaged over views."""

    def raw(self, values: Tensor) -> Tensor:
        """Back from `values` to what the network gives, so that a mean can be decoded."""
        return values

    def objection(self, raw: Tensor) -> str | None:
        """What speaks against that this head gives such raw output `[channels, H, W]`, if any."""
        return None

    @abstractmethod
    def pseudo_label(self, votes: Tensor, targets: str) -> Tensor:
        """Merge the votes of all views `[V, B, C, H, W]` into one label `[B, C, H, W]`.

        `targets` is "soft" or "hard" (see `Config`).
        """

    @property
    def tells_objects(self) -> bool:
        """Whether another head can be `within` this one: whether `inside` is there."""
        return False

    def inside(self, label: Tensor) -> Tensor:
        """Of a label or values `[..., C, H, W]`, the share `[..., 1, H, W]` that is an object."""
        raise OutputError(f"{type(self).__name__} does not tell what is inside of objects.")

    @abstractmethod
    def doubt(self, votes: Tensor) -> tuple[Tensor, Tensor]:
        """How far to distrust a pixel, and the group whose threshold applies to it.

        Returns a float map (0 = certain) and an integer map in `range(groups)`, both
        `[B, K, H, W]` with the K of `loss`.
        """

    @abstractmethod
    def loss(self, raw: Tensor, label: Tensor) -> Tensor:
        """Loss per pixel `[B, K, H, W]` of the raw student output against the pseudo label."""

    @abstractmethod
    def coefficient(self, config: Config) -> float:
        """This head's factor in Eq. 1."""

    @abstractmethod
    def kept_share(self, config: Config) -> float:
        """Share of this head's pixels that the running threshold keeps as reliable."""


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
