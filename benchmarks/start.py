"""What a user gets who knows nothing: calibration, then adapting, beside what others would do.

    python benchmarks/start.py --shared ../shared --networks runs/networks \\
        --out benchmarks/results/start.jsonl
    python benchmarks/start.py --out benchmarks/results/start.jsonl --docs docs

Networks and domains are those of `settings.py`, real images only. Two thirds of a domain's images
are adapted to, at their own scale, nothing said; AP at an IoU of 0.5 is that of crops of others, at
the input that was found. Baselines get the same input. A cell is a pair and a seed, minutes
each; resumable. "Best of all" knows the labels. Without --shared only the tables are made.
"""

import time
from collections.abc import Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from baselines import tent, tta
from calibration import WORTH, spread, truth
from common import add_line, fill, read_lines, results, table
from evidence import SETTINGS
from settings import NETWORKS, pairs
from sources import DOMAINS

from selfadapt import Adapter, Config, Crops, SelfAdaptation, adapt, open_images
from selfadapt._calibrate import settle
from selfadapt._network import copy_network
from selfadapt._trials import choose_places

ADAPTED_TO, SCORED = 24, 12
PAIRS = [
    ("smp", "fluo256"), ("stardist", "he"), ("smp", "he"), ("broad", "fluo520"),
    ("stardist", "fluo256"), ("smp", "small"), ("general", "small"), ("cells", "he"),
    ("general", "fluo360"), ("cells", "fluo520"), ("broad", "small"), ("stardist", "small"),
    ("cells", "fluo256"), ("general", "fluo520"), ("broad", "fluo360"), ("smp", "yeast"),
    ("broad", "fluo256"), ("stardist", "yeast"), ("smp", "membranes"), ("smp", "usiigaci"),
    ("stardist", "membranes"), ("cells", "axons"), ("smp", "rbc"), ("smp", "u373"),
    ("cpnet", "fluo256"), ("cpnet", "he"), ("cpnet", "small"), ("broad", "he"),
]  # fmt: skip
"""Networks and images that they have not seen, in the order in which they are run."""


def cell(
    network: str, domain: str, seed: int, shared: Path, networks: Path, runs: Path | None
) -> dict[str, Any]:
    """AP of every way, by name, and how the run ended."""
    source, facts = NETWORKS[network], DOMAINS[domain]
    adapter = source.open(shared, networks)
    adapter.settled = frozenset()  # nothing was said
    every = pairs(shared, domain)
    test = spread(every[::3], SCORED)
    places = [choose_places(open_images([image], channel_axis=0))[0] for image, _ in test]
    images = [image for k, (image, _) in enumerate(every) if k % 3]
    config = Config(seed=seed)

    def ap(one: Adapter) -> float:
        one.model.eval()
        counts = truth(one, places, [labels for _, labels in test])
        return 0.0 if np.isnan(counts.ap) else counts.ap

    began = time.time()
    result = adapt(
        adapter,
        images[:ADAPTED_TO],
        config=config,
        output_dir=runs and runs / f"{network}-{domain}-{seed}",
        channel_axis=0,
        progress=False,
    )
    seconds = time.time() - began
    found = adapter.with_input(replace(result.adapter.input, tta=False))
    known = replace(adapter.input, scale=source.diameter / facts.diameter, invert=facts.dark)
    looked = {str(at): ap(found.with_model(result.select(at).model)) for at in result.snapshots}
    kept = ap(result.adapter)
    scores = {
        "as it is": ap(settle(adapter, adapter.input)),
        "labels' diameter and polarity": ap(adapter.with_input(known)),
        "calibrated": ap(found),
        "calibrated and adapted": kept,
        "best of all": max([*looked.values(), kept]),
        "TTA": ap(tta(found)),
    }
    crops = Crops(found, open_images(images[:ADAPTED_TO], channel_axis=0), config)
    if "statistics-100" in looked:
        scores["AdaBN"] = looked["statistics-100"]
        scores["TENT"] = ap(tent(found, crops.batches(0, config.iterations), config))
    run = SelfAdaptation(found, replace(config, **SETTINGS["mean teacher"]))
    for _ in run.iterate(crops.batches(0, config.iterations)):
        pass
    scores["mean teacher"] = ap(found.with_model(copy_network(run.student, run.device)))
    return {
        "network": network, "domain": domain, "seed": seed, "seconds": round(seconds),
        "outcome": result.outcome, "candidate": result.candidate, "input": result.input,
        "estimate": result.quality.ap, "scores": scores, "looked": looked,
    }  # fmt: skip


# --- tables --------------------------------------------------------------------------------------

COLUMNS = ("as it is", "labels' diameter and polarity", "calibrated", "calibrated and adapted",
           "best of all", "TTA", "AdaBN", "TENT", "mean teacher")  # fmt: skip


def by_pair(cells: Sequence[dict[str, Any]]) -> str:
    rows = []
    for each in cells:
        scores = each["scores"]
        values = [f"{scores[name]:.2f}" if name in scores else "" for name in COLUMNS]
        outcome = f"{each['outcome']} ({each['candidate']})"
        rows.append([f"{each['network']} to {each['domain']}{again(each)}", *values, outcome])
    return table(["pair", *COLUMNS, "outcome"], rows)


def again(facts: dict[str, Any]) -> str:
    """Which seed it is, where it is not the first."""
    return f", seed {facts['seed']}" if facts["seed"] else ""


def gain(scores: dict[str, float], name: str) -> float:
    """Against the calibrated network, at most +100 %; of one that finds nothing, none."""
    before = scores["calibrated"]
    return min(scores[name] / max(before, 0.05) - 1, 1.0) if before else 0.0


def summary(cells: Sequence[dict[str, Any]]) -> str:
    """Change against the calibrated network, over pairs in which anything is found at all.

    The first seed alone: few pairs have others.
    """
    first = [each["scores"] for each in cells if each["seed"] == 0]
    these = [scores for scores in first if scores["best of all"] >= WORTH]
    rows = []
    for name in COLUMNS:
        having = [scores for scores in these if name in scores]
        if having:
            ap = np.mean([scores[name] for scores in having])
            gains = [gain(scores, name) for scores in having]
            told = [f"{value:+.1%}" for value in (np.mean(gains), np.median(gains), min(gains))]
            rows.append([name, str(len(having)), f"{ap:.3f}", *told])
    return table(["way", "pairs", "mean AP", "mean change", "median", "worst"], rows)


def main() -> None:
    parser = results(__doc__)
    parser.add_argument("--runs", type=Path, help="folder in which the runs are kept")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    args = parser.parse_args()
    done = {(c["network"], c["domain"], c["seed"]) for c in read_lines(args.out)}
    torch.set_num_threads(1)
    for seed, (network, domain) in product(args.seeds, PAIRS) if args.shared else ():
        if (network, domain, seed) not in done:
            facts = cell(network, domain, seed, args.shared, args.networks, args.runs)
            add_line(args.out, facts)
            told = " ".join(f"{name} {value:.3f}," for name, value in facts["scores"].items())
            ended = f"{facts['outcome']} ({facts['candidate']}); {facts['seconds']} s"
            print(f"{network} to {domain}: {told} {ended}", flush=True)
    cells = read_lines(args.out)
    tables = {"start": by_pair(cells), "start-summary": summary(cells)}
    print(*tables.values(), sep="\n\n")
    fill(args.docs, tables)


if __name__ == "__main__":
    main()
