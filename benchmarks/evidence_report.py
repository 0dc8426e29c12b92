"""Tables and curves of `benchmarks/results/evidence.jsonl`.

    python benchmarks/evidence_report.py --cells benchmarks/results/evidence.jsonl --docs docs

Draws `docs/images/evidence.png` and `docs/images/gain.png`, and renews the tables of
`docs/evidence.md`, each between `<!-- NAME -->` and `<!-- end -->`. All are of the exported
network unless said otherwise, and of the criterion of that time, `common.Agreement`.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import evidence_tables as tables
import matplotlib.pyplot as plt
import numpy as np
from common import filled
from evidence import NETWORKS
from evidence_cells import (
    AGREEMENT,
    BATCH,
    CROP,
    EXPORT,
    OTHER,
    PAPER,
    SHIFTED,
    VIEWS,
    Cells,
    Look,
    base,
    looks,
    measured,
    read,
)

CURVES = {
    "ap": "AP",
    AGREEMENT.name: "agreement",
    "d_emb": "D_emb",
    "fn_rate": "FN rate",
    "instances": "instances / initial",
    "doubt": "doubt / initial",
}


def relative_doubt(run: Sequence[Look]) -> list[float]:
    """Mean over heads of the spread between views (for a classification its uncertainty)."""
    names = [key for key in run[0] if key.startswith("doubt_")]
    ratios = [[look[n] / run[0][n] for look in run] for n in names if run[0][n] > 0]
    return list(np.mean(ratios, 0))


def curves(cells: Cells, file: Path) -> None:
    """After the paper's Fig. 2: one row a pair, mean over seeds."""
    pairs = measured(cells)
    figure, axes = plt.subplots(
        len(pairs), len(CURVES), figsize=(12, 1.3 * len(pairs)), sharex=True, squeeze=False
    )
    for row, (name, every) in enumerate(pairs.items()):
        runs = [looks(rows) for rows in every.values()]
        for column, (key, label) in enumerate(CURVES.items()):
            axis = axes[row, column]
            values = [
                relative_doubt(run) if key == "doubt" else [look[key] for look in run]
                for run in runs
            ]
            axis.plot([look["iteration"] for look in runs[0]], np.mean(values, 0))
            for color, stop in zip(("tab:red", "tab:orange"), PAPER.values(), strict=True):
                if stop.name == key:
                    axis.axhline(stop.threshold, color="gray", linewidth=0.8, linestyle=":")
                if key == "ap" and np.isfinite(runs[0][-1][stop.name]):
                    mean = np.mean([stop.choose(run) for run in runs])
                    axis.axvline(mean, color=color, linewidth=0.8, linestyle="--")
            chosen = np.mean([AGREEMENT.choose(run) for run in runs])
            axis.axvline(chosen, color="black", linewidth=0.8)
            if row == 0:
                axis.set_title(label)
            if row == len(pairs) - 1:
                axis.set_xlabel("iteration")
        axes[row, 0].set_ylabel(name.replace(" to ", "\nto "), fontsize=8)
    figure.tight_layout()
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=80)


def gain_by_cost(cells: Cells, file: Path) -> None:
    """Mean relative gain over shifted pairs against forward passes of a crop."""
    figure, axis = plt.subplots(figsize=(5, 3.2))
    pairs = {name: runs for name, runs in measured(cells).items() if name in SHIFTED}
    at = [row["iteration"] for row in next(iter(next(iter(pairs.values())).values()))]
    passes = np.array(at) * BATCH * (VIEWS + 1)
    for network in NETWORKS:
        gains = np.array([
            np.mean([[row[network]["ap"] for row in rows] for rows in runs.values()], 0)
            / base(runs)
            for runs in pairs.values()
        ]) - 1  # fmt: skip
        axis.plot(passes, 100 * gains.mean(0), label=f"{network}, mean")
        axis.plot(passes, 100 * np.median(gains, 0), "--", label=f"{network}, median")
    axis.set(xlabel=f"forward passes of a {CROP} x {CROP} crop", ylabel="relative gain of AP (%)")
    axis.legend()
    figure.tight_layout()
    figure.savefig(file, dpi=80)


def renewed(text: str, cells: Cells) -> str:
    """The page with the tables of these cells."""
    made = {
        EXPORT: tables.stops(cells, EXPORT),
        OTHER: tables.stops(cells, OTHER),
        "baselines": tables.compared(cells),
        "statistics": tables.statistics(cells),
        "components": tables.components(cells),
        "settings": tables.settings(cells),
        "rises": tables.rises(cells),
        "thresholds": tables.thresholds(cells),
        "left out": tables.left_out(cells),
    }
    return filled(text, made)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cells", type=Path, required=True)
    parser.add_argument("--docs", type=Path, required=True)
    args = parser.parse_args()
    cells = read(args.cells)
    page = args.docs / "evidence.md"
    page.write_text(renewed(page.read_text(), cells))
    curves(cells, args.docs / "images" / "evidence.png")
    gain_by_cost(cells, args.docs / "images" / "gain.png")


if __name__ == "__main__":
    main()
