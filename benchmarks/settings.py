"""Networks, domains, and how images go in: the settings that `judge.py` is scored on.

A setting is a network, a domain, how its images go in (scale, polarity, a corruption) and a state
of the network (`states.py`). Its images are crops that are `window` pixels a side for the network:
some to look at, others to be scored.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import ndimage
from sources import load
from states import CORRUPTIONS
from torch import Tensor, nn

from selfadapt import Adapter, Binary, Categorical, LazyImage, OutputSpec, open_images, to_gray
from selfadapt._normalize import resize_image

LOOKED_AT, SCORED = 4, 8
Array = NDArray[Any]
Pairs = Sequence[tuple[Array, Array]]


@cache
def pairs(shared: Path, domain: str) -> Pairs:
    """Luminance `[1, H, W]` and labels `[H, W]`, in the order of their file names."""
    return [(to_gray(image), labels) for image, labels in load(shared, domain).in_order]


class DeepSea(Adapter):
    """The published network for phase contrast; its decision is that of its authors."""

    channels = 1
    size_multiple = 8

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.outputs = OutputSpec(mask=Categorical(2), edge=Categorical(2))

    def forward(self, model: nn.Module, images: Tensor) -> dict[str, Tensor]:
        mask, edge = model(images)
        return {"mask": mask, "edge": edge}

    def embedding_module(self, model: nn.Module) -> nn.Module:
        return model.get_submodule("res3")

    def normalise(self, image: Array, whole: Array) -> Array:
        low, high = whole.min(), whole.max()
        return ((image - low) / max(high - low, 1e-6) - 0.5) / 0.5

    def decode(self, outputs: Mapping[str, Tensor], size: tuple[int, int]) -> NDArray[np.int32]:
        found = ndimage.label(outputs["mask"].argmax(0).numpy())[0]
        sizes = np.bincount(found.ravel())
        found[sizes[found] < 15] = 0
        return found.astype(np.int32)


def deepsea(shared: Path, _: Path) -> Adapter:
    folder = shared / "models/deepsea_segmentation"
    spec = spec_from_file_location("deepsea_model", folder / "model.py")
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    network = module.DeepSeaSegmentation(1, 2)
    weights = torch.load(folder / "segmentation.pth", map_location="cpu", weights_only=True)
    network.load_state_dict(weights)
    return DeepSea(network.eval())


def smp(_: Path, __: Path) -> Adapter:
    from selfadapt_smp import SmpAdapter

    return SmpAdapter.from_pretrained("demo")


def broad(shared: Path, _: Path) -> Adapter:
    from selfadapt_smp import Decode, SmpAdapter

    folder = shared / "models/unet2d_nuclei_broad"
    adapter = SmpAdapter(
        torch.jit.load(str(folder / "weights_abe6.pt"), map_location="cpu"),
        OutputSpec(foreground=Binary(logits=False)),
        normalize="standard",
        size_multiple=8,
        channels=1,
        decode=Decode(),
    )
    adapter.channels_last = True
    return adapter


def _stardist(name: str) -> Callable[[Path, Path], Adapter]:
    def opened(_: Path, networks: Path) -> Adapter:
        from selfadapt_stardist import StardistAdapter

        return StardistAdapter(networks / name)

    return opened


def _cpnet(name: str) -> Callable[[Path, Path], Adapter]:
    def opened(shared: Path, _: Path) -> Adapter:
        from selfadapt_cellpose import CellposeAdapter

        return CellposeAdapter(shared / f"models/{name}/weights.pt", diameter=17, resample=False)

    return opened


@dataclass(frozen=True)
class Source:
    """A network, the diameter of objects that it was trained on, and its training domains."""

    open: Callable[[Path, Path], Adapter]
    diameter: float
    domains: tuple[str, ...] = ()
    window: int = 256


NETWORKS = {
    "smp": Source(smp, 21, ("fluo360", "fluo520")),
    "stardist": Source(_stardist("stardist"), 21, ("fluo360", "fluo520")),
    "cpnet": Source(_cpnet("cpnet_nuclei_small"), 17, ("fluo360", "fluo520"), 224),
    "broad": Source(broad, 21),
    "deepsea": Source(deepsea, 24, (), 160),
    "general": Source(_stardist("general"), 21, ("he", "rbc", "yeast", "axons", "fluo256")),
    "cells": Source(_stardist("cells"), 21, ("usiigaci", "u373", "membranes", "small", "fluo360")),
}


@dataclass(frozen=True)
class Entry:
    """How images go in: pixels of the image times `scale`, dark made bright, a corruption."""

    scale: float
    invert: bool
    corruption: str = ""
    level: int = 0


@dataclass(frozen=True)
class Crop:
    """A prepared crop for the network, its truth at that scale, and its place in the data."""

    image: Tensor
    truth: NDArray[np.int32]
    source: int


def crops(
    adapter: Adapter, these: Pairs, entry: Entry, count: int, seed: int, side: int
) -> list[Crop]:
    """`count` windows, evenly over the images, prepared as a whole image is."""
    rng = np.random.default_rng(seed)
    order = [k % len(these) for k in range(count)]
    prepared: dict[int, tuple[Array, Array]] = {}
    found = []
    for k in order:
        if k not in prepared:
            prepared[k] = _go_in(adapter, *these[k], entry, np.random.default_rng((seed, k)))
        image, truth = prepared[k]
        top, left = (int(rng.integers(max(n - side, 0) + 1)) for n in truth.shape)
        window = np.s_[..., top : top + side, left : left + side]
        found.append(Crop(torch.from_numpy(image[window].copy()), truth[window].copy(), k))
    return found


def _go_in(
    adapter: Adapter, image: Array, truth: Array, entry: Entry, rng: np.random.Generator
) -> tuple[Array, Array]:
    image = image.astype(np.float32)
    if entry.corruption:
        corrupt, levels = CORRUPTIONS[entry.corruption]
        image = np.asarray(corrupt(image, levels[entry.level], rng), np.float32)
    size = [max(round(n * entry.scale), 32) for n in truth.shape]
    image = resized(image, size, invert=entry.invert)
    rows, columns = (
        ((np.arange(new) + 0.5) * old / new).astype(int)
        for new, old in zip(size, truth.shape, strict=True)
    )
    return np.asarray(adapter.prepare(image), np.float32), truth[np.ix_(rows, columns)]


def resized(image: Array, size: Sequence[int], *, invert: bool) -> Array:
    """`[1, H, W]` as it goes in, at the network's scale and polarity."""
    image = image.max() - image if invert else image
    return resize_image(image, (size[0], size[1]))


def unlabelled(these: Pairs, entry: Entry) -> Sequence[LazyImage]:
    """Images to adapt to."""
    return open_images(
        [
            resized(
                image.astype(np.float32),
                [max(round(n * entry.scale), 32) for n in image.shape[1:]],
                invert=entry.invert,
            )
            for image, _ in these[:36]
        ],
        channel_axis=0,
    )
