"""Which network meets which images: the pairs of `evidence.py`.

A target's images are split into those that are adapted to, without labels, and those that are
scored. No network has seen any of its target's scored images, nor, but for the pairs without a
shift, anything of its target. Scored images are cut to at most 320 x 320 pixels, to save time.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy.ndimage import gaussian_filter
from sources import DOMAINS, load

from selfadapt import Adapter, Binary, LazyImage, OutputSpec, open_images
from selfadapt_smp import Decode, SmpAdapter

DIAMETER = 21
"""Images are rescaled until the median object is that large, for families that rescale."""
ADAPTED_TO, SCORED, SIDE = 48, 16, 320
PHOTONS = 20
"""Mean number of photons in the brightest pixel of an image of the domain "photons"."""
BLUR = 3.0
"""Standard deviation, in pixels, of the blur of the domain "defocus"."""


@dataclass(frozen=True)
class Pair:
    """A family's network and a target; `shift` is none, slight or strong.

    `tuned`: on which domain's training images the network was fine-tuned, with labels, if any.
    """

    family: str
    target: str
    shift: str
    tuned: str = ""

    @property
    def name(self) -> str:
        source = f"{self.family} ({self.tuned})" if self.tuned else self.family
        return f"{source} to {self.target}"

    @property
    def network(self) -> str:
        """Name of the file or folder of its weights."""
        return f"{self.family}-{self.tuned}" if self.tuned else self.family


@dataclass(frozen=True)
class Task:
    """A pair with everything loaded."""

    adapter: Adapter
    images: Sequence[LazyImage]
    held_out: Sequence[LazyImage]
    test: Sequence[tuple[Any, Any]]


PAIRS = [
    *(
        Pair(family, target, shift)
        for target, shift in (
            ("fluo520", "none"),
            ("fluo256", "slight"),
            ("photons", "strong"),
            ("he", "strong"),
        )
        for family in ("smp", "stardist", "cellpose")
    ),
    Pair("broad", "fluo256", "slight"),
    Pair("broad", "photons", "strong"),
    Pair("broad", "he", "strong"),
    Pair("cpnet", "fluo256", "slight"),
    Pair("cpnet", "he", "strong"),
    Pair("stardist", "usiigaci_phase", "strong"),
    Pair("stardist", "fluo256", "none", tuned="fluo256"),
    Pair("stardist", "he", "none", tuned="he"),
    Pair("cellpose", "he", "none", tuned="he"),
    # From here on: added when all but the exported network and the agreement's IoU and threshold
    # had been chosen.
    *(Pair(family, "defocus", "strong") for family in ("smp", "stardist", "cellpose")),
    Pair("broad", "fluo360", "slight"),
    Pair("stardist", "fluo520", "slight", tuned="fluo256"),
    Pair("stardist", "he", "strong", tuned="fluo256"),
    Pair("stardist", "fluo520", "strong", tuned="he"),
    Pair("stardist", "fluo256", "strong", tuned="he"),
    Pair("cellpose", "fluo520", "strong", tuned="he"),
    Pair("cellpose", "fluo256", "strong", tuned="he"),
]


def smp(target: str, _: Path, __: Path) -> Adapter:
    """The bundled U-Net, trained on fluo360 and fluo520."""
    return SmpAdapter.from_pretrained("demo", **_colour(target))


def stardist(target: str, network: Path, _: Path) -> Adapter:
    """Trained by `sources.py` on fluo360 and fluo520."""
    from selfadapt_stardist import StardistAdapter

    scale = DIAMETER / DOMAINS[taken_from(target)].diameter
    return StardistAdapter(network, scale=scale, **_colour(target))


def cellpose(target: str, network: Path, _: Path) -> Adapter:
    """Trained by `sources.py` on fluo360 and fluo520."""
    return _cellpose(target, network)


def cpnet(target: str, _: Path, shared: Path) -> Adapter:
    """Trained by others on fluo360 and fluo520, to the end."""
    return _cellpose(target, shared / "models/cpnet_nuclei_small/weights.pt")


def _cellpose(target: str, network: Path) -> Adapter:
    from selfadapt_cellpose import CellposeAdapter

    colour: dict[str, Any] = {"channels": (0, 0), "invert": True} if target == "he" else {}
    diameter = DOMAINS[taken_from(target)].diameter
    return CellposeAdapter(network, diameter=diameter, resample=False, **colour)


def broad(target: str, _: Path, shared: Path) -> Adapter:
    """A third party's U-Net of one foreground channel, of which only TorchScript is public."""
    import torch

    folder = shared / "models/unet2d_nuclei_broad"
    network = torch.jit.load(str(folder / "weights_abe6.pt"), map_location="cpu")
    adapter = SmpAdapter(
        network,
        OutputSpec(foreground=Binary(logits=False)),
        normalize="standard",
        size_multiple=8,
        channels=1,
        decode=Decode(),
        **_colour(target),
    )
    adapter.channels_last = True
    return adapter


FAMILIES: dict[str, Callable[[str, Path, Path], Adapter]] = {
    "smp": smp, "stardist": stardist, "cellpose": cellpose, "cpnet": cpnet, "broad": broad,
}  # fmt: skip


def _colour(target: str) -> dict[str, Any]:
    """Stained tissue as gray, its nuclei bright."""
    return {"gray": True, "invert": True} if target == "he" else {}


def task(pair: Pair, networks: Path, shared: Path) -> Task:
    """Load a pair: adapter, images to adapt to, held-out ones for the looks, scored ones."""
    domain = load(shared, taken_from(pair.target))
    train, test = [list(part) for part in (domain.train, domain.test)]
    if pair.family == "smp" and domain.name == "fluo520":
        everything = domain.in_order  # of these, the first 75 have trained the bundled network
        train, test = everything[:75], everything[75:]
    rng = np.random.default_rng(0)
    if degrade := SIMULATED.get(pair.target):
        train = [(degrade(image, rng), labels) for image, labels in train]
        test = [(degrade(image, rng), labels) for image, labels in test]
    train = [train[i] for i in rng.permutation(len(train))[:ADAPTED_TO]]
    sources = open_images([image for image, _ in train], channel_axis=0)
    kept_back = max(2, len(sources) // 4)
    return Task(
        FAMILIES[pair.family](pair.target, networks / pair.network, shared),
        sources[kept_back:],
        sources[:kept_back],
        [middle(image, labels) for image, labels in test[:SCORED]],
    )


def few_photons(image: Any, rng: np.random.Generator) -> Any:
    """The image as it would be in so little light that photons can be counted."""
    low, high = np.percentile(image, (1, 99.9))
    mean = np.clip((image - low) / (high - low), 0, None) * PHOTONS + 2
    return rng.poisson(mean).astype(np.float32)


def defocused(image: Any, _: np.random.Generator) -> Any:
    """The image as it would be out of focus."""
    return gaussian_filter(image.astype(np.float32), (0, BLUR, BLUR))


SIMULATED: dict[str, Callable[[Any, np.random.Generator], Any]] = {
    "photons": few_photons, "defocus": defocused,
}  # fmt: skip
"""Domains made of fluo520."""
OTHER_NAMES = dict.fromkeys(SIMULATED, "fluo520") | {"usiigaci_phase": "usiigaci"}


def taken_from(target: str) -> str:
    """The domain of the files of a target."""
    return OTHER_NAMES.get(target, target)


def middle(image: Any, labels: Any) -> tuple[Any, Any]:
    """At most SIDE x SIDE pixels from the middle of image `[C, H, W]` and labels `[H, W]`."""
    top, left = (max(n - SIDE, 0) // 2 for n in labels.shape)
    window = np.s_[..., top : top + SIDE, left : left + SIDE]
    return image[window], np.ascontiguousarray(labels[window])
