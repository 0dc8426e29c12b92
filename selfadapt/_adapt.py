"""One call from images to an adapted model."""

import math
import os
import shutil
import tempfile
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tifffile
from torch import Tensor
from tqdm import tqdm

from selfadapt._adaptation import SelfAdaptation, Stop
from selfadapt._adapter import Adapter
from selfadapt._config import Config
from selfadapt._crops import Crops
from selfadapt._errors import ConfigError
from selfadapt._images import LazyImage, open_images
from selfadapt._monitors import EmbeddingDrift, Monitor, Validation, centre_crop
from selfadapt._network import copy_network
from selfadapt._predict import predict
from selfadapt._prepare import prepare
from selfadapt._rundir import Row, RunDirectory

LOG_EVERY = 10
"""Steps between two rows of the history, beside those of the validation points."""
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
    history: list[Row]
    directory: RunDirectory

    @property
    def snapshots(self) -> list[int]:
        """Iterations that can be selected, 0 being the initial network."""
        return self.directory.snapshots()

    def select(self, at: int | Monitor) -> Adapter:
        """The adapter with other weights of the run.

        Args:
            at: an iteration out of `snapshots`, or a monitor such as `EmbeddingDrift(0.3)`: the
                last snapshot before its threshold was exceeded.
        """
        if isinstance(at, Monitor):
            iteration = 0
            for row in self.history:
                if row.get(at.name, -math.inf) > at.threshold:
                    break
                if at.name in row:
                    iteration = int(row["iteration"])
            at = iteration
        return _with_snapshot(self.adapter, self.directory, at)


def adapt(
    adapter: Adapter,
    images: Any,
    *,
    validation: Any = None,
    config: Config | None = None,
    stop: Stop | None = EmbeddingDrift(),  # noqa: B008 (a monitor is reset before each use)
    output_dir: str | Path | RunDirectory | None = None,
    resume: bool = False,
    channel_axis: int | None = None,
    progress: bool = True,
) -> AdaptationResult:
    """Adapt a trained model to images, without labels.

    The given adapter stays as it is. The result is the last snapshot at which the criterion
    still held. It is the initial network if the criterion trips at the first look, if the loss
    is not finite, or if the predictions collapse; `reason` says so.

    Args:
        adapter: the trained model.
        images: what to adapt to, any source that `open_images` takes.
        validation: held-out images, any such source. By default a seeded share of `images`
            (`config.validation_share`) is held back; a single image serves for both.
        config: all settings.
        stop: `EmbeddingDrift(threshold)`, `FalseNegativeRate(threshold)`, any callable
            `stop(run, info) -> bool` that is asked at each validation point, or None.
        output_dir: keeps config, history, checkpoint, snapshots, examples and the model.
        resume: go on with the run in `output_dir` (or start it, if there is none).
        channel_axis: see `open_images`.
        progress: whether a progress bar is shown.

    Raises:
        SelfAdaptError: bad images, settings, model or folder; before any training.
    """
    config = config or Config()
    sources: Sequence[LazyImage] = open_images(images, channel_axis=channel_axis)
    if validation is None:
        sources, held_out = hold_out(sources, config)
    else:
        held_out = open_images(validation, channel_axis=channel_axis)
        held_out = held_out[: config.validation_images]
    if resume and output_dir is None:
        raise ConfigError("resume=True needs output_dir, the folder of the run to go on with.")
    crops = Crops(adapter, sources, config)
    crops.check()
    run = SelfAdaptation(adapter, config)
    looks = Validation(
        adapter,
        run.initial,
        [_validation_image(adapter, source, config) for source in held_out],
        [stop] if isinstance(stop, Monitor) else [],
    )
    directory = _open_directory(output_dir)
    directory.start(config, resume=resume)
    history, verdict = _train(run, crops, looks, stop, directory, progress=progress)
    adapted = _with_snapshot(adapter, directory, verdict.iteration)
    if output_dir is not None:
        _export(adapter, adapted, looks.images, held_out, directory, verdict)
    return AdaptationResult(adapted, verdict.iteration, verdict.reason, history, directory)


def _open_directory(output_dir: str | Path | RunDirectory | None) -> RunDirectory:
    """The given folder, or a temporary one that goes when nobody holds it any more."""
    if isinstance(output_dir, RunDirectory):
        return output_dir
    directory = RunDirectory(output_dir or tempfile.mkdtemp(prefix="selfadapt-"))
    if output_dir is None:
        weakref.finalize(directory, shutil.rmtree, directory.path, ignore_errors=True)
    return directory


def hold_out(
    sources: Sequence[LazyImage], config: Config
) -> tuple[Sequence[LazyImage], Sequence[LazyImage]]:
    """Split into training and held-out images, by `config.seed`; a single image serves as both."""
    if len(sources) == 1:
        return sources, sources
    wanted = max(1, round(config.validation_share * len(sources)))
    count = min(wanted, config.validation_images, len(sources) - 1)
    order = np.random.default_rng(config.seed).permutation(len(sources))
    held_out = set(order[:count].tolist())
    return (
        [source for i, source in enumerate(sources) if i not in held_out],
        [source for i, source in enumerate(sources) if i in held_out],
    )


def _validation_image(adapter: Adapter, source: LazyImage, config: Config) -> Tensor:
    return centre_crop(prepare(adapter, source.read(), source.name), config.validation_size)


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
        history.append({"iteration": 0, **looks(run.initial)})
    else:
        run.load_state_dict(state)
        history = [row for row in directory.read_history() if row["iteration"] <= run.iteration]
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
            look = run.iteration % config.validate_every == 0 or run.iteration == config.iterations
            if not look and run.iteration % LOG_EVERY:
                continue
            row = {"iteration": run.iteration, **{name: float(v) for name, v in info.items()}}
            history.append(row)
            shown |= {name: row[name] for name in _SHOWN if name in row}
            bar.set_postfix({name: f"{value:.3g}" for name, value in shown.items()})
            if look:
                directory.save_snapshot(run.iteration, run.exported)
                directory.write_history(history)
                directory.save_checkpoint(run.state_dict())
                if verdict := _judge(run, history, stop):
                    return history, verdict
    raise AssertionError("the last iteration always gives a verdict")


_SHOWN = ("loss", "kept", "fn_rate", "d_emb")


def _judge(run: SelfAdaptation, history: list[Row], stop: Stop | None) -> Verdict | None:
    """What the newest row means; None: go on."""
    now = history[-1]
    if not math.isfinite(now["loss"]):
        return Verdict(0, "the loss is not finite any more; the initial weights are kept")
    if now["kept"] == 0:
        return Verdict(0, "the masks keep no pixel any more; the initial weights are kept")
    if now.get("instances") == 0:
        return Verdict(0, "no instance is left; the initial weights are kept")
    at = int(now["iteration"])
    if stop is not None and stop(run, now):
        earlier = [int(row["iteration"]) for row in history[:-1] if "d_emb" in row]
        name = f"{stop!r} at {now[stop.name]:.3f}" if isinstance(stop, Monitor) else "stop"
        kept = f"the weights of iteration {earlier[-1]}" if earlier[-1] else "the initial weights"
        return Verdict(earlier[-1], f"{name} tripped at iteration {at}; {kept} are kept")
    if at == run.config.iterations:
        return Verdict(at, f"all {at} iterations are done and no criterion tripped")
    return None


def _with_snapshot(adapter: Adapter, directory: RunDirectory, iteration: int) -> Adapter:
    model = copy_network(adapter.model, next(adapter.model.parameters()).device).eval()
    model.load_state_dict(directory.load_snapshot(iteration))
    return adapter.with_model(model)


def _export(
    adapter: Adapter,
    adapted: Adapter,
    images: Sequence[Tensor],
    sources: Sequence[LazyImage],
    directory: RunDirectory,
    verdict: Verdict,
) -> None:
    """Write the model in its native format, and what the report shows."""
    if not directory.model.exists():
        partial = directory.path / "model.partial"
        adapted.save(partial)
        os.replace(partial, directory.model)
    examples = directory.path / "examples"
    examples.mkdir(exist_ok=True)
    for index, image in enumerate(images[:EXAMPLES]):
        tifffile.imwrite(examples / f"{index}-image.tif", image.numpy(), metadata={"axes": "CYX"})
        for when, one in (("before", adapter), ("after", adapted)):
            instances = predict(one, one.model, image).instances
            if instances is not None:
                tifffile.imwrite(examples / f"{index}-{when}.tif", instances)
    directory.write_json(
        "result.json",
        {
            "iteration": verdict.iteration,
            "reason": verdict.reason,
            "held_out": [source.name for source in sources],
        },
    )
