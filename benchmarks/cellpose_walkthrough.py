"""The walk-through of docs/cellpose.md, from a folder of images to its pictures.

    python benchmarks/cellpose_walkthrough.py --model MODEL --out runs/walkthrough \
        --picture docs/images/cellpose.png

The images are the four quarters of the image of nuclei that the package stardist brings, with
simulated photon noise: each gray value is drawn from a Poisson distribution around it. The shell
does the rest. Annotations serve for the scores only.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import tifffile
from common import shell
from matplotlib.figure import Figure
from skimage.segmentation import find_boundaries
from stardist.data import test_image_nuclei_2d

from selfadapt import normalize_percentile


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--picture", type=Path, required=True)
    parser.add_argument("--diameter", default="28")
    args = parser.parse_args()
    clean, labels = test_image_nuclei_2d(return_mask=True)
    image = np.random.default_rng(0).poisson(clean)
    for kind, pixels in (("images", image), ("masks", labels)):
        (args.out / kind).mkdir(parents=True, exist_ok=True)
        for k, (y, x) in enumerate(np.ndindex(2, 2)):
            quarter = pixels[256 * y : 256 * y + 256, 256 * x : 256 * x + 256]
            tifffile.imwrite(args.out / kind / f"well{k}.tif", quarter.astype(np.uint16))
    images, masks, run = (str(args.out / name) for name in ("images", "masks", "run"))
    base = ["--adapter", "cellpose", "--model", str(args.model), "--diameter", args.diameter]
    print(shell("adapt", *base, "--images", images, "--out", run))
    panels, titles = [tifffile.imread(f"{images}/well0.tif")], ["image"]
    for name, model in (("before", base), ("after", ["--model", run])):
        scores = json.loads(shell("evaluate", *model, "--images", images, "--masks", masks))
        shell("segment", *model, "--images", images, "--out", str(args.out / name))
        panels.append(tifffile.imread(args.out / name / "well0.tif"))
        titles.append(f"{name}: AP {scores['ap50']:.2f} at IoU 0.5, all images")
        print(name, scores)
    gray = np.clip(normalize_percentile(panels[0][None])[0], 0, 1)
    figure = Figure(figsize=(12, 4.3), layout="constrained")
    for axis, panel, title in zip(figure.subplots(1, 3), panels, titles, strict=True):
        shown = np.repeat(gray[..., None], 3, -1)
        if title != "image":
            shown[find_boundaries(panel)] = (1, 0.35, 0.2) if "before" in title else (0.2, 0.9, 0.5)
        axis.imshow(shown, interpolation="nearest")
        axis.set_title(title)
        axis.axis("off")
    args.picture.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(args.picture, dpi=70)


if __name__ == "__main__":
    main()
