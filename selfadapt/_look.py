"""What a network does with held-out images: the figures that a decision can rest on."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from selfadapt._adapter import Adapter
from selfadapt._errors import CheckpointError
from selfadapt._predict import Labels, Prediction, decoded, evaluating, predict, raw_outputs
from selfadapt._signals import Counts, agreement, instances, pooled, sizes
from selfadapt._symmetry import D4, Symmetry
from selfadapt._tiles import resize_labels

COPIES = (D4[4], D4[1], D4[6], D4[2], D4[3], D4[5], D4[7])
"""Which copies serve, in this order as far as the heads allow: a flip, a quarter turn, the other
flip, ..."""
COPIES_USED = 3
STEP = 1.3
"""The other scales are 1 / STEP and STEP times that of the image."""
FADED = 0.7
"""Share of its contrast that the faded copy has left, about the mean."""
IOUS = (0.5, 0.8)
"""At these IoUs instances are compared with those of copies: found again at all, and alike."""
FIRST_IOU = 0.5
"""IoU from which an instance of the first network counts as found by another (Eq. 3)."""


@dataclass(frozen=True)
class Views:
    """One window of an image, segmented in several ways; all label images have its size."""

    plain: Prediction
    turned: Sequence[Labels]
    scaled: Sequence[Labels]
    faded: Sequence[Labels]

    @property
    def labels(self) -> Labels:
        """The instances of the window as it is."""
        assert self.plain.instances is not None
        return self.plain.instances


def copies(symmetries: Sequence[Symmetry]) -> list[Symmetry]:
    """The flipped and turned copies of which agreement is measured."""
    return [g for g in COPIES if g in symmetries][:COPIES_USED]


def found_in_copy(
    find: Callable[[Tensor, tuple[int, int]], Labels],
    g: Symmetry,
    image: Tensor,
    size: tuple[int, int],
) -> Labels:
    """Instances of a flipped or turned copy of `[C, H, W]`, moved back; `size` is the image's."""
    labels = find(g.move(image).contiguous(), size[::-1] if g.transposes else size)
    return g.inverse.move(torch.from_numpy(labels)).contiguous().numpy()


@torch.no_grad()
def views(adapter: Adapter, model: nn.Module, image: Tensor, size: tuple[int, int]) -> Views:
    """Segment a prepared window `[C, H, W]`: as it is, turned, at two other scales, and faded.

    `size` is that of the window in the image. Without `decode` only the plain outputs are there.
    """
    image = image.to(next(model.parameters()).device)
    plain = predict(adapter, model, image, size)
    if plain.instances is None:
        return Views(plain, (), (), ())

    def found(pixels: Tensor, scaled: Sequence[int]) -> Labels:
        outputs = raw_outputs(adapter, model, pixels.contiguous())
        height, width = scaled
        return decoded(adapter, outputs, (height, width))

    turned, other = [], []
    with evaluating(model):
        # under TTA they would be the same copies once more
        for g in () if adapter.input.tta else copies(adapter.outputs.symmetries):
            turned.append(found_in_copy(found, g, image, size))
        for factor in (1 / STEP, STEP):
            sides = [max(round(n * factor), 1) for n in image.shape[-2:]]
            scaled = functional.interpolate(image[None], sides, mode="bilinear", antialias=True)
            labels = found(scaled[0], [max(round(n * factor), 1) for n in size])
            other.append(resize_labels(labels, size))
        mean = image.mean((1, 2), keepdim=True)
        faded = [found(mean + FADED * (image - mean), size)]
    return Views(plain, turned, other, faded)


@dataclass(frozen=True, eq=False)
class Look:
    """Label-free figures of one network on the windows of a `Judge`.

    Counts are by IoU (0.5 and 0.8) and by place, `[2, places, 3]`: true positives, false positives
    and false negatives of the instances in copies of a window, against those in itself.

    Attributes:
        turned: in flipped and turned copies.
        scaled: at 1/1.3 and 1.3 times the scale.
        faded: at 0.7 of the contrast.
        first: of this network against those of the first one, IoU 0.5 only, `[places, 3]` (Eq. 3).
        count: number of instances, `[places]`.
        size: median area of an instance, in pixels of the image; NaN without instances.
        finite: whether weights, buffers and outputs hold neither NaN nor infinity.
        figures: what monitors measure, by name: `d_emb`, `fn_rate`, ...
    """

    turned: Counts
    scaled: Counts
    faded: Counts
    first: Counts
    count: Counts
    size: float
    finite: bool = True
    figures: Mapping[str, float] = field(default_factory=dict)

    @classmethod
    def of(
        cls, seen: Sequence[Views], first: Sequence[Views], *, finite: bool = True, **figures: float
    ) -> Self:
        """From the views of all windows, and those of the first network of the same windows."""
        if any(view.plain.instances is None for view in seen):  # there is no `decode`
            nothing = np.zeros((len(IOUS), 0, 3), np.int64)
            none = nothing[0]
            return cls(nothing, nothing, nothing, none, none[:, 0], math.nan, finite, figures)

        def against(copies: Sequence[Sequence[Labels]]) -> Counts:
            pairs = list(zip(seen, copies, strict=True))
            return np.stack(
                [
                    np.concatenate([agreement(view.labels, each, iou) for view, each in pairs])
                    for iou in IOUS
                ]
            )

        areas = np.concatenate([sizes(view.labels) for view in seen])
        return cls(
            turned=against([view.turned for view in seen]),
            scaled=against([view.scaled for view in seen]),
            faded=against([view.faded for view in seen]),
            first=np.concatenate(
                [
                    agreement(before.labels, [now.labels], FIRST_IOU)
                    for before, now in zip(first, seen, strict=True)
                ]
            ),
            count=np.concatenate([instances(view.labels) for view in seen]),
            size=float(np.median(areas)) if len(areas) else math.nan,
            finite=finite,
            figures=figures,
        )

    @property
    def agreement(self) -> float:
        """AP of instances in flipped and turned copies against those in the image; or NaN."""
        return pooled(self.turned[0]).ap

    @property
    def stability(self) -> float:
        """AP of instances at other scales against those in the image; NaN where there are none."""
        return pooled(self.scaled[0]).ap

    @property
    def missed(self) -> float:
        """FN rate, Eq. 3, at an IoU of 0.5; NaN where the first network has found nothing."""
        return pooled(self.first).fn_rate

    @property
    def added(self) -> float:
        """Share of the instances that the first network has not found; NaN where there are none."""
        return 1 - pooled(self.first).precision

    def row(self, first: "Look") -> dict[str, float]:
        """The figures for a history."""
        before = int(first.count.sum())
        return {
            **self.figures,
            "agreement": self.agreement,
            "stability": self.stability,
            "instances": int(self.count.sum()) / before if before else math.nan,
            "added": self.added,
            "size": self.size / first.size,
        }

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers and lists, for a file."""
        values = {item.name: getattr(self, item.name) for item in fields(self)}
        return {
            name: value.tolist() if isinstance(value, np.ndarray) else value
            for name, value in values.items()
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """From `to_dict`.

        Raises:
            CheckpointError: it is of another version, or damaged.
        """
        try:
            turned, scaled, faded = (
                np.array(data[name], np.int64).reshape(len(IOUS), -1, 3)
                for name in ("turned", "scaled", "faded")
            )
            first = np.array(data["first"], np.int64).reshape(-1, 3)
            count = np.array(data["count"], np.int64)
            rest = float(data["size"]), bool(data["finite"]), dict(data["figures"])
            return cls(turned, scaled, faded, first, count, *rest)
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(
                f"the looks of the run are damaged, or of another version ({error}): start in a "
                "new folder."
            ) from None
