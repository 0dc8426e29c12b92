"""How much faster a step is on a CPU with `Adapter.channels_last`, in turns in one process.

    python benchmarks/layout.py --shared ../shared --networks runs/networks

Prints a row of docs/benchmarks.md for each family of `pairs.py`; source networks as `evidence.py`
has trained them.
"""

import argparse
import time
from pathlib import Path

import numpy as np
import torch
from pairs import FAMILIES, PAIRS, task

from selfadapt import Config, Crops, SelfAdaptation

ROUNDS = 12


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shared", type=Path, required=True)
    parser.add_argument("--networks", type=Path, required=True)
    args = parser.parse_args()
    torch.set_num_threads(2)
    config = Config(device="cpu")
    for family in FAMILIES:
        pair = next(p for p in PAIRS if p.family == family and p.target == "fluo256")
        prepared = task(pair, args.networks, args.shared)
        runs = []
        for prepared.adapter.channels_last in (False, True):
            runs.append(SelfAdaptation(prepared.adapter, config))
        seconds = np.zeros((ROUNDS, 2))
        crops = Crops(prepared.adapter, prepared.images, config)
        for k, images in enumerate(crops.batches(0, ROUNDS)):
            for which, run in enumerate(runs):
                start = time.perf_counter()
                run.step(images)
                seconds[k, which] = time.perf_counter() - start
        ratios = seconds[2:, 0] / seconds[2:, 1]  # the first two warm up
        print(f"| {family} | {np.median(ratios):.2f} | {ratios.min():.2f} to {ratios.max():.2f} |")


if __name__ == "__main__":
    main()
