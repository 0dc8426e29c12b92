"""How often the judge takes a change that is none: 2 % noise in all weights, on few images.

    python benchmarks/judge_chance.py --shared ../shared --trials 60

The bundled network on fluo520, which it knows. Prints, for one, two and four held-out images, the
share of trials in which the noisy network is kept, and in which quarter-turn agreement alone, as
of old, would have kept it. A trial draws other weights and other images. For what is kept, AP on
the images before and after tells whether it harms.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from settings import pairs
from states import noisy

from selfadapt import Adapter, Judge, Matches, match, open_images
from selfadapt._verdict import objection
from selfadapt_smp import SmpAdapter

SHARE = 0.02


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shared", type=Path, required=True)
    parser.add_argument("--trials", type=int, default=60)
    parser.add_argument("--images", type=int, nargs="+", default=[1, 2, 4])
    args = parser.parse_args()
    torch.set_num_threads(1)
    adapter = SmpAdapter.from_pretrained("demo")
    known = [
        (image[:, :512, :512], labels[:512, :512])
        for image, labels in pairs(args.shared, "fluo520")[75:]
    ]

    def ap(adapter: Adapter, these: Sequence[int]) -> float:
        counts = Matches()
        for image, labels in (known[k] for k in these):
            counts += match(labels, adapter.segment(image, channel_axis=0))[0]
        return counts.ap

    for count in args.images:
        kept = agreed = 0
        for trial in range(args.trials):
            order = np.random.default_rng((count, trial)).permutation(len(known))[:count].tolist()
            judge = Judge(open_images([known[k][0] for k in order], channel_axis=0), windows=12)
            first = judge.look(adapter, adapter.model)
            other = noisy(adapter, SHARE, trial)
            look = judge.look(other, other.model)
            wrong = objection(first, look, judge.thresholds)
            if judge.decide(first, [look]).chosen is not None:
                kept += 1
                print(f"kept: AP {ap(adapter, order):.3f} -> {ap(other, order):.3f}")
            agreed += look.agreement - first.agreement >= 0.02
            print(f"{count} images, trial {trial}: {wrong or 'nothing against it'}", flush=True)
        print(f"{count} images: kept in {kept} of {args.trials}, agreement alone in {agreed}")


if __name__ == "__main__":
    main()
