"""The shell: selfadapt demo | adapt | segment | evaluate | report | adapters."""

import argparse
import json
import math
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import fields
from importlib.util import find_spec
from inspect import signature
from pathlib import Path
from typing import Any, Literal

import numpy as np
import tifffile
import yaml
from jsonargparse import ArgumentParser, Namespace
from tqdm import tqdm

from selfadapt._adapt import adapt
from selfadapt._adapter import Adapter
from selfadapt._config import Config
from selfadapt._demo import run_demo
from selfadapt._errors import CheckpointError, ConfigError, ImageError, SelfAdaptError
from selfadapt._images import LazyImage, open_images, refuse_masks
from selfadapt._matching import Matches, match
from selfadapt._monitors import (
    EmbeddingDrift,
    FalseNegativeRate,
    Monitor,
    ViewAgreement,
    usual_criterion,
)
from selfadapt._network import pick_device
from selfadapt._registry import adapters, load_adapter
from selfadapt._report import write_report
from selfadapt._rundir import RunDirectory, write_file

IOUS = tuple(round(0.5 + 0.05 * k, 2) for k in range(10))
ORIGIN = "adapter.json"
"""In a run folder: which adapter, with which options, opens its model."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code: 0, or 2 for an error that the user can mend."""
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] in ("-h", "--help"):
        print(_usage())
        return 0 if words else 2
    name, *rest = words
    if name not in COMMANDS:
        return _fail(f"there is no command {name!r}; there are {', '.join(COMMANDS)}.")
    try:
        COMMANDS[name](rest)
    except SelfAdaptError as error:
        return _fail(str(error))
    except OSError as error:
        return _fail(f"{error.filename or ''}: {error.strerror or error}".lstrip(": "))
    except argparse.ArgumentError as error:
        return _fail(f"{error} (see: selfadapt {name} --help)")
    except KeyboardInterrupt:
        return _fail("interrupted; `selfadapt adapt ... --resume` goes on with an adaptation.", 130)
    return 0


def _fail(message: str, code: int = 2) -> int:
    print(f"selfadapt: {' '.join(message.split())}", file=sys.stderr)
    return code


def _usage() -> str:
    lines = [f"  {name:9} {command.__doc__}" for name, command in COMMANDS.items()]
    return "usage: selfadapt COMMAND [options]; selfadapt COMMAND --help\n\n" + "\n".join(lines)


def _parser(command: str, **positional: str) -> ArgumentParser:
    doc = COMMANDS[command].__doc__
    parser = ArgumentParser(prog=f"selfadapt {command}", description=doc, exit_on_error=False)
    for name, text in positional.items():
        parser.add_argument(name, type=str, help=text)
    return parser


def _model_parser(command: str, words: Sequence[str]) -> tuple[ArgumentParser, type[Adapter]]:
    """A parser with --adapter, --model, --images and the adapter's own options as flags."""
    parser = _parser(command)
    add = parser.add_argument
    add("--config", action="config", help="file with any of these options")
    add("--adapter", type=str | None, help="a name that `selfadapt adapters` lists")
    add("--model", type=str, required=True, help="the family's name or file, or a RUN folder")
    add("--images", type=str, required=True, help="folder, file or zarr")
    add("--channel_axis", type=int | None, help="where the channels are, if files do not say it")
    if command != "adapt":  # there it is a setting
        add("--device", type=str, default="auto", help='a torch device; "auto": CUDA if available')
    kind, given = _named_adapter(words)
    if kind is None:
        if not {"-h", "--help"} & set(words):
            raise ConfigError("--adapter is missing: give one that `selfadapt adapters` lists.")
        parser.description = f"{parser.description} Name an --adapter to see its options, too."
        return parser, Adapter
    parser.add_method_arguments(kind, "from_pretrained", skip={"model"})
    known = signature(kind.from_pretrained).parameters.keys() - {"model"}
    if unknown := given.keys() - known:
        raise CheckpointError(
            f"{ORIGIN} of the run has options that the adapter does not know "
            f"({', '.join(sorted(unknown))}): give RUN/model with --adapter and its options."
        )
    parser.set_defaults(given)
    return parser, kind


def _named_adapter(words: Sequence[str]) -> tuple[type[Adapter] | None, dict[str, Any]]:
    """The adapter that the words, their config file or their RUN folder name.

    And the options with which the model of that RUN folder was opened.
    """
    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    for flag in ("--adapter", "--model", "--config"):
        early.add_argument(flag)
    known, _ = early.parse_known_args(words)
    named = _read_config(known.config) if known.config else {}
    name, model = known.adapter or named.get("adapter"), known.model or named.get("model")
    origin = _origin(model) if model else None
    if origin:
        if name not in (None, origin["adapter"]):
            raise ConfigError(f"{model!r} is a run of adapter {origin['adapter']!r}, not {name!r}.")
        name = origin["adapter"]
    elif not (name or {"-h", "--help"} & set(words)) and model and not Path(model).exists():
        raise ConfigError(f"there is no file or folder {model!r}; of a name, give --adapter, too.")
    return load_adapter(name) if name else None, origin["options"] if origin else {}


def _origin(model: str) -> dict[str, Any] | None:
    """What a RUN folder says of its adapter; None if `model` is no such folder."""
    directory = RunDirectory(model)
    if not (directory.path / ORIGIN).exists():
        if (directory.path / "history.csv").exists():
            raise CheckpointError(
                f"{model!r} is a run made from Python: give its model, {str(directory.model)!r}, "
                "with --adapter and its options."
            )
        return None
    origin = directory.read_json(ORIGIN)
    if not isinstance(origin.get("adapter"), str) or not isinstance(origin.get("options"), dict):
        raise CheckpointError(f"{directory.path / ORIGIN} is damaged: no adapter and options.")
    return origin


def _read_config(path: str) -> dict[str, Any]:
    try:
        content = yaml.safe_load(Path(path).read_text())
    except (OSError, yaml.YAMLError) as error:
        raise ConfigError(f"config file {path!r} cannot be read: {error}") from None
    if not isinstance(content, dict):
        raise ConfigError(f"config file {path!r} must hold 'name: value' lines.")
    return content


def _open_model(kind: type[Adapter], options: Namespace) -> tuple[Adapter, dict[str, Any]]:
    """The adapter, and what `ORIGIN` says of a run with it."""
    names = [name for name in signature(kind.from_pretrained).parameters if name != "model"]
    chosen = {name: options[name] for name in names if options[name] is not None}
    model, directory = options.model, RunDirectory(options.model)
    if origin := _origin(options.model):
        if not directory.model.exists():
            raise CheckpointError(f"run {model!r} is not finished: resume it first (--resume).")
        model = str(directory.model)
    try:
        adapter = kind.from_pretrained(model, **chosen)
    except TypeError as error:
        if not origin:
            raise
        raise CheckpointError(f"{ORIGIN} of {options.model!r} is damaged: {error}") from None
    adapter.model.to(pick_device(options.device))
    name = origin["adapter"] if origin else options.adapter
    return adapter, {"adapter": name, "options": chosen}


def _demo(words: Sequence[str]) -> None:
    """Adapt the bundled network to a real image, offline, and write a report."""
    parser = _parser("demo")
    parser.add_argument("--out", type=str, default="selfadapt-demo", help="folder of the run")
    run_demo(parser.parse_args(words).out)


def _adapt(words: Sequence[str]) -> None:
    """Adapt a model to images without labels; the result is a RUN folder."""
    parser, kind = _model_parser("adapt", words)
    add = parser.add_argument
    add("--out", type=str, required=True, help="RUN folder to write")
    add("--validation", type=str | None, help="held-out images (default: a share of the images)")
    names = Literal["auto", "agreement", "embedding", "fn", "none"]
    add("--stop", type=names, default="auto", help="criterion (auto: agreement, if it can decode)")
    add("--tau", type=float | None, help="its threshold (0.06; embedding: 0.5; fn: 0.05)")
    add("--resume", action="store_true", help="go on with RUN, or start it")
    parser.add_class_arguments(Config)
    options = parser.parse_args(words)
    adapter, origin = _open_model(kind, options)
    repeat = options.clone()
    repeat.pop("resume")  # the file starts a run of its own
    notes = {ORIGIN: json.dumps(origin, indent=2), "run.yaml": parser.dump(repeat)}
    directory = RunDirectory(options.out, notes)
    result = adapt(
        adapter,
        options.images,
        validation=options.validation,
        config=Config(**{field.name: options[field.name] for field in fields(Config)}),
        stop=_criterion(adapter, options.stop, options.tau),
        output_dir=directory,
        resume=options.resume,
        channel_axis=options.channel_axis,
    )
    print(f"Result: {result.reason}.\nModel:  {directory.model}")
    if usage := result.adapter.usage(directory.model):
        print(f"Use it: {usage}")
    if find_spec("matplotlib"):
        print(f"Report: {write_report(directory)}")
    else:
        print(f"Report: pip install 'selfadapt[report]', then: selfadapt report {options.out}")


def _criterion(adapter: Adapter, stop: str, tau: float | None) -> Monitor | None:
    if stop == "none":
        return None
    kinds: dict[str, Callable[..., Monitor]] = {
        "auto": usual_criterion(adapter),
        "agreement": ViewAgreement,
        "embedding": EmbeddingDrift,
        "fn": FalseNegativeRate,
    }
    return kinds[stop]() if tau is None else kinds[stop](tau)


def _segment(words: Sequence[str]) -> None:
    """Write the instances of each image as a label TIFF."""
    parser, kind = _model_parser("segment", words)
    parser.add_argument("--out", type=str, required=True, help="folder to write to")
    options = parser.parse_args(words)
    out = Path(options.out)
    sources = open_images(options.images, channel_axis=options.channel_axis)
    refuse_masks(sources)
    files = [out / f"{stem}.tif" for stem in _by_stem(sources)]
    taken = next((file for file in files if file.exists()), None)
    if taken is not None:
        raise ImageError(f"{str(taken)!r} exists already: give a new folder.")
    adapter = _open_model(kind, options)[0].calibrated(sources)
    out.mkdir(parents=True, exist_ok=True)
    for source, file in zip(tqdm(sources, unit="image", leave=False), files, strict=True):
        labels = _segment_source(adapter, source)
        kept = labels.astype(np.uint16) if labels.max() < 2**16 else labels
        partial = file.with_suffix(".partial")
        tifffile.imwrite(partial, kept, compression="zlib")
        os.replace(partial, file)
    print(f"{len(files)} label image(s) in {out}")


def _segment_source(adapter: Adapter, source: LazyImage) -> Any:
    try:
        return adapter.segment(source.read(), channel_axis=0)
    except ImageError as error:
        raise ImageError(f"{source}: {error}") from None


def _by_stem(sources: Sequence[LazyImage]) -> dict[str, LazyImage]:
    """Images by the name of what is made of them; two of one name are refused."""
    named: dict[str, LazyImage] = {}
    for source in sources:
        if source.stem in named:
            raise ImageError(
                f"{source} and {named[source.stem]} would both be called {source.stem!r}: rename "
                "one of them."
            )
        named[source.stem] = source
    return named


def _evaluate(words: Sequence[str]) -> None:
    """Score a model against masks; prints JSON."""
    parser, kind = _model_parser("evaluate", words)
    parser.add_argument("--masks", type=str, required=True, help="label images, named as images")
    parser.add_argument("--json", type=str | None, help="file that the scores are written to")
    options = parser.parse_args(words)
    sources = open_images(options.images, channel_axis=options.channel_axis)
    refuse_masks(sources)
    masks = _by_stem(open_images(options.masks))
    missing = [str(source) for stem, source in _by_stem(sources).items() if stem not in masks]
    if options.json and not Path(options.json).absolute().parent.is_dir():
        raise ConfigError(f"there is no folder for --json {options.json!r}.")
    if missing:
        raise ImageError(f"no mask in {options.masks!r} for {missing[0]} ({len(missing)} missing).")
    adapter = _open_model(kind, options)[0].calibrated(sources)
    per_image = []
    for source in tqdm(sources, unit="image", leave=False):
        mask = masks[source.stem].read()
        if len(mask) != 1:
            raise ImageError(f"the mask of {source} has {len(mask)} channels, not one.")
        found = _segment_source(adapter, source)
        try:
            per_image.append(match(mask[0], found, IOUS))
        except ImageError as error:
            raise ImageError(f"the mask of {source}: {error}") from None
    scores = json.dumps(summarise(per_image), indent=2)
    if options.json:
        write_file(Path(options.json), f"{scores}\n".encode())
    print(scores)


def summarise(per_image: Sequence[Sequence[Matches]]) -> dict[str, Any]:
    """Scores of `evaluate` from the matches of each image at the thresholds `IOUS`.

    `ap` and `ap50` pool the counts of all images; `ap50_image_mean` averages the images' AP.
    Scores of nothing (no instance on either side) are null.
    """
    pooled = [sum(column, Matches()) for column in zip(*per_image, strict=True)]
    means = [matches[0].ap for matches in per_image if not math.isnan(matches[0].ap)]
    at50 = pooled[0]
    return {
        "ap50": _number(at50.ap),
        "ap50_image_mean": _number(float(np.mean(means)) if means else math.nan),
        "ap": {str(iou): _number(counts.ap) for iou, counts in zip(IOUS, pooled, strict=True)},
        "precision50": _number(at50.precision),
        "recall50": _number(at50.recall),
        "images": len(per_image),
        "instances": at50.tp + at50.fn,
    }


def _number(value: float) -> float | None:
    return None if math.isnan(value) else round(value, 4)


def _report(words: Sequence[str]) -> None:
    """Draw the report of a RUN folder."""
    run = _parser("report", run="RUN folder").parse_args(words).run
    print(write_report(run))


def _adapters(words: Sequence[str]) -> None:
    """List the adapters, and what is missing for them."""
    _parser("adapters").parse_args(words)
    for name, missing in sorted(adapters().items()):
        print(f"{name:12} {missing or 'ready'}")


COMMANDS: dict[str, Callable[[Sequence[str]], None]] = {
    "demo": _demo,
    "adapt": _adapt,
    "segment": _segment,
    "evaluate": _evaluate,
    "report": _report,
    "adapters": _adapters,
}
