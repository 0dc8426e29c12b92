"""Networks that may become the result: each is looked at, and one judge decides between them."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from selfadapt._batch_norm import adabn, batch_norms, mixed
from selfadapt._config import DEFAULT, LOOPS, Config
from selfadapt._crops import Crops
from selfadapt._run import SelfAdaptation

STATISTICS_BATCHES = 64
"""Batches over which batch-norm statistics of the images are measured."""
SHARES = (0.5, 1.0)
"""Shares of the images' statistics that are tried; the trained ones make up the rest."""
STATISTICS = tuple(f"statistics-{share * 100:.0f}" for share in SHARES)
GENTLE, BOLD = 0.25, 4.0
"""Factors on the learning rate."""


@dataclass(frozen=True)
class Candidate:
    """A network, what it is called, and after how many steps.

    Attributes:
        name: "initial", "statistics-50", "default", "bold", "teacher", ...
        iteration: steps of the loop; 0 before the first.
        network: the weights.
        tta: whether predictions are means over flips and turns.
    """

    name: str
    iteration: int
    network: nn.Module
    tta: bool = False

    @property
    def snapshot(self) -> int | str:
        """Name of its weights."""
        if self.name in ("initial", DEFAULT):
            return self.iteration
        return f"{self.name}-{self.iteration}" if self.name in LOOPS else self.name


def initial(run: SelfAdaptation) -> Candidate:
    """The trained network as it was given."""
    return Candidate("initial", 0, run.initial)


def statistics(run: SelfAdaptation, crops: Crops) -> Iterator[Candidate]:
    """The initial network with batch-norm statistics of the images, half and all of them."""
    if not batch_norms(run.initial):
        return
    batches = crops.batches(0, STATISTICS_BATCHES)
    measured = adabn(run.adapter.with_model(run.initial), batches)
    for name, share in zip(STATISTICS, SHARES, strict=True):
        network = measured if share == 1 else mixed(run.initial, measured, share)
        yield Candidate(name, 0, network)


def loops(config: Config, network: nn.Module) -> dict[str, Config]:
    """The settings of each way to run the method, by name.

    "default" has those that were given. "batch" trains with the statistics of each batch, "gentle"
    and "bold" with another learning rate.
    """
    ways = {
        DEFAULT: config,
        "batch": replace(config, batch_norm="batch"),
        "gentle": replace(config, learning_rate=GENTLE * config.learning_rate),
        "bold": replace(config, learning_rate=BOLD * config.learning_rate),
    }
    if config.batch_norm != "auto" or not batch_norms(network):
        del ways["batch"]
    return {name: way for name, way in ways.items() if name in config.chosen}


def loop(
    name: str, run: SelfAdaptation, crops: Crops, end: int
) -> Iterator[tuple[Mapping[str, Any], Candidate | None]]:
    """The method, up to an iteration: figures of each step, and a candidate where one is due."""
    for info in run.iterate(crops.batches(run.iteration, end)):
        yield info, Candidate(name, run.iteration, run.exported) if run.look_due else None
