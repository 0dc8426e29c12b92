"""The course of a run: candidates are looked at, recorded, and at the end one of them is kept."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Self

from torch import nn
from tqdm import tqdm

from selfadapt._candidates import Candidate, initial, loop, statistics
from selfadapt._crops import Crops
from selfadapt._errors import CheckpointError
from selfadapt._judge import Judge
from selfadapt._look import Look
from selfadapt._monitors import Monitor
from selfadapt._quality import Quality, estimate
from selfadapt._run import SelfAdaptation, Stop
from selfadapt._rundir import Row, RunDirectory
from selfadapt._verdict import Outcome, Verdict

LOG_EVERY = 10
"""Steps between two rows of the history, beside those of the validation points."""
LOOKS = "looks.json"


@dataclass(frozen=True)
class Seen:
    """A candidate that was looked at, without its network."""

    candidate: str
    iteration: int
    snapshot: int | str
    look: Look

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

    def to_dict(self) -> dict[str, Any]:
        """For `result.json`; what is not a number becomes null."""
        return {
            "outcome": self.outcome,
            "candidate": self.kept.candidate,
            "iteration": self.kept.iteration,
            "reason": self.reason,
            "quality": self.quality.to_dict(),
        }


class Portfolio:
    """One run on disk.

    Args:
        run: the student, the teacher and the initial network.
        crops: what it learns from.
        judge: looks at the held-out images.
        stop: who decides: "auto" is the judge; see `adapt`.
        directory: keeps what is needed to go on.
    """

    def __init__(
        self,
        run: SelfAdaptation,
        crops: Crops,
        judge: Judge,
        stop: Stop | Literal["auto"] | None,
        directory: RunDirectory,
    ) -> None:
        self.run, self.crops, self.judge, self.directory = run, crops, judge, directory
        self.stop = stop
        self.history: list[Row] = []
        self.seen: list[Seen] = []

    def first_look(self) -> None:
        """Look at the initial network; bad held-out images show here, before anything is written.

        Raises:
            SelfAdaptError: a held-out image cannot be used, or a criterion sees nothing in them.
        """
        self._look(initial(self.run))

    def go(self, *, progress: bool) -> Ending:
        """Begin, or go on from the checkpoint, to the end."""
        state = self.directory.load_checkpoint()
        if state is None:
            self.directory.save_snapshot(0, self.run.initial)
            self._start()
            self._save()
        else:
            self._go_on(state)
            if ending := self._ending(self.history[-1]):
                return ending
        return self._train(progress=progress)

    def _start(self) -> None:
        """Batch-norm statistics of the images: candidates, and maybe where the loop starts."""
        policy = self.run.config.batch_norm
        if policy not in ("auto", "target") or (policy == "auto" and self.stop != "auto"):
            return
        networks: dict[int | str, nn.Module] = {}
        for candidate in statistics(self.run, self.crops):
            seen = self._look(candidate)
            networks[seen.snapshot] = candidate.network
            self.directory.save_snapshot(seen.snapshot, candidate.network)
        if not networks:
            return
        kept = "statistics-100" if policy == "target" else self._decide()[1].snapshot
        if kept in networks:
            self.run.start_from(networks[kept])

    def _train(self, *, progress: bool) -> Ending:
        config = self.run.config
        bar = tqdm(
            total=config.iterations,
            initial=self.run.iteration,
            disable=not progress,
            unit="it",
            leave=False,
        )
        with bar:
            shown: Row = {}
            for info, candidate in loop(self.run, self.crops):
                bar.update()
                if candidate is None and self.run.iteration % LOG_EVERY:
                    continue
                row = {"iteration": self.run.iteration, **{k: float(v) for k, v in info.items()}}
                if candidate is not None and math.isfinite(row["loss"]):
                    row |= self._look(candidate, record=False).look.row(self.seen[0].look)
                self.history.append(row)
                shown |= {name: row[name] for name in _SHOWN if name in row}
                bar.set_postfix({name: f"{value:.3g}" for name, value in shown.items()})
                if candidate is None:
                    continue
                if math.isfinite(row["loss"]) and self.seen[-1].look.finite:  # safe to go back to
                    self.directory.save_snapshot(candidate.iteration, candidate.network)
                    self._prune()
                self._save()
                self.directory.save_checkpoint(self.run.state_dict())
                if ending := self._ending(row):
                    return ending
        raise AssertionError("the last iteration always gives an ending")

    def _look(self, candidate: Candidate, *, record: bool = True) -> Seen:
        look = self.judge.look(self.run.adapter, candidate.network)
        seen = Seen(candidate.name, candidate.iteration, candidate.snapshot, look)
        self.seen.append(seen)
        if record:  # before the first step
            row: Row = {"iteration": 0, **look.row(self.seen[0].look)}
            if candidate.name != "initial":
                row["statistics"] = float(candidate.name.rpartition("-")[2]) / 100
            self.history.append(row)
        return seen

    def _save(self) -> None:
        self.directory.write_history(self.history)
        self.directory.write_json(LOOKS, {"looks": [each.to_dict() for each in self.seen]})

    def _go_on(self, state: dict[str, Any]) -> None:
        self.run.load_state_dict(state)
        at = self.run.iteration
        history = [row for row in self.directory.read_history() if row["iteration"] <= at]
        if not history or history[-1]["iteration"] != at:
            raise CheckpointError(
                f"{self.directory.path / 'history.csv'} does not reach the checkpoint at iteration "
                f"{at}: start in a new folder."
            )
        try:
            seen = [Seen.from_dict(each) for each in self.directory.read_json(LOOKS)["looks"]]
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(
                f"{self.directory.path / LOOKS} is damaged ({error}): start in a new folder."
            ) from None
        self.history, self.seen = history, [each for each in seen if each.iteration <= at]

    def _prune(self) -> None:
        """Keep to `config.snapshots` weights: evenly spread ones, the last two and the best."""
        looked = [each.iteration for each in self.seen if each.candidate == "loop"]
        needed = {0, *looked[-2:]}
        if self.stop == "auto":
            needed.add(self._decide()[1].iteration)
        for iteration in spare(looked, needed, self.run.config.snapshots):
            self.directory.remove_snapshot(iteration)

    def _decide(self) -> tuple[Verdict, Seen]:
        """The judge's word on all that is still there to be kept."""
        there = set(self.directory.snapshots())
        first, *others = [s for s in self.seen if s.candidate == "initial" or s.snapshot in there]
        verdict = self.judge.decide(first.look, [each.look for each in others])
        return verdict, first if verdict.chosen is None else others[verdict.chosen]

    def _ending(self, now: Row) -> Ending | None:
        """What the newest look means; None: go on."""
        config, at = self.run.config, int(now["iteration"])
        if broken := self._broken(now):
            return self._verdict(broken) if self.stop == "auto" else self._keep(0, broken)
        if self.stop not in ("auto", None) and callable(self.stop) and self.stop(self.run, now):
            earlier = max((s.iteration for s in self.seen if s.iteration < at), default=0)
            name = "stop"
            if isinstance(self.stop, Monitor):
                name = f"{self.stop!r} at {now[self.stop.name]:.3f}"
            return self._keep(earlier, f"{name} tripped at iteration {at}")
        if at < config.iterations:
            return None
        if self.stop == "auto":
            return self._verdict()
        return self._keep(at, f"all {at} iterations are done and no criterion tripped")

    def _broken(self, now: Row) -> str | None:
        """Why a run cannot go on, if it cannot."""
        last = self.seen[-1]
        finite = math.isfinite(now["loss"]) and last.look.finite
        if not finite:
            return "loss, weights or predictions are not finite any more"
        for name in self.run.adapter.outputs:
            if now[f"kept_{name}"] == 0:
                return f"the masks keep no pixel of head {name!r} any more"
        if now.get("instances") == 0:
            return "no instance is left"
        return None

    def _verdict(self, broken: str = "") -> Ending:
        verdict, kept = self._decide()
        reason = f"{broken} after iteration {self.run.iteration}; " * bool(broken) + verdict.reason
        return Ending(verdict.outcome, kept, reason, verdict.quality)

    def _keep(self, iteration: int, reason: str) -> Ending:
        """What another criterion keeps; the judge still says if it can be trusted."""
        kept = next(each for each in self.seen if each.snapshot == iteration)
        what = f"the weights of iteration {iteration}" if iteration else "the initial weights"
        outcome: Outcome = "improved" if iteration else "initial kept"
        if self.run.adapter.can_decode and not self.judge.trusts(kept.look):
            outcome = "not to be trusted"
        return Ending(outcome, kept, f"{reason}; {what} are kept", estimate(kept.look))


_SHOWN = ("loss", "kept", "d_emb", "agreement")


def spare(looked: Sequence[int], needed: set[int], most: int) -> list[int]:
    """Iterations whose weights can go so that about `most` remain, evenly spread.

    It depends on the iterations alone, so that a resumed run keeps the same.

    >>> spare([10, 20, 30, 40, 50], {0, 40, 50}, 3)
    [10, 30]
    """
    step = 1
    while len(looked) // step > most:
        step *= 2
    return [it for k, it in enumerate(looked, 1) if k % step and it not in needed]
