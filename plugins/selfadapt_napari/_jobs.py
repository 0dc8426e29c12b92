"""What is done in another thread. Needs neither napari nor Qt."""

import copy
import json
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from selfadapt import (
    AdaptationResult,
    Adapter,
    Config,
    ConfigError,
    Event,
    ImageError,
    LazyImage,
    OutputError,
    Quality,
    SelfAdaptError,
    adapt,
    calibrate,
    estimate_quality,
    load_adapter,
)

# the shell's own, so that models and options mean the same here
from selfadapt._options import model_parser, open_model, option_names
from selfadapt._rundir import ORIGIN, RunDirectory
from selfadapt_napari._talk import Talk
from selfadapt_napari._targets import Labels, Target, images_of

SETTINGS = [field.name for field in fields(Config)]
"""Names of the settings of a run."""


@dataclass(frozen=True)
class Choice:
    """A network as the form names it.

    Attributes:
        adapter: one of `selfadapt.adapters()`; a RUN folder knows its own.
        model: the family's name or file, or a RUN folder.
        options: "diameter=22 iterations=400": what the shell has as flags of `adapt`.
    """

    adapter: str
    model: str
    options: str = ""


@dataclass(frozen=True)
class Opened:
    """A network, the settings of a run of it, and what the folder of a run says of it."""

    adapter: Adapter
    config: Config
    calibrate: bool
    origin: dict[str, Any]


def open_choice(choice: Choice) -> Opened:
    """Open a network as the shell does.

    Raises:
        SelfAdaptError: there is no such adapter, model or option.
    """
    if not choice.model.strip():
        raise ConfigError("no model is named: give the name, file or folder of one, or a RUN.")
    given = _words(choice.options)
    model = choice.model.strip()
    words = [f"--model={model}", "--images=."]
    if not (RunDirectory(model).path / ORIGIN).exists():
        words.append(f"--adapter={choice.adapter}")
    parser = model_parser("adapt", None, words)
    kind = parser.kind
    parser.add_argument("--calibrate", type=bool, default=True)
    parser.add_class_arguments(Config)
    known = {*option_names(kind), "calibrate", *SETTINGS}
    for word in given:
        name = word[2:].partition("=")[0]
        if name not in known:
            raise ConfigError(
                f"there is no option {name!r}. The adapter has {', '.join(option_names(kind))}; a "
                f"run has calibrate, {', '.join(SETTINGS)}."
            )
    options = parser.parse_args([*words, *given])
    config = Config(**{name: options[name] for name in SETTINGS})
    adapter, origin = open_model(kind, options)
    return Opened(adapter, config, options.calibrate, origin)


def options_of(adapter: str) -> list[str]:
    """The names of an adapter's own options."""
    return option_names(load_adapter(adapter))


def _words(options: str) -> list[str]:
    """Flags of the shell: --diameter=22."""
    try:
        parts = shlex.split(options)
    except ValueError as error:
        raise ConfigError(f"options {options!r} cannot be read: {error}.") from None
    words = []
    for part in parts:
        name, equals, value = part.removeprefix("--").partition("=")
        if not (name and equals and value):
            raise ConfigError(
                f"options {options!r} cannot be read: write name=value, with a space between two, "
                "such as: diameter=22 iterations=400"
            )
        words.append(f"--{name.replace('-', '_')}={value}")
    return words


@dataclass(frozen=True)
class Made:
    """Labels of a target, by one of the networks, and how many instances there are."""

    target: Target
    network: str
    labels: Labels
    count: int


def segment(networks: dict[str, Adapter], targets: Sequence[Target], talk: Talk) -> list[Made]:
    """Labels of all targets by each of some networks, which are named.

    What cannot be segmented costs no other image: it stays without instances, and is said.

    Raises:
        RunCancelledError: nothing is to be returned.
        SelfAdaptError: none of the images can be segmented.
    """
    images = images_of(targets)
    total, done = len(images) * len(networks), 0
    made = []
    bad: list[SelfAdaptError] = []
    for name, adapter in networks.items():
        network = _interruptible(adapter, images, talk)
        network.check(images)
        talk.say(Event("stage", "segmentation", done, total, name))
        for target in targets:
            labels, count = target.blank(), 0
            for index, image in target.planes():
                talk.refuse_cancelled()
                try:
                    found = network.segment(image.read(), channel_axis=0)
                except (ImageError, OutputError) as error:
                    bad.append(type(error)(f"{image}: {error}"))
                    talk.say(str(bad[-1]))
                else:
                    labels[index] = found
                    count += len(np.unique(found[found > 0]))
                done += 1
                talk.say(Event("step", "segmentation", done, total, name))
            made.append(Made(target, name, labels, count))
    if len(bad) == total:
        raise bad[0]
    return made


def check(adapter: Adapter, targets: Sequence[Target], talk: Talk) -> Quality:
    """The AP to be expected of a network.

    Raises:
        RunCancelledError: nothing is to be returned.
        SelfAdaptError: see `estimate_quality`.
    """
    images = images_of(targets)
    watched = _interruptible(adapter, images, talk)
    return estimate_quality(watched, images, progress=False, callback=talk.say)


def _interruptible(adapter: Adapter, images: Sequence[LazyImage], talk: Talk) -> Adapter:
    """The adapter, calibrated, which refuses to go on as soon as that is wanted."""
    watched = copy.copy(adapter)
    forward = adapter.forward_tiled

    def forward_tiled(model: Any, image: Any) -> Any:
        talk.refuse_cancelled()
        return forward(model, image)

    vars(watched)["forward_tiled"] = forward_tiled
    if watched.auto:
        return calibrate(watched, images, progress=False, callback=talk.say)
    return watched


def run(opened: Opened, targets: Sequence[Target], folder: str, talk: Talk) -> AdaptationResult:
    """Adapt; what has become of it so far if that is cancelled.

    Args:
        opened: the network.
        targets: on which images.
        folder: a RUN folder to write; "" for none.
        talk: is told of everything.

    Raises:
        SelfAdaptError: see `adapt`.
    """
    notes = {ORIGIN: json.dumps(opened.origin, indent=2)}
    return adapt(
        opened.adapter,
        images_of(targets),
        config=opened.config,
        calibrate=opened.calibrate,
        output_dir=RunDirectory(folder, notes) if folder.strip() else None,
        progress=False,
        callback=talk.say,
    )
