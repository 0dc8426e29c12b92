"""One decision over all candidates: pure functions of looks."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from selfadapt._errors import ConfigError
from selfadapt._look import Look
from selfadapt._quality import Quality, estimate
from selfadapt._signals import Counts, by_window

Outcome = Literal["improved", "initial kept", "not to be trusted", "not judged better"]
"""What a run ends with; the last only where another criterion than the judge has decided."""


@dataclass(frozen=True, kw_only=True)
class Thresholds:
    """What is asked of a network that is to take the place of the first one.

    The defaults are the safe end of what `benchmarks/judge.py` measured (docs/evidence.md).

    Args:
        rise: least rise of the stability under other scales, whatever its error.
        risk: of a one-sided test of the rise against its error, divided by the number of
            candidates; the other demands come on top.
        matches: least rise in numbers: instances of copies that match and did not before.
        floor: least stability.
        fall: by so much the agreement of turned copies may fall.
        missed: largest FN rate against the first network.
        added: largest share of objects that the first network has not found: of those that training
            had added on H&E nearly all were false.
        ratio: the median size of instances changes by no more than this factor.
        reference: these three hold if the first network has at least this stability itself.
        windows: with objects in fewer windows than this nothing is kept: what helps in one or two
            may harm elsewhere.
        fewest: fewer objects cannot be judged; where the first network is no reference, fewer in
            a window on average (a network that draws one thing in each is stable, too).

    Raises:
        ConfigError: a value is out of range.
    """

    rise: float = 0.02
    risk: float = 0.15
    matches: int = 4
    floor: float = 0.6
    fall: float = 0.03
    missed: float = 0.3
    added: float = 0.2
    ratio: float = 1.5
    reference: float = 0.5
    windows: int = 4
    fewest: int = 10

    def __post_init__(self) -> None:
        least = min(self.fewest, self.windows)
        shares = 0 <= self.missed <= 1 and 0 <= self.added <= 1
        if not (0 < self.risk < 1 and shares and self.ratio >= 1 and least >= 1):
            raise ConfigError(
                f"{self} is not allowed: risk lies between 0 and 1, missed and added from 0 to 1, "
                "ratio, windows and fewest are 1 or more."
            )


@dataclass(frozen=True)
class Verdict:
    """What `Judge.decide` says.

    Attributes:
        outcome: one of the first three words of `Outcome`.
        chosen: index of the look that is kept; None for the first network.
        reason: why, one sentence.
        quality: the AP to be expected of what is kept, with an interval.
    """

    outcome: Outcome
    chosen: int | None
    reason: str
    quality: Quality


def decide(
    first: Look,
    others: Sequence[Look],
    asked: Thresholds = Thresholds(),
    tried: int | None = None,
    loops: Sequence[str] | None = None,
) -> Verdict:
    """See `Judge.decide`."""
    first_quality = estimate(first)
    count = max(tried or 0, len(others))
    objections = [objection(first, look, asked, count) for look in others]
    able = [k for k, wrong in enumerate(objections) if wrong is None]
    if loops is not None:  # of each, its latest
        able = list({loops[k]: k for k in able}.values())
    # chosen on one half of the places, confirmed on the other: the best of several is flattered
    able.sort(key=lambda k: -rise(first, others[k], half=0)[0])
    for best in able:
        wrong = unconfirmed(first, others[best])
        if wrong is None:
            before = f"{first.stability:.2f}" if first.count.any() else "nothing found"
            found = (
                "what it finds is more stable under other scales than before "
                f"({before} -> {others[best].stability:.2f})"
            )
            return Verdict("improved", best, found, estimate(others[best]))
        objections[best] = wrong
    if not first_quality.trusted:
        sentence = first_quality.verdict.removeprefix("not to be trusted: ").removesuffix(".")
        return Verdict("not to be trusted", None, sentence, first_quality)
    told = ""
    if objections:
        told = f": of the most promising one, {objections[order(first, others, asked)[0]]}"
    return Verdict("initial kept", None, f"no candidate is surely better{told}", first_quality)


def objection(first: Look, look: Look, asked: Thresholds, candidates: int = 1) -> str | None:
    """Why a network must not take the place of the first one; None if nothing speaks against it.

    Args:
        first: the look at the first network.
        look: the look at the candidate.
        asked: all thresholds.
        candidates: how many there are: the more, the more must be asked of each.
    """
    if wrong := veto(first, look, asked):
        return wrong
    gain, error = rise(first, look)
    needed = max(
        asked.rise,
        asked.matches / int(look.scaled[0].sum()),
        NormalDist().inv_cdf(1 - asked.risk / candidates) * error,
    )
    if not gain >= needed:
        return f"its stability changes by {gain:+.3f}, and {needed:+.3f} is needed"
    return None


def unconfirmed(first: Look, look: Look) -> str | None:
    """Why a network that nothing else speaks against is not kept; None if its gain is confirmed."""
    if rise(first, look, half=1)[0] > 0:
        return None
    return "its gain is not there in the other half of the objects"


def veto(first: Look, look: Look, asked: Thresholds) -> str | None:
    """What speaks against a network, whatever its stability has gained."""
    now = int(look.count.sum())
    if not look.finite:
        return "it is not finite"
    if now < asked.fewest:
        return f"it finds {now} objects, too few to be judged"
    windows = int((by_window(look.count) > 0).sum())  # NumPy's own numbers repeat no text
    if windows < asked.windows:
        return (
            f"it was seen in {windows} window{'s' * (windows != 1)} with objects, and "
            f"{asked.windows} are needed: give more or larger images, or more of them for "
            "validation"
        )
    if not look.stability >= asked.floor:
        return f"its stability of {look.stability:.2f} is below {asked.floor}"
    if not estimate(look).trusted:
        return "it is not to be trusted itself"
    # where the first network is no reference, its instances are none either
    if first.stability >= asked.reference:
        if look.missed > asked.missed:
            return f"it misses {look.missed:.0%} of the objects found before"
        if not look.added <= asked.added:
            return f"{look.added:.0%} of what it finds was not found before"
        if not 1 / asked.ratio <= look.size / first.size <= asked.ratio:
            return f"its objects are {look.size / first.size:.2g} times as large"
    elif now < asked.fewest * windows:
        return (
            f"it finds {now} objects in {windows} windows, too few where the first network finds "
            "nothing stable to compare them with"
        )
    if look.agreement < first.agreement - asked.fall:
        return f"flipped and turned copies agree less ({look.agreement:.2f})"
    return None


def order(first: Look, others: Sequence[Look], asked: Thresholds = Thresholds()) -> list[int]:
    """The most promising first: nothing speaks against it, and its stability rises most."""

    def key(k: int) -> tuple[bool, float]:
        return veto(first, others[k], asked) is not None, -rise(first, others[k])[0]

    return sorted(range(len(others)), key=key)


def rise(first: Look, look: Look, half: int | None = None) -> tuple[float, float]:
    """By how much a network is more stable under other scales than the first, and its error.

    Places in which it finds nothing any more, and the first network did, count as disagreement;
    where that found nothing at all, its stability is 0. The standard error is that of a jackknife
    over the places, paired: both networks see the same.

    Args:
        first: the look at the first network.
        look: the look at the candidate.
        half: every other place only, from this one on.
    """
    if not len(look.count):  # the adapter cannot decode: nothing is known
        return 0.0, math.inf
    before, now = first.scaled[0].copy(), look.scaled[0].copy()
    lost = (look.count == 0) & (first.count > 0)
    now[lost, 2] += 2 * first.count[lost]
    if half is not None:
        before, now = before[half::2], now[half::2]

    def difference(a: Counts, b: Counts) -> NDArray[np.float64]:
        after, earlier = (c[..., 0] / np.maximum(c.sum(-1), 1) for c in (b, a))
        return np.asarray(after - earlier, np.float64)

    total_before, total_now = before.sum(0), now.sum(0)
    gain = float(difference(total_before, total_now))
    without = difference(total_before - before, total_now - now)
    n = len(without)
    return gain, math.sqrt((n - 1) / n * float(((without - without.mean()) ** 2).sum()))
