"""What several benchmarks share: the shell, scores, and rows of a table over seeds."""

import subprocess
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np

from selfadapt import Adapter, Matches, match


def shell(*words: str) -> str:
    """What `selfadapt WORDS` prints, run by this Python."""
    command = [sys.executable, "-c", "import selfadapt._cli as c; raise SystemExit(c.main())"]
    done = subprocess.run([*command, *words], stdout=subprocess.PIPE, text=True, check=True)
    return done.stdout


def score(adapter: Adapter, pairs: Sequence[tuple[Any, Any]]) -> Matches:
    """Counts at IoU 0.5, pooled over pairs of image `[C, H, W]` and labels."""
    counts = (match(labels, adapter.segment(image, channel_axis=0))[0] for image, labels in pairs)
    return sum(counts, Matches())


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
