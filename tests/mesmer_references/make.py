"""Write what the tests compare Mesmer's normalisation and watershed with, by deepcell-toolbox.

    pip install --ignore-requires-python deepcell-toolbox 'scikit-image<0.26' stardist
    python tests/mesmer_references/make.py

It says that it wants Python 3.10 at most; version 0.12.1 was run with Python 3.11. In scikit-image
0.26 its thresholds on areas mean one pixel more. The maps are those of nuclei in a real image that
StarDist ships, and of cells drawn around them, blurred, with noise, holes and specks, so that
objects merge, split and are too small. Values are kept in steps of 1/255. The settings are those
with which Mesmer calls the watershed.
"""

from pathlib import Path

import numpy as np
from deepcell_toolbox.deep_watershed import deep_watershed
from deepcell_toolbox.processing import histogram_normalization, percentile_threshold
from scipy import ndimage
from skimage.segmentation import expand_labels, find_boundaries
from stardist.data import test_image_nuclei_2d

SETTINGS = {
    "maxima_smooth": 0, "interior_smooth": 2, "interior_threshold": 0.2, "radius": 2,
    "small_objects_threshold": 15, "fill_holes_threshold": 15,
}  # fmt: skip
MAXIMA = {"cell": 0.075, "nucleus": 0.1}


def maps(labels: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Inner distance and probability of the interior, as of a bad network, in steps of 1/255."""
    inside = labels * ~find_boundaries(labels, mode="inner")
    distance = np.zeros(labels.shape)
    for k in range(1, labels.max() + 1):
        depth = ndimage.distance_transform_edt(labels == k)
        distance += depth / max(depth.max(), 1)
    distance = ndimage.gaussian_filter(distance, 1) + rng.normal(0, 0.04, labels.shape)
    interior = 0.9 * ndimage.gaussian_filter((inside > 0).astype(float), 1)
    for y, x, side in rng.integers([0, 0, 3], [240, 240, 10], (150, 3)):  # holes
        interior[y : y + side, x : x + side] = 0
    for y, x, side in rng.integers([0, 0, 2], [240, 240, 6], (60, 3)):  # specks
        interior[y : y + side, x : x + side] = 1
        distance[y + side // 2, x + side // 2] = 0.6
    return tuple(np.rint(255 * np.clip(m, 0, 1)).astype(np.uint8) for m in (distance, interior))


def main() -> None:
    image, nuclei = test_image_nuclei_2d(return_mask=True)
    rng = np.random.default_rng(0)
    dark = np.maximum(image, 60) - 60  # most is 0, which does not count for the percentile
    kept = {"image": np.stack([dark, image.T])[:, :128, 200:360].astype(np.uint16)}
    pixels = kept["image"].transpose(1, 2, 0)[None].astype(np.float32)
    prepared = histogram_normalization(percentile_threshold(pixels, 99.9), kernel_size=128)
    kept["prepared"] = prepared[0].transpose(2, 0, 1).astype(np.float16)
    for name, labels in (("cell", expand_labels(nuclei, 5)), ("nucleus", nuclei)):
        distance, interior = maps(labels[:256, 200:456], rng)
        both = [m[None, ..., None] / np.float32(255) for m in (distance, interior)]
        found = deep_watershed(both, maxima_threshold=MAXIMA[name], **SETTINGS)
        kept |= {f"{name}_distance": distance, f"{name}_interior": interior}
        kept[f"{name}_labels"] = found[0, ..., 0].astype(np.uint16)
        print(name, found.max(), "objects")
    np.savez_compressed(Path(__file__).with_name("outputs.npz"), **kept)


if __name__ == "__main__":
    main()
