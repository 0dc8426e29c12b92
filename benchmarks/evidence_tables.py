"""The tables of `docs/evidence.md`, from cells that `evidence_cells.read` has read."""

from collections import defaultdict
from collections.abc import Sequence
from itertools import chain, product

import numpy as np
from common import Agreement, table
from evidence import BASELINES, NETWORKS, SETTINGS, STATISTICS
from evidence_cells import (
    AGREEMENT,
    EXPORT,
    IOUS,
    OTHER,
    PAPER,
    SHIFT,
    SHIFTED,
    TARGET,
    WITHOUT_PHOTONS,
    Cells,
    Runs,
    ap,
    base,
    best,
    gain,
    last,
    looks,
    mean_ap,
    mean_cut,
    measured,
)
from pairs import PAIRS

COMPONENTS = ("no masks", "no teacher TTA", "no L2-SP", "no augmentation")
THRESHOLDS = (0.005, 0.01, 0.02, 0.03, 0.04, 0.05, 0.06, 0.08)
HARM, GAIN = 0.01, 0.05
"""Relative AP that counts as harm, and from which on a pair has something to gain."""
SAME = 0.005
"""Change of AP up to which a look counts as the same as the first."""
KEPT = ap(AGREEMENT)


def cell(values: Sequence[float]) -> str:
    spread = f" ± {np.std(values, ddof=1):.3f}" if len(values) > 1 else ""
    return f"{np.mean(values):.3f}{spread}" if values else ""


def trained_statistics(cells: Cells, pair: str) -> Runs:
    """Runs that start from trained batch-norm statistics, as with other criteria or with none.

    Those of the default, but where it has taken statistics of the images.
    """
    default = cells[pair, "default"].items()
    same = {s: rows for s, rows in default if not rows[0]["teacher"].get("target_statistics")}
    return cells.get((pair, "batch norm of the source"), {}) | same


def stops(cells: Cells, network: str) -> str:
    """Base, what each criterion keeps, last and best look, for every pair (Table 1 in kind)."""
    other = {**{name: ap(stop) for name, stop in PAPER.items()}, "last": last}
    rows, gains = [], {}
    for name, runs in measured(cells).items():
        plain = trained_statistics(cells, name)
        columns = [(runs, KEPT), *((plain, pick) for pick in other.values()), (runs, best)]
        values = [[pick(looks(r, network)) for r in each.values()] for each, pick in columns]
        values = [[value for value in each if np.isfinite(value)] for each in values]
        figures = [cell(each) for each in values]
        rows.append([name, SHIFT[name], str(len(runs)), f"{base(runs):.3f}", *figures])
        gains[name] = np.array([np.mean(v) / base(runs) - 1 if v else np.nan for v in values])
    shifted, others = (
        [g for n, g in gains.items() if n in names] for names in (SHIFTED, WITHOUT_PHOTONS)
    )
    able = [g / g[-1] for g in gains.values() if g[-1] > GAIN]
    for title, figures in (
        ("mean relative gain, shifted pairs", np.nanmean(shifted, 0)),
        ("the same, no pair above +100 %", np.nanmean(np.minimum(shifted, 1), 0)),
        ("mean relative gain, shifted pairs but photons", np.nanmean(others, 0)),
        ("median relative gain, shifted pairs", np.nanmedian(shifted, 0)),
        ("largest relative loss, all pairs", np.nanmin(list(gains.values()), 0)),
        (
            f"share of the best look's gain, {len(able)} pairs that can gain 5 %",
            np.nanmean(able, 0),
        ),
    ):
        rows.append([f"**{title}**", "", "", "", *(f"{x:+z.1%}" for x in figures)])
    return table(["pair", "shift", "seeds", "base", "kept by agreement", *other, "best"], rows)


def compared(cells: Cells) -> str:
    """The default beside baselines, which have no criterion: their last look."""
    names = [*BASELINES, "mean teacher"]
    rows, gains = [], defaultdict(list)
    for pair, runs in measured(cells).items():
        before, default = base(runs), mean_ap(runs, KEPT, EXPORT)
        row = [pair, f"{before:.3f}", f"{default:.3f}"]
        for name in names:
            if others := cells.get((pair, name)):
                network = "network" if name in BASELINES else "teacher"
                after = mean_ap(others, last, network)
                gains[name].append((pair, after / before - 1, default / before - 1))
            row.append(f"{after:.3f}" if others else "")
        rows.append(row)
    for title, pairs, how in (
        ("mean relative gain, shifted pairs, each at most +100 %", SHIFTED, mean_cut),
        ("mean relative gain, shifted pairs but photons", WITHOUT_PHOTONS, np.mean),
        ("median relative gain, shifted pairs", SHIFTED, np.median),
        ("largest relative loss, all pairs", set(SHIFT), np.min),
    ):
        both = [np.array([g for pair, *g in gains[n] if pair in pairs]) for n in names]
        for who, column in ((title, 0), ("the default's on the same pairs", 1)):
            figures = [f"{how(g[:, column]):+z.1%}" if len(g) else "" for g in both]
            rows.append([f"**{who}**", "", "", *figures])
    ahead = [[np.sign(round(after - default, 9)) for _, after, default in gains[n]] for n in names]
    wins = [f"{signs.count(1)} / {signs.count(-1)} of {len(signs)}" for signs in ahead]
    rows.append(["**pairs on which it ends higher / lower than the default**", "", "", *wins])
    return table(["pair", "base", "default, kept", *names], rows)


def components(cells: Cells) -> str:
    """Each component of the method off (Table 2 in kind)."""
    return _at_the_end(cells, COMPONENTS)


def settings(cells: Cells) -> str:
    """Other settings, and the other network exported."""
    shown_elsewhere = ("default", *COMPONENTS, "mean teacher")
    return _at_the_end(cells, [name for name in SETTINGS if name not in shown_elsewhere])


def _at_the_end(cells: Cells, names: Sequence[str]) -> str:
    """AP after the last iteration, over the seeds that all settings of the column share."""
    chosen = ["default", *(n for n in names if any(s == n for _, s in cells))]
    pairs = [p.name for p in PAIRS if sum((p.name, s) in cells for s in chosen) > 2]
    seeds = {
        pair: set.intersection(*(set(cells[pair, s]) for s in chosen if (pair, s) in cells))
        for pair in pairs
    }
    rows = [["no adaptation", *(f"{base(cells[n, 'default']):.3f}" for n in pairs)]]
    exports = [(name, name, EXPORT) for name in chosen]
    exports.insert(1, (f"default, {OTHER} exported", "default", OTHER))
    for title, name, network in exports:
        row = [title]
        for pair in pairs:
            every = cells.get((pair, name), {})
            row.append(cell([every[s][-1][network]["ap"] for s in sorted(seeds[pair]) if every]))
        rows.append(row)
    rows.append(["*seeds*", *(str(len(seeds[pair])) for pair in pairs)])
    return table(["setting", *pairs], rows)


def statistics(cells: Cells) -> str:
    """Agreement and AP before any step, with shares of the images' batch-norm statistics."""
    rows = []
    for pair in SHIFT:
        for seed, shares in cells.get((pair, STATISTICS), {}).items():
            figures = [
                f"{row['network'][name]:.3f}" for name in (AGREEMENT.name, "ap") for row in shares
            ]
            rows.append([pair, str(seed), *figures])
    of = ("trained", "half", "images")
    head = [f"{what}, {whose}" for what in ("agreement", "AP") for whose in of]
    return table(["pair", "seed", *head], rows)


OPTIONS = list(product(NETWORKS, IOUS, THRESHOLDS))
INDICES = range(len(OPTIONS))


def gains_by_option(cells: Cells) -> dict[str, list[float]]:
    """What every pair gains, by exported network, IoU and threshold."""
    return {
        name: [gain(runs, ap(Agreement(rise, iou)), network) for network, iou, rise in OPTIONS]
        for name, runs in measured(cells).items()
    }


def left_out(cells: Cells) -> str:
    """Which network, IoU and threshold to take, chosen on other pairs, or on other targets.

    Chosen is the largest mean gain over shifted pairs (each cut at +100 %, so that one does not
    decide alone) among the options that harm no pair by more than HARM, neither with their own
    threshold nor with the next lower one, which leaves a margin; where there is none, the one that
    harms least. Of equals the most careful.
    """
    gains = gains_by_option(cells)

    def chosen_on(names: Sequence[str]) -> int:
        worst = np.min([gains[n] for n in names], 0).reshape(-1, len(THRESHOLDS))
        worst = np.minimum(worst, np.hstack([worst[:, :1], worst[:, :-1]])).ravel()
        means = [mean_cut([gains[n][i] for n in names if n in SHIFTED]) for i in INDICES]
        value = np.where(worst >= -HARM, means, worst - 10).round(4)
        return max(INDICES, key=lambda i: (value[i], *OPTIONS[i][1:]))

    def result(name: str, option: int) -> tuple[str, float]:
        return ", ".join(map(str, OPTIONS[option])), gains[name][option]

    rows, results = [], {}
    for name in gains:
        without_pair = [other for other in gains if other != name]
        without_target = [other for other in gains if TARGET[other] != TARGET[name]]
        chosen = [result(name, chosen_on(others)) for others in (without_pair, without_target)]
        results[name] = [made for _, made in chosen]
        rows.append([name, *chain.from_iterable((what, f"{made:+z.1%}") for what, made in chosen)])
    everywhere = ", ".join(map(str, OPTIONS[chosen_on(list(gains))]))
    shifted = np.array([made for name, made in results.items() if name in SHIFTED])
    for title, figures in (
        ("mean, shifted pairs", [mean_cut(column) for column in shifted.T]),
        ("largest loss", np.min(list(results.values()), 0)),
    ):
        rows.append([f"**{title}**", *chain.from_iterable(("", f"{x:+z.1%}") for x in figures)])
    rows.append([f"**nothing left out: {everywhere}**", "", "", "", ""])
    head = ["judged", "chosen without the pair", "gain", "chosen without its target", "gain"]
    return table(head, rows)


def rises(cells: Cells) -> str:
    """How much better looks agree than the first one of their run, by what became of AP."""
    runs = [looks(rows) for seeds in measured(cells).values() for rows in seeds.values()]
    changes = [
        (now["ap"] - run[0]["ap"], now[AGREEMENT.name] - run[0][AGREEMENT.name])
        for run in runs
        for now in run[1:]
    ]
    rows = []
    for title, low, high in (
        (f"lost more than {SAME}", -np.inf, -SAME),
        ("about the same", -SAME, SAME),
        (f"gained more than {SAME}", SAME, np.inf),
    ):
        found = np.array([rise for gained, rise in changes if low < gained <= high])
        much = int(np.sum(found >= AGREEMENT.threshold))
        less = int(np.sum(found > 0)) - much
        rows.append([title, *map(str, (len(found), len(found) - less - much, less, much))])
    most = AGREEMENT.threshold
    return table(["AP", "looks", "not better", f"by less than {most}", f"by {most} or more"], rows)


def thresholds(cells: Cells) -> str:
    """Mean gain (cut at +100 %) over shifted pairs and largest loss of all, by option."""
    gains = gains_by_option(cells)
    rows = defaultdict(list)
    for index, (network, iou, _) in enumerate(OPTIONS):
        mean = mean_cut([g[index] for name, g in gains.items() if name in SHIFTED])
        rows[network, iou].append(f"{mean:+z.1%}, {min(g[index] for g in gains.values()):+z.1%}")
    head = ["export", "IoU", *map(str, THRESHOLDS)]
    return table(head, ([network, str(iou), *row] for (network, iou), row in rows.items()))
