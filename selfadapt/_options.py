"""Flags of the shell's commands: those of every model, and each adapter's own."""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from inspect import Parameter, Signature, signature
from pathlib import Path
from typing import Any

import torch
from jsonargparse import Namespace

from selfadapt._adapter import Adapter
from selfadapt._calibrate import go_on, search
from selfadapt._ending import TTA
from selfadapt._errors import CheckpointError, ConfigError
from selfadapt._events import Teller
from selfadapt._lazy import LazyImage
from selfadapt._network import checksum_of, pick_device
from selfadapt._registry import load_adapter
from selfadapt._rundir import INPUT, ORIGIN, RunDirectory
from selfadapt._settings_file import read_settings
from selfadapt._wording import Help, Parser, without_value


def option_names(kind: type[Adapter]) -> list[str]:
    """The options of an adapter: keyword-only arguments of what opens it."""
    parameters = _opening(kind).parameters.values()
    return [p.name for p in parameters if p.kind is Parameter.KEYWORD_ONLY]


def _opens_itself(kind: type[Adapter]) -> bool:
    """Whether it overrides `from_pretrained`; else the class is what takes the options."""
    ours: Any = Adapter.from_pretrained
    theirs: Any = kind.from_pretrained
    return theirs.__func__ is not ours.__func__


def _opening(kind: type[Adapter]) -> Signature:
    return signature(kind.from_pretrained if _opens_itself(kind) else kind)


def make_parser(command: str, doc: str | None, **positional: str) -> Parser:
    """The parser of a command, with arguments that have no flag."""
    parser = Parser(
        prog=f"selfadapt {command}", description=doc, exit_on_error=False, formatter_class=Help
    )
    for name, text in positional.items():
        parser.add_argument(name, type=str, help=text)
    return parser


def model_parser(command: str, doc: str | None, words: Sequence[str]) -> Parser:
    """A parser with --adapter, --model, --images and the adapter's own options as flags."""
    parser = make_parser(command, doc)
    add = parser.add_argument
    add("--config", action="config", help="file with any of these options")
    add("--adapter", type=str | None, help="a name that `selfadapt adapters` lists")
    add("--model", type=str, required=True, help="the family's name or file, or a RUN folder")
    add("--snapshot", type=str | None, help="of a RUN folder, if not the one that was kept")
    if command != "select":
        add("--images", type=str, required=True, help="folder, file or zarr")
        add("--channel_axis", type=int | None, help="where the channels are, if files do not say")
    if command != "adapt":  # there it is a setting
        add("--device", type=str, default="auto", help='a torch device; "auto": CUDA if available')
    if command in ("segment", "evaluate", "check"):
        told = "mean over flips and turns, in up to eight times the time (default: as RUN has kept)"
        add("--tta", type=bool | None, help=told)
    kind, given = _named_adapter(words)
    if kind is None:
        if not {"-h", "--help"} & set(words):
            raise ConfigError("--adapter is missing: give one that `selfadapt adapters` lists.")
        parser.description = f"{parser.description} Name an --adapter to see its options, too."
        return parser
    names = option_names(kind)
    other = {name for name in _opening(kind).parameters if name not in names}
    if _opens_itself(kind):
        parser.add_method_arguments(kind, "from_pretrained", skip=other)
    else:
        parser.add_class_arguments(kind, skip=other)
    if unknown := given.keys() - set(names):
        raise CheckpointError(
            f"{ORIGIN} of the run has options that the adapter does not know "
            f"({', '.join(sorted(unknown))}): give RUN/model with --adapter and its options."
        )
    parser.set_defaults(given)
    parser.kind = kind
    return parser


def _named_adapter(words: Sequence[str]) -> tuple[type[Adapter] | None, dict[str, Any]]:
    """The adapter that the words, their config file or their RUN folder name.

    And the options with which the model of that RUN folder was opened.
    """
    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    for flag in ("--adapter", "--model", "--config"):
        early.add_argument(flag)
    try:
        known, _ = early.parse_known_args(words)
    except argparse.ArgumentError as error:
        raise ConfigError(f"{without_value(str(error))}.") from None
    named = read_settings(known.config) if known.config else {}
    name, model = known.adapter or named.get("adapter"), known.model or named.get("model")
    for flag, value in (("adapter", name), ("model", model)):
        if value is not None and not isinstance(value, str):
            raise ConfigError(f"{flag} is {value!r} in {known.config!r}: it must be text.")
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


def open_model(kind: type[Adapter], options: Namespace) -> tuple[Adapter, dict[str, Any]]:
    """The adapter, and what `ORIGIN` says of a run with it."""
    chosen = {name: options[name] for name in option_names(kind) if options[name] is not None}
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
    if options.snapshot is not None and not origin:
        raise ConfigError(
            f"--snapshot {options.snapshot} needs --model RUN, a folder that `adapt` has written."
        )
    if (directory.path / INPUT).exists():
        saved = directory.read_json(INPUT)
        if options.snapshot is not None:
            kept = directory.read_json("result.json").get("candidate")
            if str(kept).endswith(TTA):  # that was for the candidate alone
                saved["tta"] = False
        adapter = go_on(adapter, saved)
    if options.snapshot is not None:
        at = int(options.snapshot) if options.snapshot.isdecimal() else options.snapshot
        network = directory.load_network(at, adapter.model, torch.device("cpu"))
        adapter = adapter.with_model(network.eval())
    if options.get("tta") is not None:
        adapter = adapter.with_input(replace(adapter.input, tta=options.tta))
    adapter.model.to(pick_device(options.device))
    name = origin["adapter"] if origin else options.adapter
    return adapter, {"adapter": name, "options": chosen}


def ready(
    kind: type[Adapter], options: Any, sources: Sequence[LazyImage]
) -> tuple[Adapter, dict[str, Any]]:
    """The adapter, with what is "auto" found in the images; and what it is, for a file."""
    adapter, told = open_model(kind, options)
    if adapter.auto:
        with Teller(progress=True) as tell:
            calibration = search(adapter, sources, tell)
        print(f"Input:   {calibration}", file=sys.stderr)
        adapter = calibration.adapter
    adapter.check(sources)
    return adapter, told | {"input": adapter.input.to_dict(), "model": checksum_of(adapter.model)}


def check_file(flag: str, path: str | None) -> None:
    """Raise ConfigError for a file that could not be written, or would take a folder's place."""
    if not path:
        return
    if Path(path).is_dir() or "\0" in path:
        raise ConfigError(f"{flag} {path!r} is a folder, or no name of a file: give one.")
    if not Path(path).absolute().parent.is_dir():
        raise ConfigError(f"there is no folder for {flag} {path!r}.")


def refuse_empty(out: str) -> None:
    if not out.strip() or "\0" in out:
        raise ConfigError("--out is empty, or no name of a folder: give one to write to.")
