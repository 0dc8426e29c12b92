"""How far the judge can be left alone: every threshold from other domains than it is scored on.

    python benchmarks/judge.py --looks benchmarks/results/judge.jsonl [--docs docs] [--constants]

Reads what `judge_looks.py` has written. For each domain in turn, the weights of the estimate and
the thresholds of the decision come from the settings of all other domains and are scored on that
one. `--constants` prints what all domains together give: the library's defaults.
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cache
from itertools import combinations, product
from pathlib import Path

import numpy as np
from common import fill, table
from judge_rules import (
    GARBAGE,
    GOOD,
    Change,
    Setting,
    asked_elsewhere,
    changes,
    choose,
    fit,
    left_out,
    predicted,
    read,
    score,
    share,
    trust_threshold,
)
from scipy.stats import spearmanr
from settings import LOOKED_AT

from selfadapt import Thresholds


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
                f"({share((~trusted & garbage).sum(), garbage.sum())})",
                f"{(~trusted & good).sum()} of {good.sum()} "
                f"({share((~trusted & good).sum(), good.sum())})",
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
    """What the judge would keep with fewer windows to look at, each domain without itself.

    For that it is told that one is enough. All choices of some of the windows of a setting; the size of instances stays that of all.
    """
    these = changes(settings)
    rows = []
    for number in range(1, LOOKED_AT + 1):
        seen = [_seen(c, of) for c in these for of in combinations(range(LOOKED_AT), number)]
        kept = [c.accepted(replace(elsewhere[c.setting.domain], windows=1)) for c in seen]
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
