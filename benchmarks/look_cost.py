"""What a look costs, beside a plain segmentation and the look before there was a judge.

    python benchmarks/look_cost.py --shared ../shared [--before CHECKOUT]

The bundled network on eight images of fluo256 (256 x 256), one thread, processor time of this
process, the least of REPEATS. CHECKOUT is a folder with the files of commit 6d5b42a, the last one
before the judge (`git archive 6d5b42a | tar x -C CHECKOUT`); its look runs in a process of its own,
which knows no Judge: so each imports what it needs itself.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from selfadapt import open_images
from selfadapt_smp import SmpAdapter

IMAGES, REPEATS = 8, 5


class Passes:
    """Counts images through a network, and their pixels in those of one plain image."""

    def __init__(self, model: torch.nn.Module, pixels: int) -> None:
        self.images, self.pixels, self._one = 0, 0.0, pixels
        model.register_forward_pre_hook(self._count)

    def _count(self, _: Any, given: tuple[Any, ...]) -> None:
        images, _, height, width = given[0].shape
        self.images += images
        self.pixels += images * height * width / self._one


def measured(name: str, model: torch.nn.Module, work: Callable[[], Any]) -> list[str]:
    """Seconds of all windows; images and pixels through the network, per window."""
    work()  # the first time, windows are chosen and memory is taken
    passes = Passes(model, 256 * 256)
    spent = []
    for _ in range(REPEATS):
        began = time.process_time()
        work()
        spent.append(time.process_time() - began)
    each = [passes.images / REPEATS / IMAGES, passes.pixels / REPEATS / IMAGES]
    return [name, f"{min(spent):.2f}", *(f"{value:.1f}" for value in each)]


def before(images: Any) -> list[str]:
    """The old look; runs where `selfadapt` is that of the checkout."""
    from selfadapt import Validation  # type: ignore[attr-defined]

    adapter = SmpAdapter.from_pretrained("demo")
    prepared = [torch.from_numpy(adapter.prepare(each.read())) for each in images]
    look = Validation(adapter, adapter.model, prepared)
    return measured("look before the judge", adapter.model, lambda: look(adapter.model))


def now(images: Any) -> list[list[str]]:
    from selfadapt import Judge, predict

    adapter = SmpAdapter.from_pretrained("demo")
    judge = Judge(images, windows=IMAGES)
    look = measured("look", adapter.model, lambda: judge.look(adapter, adapter.model))
    adapter = SmpAdapter.from_pretrained("demo")

    def plain() -> None:
        for _, pixels, size in judge.examples:
            predict(adapter, adapter.model, pixels, size)

    return [measured("plain segmentation", adapter.model, plain), look]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shared", type=Path, required=True)
    parser.add_argument("--before", type=Path, help="folder with the files of commit 6d5b42a")
    parser.add_argument("--old", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    images = open_images(args.shared / "data" / "dsb2018" / "fluo256" / "images")[:IMAGES]
    if args.old:
        print(json.dumps(before(images)))
        return
    from common import table

    rows = now(images)
    if args.before:
        paths = os.pathsep.join([str(args.before), str(args.before / "adapters")])
        command = [sys.executable, __file__, "--shared", str(args.shared), "--old"]
        found = {**os.environ, "PYTHONPATH": paths}
        done = subprocess.run(command, env=found, stdout=subprocess.PIPE, text=True, check=True)
        rows.append(json.loads(done.stdout))
    print(table(["", "seconds", "images per window", "the same in pixels"], rows))


if __name__ == "__main__":
    main()
