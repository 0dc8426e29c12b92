"""Train a small source network on some domains of the shared data, and no others.

    python benchmarks/sources.py --shared ../shared --family stardist \\
        --domains fluo360 fluo520 --out NETWORK

Two thirds of each domain's images train it; every third one is left for tests. Objects of all
domains are rescaled to a common range of sizes, colour becomes gray, and dark objects bright, so
that a network of one domain can be tried on another. `stardist`: a `StarDist2D` folder, 32 rays on
a grid of two. `cellpose`: a weights file of a narrow `CPnet` of Cellpose 3, for objects of 21
pixels. `smp`: the folder of a small U-Net with foreground and distance, as the bundled one is
(which a script of its own has trained, see its MODEL_CARD.md); one that has seen the same images:

    python benchmarks/sources.py --shared ../shared --family smp --domains fluo360 fluo520 \\
        --first 75 --steps 2500 --out NETWORK
"""

import argparse
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.ndimage import distance_transform_edt
from skimage.measure import regionprops
from skimage.transform import resize
from torch import Tensor, nn
from torch.nn import functional

from selfadapt import normalize_percentile, open_images, to_gray

CROP, BATCH, TUNING_RATE = 128, 8, 5e-4
SIZES = (11, 40)
"""Diameters that a network is to know, in pixels."""

Array = NDArray[Any]


@dataclass(frozen=True)
class Facts:
    """Where a data set is, the median diameter of its objects in pixels, and their polarity."""

    folder: str
    diameter: float
    dark: bool = False


DOMAINS = {
    "fluo256": Facts("dsb2018/fluo256", 14),
    "fluo360": Facts("dsb2018/fluo360", 47),
    "fluo520": Facts("dsb2018/fluo520", 28),
    "he": Facts("dsb2018/he", 21, dark=True),
    "usiigaci": Facts("usiigaci_phase", 47),
    "u373": Facts("phc_u373", 68),
    "yeast": Facts("yeast_phase_yeastvision", 21),
    "rbc": Facts("rbc_microfluidic", 23, dark=True),
    "membranes": Facts("membrane_cells_3dgel", 39),
    "small": Facts("fluo_small_nuclei_roganowicz", 10),
    "axons": Facts("axon_sem", 17, dark=True),
    "chloroplasts": Facts("em_chloroplasts", 31, dark=True),
}
"""Medians and polarity as the data's own description has them."""


@dataclass(frozen=True)
class Domain:
    """Images `[C, H, W]` with labels `[H, W]`, in the order of their files."""

    name: str
    in_order: Sequence[tuple[Array, Array]]

    @property
    def train(self) -> Sequence[tuple[Array, Array]]:
        """What may be trained on or adapted to."""
        return [pair for k, pair in enumerate(self.in_order) if k % 3]

    @property
    def test(self) -> Sequence[tuple[Array, Array]]:
        """Every third one, for scores."""
        return self.in_order[::3]


def load(shared: Path, name: str) -> Domain:
    """All images of a domain."""
    folder = shared / "data" / DOMAINS[name].folder
    images, masks = (open_images(folder / kind) for kind in ("images", "masks"))
    pairs = [(i.read(), m.read()[0].astype(np.int32)) for i, m in zip(images, masks, strict=True)]
    return Domain(name, pairs)


def bright(image: Array, domain: str) -> Array:
    """Luminance `[1, H, W]` in which the objects of a domain are bright."""
    gray = to_gray(image)
    return gray.max() - gray if DOMAINS[domain].dark else gray


class Family(Protocol):
    """What training has to know about a kind of network."""

    rate: float
    """Peak learning rate."""
    high: float
    """Percentile of an image that becomes 1; the first becomes 0."""

    def build(self) -> nn.Module: ...

    def targets(self, labels: Array) -> Array:
        """Ground truth `[channels, H / grid, W / grid]` of a label image."""
        ...

    def loss(self, network: nn.Module, images: Tensor, targets: Tensor) -> Tensor: ...

    def save(self, network: nn.Module, path: Path) -> None: ...

    def load(self, path: Path) -> nn.Module: ...


class StarDistFamily:
    """A StarDist network of a quarter of the official parameters."""

    rate, high = 2e-3, 99.8

    def build(self) -> nn.Module:
        from selfadapt_stardist import Architecture, StarDist2D

        return StarDist2D(Architecture(grid=(2, 2), unet_n_filter_base=16, net_conv_after_unet=64))

    def targets(self, labels: Array) -> Array:
        from stardist.geometry import star_dist
        from stardist.utils import edt_prob

        dist = star_dist(labels, 32, grid=(2, 2)).transpose(2, 0, 1)
        return np.concatenate([edt_prob(labels[::2, ::2])[None], dist]).astype(np.float32)

    def loss(self, network: nn.Module, images: Tensor, targets: Tensor) -> Tensor:
        """StarDist's own: cross-entropy, and the error of distances weighted by probability."""
        prob, dist = network(images)
        truth, distances = targets[:, :1], targets[:, 1:]
        off = (truth * (dist - distances).abs()).mean() / truth.mean().clamp(min=1e-6)
        background = ((1 - truth) * dist.abs()).mean()
        return (
            functional.binary_cross_entropy_with_logits(prob, truth) + 0.2 * off + 1e-4 * background
        )

    def save(self, network: nn.Module, path: Path) -> None:
        from selfadapt_stardist import StardistAdapter

        StardistAdapter(network.eval()).save(path)

    def load(self, path: Path) -> nn.Module:
        from selfadapt_stardist import StardistAdapter

        return StardistAdapter(path).model


class CellposeFamily:
    """A CPnet a fourth as wide as Cellpose's own."""

    rate, high = 2e-3, 99.8

    def build(self) -> nn.Module:
        from cellpose.resnet_torch import CPnet

        network = CPnet([2, 8, 16, 32, 64], 3, sz=3)
        network.mkldnn = False
        network.diam_mean.data.fill_(21.0)
        network.diam_labels.data.fill_(21.0)
        return network

    def targets(self, labels: Array) -> Array:
        from cellpose.dynamics import masks_to_flows

        if not labels.any():
            return np.zeros((3, *labels.shape), np.float32)
        flows = masks_to_flows(labels, device=torch.device("cpu"))
        return np.concatenate([5 * flows, labels[None] > 0]).astype(np.float32)

    def loss(self, network: nn.Module, images: Tensor, targets: Tensor) -> Tensor:
        """Cellpose's own."""
        both = torch.cat([images, torch.zeros_like(images)], 1)
        raw = network(both)[0]
        bce = functional.binary_cross_entropy_with_logits(raw[:, 2], targets[:, 2])
        return functional.mse_loss(raw[:, :2], targets[:, :2]) / 2 + bce

    def save(self, network: nn.Module, path: Path) -> None:
        torch.save(network.state_dict(), path)

    def load(self, path: Path) -> nn.Module:
        network = self.build()
        network.load_state_dict(torch.load(path))
        return network


class SmpFamily:
    """The architecture of the bundled U-Net: logit of foreground, and distance to the edge."""

    rate, high = 3e-3, 99.0

    def build(self) -> nn.Module:
        import segmentation_models_pytorch as smp

        network: nn.Module = smp.Unet(
            "tu-test_efficientnet",
            encoder_weights=None,
            in_channels=1,
            classes=2,
            decoder_channels=(96, 64, 32, 24, 16),
        )
        return network

    def targets(self, labels: Array) -> Array:
        """The distance is divided by its maximum in the instance."""
        distance = np.zeros(labels.shape, np.float32)
        for region in regionprops(labels):
            inside = distance_transform_edt(np.pad(region.image, 1))[1:-1, 1:-1]
            distance[region.slice][region.image] = (inside / inside.max())[region.image]
        return np.stack([labels > 0, distance]).astype(np.float32)

    def loss(self, network: nn.Module, images: Tensor, targets: Tensor) -> Tensor:
        foreground, distance = network(images).unbind(1)
        bce = functional.binary_cross_entropy_with_logits(foreground, targets[:, 0])
        return bce + 4 * functional.mse_loss(distance, targets[:, 1])

    def save(self, network: nn.Module, path: Path) -> None:
        from selfadapt_smp import Decode, SmpAdapter

        decode = Decode(min_distance=5, smoothing=2.0)
        SmpAdapter(network.eval(), "foreground,distance", decode=decode).save(path)

    def load(self, path: Path) -> nn.Module:
        from selfadapt_smp import SmpAdapter

        return SmpAdapter.from_pretrained(str(path)).model


FAMILIES: dict[str, Family] = {
    "stardist": StarDistFamily(), "cellpose": CellposeFamily(), "smp": SmpFamily(),
}  # fmt: skip


def crop(pair: tuple[Array, Array], diameter: float, rng: np.random.Generator) -> Any:
    """One augmented crop: image `[CROP, CROP]` and labels of the same size."""
    image, labels = pair
    scale = np.exp(rng.uniform(*np.log(SIZES))) / diameter
    side = min(round(CROP / scale), *labels.shape)
    y, x = (rng.integers(0, n - side + 1) for n in labels.shape)
    window = np.s_[y : y + side, x : x + side]
    pixels = resize(image[window], (CROP, CROP), order=1, anti_aliasing=scale < 1)
    rows = ((np.arange(CROP) + 0.5) * side / CROP).astype(int)
    both = np.stack([pixels, labels[window][np.ix_(rows, rows)]])
    both = np.rot90(both, rng.integers(4), axes=(1, 2))
    if rng.random() < 0.5:
        both = both[:, :, ::-1]
    noisy = both[0] * rng.uniform(0.8, 1.2) + rng.normal(0, 0.02, both[0].shape)
    return noisy.astype(np.float32), np.ascontiguousarray(both[1]).astype(np.int32)


def train(
    family: str,
    domains: Sequence[Domain],
    seed: int,
    *,
    steps: int,
    first: int | None = None,
    start: Path | None = None,
    device: str = "cpu",
) -> nn.Module:
    """A network of the family, trained on the training images of the domains.

    `first`: on that many images of each domain instead, from the first on. `start`: a network that
    was saved before, to be fine-tuned.
    """
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    kind = FAMILIES[family]
    pools = [
        [
            (normalize_percentile(bright(image, domain.name), 1, kind.high)[0], labels)
            for image, labels in (domain.in_order[:first] if first else domain.train)
        ]
        for domain in domains
    ]
    diameters = [DOMAINS[domain.name].diameter for domain in domains]
    network = (kind.load(start) if start else kind.build()).to(device).train()
    rate = TUNING_RATE if start else kind.rate
    optimizer = torch.optim.AdamW(network.parameters(), lr=rate, weight_decay=1e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps)
    began = time.time()
    for step in range(steps):
        crops = []
        for k in rng.integers(len(pools), size=BATCH):
            crops.append(crop(pools[k][rng.integers(len(pools[k]))], diameters[k], rng))
        images = torch.from_numpy(np.stack([image for image, _ in crops]))[:, None]
        targets = torch.from_numpy(np.stack([kind.targets(labels) for _, labels in crops]))
        loss = kind.loss(network, images.to(device), targets.to(device))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 100 == 0:
            print(f"step {step} loss {loss.item():.4f} {time.time() - began:.0f} s", flush=True)
    return network.eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shared", type=Path, required=True)
    parser.add_argument("--family", choices=FAMILIES, required=True)
    parser.add_argument("--domains", nargs="+", choices=DOMAINS, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--first", type=int, help="train on so many images of each domain instead")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(2)
    domains = [load(args.shared, name) for name in args.domains]
    network = train(args.family, domains, args.seed, steps=args.steps, first=args.first)
    FAMILIES[args.family].save(network, args.out)


if __name__ == "__main__":
    main()
