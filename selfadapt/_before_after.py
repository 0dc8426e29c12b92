"""The examples of a report: an image, and instances before and after."""

import html
from pathlib import Path
from typing import Any

import numpy as np
import tifffile
from numpy.typing import NDArray
from skimage.segmentation import find_boundaries

from selfadapt._charts import embed, figure_of
from selfadapt._matching import match
from selfadapt._tiles import resize_labels


def draw_example(path: Path, name: str, second: str, second_title: str) -> str:
    """The image, and instances before and after, or of the network that was rejected."""
    image = tifffile.imread(path)
    image = image[None] if image.ndim == 2 else image
    files = [path.with_name(path.name.replace("image", which)) for which in ("before", second)]
    if not all(file.exists() for file in files):
        return ""
    before, after = (tifffile.imread(file) for file in files)
    same = match(before, after, (0.5,))[0]
    plain = _display(image)
    panels = [plain, _outline(plain, before, (1.0, 0.35, 0.2)), _outline(plain, after, _GREEN)]
    titles = [
        "image",
        f"before: {same.tp + same.fn} instances",
        f"{second_title}: {same.tp + same.fp} ({same.tp} the same, {same.fp} new, {same.fn} gone)",
    ]
    figure, axes = figure_of(3, (14, 0.4 + 4.6 * image.shape[-2] / image.shape[-1]))
    for axis, panel, title in zip(axes, panels, titles, strict=True):
        axis.imshow(panel, interpolation="nearest")
        axis.set_title(title, fontsize=11)
        axis.axis("off")
    return f"<h3>{html.escape(name)}</h3>{embed(figure, f'{name}: image, before, after')}"


_GREEN = (0.2, 0.9, 0.5)


def _display(image: NDArray[Any]) -> NDArray[np.float64]:
    """RGB in [0, 1] of a prepared image `[C, H, W]`."""
    channels = image[:3] if image.shape[0] >= 3 else image[:1].repeat(3, 0)
    low, high = np.percentile(channels, (0.5, 99.7))
    scaled: NDArray[np.float64] = np.clip((channels - low) / max(high - low, 1e-6), 0, 1) ** 0.7
    return scaled.transpose(1, 2, 0)


def _outline(
    image: NDArray[np.float64], labels: NDArray[Any], colour: tuple[float, float, float]
) -> NDArray[np.float64]:
    painted = image.copy()
    labels = resize_labels(labels, (image.shape[0], image.shape[1]))
    painted[find_boundaries(labels, mode="inner")] = colour
    return painted
