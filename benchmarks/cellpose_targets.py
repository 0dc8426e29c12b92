"""Cellpose 3 networks adapted to images of other kinds: AP before, at each stop, last and best.

    python benchmarks/cellpose_targets.py --shared ../shared --out runs/cellpose [--networks ...]

Networks: `cpnet_nuclei` (Cellpose's own size) and `cpnet_nuclei_small`, trained on two sets of
fluorescent nuclei. Targets: `fluo256` and `he` (H&E as inverted gray) of dsb2018, and
`usiigaci_phase` (whole cells in phase contrast, which the networks have never seen). Every third
image is scored, at most 20; the others are adapted to, with the defaults. Diameters are the medians
of the sets, as a user would enter them. One run without a criterion gives every stop, as its
figures and snapshots are kept. Finished cells are kept in the output folder and skipped.
"""

import argparse
import json
from itertools import product
from pathlib import Path
from typing import Any

import torch
from common import looks_of_run, outcome

from selfadapt import Config, open_images
from selfadapt_cellpose import CellposeAdapter

TARGETS: dict[str, dict[str, Any]] = {
    "dsb2018/fluo256": {"diameter": 14},
    "dsb2018/he": {"diameter": 21, "channels": [0, 0], "invert": True},
    "usiigaci_phase": {"diameter": 47},
}
TEST_IMAGES = 20


def cell(network: str, target: str, seed: int, args: argparse.Namespace) -> dict[str, Any]:
    images, masks = (
        open_images(args.shared / "data" / target / kind) for kind in ("images", "masks")
    )
    test = [(images[i].read(), masks[i].read()[0]) for i in range(0, len(images), 3)][:TEST_IMAGES]
    adapter = CellposeAdapter(args.shared / "models" / network / "weights.pt", **TARGETS[target])
    rows = looks_of_run(
        adapter,
        [image for i, image in enumerate(images) if i % 3],
        test,
        Config(seed=seed, iterations=args.iterations, device=args.device),
        args.out / f"{network}-{Path(target).name}-{seed}",
    )
    return {"network": network, "target": target, "seed": seed, "rows": rows}


def table(cells: list[dict[str, Any]]) -> str:
    lines = [
        "| network | target | seeds | before | stop D_emb | stop FN | last | best |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for network, target in dict.fromkeys((c["network"], c["target"]) for c in cells):
        runs = [c["rows"] for c in cells if (c["network"], c["target"]) == (network, target)]
        lines.append(f"| {network} | {Path(target).name} | {len(runs)} | {outcome(runs)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shared", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--networks", nargs="+", default=["cpnet_nuclei_small", "cpnet_nuclei"])
    parser.add_argument("--targets", nargs="+", default=list(TARGETS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--iterations", type=int, default=Config().iterations)
    parser.add_argument("--device", default="auto")
    args = parser.parse_args()
    torch.set_num_threads(2)
    args.out.mkdir(parents=True, exist_ok=True)
    file = args.out / "cells.jsonl"
    cells = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    for network, seed, target in product(args.networks, args.seeds, args.targets):
        if any((c["network"], c["target"], c["seed"]) == (network, target, seed) for c in cells):
            continue
        cells.append(cell(network, target, seed, args))
        with file.open("a") as handle:
            handle.write(json.dumps(cells[-1]) + "\n")
        print(table(cells[-1:]).splitlines()[-1], flush=True)
    print(table(cells))


if __name__ == "__main__":
    main()
