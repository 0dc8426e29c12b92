"""The learning rate of AdamW over a run: warm-up, then cosine (section 3.1)."""

import math
from collections.abc import Iterator, Sequence

from selfadapt._config import Config


def learning_rate(iteration: int, config: Config) -> float:
    """Linear warm-up over the first share of iterations, then a cosine down to zero."""
    warmup = config.warmup * config.iterations
    if iteration < warmup:
        return config.learning_rate * (iteration + 1) / math.ceil(warmup)
    progress = (iteration - warmup) / max(config.iterations - warmup, 1)
    return config.learning_rate * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))


def rungs(config: Config, count: int) -> list[int]:
    """Iterations after which half of the loops that are left end, and the last one.

    They are validation points.

    >>> rungs(Config(iterations=200, validate_every=50), 4)
    [50, 100, 200]
    """
    if not count:
        return []
    halvings = math.ceil(math.log2(count))
    ends = [config.iterations / 2**k for k in range(halvings, 0, -1)]
    looks = [math.ceil(end / config.validate_every) * config.validate_every for end in ends]
    return sorted({min(end, config.iterations) for end in (*looks, config.iterations)})


def halved(count: int) -> Iterator[int]:
    """How many are left at each rung."""
    while count:
        yield count
        count = -(-count // 2)


def spare(looked: Sequence[int], needed: set[int], most: int) -> list[int]:
    """Iterations whose weights can go so that about `most` remain, evenly spread.

    It depends on the iterations alone, so that a resumed run keeps the same.

    >>> spare([10, 20, 30, 40, 50], {0, 40, 50}, 3)
    [10, 30]
    """
    step = 1
    while len(looked) // step > most:
        step *= 2
    return [it for k, it in enumerate(looked, 1) if k % step and it not in needed]
