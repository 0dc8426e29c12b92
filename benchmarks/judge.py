"""How far the judge can be left alone: every threshold from other domains than it is scored on.

    python benchmarks/judge.py --looks benchmarks/results/judge.jsonl [--docs docs] [--constants]

Reads what `judge_looks.py` has written. For each domain in turn, the weights of the estimate and
the thresholds of the decision come from the settings of all other domains and are scored on that
one; the column "chosen on it" says what was not. `--docs` also draws the ROC of the decision.
`--constants` prints what all domains together give: the library's defaults, but for the thresholds,
of which it ships a safer choice (docs/evidence.md).
"""

import argparse
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cache
from itertools import combinations, product
from pathlib import Path
from typing import Any

import numpy as np
from common import fill, read_lines, table
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
from matplotlib.figure import Figure
from scipy.stats import spearmanr
from settings import LOOKED_AT

from selfadapt import Thresholds
from selfadapt._verdict import rise

KINDS = {
    "shift": "logits shifted",
    "noise": "noise in the weights",
    "statistics": "batch-norm statistics replaced or corrupted",
    "run": "trained as by default",
    "bold": "trained with statistics of each batch",
    "too": "trained at fifteen times the rate",
}
"""Of changes, by the first word of a state (`states.py`)."""


def estimate_table(settings: Sequence[Setting]) -> str:
    estimates, trusted = left_out(settings)
    ap = np.array([each.ap for each in settings])
    of = np.array([each.domain for each in settings])
    groups = {domain: of == domain for domain in sorted(set(of.tolist()))}
    groups["**all, each without its domain**"] = np.ones(len(of), bool)
    groups["of these, networks as they stand"] = np.array([not each.state for each in settings])
    few = np.array([each.look.count.sum() < Thresholds().fewest for each in settings])
    groups["of these, with fewer than ten objects in the look"] = few
    rows = []
    for name, these in groups.items():
        garbage, good = these & (ap < GARBAGE), these & (ap > GOOD)
        wrong = np.abs(estimates - ap)[these]
        rows.append(
            [
                name,
                str(these.sum()),
                f"{spearmanr(estimates[these], ap[these]).statistic:.2f}",
                f"{wrong.mean():.2f}",
                f"{np.quantile(wrong, 0.9):.2f}",
                f"{(~trusted & garbage).sum()} of {garbage.sum()} "
                f"({share((~trusted & garbage).sum(), garbage.sum())})",
                f"{(~trusted & good).sum()} of {good.sum()} "
                f"({share((~trusted & good).sum(), good.sum())})",
                "which signals",
            ]
        )
    head = [
        "domain", "settings", "rank correlation", "mean error", "90 % below",
        "AP < 0.1 refused", "AP > 0.5 refused", "chosen on it",
    ]  # fmt: skip
    return table(head, rows)


def anchor_table(settings: Sequence[Setting], path: Path) -> str:
    """Rank correlation with AP of the estimate and of published ones, where each is defined."""
    lines = {line["file"].removesuffix(".npz"): line for line in read_lines(path)}
    estimates, _ = left_out(settings)
    ap = np.array([each.ap for each in settings])
    rows = []
    alone = {f"CTE, {name} alone": f"cte_{name}" for name in ("contrast", "noise", "dropout")}
    for name, key in {"CTE": "cte", **alone, "CSE": "cse"}.items():
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
    partly = "the other limits"
    rows, taken = [], dict[str, bool]()
    for domain, asked in elsewhere.items():
        here = [c for c in these if c.setting.domain == domain]
        kept = [c.accepted(asked) for c in here]
        taken |= {c.setting.name: each for c, each in zip(here, kept, strict=True)}
        told = f"{asked.risk}, {asked.missed}, {asked.added}"
        rows.append([domain, str(len(here)), told, *score(here, kept).cells(), partly])
    total = score(these, [taken[c.setting.name] for c in these]).cells()
    rows.append(["**all, each without its domain**", str(len(these)), "", *total, partly])
    shipped = score(these, [c.accepted(Thresholds()) for c in these]).cells()
    rows.append(["shipped, nothing left out", str(len(these)), "", *shipped, "all limits"])
    head = [
        "domain", "changes", "risk, missed, added", "harmful accepted", "worst accepted",
        "helpful accepted", "gain kept", "chosen on it",
    ]  # fmt: skip
    return table(head, rows)


def kinds_table(settings: Sequence[Setting], elsewhere: Mapping[str, Thresholds]) -> str:
    """The same decisions, by how a network was changed: shy ways and bold ones."""
    these = changes(settings)
    kinds = {word: [c for c in these if c.setting.state.startswith(word)] for word in KINDS}
    rows = []
    for word, of in kinds.items():
        kept = [c.accepted(elsewhere[c.setting.domain]) for c in of]
        rows.append([KINDS[word], str(len(of)), *score(of, kept).cells()])
    assert sum(map(len, kinds.values())) == len(these)
    head = [
        "change",
        "changes",
        "harmful accepted",
        "worst accepted",
        "helpful accepted",
        "gain kept",
    ]
    return table(head, rows)


def few_windows(settings: Sequence[Setting], elsewhere: Mapping[str, Thresholds]) -> str:
    """What the judge would keep with fewer windows to look at, each domain without itself.

    For that it is told that one is enough. All choices of some of the windows of a setting; the
    size of instances stays that of all.
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


# --- the picture -------------------------------------------------------------------------------


def draw(settings: Sequence[Setting], path: Path) -> None:
    """The ROC of single signals, by their rise alone, and of the decision by its thresholds."""
    these = changes(settings)

    def shares(accepted: Iterable[bool]) -> tuple[float, float]:
        got = score(these, list(accepted))
        return 100 * got.harm_accepted / got.harmful, 100 * got.help_accepted / got.helpful

    figure = Figure((9, 4), layout="constrained")
    whole, near = figure.subplots(1, 2)
    turned = [c.setting.look.agreement - c.first.look.agreement for c in these]
    scaled = [rise(c.first.look, c.setting.look)[0] for c in these]
    for name, rises in (("turned copies", turned), ("other scales", scaled)):
        limits = sorted({*np.nan_to_num(rises, nan=-9).tolist(), 9})
        points = [shares(each >= least for each in rises) for least in limits]
        whole.plot(*zip(*points, strict=True), label=f"{name} agree better, nothing else asked")
    risks = (0.001, 0.005, 0.01, 0.02, 0.05, 0.1, 0.15, 0.2, 0.25, 0.35, 0.5)
    for added, line in ((0.2, "-"), (0.4, "--"), (1.0, ":")):
        asked = [Thresholds(risk=risk, added=added) for risk in risks]
        points = [shares(c.accepted(each) for c in these) for each in asked]
        for axes in (whole, near):
            told = f"the judge, added {added}, risk to 0.5"
            axes.plot(*zip(*points, strict=True), f"k{line}", label=told)
    shipped = shares(c.accepted(Thresholds()) for c in these)
    for axes in (whole, near):
        axes.plot(*shipped, "r*", markersize=12, label="shipped")
        axes.set(xlabel="harmful changes accepted (%)", ylabel="helpful changes accepted (%)")
    near.set(xlim=(-0.1, 2), ylim=(0, 60), title="the safe end")
    whole.legend(fontsize="x-small")
    figure.savefig(path, dpi=120)


def made(looks: Path, anchors: Path | None) -> dict[str, str]:
    """All tables, by their name in docs/evidence.md."""
    settings = read(looks)
    elsewhere = asked_elsewhere(changes(settings))
    tables = {
        "judge-estimate": estimate_table(settings),
        "judge-decision": decision_table(settings, elsewhere),
        "judge-kinds": kinds_table(settings, elsewhere),
        "judge-trade-off": trade_off(settings),
        "judge-few-windows": few_windows(settings, elsewhere),
    }
    return tables | ({"judge-anchors": anchor_table(settings, anchors)} if anchors else {})


def constants(settings: Sequence[Setting]) -> dict[str, Any]:
    """Of `_quality.py`, and the thresholds of `_verdict.py` that these settings would choose."""
    weights = fit(settings)
    wrong = np.abs(left_out(settings)[0] - np.array([each.ap for each in settings]))
    return {
        "WEIGHTS": tuple(weights[:-1].round(3).tolist()),
        "OFFSET": round(float(weights[-1]), 3),
        "SPREAD": round(float(np.quantile(wrong, 0.9)), 2),
        "TRUSTED": round(trust_threshold(settings, predicted(settings, weights)), 2),
        "Thresholds": choose(changes(settings), cache(Change.accepted)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--looks", type=Path, required=True)
    parser.add_argument("--anchors", type=Path, help="what anchors.py has written")
    parser.add_argument("--docs", type=Path, help="folder whose evidence.md gets the tables")
    parser.add_argument("--constants", action="store_true")
    args = parser.parse_args()
    tables = made(args.looks, args.anchors)
    for name, text in tables.items():
        print(f"\n{name}\n{text}")
    fill(args.docs, tables)
    if args.docs:
        draw(read(args.looks), args.docs / "images" / "judge-roc.png")
    if args.constants:
        for name, value in constants(read(args.looks)).items():
            print(f"{name} = {value}")


if __name__ == "__main__":
    main()
