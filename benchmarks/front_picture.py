"""The picture of the front page: the demo's image, before and after.

    python benchmarks/front_picture.py --run runs/demo --picture docs/images/front.png

`selfadapt demo --out RUN` comes first, unless RUN is there. Outlines, by the image's annotations
and an IoU of 0.5: found in green, found though nothing is there in red, missed in blue.
"""

import argparse
import json
from pathlib import Path

from evidence_pictures import FALSE, FOUND, MISSED, outlined
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from selfadapt import match
from selfadapt._demo import demo_image, run_demo
from selfadapt_smp import SmpAdapter

SHOWN = slice(96, 416)
"""Rows and columns of the picture; AP is that of the whole image."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--picture", type=Path, required=True)
    args = parser.parse_args()
    if not args.run.exists():
        run_demo(args.run)
    image, truth = demo_image()
    stages = {
        "before": SmpAdapter.from_pretrained("demo"),
        "after": SmpAdapter.from_pretrained(str(args.run / "model")),
    }
    figure = Figure(figsize=(10.5, 3.9), layout="constrained")
    left, *others = figure.subplots(1, 3)
    nothing = 0 * truth
    left.imshow(outlined(image[None], nothing, nothing)[SHOWN, SHOWN], interpolation="none")
    left.set_title("Your image")
    for axis, (name, adapter) in zip(others, stages.items(), strict=True):
        found = adapter.segment(image)
        score = match(truth, found)[0]
        title = (
            f"{name.capitalize()}: AP {score.ap:.2f}, {score.tp} of {score.tp + score.fn} nuclei"
        )
        print(title)
        shown = outlined(image[None], truth, found)[SHOWN, SHOWN]
        axis.imshow(shown, interpolation="none")
        axis.set_title(title)
    for axis in (left, *others):
        axis.axis("off")
    legend = {"found": FOUND, "missed": MISSED, "nothing there": FALSE}
    lines = [Line2D([], [], color=colour, lw=3, label=name) for name, colour in legend.items()]
    figure.legend(handles=lines, loc="outside lower center", ncols=3, frameon=False)
    figure.savefig(args.picture, dpi=100)
    verdict = json.loads((args.run / "result.json").read_text())
    print(f"{verdict['outcome']}: {verdict['reason']}")


if __name__ == "__main__":
    main()
