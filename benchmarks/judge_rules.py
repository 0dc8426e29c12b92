"""The estimate and the decision of `judge.py`, and how their numbers are chosen from settings.

Weights of the estimate by ridge regression on AP, thresholds of the decision from a few options.
`left_out` and `asked_elsewhere` give each domain what all others choose.
"""

import json
import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from selfadapt import Look, Matches, Thresholds
from selfadapt._quality import signals
from selfadapt._verdict import objection, unconfirmed

RIDGE = 1.0
HARM, HELP = -0.01, 0.03
"""Relative changes of AP from which a change harms, or helps."""
GARBAGE, GOOD = 0.1, 0.5
REFUSED = 0.05
"""Share of good networks that may be refused."""
WORST = -0.05
Array = NDArray[Any]

OPTIONS = [
    Thresholds(risk=risk, missed=missed, added=added)
    for risk, missed, added in product(
        (0.02, 0.05, 0.1, 0.15, 0.25, 0.35), (0.15, 0.3, 1.0), (0.1, 0.2, 0.3, 0.4, 1.0)
    )
]


@dataclass(frozen=True)
class Setting:
    """One line of the looks."""

    name: str
    network: str
    domain: str
    base: str
    state: str
    truth: Matches
    look: Look

    @property
    def ap(self) -> float:
        """0 where nothing was found and something was there."""
        return 0.0 if math.isnan(self.truth.ap) else self.truth.ap


def read(path: Path) -> list[Setting]:
    settings = []
    for line in map(json.loads, path.read_text().splitlines()):
        facts = {item.name: line[item.name] for item in fields(Setting) if item.name in line}
        facts |= {"truth": Matches(*line["truth"]), "look": Look.from_dict(line["look"])}
        settings.append(Setting(**facts))
    return settings


# --- the estimate --------------------------------------------------------------------------------


def features(settings: Sequence[Setting]) -> Array:
    return np.nan_to_num(np.array([signals(each.look) for each in settings]))


def weigh(settings: Sequence[Setting]) -> Array:
    """A pair of network and domain with many states counts by the root of their number."""
    counts = Counter((each.network, each.domain) for each in settings)
    return np.array([counts[each.network, each.domain] ** -0.5 for each in settings])


def fit(settings: Sequence[Setting]) -> Array:
    """Weights of the signals and the offset, by ridge regression on AP."""
    x, y, w = features(settings), np.array([s.ap for s in settings]), weigh(settings)
    mean, spread = x.mean(0), x.std(0) + 1e-9
    a = np.c_[(x - mean) / spread, np.ones(len(x))]
    penalty = RIDGE * np.eye(a.shape[1])
    penalty[-1, -1] = 0
    solved = np.linalg.solve(a.T @ (w[:, None] * a) + penalty, a.T @ (w * y))
    weights = solved[:-1] / spread
    return np.append(weights, solved[-1] - weights @ mean)


def predicted(settings: Sequence[Setting], weights: Array) -> Array:
    return np.clip(features(settings) @ weights[:-1] + weights[-1], 0, 1)


def trust_threshold(settings: Sequence[Setting], estimates: Array) -> float:
    """The highest that refuses no more than 5 % of the good networks."""
    good = estimates[np.array([each.ap > GOOD for each in settings])]
    return float(np.quantile(good, REFUSED)) if len(good) else 0.0


def left_out(settings: Sequence[Setting]) -> tuple[Array, Array]:
    """Estimate of each setting, and whether it is trusted, without its domain."""
    estimates, trusted = np.zeros(len(settings)), np.zeros(len(settings), bool)
    for domain in sorted({each.domain for each in settings}):
        others = [each for each in settings if each.domain != domain]
        here = [k for k, each in enumerate(settings) if each.domain == domain]
        weights = fit(others)
        limit = trust_threshold(others, predicted(others, weights))
        estimates[here] = predicted([settings[k] for k in here], weights)
        found = np.array([settings[k].look.count.sum() > 0 for k in here])
        trusted[here] = (estimates[here] >= limit) & found
    return estimates, trusted


# --- the decision --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Change:
    """A network made out of another one, on the same images."""

    setting: Setting
    first: Setting

    @property
    def gain(self) -> float:
        """Relative change of AP; of nearly nothing, relative to 0.05."""
        return (self.setting.ap - self.first.ap) / max(self.first.ap, 0.05)

    def accepted(self, asked: Thresholds) -> bool:
        first, look = self.first.look, self.setting.look
        return (objection(first, look, asked) or unconfirmed(first, look)) is None


def changes(settings: Sequence[Setting]) -> list[Change]:
    by_name = {each.name: each for each in settings}
    return [Change(s, by_name[s.base]) for s in settings if s.base in by_name]


@dataclass(frozen=True)
class Score:
    """What a rule does with changes."""

    harmful: int
    harm_accepted: int
    helpful: int
    help_accepted: int
    worst: float
    gain: float
    """Share of the gain of all helpful changes that is kept."""

    @property
    def safe(self) -> bool:
        return self.harm_accepted <= 0.01 * self.harmful and self.worst >= WORST

    def cells(self) -> list[str]:
        return [
            f"{self.harm_accepted} of {self.harmful} ({share(self.harm_accepted, self.harmful)})",
            f"{self.worst:+.1%}",
            f"{self.help_accepted} of {self.helpful} ({share(self.help_accepted, self.helpful)})",
            f"{self.gain:.0%}",
        ]


def share(part: float, whole: float) -> str:
    return f"{part / whole:.1%}" if whole else "-"


def score(these: Sequence[Change], accepted: Sequence[bool]) -> Score:
    gain, taken = np.array([c.gain for c in these]), np.array(accepted, bool)
    harmful = gain < HARM
    helpful = (gain > HELP) & (np.array([c.setting.ap for c in these]) > GARBAGE)
    capped = np.clip(gain, 0, 1)
    return Score(
        int(harmful.sum()),
        int((harmful & taken).sum()),
        int(helpful.sum()),
        int((helpful & taken).sum()),
        float(gain[taken].min(initial=0)),
        float(capped[helpful & taken].sum() / max(capped[helpful].sum(), 1e-9)),
    )


def choose(these: Sequence[Change], accepted: Callable[[Change, Thresholds], bool]) -> Thresholds:
    """Of the options that are safe, the one that keeps most; else the one that harms least."""
    scores = {o: score(these, [accepted(c, o) for c in these]) for o in OPTIONS}
    safe = [o for o in OPTIONS if scores[o].safe]
    if safe:
        return max(safe, key=lambda o: (scores[o].help_accepted, scores[o].gain, -o.risk))
    return min(OPTIONS, key=lambda o: (scores[o].harm_accepted, -scores[o].worst, o.risk))


def asked_elsewhere(these: Sequence[Change]) -> dict[str, Thresholds]:
    """For each domain the thresholds that all others choose."""
    accepted = cache(Change.accepted)
    domains = sorted({c.setting.domain for c in these})
    return {
        domain: choose([c for c in these if c.setting.domain != domain], accepted)
        for domain in domains
    }
