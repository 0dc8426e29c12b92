"""The paper's criteria: Eq. 3 (FN rate) and Eq. 4 (embedding drift)."""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from itertools import takewhile
from typing import Any

import numpy as np
from torch.nn import functional

from selfadapt._adapter import Adapter, no_decode
from selfadapt._config import DEFAULT
from selfadapt._errors import ConfigError
from selfadapt._matching import Matches, match
from selfadapt._predict import Prediction


class Monitor(ABC):
    """A label-free number over held-out target images that compares a model with the initial one.

    By hand: `reset()`, then `update(...)` image by image, then `compute()`. As a criterion it is
    called with the run and the figures of a validation point, and says whether to stop.

    Args:
        threshold: the run stops when the number exceeds it.
    """

    name: str
    """Its column in the history."""

    @property
    def measure(self) -> str:
        """What it measures, apart from the threshold: two of one measure can be exchanged."""
        return self.name

    def __init__(self, threshold: float) -> None:
        if not threshold > 0:
            raise ConfigError(f"threshold={threshold} is not allowed: it must be above 0.")
        self.threshold = threshold
        self.reset()

    def __repr__(self) -> str:
        return f"{type(self).__name__}(threshold={self.threshold})"

    def sees(self, row: Mapping[str, Any]) -> bool:
        """Whether a row of a history has a number of this monitor, and is of the default loop."""
        ours = row.get("candidate", DEFAULT) in ("initial", DEFAULT)
        return ours and math.isfinite(row.get(self.name, math.nan))

    def __call__(self, run: object, info: Mapping[str, float]) -> bool:
        return info.get(self.name, math.nan) > self.threshold

    def choose(self, looks: Sequence[Mapping[str, float]]) -> int:
        """Iteration of the look to keep: the last one before the number exceeded the threshold.

        `looks` are rows of a history, the first that of the initial model.
        """
        held = takewhile(lambda look: look[self.name] <= self.threshold, looks)
        return max((int(look["iteration"]) for look in held), default=0)

    @abstractmethod
    def check(self, adapter: Adapter, initial: Sequence[Prediction]) -> None:
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

    >>> import torch
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

    @property
    def measure(self) -> str:
        return f"{self.name}{'' if self.unit_norm else ' without unit norm'}"

    def check(self, adapter: Adapter, initial: Sequence[Prediction]) -> None:
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


class FalseNegativeRate(Monitor):
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
        super().__init__(threshold)
        if not 0 < iou <= 1:
            raise ConfigError(f"iou={iou} is not allowed: it must be above 0 and at most 1.")
        self.iou = iou

    @property
    def measure(self) -> str:
        return f"{self.name} at IoU {self.iou:g}"

    def reset(self) -> None:
        self._matches = Matches()

    def check(self, adapter: Adapter, initial: Sequence[Prediction]) -> None:
        if not adapter.can_decode:
            raise no_decode(adapter)
        found = (p.instances for p in initial if p.instances is not None)
        if not any(instances.any() for instances in found):
            raise ConfigError(
                "FalseNegativeRate has nothing to compare with: the initial model finds no "
                "instance in the held-out images. Check scale and normalisation, or stop by "
                "EmbeddingDrift (shell: --stop embedding)."
            )

    def update(self, initial: Prediction, current: Prediction) -> None:
        if initial.instances is None or current.instances is None:
            return
        self._matches += match(initial.instances, current.instances, (self.iou,))[0]

    def compute(self) -> float:
        return self._matches.fn_rate
