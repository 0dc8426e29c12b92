"""How far the judge can be left alone: every threshold from other domains than it is scored on.

    python benchmarks/judge.py --looks benchmarks/results/judge.jsonl [--docs docs] [--constants]

Reads what `judge_looks.py` has written. For each domain in turn, the weights of the estimate and
the thresholds of the decision come from the settings of all other domains and are scored on that
one. `--constants` prints what all domains together give: the library's defaults.
"""

import argparse
import json
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import cache
from itertools import combinations, product
from pathlib import Path
from typing import Any

import numpy as np
from common import fill, table
from numpy.typing import NDArray
from scipy.stats import spearmanr
from settings import LOOKED_AT

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
            f"{self.harm_accepted} of {self.harmful} ({_share(self.harm_accepted, self.harmful)})",
            f"{self.worst:+.1%}",
            f"{self.help_accepted} of {self.helpful} ({_share(self.help_accepted, self.helpful)})",
            f"{self.gain:.0%}",
        ]


def _share(part: float, whole: float) -> str:
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


# --- tables --------------------------------------------------------------------------------------


def left_out(settings: Sequence[Setting], only: str = "") -> tuple[Array, Array]:
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


def estimate_table(settings: Sequence[Setting]) -> str:
    estimates, trusted = left_out(settings)
    ap = np.array([each.ap for each in settings])
    rows = []
    domains = sorted({each.domain for each in settings})
    for name in [*domains, "all"]:
        these = np.array([name in (each.domain, "all") for each in settings])
        garbage, good = these & (ap < GARBAGE), these & (ap > GOOD)
        wrong = np.abs(estimates - ap)[these]
        rho = spearmanr(estimates[these], ap[these]).statistic
        rows.append(
            [
                name if name != "all" else "**all, each without its domain**",
                str(these.sum()),
                f"{rho:.2f}",
                f"{wrong.mean():.2f}",
                f"{np.quantile(wrong, 0.9):.2f}",
                f"{(~trusted & garbage).sum()} of {garbage.sum()} "
                f"({_share((~trusted & garbage).sum(), garbage.sum())})",
                f"{(~trusted & good).sum()} of {good.sum()} "
                f"({_share((~trusted & good).sum(), good.sum())})",
            ]
        )
    head = [
        "domain", "settings", "rank correlation", "mean error", "90 % below",
        "AP < 0.1 refused", "AP > 0.5 refused",
    ]  # fmt: skip
    return table(head, rows)


def anchor_table(settings: Sequence[Setting], path: Path) -> str:
    """Rank correlation with AP of the estimate and of published ones, where each is defined."""
    lines = {line["file"].removesuffix(".npz"): line for line in map(json.loads, path.open())}
    estimates, _ = left_out(settings)
    ap = np.array([each.ap for each in settings])
    rows = []
    for name, key in (("CTE", "cte"), ("CTE, contrast alone", "cte_contrast"), ("CSE", "cse")):
        values = np.array(
            [lines.get(s.name, {}).get(key) for s in settings], dtype=float
        )  # None becomes NaN
        there = np.isfinite(values)
        theirs = spearmanr(values[there], ap[there]).statistic
        ours = spearmanr(estimates[there], ap[there]).statistic
        rows.append([name, str(there.sum()), f"{theirs:.2f}", f"{ours:.2f}"])
    return table(["estimate", "settings", "rank correlation", "ours on these"], rows)


def asked_elsewhere(these: Sequence[Change]) -> dict[str, Thresholds]:
    """For each domain the thresholds that all others choose."""
    accepted = cache(Change.accepted)
    domains = sorted({c.setting.domain for c in these})
    return {
        domain: choose([c for c in these if c.setting.domain != domain], accepted)
        for domain in domains
    }


def decision_table(settings: Sequence[Setting], elsewhere: Mapping[str, Thresholds]) -> str:
    these = changes(settings)
    rows, taken = [], dict[str, bool]()
    for domain, asked in elsewhere.items():
        here = [c for c in these if c.setting.domain == domain]
        kept = [c.accepted(asked) for c in here]
        taken |= {c.setting.name: each for c, each in zip(here, kept, strict=True)}
        told = f"{asked.risk}, {asked.missed}, {asked.added}"
        rows.append([domain, str(len(here)), told, *score(here, kept).cells()])
    total = score(these, [taken[c.setting.name] for c in these]).cells()
    rows.append(["**all, each without its domain**", str(len(these)), "", *total])
    shipped = score(these, [c.accepted(Thresholds()) for c in these]).cells()
    rows.append(["shipped, nothing left out", str(len(these)), "", *shipped])
    head = [
        "domain", "changes", "risk, missed, added", "harmful accepted", "worst accepted",
        "helpful accepted", "gain kept",
    ]  # fmt: skip
    return table(head, rows)


def few_windows(settings: Sequence[Setting], elsewhere: Mapping[str, Thresholds]) -> str:
    """What the judge keeps where it has fewer windows to look at, each domain without itself.

    All choices of some of the windows of a setting; the size of instances stays that of all.
    """
    these = changes(settings)
    rows = []
    for number in range(1, LOOKED_AT + 1):
        seen = [_seen(c, of) for c in these for of in combinations(range(LOOKED_AT), number)]
        kept = [c.accepted(elsewhere[c.setting.domain]) for c in seen]
        cells = score(seen, kept).cells()
        rows.append([str(number), *cells[:3]])
    return table(["windows", "harmful accepted", "worst accepted", "helpful accepted"], rows)


def _seen(change: Change, windows: Sequence[int]) -> Change:
    """The same, looked at in some windows only."""

    def only(setting: Setting) -> Setting:
        look = setting.look
        parts = np.arange(len(look.count)).reshape(LOOKED_AT, -1)[list(windows)].ravel()
        counts = {name: getattr(look, name)[:, parts] for name in ("turned", "scaled", "faded")}
        counts |= {name: getattr(look, name)[parts] for name in ("first", "count")}
        return replace(setting, look=replace(look, **counts))

    return Change(only(change.setting), only(change.first))


def trade_off(settings: Sequence[Setting]) -> str:
    """The ROC of the decision: harm against help, by the risk that is run."""
    these = changes(settings)
    rows = []
    for risk, added in product((0.02, 0.05, 0.1, 0.15, 0.25, 0.35, 0.5), (0.2, 0.4, 1.0)):
        asked = Thresholds(risk=risk, added=added)
        cells = score(these, [c.accepted(asked) for c in these]).cells()
        rows.append([f"{risk}", f"{added}", *cells])
    head = ["risk", "added", "harmful accepted", "worst", "helpful accepted", "gain kept"]
    return table(head, rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--looks", type=Path, required=True)
    parser.add_argument("--anchors", type=Path, help="what anchors.py has written")
    parser.add_argument("--docs", type=Path, help="folder whose evidence.md gets the tables")
    parser.add_argument("--constants", action="store_true")
    args = parser.parse_args()
    settings = read(args.looks)
    elsewhere = asked_elsewhere(changes(settings))
    tables = {
        "judge-estimate": estimate_table(settings),
        "judge-decision": decision_table(settings, elsewhere),
        "judge-trade-off": trade_off(settings),
        "judge-few-windows": few_windows(settings, elsewhere),
    }
    if args.anchors:
        tables["judge-anchors"] = anchor_table(settings, args.anchors)
    for name, text in tables.items():
        print(f"\n{name}\n{text}")
    fill(args.docs, tables)
    if args.constants:
        weights = fit(settings)
        estimates = predicted(settings, weights)
        wrong = np.abs(left_out(settings)[0] - np.array([each.ap for each in settings]))
        print(f"\nWEIGHTS = {tuple(weights[:-1].round(3).tolist())}, OFFSET = {weights[-1]:.3f}")
        print(f"SPREAD = {np.quantile(wrong, 0.9):.2f}")
        print(f"TRUSTED = {trust_threshold(settings, estimates):.2f}")
        print(choose(changes(settings), cache(Change.accepted)))


if __name__ == "__main__":
    main()
