"""What a network predicts per pixel. A head answers everything that the method asks of an output.

The core never asks what kind a head is. A new head subclasses `Classification` or `Regression`
and overrides `act` (and `represents` where some symmetries are not exact).
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping

from torch import Tensor

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
