"""Does adapting help, does it ever harm, and can it be left alone? Pairs x settings x seeds.

    python benchmarks/evidence.py --shared ../shared --out runs/evidence.jsonl

Runs every cell that is not in the output file yet: a pair of `pairs.py`, a setting of SETTINGS or
a baseline of `baselines.py`, and a seed; without further words those of the default setting, with
`--settings all` everything (days, on two cores). A cell is one trajectory to the end: at each look
the label-free figures of student and teacher are kept, and their scores on labelled test images,
so that the paper's stops, and the best look, can be read off afterwards. Looks are the judge's, at
the windows that `adapt` sees. Source networks are trained first, by `sources.py`, and kept. A cell
is not run again when the code or the defaults have changed: delete its line.

`benchmarks/results/evidence.jsonl` has the cells of docs/evidence.md, of the time when the
agreement of copies was the criterion (`evidence_cells.py`): do not mix others into it.
"""

import argparse
import json
import time
from itertools import product
from pathlib import Path
from typing import Any

import torch
from baselines import tent, tta
from common import score
from pairs import PAIRS, Pair, Task, task
from sources import FAMILIES, load, train
from torch import nn

from selfadapt import Adapter, Config, Crops, Judge, Look, SelfAdaptation, adabn
from selfadapt._batch_norm import batch_norms
from selfadapt._candidates import SHARES
from selfadapt._candidates import statistics as with_statistics
from selfadapt._network import copy_network, pick_device

SETTINGS: dict[str, dict[str, Any]] = {
    "default": {},
    # Table 2: each component off
    "no masks": {"mask": False},
    "no teacher TTA": {"views": 1},
    "no L2-SP": {"l2sp": 0.0},
    "no augmentation": {"strength": 0.0},
    # settings
    "learning rate 1e-4": {"learning_rate": 1e-4},
    "learning rate 4e-4": {"learning_rate": 4e-4},
    "8 views": {"views": 8},
    "half the augmentation": {"strength": 0.5},
    "hard targets": {"targets": "hard"},
    "batch norm of the source": {"batch_norm": "source"},
    "batch norm of the images": {"batch_norm": "target"},
    "batch norm of the batch": {"batch_norm": "batch"},
    "L2-SP 1e-2": {"l2sp": 1e-2},
    "400 iterations": {"iterations": 400},
    # like torch-em's: no masks, one view, no anchor, statistics of the batch; our augmentation
    "mean teacher": {"views": 1, "mask": False, "l2sp": 0.0, "batch_norm": "batch"},
}
BASELINES = ("TTA alone", "AdaBN", "TENT")
STATISTICS = "batch-norm statistics"
SOURCES = ("fluo360", "fluo520")
TRAINING_STEPS = {"stardist": 1500, "cellpose": 800}
TUNING_STEPS = 300
NETWORKS = ("teacher", "student")


def set_up(prepared: Task, config: Config) -> tuple[SelfAdaptation, Judge, Crops]:
    judge = Judge(prepared.held_out, windows=config.validation_images, side=config.validation_size)
    crops = Crops(prepared.adapter, prepared.images, config)
    return SelfAdaptation(prepared.adapter, config), judge, crops


def trajectory(prepared: Task, config: Config) -> list[dict[str, Any]]:
    """Figures and scores of teacher and student at each look, the first before any step."""
    adapter = prepared.adapter
    run, judge, crops = set_up(prepared, config)
    first = judge.look(adapter, run.initial)
    before = first.row(first) | scores(adapter, prepared)
    before["target_statistics"] = start(run, judge, crops, first)
    rows: list[dict[str, Any]] = [{"iteration": 0} | dict.fromkeys(NETWORKS, before)]
    for info in run.iterate(crops.batches(0, config.iterations)):
        if run.look_due:
            row: dict[str, Any] = {"iteration": run.iteration, "loss": float(info["loss"])}
            for name in NETWORKS:
                model = getattr(run, name)
                look = judge.look(adapter, model).row(first)
                row[name] = look | scores(adapter.with_model(model), prepared)
            rows.append(row)
    return rows


def start(run: SelfAdaptation, judge: Judge, crops: Crops, first: Look) -> float:
    """Begin with batch-norm statistics of the images where `adapt` would; which share of them."""
    policy = run.config.batch_norm
    if policy not in ("auto", "target") or not batch_norms(run.initial):
        return 0.0
    networks = [candidate.network for candidate in with_statistics(run, crops)]
    chosen: int | None = SHARES.index(1.0)
    if policy == "auto":
        chosen = judge.decide(first, [judge.look(run.adapter, each) for each in networks]).chosen
    if chosen is None:
        return 0.0
    run.start_from(networks[chosen])
    return SHARES[chosen]


def scores(adapter: Adapter, prepared: Task) -> dict[str, float]:
    adapter.model.eval()
    counts = score(adapter, prepared.test)
    return {"ap": counts.ap, "precision": counts.precision, "recall": counts.recall}


def statistics(prepared: Task, config: Config) -> list[dict[str, Any]] | None:
    """Figures and scores before any step, with shares of the images' batch-norm statistics."""
    adapter = prepared.adapter
    if not batch_norms(adapter.model):
        return None
    run, judge, crops = set_up(prepared, config)
    first = judge.look(adapter, run.initial)
    networks = [run.initial, *(each.network for each in with_statistics(run, crops))]
    rows = []
    for share, model in zip((0.0, *SHARES), networks, strict=True):
        look = judge.look(adapter, model).row(first)
        network = look | scores(adapter.with_model(model), prepared)
        rows.append({"iteration": 0, "share": share, "network": network})
    return rows


def baseline(name: str, prepared: Task, config: Config) -> list[dict[str, Any]] | None:
    """Before and after; None where the network has nothing that the baseline could change."""
    network = copy_network(prepared.adapter.model, pick_device(config.device))
    adapter = prepared.adapter.with_model(network)
    batches = Crops(adapter, prepared.images, config).batches(0, config.iterations)
    if name == "TTA alone":
        after = tta(adapter)
    elif not batch_norms(adapter.model):
        return None
    elif name == "TENT":
        after = tent(adapter, batches, config)
    else:
        after = adapter.with_model(adabn(adapter, batches))
    return [
        {"iteration": at, "network": scores(each, prepared)}
        for at, each in ((0, adapter), (config.iterations, after))
    ]


def networks_for(pairs: list[Pair], shared: Path, folder: Path) -> None:
    """Train the source networks that are not there yet, and fine-tune those that are to be."""
    folder.mkdir(parents=True, exist_ok=True)
    trained = [pair for pair in pairs if pair.family in TRAINING_STEPS]
    for family in sorted({pair.family for pair in trained}):
        if not (folder / family).exists():
            domains = [load(shared, name) for name in SOURCES]
            network = train(family, domains, 0, steps=TRAINING_STEPS[family])
            save(family, network, folder / family)
    for pair in trained:
        if pair.tuned and not (folder / pair.network).exists():
            domains = [load(shared, pair.tuned)]
            network = train(pair.family, domains, 0, steps=TUNING_STEPS, start=folder / pair.family)
            save(pair.family, network, folder / pair.network)


def save(family: str, network: nn.Module, path: Path) -> None:
    """Under another name first, so that what is cut short is not taken for a network."""
    partial = path.parent / "partial" / path.name
    partial.parent.mkdir(exist_ok=True)
    FAMILIES[family].save(network, partial)
    partial.replace(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shared", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument(
        "--networks", type=Path, default=Path("runs/networks"), help="folder that keeps them"
    )
    parser.add_argument("--pairs", nargs="+", help="names or parts of names; default all")
    names = [*SETTINGS, *BASELINES, STATISTICS]
    parser.add_argument("--settings", nargs="+", default=["default"], choices=[*names, "all"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--device", default="auto")
    args = parser.parse_args()
    torch.set_num_threads(2)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    lines = args.out.read_text().splitlines() if args.out.exists() else []
    done = {(c["pair"], c["setting"], c["seed"]) for c in map(json.loads, lines)}
    pairs = [p for p in PAIRS if not args.pairs or any(part in p.name for part in args.pairs)]
    if not pairs:
        parser.error(f"--pairs takes parts of {', '.join(pair.name for pair in PAIRS)}.")
    settings = names if "all" in args.settings else args.settings
    networks_for(pairs, args.shared, args.networks)
    for seed, setting, pair in product(args.seeds, settings, pairs):
        if (pair.name, setting, seed) in done:
            continue
        start = time.time()
        prepared = task(pair, args.networks, args.shared)
        config = Config(seed=seed, device=args.device, **SETTINGS.get(setting, {}))
        if setting == STATISTICS:
            rows = statistics(prepared, config)
        elif setting in BASELINES:
            rows = baseline(setting, prepared, config)
        else:
            rows = trajectory(prepared, config)
        seconds = round(time.time() - start)
        cell = {"pair": pair.name, "setting": setting, "seed": seed, "seconds": seconds}
        with args.out.open("a") as file:
            file.write(json.dumps(cell | {"rows": rows}) + "\n")
        told = "nothing to change" if rows is None else summary(rows)
        print(f"{pair.name}, {setting}, seed {seed}: {told}; {seconds} s", flush=True)


def summary(rows: list[dict[str, Any]]) -> str:
    return ", ".join(
        f"{name} " + " ".join(f"{row[name]['ap']:.3f}" for row in rows)
        for name in ("network", *NETWORKS)
        if name in rows[0]
    )


if __name__ == "__main__":
    main()
