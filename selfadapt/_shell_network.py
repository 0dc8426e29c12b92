"""Commands that look at a network: check, calibrate, export."""

import json
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

from selfadapt._bioimageio import check_package, export_bioimageio
from selfadapt._calibrate import search
from selfadapt._check import estimate_quality
from selfadapt._disk import write_file
from selfadapt._events import Teller
from selfadapt._images import open_images
from selfadapt._options import check_file, model_parser, open_model, option_names, ready
from selfadapt._rundir import ORIGIN
from selfadapt._wording import Parser


def check_parser(words: Sequence[str]) -> Parser:
    parser = model_parser("check", check_command.__doc__, words)
    parser.add_argument("--windows", type=int, default=24, help="how many windows are looked at")
    parser.add_argument("--json", type=str | None, help="file that the estimate is written to")
    return parser


def check_command(words: Sequence[str]) -> bool:
    """Say without labels how well a model works on images."""
    parser = check_parser(words)
    options = parser.parse_args(words)
    check_file("--json", options.json)
    adapter = open_model(parser.kind, options)[0]
    quality = estimate_quality(
        adapter, options.images, windows=options.windows, channel_axis=options.channel_axis
    )
    if options.json:
        write_file(Path(options.json), f"{json.dumps(quality.to_dict(), indent=2)}\n".encode())
    print(f"Quality: expected AP at an IoU of 0.5, without labels, {quality}")
    print(f"Verdict: {quality.verdict}")
    return quality.trusted


def calibrate_parser(words: Sequence[str]) -> Parser:
    parser = model_parser("calibrate", calibrate_command.__doc__, words)
    parser.add_argument("--json", type=str | None, help="file for all that was tried")
    return parser


def calibrate_command(words: Sequence[str]) -> bool:
    """Find the scale and the polarity that suit a model and images, without labels."""
    parser = calibrate_parser(words)
    options = parser.parse_args(words)
    check_file("--json", options.json)
    sources = open_images(options.images, channel_axis=options.channel_axis)
    with Teller(progress=True) as tell:
        calibration = search(open_model(parser.kind, options)[0], sources, tell)
    calibration.adapter.check(sources)
    if options.json:
        text = json.dumps(calibration.to_dict(), indent=2)
        write_file(Path(options.json), f"{text}\n".encode())
    print(f"Input:   {calibration}")
    if calibration.found:
        names = option_names(parser.kind)
        told = calibration.adapter.input_options().items()
        flags = [f"--{name} {str(value).lower()}" for name, value in told if name in names]
        if flags:
            print(f"Options: {' '.join(flags)}")
    quality = estimate_quality(calibration.adapter, sources)
    print(f"Quality: expected AP at an IoU of 0.5, without labels, {quality}")
    print(f"Verdict: {quality.verdict}")
    return quality.trusted


def export_parser(words: Sequence[str]) -> Parser:
    parser = model_parser("export", export_command.__doc__, words)
    add = parser.add_argument
    add("--out", type=str, required=True, help="ZIP file to write")
    add("--name", type=str | None, help="of the package (default: that of --out)")
    add("--authors", type=str | None, help='of the package: "First Author, Second Author"')
    add("--license", type=str | None, help="SPDX identifier of its licence, such as CC-BY-4.0")
    return parser


def export_command(words: Sequence[str]) -> None:
    """Write a model as a bioimage.io package."""
    parser = export_parser(words)
    options = parser.parse_args(words)
    check_file("--out", options.out)
    check_package(Path(options.out))
    sources = open_images(options.images, channel_axis=options.channel_axis)
    adapter, _ = ready(parser.kind, options, sources)
    # what a run says of its end is not of another snapshot
    of_run = (Path(options.model) / ORIGIN).exists() and options.snapshot is None
    notes = export_bioimageio(
        adapter,
        sources,
        options.out,
        name=options.name,
        authors=options.authors.split(",") if options.authors else (),
        license=options.license,
        run=options.model if of_run else None,
    )
    print(f"Package: {options.out}, tested by bioimageio.core {version('bioimageio.core')}")
    for note in notes:
        print(f"Note:    {note}")
