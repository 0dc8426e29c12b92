"""What adapting changed, to look at: pictures of `docs/evidence.md`.

    python benchmarks/evidence_pictures.py --shared ../shared --docs docs

Adapts each pair of PICTURES as `adapt` does, and draws the scored image on which AP rose most and
the one on which it fell most (or rose least): image, before, after. Outlines: found objects in
green (IoU above 0.5), objects that are none in red, missed ones, as annotated, in blue.
"""

import argparse
import tempfile
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from evidence import networks_for
from numpy.typing import NDArray
from pairs import PAIRS, task
from skimage.segmentation import find_boundaries
from stardist.matching import matching

from selfadapt import adapt, match

PICTURES = ("smp to photons", "cellpose to photons", "stardist to he", "smp to he")
FOUND, FALSE, MISSED = (0.2, 0.9, 0.4), (1.0, 0.25, 0.2), (0.3, 0.6, 1.0)

Array = NDArray[Any]


def outlined(image: Array, truth: Array, predicted: Array) -> Array:
    """RGB `[H, W, 3]` in [0, 1] of `image` `[C, H, W]` with the outlines of all objects."""
    low, high = np.percentile(image, (0.5, 99.7))
    painted = np.clip((image[:3] - low) / (high - low), 0, 1).transpose(1, 2, 0)
    painted = np.repeat(painted, 3, 2) if painted.shape[2] == 1 else painted
    result = matching(truth, predicted, thresh=0.5, report_matches=True)
    pairs = np.array(result.matched_pairs).reshape(-1, 2)[list(result.matched_tps)]
    missed = np.where(np.isin(truth, pairs[:, 0]), 0, truth)
    found = np.where(np.isin(predicted, pairs[:, 1]), predicted, 0)
    for labels, colour in (
        (missed, MISSED), (np.where(found, 0, predicted), FALSE), (found, FOUND),
    ):  # fmt: skip
        painted[find_boundaries(labels, mode="inner")] = colour
    return painted


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shared", type=Path, required=True)
    parser.add_argument("--docs", type=Path, required=True)
    parser.add_argument("--networks", type=Path, default=Path("runs/networks"))
    args = parser.parse_args()
    pairs = [pair for pair in PAIRS if pair.name in PICTURES]
    networks_for(pairs, args.shared, args.networks)
    for pair in pairs:
        prepared = task(pair, args.networks, args.shared)
        before = prepared.adapter
        with tempfile.TemporaryDirectory() as folder:
            result = adapt(
                before,
                prepared.images,
                validation=prepared.held_out,
                output_dir=Path(folder) / "run",
                progress=False,
            )
        after = result.adapter
        rows = []
        for image, truth in prepared.test:
            labels = [each.segment(image, channel_axis=0) for each in (before, after)]
            scores = [match(truth, each)[0].ap for each in labels]
            rows.append((scores[1] - scores[0], scores, image, truth, labels))
        rows.sort(key=lambda row: row[0])
        figure, axes = plt.subplots(2, 3, figsize=(9, 6.3), layout="constrained")
        for line, (_, scores, image, truth, labels) in zip(axes, (rows[-1], rows[0]), strict=True):
            nothing = np.zeros_like(truth)
            line[0].imshow(outlined(image, nothing, nothing), interpolation="nearest")
            line[0].set_title("image", fontsize=9)
            for k, name in enumerate(("before", "after")):
                line[k + 1].imshow(outlined(image, truth, labels[k]), interpolation="nearest")
                line[k + 1].set_title(f"{name}: AP {scores[k]:.2f}", fontsize=9)
            for axis in line:
                axis.axis("off")
        target = args.docs / "images" / f"{pair.name.replace(' ', '-')}.png"
        figure.savefig(target, dpi=90)
        plt.close(figure)
        print(f"{pair.name}: {result.reason}; {target}", flush=True)


if __name__ == "__main__":
    main()
