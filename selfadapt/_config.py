"""The settings of a run."""

import dataclasses
import re
from dataclasses import dataclass
from typing import Any, Literal

from selfadapt._errors import ConfigError

DEFAULT = "default"
LOOPS = (DEFAULT, "batch", "gentle", "bold")
"""Ways to run the method."""
AFTER = ("teacher", "tta")
"""Candidates that come of the best one of these."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """All settings of an adaptation. Where a value is not the paper's, docs/settings.md says why.

    Args:
        iterations: optimiser steps (paper: 25,000).
        batch_size: crops per step (paper: 8).
        accumulate: number of smaller batches that a step is split into, to save memory; each is
            augmented, labelled and masked by itself, and moves the running percentile once.
        crop: side of the square training crop in pixels of the prepared image; rounded up to
            what the network takes, and replaced by its size where that is fixed.
        learning_rate: peak learning rate of AdamW.
        warmup: share of `iterations` in which the learning rate rises linearly; it then falls
            to zero along a cosine.
        weight_decay: AdamW's decoupled weight decay (paper: 1e-3).
        gradient_clip: largest norm of the gradient, or None for no clipping.
        trainable: "all"; "norm" (scale and shift of normalisation layers only); or a regular
            expression that is searched in the parameter names.
        batch_norm: the statistics with which batch-norm layers normalise. "source": those of the
            trained model. "target": those of the images, measured once by `adapt` before the
            first step (AdaBN). "auto": "source", "target" or the mean of both, as the judge
            decides after a look at each; "source" with any other criterion.
            "batch": the student takes those of each batch and updates its running statistics,
            which the teacher copies.
        views: number of weak views (flips and quarter turns) the teacher averages, 1 to 8. Fewer
            than the heads allow are drawn anew at every step. 1 is Table 2 without teacher TTA.
        targets: "soft" pseudo labels are the averaged probabilities, "hard" their decision.
        mask: whether unreliable pixels are left out (Table 2: confidence filtering).
        keep_classification: share of pixels per class kept as reliable, in the running average.
        keep_regression: the same per regression channel (paper: the 80th percentile, 0.8).
        keep_floor: share of pixels that is kept in every batch, whatever the running threshold.
        mask_momentum: momentum of the running percentile.
        balance: weight of regression against classification heads, lambda_bal of Eq. 1.
        l2sp: lambda of Eq. 2 (paper: 1e-2, 1e-4 or 1e-5, by data set). 0 is Table 2 without it.
        ema_decay: alpha of the teacher's exponential moving average (paper: 0.99).
        ema_every: optimiser steps between two updates of the teacher.
        strength: factor on the four augmentation strengths below; 0 is Table 2 without
            student augmentation.
        brightness: largest shift, in standard deviations of the batch, per channel.
        contrast: largest relative change of contrast about the sample's mean, below 1.
        blur: largest standard deviation, in pixels, of the Gaussian by which a sample is blurred
            or, as often, sharpened.
        noise: largest rise of the noise, relative to that of the sample itself (1: twice as much).
        export: which weights are monitored, kept and returned, the "student"'s or the "teacher"'s.
        validate_every: steps between two looks at the held-out images.
        validation_share: share of the images held back for that where none are given; at least
            four are, or half of fewer than eight.
        validation_images: at most that many windows of held-out images are looked at, of each
            image three, of a single one four.
        validation_size: side of the windows of held-out images that are looked at, in pixels of
            the prepared image.
        snapshots: about so many looks of the loop keep their weights, evenly spread; the best one
            always does.
        candidates: what may become the result, beside the initial network and, with
            `batch_norm="auto"`, other statistics: "auto" for all of the following, or some of
            them, separated by commas. Loops, the less promising half of which ends at a quarter
            and at half of the iterations: "default" (the settings as they are), "batch"
            (`batch_norm="batch"`), "gentle" and "bold" (a quarter and four times the learning
            rate). At the end: "teacher", and "tta" (the mean over flips and turns of what was
            best; segmenting then takes up to eight times as long). Where another criterion than
            the judge stops a run, there is "default" alone.
        seed: seed of crops, views, augmentation, dropout and the hold-out.
        device: a torch device, or "auto" for CUDA where it is available, else the CPU.
        precision: "float32" or "bfloat16" (autocast; weights stay float32).

    Raises:
        ConfigError: a value is out of range; the message names it.

    >>> Config(views=8).views
    8
    """

    iterations: int = 200
    batch_size: int = 4
    accumulate: int = 1
    crop: int = 128
    learning_rate: float = 2e-4
    warmup: float = 0.05
    weight_decay: float = 1e-3
    gradient_clip: float | None = None
    trainable: str = "all"
    batch_norm: Literal["auto", "source", "target", "batch"] = "auto"
    views: int = 4
    targets: Literal["soft", "hard"] = "soft"
    mask: bool = True
    keep_classification: float = 0.8
    keep_regression: float = 0.8
    keep_floor: float = 0.1
    mask_momentum: float = 0.99
    balance: float = 0.5
    l2sp: float = 1e-4
    ema_decay: float = 0.99
    ema_every: int = 1
    strength: float = 1.0
    brightness: float = 0.1
    contrast: float = 0.25
    blur: float = 1.0
    noise: float = 1.0
    export: Literal["student", "teacher"] = "student"
    validate_every: int = 50
    validation_share: float = 0.25
    validation_images: int = 12
    validation_size: int = 256
    snapshots: int = 20
    candidates: str = "auto"
    seed: int = 0
    device: str = "auto"
    precision: Literal["float32", "bfloat16"] = "float32"

    @property
    def chosen(self) -> tuple[str, ...]:
        """Names of the candidates."""
        if self.candidates == "auto":
            return LOOPS + AFTER
        return tuple(name.strip() for name in self.candidates.split(","))

    def __post_init__(self) -> None:
        for item in dataclasses.fields(self):
            value = getattr(self, item.name)
            for kind, allowed in ((int, int), (float, (int, float))):
                if item.type is kind:
                    number = isinstance(value, allowed) and not isinstance(value, bool)
                    finite = number and abs(value) < (2**63 if kind is int else 1e300)  # nor NaN
                    self._require(item.name, finite, f"a finite {kind.__name__}")
            if item.type in (bool, str):
                is_one = isinstance(value, item.type)
                self._require(item.name, is_one, "True or False" if item.type is bool else "text")
        for name in _POSITIVE:
            self._require(name, getattr(self, name) > 0, "above 0")
        for name in _NOT_NEGATIVE:
            self._require(name, getattr(self, name) >= 0, "0 or more")
        for name in _SHARES:
            self._require(name, 0 <= getattr(self, name) <= 1, "between 0 and 1")
        unknown = set(self.chosen) - {*LOOPS, *AFTER}
        self._require("candidates", not unknown, f'"auto", or some of {", ".join(LOOPS + AFTER)}')
        for name, choices in _CHOICES.items():
            self._require(name, getattr(self, name) in choices, " or ".join(map(repr, choices)))
        self._require("accumulate", self.accumulate <= self.batch_size, "at most batch_size")
        self._require("views", 1 <= self.views <= 8, "between 1 and 8")
        self._require("ema_decay", self.ema_decay < 1, "below 1 (at 1 the teacher never moves)")
        self._require("crop", 3 <= self.crop <= 2**14, "3 to 16384")
        self._require("batch_size", self.batch_size <= 2**14, "at most 16384")
        self._require("contrast", self.contrast * self.strength < 1, "below 1 / strength")
        if self.gradient_clip is not None:
            number = type(self.gradient_clip) in (int, float) and self.gradient_clip > 0
            self._require("gradient_clip", number, "above 0, or None")
        try:
            re.compile(self.trainable)
        except re.error as error:
            raise ConfigError(
                f"trainable={self.trainable!r} is no regular expression: {error}"
            ) from None

    def _require(self, name: str, holds: bool, rule: str) -> None:
        if not holds:
            raise ConfigError(f"{name}={getattr(self, name)!r} is not allowed: it must be {rule}.")

    def to_dict(self) -> dict[str, Any]:
        """The settings by name."""
        return dataclasses.asdict(self)


_POSITIVE = (
    "iterations", "batch_size", "accumulate", "crop", "learning_rate", "ema_every",
    "validate_every", "validation_images", "validation_size", "snapshots",
)  # fmt: skip
_NOT_NEGATIVE = (
    "weight_decay", "balance", "l2sp", "strength", "brightness", "contrast", "blur", "noise",
    "seed",
)  # fmt: skip
_SHARES = (
    "warmup", "keep_classification", "keep_regression", "keep_floor", "mask_momentum",
    "ema_decay", "validation_share",
)  # fmt: skip
_CHOICES = {
    "batch_norm": ("auto", "source", "target", "batch"),
    "targets": ("soft", "hard"),
    "export": ("student", "teacher"),
    "precision": ("float32", "bfloat16"),
}
