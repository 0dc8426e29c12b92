"""Conventions in which PyTorch ports of StarDist differ, and a check of them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from selfadapt import Binary, Categorical, Head, ModelError, OutputError, OutputSpec, Rays

OUTPUTS = ("prob", "dist", "prob_class")


@dataclass(frozen=True, kw_only=True)
class Port:
    """How a network of the StarDist kind takes images and gives its outputs.

    Args:
        n_rays: number of rays.
        outputs: which output comes at which place: "prob", "dist", and "prob_class" where there
            are classes. Of a dictionary, these are its keys; of one tensor, the parts in order.
        logits: whether `prob` (and `prob_class`) are logits (else probabilities).
        row_first: the direction of ray k, at the angle `2 pi k / n_rays`: False is StarDist's
            own, row `sin` and column `cos`; True is row `cos` and column `sin`.
        grid: image pixels per output pixel, (rows, columns).
        n_classes: number of classes of `prob_class`, the background not counted.
        embedding: dotted name of the module whose output is the bottleneck.
        channels: number of channels that the network takes.
        size_multiple: height and width that the network takes are multiples of this.
    """

    n_rays: int = 32
    outputs: Sequence[str] = ("prob", "dist")
    logits: bool = True
    row_first: bool = False
    grid: tuple[int, int] = (1, 1)
    n_classes: int | None = None
    embedding: str
    channels: int = 1
    size_multiple: int = 16

    def __post_init__(self) -> None:
        wanted = OUTPUTS if self.n_classes is not None else OUTPUTS[:2]
        if sorted(self.outputs) != sorted(wanted):
            raise OutputError(
                f"outputs={tuple(self.outputs)} with n_classes={self.n_classes} is not allowed: "
                f"it takes each of {', '.join(wanted)} once."
            )

    def spec(self) -> OutputSpec:
        """The heads, in the order of the outputs."""
        heads: dict[str, Head] = {
            "prob": Binary(logits=self.logits, grid=self.grid),
            "dist": Rays(self.n_rays, row_first=self.row_first, grid=self.grid),
        }
        if self.n_classes is not None:
            heads["prob_class"] = Categorical(
                self.n_classes + 1, logits=self.logits, grid=self.grid
            )
        return OutputSpec(**{name: heads[name] for name in self.outputs})

    def named(self, raw: Any, spec: OutputSpec) -> dict[str, Tensor]:
        """What the network gives, by name of the head; outputs beyond the named are left out."""
        if isinstance(raw, Tensor):
            return spec.split(raw)
        if isinstance(raw, Mapping):
            missing = [name for name in self.outputs if name not in raw]
            if not missing:
                return {name: raw[name] for name in self.outputs}
            given = f"a dictionary of {', '.join(map(str, raw))}"
        elif len(raw) >= len(self.outputs):
            return dict(zip(self.outputs, raw, strict=False))
        else:
            given = f"{len(raw)} outputs"
        raise OutputError(
            f"the network gives {given}, and outputs={tuple(self.outputs)} are asked for: name "
            "what it gives."
        )

    def check(self, outputs: Mapping[str, Tensor], source: str) -> None:
        """Raise ModelError if the outputs of an image do not fit these conventions.

        Distances fall by one pixel for each pixel that one goes along their own ray: that tells
        apart directions of rays and units of distance, without labels.
        """
        raw = outputs["prob"]
        bounded = bool(((raw >= 0) & (raw <= 1)).all())
        if bounded == self.logits:
            values = f"from {float(raw.min()):.3g} to {float(raw.max()):.3g}"
            raise ModelError(
                f"prob of {source} has values {values}: those are "
                f"{'probabilities' if bounded else 'logits'}, so give logits={not self.logits}."
            )
        inside = (raw if bounded else raw.sigmoid())[0] > 0.5
        if int(inside.sum()) < 100:
            return  # no object, nothing to tell
        falls = {
            row_first: self._fall(outputs["dist"], inside, row_first) for row_first in (False, True)
        }
        if falls[not self.row_first] > max(2 * falls[self.row_first], 0.3):
            raise ModelError(
                f"the rays of this network point elsewhere: in {source}, distances fall by "
                f"{falls[self.row_first]:.2f} per pixel along rays of row_first={self.row_first} "
                f"and by {falls[not self.row_first]:.2f} along those of the other convention: "
                f"give row_first={not self.row_first}."
            )

    def _fall(self, dist: Tensor, inside: Tensor, row_first: bool) -> float:
        """How much the distances of objects fall, per pixel along their rays; 1 if all is right."""
        angles = 2 * torch.pi * torch.arange(self.n_rays) / self.n_rays
        rows, columns = angles.sin()[:, None, None], angles.cos()[:, None, None]
        if row_first:
            rows, columns = columns, rows
        by_row, by_column = torch.gradient(dist, dim=(1, 2))
        slope = by_row / self.grid[0] * rows + by_column / self.grid[1] * columns
        return -float(slope.mean(0)[inside].median())
