"""What became of right and wrong objects in a run: all its snapshots, on all images for scoring.

    python benchmarks/snapshots.py --shared ../shared --networks runs/networks \\
        --network cpnet --domain he --run runs/start/cpnet-he-1

A run of `start.py --runs`. Prints, for each snapshot, AP, precision, recall and counts at an IoU
of 0.5, without TTA, and the share of its objects that the initial network has not found, of the
last look at it. Minutes.
"""

import argparse
from pathlib import Path

import torch
from calibration import truth
from common import table
from settings import NETWORKS, pairs

from selfadapt import Look, open_images
from selfadapt._calibrate import go_on
from selfadapt._portfolio import LOOKS
from selfadapt._rundir import INPUT, RunDirectory
from selfadapt._trials import choose_places


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shared", type=Path, required=True)
    parser.add_argument("--networks", type=Path)
    parser.add_argument("--network", choices=NETWORKS, required=True)
    parser.add_argument("--domain", required=True)
    parser.add_argument("--run", type=Path, required=True)
    args = parser.parse_args()
    torch.set_num_threads(1)
    run = RunDirectory(args.run)
    adapter = NETWORKS[args.network].open(args.shared, args.networks)
    adapter = go_on(adapter, run.read_json(INPUT) | {"tta": False})
    test = pairs(args.shared, args.domain)[::3]
    places = [choose_places(open_images([image], channel_axis=0))[0] for image, _ in test]
    added = {
        seen["snapshot"]: Look.from_dict(seen["look"]).added
        for seen in run.read_json(LOOKS)["looks"]
        if not seen["tta"]
    }
    rows = []
    for name in run.snapshots():
        network = run.load_network(name, adapter.model, torch.device("cpu")).eval()
        counts = truth(adapter.with_model(network), places, [labels for _, labels in test])
        scores = [f"{value:.3f}" for value in (counts.ap, counts.precision, counts.recall)]
        numbers = [str(n) for n in (counts.tp, counts.fp, counts.fn)]
        rows.append([str(name), *scores, *numbers, f"{added[name]:.0%}"])
        print(*rows[-1], flush=True)
    head = ["snapshot", "AP", "precision", "recall", "TP", "FP", "FN", "added"]
    print(f"\n{len(test)} images\n\n{table(head, rows)}")


if __name__ == "__main__":
    main()
