"""Weak views: the teacher's predictions on flipped and turned images, mapped back."""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from selfadapt._spec import OutputSpec
from selfadapt._symmetry import Symmetry


def view_votes(
    predict: Callable[[Tensor], Mapping[str, Tensor]],
    images: Tensor,
    spec: OutputSpec,
    symmetries: Sequence[Symmetry],
) -> dict[str, Tensor]:
    """Predict all views of `images` `[B, C, S, S]` and map the predictions back.

    Returns the votes of each head, `[V, B, channels, S / grid, S / grid]`: probabilities or
    values in the frame of `images`. All views go through `predict` as one batch, hence the square.
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
