"""One line for a script that has a `CellposeModel` already."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from cellpose.models import CellposeModel

import selfadapt
from selfadapt import Config, Event
from selfadapt_cellpose._adapter import CellposeAdapter

logger = logging.getLogger(__name__)


def adapt(
    model: CellposeModel,
    images: Any,
    *,
    diameter: float | Literal["auto"] | None = None,
    channels: Sequence[int] | None = None,
    channel_axis: int | None = None,
    validation: Any = None,
    config: Config | None = None,
    stop: Callable[..., bool] | Literal["auto"] | None = "auto",
    calibrate: bool = True,
    output_dir: str | Path | None = None,
    resume: bool = False,
    progress: bool = True,
    callback: Callable[[Event], Any] | None = None,
    **options: Any,
) -> CellposeModel:
    """Adapt a `CellposeModel` to images without labels; returns another one, ready for `eval`.

        model = selfadapt_cellpose.adapt(model, images, diameter=22)
        masks, flows, styles = model.eval(images, diameter=22)

    The given model stays as it is. How the run ended is logged (level INFO; WARNING where the
    network is not to be trusted, and for what `eval` must be told); `CellposeAdapter` with
    `selfadapt.adapt` gives the run itself, with its snapshots, and `save`.

    Args:
        model: of Cellpose 3 or 4. A network of version 4 is returned in float32.
        images: any source that `selfadapt.open_images` takes: arrays, files, a folder, zarr.
        diameter: of the cells, in pixels; None: see `CellposeAdapter`.
        channels: as in `CellposeModel.eval` of version 3.
        channel_axis: position of the channels, where the source does not say it.
        validation: see `selfadapt.adapt`, as for the arguments that follow.
        config: all settings of the method.
        stop: the criterion.
        calibrate: whether diameter and polarity are first found in the images, where not said.
        output_dir: keeps the run.
        resume: go on with the run in `output_dir`.
        progress: whether a progress bar is shown.
        callback: is told what is done, and may cancel.
        options: further options of `CellposeAdapter`.

    Raises:
        SelfAdaptError: bad settings, model or images, before any training.
    """
    config = config or Config()
    if config.candidates == "auto":  # all but TTA, which `eval` does not know
        config = replace(config, candidates=",".join(n for n in config.chosen if n != "tta"))
    result = selfadapt.adapt(
        CellposeAdapter(model, diameter=diameter, channels=channels, **options),
        images,
        validation=validation,
        config=config,
        stop=stop,
        calibrate=calibrate,
        output_dir=output_dir,
        resume=resume,
        channel_axis=channel_axis,
        progress=progress,
        callback=callback,
    )
    trusted = result.outcome != "not to be trusted"
    level = logging.INFO if trusted else logging.WARNING
    logger.log(level, "Result: %s. %s.", result.outcome, result.reason)
    adapted: CellposeAdapter = result.adapter  # type: ignore[assignment]
    if told := adapted.evaluation():  # else the network sees other images than it has learnt from
        logger.warning("Use it with what calibration has found or you have said: model%s", told)
    return adapted.cellpose_model()
