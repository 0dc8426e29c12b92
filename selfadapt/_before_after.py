"""The pictures of a report: pixels as PNG, and outlines before and after as SVG over them."""

import base64
import html
import io
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tifffile
from numpy.typing import NDArray
from PIL import Image

from selfadapt._fates import FATES, Fate, fates
from selfadapt._outlines import Ring, outlines
from selfadapt._tiles import resize_labels

MAX_SIDE = 512
"""Larger windows are drawn smaller, so that the page stays small; they are counted as they are."""


@dataclass(frozen=True)
class Example:
    """One image of a report: its figure, and what became of its instances."""

    figure: str
    counts: dict[Fate, int]


def draw_example(path: Path, name: str, number: int, second: str, title: str) -> Example | None:
    """The figure of an image; None where there are no instances to show.

    Without scripts it shows both networks side by side; `viewer.js` lays one over the other.

    Args:
        path: the image, `[H, W]` or `[C, H, W]`; its label images lie beside it.
        name: what it is called.
        number: its place in the page, from 1.
        second: which of the files is compared with "before", "after" or "rejected".
        title: what that is called.
    """
    image = tifffile.imread(path)
    image = image[None] if image.ndim == 2 else image
    files = [path.with_name(path.name.replace("image", which)) for which in ("before", second)]
    if not all(file.exists() for file in files):
        return None
    before, after = (tifffile.imread(file) for file in files)
    told = fates(before, after)
    height, width = (min(n, round(n * MAX_SIDE / max(before.shape))) for n in before.shape)
    pixels = f"pixels-{number}"
    here = (
        f'<image id="{pixels}" width="{width}" height="{height}" preserveAspectRatio="none" '
        f'href="{_png(_display(image))}"/>'
    )
    panes = ""
    for side, what, picture, labels, each in (
        ("before", "Before", here, before, told.before),
        ("after", title, f'<use href="#{pixels}"/>', after, told.after),
    ):
        words = html.escape(f"{what}: {len(each)} instances in {name}")
        drawn = "".join(_paths(labels, each, (height, width)))
        panes += (
            f'<div class="pane {side}"><svg viewBox="0 0 {width} {height}" role="img" '
            f'aria-label="{words}">{picture}<g class="outlines">{drawn}</g></svg>'
            f'<span class="side">{html.escape(what)} <b>{len(each)}</b></span></div>'
        )
    words = html.escape(name)
    figure = (
        f'<figure class="example"><figcaption><h3>{words}</h3>{_told(told.counts)}'
        '<button type="button" class="enlarge js-only" aria-pressed="false">Enlarge</button>'
        f'</figcaption><div class="pair" role="group" aria-label="{words}">{panes}</div>'
        '<input class="wipe js-only" type="range" min="0" max="100" value="50" '
        f'aria-label="How much of before is shown, {words}"></figure>'
    )
    return Example(figure, told.counts)


def _told(counts: Mapping[Fate, int]) -> str:
    said = [f"{counts[fate]} {'the ' * (fate == 'same')}{fate}" for fate in FATES if counts[fate]]
    return f'<p class="counts">{", ".join(said) or "nothing found"}</p>'


def _paths(labels: NDArray[Any], each: list[Fate], size: tuple[int, int]) -> Iterator[str]:
    """The outlines of all instances of a fate as one path, the most frequent fate undermost."""
    fate_of = dict(zip(np.unique(labels[labels > 0]).tolist(), each, strict=True))
    rings: dict[Fate, str] = dict.fromkeys(FATES, "")
    for label, polygons in outlines(resize_labels(labels, size)):
        rings[fate_of[label]] += "".join(_path(ring) for part in polygons for ring in part)
    for fate, path in rings.items():
        if path:
            yield f'<path class="fate {fate}" d="{path}"/>'


def _path(ring: Ring) -> str:
    steps = np.diff(ring, axis=0).tolist()
    sides = "".join(f"h{x}" if y == 0 else f"v{y}" for x, y in steps)
    return f"M{ring[0, 0]} {ring[0, 1]}{sides}z"


def _display(image: NDArray[Any]) -> NDArray[np.uint8]:
    """Gray `[H, W]` or RGB `[H, W, 3]` of a prepared image `[C, H, W]`."""
    channels = image[:3] if image.shape[0] >= 3 else image[:1]
    if not np.isfinite(channels).all():
        raise ValueError("pixels are not finite")
    low, high = np.percentile(channels, (0.5, 99.7))
    scaled = np.clip((channels - low) / max(high - low, 1e-6), 0, 1) ** 0.7
    pixels: NDArray[np.uint8] = (255 * scaled).round().astype(np.uint8)
    return pixels[0] if len(pixels) == 1 else pixels.transpose(1, 2, 0)


def _png(pixels: NDArray[np.uint8]) -> str:
    """As an address that holds the picture itself."""
    picture = Image.fromarray(pixels)
    picture.thumbnail((MAX_SIDE, MAX_SIDE))
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
