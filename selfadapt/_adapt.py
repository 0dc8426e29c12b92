"""One call from images to an adapted model."""

import logging
import shutil
import tempfile
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import tifffile
import torch

from selfadapt import _ranks as ranks
from selfadapt._adapter import Adapter
from selfadapt._calibrate import FOUND, go_on, search
from selfadapt._config import Config
from selfadapt._crops import Crops, evenly, exchange, hold_out, share_of_batch
from selfadapt._ending import TTA
from selfadapt._errors import ConfigError, refuse_damage
from selfadapt._events import Callback, Event, Teller
from selfadapt._fates import Fate, fates, summed
from selfadapt._images import open_windows
from selfadapt._judge import Judge
from selfadapt._lazy import LazyImage
from selfadapt._masks import refuse_masks
from selfadapt._monitors import EmbeddingDrift, Monitor
from selfadapt._network import (
    check_network,
    checksum_of,
    compiled_in_place,
    select_parameters,
)
from selfadapt._portfolio import Portfolio
from selfadapt._predict import predict
from selfadapt._quality import Quality
from selfadapt._run import SelfAdaptation, Stop
from selfadapt._rundir import CALIBRATION, INPUT, Row, RunDirectory
from selfadapt._verdict import Outcome

logger = logging.getLogger(__name__)

EXAMPLES = 4
"""Windows of held-out images of which instances before and after are kept for the report."""


@dataclass(frozen=True)
class AdaptationResult:
    """What `adapt` returns.

    Attributes:
        adapter: the given adapter around the network that was kept.
        outcome: "improved", "initial kept" or "not to be trusted"; or, where another criterion
            than the judge has kept a later network, and the judge does not agree, "not judged
            better".
        candidate: what was kept: "initial", "statistics-50", "statistics-100", the name of a loop
            (`Config.candidates`), "teacher", or one of these with "+tta".
        iteration: steps of the loop that it has behind it; 0 before the first step.
        reason: why, one sentence.
        quality: the AP to be expected of it, with an interval, estimated without labels.
        input: how images go in, as it was found; None where nothing was to be found.
        history: one row of figures per logged iteration.
        directory: the run on disk.
    """

    adapter: Adapter
    outcome: Outcome
    candidate: str
    iteration: int
    reason: str
    quality: Quality
    input: str | None
    history: list[Row] = field(repr=False)
    directory: RunDirectory

    @property
    def snapshots(self) -> list[int | str]:
        """What can be selected: iterations of the default loop (0: initial network), and names."""
        return self.directory.snapshots()

    def select(self, at: int | str | Monitor) -> Adapter:
        """The adapter with other weights of the run.

        Args:
            at: one of `snapshots`, or a monitor such as `EmbeddingDrift(0.3)`: the snapshot that
                it chooses by what the run has measured.

        Raises:
            ConfigError: the run has not measured what the monitor looks at.
            CheckpointError: there is no such snapshot.
        """
        if isinstance(at, Monitor):
            if at.measure not in self.directory.read_json("data.json")["measured"]:
                raise ConfigError(f"{at!r} was not measured in this run; give an iteration.")
            there = set(self.snapshots)
            at = at.choose([r for r in self.history if at.sees(r) and int(r["iteration"]) in there])
        adapter = self.adapter
        if self.candidate.endswith(TTA):  # that was for the candidate alone
            adapter = adapter.with_input(replace(adapter.input, tta=False))
        device = next(adapter.model.parameters()).device
        return _with_snapshot(adapter, self.directory, at, device)


@torch.inference_mode(False)
@torch.enable_grad()
@ranks.joined()
def adapt(
    adapter: Adapter,
    images: Any,
    *,
    validation: Any = None,
    config: Config | None = None,
    stop: Stop | Literal["auto"] | None = "auto",
    calibrate: bool = True,
    output_dir: str | Path | RunDirectory | None = None,
    resume: bool = False,
    channel_axis: int | None = None,
    progress: bool = True,
    callback: Callback | None = None,
) -> AdaptationResult:
    """Adapt a trained model to images, without labels.

    The given adapter stays as it is. The result holds the network that the judge keeps: an adapted
    one, or the initial one if none is surely better. `outcome` and `reason` say which, and whether
    it can be trusted on these images at all. Processes that `torchrun` has started work on one run
    together, and each returns its result.

    Args:
        adapter: the trained model.
        images: what to adapt to, any source that `open_images` takes.
        validation: held-out images, any such source. By default a seeded share of `images`
            (`config.validation_share`) is held back; a single image serves for both. Of given
            ones, `config.validation_images` are used, evenly spread.
        config: all settings.
        stop: "auto" lets `Judge` decide over the whole run (or, where the adapter cannot decode
            instances, is `EmbeddingDrift()`). The paper's `EmbeddingDrift(threshold)` and
            `FalseNegativeRate(threshold)`, any callable `stop(run, info) -> bool` that is asked at
            each validation point, or None for all iterations decide instead of it.
        calibrate: whether scale, polarity and channels are first found in the images, as
            `selfadapt.calibrate` does, where the adapter's user has not said them.
        output_dir: keeps config, history, checkpoint, snapshots, examples and the model.
        resume: go on with the run in `output_dir` (or start it, if there is none).
        channel_axis: see `open_images`.
        progress: whether a progress bar is shown.
        callback: is told, by an `Event`, of every stage, step and look, in the thread of the run;
            returning True cancels: the best so far is returned, and `resume` would go on. It
            decides nothing else.

    Raises:
        SelfAdaptError: bad settings, model or folder, or bad images among the held-out ones and
            the first 256, before any training.
        RunCancelledError: the callback has cancelled before the initial network was looked at.
    """
    config = Config() if config is None else config
    if not isinstance(adapter, Adapter):
        raise ConfigError(f"adapter is a {type(adapter).__name__}: give an Adapter.")
    check_network(getattr(adapter, "model", None))
    if compiled_in_place(adapter.model):
        logger.warning(
            "the network was compiled in place, and the run works with plain copies: the same, "
            "at another speed. What `torch.compile(model)` gives is copied as it is."
        )
    if not isinstance(config, Config):
        raise ConfigError(f"config is a {type(config).__name__}: give Config(...).")
    share_of_batch(config)  # refused before any work, as is the next
    select_parameters(adapter.model, config.trainable)
    if stop not in ("auto", None) and (isinstance(stop, type) or not callable(stop)):
        raise ConfigError(
            f"stop={stop!r} is not allowed: give EmbeddingDrift(), FalseNegativeRate(), a "
            'function stop(run, info), "auto", or None.'
        )
    if stop == "auto" and not adapter.can_decode:
        stop = EmbeddingDrift()
    if resume and output_dir is None:
        raise ConfigError("resume=True needs output_dir, the folder of the run to go on with.")
    if callback is not None and not callable(callback):
        raise ConfigError(f"callback={callback!r} is not allowed: give a function of one Event.")
    directory = _open_directory(output_dir)
    directory.check(config, resume=resume)
    with Teller(progress=progress, callback=callback) as tell, directory:
        sources = open_windows(images, channel_axis=channel_axis)
        if validation is None:
            sources, held_out = hold_out(sources, config)
        else:
            given = open_windows(validation, channel_axis=channel_axis)
            refuse_masks(given)
            held_out = evenly(given, config.validation_images)
        calibration = ranks.first(
            lambda: _calibration(adapter, sources, directory, calibrate, tell)
        )
        if calibration is not None:
            with refuse_damage(directory.path / CALIBRATION):
                adapter = go_on(adapter, calibration["chosen"]["input"])
                words = str(calibration["words"])
        if validation is None:
            sources, held_out = exchange(adapter, sources, held_out)
        adapter.check(sources)
        crops = Crops(adapter, sources, config)
        crops.check()
        run = SelfAdaptation(adapter, config)
        judge = Judge(
            held_out,
            monitors=[stop] if isinstance(stop, Monitor) else [],
            windows=config.validation_images,
            side=config.validation_size,
        )
        portfolio = Portfolio(run, crops, judge, stop, directory, tell)
        portfolio.first_look()
        data = {
            "model": checksum_of(run.initial),
            "images": crops.fingerprints,
            "held_out": judge.fingerprints,
            "measured": [monitor.measure for monitor in judge.monitors],
            "stop": _named(stop),
            "input": adapter.input.to_dict(),
            "options": adapter.options(),
        }
        directory.start(config, data, resume=resume)
        if calibration is not None:
            directory.write_json(CALIBRATION, calibration)
        ending = portfolio.go()
        adapted = _with_snapshot(adapter, directory, ending.kept.snapshot, run.device)
        if ending.kept.tta:
            adapted = adapted.with_input(replace(adapted.input, tta=True))
        if output_dir is not None:
            before = adapter.with_model(run.initial)
            networks = {"before": before, "after": adapted}
            if ending.rejected is not None:
                networks["rejected"] = _with_snapshot(
                    adapter, directory, ending.rejected.snapshot, run.device
                )
            told = ranks.first(lambda: _export(adapted, networks, judge, directory))
            told["thresholds"] = {stop.name: stop.threshold} if isinstance(stop, Monitor) else {}
            directory.write_json(INPUT, adapted.input.to_dict())
            directory.write_json("result.json", ending.to_dict() | told)
        ranks.wait()  # the first one may let go of a temporary folder that others still read
    return AdaptationResult(
        adapted,
        ending.outcome,
        ending.kept.name,
        ending.kept.iteration,
        ending.reason,
        ending.quality,
        None if calibration is None else words,
        portfolio.history,
        directory,
    )


def _named(stop: Stop | Literal["auto"] | None) -> str:
    """A criterion, for a file."""
    if stop in ("auto", None) or isinstance(stop, Monitor):
        return repr(stop)
    return getattr(stop, "__qualname__", type(stop).__qualname__)


def _calibration(
    adapter: Adapter,
    sources: Sequence[LazyImage],
    directory: RunDirectory,
    wanted: bool,
    tell: Callable[[Event], None],
) -> dict[str, Any] | None:
    """What was found of how images go in, now or when the run began; None where it is said."""
    if (directory.path / CALIBRATION).exists():
        return directory.read_json(CALIBRATION)
    if (directory.path / "data.json").exists():  # the run has begun without
        return None
    open_to_us = adapter.can_decode and adapter.adjustable & FOUND
    if adapter.auto or (wanted and open_to_us):
        return search(adapter, sources, tell).to_dict()
    return None


def _open_directory(output_dir: str | Path | RunDirectory | None) -> RunDirectory:
    """The given folder, or a temporary one that goes when nobody holds it any more."""
    if isinstance(output_dir, RunDirectory):
        return output_dir
    if output_dir is not None:
        return RunDirectory(output_dir)
    directory = RunDirectory(ranks.first(lambda: tempfile.mkdtemp(prefix="selfadapt-")))
    if ranks.rank() == 0:
        weakref.finalize(directory, shutil.rmtree, directory.path, ignore_errors=True)
    return directory


def _with_snapshot(
    adapter: Adapter, directory: RunDirectory, name: int | str, device: torch.device
) -> Adapter:
    return adapter.with_model(directory.load_network(name, adapter.model, device).eval())


def _export(
    result: Adapter, networks: Mapping[str, Adapter], judge: Judge, directory: RunDirectory
) -> dict[str, Any]:
    """Write the model in its native format, and the examples that changed most.

    Args:
        result: what is kept.
        networks: of which the examples show the instances, by the end of the files' names.

    Returns:
        For `result.json`: names of the examples, and what became of the instances of all windows.
    """
    with directory.replacing("model") as partial:
        result.save(partial)
    examples = judge.examples
    found = [
        {
            when: predict(adapter, adapter.model, pixels, size).instances
            for when, adapter in networks.items()
        }
        for _, pixels, size in examples
    ]
    second = "rejected" if "rejected" in networks else "after"
    told = [
        fates(before, now).counts
        for before, now in ((each["before"], each[second]) for each in found)
        if before is not None and now is not None
    ]
    order = list(range(len(examples)))
    if told:
        order.sort(key=lambda k: -_changed(told[k]))
    with directory.replacing("examples") as partial:
        partial.mkdir()
        for index, k in enumerate(order[:EXAMPLES]):
            axes = {"axes": "CYX"}
            tifffile.imwrite(partial / f"{index}-image.tif", examples[k][1].numpy(), metadata=axes)
            for when, instances in found[k].items():
                if instances is not None:
                    tifffile.imwrite(partial / f"{index}-{when}.tif", instances)
    names = [examples[k][0] for k in order[:EXAMPLES]]
    changes = {str(fate): count for fate, count in summed(told).items()} | {"windows": len(told)}
    return {"examples": names, "changes": changes if told else None}


def _changed(counts: dict[Fate, int]) -> float:
    """Share of instances that are not the same."""
    return (sum(counts.values()) - counts["same"]) / max(sum(counts.values()), 1)
