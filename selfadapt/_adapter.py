"""What a model must tell the core about itself. Users subclass `Adapter` for their own model."""

import copy
import logging
import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, is_dataclass, replace
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from selfadapt._errors import ConfigError, ImageError, ModelError, OutputError
from selfadapt._input import Input, prepare, refuse_not_finite
from selfadapt._lazy import LazyImage
from selfadapt._network import NetworkSource, check_network, uncompiled
from selfadapt._normalize import (
    Image,
    as_channels_first,
    is_constant,
    normalize_percentile,
    resize_image,
)
from selfadapt._predict import predict
from selfadapt._spec import OutputSpec
from selfadapt._symmetry import Grid
from selfadapt._tiles import predict_tiled

logger = logging.getLogger(__name__)

CHECKED = 8
"""A usable one is looked for among that many images."""


class Adapter(ABC):
    """A trained network and how to use it. docs/own-model.md walks through a subclass.

    A subclass sets `model` and `outputs`, and overrides `forward` and `embedding_module`;
    everything else has a default.
    """

    model: nn.Module
    """The trained network. Adapting works on copies and leaves it as it is."""
    outputs: OutputSpec
    """The heads of the network."""
    input: Input = Input()
    """How images go in: scale, polarity, channels, range of the normalisation."""
    adjustable: frozenset[str] = frozenset(
        {"scale", "invert", "channels", "gray", "low", "high", "tta"}
    )
    """The fields of `input` that `with_input` may change."""
    settled: frozenset[str] = frozenset()
    """The fields of `input` that were said or found: `calibrate` leaves them as they are."""
    auto: frozenset[str] = frozenset()
    """The fields of `input` that `calibrate` must find before the adapter can be used."""
    channels: int | None = None
    """Number of channels that the network takes; None for any."""
    size_multiple: int | Grid = 1
    """Height and width that the network takes are multiples of this, or of (rows, columns)."""
    fixed_size: int | None = None
    """Set where the network takes square tiles of this side only."""
    tile: int = 512
    """Largest side of a tile where the network takes any size; smaller images go in one piece."""
    channels_last: bool = False
    """Set where the network's layers take that memory format (no `view` of a map, for instance):
    on a CPU a step is then 1.4 to 1.6 times as fast (docs/benchmarks.md)."""
    padding: Literal["symmetric", "reflect"] = "symmetric"
    """How an image is padded to a size that the network takes, in words of `numpy.pad`."""

    @property
    def multiples(self) -> Grid:
        """Height and width that go in are multiples of these, the grids of the heads included."""
        sizes, grid = self.size_multiple, self.outputs.grid
        rows, columns = (sizes, sizes) if isinstance(sizes, int) else sizes
        return math.lcm(rows, grid[0]), math.lcm(columns, grid[1])

    @property
    def side_multiple(self) -> int:
        """The sides of a square that goes in are multiples of this."""
        return math.lcm(*self.multiples)

    @abstractmethod
    def forward(self, model: nn.Module, images: Tensor) -> dict[str, Tensor]:
        """Raw outputs by head name, `[B, channels, H / grid, W / grid]`, of `[B, C, H, W]`.

        `model` is passed in because student, teacher and initial network share one adapter.
        """

    def forward_tiled(self, model: nn.Module, image: Tensor) -> dict[str, Tensor]:
        """Raw outputs of one prepared image `[C, H, W]` of any size, on `model`'s device.

        Default: `forward` on overlapping tiles, blended. Override it where the family has a tiler
        of its own. Returns float32 `[channels, ceil(H / grid), ceil(W / grid)]` on the CPU.
        """
        kind = next(model.parameters()).dtype  # half-precision networks take no others
        return predict_tiled(
            lambda tiles: self.forward(model, tiles.to(kind, copy=True)),  # some work in place
            image,
            self.outputs,
            tile=self.fixed_size or self.tile,
            multiples=self.multiples,
            fixed=self.fixed_size is not None,
            padding=self.padding,
        )

    @abstractmethod
    def embedding_module(self, model: nn.Module) -> nn.Module | None:
        """The layer of `model` whose output is the bottleneck.

        The core hooks it, averages over positions and scales to unit norm. None where no layer
        can be hooked: then only criteria that need no embedding can stop a run.
        """

    def decode(self, outputs: Mapping[str, Tensor], size: tuple[int, int]) -> NDArray[np.int32]:
        """Instances `[H, W]` of one image from its raw outputs `[channels, H / grid, W / grid]`.

        The outputs are finite: where they are not, the core finds nothing, without asking. `size`
        is height and width of the image before it was prepared. Instances may have that size or
        that of the outputs; the core brings them to `size`. Optional: without it only criteria
        that need no instances can stop a run.
        """
        raise no_decode(self)

    @property
    def can_decode(self) -> bool:
        """Whether `decode` is there."""
        return type(self).decode is not Adapter.decode

    def normalise(self, image: Image, whole: Image) -> Image:
        """Normalise one image `[C, H, W]`, or a part of one, by what `whole` tells of all of it.

        `whole` holds the channels of the whole image in any number of pixels; it is `image` itself
        where that is not a part. Default: percentiles `input.low` and `input.high` of each channel
        go to 0 and 1.
        """
        return normalize_percentile(image, self.input.low, self.input.high, whole)

    def rescale(self, image: Image, size: tuple[int, int]) -> Image:
        """Bring a normalised image `[C, H, W]` to the height and width that `input.scale` asks."""
        return resize_image(image, size)

    def prepare(self, image: Image, whole: Image | None = None) -> Image:
        """What goes into the network for one image `[C, H, W]`, float32.

        By `input`, `normalise` and `rescale`; `whole` as in `normalise`. Override it only where a
        family prepares its images in another order.
        """
        whole = image if whole is None else whole
        return self.input.apply(image, whole, self.normalise, self.rescale)

    def say(self, **fields: Any) -> None:
        """Take fields of `input` from options: a value, "auto", or None where nothing was said.

        For the `__init__` of a subclass: `self.say(scale=scale, invert=invert)`.
        """
        given = {k: v for k, v in fields.items() if v is not None and not _is_auto(v)}
        self.input = replace(self.input, **given)
        self.settled |= given.keys()
        self.auto |= {k for k, v in fields.items() if _is_auto(v)}

    @property
    def said(self) -> dict[str, Any]:
        """The settled fields of `input`, with their values."""
        return {name: getattr(self.input, name) for name in self.settled}

    def with_input(self, input: Input) -> Self:
        """This adapter with images going in in another way; what differs is settled by that.

        Raises:
            ConfigError: the family cannot vary one of the fields that differ.
        """
        wanted, ours = asdict(input), asdict(self.input)
        changed = {name for name in ours if wanted[name] != ours[name]}
        for name in changed - self.adjustable:
            raise ConfigError(
                f"{type(self).__name__} cannot take images with {name} = {wanted[name]}: it "
                f"varies {', '.join(sorted(self.adjustable)) or 'nothing'}."
            )
        adapter = copy.copy(self)
        adapter.input = input
        adapter.settled, adapter.auto = self.settled | changed, self.auto - changed
        return adapter

    def segment(self, image: Any, *, channel_axis: int | None = None) -> NDArray[np.int32]:
        """Instances of one image at its own size, `[H, W]`; the image may have any size.

        Args:
            image: numbers `[H, W]`, or three axes of which `channel_axis` holds the channels.
            channel_axis: position of the channel axis, where there is one.
        """
        check_network(getattr(self, "model", None), finite=False)
        pixels = as_channels_first(image, channel_axis)
        size = pixels.shape[1], pixels.shape[2]
        if self.can_decode and is_constant(pixels):  # a black frame: nothing to normalise or find
            refuse_not_finite(pixels, "the image")  # of others `prepare` does
            return np.zeros(size, np.int32)
        prepared = prepare(self, pixels, "the image")
        found = predict(self, self.model, prepared, size)
        if found.instances is None:
            raise no_decode(self)
        refuse_broken(found.outputs.values())
        return found.instances

    def save(self, path: str | Path) -> None:
        """Write the model as its family's tools load it. Default: a plain state dict."""
        torch.save(uncompiled(self.model).state_dict(), path)

    def source(self) -> NetworkSource | None:
        """Python that builds the network without selfadapt; None where there is none.

        `export_bioimageio` adds it, and the weights, to the TorchScript of a package.
        """
        return None

    def options(self) -> dict[str, str]:
        """The adapter's own settings, for the folder of a run: with others it is not resumed.

        Default: its attributes that are dataclasses, and public ones that are numbers, words,
        tuples or dictionaries.
        """
        kinds = (bool, int, float, str, tuple, dict, type(None))
        told = {
            name: repr(value)
            for name, value in sorted(vars(self).items())
            if is_dataclass(value) or (isinstance(value, kinds) and not name.startswith("_"))
        }
        own = {"input", "settled", "auto"}  # found, and kept by itself
        return {  # an address in memory says nothing to the next process
            name: value for name, value in told.items() if name not in own and " at 0x" not in value
        }

    def input_options(self) -> dict[str, Any]:
        """Scale and polarity in the words of the adapter's own options."""
        return {"scale": round(self.input.scale, 4), "invert": self.input.invert}

    def usage(self, path: Path) -> str | None:
        """How the family's own tools open what `save(path)` has written; the shell prints it."""
        return None

    def check(self, images: Sequence[LazyImage]) -> None:
        """Raise or warn where the network cannot be what the adapter says, judged by the images.

        `adapt` and the shell call it once, before any work. Default: a warning where a head that
        is declared to give logits gives what looks like probabilities on a window of the first
        image that can be used and has something in it, or the reverse.
        """
        for image in images[:CHECKED]:
            windows = image.windows()
            try:
                read = ((window, window.read()) for window in windows[:CHECKED])
                window, pixels = next((w, p) for w, p in read if not is_constant(p))
                prepared = prepare(self, pixels, str(image), window.whole())
            except (ImageError, StopIteration):  # named where it is used; nothing in it
                continue
            side = self.fixed_size or self.tile
            outputs = predict(self, self.model, prepared[:, :side, :side]).outputs
            for name, output in outputs.items():
                if found := self.outputs[name].objection(output):
                    logger.warning("Head %r %s", name, found)
            return

    @classmethod
    def from_pretrained(cls, model: Any, **options: Any) -> Self:
        """Open a model by its name or path, as the family's users name it. The shell needs it.

        Default: the class itself takes the name or path, and its keyword arguments are the
        options, each a flag of the shell. Where the class takes a network instead, override this
        with explicit keyword options.
        """
        adapter = cls(model, **options)  # type: ignore[call-arg]
        if not isinstance(adapter.model, nn.Module):
            raise ModelError(
                f"{cls.__name__} cannot open {model!r}: it takes a network, so override its "
                "`from_pretrained`."
            )
        return adapter

    def with_model(self, model: nn.Module) -> Self:
        """The same adapter around another network of the same architecture."""
        adapter = copy.copy(self)
        adapter.model = model
        return adapter


def _is_auto(value: Any) -> bool:
    return isinstance(value, str) and value == "auto"


def refuse_broken(outputs: Iterable[Tensor]) -> None:
    """Raise OutputError if a network has given NaN or infinity."""
    if not all(bool(output.isfinite().all()) for output in outputs):
        raise OutputError(
            "the network gives NaN or infinity for the image: its weights are damaged, or its "
            "precision does not do."
        )


def no_decode(adapter: Adapter) -> ModelError:
    """The error of everything that needs instances."""
    return ModelError(
        f"{type(adapter).__name__} cannot decode instances, which this needs: override its "
        "`decode`, or stop by EmbeddingDrift, which needs none."
    )
