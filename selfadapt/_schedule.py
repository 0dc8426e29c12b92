"""The learning rate of AdamW over a run: warm-up, then cosine (section 3.1)."""

import math

from selfadapt._config import Config


def learning_rate(iteration: int, config: Config) -> float:
    """Linear warm-up over the first share of iterations, then a cosine down to zero."""
    warmup = config.warmup * config.iterations
    if iteration < warmup:
        return config.learning_rate * (iteration + 1) / math.ceil(warmup)
    progress = (iteration - warmup) / max(config.iterations - warmup, 1)
    return config.learning_rate * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))
