"""How good are the instances? An estimate of AP from what a look has measured, without labels."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import numpy as np

from selfadapt._look import Look
from selfadapt._signals import pooled

WEIGHTS = (0.361, -0.637, 0.174, 0.784, -0.171, 0.296)
"""Of the signals, in their order, by `benchmarks/judge.py` over all its settings."""
OFFSET = -0.055
SPREAD = 0.27
"""Nine of ten settings of a domain that was left out have an AP within this of the estimate."""
TRUSTED = 0.33
"""Networks with a lower estimate are not to be trusted."""


@dataclass(frozen=True)
class Quality:
    """Expected AP at an IoU of 0.5, and an interval that holds it in nine of ten cases.

    All are NaN where nothing can be said: the adapter cannot decode, or nothing was found.
    """

    ap: float
    low: float
    high: float

    def __str__(self) -> str:
        if math.isnan(self.ap):
            return "unknown"
        return f"{self.ap:.2f} ({self.low:.2f} to {self.high:.2f})"

    @property
    def trusted(self) -> bool:
        """Whether enough speaks for what the network finds."""
        return self.ap >= TRUSTED

    @property
    def verdict(self) -> str:
        """The same as a sentence."""
        if self.trusted:
            return "the network works on these images; look at some results all the same."
        if math.isnan(self.ap):
            return "not to be trusted: the network finds nothing here. Check scale and polarity."
        return (
            "not to be trusted: what it finds changes with scale, contrast and direction. Check "
            "scale and polarity (dark or bright objects), or take another network."
        )

    def to_dict(self) -> dict[str, float | bool | None]:
        """For a file; what is not a number becomes null."""
        numbers = {"ap50": self.ap, "low": self.low, "high": self.high}
        rounded = {k: None if math.isnan(v) else round(v, 4) for k, v in numbers.items()}
        return {**rounded, "trusted": self.trusted}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """From `to_dict`."""
        numbers = (data[name] for name in ("ap50", "low", "high"))
        return cls(*(math.nan if each is None else each for each in numbers))


def signals(look: Look) -> list[float]:
    """AP of a network's instances against those in turned, scaled and faded copies.

    Each at an IoU of 0.5 and 0.8, in this order; NaN where nothing was found.
    """
    # heads that allow no copy are judged by other scales alone
    turned = look.turned if look.turned.any() else look.scaled
    kinds = (turned, look.scaled, look.faded)
    return [pooled(counts).ap for kind in kinds for counts in kind]


def estimate(look: Look) -> Quality:
    """Expected AP of the network that was looked at: a weighted sum of its `signals`."""
    value = OFFSET + float(np.dot(WEIGHTS, signals(look)))
    if math.isnan(value):
        return Quality(math.nan, math.nan, math.nan)
    value = min(max(value, 0.0), 1.0)
    return Quality(value, max(value - SPREAD, 0.0), min(value + SPREAD, 1.0))
