"""The cells of `results/evidence.jsonl`: how they are read, and what was usual at their time.

The default criterion was the agreement of copies, `common.Agreement`; looks hold it at several
IoUs. `evidence.py` records what the judge measures now, which these tables do not know.
"""

import json
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from common import Agreement, kept
from pairs import PAIRS

from selfadapt import EmbeddingDrift, FalseNegativeRate, Monitor

Look = dict[str, Any]
Runs = dict[int, list[Look]]
"""Looks of each seed."""
Cells = dict[tuple[str, str], Runs]
"""By pair and setting."""
Choice = Callable[[list[Look]], float]
EXPORT, OTHER = "student", "teacher"
"""The network that is exported, and the one that was measured beside it."""
BATCH, CROP, VIEWS = 4, 128, 4
IOUS = (0.5, 0.6, 0.7, 0.8)
"""At each of these the agreement is there, under a name of its own."""
SHIFT = {pair.name: pair.shift for pair in PAIRS}
TARGET = {pair.name: pair.target for pair in PAIRS}
SHIFTED = {name for name, shift in SHIFT.items() if shift != "none"}
WITHOUT_PHOTONS = {name for name in SHIFTED if TARGET[name] != "photons"}
AGREEMENT = Agreement()
PAPER: dict[str, Monitor] = {"stop D_emb": EmbeddingDrift(), "stop FN": FalseNegativeRate()}


def read(file: Path) -> Cells:
    cells: Cells = defaultdict(dict)
    for cell in sorted(map(json.loads, file.read_text().splitlines()), key=lambda c: c["seed"]):
        if cell["rows"] is not None:
            cells[cell["pair"], cell["setting"]][cell["seed"]] = cell["rows"]
    return cells


def looks(rows: Sequence[Look], network: str = EXPORT) -> list[Look]:
    return [row[network] | {"iteration": row["iteration"]} for row in rows]


def measured(cells: Cells) -> dict[str, Runs]:
    """Runs with the defaults of every pair whose base finds anything."""
    found = {pair.name: cells.get((pair.name, "default"), {}) for pair in PAIRS}
    return {name: runs for name, runs in found.items() if runs and base(runs) > 0}


def base(runs: Runs) -> float:
    return float(next(iter(runs.values()))[0]["teacher"]["ap"])


def ap(stop: Monitor | Agreement) -> Choice:
    """What a criterion keeps; NaN where it cannot be had."""
    return lambda run: kept(run, stop)["ap"] if np.isfinite(run[-1][stop.name]) else np.nan


def last(run: list[Look]) -> float:
    return float(run[-1]["ap"])


def best(run: list[Look]) -> float:
    return float(max(look["ap"] for look in run))


def mean_ap(runs: Runs, pick: Choice, network: str) -> float:
    """Over seeds."""
    return float(np.mean([pick(looks(rows, network)) for rows in runs.values()]))


def gain(runs: Runs, pick: Choice, network: str) -> float:
    """Relative change of AP, mean of seeds."""
    return mean_ap(runs, pick, network) / base(runs) - 1


def mean_cut(gains: Sequence[float]) -> float:
    """Mean in which no pair counts more than +100 %, so that one does not decide alone."""
    return float(np.mean(np.minimum(gains, 1)))
