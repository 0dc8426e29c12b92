"""Where the time of a default run goes: reading, calibration, steps, looks, export.

    python benchmarks/whole_run.py [--model demo --images DIR]

Without images, the bundled network is adapted to the image of the demo, with the default settings.
Processor time of this process, one thread, so that other work on the machine counts little; what
lies between two events of the run is the later one's.
"""

import argparse
import tempfile
import time
from collections import Counter
from pathlib import Path

import torch
from common import table

from selfadapt import Event, adapt
from selfadapt._demo import demo_image
from selfadapt_smp import SmpAdapter

PARTS = ("reading, holding out", "calibration", "steps", "looks", "export")


class Clock:
    """Adds up the time between events, as a callback of `adapt`."""

    def __init__(self) -> None:
        self.spent: Counter[str] = Counter()
        self.count: Counter[str] = Counter()
        self._last = time.process_time()

    def __call__(self, event: Event) -> None:
        if event.kind == "stage":
            part = PARTS[0]
        elif event.stage == "calibration":
            part = PARTS[1]
        else:
            part = "steps" if event.kind == "step" else "looks"
        self.book(part)

    def book(self, part: str) -> None:
        now = time.process_time()
        self.spent[part] += now - self._last
        self.count[part] += 1
        self._last = now


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--images", help="default: the image of the demo")
    args = parser.parse_args()
    torch.set_num_threads(1)
    adapter = SmpAdapter.from_pretrained(args.model)
    images = args.images or demo_image()[0]
    with tempfile.TemporaryDirectory() as folder:
        clock = Clock()
        result = adapt(
            adapter, images, output_dir=Path(folder) / "run", progress=False, callback=clock
        )
        clock.book("export")
    total = sum(clock.spent.values())
    rows = [
        [
            part,
            str(clock.count[part]),
            f"{clock.spent[part]:.0f}",
            f"{clock.spent[part] / total:.0%}",
        ]
        for part in PARTS
    ]
    print(f"{result.outcome}: {result.reason}. {total:.0f} s of processor time.")
    print(table(["part", "how many", "seconds", "share"], rows))


if __name__ == "__main__":
    main()
