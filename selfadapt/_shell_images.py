"""Commands that go through images: segment, evaluate."""

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from selfadapt._adapter import Adapter
from selfadapt._block_job import pixels_checksum
from selfadapt._disk import write_file
from selfadapt._errors import ConfigError, ImageError, OutputError, SelfAdaptError
from selfadapt._images import open_images
from selfadapt._labels import FORMATS, LabelFormat, check_format, read_note, write_labels
from selfadapt._large import is_large, segment_large
from selfadapt._lazy import LazyImage
from selfadapt._masks import pair, refuse_masks, refuse_photographs
from selfadapt._matching import Matches, match
from selfadapt._normalize import Image, checksum
from selfadapt._options import check_file, model_parser, ready, refuse_empty
from selfadapt._scores import IOUS, Row, summarise, to_csv
from selfadapt._wording import Parser


def segment_parser(words: Sequence[str]) -> Parser:
    parser = model_parser("segment", segment_command.__doc__, words)
    parser.add_argument("--out", type=str, required=True, help="folder to write to")
    formats, about = tuple(FORMATS), "of the files in --out"
    parser.add_argument("--format", choices=formats, default="tiff", help=about)
    parser.add_argument("--resume", action="store_true", help="go on where --out was left")
    parser.add_argument("--dask", type=str | None, help="scheduler whose workers do large images")
    return parser


def segment_command(words: Sequence[str]) -> None:
    """Write the instances of each image: as label TIFF, OME-Zarr, GeoJSON or ImageJ ROIs."""
    parser = segment_parser(words)
    options = parser.parse_args(words)
    refuse_empty(options.out)
    check_format(options.format)
    made = FORMATS[options.format]
    out = Path(options.out)
    sources = open_images(options.images, channel_axis=options.channel_axis)
    refuse_masks(sources)
    if out.resolve() == Path(options.images).resolve():
        raise ConfigError(
            "--out is the folder of the images, among which labels would be taken "
            "for some: give another one."
        )
    files = [out / f"{stem}{made.suffix}" for stem in _by_stem(sources)]
    there = {file for file in files if file.exists()}
    if there and not options.resume:
        raise ImageError(f"{str(min(there))!r} exists already: give a new folder, or --resume.")
    adapter, told = ready(parser.kind, options, sources)
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


def _refuse_bad(bad: Mapping[str, SelfAdaptError], of: int) -> None:
    """Raise for images that could not be used, now that the others are done."""
    for error in list(bad.values())[1:]:
        print(f"selfadapt: {error}", file=sys.stderr)
    if bad:
        raise ImageError(
            f"{len(bad)} of {of} image(s) could not be used: {next(iter(bad.values()))}"
        )


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


def evaluate_parser(words: Sequence[str]) -> Parser:
    parser = model_parser("evaluate", evaluate_command.__doc__, words)
    parser.add_argument("--masks", type=str, required=True, help="label images, named as images")
    parser.add_argument("--json", type=str | None, help="file that the scores are written to")
    parser.add_argument("--table", type=str | None, help="CSV file, a row for each image")
    return parser


def evaluate_command(words: Sequence[str]) -> None:
    """Score a model against masks; prints JSON."""
    parser = evaluate_parser(words)
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
    refuse_photographs(masks)
    check_file("--json", options.json)
    check_file("--table", options.table)
    if options.table and options.table == options.json:
        raise ConfigError(f"--json and --table are one file, {options.table!r}: give two.")
    adapter, _ = ready(parser.kind, options, sources)
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
    whole = labels.dtype.kind == "f" and (labels == np.floor(labels)).all()
    if whole and abs(labels).max(initial=0) < 2**63:  # as ImageJ saves them
        labels = labels.astype(np.int64)
    try:
        return match(labels[0], found, IOUS)
    except ImageError as error:
        raise ImageError(f"the mask of {source}: {error}") from None
