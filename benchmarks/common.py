"""What several benchmarks share: the shell, scores, and what a criterion keeps."""

import subprocess
import sys
from collections.abc import Sequence
from typing import Any

from selfadapt import Adapter, Matches, Monitor, ViewAgreement, match

USUAL = ViewAgreement()
"""The default criterion."""


def shell(*words: str) -> str:
    """What `selfadapt WORDS` prints, run by this Python."""
    command = [sys.executable, "-c", "import selfadapt._cli as c; raise SystemExit(c.main())"]
    done = subprocess.run([*command, *words], stdout=subprocess.PIPE, text=True, check=True)
    return done.stdout


def score(adapter: Adapter, pairs: Sequence[tuple[Any, Any]]) -> Matches:
    """Counts at IoU 0.5, pooled over pairs of image `[C, H, W]` and labels."""
    counts = (match(labels, adapter.segment(image, channel_axis=0))[0] for image, labels in pairs)
    return sum(counts, Matches())


def agreement(threshold: float = USUAL.threshold, iou: float = USUAL.iou) -> ViewAgreement:
    """The criterion under a name that says its IoU, so that looks can hold several."""
    monitor = ViewAgreement(threshold, iou=iou)
    monitor.name = f"agreement_{iou}"
    return monitor


def kept(looks: Sequence[dict[str, Any]], stop: Monitor) -> dict[str, Any]:
    """The look that `adapt` keeps with that criterion."""
    chosen = stop.choose(looks)
    return next(look for look in looks if look["iteration"] == chosen)
