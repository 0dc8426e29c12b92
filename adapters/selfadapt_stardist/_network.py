"""StarDist's 2-D network in PyTorch, equal to the official Keras graph."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from itertools import count, pairwise
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional

from selfadapt import ModelError

ACTIVATIONS: dict[str, type[nn.Module]] = {
    "relu": nn.ReLU,
    "elu": nn.ELU,
    "selu": nn.SELU,
    "tanh": nn.Tanh,
    "sigmoid": nn.Sigmoid,
    "softplus": nn.Softplus,
    "linear": nn.Identity,
    "gelu": nn.GELU,
    "silu": nn.SiLU,
    "swish": nn.SiLU,
    "softsign": nn.Softsign,
}
"""Keras activations by name."""

Pair = tuple[int, int]


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """What StarDist's `Config2D` says about the network: same names, same defaults.

    >>> Architecture(grid=(2, 2)).divisor
    (16, 16)

    Raises:
        ModelError: a value is not that of a 2-D StarDist network.
    """

    n_rays: int = 32
    n_channel_in: int = 1
    grid: Pair = (1, 1)
    n_classes: int | None = None
    unet_n_depth: int = 3
    unet_kernel_size: Pair = (3, 3)
    unet_n_filter_base: int = 32
    unet_n_conv_per_depth: int = 2
    unet_pool: Pair = (2, 2)
    unet_activation: str = "relu"
    unet_last_activation: str = "relu"
    unet_batch_norm: bool = False
    unet_dropout: float = 0.0
    unet_expansion: float = 2
    unet_prefix: str = ""
    net_conv_after_unet: int = 128

    def __post_init__(self) -> None:
        for names, allowed, rule in _RULES:
            for name in names:
                if not allowed(value := getattr(self, name)):
                    raise ModelError(f"{name}={value!r} is not allowed: it must be {rule}.")
        for name in _PAIRS:
            object.__setattr__(self, name, tuple(getattr(self, name)))  # JSON has lists

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        """The architecture in a StarDist `config.json`, whose settings of training are left out."""
        known = {field.name for field in fields(cls)}
        return cls(**{name: value for name, value in config.items() if name in known})

    def to_config(self) -> dict[str, Any]:
        """What StarDist needs in a `config.json` to build this network."""
        return {"axes": "YXC", "backbone": "unet", **asdict(self)}

    @property
    def divisor(self) -> Pair:
        """Height and width of an input are multiples of these."""
        rows, columns = (
            pool**self.unet_n_depth * grid
            for pool, grid in zip(self.unet_pool, self.grid, strict=True)
        )
        return rows, columns

    @property
    def stem_pools(self) -> list[Pair]:
        """The pooling after each block before the U-Net; together they make the grid."""
        pools: list[Pair] = []
        rows, columns = self.grid
        while (rows, columns) != (1, 1):
            pools.append((min(rows, 2), min(columns, 2)))
            rows, columns = rows // pools[-1][0], columns // pools[-1][1]
        return pools

    def filters(self, level: int) -> int:
        """Feature maps at a level of the U-Net."""
        return int(self.unet_n_filter_base * self.unet_expansion ** max(level, 0))


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _is_pair(value: Any) -> bool:
    return isinstance(value, list | tuple) and len(value) == 2 and all(map(_is_count, value))


_PAIRS = ("grid", "unet_kernel_size", "unet_pool")
_RULES: list[tuple[Sequence[str], Callable[[Any], bool], str]] = [
    (
        ("n_channel_in", "unet_n_depth", "unet_n_filter_base", "unet_n_conv_per_depth"),
        _is_count,
        "a whole number above 0",
    ),
    (("n_rays",), lambda v: _is_count(v) and v > 2, "a whole number above 2"),
    (("n_classes",), lambda v: v is None or _is_count(v), "a whole number above 0, or null"),
    (("net_conv_after_unet",), lambda v: _is_count(v + 1 if v == 0 else v), "a whole number"),
    (_PAIRS, _is_pair, "two whole numbers above 0"),
    (("grid",), lambda v: not any(g & (g - 1) for g in v), "two powers of two"),
    (("n_rays", "n_channel_in", "n_classes"), lambda v: v is None or v <= 1024, "at most 1024"),
    (("unet_n_depth", "unet_n_conv_per_depth"), lambda v: v <= 12, "at most 12"),
    (("unet_n_filter_base", "net_conv_after_unet"), lambda v: v <= 4096, "at most 4096"),
    (_PAIRS, lambda v: max(v) <= 64, "at most 64"),
    (("unet_expansion",), lambda v: not isinstance(v, int | float) or v <= 4, "at most 4"),
    (
        ("unet_dropout",),
        lambda v: isinstance(v, int | float) and 0 <= v < 1,
        "a number from 0 to below 1",
    ),
    (("unet_expansion",), lambda v: isinstance(v, int | float) and v > 0, "a number above 0"),
    (("unet_batch_norm",), lambda v: isinstance(v, bool), "true or false"),
    (("unet_prefix",), lambda v: isinstance(v, str), "a text"),
    (
        ("unet_activation", "unet_last_activation"),
        lambda v: isinstance(v, str) and v in ACTIVATIONS,
        f"one of {', '.join(ACTIVATIONS)}",
    ),
]


class StarDist2D(nn.Module):
    """The network of `stardist.models.StarDist2D`.

    Images `[B, channels, H, W]`, H and W multiples of `architecture.divisor`, become a logit of
    the object probability, distances in pixels and, if there are classes, their logits, each
    `[B, _, H / grid, W / grid]`.

    >>> network = StarDist2D(Architecture(n_rays=8, grid=(2, 2), unet_n_filter_base=4))
    >>> prob, dist = network(torch.zeros(1, 1, 32, 48))
    >>> prob.shape, dist.shape
    (torch.Size([1, 1, 16, 24]), torch.Size([1, 8, 16, 24]))
    """

    def __init__(self, architecture: Architecture) -> None:
        super().__init__()
        self.architecture = a = architecture
        convs, width = a.unet_n_conv_per_depth, a.n_channel_in

        stem: list[nn.Module] = []
        for pool in a.stem_pools:
            for _ in range(convs):
                stem.append(_conv(width, a.unet_n_filter_base, a.unet_kernel_size))
                stem.append(ACTIVATIONS[a.unet_activation]())
                width = a.unet_n_filter_base
            stem.append(nn.MaxPool2d(pool))
        self.stem = nn.Sequential(*stem)

        self.down = nn.ModuleList()
        for level in range(a.unet_n_depth):
            self.down.append(_level(a, [width, *[a.filters(level)] * convs]))
            width = a.filters(level)
        depth = a.unet_n_depth
        inner = [a.filters(depth)] * (convs - 1)
        self.middle = _level(a, [width, *inner, a.filters(depth - 1)])
        self.up = nn.ModuleList()
        for level in reversed(range(depth)):
            inner = [a.filters(level)] * (convs - 1)
            last = a.unet_activation if level else a.unet_last_activation
            joined = 2 * a.filters(level)  # what comes up, and the skip connection
            self.up.append(_level(a, [joined, *inner, a.filters(level - 1)], last))

        unet_width = a.filters(-1)
        width = a.net_conv_after_unet or unet_width
        self.features = _features(a, unet_width)
        self.prob = _conv(width, 1, (1, 1))
        self.dist = _conv(width, a.n_rays, (1, 1))
        if a.n_classes is not None:
            self.features_class = _features(a, unet_width)
            self.prob_class = _conv(width, a.n_classes + 1, (1, 1))

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        pool = self.architecture.unet_pool
        x = self.stem(images)
        skips = []
        for level in self.down:
            x = level(x)
            skips.append(x)
            x = functional.max_pool2d(x, pool)
        x = self.middle(x)
        for level in self.up:
            x = functional.interpolate(x, scale_factor=pool, mode="nearest")
            x = level(torch.cat([x, skips.pop()], 1))
        features = self.features(x)
        outputs = self.prob(features), self.dist(features)
        if self.architecture.n_classes is None:
            return outputs
        return *outputs, self.prob_class(self.features_class(x))

    def keras_layers(self) -> Iterator[tuple[str, nn.Module]]:
        """Every layer that has weights, by its Keras name, in the order of the Keras model."""
        a = self.architecture
        convs, normalised = a.unet_n_conv_per_depth, count()
        stem = [layer for layer in self.stem if isinstance(layer, nn.Conv2d)]
        for number, layer in enumerate(stem):
            yield _numbered("conv2d", number), layer
        numbers = [*range(convs - 1), convs]  # of a level whose last layer has another width
        levels: list[tuple[str, Iterable[int], Any]] = [
            *(
                (f"down_level_{n}_no_{{}}", range(convs), level)
                for n, level in enumerate(self.down)
            ),
            ("middle_{}", numbers, self.middle),
            *(
                (f"up_level_{n}_no_{{}}", numbers, level)
                for n, level in zip(reversed(range(a.unet_n_depth)), self.up, strict=True)
            ),
        ]
        for name, numbered, level in levels:
            for number, block in zip(numbered, level, strict=True):
                yield a.unet_prefix + name.format(number), block[0]
                if a.unet_batch_norm:
                    yield _numbered("batch_normalization", next(normalised)), block[1]
        heads = ["", *["_class"] * (a.n_classes is not None)]
        if a.net_conv_after_unet:
            for head in heads:
                yield f"features{head}", self.get_submodule(f"features{head}.0")
        for name in ["prob", "dist", *["prob_class"] * (a.n_classes is not None)]:
            yield name, self.get_submodule(name)


def _numbered(kind: str, number: int) -> str:
    """As Keras names layers that were given no name."""
    return f"{kind}_{number}" if number else kind


def _conv(channels: int, filters: int, kernel: Pair) -> nn.Conv2d:
    return nn.Conv2d(channels, filters, kernel, padding="same")


def _level(a: Architecture, widths: list[int], last: str | None = None) -> nn.Sequential:
    """One block for each step between two widths."""
    blocks = []
    for number, (channels, filters) in enumerate(pairwise(widths), 2):
        activation = last if last and number == len(widths) else a.unet_activation
        layers: list[nn.Module] = [_conv(channels, filters, a.unet_kernel_size)]
        if a.unet_batch_norm:
            layers.append(nn.BatchNorm2d(filters, eps=1e-3, momentum=0.01))  # Keras's values
        layers.append(ACTIVATIONS[activation]())
        if a.unet_dropout:
            layers.append(nn.Dropout(a.unet_dropout))
        blocks.append(nn.Sequential(*layers))
    return nn.Sequential(*blocks)


def _features(a: Architecture, width: int) -> nn.Sequential:
    """The convolution between the U-Net and a head, if there is one."""
    if not a.net_conv_after_unet:
        return nn.Sequential()
    conv = _conv(width, a.net_conv_after_unet, a.unet_kernel_size)
    return nn.Sequential(conv, ACTIVATIONS[a.unet_activation]())
