"""How good is the input that `calibrate` finds? Every trial beside its true AP.

    python benchmarks/calibration.py --shared ../shared --networks runs/networks \\
        --out benchmarks/results/calibration.jsonl
    python benchmarks/calibration.py --out benchmarks/results/calibration.jsonl --docs docs

Networks and domains are those of `settings.py`. Up to eight images of a domain are looked at, as a
user would give them: at their own scale, nothing said. AP is that of crops of four of them, at
every scale and in both polarities. Resumable by pair; an hour on two cores. Without --shared only
the tables are made.
"""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import add_line, fill, read_lines, results, table
from numpy.typing import NDArray
from settings import NETWORKS, Pairs, pairs
from sources import DOMAINS

from selfadapt import Adapter, Matches, is_constant, match, open_images, predict, prepare
from selfadapt._calibrate import search
from selfadapt._trials import DOUBT, FEWEST, PLACES, Place, choose_places

SCORED, CROP = 4, 320
WORTH = 0.1
"""Pairs whose best AP is below are left out: nothing can be found there."""
CLOSE = 0.88
Array = NDArray[Any]


def spread(these: Pairs, count: int) -> Pairs:
    """Some of the images, evenly."""
    chosen = np.linspace(0, len(these) - 1, min(count, len(these))).round().astype(int)
    return [these[k] for k in chosen]


def truth(adapter: Adapter, places: Sequence[Place], labels: Sequence[Array]) -> Matches:
    """Counts at an IoU of 0.5 over crops of images."""
    total = Matches()
    for place, whole in zip(places, labels, strict=True):
        rows, columns = place.cut(CROP)
        image, wanted = place.image[:, rows, columns], whole[rows, columns]
        found = np.zeros(wanted.shape, np.int32)
        if not is_constant(image):
            pixels = prepare(adapter, image, place.name, place.whole)
            instances = predict(adapter, adapter.model, pixels, wanted.shape).instances
            assert instances is not None
            found = instances
        total += match(wanted, found)[0]
    return total


def line(network: str, domain: str, shared: Path, networks: Path) -> dict[str, Any]:
    """All trials of a pair."""
    source, facts = NETWORKS[network], DOMAINS[domain]
    adapter = source.open(shared, networks)
    adapter.settled = frozenset()  # nothing was said
    seen = spread(pairs(shared, domain)[::3], PLACES)
    images = [image for image, _ in seen]
    found = search(adapter, open_images(images, channel_axis=0))
    scored = spread(seen, SCORED)
    places = [choose_places(open_images([image], channel_axis=0))[0] for image, _ in scored]
    trials = []
    for trial in found.trials:
        counts = truth(found.adapter.with_input(trial.input), places, [m for _, m in scored])
        figures = {
            name: [c.tp, c.fp, c.fn]
            for name, c in (
                ("turned", trial.turned), ("scaled", trial.scaled), ("alike", trial.alike),
                ("truth", counts),
            )
        }  # fmt: skip
        told = {"scale": trial.input.scale, "invert": trial.input.invert}
        rest = {"instances": trial.instances, "area": trial.area, "score": trial.score}
        trials.append(told | rest | figures)
    own = {"scale": source.diameter / facts.diameter, "invert": facts.dark}
    return {"network": network, "domain": domain, "own": own, "trials": trials}


# --- tables --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pair:
    """A network and a domain, with all that was tried."""

    name: str
    domain: str
    own: dict[str, Any]
    trials: Sequence[dict[str, Any]]

    @property
    def aps(self) -> Array:
        return np.array([_ap(*trial["truth"]) for trial in self.trials])

    def share(self, scores: Array) -> float:
        """AP of the trial with the highest score over the best AP."""
        return float(self.aps[int(np.argmax(scores))] / self.aps.max())


def _ap(tp: int, fp: int, fn: int) -> float:
    return tp / max(tp + fp + fn, 1)


Rule = Callable[[Pair], Array]


def rule(
    pair: Pair, *, stable: float, alike: bool, area: float, doubt: float, fewest: int
) -> Array:
    """A score per trial: agreement of turned copies, stability, and area, each with its power."""

    def agreement(name: str) -> Array:
        counts = np.array([trial[name] for trial in pair.trials], float)
        return counts[:, 0] / np.maximum(counts.sum(1) + doubt, 1)

    stability = agreement("scaled")
    if alike:
        stability = (stability + agreement("alike")) / 2
    areas = np.array([trial["area"] for trial in pair.trials])
    enough = np.array([trial["instances"] for trial in pair.trials]) >= fewest
    return np.asarray(agreement("turned") * stability**stable * areas**area * enough)


def nearest(pair: Pair, scale: float, *, invert: bool) -> Array:
    """1 for the trial with that input, as near as the grid has it."""
    off = [abs(math.log(t["scale"] / scale)) + 100 * (t["invert"] != invert) for t in pair.trials]
    scores = np.zeros(len(off))
    scores[int(np.argmin(off))] = 1
    return scores


OPTIONS: Sequence[Rule] = [
    partial(rule, stable=stable, alike=alike, area=area, doubt=doubt, fewest=FEWEST)
    for stable, alike, area, doubt in product(
        (1.0, 2.0), (False, True), (0.0, 0.1, 0.2), (0.0, 5.0, 10.0, 20.0)
    )
]
RULES: dict[str, Rule] = {
    "images as they are": lambda pair: nearest(pair, 1.0, invert=False),
    "true diameter and polarity, from labels": lambda pair: nearest(
        pair, pair.own["scale"], invert=pair.own["invert"]
    ),
    "agreement of turned copies": partial(rule, stable=0, alike=False, area=0, doubt=0, fewest=0),
    "x stability at the next scales": partial(
        rule, stable=1, alike=False, area=0, doubt=0, fewest=0
    ),
    "x area^0.07 (as planned)": partial(rule, stable=1, alike=False, area=0.07, doubt=0, fewest=0),
    "as shipped": partial(rule, stable=2, alike=True, area=0.1, doubt=DOUBT, fewest=FEWEST),
}


def left_out(these: Sequence[Pair]) -> list[float]:
    """Shares by the option that is best on all other domains."""
    shares = []
    for pair in these:
        others = [each for each in these if each.domain != pair.domain]
        best = max(OPTIONS, key=lambda o: np.mean([each.share(o(each)) for each in others]))
        shares.append(pair.share(best(pair)))
    return shares


def shares(these: Sequence[Pair]) -> str:
    """The AP of each choice over the best one."""
    values = {name: [pair.share(scores(pair)) for pair in these] for name, scores in RULES.items()}
    values["powers and doubt from other domains"] = left_out(these)
    rows = []
    for name, got in values.items():
        worst = ", ".join(f"{value:.2f}" for value in sorted(got)[:3])
        close = np.mean(np.array(got) > CLOSE)
        rows.append([name, f"{np.mean(got):.2f}", f"{np.median(got):.2f}", worst, f"{close:.0%}"])
    return table(["choice", "mean", "median", "worst three", f"above {CLOSE}"], rows)


def missed(these: Sequence[Pair]) -> str:
    """Where the loss comes from."""
    rows = []
    for pair in these:
        scores = RULES["as shipped"](pair)
        if pair.share(scores) < CLOSE:
            cells = [pair.name]
            for each in (scores, pair.aps):
                trial = pair.trials[int(np.argmax(each))]
                way = f"{trial['scale']:.2f}{', inverted' * trial['invert']}"
                cells += [way, f"{_ap(*trial['truth']):.2f}"]
            rows.append(cells)
    return table(["pair", "chosen", "AP", "best", "AP"], rows)


def main() -> None:
    parser = results(__doc__)
    parser.add_argument("--skip", nargs="*", default=[], help="networks that are left out")
    args = parser.parse_args()
    done = {(each["network"], each["domain"]) for each in read_lines(args.out)}
    todo = [(n, d) for d, n in product(DOMAINS, NETWORKS) if n not in args.skip]
    torch.set_num_threads(1)
    for network, domain in todo if args.shared else ():
        if (network, domain) not in done:
            began = time.time()
            add_line(args.out, line(network, domain, args.shared, args.networks))
            print(f"{network} {domain}: {time.time() - began:.0f} s", flush=True)
    every = [
        Pair(f"{each['network']}, {each['domain']}", each["domain"], each["own"], each["trials"])
        for each in read_lines(args.out)
    ]
    these = [pair for pair in every if pair.aps.max() >= WORTH]
    tables = {"calibration": shares(these), "calibration-missed": missed(these)}
    print(f"{len(these)} of {len(every)} pairs\n", *tables.values(), sep="\n\n")
    fill(args.docs, tables)


if __name__ == "__main__":
    main()
