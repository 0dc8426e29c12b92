"""Tables and curves of what `evidence.py` has measured.

    python benchmarks/evidence_report.py --cells benchmarks/results/evidence.jsonl --docs docs

Writes `docs/images/evidence.png` and prints the tables of `docs/evidence.md`, all of the exported
network (`Config.export`) unless said otherwise.
"""

import argparse
import json
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from common import stopped
from pairs import PAIRS

from selfadapt import Config, ViewAgreement

Cells = dict[tuple[str, str], list[list[dict[str, Any]]]]
"""Looks of each seed, by pair and setting."""
STOPS = {"stop D_emb": ("d_emb", 0.5), "stop FN": ("fn_rate", 0.05)}
CURVES = {
    "ap": "AP",
    "agreement": "agreement",
    "d_emb": "D_emb",
    "fn_rate": "FN rate",
    "instances": "instances / initial",
}


def read(file: Path) -> Cells:
    cells: Cells = defaultdict(list)
    for line in file.read_text().splitlines():
        cell = json.loads(line)
        if cell["rows"] is not None:
            cells[cell["pair"], cell["setting"]].append(cell["rows"])
    return cells


def exported(
    rows: Sequence[dict[str, Any]], network: str = Config().export
) -> list[dict[str, Any]]:
    return [row[network] | {"iteration": row["iteration"]} for row in rows]


def kept(looks: Sequence[dict[str, Any]]) -> int:
    """Index of the look that `adapt` would keep by default."""
    chosen = ViewAgreement().choose(looks)
    return [look["iteration"] for look in looks].index(chosen)


def cell(values: Sequence[float]) -> str:
    spread = f" ± {np.std(values):.3f}" if len(values) > 1 else ""
    return f"{np.mean(values):.3f}{spread}"


def stops(cells: Cells, setting: str, network: str = Config().export) -> str:
    """Base, what each criterion keeps, last and best look, for every pair."""
    names = ["kept by agreement", *STOPS, "last", "best"]
    lines = [f"| pair | shift | seeds | base | {' | '.join(names)} |", "|---" * 9 + "|"]
    gains = []
    for pair in PAIRS:
        every = cells.get((pair.name, setting), [])
        if not (runs := [exported(rows, network) for rows in every]):
            continue
        columns = [
            [looks[kept(looks)]["ap"] for looks in runs],
            *([stopped(looks, *rule) for looks in runs] for rule in STOPS.values()),
            [looks[-1]["ap"] for looks in runs],
            [max(look["ap"] for look in looks) for looks in runs],
        ]
        base = runs[0][0]["ap"]
        if base > 0:
            gains.append((pair.shift, [np.mean(column) / base - 1 for column in columns]))
        lines.append(
            f"| {pair.name} | {pair.shift} | {len(runs)} | {base:.3f} | "
            f"{' | '.join(map(cell, columns))} |"
        )
    for title, chosen in (
        ("mean relative gain, shifted pairs", [g for shift, g in gains if shift != "none"]),
        ("largest relative loss, all pairs", [g for _, g in gains]),
    ):
        figures = np.mean(chosen, 0) if title.startswith("mean") else np.min(chosen, 0)
        lines.append(f"| **{title}** | | | | {' | '.join(f'{x:+.1%}' for x in figures)} |")
    return "\n".join(lines)


def settings(cells: Cells) -> str:
    """AP after the last iteration, by setting and pair."""
    named = [pair.name for pair in PAIRS if any(name == pair.name for name, _ in cells)]
    lines = [f"| setting | {' | '.join(named)} |", "|---" * (1 + len(named)) + "|"]
    base = [cells[name, "default"][0][0]["teacher"]["ap"] for name in named]
    lines.append("| no adaptation | " + " | ".join(f"{ap:.3f}" for ap in base) + " |")
    for setting in dict.fromkeys(setting for _, setting in cells):
        shown = []
        for name in named:
            runs = cells.get((name, setting), [])
            network = Config().export if runs and Config().export in runs[0][-1] else "teacher"
            shown.append(cell([rows[-1][network]["ap"] for rows in runs]) if runs else "")
        lines.append(f"| {setting} | {' | '.join(shown)} |")
    return "\n".join(lines)


def curves(cells: Cells, file: Path) -> None:
    """After the paper's Fig. 2: one column a pair, mean over seeds."""
    named = [pair.name for pair in PAIRS if (pair.name, "default") in cells]
    figure, axes = plt.subplots(
        len(CURVES), len(named), figsize=(2.4 * len(named), 8.5), sharex=True, squeeze=False
    )
    for column, name in enumerate(named):
        runs = [exported(rows) for rows in cells[name, "default"]]
        for row, (key, label) in enumerate(CURVES.items()):
            axis = axes[row, column]
            values = [[look[key] for look in looks] for looks in runs]
            axis.plot([look["iteration"] for look in runs[0]], np.mean(values, 0))
            for metric, threshold in STOPS.values():
                if metric == key:
                    axis.axhline(threshold, color="gray", linewidth=0.8, linestyle=":")
            chosen = [runs[0][kept(looks)]["iteration"] for looks in runs]
            axis.axvline(float(np.mean(chosen)), color="black", linewidth=0.8)
            if column == 0:
                axis.set_ylabel(label)
        axes[0, column].set_title(name, fontsize=8)
        axes[-1, column].set_xlabel("iteration")
    figure.tight_layout()
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=90)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cells", type=Path, required=True)
    parser.add_argument("--docs", type=Path, required=True)
    args = parser.parse_args()
    cells = read(args.cells)
    for network in ("teacher", "student"):
        print(f"{network}:\n\n{stops(cells, 'default', network)}\n")
    print(settings(cells))
    curves(cells, args.docs / "images" / "evidence.png")


if __name__ == "__main__":
    main()
