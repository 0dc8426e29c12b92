"""When is the mean over flips and turns of a network as it stands better than the network?

    python benchmarks/tta.py --shared ../shared --networks runs/networks \\
        --out benchmarks/results/tta.jsonl
    python benchmarks/tta.py --out benchmarks/results/tta.jsonl --docs docs

Networks and domains are those of `settings.py`, as a user starts: two thirds of a domain's images
are given, at their own scale, nothing said, and a run that trains nothing looks at the network and
at its mean. AP at an IoU of 0.5 is that of crops of others, at the input that was found. Each pair
is also met with its images made worse (`states.py`), calibrated anew. Shuffled and resumable; a
minute or two each. Without --shared only the tables are made.
"""

import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from baselines import tta
from calibration import WORTH, spread, truth
from common import add_line, fill, read_lines, results, table
from settings import NETWORKS, Pairs, pairs
from sources import DOMAINS
from states import CORRUPTIONS

from selfadapt import Adapter, Config, Matches, adapt, open_images
from selfadapt._look import Look
from selfadapt._trials import Place, choose_places
from selfadapt._verdict import Thresholds, rise, veto

ADAPTED_TO, SCORED = 24, 16
SLOW = {"deepsea": ("usiigaci", "u373", "yeast")}
"""Networks that take long, and the domains that they are at home on."""
HOPELESS = ("pure noise", "black")


def plan() -> list[tuple[str, str, str, int]]:
    """Network, domain, corruption, level, shuffled: of a part that is done, every kind is there."""
    jobs = []
    names = [name for name in CORRUPTIONS if name not in HOPELESS]
    for number, domain in enumerate(DOMAINS):
        for k, network in enumerate(NETWORKS):
            if domain in SLOW.get(network, DOMAINS):
                rng = np.random.default_rng((number, k))
                jobs.append((network, domain, "", 0))
                name = names[rng.integers(len(names))]
                jobs.append((network, domain, name, int(rng.integers(len(CORRUPTIONS[name][1])))))
    return [jobs[k] for k in np.random.default_rng(1).permutation(len(jobs))]


def corrupted(these: Pairs, name: str, level: int) -> Pairs:
    """The pairs with their images made worse."""
    if not name:
        return these
    corrupt, levels = CORRUPTIONS[name]
    return [
        (np.asarray(corrupt(image.astype(np.float32), levels[level], np.random.default_rng(k)),
                    np.float32), labels)
        for k, (image, labels) in enumerate(these)
    ]  # fmt: skip


def line(
    network: str, domain: str, corruption: str, level: int, shared: Path, networks: Path
) -> dict[str, Any]:
    """Both looks, and counts per crop of both."""
    adapter = NETWORKS[network].open(shared, networks)
    adapter.settled = frozenset()  # nothing was said
    every = pairs(shared, domain)
    given = [pair for k, pair in enumerate(every) if k % 3][:ADAPTED_TO]
    images = [image for image, _ in corrupted(given, corruption, level)]
    with tempfile.TemporaryDirectory() as folder:
        result = adapt(
            adapter,
            images,
            config=Config(candidates="tta", batch_norm="source"),
            output_dir=Path(folder) / "run",
            channel_axis=0,
            progress=False,
        )
        looks = [each["look"] for each in result.directory.read_json("looks.json")["looks"]]
    facts = {
        "network": network, "domain": domain, "corruption": corruption, "level": level,
        "outcome": result.outcome, "candidate": result.candidate, "input": result.input,
        "looks": looks,
    }  # fmt: skip
    if len(looks) == 1:  # no network is trusted: its mean was not looked at
        return facts
    found = adapter.with_input(replace(result.adapter.input, tta=False))
    test = corrupted(spread(every[::3], SCORED), corruption, level)
    places = [choose_places(open_images([image], channel_axis=0))[0] for image, _ in test]
    labels = [each for _, each in test]
    return facts | {
        "plain": counts(found, places, labels), "tta": counts(tta(found), places, labels),
    }  # fmt: skip


def counts(adapter: Adapter, places: Sequence[Place], labels: Sequence[Any]) -> list[list[int]]:
    """True positives, false positives and false negatives of each crop."""
    adapter.model.eval()
    each = [truth(adapter, [p], [wanted]) for p, wanted in zip(places, labels, strict=True)]
    return [[c.tp, c.fp, c.fn] for c in each]


# --- the table -----------------------------------------------------------------------------------

HARM, HELP = -0.01, 0.03


@dataclass(frozen=True)
class Setting:
    """A network that is trusted, and its mean."""

    before: float
    after: float
    first: Look
    look: Look
    shipped: bool

    @property
    def gain(self) -> float:
        return self.after / self.before - 1


def read(lines: Sequence[dict[str, Any]]) -> list[Setting]:
    """Where the mean was looked at, and something is found."""
    settings = []
    for each in lines:
        if "tta" in each:
            before, after = ap(each["plain"]), ap(each["tta"])
            first, look = map(Look.from_dict, each["looks"])
            if min(before, after) > 0 and max(before, after) >= WORTH:
                kept = each["candidate"] == "initial+tta"
                settings.append(Setting(before, after, first, look, kept))
    return settings


def lenient(setting: Setting, missed: float) -> bool:
    """It need not rise: that it falls by little, and loses and adds few objects, is enough."""
    look, asked = setting.look, Thresholds(missed=missed)
    return veto(setting.first, look, asked) is None and rise(setting.first, look)[0] >= -0.02


def rules(settings: Sequence[Setting]) -> str:
    """What each way to decide keeps."""
    kept: dict[str, Callable[[Setting], bool]] = {
        "always": lambda _: True,
        "as shipped: stability must rise": lambda setting: setting.shipped,
        "nothing speaks against it, and stability falls by 0.02 at most": partial(
            lenient, missed=Thresholds().missed
        ),
        "the same, and a quarter of the objects missed at most": partial(lenient, missed=0.25),
    }
    rows = []
    for name, rule in kept.items():
        gains = [setting.gain for setting in settings if rule(setting)]
        harmful = sum(setting.gain < HARM for setting in settings)
        helpful = sum(setting.gain > HELP for setting in settings)
        rows.append(
            [
                name,
                f"{len(gains)} of {len(settings)}",
                f"{sum(gains) / len(settings):+.1%}",
                f"{min(gains):+.1%}",
                f"{sum(gain < HARM for gain in gains)} of {harmful}",
                f"{sum(gain > HELP for gain in gains)} of {helpful}",
            ]
        )
    head = ["the mean is kept", "settings", "mean change of AP", "worst"]
    return table([*head, "worse by more than 1 %", "better by more than 3 %"], rows)


def main() -> None:
    args = results(__doc__).parse_args()
    done = {(c["network"], c["domain"], c["corruption"], c["level"]) for c in read_lines(args.out)}
    torch.set_num_threads(1)
    for job in plan() if args.shared else ():
        if job not in done:
            began = time.time()
            facts = line(*job, args.shared, args.networks)
            add_line(args.out, facts)
            aps = {name: ap(facts[name]) for name in ("plain", "tta") if name in facts}
            print(*job, aps, facts["outcome"], f"{time.time() - began:.0f} s", flush=True)
    tables = {"tta": rules(read(read_lines(args.out)))}
    print(*tables.values())
    fill(args.docs, tables)


def ap(each: Sequence[Sequence[int]]) -> float:
    """Pooled over crops."""
    return sum((Matches(*crop) for crop in each), Matches()).ap


if __name__ == "__main__":
    main()
