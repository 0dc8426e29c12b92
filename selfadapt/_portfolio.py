"""The course of a run: candidates are looked at, recorded, and at the end one of them is kept."""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any, Literal

from torch import nn

from selfadapt._candidates import STATISTICS, Candidate, initial, loop, loops, statistics
from selfadapt._config import DEFAULT
from selfadapt._crops import Crops
from selfadapt._ending import TTA, Ending, Seen, broken_by
from selfadapt._errors import (
    CheckpointError,
    OutputError,
    RunCancelledError,
    refuse_damage,
)
from selfadapt._events import Event
from selfadapt._judge import Judge
from selfadapt._monitors import EmbeddingDrift, Monitor
from selfadapt._quality import estimate
from selfadapt._run import SelfAdaptation, Stop
from selfadapt._rundir import Row, RunDirectory
from selfadapt._schedule import halved, rungs, spare
from selfadapt._verdict import Outcome, Verdict

LOG_EVERY = 10
"""Steps between two rows of the history, beside those of the validation points."""
LOOKS, PIXELS = "looks.json", "pixels.json"


class Portfolio:
    """One run on disk.

    Args:
        run: the student, the teacher and the initial network.
        crops: what it learns from.
        judge: looks at the held-out images.
        stop: who decides: "auto" is the judge; see `adapt`.
        directory: keeps what is needed to go on.
        tell: is told what was done, and may raise RunCancelledError.
    """

    def __init__(
        self,
        run: SelfAdaptation,
        crops: Crops,
        judge: Judge,
        stop: Stop | Literal["auto"] | None,
        directory: RunDirectory,
        tell: Callable[[Event], None],
    ) -> None:
        self.run, self.crops, self.judge, self.directory = run, crops, judge, directory
        self.stop, self._tell = stop, tell
        self.history: list[Row] = []
        self.seen: list[Seen] = []
        self.broken: dict[str, tuple[int, str]] = {}
        self._ways = {DEFAULT: run.config}
        if stop == "auto":
            self._ways = loops(run.config, run.initial)
        ends = rungs(run.config, len(self._ways))
        self._stages = list(pairwise([0, *ends]))
        counts = zip(self._stages, halved(len(self._ways)), strict=False)
        self._done, self._total = 0, sum((end - before) * n for (before, end), n in counts)

    def first_look(self) -> None:
        """Look at the initial network; bad held-out images show here, before anything is written.

        Raises:
            SelfAdaptError: a held-out image cannot be used, the network gives NaN, or a criterion
                sees nothing.
            RunCancelledError: there is nothing yet.
        """
        self._say("stage", initial(self.run))
        if not self._look(initial(self.run)).look.finite:
            raise OutputError("the network gives NaN or infinity for held-out images.")
        if self.stop == "auto":
            self.judge.warn_of_few_windows()
        if isinstance(self.stop, EmbeddingDrift):
            self.run.refuse_blind(self.stop, self.crops.batch(0))
        self._say("look", initial(self.run))

    def go(self) -> Ending:
        """Begin, or go on where it was, to the end, or until it is cancelled."""
        try:
            ending = self._go()
        except RunCancelledError:
            ending = self._cancelled()
        if ending.kept.name == "initial":
            ending = replace(ending, rejected=self._most_promising())
        return ending

    def _most_promising(self) -> Seen | None:
        """Of the networks other than the initial one that are still there."""
        there = set(self.directory.snapshots())
        first, *others = self.seen
        usable = [s for s in others if s.candidate != "initial" and not s.tta and s.look.finite]
        usable = [s for s in usable if s.snapshot in there]
        if not usable or not self.run.adapter.can_decode:
            return None
        return usable[self.judge.order(first.look, [s.look for s in usable])[0]]

    def _go(self) -> Ending:
        if self.directory.begun:
            self._go_on()
        else:
            self.directory.save_snapshot(0, self.run.initial)
            self._statistics()
            self._save()
            self.directory.begin()
        names = list(self._ways)
        for before, end in self._stages:
            for name in names:
                if ending := self._advance(name, before, end):
                    return ending
            whole = [name for name in names if self.broken.get(name, (end + 1,))[0] > end]
            names = self._promising(whole, end)
        return self._finish(names)

    def _say(self, kind: Literal["stage", "step", "look"], what: Candidate, **figures: Any) -> None:
        """Tell of a step of a loop, or of a look at a network."""
        name = what.name + TTA * what.tta
        told = Event(kind, "adaptation", self._done, self._total, name, what.iteration, figures)
        if kind == "look":
            row = self.seen[-1].look.row(self.seen[0].look)
            told = replace(told, figures=row, previews=self.judge.previews)
        self._tell(told)

    def _cancelled(self) -> Ending:
        """The best so far."""
        if self.stop == "auto":
            verdict, kept = self._decide(self.seen)
            return Ending(verdict.outcome, kept, f"cancelled; {verdict.reason}", verdict.quality)
        there = {0, *self.directory.snapshots()}
        last = max(each.iteration for each in self.seen if each.snapshot in there)
        return self._keep(last, "cancelled")

    def _statistics(self) -> None:
        """Batch-norm statistics of the images: candidates, and maybe where the loops start."""
        policy = self.run.config.batch_norm
        if policy not in ("auto", "target") or (policy == "auto" and self.stop != "auto"):
            return
        for candidate in statistics(self.run, self.crops):
            seen = self._look(candidate)
            self.directory.save_snapshot(seen.snapshot, candidate.network)
            self._say("look", candidate)

    def _start(self) -> Seen:
        """What the loops start from: the best before the first step."""
        known = ("initial", *STATISTICS)
        before = [each for each in self.seen if each.candidate in known and not each.tta]
        if self.run.config.batch_norm == "target":
            return before[-1]
        return self._decide(before)[1]

    def _open(self, name: str) -> SelfAdaptation:
        """The run of a way to adapt, as far as it has come."""
        run = self.run
        if name != DEFAULT:
            run = SelfAdaptation(run.adapter, self._ways[name])
        elif run.iteration > 0:  # it has been here, in this process
            return run
        state = self.directory.load_checkpoint(name)
        if state is not None:
            run.load_state_dict(state)
        elif (start := self._start()).snapshot != 0:
            run.start_from(self._network(start))
        return run

    def _network(self, seen: Seen) -> nn.Module:
        """What was looked at."""
        return self.directory.load_network(seen.snapshot, self.run.initial, self.run.device)

    def _advance(self, name: str, before: int, end: int) -> Ending | None:
        """Train in one way up to an iteration; an ending if a criterion stops it."""
        run = self._open(name)
        self._forget(name, run.iteration)
        self._done += max(min(run.iteration, end) - before, 0)
        if last := self._last(name):
            if ending := self._ending(name, run, last):
                return ending
            if name in self.broken:
                return None
        for info, candidate in loop(name, run, self.crops, end):
            self._done += 1
            self._say("step", Candidate(name, run.iteration, run.exported), **info)
            if candidate is None and run.iteration % LOG_EVERY:
                continue
            row: Row = {"iteration": run.iteration, "candidate": name}
            row |= {key: float(value) for key, value in info.items()}
            if candidate is not None and math.isfinite(row["loss"]):
                row |= self._look(candidate, record=False).look.row(self.seen[0].look)
            self.history.append(row)
            if candidate is None:
                continue
            if math.isfinite(row["loss"]) and self.seen[-1].look.finite:  # safe to go back to
                self.directory.save_snapshot(candidate.snapshot, candidate.network)
                self._prune(name)
            self._save()
            self.directory.save_checkpoint(name, run.state_dict())
            if math.isfinite(row["loss"]):
                self._say("look", candidate)
            if ending := self._ending(name, run, row):
                return ending
            if name in self.broken:
                break
        return None

    def _promising(self, names: list[str], end: int) -> list[str]:
        """The better half of the ways that have come to an iteration."""
        until = [s for s in self.seen if s.iteration <= end and not s.tta]
        last = [[s.look for s in until if s.candidate == name][-1] for name in names]
        order = self.judge.order(self.seen[0].look, last)
        return [names[k] for k in sorted(order[: -(-len(names) // 2)])]

    def _finish(self, names: Sequence[str]) -> Ending:
        """What comes after the loops, and the judge's word on everything."""
        if self.stop != "auto":
            at = self.run.config.iterations
            return self._keep(at, f"all {at} iterations are done and no criterion tripped")
        config = self.run.config
        missing = all(each.candidate != "teacher" for each in self.seen)
        if names and missing and "teacher" in config.chosen and config.export == "student":
            run = self._open(names[0])
            self.directory.save_snapshot("teacher", run.teacher)
            teacher = Candidate("teacher", run.iteration, run.teacher)
            self._look(teacher)
            self._save()
            self._say("look", teacher)
        verdict, kept = self._decide(self.seen)
        adapter = self.run.adapter
        done = adapter.input.tta or any(each.tta for each in self.seen)
        able = "tta" in config.chosen and "tta" in adapter.adjustable and not done
        if able and verdict.outcome != "not to be trusted":
            mean = Candidate(kept.candidate, kept.iteration, self._network(kept), tta=True)
            self._look(mean)
            self._save()
            self._say("look", mean)
            verdict, kept = self._decide(self.seen)
        failed = "".join(
            f"{name}: {why} after iteration {at}; " for name, (at, why) in self.broken.items()
        )
        return Ending(verdict.outcome, kept, failed + verdict.reason, verdict.quality)

    def _look(self, candidate: Candidate, *, record: bool = True) -> Seen:
        adapter = self.run.adapter
        if candidate.tta:
            adapter = adapter.with_input(replace(adapter.input, tta=True))
        look = self.judge.look(adapter, candidate.network)
        seen = Seen(candidate.name, candidate.iteration, candidate.snapshot, candidate.tta, look)
        self.seen.append(seen)
        if record:  # no step was made for it
            row: Row = {"iteration": candidate.iteration, "candidate": seen.name}
            self.history.append(row | look.row(self.seen[0].look))
        return seen

    def _save(self) -> None:
        self.directory.write_history(self.history)
        self.directory.write_json(LOOKS, {"looks": [each.to_dict() for each in self.seen]})
        self.directory.write_json(PIXELS, {"used": self.crops.used})

    def _go_on(self) -> None:
        with refuse_damage(self.directory.path / LOOKS):
            looks = [Seen.from_dict(each) for each in self.directory.read_json(LOOKS)["looks"]]
            if looks[0].candidate != "initial":
                raise ValueError("the first look is not at the initial network")
        with refuse_damage(self.directory.path / PIXELS):
            self.crops.go_on(dict(self.directory.read_json(PIXELS)["used"]))
        known = {(each.name, each.iteration) for each in looks}
        self.seen = looks
        self.history = [  # rows of loops are what `_forget` goes by; others have been looked at
            row
            for row in self.directory.read_history()
            if row["candidate"] in self._ways or (row["candidate"], row["iteration"]) in known
        ]
        figures = {"loss", *(f"kept_{head}" for head in self.run.adapter.outputs)}
        if any(row["candidate"] in self._ways and figures - row.keys() for row in self.history):
            raise CheckpointError(
                f"{self.directory.path / 'history.csv'} is damaged: a row lacks figures. Start in "
                "a new folder."
            )

    def _forget(self, name: str, at: int) -> None:
        """What was seen after the checkpoint of a run that was killed, and will be seen again."""
        if (last := self._last(name)) and int(last["iteration"]) == at:
            return
        if at and not any(r["candidate"] == name and r["iteration"] == at for r in self.history):
            raise CheckpointError(
                f"{self.directory.path / 'history.csv'} does not reach the checkpoint of "
                f"{name!r} at iteration {at}: start in a new folder."
            )
        self.history = [r for r in self.history if r["candidate"] != name or r["iteration"] <= at]
        self.seen = [s for s in self.seen if s.candidate != name or s.iteration <= at]

    def _last(self, name: str) -> Row | None:
        """The last row of a way to adapt."""
        return next((row for row in reversed(self.history) if row["candidate"] == name), None)

    def _prune(self, name: str) -> None:
        """Keep to `config.snapshots` weights: evenly spread ones, the last two and the best."""
        looked = [each.iteration for each in self.seen if each.candidate == name]
        needed = {0, *looked[-2:]}
        if self.stop == "auto":
            needed.add(self._decide(self.seen)[1].iteration)
        for iteration in spare(looked, needed, self.run.config.snapshots):
            self.directory.remove_snapshot(Candidate(name, iteration, self.run.initial).snapshot)

    def _decide(self, seen: Sequence[Seen]) -> tuple[Verdict, Seen]:
        """The judge's word on all of these that are still there to be kept."""
        there = set(self.directory.snapshots())
        first, *others = [s for s in seen if s.candidate == "initial" or s.snapshot in there]
        looks, names = [each.look for each in others], [each.name for each in others]
        verdict = self.judge.decide(first.look, looks, tried=len(seen) - 1, loops=names)
        return verdict, first if verdict.chosen is None else others[verdict.chosen]

    def _ending(self, name: str, run: SelfAdaptation, now: Row) -> Ending | None:
        """What the newest row means where another criterion than the judge decides, or it broke."""
        at = int(now["iteration"])
        looks = [each.look for each in self.seen if each.candidate == name]
        if broken := broken_by(now, looks, self.run.adapter.outputs):
            if self.stop != "auto":
                return self._keep(0, f"{broken} after iteration {at}")
            self.broken[name] = at, broken
            return None
        if self.stop in ("auto", None) or not callable(self.stop) or not self.stop(run, now):
            return None
        earlier = max((s.iteration for s in self.seen if s.iteration < at), default=0)
        told = "stop"
        if isinstance(self.stop, Monitor):
            told = f"{self.stop!r} at {now[self.stop.name]:.3f}"
        return self._keep(earlier, f"{told} tripped at iteration {at}")

    def _keep(self, iteration: int, reason: str) -> Ending:
        """What another criterion keeps; the judge still says if it can be trusted."""
        kept = next(each for each in self.seen if each.snapshot == iteration)
        what = f"the weights of iteration {iteration}" if iteration else "the initial weights"
        outcome: Outcome = "initial kept"
        if self.run.adapter.can_decode and not self.judge.trusts(kept.look):
            outcome = "not to be trusted"
        elif iteration:
            better = self.judge.decide(self.seen[0].look, [kept.look]).chosen is not None
            outcome = "improved" if better else "not judged better"
        return Ending(outcome, kept, f"{reason}; {what} are kept", estimate(kept.look))
