"""What was looked at in a run, and what is kept of it."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

from selfadapt._look import Look
from selfadapt._quality import Quality
from selfadapt._rundir import Row
from selfadapt._verdict import Outcome

TTA = "+tta"
"""Behind the name of a candidate whose predictions are means over flips and turns."""


@dataclass(frozen=True)
class Seen:
    """A candidate that was looked at, without its network."""

    candidate: str
    iteration: int
    snapshot: int | str
    tta: bool
    look: Look

    @property
    def name(self) -> str:
        """What the history and the report call it."""
        return self.candidate + TTA * self.tta

    def to_dict(self) -> dict[str, Any]:
        """For a file."""
        return vars(self) | {"look": self.look.to_dict()}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """From `to_dict`."""
        return cls(**{**data, "look": Look.from_dict(data["look"])})


@dataclass(frozen=True)
class Ending:
    """What is kept of a run, and why."""

    outcome: Outcome
    kept: Seen
    reason: str
    quality: Quality
    rejected: Seen | None = None
    """Where the initial network is kept, the most promising one beside it."""

    def to_dict(self) -> dict[str, Any]:
        """For `result.json`; what is not a number becomes null."""
        return {
            "outcome": self.outcome,
            "rejected": None if self.rejected is None else self.rejected.name,
            "rejected_snapshot": None if self.rejected is None else self.rejected.snapshot,
            "candidate": self.kept.name,
            "iteration": self.kept.iteration,
            "reason": self.reason,
            "quality": self.quality.to_dict(),
        }


def broken_by(now: Row, looks: Sequence[Look], heads: Iterable[str]) -> str | None:
    """Why a run cannot go on from its newest row and its looks so far, if it cannot."""
    if not math.isfinite(now["loss"]) or (looks and not looks[-1].finite):
        return "loss, weights or predictions are not finite any more"
    for head in heads:
        if now[f"kept_{head}"] == 0:
            return f"the masks keep no pixel of head {head!r} any more"
    if now.get("instances") == 0:
        return "no instance is left"
    return None
