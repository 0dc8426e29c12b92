"""StarDist networks, trained here, adapted to domains that they have not seen.

    python benchmarks/stardist_targets.py --shared ../shared --out runs/stardist

For each seed a network is trained on fluo360 and fluo520 (`benchmarks/sources.py`), and adapted to
fluo256 and to H&E (as inverted gray), with the defaults. AP at IoU 0.5 before, at each stop, last
and best; every third image is scored, at most 20. `scale` makes the median object as large as what
the network has seen, as a user would choose it. Finished networks and cells are kept and skipped.
"""

import argparse
import json
from itertools import product
from pathlib import Path

import torch
from common import looks_of_run, outcome
from sources import DIAMETERS, FAMILIES, load, train

from selfadapt import Config
from selfadapt_stardist import StardistAdapter

SOURCES, TARGETS = ("fluo360", "fluo520"), ("fluo256", "he")
DIAMETER = 21
"""Pixels; in the middle of the sizes that the network is trained on."""
TEST_IMAGES = 20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shared", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--targets", nargs="+", default=TARGETS)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=1500, help="of training the network")
    parser.add_argument("--device", default="auto")
    args = parser.parse_args()
    torch.set_num_threads(2)
    args.out.mkdir(parents=True, exist_ok=True)
    file = args.out / "cells.jsonl"
    cells = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    for seed, target in product(args.seeds, args.targets):
        if any((cell["target"], cell["seed"]) == (target, seed) for cell in cells):
            continue
        network = args.out / f"network-{seed}"
        if not network.exists():
            domains = [load(args.shared, name) for name in SOURCES]
            trained = train("stardist", domains, seed, steps=args.steps)
            FAMILIES["stardist"].save(trained, network)
        domain = load(args.shared, target)
        adapter = StardistAdapter(
            network,
            scale=DIAMETER / DIAMETERS[target],
            gray="inverted" if target == "he" else "no",
        )
        looks = looks_of_run(
            adapter,
            [image for image, _ in domain.train],
            domain.test[:TEST_IMAGES],
            Config(seed=seed, device=args.device),
            args.out / f"{target}-{seed}",
        )
        cells.append({"target": target, "seed": seed, "rows": looks})
        with file.open("a") as handle:
            handle.write(json.dumps(cells[-1]) + "\n")
        print(f"| {target} | {seed} | {outcome([looks])} |", flush=True)
    print("| target | seeds | before | stop D_emb | stop FN | last | best |")
    print("|---|---|---|---|---|---|---|")
    for target in args.targets:
        runs = [cell["rows"] for cell in cells if cell["target"] == target]
        print(f"| {target} | {len(runs)} | {outcome(runs)} |")


if __name__ == "__main__":
    main()
