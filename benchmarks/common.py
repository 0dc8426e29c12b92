"""What several benchmarks share: the shell, scores, and rows of a table over seeds."""

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from selfadapt import Adapter, Config, Matches, adapt, match


def shell(*words: str) -> str:
    """What `selfadapt WORDS` prints, run by this Python."""
    command = [sys.executable, "-c", "import selfadapt._cli as c; raise SystemExit(c.main())"]
    done = subprocess.run([*command, *words], stdout=subprocess.PIPE, text=True, check=True)
    return done.stdout


def score(adapter: Adapter, pairs: Sequence[tuple[Any, Any]]) -> Matches:
    """Counts at IoU 0.5, pooled over pairs of image `[C, H, W]` and labels."""
    counts = (match(labels, adapter.segment(image, channel_axis=0))[0] for image, labels in pairs)
    return sum(counts, Matches())


def looks_of_run(
    adapter: Adapter,
    images: Sequence[Any],
    test: Sequence[tuple[Any, Any]],
    config: Config,
    folder: Path,
) -> list[dict[str, Any]]:
    """Adapt without a criterion, and score every snapshot on pairs of image and labels.

    The run's own figures and the scores at each look give every stop afterwards.
    """
    result = adapt(
        adapter, images, config=config, stop=None, output_dir=folder, resume=True, channel_axis=0
    )
    rows = {int(row["iteration"]): row for row in result.history if "d_emb" in row}
    looks = []
    for at in result.snapshots:
        counts = score(result.select(at), test)
        figures = {name: rows[at][name] for name in ("d_emb", "fn_rate", "instances")}
        scores = {"ap": counts.ap, "precision": counts.precision, "recall": counts.recall}
        looks.append(figures | {"iteration": at} | scores)
    return looks


def stopped(looks: Sequence[dict[str, Any]], name: str, threshold: float, key: str = "ap") -> float:
    """AP, or another figure, of the last look before the criterion trips."""
    kept = looks[0][key]
    for look in looks[1:]:
        if look[name] > threshold:
            break
        kept = look[key]
    return float(kept)


def outcome(runs: Sequence[Sequence[dict[str, Any]]]) -> str:
    """Table cells of runs, one per seed: base, stop D_emb, stop FN, last, best."""
    figures = [
        (
            looks[0]["ap"],
            stopped(looks, "d_emb", 0.5),
            stopped(looks, "fn_rate", 0.05),
            looks[-1]["ap"],
            max(look["ap"] for look in looks),
        )
        for looks in runs
    ]
    means, spreads = np.mean(figures, 0), np.std(figures, 0)
    return " | ".join(
        f"{m:.3f}" + (f" ± {s:.3f}" if s > 0 else "") for m, s in zip(means, spreads, strict=True)
    )
