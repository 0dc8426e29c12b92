"""When to stop: Eq. 3 (FN rate), Eq. 4 (embedding drift), and what else is watched on the way."""

import copy
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from itertools import takewhile
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from selfadapt._adapter import no_decode
from selfadapt._errors import ConfigError
from selfadapt._matching import Matches, match
from selfadapt._predict import Prediction, centre_crop, evaluating, predict
from selfadapt._tiles import pad_far_side
from selfadapt._views import view_votes

if TYPE_CHECKING:
    from selfadapt._adapter import Adapter
    from selfadapt._run import SelfAdaptation


DOUBT_IMAGES, DOUBT_SIDE = 4, 256
"""All views of that many held-out images, at most so large, go into the diagnostics."""

COPIES = 3
"""Flipped and turned copies that the agreement of views looks at."""


class Monitor(ABC):
    """A label-free number over held-out target images that compares a model with the initial one.

    By hand: `reset()`, then `update(...)` image by image, then `compute()`. As a criterion it is
    called with the run and the figures of a validation point, and says whether to stop.

    Args:
        threshold: the run stops when the number exceeds it.
    """

    name: str
    """Its column in the history."""

    def __init__(self, threshold: float) -> None:
        if not threshold > 0:
            raise ConfigError(f"threshold={threshold} is not allowed: it must be above 0.")
        self.threshold = threshold
        self.reset()

    def __repr__(self) -> str:
        return f"{type(self).__name__}(threshold={self.threshold})"

    def __call__(self, run: "SelfAdaptation", info: Mapping[str, float]) -> bool:
        return info.get(self.name, math.nan) > self.threshold

    def choose(self, looks: Sequence[Mapping[str, float]]) -> int:
        """Iteration of the look to keep: the last one before the number exceeded the threshold.

        `looks` are rows of a history, the first that of the initial model.
        """
        held = takewhile(lambda look: look[self.name] <= self.threshold, looks)
        return max((int(look["iteration"]) for look in held), default=0)

    @abstractmethod
    def check(self, adapter: "Adapter", initial: Sequence[Prediction]) -> None:
        """Raise, before any work, if this monitor cannot see anything with that adapter."""

    @abstractmethod
    def reset(self) -> None:
        """Forget all updates."""

    @abstractmethod
    def update(self, initial: Prediction, current: Prediction) -> None:
        """Take in one image: what the initial and what the current model say about it."""

    @abstractmethod
    def compute(self) -> float:
        """The number over all images since `reset`; NaN where it is undefined."""


class EmbeddingDrift(Monitor):
    """D_emb, Eq. 4: mean Euclidean distance of the bottleneck embedding from the initial one.

    The paper leaves open what E is. Here it is the mean of the bottleneck over positions, scaled
    to unit norm, so that the distance lies in [0, 2] and 0.5 means the same for every model.

    Args:
        threshold: paper: 0.5.
        unit_norm: whether embeddings are scaled to unit norm first.

    >>> drift = EmbeddingDrift()
    >>> east, north = (Prediction({}, torch.tensor(e), None) for e in ([2.0, 0.0], [0.0, 3.0]))
    >>> drift.update(east, north)
    >>> round(drift.compute(), 4)
    1.4142
    """

    name = "d_emb"

    def __init__(self, threshold: float = 0.5, *, unit_norm: bool = True) -> None:
        super().__init__(threshold)
        self.unit_norm = unit_norm

    def check(self, adapter: "Adapter", initial: Sequence[Prediction]) -> None:
        if any(prediction.embedding is None for prediction in initial):
            raise ConfigError(
                f"EmbeddingDrift needs a bottleneck, and {type(adapter).__name__} names none for "
                "this network: name one, or stop by FalseNegativeRate (shell: --stop fn)."
            )

    def reset(self) -> None:
        self._distances: list[float] = []

    def update(self, initial: Prediction, current: Prediction) -> None:
        if initial.embedding is None or current.embedding is None:
            return
        first, now = initial.embedding, current.embedding
        if self.unit_norm:
            first, now = functional.normalize(first, dim=0), functional.normalize(now, dim=0)
        self._distances.append(float((now - first).norm()))

    def compute(self) -> float:
        return float(np.mean(self._distances)) if self._distances else math.nan


class _InstanceMonitor(Monitor):
    """A monitor that matches instances at one IoU, with counts pooled over the images."""

    def __init__(self, threshold: float, iou: float) -> None:
        super().__init__(threshold)
        if not 0 < iou <= 1:
            raise ConfigError(f"iou={iou} is not allowed: it must be above 0 and at most 1.")
        self.iou = iou

    def reset(self) -> None:
        self._matches = Matches()


class FalseNegativeRate(_InstanceMonitor):
    """FN rate, Eq. 3: share of the initial model's instances that the current model misses.

    Counts are pooled over the images. An instance is detected if it is matched one to one.

    Args:
        threshold: paper: 0.05.
        iou: IoU from which two instances match; the paper leaves it open.

    >>> rate = FalseNegativeRate()
    >>> before, after = np.array([[1, 1, 0, 2]]), np.array([[1, 1, 0, 0]])
    >>> rate.update(Prediction({}, None, before), Prediction({}, None, after))
    >>> rate.compute()
    0.5
    """

    name = "fn_rate"

    def __init__(self, threshold: float = 0.05, *, iou: float = 0.5) -> None:
        super().__init__(threshold, iou)

    def check(self, adapter: "Adapter", initial: Sequence[Prediction]) -> None:
        if not adapter.can_decode:
            raise no_decode(adapter)
        _check_any_instance(self, initial)

    def update(self, initial: Prediction, current: Prediction) -> None:
        if initial.instances is None or current.instances is None:
            return
        self._matches += match(initial.instances, current.instances, (self.iou,))[0]

    def compute(self) -> float:
        return self._matches.fn_rate


class ViewAgreement(_InstanceMonitor):
    """How far a model finds the same instances in an image and in flipped and turned copies of it.

    AP of the instances in the copies, mapped back, against those in the image itself; counts are
    pooled over copies and images. Objects that a model is unsure of come and go with the copies.
    Not in the paper: its criteria measure how far the model has moved, whereas this one also rises
    where the model gets better (docs/evidence.md). A run goes through to its end; then the look
    that agrees best with itself is kept, if it does so better than the initial model.

    Args:
        threshold: by how much, at least.
        iou: IoU from which two instances match. Strict, since outlines often get better where the
            number of objects does not.

    >>> agreement = ViewAgreement()
    >>> image, copy = np.array([[1, 1, 0, 2]]), np.array([[1, 1, 0, 0]])
    >>> pairs = [(image, image), (image, copy)]
    >>> agreement.update(Prediction({}, None, image), Prediction({}, None, image, pairs))
    >>> agreement.compute()
    0.75
    """

    name = "agreement"

    def __init__(self, threshold: float = 0.06, *, iou: float = 0.7) -> None:
        super().__init__(threshold, iou)

    def __call__(self, run: "SelfAdaptation", info: Mapping[str, float]) -> bool:
        return False

    def choose(self, looks: Sequence[Mapping[str, float]]) -> int:
        """Iteration of the look that agrees best with itself, or 0."""
        best = max(looks, key=lambda look: look[self.name])
        rise = best[self.name] - looks[0][self.name]
        return int(best["iteration"]) if rise >= self.threshold else 0

    def check(self, adapter: "Adapter", initial: Sequence[Prediction]) -> None:
        if not adapter.can_decode:
            raise no_decode(adapter)
        if len(adapter.outputs.symmetries) == 1:
            raise ConfigError(
                "ViewAgreement needs flipped or turned copies, and the heads allow none: stop by "
                "EmbeddingDrift (shell: --stop embedding)."
            )
        _check_any_instance(self, initial)

    def update(self, initial: Prediction, current: Prediction) -> None:
        for first, copied in current.copies:
            self._matches += match(first, copied, (self.iou,))[0]

    def compute(self) -> float:
        ap = self._matches.ap
        return 0.0 if math.isnan(ap) else ap


def usual_criterion(adapter: "Adapter") -> type[ViewAgreement] | type[EmbeddingDrift]:
    """What "auto" stands for: agreement, or drift where there are no instances or no copies."""
    copies = len(adapter.outputs.symmetries) > 1
    return ViewAgreement if adapter.can_decode and copies else EmbeddingDrift


def _check_any_instance(monitor: Monitor, initial: Sequence[Prediction]) -> None:
    if not any(_count(prediction) for prediction in initial):
        raise ConfigError(
            f"{type(monitor).__name__} has nothing to compare with: the initial model finds no "
            "instance in the held-out images. Check scale and normalisation, or stop by "
            "EmbeddingDrift (shell: --stop embedding)."
        )


def _count(prediction: Prediction) -> int:
    """Number of instances."""
    return 0 if prediction.instances is None else len(np.unique(prediction.instances)) - 1


class Validation:
    """Held-out target images, and what the initial model says about them.

    Args:
        adapter: the adapter of all models to come.
        initial: the network before adaptation.
        images: prepared images `[C, H, W]`; no labels are needed.
        monitors: what to compute beside, or instead of, the defaults: the paper's two and the
            agreement of views, as far as the adapter allows.
    """

    def __init__(
        self,
        adapter: "Adapter",
        initial: nn.Module,
        images: Sequence[Tensor],
        monitors: Sequence[Monitor] = (),
    ) -> None:
        if not images:
            raise ConfigError("Validation needs at least one held-out image.")
        self.images = images
        self._adapter = adapter
        self._symmetries = adapter.outputs.symmetries[1 : 1 + COPIES]
        self._initial = [predict(adapter, initial, image) for image in images]
        self._instances = sum(map(_count, self._initial))
        for monitor in monitors:
            monitor.check(adapter, self._initial)
        every = (EmbeddingDrift(), FalseNegativeRate(), ViewAgreement())
        defaults = {default.name: default for default in every}
        given = {monitor.name: copy.copy(monitor) for monitor in monitors}
        self.monitors = list((defaults | given).values())

    def __call__(self, model: nn.Module) -> dict[str, float]:
        """All figures of one validation point.

        `d_emb`, `fn_rate` and `agreement` (see the monitors); `instances`, their number relative
        to the initial model's; and, as diagnostics after Fig. 2, `doubt_<head>`, the mean doubt
        across all views: one minus the confidence of a classification, and the standard deviation
        of a regression (test-time-augmentation spread).
        """
        for monitor in self.monitors:
            monitor.reset()
        instances = 0
        for image, initial in zip(self.images, self._initial, strict=True):
            current = predict(self._adapter, model, image, self._symmetries)
            instances += _count(current)
            for monitor in self.monitors:
                monitor.update(initial, current)
        figures = {monitor.name: monitor.compute() for monitor in self.monitors}
        figures["instances"] = instances / self._instances if self._instances else math.nan
        return figures | self._doubts(model)

    @torch.no_grad()
    def _doubts(self, model: nn.Module) -> dict[str, float]:
        """Mean doubt per head over the square centres of the first images."""
        images, multiple = self.images[:DOUBT_IMAGES], self._adapter.side_multiple
        smallest = min(DOUBT_SIDE, *(min(image.shape[-2:]) for image in images))
        side = self._adapter.fixed_size or max(smallest // multiple, 1) * multiple
        spec, device = self._adapter.outputs, next(model.parameters()).device
        sums = dict.fromkeys(spec, 0.0)
        with evaluating(model):
            for image in images:
                crop = pad_far_side(centre_crop(image, side), (side, side))[None].to(device)
                votes = view_votes(
                    lambda views: self._adapter.forward(model, views), crop, spec, spec.symmetries
                )
                for name, vote in votes.items():
                    sums[name] += float(spec[name].doubt(vote)[0].mean()) / len(images)
        return {f"doubt_{name}": value for name, value in sums.items()}
