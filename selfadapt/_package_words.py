"""What a bioimage.io package says of itself in words: name, licence, how it was adapted."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from selfadapt._adapter import Adapter
from selfadapt._errors import ConfigError, refuse_damage
from selfadapt._heads import Head
from selfadapt._quality import Quality
from selfadapt._rundir import CALIBRATION, RunDirectory

PAPER = (
    "Reith, Franzen, Rumberger, Kainmueller: SelfAdapt: Unsupervised Domain Adaptation of Cell "
    "Segmentation Models, 2025"
)
DOI = "10.48550/arXiv.2508.11411"
_NAME = r"[A-Za-z0-9_+\- ()]{5,128}"


@dataclass(frozen=True, kw_only=True)
class Words:
    """What a user says of a package.

    Raises:
        ConfigError: a name is not allowed.
    """

    name: str
    authors: Sequence[str] = ()
    license: str | None = None

    def __post_init__(self) -> None:
        if not re.fullmatch(_NAME, self.name):
            raise ConfigError(
                f"name {self.name!r} is not allowed: bioimage.io takes 5 to 128 letters (a to z), "
                "digits, spaces and _+-()."
            )
        if isinstance(self.authors, str) or not all(
            isinstance(each, str) and each.strip() and not set(each) & set("/\\")
            for each in self.authors
        ):
            raise ConfigError(
                f"authors {self.authors!r} are not allowed: give a list of names without slashes."
            )

    def describe(self, heads: Mapping[str, Head]) -> dict[str, Any]:
        """Their part of the description of a package."""
        told = f"{', '.join(heads)} of each pixel, by a network exported with selfadapt"
        cite = [
            {"text": PAPER, "doi": DOI},
            {"text": f"selfadapt {version('selfadapt')}, which implements it", "doi": DOI},
        ]
        description = {
            "name": self.name,
            "description": f"{told[:1].upper()}{told[1:]}, which adapts networks without labels.",
            "authors": [{"name": each.strip()} for each in self.authors],
            "cite": cite,
            "tags": ["selfadapt", "domain-adaptation", "segmentation", "2d", "pytorch"],
            "documentation": {"source": "README.md"},
        }
        return description if self.license is None else description | {"license": self.license}


def name_of(path: Path) -> str:
    """A name that is allowed, by that of a file."""
    plain = re.sub(r"[^A-Za-z0-9_+\- ()]", "_", path.stem)[:100]
    return plain if len(plain) >= 5 else f"{plain} network"


def notes(adapter: Adapter) -> tuple[str, ...]:
    """What is to be done to an image before a package takes it: a sentence each."""
    how, told = adapter.input, []
    if how.channels is not None:
        chosen = ", ".join(map(str, how.channels))
        told.append(f"Give channel {chosen} of an image only, counted from 0, in this order.")
    if how.gray:
        told.append("Turn colour into luminance first: 0.299 red + 0.587 green + 0.114 blue.")
    if how.scale != 1:
        told.append(
            f"Rescale images by {how.scale:.4g} first (bilinear, low-passed where they get "
            "smaller), and what comes out back again. selfadapt normalises before it rescales, so "
            "its results differ a little."
        )
    if how.tta:
        told.append("selfadapt takes the mean over flips and turns; the package goes without.")
    return tuple(told)


def story(run: str | Path | None) -> list[str]:
    """How the network was adapted, by what the folder of the run says; nothing without one.

    Raises:
        CheckpointError: it is no folder of a finished run.
    """
    if run is None:
        return []
    directory = RunDirectory(run)
    result = directory.read_json("result.json")
    told = []
    with refuse_damage(directory.path):
        if (directory.path / CALIBRATION).exists():
            told.append(
                f"How images go in, as it was found: {directory.read_json(CALIBRATION)['words']}."
            )
        told.append(f"Verdict: {result['outcome']}. Reason: {result['reason']}.")
        told.append(f"Kept: {result['candidate']}, iteration {result['iteration']}.")
        told.append(
            "Expected AP at an IoU of 0.5 on the user's images, estimated without labels: "
            f"{Quality.from_dict(result['quality'])}."
        )
    return told


def readme(words: Words, adapter: Adapter, history: Sequence[str]) -> str:
    """The documentation of a package; `history` is its `story`."""
    told = [f"# {words.name}", ""]
    told.append(
        f"A network exported by selfadapt {version('selfadapt')}, which adapts trained networks "
        f"to new images without labels ({PAPER}, doi:{DOI})."
    )
    if history:
        told += ["", "## How it was adapted", "", *(f"- {each}" for each in history)]
    told += ["", "## What goes in", ""]
    before = notes(adapter)
    told += [f"- {each}" for each in before]
    told.append(
        "- Whole images: values are normalised by the image that they come in, "
        "by the steps that the description names. Where more than 98 % of the pixels are equal, "
        "selfadapt takes their full range instead, which those steps cannot."
    )
    told.append(
        "- Sides that are no multiples of what the description says are padded, "
        f"in selfadapt at the far side (mode {adapter.padding!r})."
    )
    if adapter.fixed_size is None:
        told.append(
            f"- selfadapt cuts images of more than {adapter.tile} pixels a side into tiles."
        )
    told += ["", "## What comes out", ""]
    told += [f"- `{name}`: {head!r}" for name, head in adapter.outputs.items()]
    told += [
        "",
        "Maps, not instances: those are made of them by the adapter in selfadapt "
        f"(`{type(adapter).__name__}.decode`).",
        "",
        "## Validation",
        "",
        "The test output is that of selfadapt for the test input, which is part of an image that "
        "the network was exported with. To validate the network, compare instances with masks of "
        "images of your own, as `selfadapt evaluate` does.",
        "",
    ]
    return "\n".join(told)
