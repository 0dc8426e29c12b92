"""One call from images to an adapted model."""

import math
import shutil
import tempfile
import weakref
from collections.abc import Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import numpy as np
import tifffile
import torch
from torch import Tensor
from tqdm import tqdm

from selfadapt._adapter import Adapter
from selfadapt._batch_norm import adabn, batch_norms, mixed
from selfadapt._config import Config
from selfadapt._crops import Crops
from selfadapt._errors import CheckpointError, ConfigError, ImageError
from selfadapt._images import LazyImage, open_images, refuse_masks
from selfadapt._input import prepare
from selfadapt._monitors import Monitor, Validation, ViewAgreement, usual_criterion
from selfadapt._network import copy_network, is_finite
from selfadapt._normalize import is_constant
from selfadapt._predict import centre_crop, predict
from selfadapt._run import SelfAdaptation, Stop
from selfadapt._rundir import Row, RunDirectory

LOG_EVERY = 10
"""Steps between two rows of the history, beside those of the validation points."""
STATISTICS_BATCHES = 64
"""Batches over which batch-norm statistics of the images are measured."""
STATISTICS_RISE = 0.04
"""Rise of agreement from which they are taken; those that harm raise it by less."""
EXAMPLES = 4
"""Held-out images of which instances before and after are kept for the report."""


@dataclass(frozen=True)
class Verdict:
    """Where a run ended: the iteration whose weights are the result (0: initial), and why."""

    iteration: int
    reason: str


@dataclass(frozen=True)
class AdaptationResult:
    """What `adapt` returns.

    Attributes:
        adapter: the given adapter around the adapted network.
        iteration: the snapshot that is in it; 0 is the initial network.
        reason: why the run ended there, one sentence.
        history: one row of figures per logged iteration.
        directory: the run on disk.
    """

    adapter: Adapter
    iteration: int
    reason: str
    history: list[Row] = field(repr=False)
    directory: RunDirectory

    @property
    def snapshots(self) -> list[int]:
        """Iterations that can be selected, 0 being the initial network."""
        return self.directory.snapshots()

    def select(self, at: int | Monitor) -> Adapter:
        """The adapter with other weights of the run.

        Args:
            at: an iteration out of `snapshots`, or a monitor such as `EmbeddingDrift(0.3)`: the
                snapshot that it chooses by what the run has measured.
        """
        if isinstance(at, Monitor):
            looks = _looks(self.history, at)
            if not looks:
                raise ConfigError(f"{at!r} was not measured in this run; give an iteration.")
            at = at.choose(looks)
        device = next(self.adapter.model.parameters()).device
        return _with_snapshot(self.adapter, self.directory, at, device)


def adapt(
    adapter: Adapter,
    images: Any,
    *,
    validation: Any = None,
    config: Config | None = None,
    stop: Stop | Literal["auto"] | None = "auto",
    output_dir: str | Path | RunDirectory | None = None,
    resume: bool = False,
    channel_axis: int | None = None,
    progress: bool = True,
) -> AdaptationResult:
    """Adapt a trained model to images, without labels.

    The given adapter stays as it is. The result is the snapshot that the criterion chooses. It is
    the initial network if no other is better by that criterion, if the loss is not finite, or if
    the predictions collapse; `reason` says so.

    Args:
        adapter: the trained model.
        images: what to adapt to, any source that `open_images` takes.
        validation: held-out images, any such source. By default a seeded share of `images`
            (`config.validation_share`) is held back; a single image serves for both. Of given
            ones, the first `config.validation_images` are used.
        config: all settings.
        stop: `ViewAgreement(threshold)`, `EmbeddingDrift(threshold)`,
            `FalseNegativeRate(threshold)`, any callable `stop(run, info) -> bool` that is asked at
            each validation point, or None. "auto" is the first, or the second where the adapter
            cannot decode instances.
        output_dir: keeps config, history, checkpoint, snapshots, examples and the model.
        resume: go on with the run in `output_dir` (or start it, if there is none).
        channel_axis: see `open_images`.
        progress: whether a progress bar is shown.

    Raises:
        SelfAdaptError: bad settings, model or folder, or bad images among the held-out ones and
            the first 256, before any training; a later image when it is read (`resume` goes on).
    """
    config = Config() if config is None else config
    if not isinstance(adapter, Adapter):
        raise ConfigError(f"adapter is a {type(adapter).__name__}: give an Adapter.")
    if not isinstance(config, Config):
        raise ConfigError(f"config is a {type(config).__name__}: give Config(...).")
    if stop == "auto":
        stop = usual_criterion(adapter)()
    if stop is not None and (isinstance(stop, type) or not callable(stop)):
        raise ConfigError(
            f"stop={stop!r} is not allowed: give ViewAgreement(), EmbeddingDrift(), "
            'FalseNegativeRate(), a function stop(run, info), "auto", or None.'
        )
    if resume and output_dir is None:
        raise ConfigError("resume=True needs output_dir, the folder of the run to go on with.")
    directory = _open_directory(output_dir)
    directory.check(config, resume=resume)
    sources = _windows_of(images, channel_axis)
    if validation is None:
        sources, held_out = hold_out(sources, config)
    else:
        held_out = _windows_of(validation, channel_axis)[: config.validation_images]
        refuse_masks(held_out)
    adapter = adapter.calibrated(sources)
    crops = Crops(adapter, sources, config)
    crops.check()
    run = SelfAdaptation(adapter, config)
    looks = Validation(
        adapter,
        run.initial,
        [_validation_image(adapter, source, config) for source in held_out],
        [stop] if isinstance(stop, Monitor) else [],
    )
    data = {"images": sorted(map(str, sources)), "held_out": sorted(map(str, held_out))}
    directory.start(config, data)
    history, verdict = _train(run, crops, looks, stop, directory, progress=progress)
    adapted = _with_snapshot(adapter, directory, verdict.iteration, run.device)
    if output_dir is not None:
        before = adapter.with_model(run.initial)
        _export(before, adapted, looks.images, directory)
        directory.write_json(
            "result.json",
            {
                "iteration": verdict.iteration,
                "reason": verdict.reason,
                "thresholds": {stop.name: stop.threshold} if isinstance(stop, Monitor) else {},
                "held_out": [str(source) for source in held_out],
            },
        )
    return AdaptationResult(adapted, verdict.iteration, verdict.reason, history, directory)


def _open_directory(output_dir: str | Path | RunDirectory | None) -> RunDirectory:
    """The given folder, or a temporary one that goes when nobody holds it any more."""
    if isinstance(output_dir, RunDirectory):
        return output_dir
    directory = RunDirectory(output_dir or tempfile.mkdtemp(prefix="selfadapt-"))
    if output_dir is None:
        weakref.finalize(directory, shutil.rmtree, directory.path, ignore_errors=True)
    return directory


def _windows_of(images: Any, channel_axis: int | None) -> Sequence[LazyImage]:
    listed = open_images(images, channel_axis=channel_axis)
    return [window for image in listed for window in image.windows()]


def hold_out(
    sources: Sequence[LazyImage], config: Config
) -> tuple[Sequence[LazyImage], Sequence[LazyImage]]:
    """Split into training and held-out images, by `config.seed`; a single image serves as both.

    Blank windows of large images are not held out.
    """
    if len(sources) == 1:
        return sources, sources
    wanted = max(1, round(config.validation_share * len(sources)))
    count = min(wanted, config.validation_images, len(sources) - 1)
    order = np.random.default_rng(config.seed).permutation(len(sources)).tolist()
    seeing = (i for i in order if not (sources[i].is_window and is_constant(sources[i].read())))
    held_out = set(islice(seeing, count))
    if not held_out:
        raise ImageError("all windows of the image are blank: there is nothing to adapt to.")
    return (
        [source for i, source in enumerate(sources) if i not in held_out],
        [source for i, source in enumerate(sources) if i in held_out],
    )


def _validation_image(adapter: Adapter, source: LazyImage, config: Config) -> Tensor:
    image = prepare(adapter, source.read(), str(source))
    return centre_crop(image, config.validation_size).clone()  # not a view that keeps all of it


def _train(
    run: SelfAdaptation,
    crops: Crops,
    looks: Validation,
    stop: Stop | None,
    directory: RunDirectory,
    *,
    progress: bool,
) -> tuple[list[Row], Verdict]:
    """Step until the verdict, leaving snapshots, history and checkpoint at each look."""
    config = run.config
    state = directory.load_checkpoint()
    history: list[Row] = []
    verdict = None
    if state is None:
        directory.save_snapshot(0, run.initial)
        history.append(first_look(run, crops, looks, stop))
    else:
        run.load_state_dict(state)
        history = [row for row in directory.read_history() if row["iteration"] <= run.iteration]
        if not history or history[-1]["iteration"] != run.iteration:
            raise CheckpointError(
                f"{directory.path / 'history.csv'} does not reach the checkpoint at iteration "
                f"{run.iteration}: start in a new folder."
            )
        verdict = _judge(run, history, stop)
    if verdict:
        return history, verdict
    bar = tqdm(
        total=config.iterations, initial=run.iteration, disable=not progress, unit="it", leave=False
    )
    with bar:
        shown: Row = {}
        for info in run.iterate(crops.batches(run.iteration, config.iterations), looks):
            bar.update()
            if not run.look_due and run.iteration % LOG_EVERY:
                continue
            row = {"iteration": run.iteration, **{name: float(v) for name, v in info.items()}}
            history.append(row)
            shown |= {name: row[name] for name in _SHOWN if name in row}
            bar.set_postfix({name: f"{value:.3g}" for name, value in shown.items()})
            if run.look_due:
                verdict = _judge(run, history, stop)
                if is_finite(run.exported):  # safe to go back to
                    directory.save_snapshot(run.iteration, run.exported)
                directory.write_history(history)
                directory.save_checkpoint(run.state_dict())
                if verdict:
                    return history, verdict
    raise AssertionError("the last iteration always gives a verdict")


def first_look(run: SelfAdaptation, crops: Crops, looks: Validation, stop: Stop | None) -> Row:
    """Figures of the initial network.

    The run then starts with batch-norm statistics of the images, if `config.batch_norm` says so.
    """
    row: Row = {"iteration": 0, **looks(run.initial)}
    policy = run.config.batch_norm
    choosing = policy == "auto" and isinstance(stop, ViewAgreement)
    if batch_norms(run.initial) and (policy == "target" or choosing):
        batches = crops.batches(0, STATISTICS_BATCHES)
        measured = adabn(run.adapter.with_model(run.initial), batches)
        models, share = {1.0: measured}, 1.0
        if choosing:
            models |= {0.0: run.initial, 0.5: mixed(run.initial, measured, 0.5)}
            row["agreement_half"] = looks(models[0.5])["agreement"]
            row["agreement_target"] = looks(measured)["agreement"]
            share = _best_share(row)
        row["target_statistics"] = share
        run.start_from(models[share])
    return row


def _best_share(first: Row) -> float:
    """Of the batch-norm statistics of the images, by how well copies agree."""
    agreement = {0.5: first["agreement_half"], 1.0: first["agreement_target"]}
    best = max(agreement, key=agreement.__getitem__)
    return best if agreement[best] - first["agreement"] >= STATISTICS_RISE else 0.0


_SHOWN = ("loss", "kept", "d_emb", "agreement")


def _judge(run: SelfAdaptation, history: list[Row], stop: Stop | None) -> Verdict | None:
    """What the newest row means; None: go on."""
    now = history[-1]
    doubts = [value for name, value in now.items() if name.startswith("doubt_")]
    if not (all(map(math.isfinite, [now["loss"], *doubts])) and is_finite(run.exported)):
        return Verdict(0, "loss, weights or predictions are not finite; the initial ones are kept")
    if now["kept"] == 0:
        return Verdict(0, "the masks keep no pixel any more; the initial weights are kept")
    if now.get("instances") == 0:
        return Verdict(0, "no instance is left; the initial weights are kept")
    at = int(now["iteration"])
    if stop is not None and stop(run, now):
        earlier = (at - 1) // run.config.validate_every * run.config.validate_every
        name = f"{stop!r} at {now[stop.name]:.3f}" if isinstance(stop, Monitor) else "stop"
        kept = f"the weights of iteration {earlier}" if earlier else "the initial weights"
        return Verdict(earlier, f"{name} tripped at iteration {at}; {kept} are kept")
    if at < run.config.iterations:
        return None
    if isinstance(stop, ViewAgreement):
        return _most_agreeing(stop, history)
    return Verdict(at, f"all {at} iterations are done and no criterion tripped")


def _most_agreeing(stop: ViewAgreement, history: list[Row]) -> Verdict:
    looks = _looks(history, stop)
    agreement = {int(look["iteration"]): look[stop.name] for look in looks}
    if kept := stop.choose(looks):
        change = f"{agreement[0]:.3f} -> {agreement[kept]:.3f}"
        if share := looks[0].get("target_statistics"):
            change += f", with {share:.0%} batch-norm statistics of these images"
        return Verdict(kept, f"flipped and turned copies agree best at iteration {kept} ({change})")
    first, *later = agreement.values()
    return Verdict(
        0,
        f"flipped and turned copies agree by less than {stop.threshold:g} better than at first "
        f"({first:.3f}, later at best {max(later):.3f}); the initial weights are kept",
    )


def _looks(history: Sequence[Row], monitor: Monitor) -> list[Row]:
    """The rows in which a monitor has a finite number."""
    return [row for row in history if math.isfinite(row.get(monitor.name, math.nan))]


def _with_snapshot(
    adapter: Adapter, directory: RunDirectory, iteration: int, device: torch.device
) -> Adapter:
    model = copy_network(adapter.model, device).eval()
    model.load_state_dict(directory.load_snapshot(iteration))
    return adapter.with_model(model)


def _export(
    before: Adapter, after: Adapter, images: Sequence[Tensor], directory: RunDirectory
) -> None:
    """Write the model in its native format, and what the report shows."""
    # whatever `save` prints would name the file by the name that it does not keep
    with directory.replacing("model") as partial, redirect_stdout(None):
        after.save(partial)
    with directory.replacing("examples") as partial:
        partial.mkdir()
        for index, image in enumerate(images[:EXAMPLES]):
            axes = {"axes": "CYX"}
            tifffile.imwrite(partial / f"{index}-image.tif", image.numpy(), metadata=axes)
            for when, adapter in (("before", before), ("after", after)):
                instances = predict(adapter, adapter.model, image).instances
                if instances is not None:
                    tifffile.imwrite(partial / f"{index}-{when}.tif", instances)
