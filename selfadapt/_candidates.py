"""Networks that may become the result: each is looked at, and one judge decides between them."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from selfadapt._batch_norm import adabn, batch_norms, mixed
from selfadapt._crops import Crops
from selfadapt._run import SelfAdaptation

STATISTICS_BATCHES = 64
"""Batches over which batch-norm statistics of the images are measured."""
SHARES = (0.5, 1.0)
"""Shares of the images' statistics that are tried; the trained ones make up the rest."""


@dataclass(frozen=True)
class Candidate:
    """A network, what it is called, and after how many steps."""

    name: str
    iteration: int
    network: nn.Module

    @property
    def snapshot(self) -> int | str:
        """Name of its weights."""
        return self.iteration if self.name in ("initial", "loop") else self.name


def initial(run: SelfAdaptation) -> Candidate:
    """The trained network as it was given."""
    return Candidate("initial", 0, run.initial)


def statistics(run: SelfAdaptation, crops: Crops) -> Iterator[Candidate]:
    """The initial network with batch-norm statistics of the images, half and all of them."""
    if not batch_norms(run.initial):
        return
    batches = crops.batches(0, STATISTICS_BATCHES)
    measured = adabn(run.adapter.with_model(run.initial), batches)
    for share in SHARES:
        network = measured if share == 1 else mixed(run.initial, measured, share)
        yield Candidate(f"statistics-{share * 100:.0f}", 0, network)


def loop(run: SelfAdaptation, crops: Crops) -> Iterator[tuple[Mapping[str, Any], Candidate | None]]:
    """The method: figures of each step, and the exported network where a look is due."""
    for info in run.iterate(crops.batches(run.iteration, run.config.iterations)):
        due = run.look_due
        yield info, Candidate("loop", run.iteration, run.exported) if due else None
