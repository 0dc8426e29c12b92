"""From the predictions of `collect.py` to what the judge sees of them, a line per setting.

    python benchmarks/judge_looks.py --predictions PREDICTIONS --out benchmarks/results/judge.jsonl

Resumable by setting. A line holds the setting, its look (as the library makes it of the stored
label images), that of its base on the same crops, and counts against the truth.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
from settings import LOOKED_AT, SCORED

from selfadapt import Look, Matches, Prediction, match
from selfadapt._look import Views

AFTER_TURNS = 5
"""Views that `collect.py` stores after the plain one and the turned copies: two scales, faded,
noise and dropout."""
FACTS = ("network", "domain", "scale", "invert", "corruption", "level", "base", "state")


def views(stack: Any) -> Views:
    """Of one crop, from label images `[V, H, W]`."""
    labels = [each.astype(np.int32) for each in stack]
    turns = len(labels) - AFTER_TURNS
    plain, turned, rest = labels[0], labels[1 : 1 + turns], labels[1 + turns :]
    small, large, faded = rest[:3]
    return Views(Prediction({}, None, plain), turned, [small, large], [faded])


def truth(file: Any, seen: list[Views]) -> Matches:
    """Counts at an IoU of 0.5 over the crops that were looked at and others of the domain."""
    scored = [Matches(*map(int, counts)) for counts in file["scored"][:SCORED, 0]]
    looked = [match(file[f"truth{k}"], view.labels)[0] for k, view in enumerate(seen)]
    return sum(scored + looked, Matches())


def line(path: Path) -> dict[str, Any]:
    with np.load(path) as file:
        facts = json.loads(str(file["facts"]))
        seen = [views(file[f"look{k}"]) for k in range(LOOKED_AT)]
        counts = truth(file, seen)
    first = seen
    if facts["base"]:
        with np.load(path.parent / f"{facts['base']}.npz") as base:
            first = [views(base[f"look{k}"]) for k in range(LOOKED_AT)]
    look = Look.of(seen, first).to_dict()
    setting = {name: facts[name] for name in FACTS}
    return {"name": path.stem, **setting, "truth": [counts.tp, counts.fp, counts.fn], "look": look}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--predictions", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    lines = args.out.read_text().splitlines() if args.out.exists() else []
    done = {json.loads(each)["name"] for each in lines}
    with args.out.open("a") as out:
        for path in sorted(args.predictions.glob("*.npz")):
            if path.stem not in done and not path.stem.endswith(".partial"):
                print(json.dumps(line(path)), file=out, flush=True)


if __name__ == "__main__":
    main()
