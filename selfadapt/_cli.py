"""The shell: selfadapt demo | adapt | segment | evaluate | check | calibrate | export | ..."""

import io
import json
import logging
import os
import shlex
import signal
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import fields
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import numpy as np
from torch.distributed import is_torchelastic_launched
from tqdm import tqdm

from selfadapt._adapt import adapt
from selfadapt._adapter import Adapter
from selfadapt._bioimageio import check_package, export_bioimageio
from selfadapt._block_job import pixels_checksum
from selfadapt._calibrate import search
from selfadapt._check import estimate_quality
from selfadapt._config import Config
from selfadapt._demo import run_demo
from selfadapt._disk import appearing, write_file
from selfadapt._errors import ConfigError, ImageError, OutputError, SelfAdaptError
from selfadapt._events import Teller
from selfadapt._images import open_images
from selfadapt._labels import FORMATS, LabelFormat, check_format, read_note, write_labels
from selfadapt._large import is_large, segment_large
from selfadapt._lazy import LazyImage
from selfadapt._masks import pair, refuse_masks
from selfadapt._matching import Matches, match
from selfadapt._monitors import EmbeddingDrift, FalseNegativeRate, Monitor
from selfadapt._network import checksum_of
from selfadapt._normalize import Image, checksum
from selfadapt._options import make_parser, model_parser, open_model, option_names
from selfadapt._registry import adapters
from selfadapt._report import write_report
from selfadapt._rundir import COMMAND, ORIGIN, REPEATS, RunDirectory
from selfadapt._scores import IOUS, Row, summarise, to_csv

NOT_TRUSTED = 3
"""Exit code where the verdict is that a network is not to be trusted."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code.

    0; 2 for an error that the user can mend; 3 where it has worked, and the network is not to be
    trusted on these images.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] in ("-h", "--help"):
        print(_usage())
        return 0 if words else 2
    if words[0] == "--version":
        print(f"selfadapt {version('selfadapt')}")
        return 0
    name, *rest = [_underscored(word) for word in words]
    if name not in COMMANDS:
        return _fail(f"there is no command {name!r}; there are {', '.join(COMMANDS)}.")
    several = int(os.environ.get("WORLD_SIZE", "1")) > 1 and is_torchelastic_launched()
    if several and name != "adapt":
        return _fail(f"{name} works in one process: start it without torchrun.")
    try:
        with _sigterm_as_interrupt(), _quiet(several and os.environ["RANK"] != "0"):
            trusted = COMMANDS[name](rest)
    except SelfAdaptError as error:
        return _fail(str(error))
    except OSError as error:
        return _fail(f"{error.filename or ''}: {error.strerror or error}".lstrip(": "))
    except KeyboardInterrupt:
        return _fail("interrupted; `adapt` and `segment` go on with --resume.", 130)
    # torchrun takes any other code than 0 for a crash
    return NOT_TRUSTED if trusted is False and not several else 0


@contextmanager
def _sigterm_as_interrupt() -> Iterator[None]:
    """So that what is begun is tidied up, temporary folders too."""
    try:
        before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    except ValueError:  # not in the main thread
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def _quiet(wanted: bool) -> Iterator[None]:
    """Of several processes the first one speaks."""
    if not wanted:
        yield
        return
    logging.getLogger("selfadapt").setLevel(logging.ERROR)
    with redirect_stdout(io.StringIO()):
        yield


def _underscored(word: str) -> str:
    """A flag by its name in Python: `--batch-size=8` is `--batch_size=8`."""
    flag, equals, value = word.partition("=")
    return f"--{flag[2:].replace('-', '_')}{equals}{value}" if flag[:2] == "--" else word


def _fail(message: str, code: int = 2) -> int:
    print(f"selfadapt: {' '.join(message.split())}", file=sys.stderr)
    return code


def _usage() -> str:
    lines = [f"  {name:9} {command.__doc__}" for name, command in COMMANDS.items()]
    return "usage: selfadapt COMMAND [options]; selfadapt COMMAND --help\n\n" + "\n".join(lines)


def _demo(words: Sequence[str]) -> None:
    """Adapt the bundled network to a real image, offline, and write a report."""
    parser = make_parser("demo", _demo.__doc__)
    parser.add_argument("--out", type=str, default="selfadapt-demo", help="folder of the run")
    run_demo(parser.parse_args(words).out)


def _adapt(words: Sequence[str]) -> bool:
    """Adapt a model to images without labels; the result is a RUN folder."""
    parser, kind = model_parser("adapt", _adapt.__doc__, words)
    add = parser.add_argument
    add("--out", type=str, required=True, help="RUN folder to write")
    add("--validation", type=str | None, help="held-out images (default: a share of the images)")
    names = Literal["auto", "embedding", "fn", "none"]
    add("--stop", type=names, default="auto", help="who decides (auto: the judge, if it can)")
    add("--tau", type=float | None, help="threshold of embedding (0.5) or fn (0.05)")
    add("--resume", action="store_true", help="go on with RUN, or start it")
    add("--calibrate", type=bool, default=True, help="find scale and polarity where not said")
    parser.add_class_arguments(Config)
    options = parser.parse_args(words)
    _refuse_empty(options.out)
    adapter, origin = open_model(kind, options)
    repeat = options.clone()
    repeat.pop("resume")  # the file starts a run of its own
    began = shlex.join(["selfadapt", "adapt", *(word for word in words if word != "--resume")])
    notes = {ORIGIN: json.dumps(origin, indent=2), REPEATS: parser.dump(repeat), COMMAND: began}
    directory = RunDirectory(options.out, notes)
    result = adapt(
        adapter,
        options.images,
        validation=options.validation,
        config=Config(**{field.name: options[field.name] for field in fields(Config)}),
        stop=_criterion(options.stop, options.tau),
        output_dir=directory,
        resume=options.resume,
        channel_axis=options.channel_axis,
        calibrate=options.calibrate,
    )
    if result.input:
        print(f"Input:   {result.input}")
    print(f"Model:   {directory.model}")
    if usage := result.adapter.usage(directory.model):
        print(f"Use it:  {usage}")
    if find_spec("matplotlib"):
        print(f"Report:  {write_report(directory)}")
    else:
        print(f"Report:  pip install 'selfadapt[report]', then: selfadapt report {options.out}")
    print(f"Quality: expected AP at an IoU of 0.5, without labels, {result.quality}")
    print(f"Verdict: {result.outcome}. {_sentence(result.reason)}")
    return result.outcome != "not to be trusted"


def _sentence(text: str) -> str:
    return f"{text[:1].upper()}{text[1:]}."


def _criterion(stop: str, tau: float | None) -> Monitor | Literal["auto"] | None:
    kinds: dict[str, Callable[..., Monitor]] = {
        "embedding": EmbeddingDrift,
        "fn": FalseNegativeRate,
    }
    if stop in kinds:
        return kinds[stop]() if tau is None else kinds[stop](tau)
    if tau is not None:
        raise ConfigError("--tau is the threshold of --stop embedding or fn: name one of them.")
    return "auto" if stop == "auto" else None


def _segment(words: Sequence[str]) -> None:
    """Write the instances of each image: as label TIFF, OME-Zarr, GeoJSON or ImageJ ROIs."""
    parser, kind = model_parser("segment", _segment.__doc__, words)
    parser.add_argument("--out", type=str, required=True, help="folder to write to")
    formats = f"of the files in --out: {', '.join(FORMATS)}"
    parser.add_argument("--format", type=str, default="tiff", help=formats)
    parser.add_argument("--resume", action="store_true", help="go on where --out was left")
    parser.add_argument("--dask", type=str | None, help="scheduler whose workers do large images")
    options = parser.parse_args(words)
    _refuse_empty(options.out)
    check_format(options.format)
    made = FORMATS[options.format]
    out = Path(options.out)
    if out.resolve() == Path(options.images).resolve():
        raise ConfigError(
            "--out is the folder of the images, among which labels would be taken "
            "for some: give another one."
        )
    sources = open_images(options.images, channel_axis=options.channel_axis)
    refuse_masks(sources)
    files = [out / f"{stem}{made.suffix}" for stem in _by_stem(sources)]
    there = {file for file in files if file.exists()}
    if there and not options.resume:
        raise ImageError(f"{str(min(there))!r} exists already: give a new folder, or --resume.")
    adapter, told = _ready(kind, options, sources)
    told = json.loads(json.dumps(told))  # tuples are lists in a file
    for file in sorted(there):
        if not read_note(file, made).items() >= told.items():
            raise ImageError(
                f"{str(file)!r} was made by another model or with other options: give the same to "
                "go on (--resume), or a new folder."
            )
    out.mkdir(parents=True, exist_ok=True)
    bad: dict[str, SelfAdaptError] = {}
    both = list(zip(sources, files, strict=True))
    for source, file in tqdm(both, unit="image", leave=False):
        try:
            if is_large(source) and options.format in ("tiff", "ome-zarr"):
                if file in there:
                    _refuse_changed(source, pixels_checksum(source), file, made)
                else:
                    more = {"client": options.dask, "resume": options.resume, "notes": told}
                    segment_large(adapter, source, file, **more)
                continue
            pixels = source.read()
            mark = checksum(pixels)
            if file in there:
                _refuse_changed(source, mark, file, made)
                continue
            labels = _segment_pixels(adapter, pixels, source)
        except (ImageError, OutputError) as error:
            bad[str(source)] = error
            continue
        write_labels(file, made, labels, told | {"image": mark})
    print(f"{len(files) - len(bad)} label image(s) in {out}")
    _refuse_bad(bad, len(sources))


def _refuse_changed(source: LazyImage, mark: str, file: Path, made: LabelFormat) -> None:
    """Raise ImageError unless a file was made of pixels with that checksum."""
    if read_note(file, made).get("image") != mark:
        raise ImageError(
            f"{source} is not what {str(file)!r} was made of: remove that to have it made again."
        )


def _refuse_empty(out: str) -> None:
    if not out.strip() or "\0" in out:
        raise ConfigError("--out is empty, or no name of a folder: give one to write to.")


def _refuse_bad(bad: Mapping[str, SelfAdaptError], of: int) -> None:
    """Raise for images that could not be used, now that the others are done."""
    for error in list(bad.values())[1:]:
        print(f"selfadapt: {error}", file=sys.stderr)
    if bad:
        raise ImageError(
            f"{len(bad)} of {of} image(s) could not be used: {next(iter(bad.values()))}"
        )


def _ready(
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


def _segment_pixels(adapter: Adapter, pixels: Image, source: LazyImage) -> Any:
    try:
        return adapter.segment(pixels, channel_axis=0)
    except (ImageError, OutputError) as error:
        if str(error).startswith(source.name):
            raise
        raise type(error)(f"{source}: {error}") from None


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
    parser, kind = model_parser("evaluate", _evaluate.__doc__, words)
    parser.add_argument("--masks", type=str, required=True, help="label images, named as images")
    parser.add_argument("--json", type=str | None, help="file that the scores are written to")
    parser.add_argument("--table", type=str | None, help="CSV file, a row for each image")
    options = parser.parse_args(words)
    sources = open_images(options.images, channel_axis=options.channel_axis)
    refuse_masks(sources)
    where, theirs = (Path(path).resolve() for path in (options.images, options.masks))
    listed = open_images(options.masks, labels=True)
    names = {image.name for image in (*sources, *listed)}
    if where == theirs and len(names) == 1:
        raise ImageError(f"{options.masks!r} is the image itself: give its masks.")
    ours, others = (path if path.is_dir() else path.parent for path in (where, theirs))
    masks = pair(sources, listed, one_folder=ours == others)
    _check_file("--json", options.json)
    _check_file("--table", options.table)
    if options.table and options.table == options.json:
        raise ConfigError(f"--json and --table are one file, {options.table!r}: give two.")
    adapter, _ = _ready(kind, options, sources)
    per_image = []
    rows: list[Row] = []
    bad: dict[str, SelfAdaptError] = {}
    for source, mask in tqdm(list(zip(sources, masks, strict=True)), unit="image", leave=False):
        try:
            found = _segment_pixels(adapter, source.read(), source)
            per_image.append(_matches(mask, source, found))
            rows.append((str(source), per_image[-1]))
        except (ImageError, OutputError) as error:
            bad[str(source)] = error
            rows.append((str(source), str(error)))
    if options.table:
        write_file(Path(options.table), to_csv(rows))
    if not per_image:
        _refuse_bad(bad, len(sources))
    scores = json.dumps(summarise(per_image) | {"left_out": list(bad)}, indent=2)
    if options.json:
        write_file(Path(options.json), f"{scores}\n".encode())
    print(scores)
    _refuse_bad(bad, len(sources))


def _matches(mask: LazyImage, source: LazyImage, found: Any) -> list[Matches]:
    """Of what was found with the mask of an image, at the thresholds `IOUS`."""
    labels = mask.read()
    if len(labels) > 1 and (labels == labels[:1]).all():  # gray, saved as colour
        labels = labels[:1]
    if len(labels) != 1:
        raise ImageError(f"the mask of {source} has {len(labels)} channels, not one.")
    if labels.dtype.kind == "f" and (labels == np.floor(labels)).all():  # as ImageJ saves them
        labels = labels.astype(np.int64)
    try:
        return match(labels[0], found, IOUS)
    except ImageError as error:
        raise ImageError(f"the mask of {source}: {error}") from None


def _check(words: Sequence[str]) -> bool:
    """Say without labels how well a model works on images."""
    parser, kind = model_parser("check", _check.__doc__, words)
    parser.add_argument("--windows", type=int, default=24, help="how many windows are looked at")
    parser.add_argument("--json", type=str | None, help="file that the estimate is written to")
    options = parser.parse_args(words)
    _check_file("--json", options.json)
    adapter = open_model(kind, options)[0]
    quality = estimate_quality(
        adapter, options.images, windows=options.windows, channel_axis=options.channel_axis
    )
    if options.json:
        write_file(Path(options.json), f"{json.dumps(quality.to_dict(), indent=2)}\n".encode())
    print(f"Quality: expected AP at an IoU of 0.5, without labels, {quality}")
    print(f"Verdict: {quality.verdict}")
    return quality.trusted


def _calibrate(words: Sequence[str]) -> bool:
    """Find the scale and the polarity that suit a model and images, without labels."""
    parser, kind = model_parser("calibrate", _calibrate.__doc__, words)
    parser.add_argument("--json", type=str | None, help="file for all that was tried")
    options = parser.parse_args(words)
    _check_file("--json", options.json)
    sources = open_images(options.images, channel_axis=options.channel_axis)
    with Teller(progress=True) as tell:
        calibration = search(open_model(kind, options)[0], sources, tell)
    calibration.adapter.check(sources)
    if options.json:
        text = json.dumps(calibration.to_dict(), indent=2)
        write_file(Path(options.json), f"{text}\n".encode())
    print(f"Input:   {calibration}")
    if calibration.found:
        names = option_names(kind)
        told = calibration.adapter.input_options().items()
        flags = [f"--{name} {str(value).lower()}" for name, value in told if name in names]
        if flags:
            print(f"Options: {' '.join(flags)}")
    quality = estimate_quality(calibration.adapter, sources)
    print(f"Quality: expected AP at an IoU of 0.5, without labels, {quality}")
    print(f"Verdict: {quality.verdict}")
    return quality.trusted


def _check_file(flag: str, path: str | None) -> None:
    """Raise ConfigError for a file that could not be written, or would take a folder's place."""
    if not path:
        return
    if Path(path).is_dir() or "\0" in path:
        raise ConfigError(f"{flag} {path!r} is a folder, or no name of a file: give one.")
    if not Path(path).absolute().parent.is_dir():
        raise ConfigError(f"there is no folder for {flag} {path!r}.")


def _select(words: Sequence[str]) -> None:
    """Save another snapshot of a RUN folder as a model of its own."""
    parser, kind = model_parser("select", _select.__doc__, words)
    parser.add_argument("--out", type=str, required=True, help="model to write, as its family does")
    options = parser.parse_args(words)
    _refuse_empty(options.out)
    target = Path(options.out)
    if target.exists():
        raise ConfigError(f"{options.out!r} exists already: give another --out.")
    adapter, _ = open_model(kind, options)
    with appearing(target) as partial:
        adapter.save(partial)
    print(f"Model:   {target}")
    if usage := adapter.usage(target):
        print(f"Use it:  {usage}")


def _export(words: Sequence[str]) -> None:
    """Write a model as a bioimage.io package."""
    parser, kind = model_parser("export", _export.__doc__, words)
    add = parser.add_argument
    add("--out", type=str, required=True, help="ZIP file to write")
    add("--name", type=str | None, help="of the package (default: that of --out)")
    add("--authors", type=str | None, help='of the package: "First Author, Second Author"')
    add("--license", type=str | None, help="SPDX identifier of its licence, such as CC-BY-4.0")
    options = parser.parse_args(words)
    _check_file("--out", options.out)
    check_package(Path(options.out))
    sources = open_images(options.images, channel_axis=options.channel_axis)
    adapter, _ = _ready(kind, options, sources)
    notes = export_bioimageio(
        adapter,
        sources,
        options.out,
        name=options.name,
        authors=options.authors.split(",") if options.authors else (),
        license=options.license,
        run=options.model if (Path(options.model) / ORIGIN).exists() else None,
    )
    print(f"Package: {options.out}, tested by bioimageio.core {version('bioimageio.core')}")
    for note in notes:
        print(f"Note:    {note}")


def _report(words: Sequence[str]) -> None:
    """Draw the report of a RUN folder."""
    run = make_parser("report", _report.__doc__, run="RUN folder").parse_args(words).run
    print(write_report(run))


def _adapters(words: Sequence[str]) -> None:
    """List the adapters, and what is missing for them."""
    make_parser("adapters", _adapters.__doc__).parse_args(words)
    for name, missing in sorted(adapters().items()):
        print(f"{name:12} {missing or 'ready'}")


COMMANDS: dict[str, Callable[[Sequence[str]], bool | None]] = {
    "demo": _demo,
    "adapt": _adapt,
    "segment": _segment,
    "evaluate": _evaluate,
    "check": _check,
    "calibrate": _calibrate,
    "select": _select,
    "export": _export,
    "report": _report,
    "adapters": _adapters,
}
