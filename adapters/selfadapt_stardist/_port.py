"""Conventions in which PyTorch ports of StarDist differ, and a check of them."""

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from selfadapt import Binary, Categorical, Head, ModelError, OutputError, OutputSpec, Rays

logger = logging.getLogger(__name__)

OUTPUTS = ("prob", "dist", "prob_class")
DIST_WEIGHT = 0.4
"""With Config.balance of 0.5, StarDist's own weight of distances against the probability."""
ENOUGH = 100
"""Pixels of objects that an image needs for the check."""
REFUSED, DOUBTED = (0.3, 1.5), 0.75
"""Distances may fall by so much per pixel along their rays; below the last a warning is given."""


@dataclass(frozen=True, kw_only=True)
class Port:
    """How a network of the StarDist kind takes images and gives its outputs.

    Args:
        n_rays: number of rays.
        outputs: which output comes at which place: "prob", "dist", and "prob_class" where there
            are classes; of one tensor, the parts in order. For a network that gives a dictionary,
            these are its keys, or a mapping says what they are: `{"prob": "p", "dist": "d"}`.
        logits: whether `prob` (and `prob_class`) are logits (else probabilities).
        row_first: the direction of ray k, at the angle `2 pi k / n_rays`: False is StarDist's
            own, row `sin` and column `cos`; True is row `cos` and column `sin`.
        grid: image pixels per output pixel, (rows, columns).
        n_classes: number of classes of `prob_class`, the background not counted.
        embedding: dotted name of the module whose output is the bottleneck.
        channels: number of channels that the network takes.
        size_multiple: height and width that the network takes are multiples of this.
        fixed_size: set where the network takes square tiles of this side only.

    Raises:
        OutputError: `outputs` are not these names.

    >>> Port(n_rays=8, outputs=("dist", "prob"), embedding="middle").spec().channels
    9
    """

    n_rays: int = 32
    outputs: Sequence[str] | Mapping[str, str] = ("prob", "dist")
    logits: bool = True
    row_first: bool = False
    grid: tuple[int, int] = (1, 1)
    n_classes: int | None = None
    embedding: str
    channels: int = 1
    size_multiple: int = 16
    fixed_size: int | None = None

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
            # StarDist trains distances inside of objects, at a fifth of the weight
            "dist": Rays(
                self.n_rays,
                row_first=self.row_first,
                grid=self.grid,
                within="prob",
                weight=DIST_WEIGHT,
            ),
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
        outputs = self.outputs
        if isinstance(raw, Mapping):
            keys = outputs if isinstance(outputs, Mapping) else {name: name for name in outputs}
            if all(key in raw for key in keys.values()):
                return {name: raw[key] for name, key in keys.items()}
            raise OutputError(
                f"the network gives a dictionary of {', '.join(map(str, raw))}: say which is "
                f"which, as in outputs={dict.fromkeys(outputs, '...')}."
            )
        if isinstance(raw, Sequence) and len(raw) >= len(outputs):
            return dict(zip(outputs, raw, strict=False))
        given = f"{len(raw)} outputs" if isinstance(raw, Sequence) else f"a {type(raw).__name__}"
        raise OutputError(
            f"the network gives {given}, and outputs={tuple(outputs)} asks for {len(outputs)}: "
            "name what it gives, in its order."
        )

    def check(self, predictions: Iterable[tuple[str, Mapping[str, Tensor]]]) -> None:
        """Compare the network's outputs, by name of the image, with these conventions.

        Distances fall by one pixel for each pixel that one goes along their own ray: that tells
        directions of rays and units of distance, without labels. On images that a network knows
        badly they fall by less, 0.5 at the least of what was seen.

        Raises:
            ModelError: the network gives logits, or rays, in another way.
        """
        falls = []
        for source, outputs in predictions:
            raw = outputs["prob"]
            bounded = bool(((raw >= 0) & (raw <= 1)).all())
            if bounded == self.logits:
                values = f"from {float(raw.min()):.3g} to {float(raw.max()):.3g}"
                raise ModelError(
                    f"prob of {source} has values {values}: those are "
                    f"{'probabilities' if bounded else 'logits'}, so give logits={not self.logits}."
                )
            inside = (raw if bounded else raw.sigmoid())[0] > 0.5
            if int(inside.sum()) >= ENOUGH:
                falls.append([self.fall(outputs["dist"], inside, way) for way in (False, True)])
        if not falls:
            return  # no object, nothing to tell
        both = torch.tensor(falls).median(0).values.tolist()
        mine, other = both[self.row_first], both[not self.row_first]
        seen = (
            f"distances fall by {mine:.2f} per pixel along rays of row_first={self.row_first}, "
            f"where 1 is right, and by {other:.2f} along those of the other convention"
        )
        units = "distances must be in pixels of the image, and ray k at the angle 2 pi k / n_rays"
        if other > max(2 * mine, REFUSED[0]):
            raise ModelError(
                f"the rays are not as said: {seen}. Give row_first={not self.row_first}."
            )
        if not REFUSED[0] <= mine <= REFUSED[1]:
            raise ModelError(
                f"the rays are not as said: {seen}. {units.capitalize()}: let the network's "
                "forward change them."
            )
        if mine < DOUBTED:
            logger.warning(
                "The rays fit badly: %s. Either the network knows such images badly, or its rays "
                "are others: %s.", seen, units,
            )  # fmt: skip

    def fall(self, dist: Tensor, inside: Tensor, row_first: bool) -> float:
        """How much the distances of objects fall, per pixel along their rays; 1 if all is right."""
        angles = 2 * torch.pi * torch.arange(self.n_rays) / self.n_rays
        rows, columns = angles.sin()[:, None, None], angles.cos()[:, None, None]
        if row_first:
            rows, columns = columns, rows
        by_row, by_column = torch.gradient(dist, dim=(1, 2))
        slope = by_row / self.grid[0] * rows + by_column / self.grid[1] * columns
        return -float(slope.mean(0)[inside].median())
