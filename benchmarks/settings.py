"""How far do learning rate and exported network matter? A first look behind Config's defaults.

    python benchmarks/settings.py --data ../shared/data/dsb2018 --out runs/settings.jsonl

Adapts the bundled network to three targets that it has not seen: the image of `selfadapt demo`
with its shift, fluo256, and H&E as inverted gray. Every trajectory is scored with labels at each
look, for the student and the teacher, so that one trajectory shows every stop. Finished cells are
kept in the output file and skipped. About three minutes a cell on two CPU cores.
"""

import argparse
import json
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import outcome, score

from selfadapt import Config, SelfAdaptation, Validation, open_images, prepare
from selfadapt._crops import Crops
from selfadapt._demo import demo_image
from selfadapt_smp import SmpAdapter

RATES = (1e-4, 2e-4, 5e-4)
TEST_IMAGES = 20


def target(name: str, data: Path) -> tuple[SmpAdapter, Any, list[tuple[Any, Any]]]:
    """Adapter, training images, and test pairs of image and labels."""
    gray = "inverted" if name == "he" else "no"
    adapter = SmpAdapter.from_pretrained("demo", gray=gray)
    if name == "demo":
        image, labels = demo_image()
        return adapter, open_images(image), [(image[None], labels)]
    images, masks = open_images(data / name / "images"), open_images(data / name / "masks")
    order = np.random.default_rng(0).permutation(len(images))
    test = [(images[i].read(), masks[i].read()[0]) for i in order[:TEST_IMAGES]]
    return adapter, [images[i] for i in order[TEST_IMAGES : TEST_IMAGES + 60]], test


def trajectory(name: str, rate: float, seed: int, args: argparse.Namespace) -> list[dict[str, Any]]:
    adapter, images, test = target(name, args.data)
    config = Config(
        learning_rate=rate, seed=seed, iterations=args.iterations, validate_every=25, device="cpu"
    )
    held_out = images[-6:]
    prepared = [prepare(adapter, source.read(), source.name) for source in held_out]
    crops = Crops(adapter, images[:-6] or images, config)
    run = SelfAdaptation(adapter, config)
    looks = Validation(adapter, run.initial, prepared)
    rows = [{"iteration": 0, "student": {"ap": score(adapter, test).ap}}]
    rows[0]["teacher"] = rows[0]["student"]
    for _ in run.iterate(crops.batches(0, config.iterations)):
        if run.iteration % config.validate_every == 0:
            row: dict[str, Any] = {"iteration": run.iteration}
            for which in ("student", "teacher"):
                model = getattr(run, which)
                row[which] = looks(model) | {"ap": score(adapter.with_model(model), test).ap}
            rows.append(row)
    return rows


def table(cells: list[dict[str, Any]]) -> str:
    lines = [
        "| target | learning rate | exported | seeds | base | stop D_emb | stop FN | last | best |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    groups = sorted({(c["target"], c["rate"]) for c in cells})
    for (name, rate), which in product(groups, ("student", "teacher")):
        runs = [
            [row[which] for row in c["rows"]]
            for c in cells
            if (c["target"], c["rate"]) == (name, rate)
        ]
        lines.append(f"| {name} | {rate:g} | {which} | {len(runs)} | {outcome(runs)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--iterations", type=int, default=200)
    parser.add_argument("--targets", nargs="+", default=["demo", "fluo256", "he"])
    parser.add_argument("--rates", nargs="+", type=float, default=list(RATES))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    args = parser.parse_args()
    torch.set_num_threads(2)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    lines = args.out.read_text().splitlines() if args.out.exists() else []
    cells = [json.loads(line) for line in lines]
    for seed, rate, name in product(args.seeds, args.rates, args.targets):
        key = {"target": name, "rate": rate, "seed": seed, "iterations": args.iterations}
        if any(all(cell[k] == v for k, v in key.items()) for cell in cells):
            continue
        cells.append(key | {"rows": trajectory(name, rate, seed, args)})
        with args.out.open("a") as file:
            file.write(json.dumps(cells[-1]) + "\n")
        print(table(cells[-1:]).splitlines()[-1], flush=True)
    print(table(cells))


if __name__ == "__main__":
    main()
