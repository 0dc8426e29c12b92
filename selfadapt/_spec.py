"""All outputs of a network by name, in the order of its channels."""

import math
from collections.abc import Iterator, Mapping

from torch import Tensor

from selfadapt._errors import OutputError
from selfadapt._heads import Head
from selfadapt._symmetry import D4, Grid, Symmetry


class OutputSpec(Mapping[str, Head]):
    """The heads of a network by name, in the order of its channels.

    >>> from selfadapt import Binary, Vector
    >>> spec = OutputSpec(flow=Vector(), cellprob=Binary())
    >>> spec.channels, len(spec.symmetries), list(spec)
    (3, 8, ['flow', 'cellprob'])
    """

    def __init__(self, **heads: Head) -> None:
        if not heads:
            raise OutputError("an OutputSpec needs at least one head, e.g. OutputSpec(p=Binary())")
        for name, head in heads.items():
            other = heads.get(head.within) if head.within is not None else None
            if head.within is not None and (
                other is None or not other.tells_objects or other.grid != head.grid
            ):
                raise OutputError(
                    f"head {name!r} is within={head.within!r}: it must be the name of a Binary() "
                    "or a Categorical(n, background=k) of the same grid."
                )
        self._heads = heads
        self.channels = sum(head.channels for head in heads.values())
        self.grid: Grid = (
            math.lcm(*(head.grid[0] for head in heads.values())),
            math.lcm(*(head.grid[1] for head in heads.values())),
        )
        self.symmetries: tuple[Symmetry, ...] = tuple(
            g for g in D4 if all(g in head.symmetries for head in heads.values())
        )

    def __getitem__(self, name: str) -> Head:
        return self._heads[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._heads)

    def __len__(self) -> int:
        return len(self._heads)

    def __repr__(self) -> str:
        return f"OutputSpec({', '.join(f'{name}={head!r}' for name, head in self.items())})"

    def step(self, name: str) -> Grid:
        """Lattice step of one head's own map that keeps the common lattice of all heads."""
        grid = self[name].grid
        return self.grid[0] // grid[0], self.grid[1] // grid[1]

    def split(self, raw: Tensor) -> dict[str, Tensor]:
        """Cut `[B, channels, H, W]` into heads, in the order of the spec."""
        if not isinstance(raw, Tensor) or raw.ndim != 4:
            shape = list(raw.shape) if isinstance(raw, Tensor) else f"a {type(raw).__name__}"
            raise OutputError(f"the network gives {shape}: [B, channels, H, W] is needed.")
        if raw.shape[1] != self.channels:
            heads = ", ".join(f"{name} {head.channels}" for name, head in self.items())
            raise OutputError(
                f"the network gives {raw.shape[1]} channels, the heads ask for {self.channels} "
                f"({heads}); change the heads so that they name every channel."
            )
        parts = raw.split([head.channels for head in self.values()], dim=1)
        return dict(zip(self, parts, strict=True))

    def check(self, outputs: Mapping[str, Tensor], image_size: tuple[int, int]) -> None:
        """Raise OutputError unless the outputs have the heads' names, channels and grids."""
        if not isinstance(outputs, Mapping) or not all(
            isinstance(output, Tensor) for output in outputs.values()
        ):
            raise OutputError(
                f"forward gives a {type(outputs).__name__}: it must give tensors [B, channels, H, "
                f"W] by name, for {sorted(self)} (`self.outputs.split` cuts one tensor so)."
            )
        if set(outputs) != set(self):
            raise OutputError(
                f"forward gives {sorted(outputs)}, the spec names {sorted(self)}; make them equal."
            )
        for name, head in self.items():
            height, width = image_size
            want = (head.channels, height // head.grid[0], width // head.grid[1])
            if tuple(outputs[name].shape[1:]) != want:
                raise OutputError(
                    f"head {name!r} is declared as {type(head).__name__} with [C, H, W] = "
                    f"{list(want)} for an image of {height} x {width}, but the network gives "
                    f"{list(outputs[name].shape[1:])}; change its channels or grid, or the "
                    "adapter's size_multiple."
                )
