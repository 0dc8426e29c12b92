"""Weak views: the teacher's predictions on flipped and turned images, mapped back."""

from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor

from selfadapt._spec import OutputSpec
from selfadapt._symmetry import Symmetry
from selfadapt._tiles import pad_far_side, round_up


def drawn(
    symmetries: tuple[Symmetry, ...], count: int, generator: torch.Generator
) -> tuple[Symmetry, ...]:
    """So many of the symmetries, at random; a single one is the identity."""
    if count == 1:
        return symmetries[:1]
    if count >= len(symmetries):
        return symmetries
    order = torch.randperm(len(symmetries), generator=generator)
    return tuple(symmetries[i] for i in order[:count].tolist())


def view_votes(
    predict: Callable[[Tensor], Mapping[str, Tensor]],
    images: Tensor,
    spec: OutputSpec,
    symmetries: Sequence[Symmetry],
) -> dict[str, Tensor]:
    """Predict all views of `images` `[B, C, S, S]` and map the predictions back.

    Returns the votes of each head, `[V, B, channels, S / grid, S / grid]`: probabilities or
    values in the frame of `images`. All views go through `predict` at once, hence the square.
    """
    views = torch.cat([g.move(images, spec.grid) for g in symmetries])
    votes = {}
    for name, raw in predict(views).items():
        head, step = spec[name], spec.step(name)
        parts = head.values(raw).chunk(len(symmetries))
        votes[name] = torch.stack(
            [
                head.transform(g.inverse, part, step)
                for g, part in zip(symmetries, parts, strict=True)
            ]
        )
    return votes


def mean_outputs(
    forward: Callable[[Tensor], Mapping[str, Tensor]],
    image: Tensor,
    spec: OutputSpec,
    padding: Literal["symmetric", "reflect"],
) -> dict[str, Tensor]:
    """Raw outputs of one image `[C, H, W]`, the mean over flips and turns (TTA).

    Probabilities are averaged as probabilities. `forward` gives outputs `[channels, H / grid,
    W / grid]`; `padding` is how the image is brought to a multiple of the grid, that a flip moves
    no sampling point.
    """
    sizes = [round_up(n, g) for n, g in zip(image.shape[-2:], spec.grid, strict=True)]
    image = pad_far_side(image, sizes, padding)
    sums: dict[str, Tensor] = {}
    for g in spec.symmetries:
        for name, raw in forward(g.move(image, spec.grid).contiguous()).items():
            head = spec[name]
            vote = head.transform(g.inverse, head.values(raw), spec.step(name))
            sums[name] = sums[name] + vote if name in sums else vote
    return {name: spec[name].raw(total / len(spec.symmetries)) for name, total in sums.items()}
