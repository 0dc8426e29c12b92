"""Segment every setting in all the ways that a signal may need, one file each.

    python benchmarks/collect.py --shared ../shared --networks runs/networks --out runs/predictions

Hours on two cores; resumable by setting, and `--part 0/2` and `--part 1/2` share the work. The
networks are those of `sources.py`: "stardist" (fluo360 fluo520, 1500 steps), "general" (he rbc
yeast axons fluo256) and "cells" (usiigaci u373 membranes small fluo360), 1800 steps each. A file
holds label images of the crops that are looked at: as they are, then the turned, scaled and faded
copies of `selfadapt`'s own look, and two more for the method it is compared with, noise as strong
as the image's own and dropout (0.2) in the bottleneck.
"""

import argparse
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from settings import LOOKED_AT, NETWORKS, SCORED, Crop, Entry, crops, pairs, unlabelled
from sources import DOMAINS
from states import CORRUPTIONS, RUNS, states, trained
from torch import Tensor
from torch.nn import functional

from selfadapt import Adapter, match, predict
from selfadapt._augment import noise_level
from selfadapt._batch_norm import batch_norms
from selfadapt._look import views

STATED, TRAINED = 0.03, 0.1
"""States are made of networks from this AP on, and training from that on."""


@dataclass(frozen=True)
class Job:
    """A network, a domain, how its images go in, and whether states are made there."""

    network: str
    domain: str
    entry: Entry
    states: bool

    @property
    def name(self) -> str:
        e = self.entry
        tail = f"{e.scale}-{int(e.invert)}-{e.corruption}{e.level}"
        return f"{self.network}-{self.domain}-{tail}".replace(" ", "_")


def plan() -> list[Job]:
    """All jobs, shuffled: of a part that is done, every kind is there."""
    jobs = []
    for number, (domain, facts) in enumerate(DOMAINS.items()):
        for k, (network, source) in enumerate(NETWORKS.items()):
            rng = np.random.default_rng((number, k))
            own = round(source.diameter / facts.diameter, 3)
            entries = [Entry(1.0, False)]  # as a user starts
            for _ in range(2):
                scale = round(float(np.exp(rng.uniform(np.log(0.35), np.log(2.2)))), 3)
                entries.append(Entry(scale, bool(rng.integers(2))))
            for _ in range(2):
                name = list(CORRUPTIONS)[rng.integers(len(CORRUPTIONS))]
                level = int(rng.integers(len(CORRUPTIONS[name][1])))
                entries.append(Entry(own, facts.dark, name, level))
            jobs.append(Job(network, domain, Entry(own, facts.dark), True))
            jobs += [Job(network, domain, entry, False) for entry in entries]
    return [jobs[k] for k in np.random.default_rng(0).permutation(len(jobs))]


@torch.no_grad()
def segmented(adapter: Adapter, image: Tensor, seed: int) -> NDArray[np.uint16]:
    """Label images `[V, H, W]` of one crop, in the order that `judge_looks.py` reads."""
    size = image.shape[1], image.shape[2]
    seen = views(adapter, adapter.model, image, size)
    drawn = torch.randn(image.shape, generator=torch.Generator().manual_seed(seed))
    noisy = image + noise_level(image[None])[0] * drawn
    noise = predict(adapter, adapter.model, noisy, size).instances
    both = [noise, _with_dropout(adapter, image, size)]
    return np.stack([seen.labels, *seen.turned, *seen.scaled, *seen.faded, *both]).astype(np.uint16)


def _with_dropout(adapter: Adapter, image: Tensor, size: tuple[int, int]) -> Any:
    layer = adapter.embedding_module(adapter.model)
    if layer is None:
        return np.zeros(size, np.int32)

    def drop(_: Any, __: Any, output: Any) -> Any:
        with torch.random.fork_rng([]):
            torch.manual_seed(0)
            if isinstance(output, list):
                return [*output[:-1], functional.dropout2d(output[-1], 0.2)]
            return functional.dropout2d(output, 0.2)

    handle = layer.register_forward_hook(drop)
    try:
        return predict(adapter, adapter.model, image, size).instances
    finally:
        handle.remove()


def save(
    path: Path,
    facts: dict[str, Any],
    adapter: Adapter,
    looked: Sequence[Crop],
    scored: Sequence[Crop],
) -> None:
    """Write one setting; the file appears complete or not at all."""
    adapter.model.eval()
    arrays: dict[str, Any] = {}
    for k, crop in enumerate(looked):
        arrays[f"look{k}"] = segmented(adapter, crop.image, k)
        arrays[f"truth{k}"] = crop.truth.astype(np.uint16)
    counts = []
    for crop in scored:
        labels = predict(adapter, adapter.model, crop.image).instances
        counts.append([[m.tp, m.fp, m.fn] for m in match(crop.truth, labels, (0.5, 0.7))])
    partial = path.with_suffix(".partial.npz")
    np.savez_compressed(partial, facts=json.dumps(facts), scored=np.array(counts), **arrays)
    partial.rename(path)


def ap(path: Path) -> float:
    with np.load(path) as file:
        tp, fp, fn = file["scored"][:, 0].sum(0)
    return float(tp / max(tp + fp + fn, 1))


def changed(
    adapter: Adapter, job: Job, shared: Path, quality: float, out: Path
) -> Iterator[tuple[str, Adapter]]:
    """States of a network that finds something: made by hand, and by training."""
    images = unlabelled([p for k, p in enumerate(pairs(shared, job.domain)) if k % 3], job.entry)
    yield from states(adapter, images, 0)
    scripted = isinstance(adapter.model, torch.jit.ScriptModule)
    for kind in RUNS:
        if kind != "run" and (scripted or quality < TRAINED):
            continue
        if kind == "bold" and not batch_norms(adapter.model):
            continue
        if not list(out.glob(f"{job.name}--{kind}_*.npz".replace(" ", "_"))):
            yield from trained(adapter, images, kind, 0)


def run(job: Job, shared: Path, networks: Path, out: Path) -> float:
    """One job; returns the AP of the network as it stands."""
    source = NETWORKS[job.network]
    adapter = source.open(shared, networks)
    test = pairs(shared, job.domain)[::3]
    looked = crops(adapter, test[0::2], job.entry, LOOKED_AT, 0, source.window)
    scored = crops(adapter, test[1::2], job.entry, SCORED, 1, source.window)
    facts = {"network": job.network, "domain": job.domain, **asdict(job.entry)}
    path = out / f"{job.name}.npz"
    if not path.exists():
        save(path, facts | {"base": "", "state": ""}, adapter, looked, scored)
    quality = ap(path)
    if job.states and quality > STATED:
        for state, other in changed(adapter, job, shared, quality, out):
            target = out / f"{job.name}--{state.replace(' ', '_')}.npz"
            if not target.exists():
                told = facts | {"base": job.name, "state": state}
                save(target, told, other, looked, scored)
    return quality


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shared", type=Path, required=True)
    parser.add_argument("--networks", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--part", default="0/1")
    args = parser.parse_args()
    part, parts = map(int, args.part.split("/"))
    torch.set_num_threads(max(2 // parts, 1))
    args.out.mkdir(parents=True, exist_ok=True)
    jobs = plan()
    for place in range(part, len(jobs), parts):
        began = time.time()
        quality = run(jobs[place], args.shared, args.networks, args.out)
        told = f"AP {quality:.3f}; {time.time() - began:.0f} s"
        print(f"{place}/{len(jobs)} {jobs[place].name}: {told}", flush=True)


if __name__ == "__main__":
    main()
