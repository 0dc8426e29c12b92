"""A small real network, its adapter, and images for the tests."""

import copy
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import ndimage
from torch import nn

from selfadapt import Adapter, Binary, Config, OutputSpec, Vector, adapt

SHARED = Path(os.environ.get("SELFADAPT_DATA", Path(__file__).parents[2] / "shared"))
needs_shared = pytest.mark.skipif(
    not (SHARED / "data").is_dir(),
    reason="needs the data folder that SELFADAPT_DATA names (CONTRIBUTING.md)",
)


class SmallNet(nn.Module):
    """Three 3x3 convolutions with batch norm and dropout, one of them the bottleneck."""

    def __init__(self, channels: int = 3, inputs: int = 1) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(inputs, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.bottleneck = nn.Sequential(
            nn.Conv2d(8, 16, 3, 2, padding=1), nn.ReLU(), nn.Dropout2d(0.1)
        )
        self.up = nn.Sequential(nn.Upsample(scale_factor=2), nn.Conv2d(16, channels, 3, padding=1))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.up(self.bottleneck(self.stem(images)))


class SmallAdapter(Adapter):
    """Vector and foreground; instances are connected components of the foreground."""

    channels = 1
    size_multiple = 2
    adjustable = frozenset({"tta"})  # nothing to calibrate, which takes its time

    def __init__(self, seed: int = 0) -> None:
        torch.manual_seed(seed)
        self.model = SmallNet()
        self.outputs = OutputSpec(flow=Vector(), cellprob=Binary())

    def forward(self, model, images):
        return self.outputs.split(model(images))

    def embedding_module(self, model):
        return model.bottleneck

    def decode(self, outputs, size):
        return ndimage.label(outputs["cellprob"][0].numpy() > 0)[0].astype(np.int32)


def trained_adapter() -> SmallAdapter:
    """Trained for a moment on discs, so that there are instances to lose."""
    adapter = SmallAdapter()
    optimizer = torch.optim.Adam(adapter.model.parameters(), 1e-2)
    for step in range(60):
        image, labels = discs(step)
        target = torch.from_numpy(labels > 0).float()[None, None]
        out = adapter.model(torch.from_numpy(adapter.prepare(image[None]))[None])
        loss = nn.functional.binary_cross_entropy_with_logits(out[:, 2:], target)
        optimizer.zero_grad()
        (loss + 0.1 * out[:, :2].square().mean()).backward()
        optimizer.step()
    adapter.model.eval()
    return adapter


def discs(seed: int, size: tuple[int, int] = (64, 80)) -> tuple[np.ndarray, np.ndarray]:
    """Bright blurred discs on noise: image float32 and labels int32."""
    rng = np.random.default_rng(seed)
    labels = np.zeros(size, np.int32)
    rows, columns = np.mgrid[: size[0], : size[1]]
    for number in range(1, 9):
        y, x, r = rng.integers(0, size[0]), rng.integers(0, size[1]), rng.integers(4, 8)
        labels[(rows - y) ** 2 + (columns - x) ** 2 < r * r] = number
    image = ndimage.gaussian_filter((labels > 0).astype(np.float32), 1) * 100
    return (image + rng.normal(0, 5, size)).astype(np.float32), labels


IMAGES = [discs(100 + k)[0] for k in range(6)]


def config(**changes) -> Config:
    """Settings of a run of seconds."""
    small = {
        "iterations": 8, "batch_size": 2, "crop": 32, "views": 8, "validate_every": 4,
        "learning_rate": 1e-3, "device": "cpu", "validation_images": 2,
        "candidates": "default",
    }  # fmt: skip
    return Config(**(small | changes))


def equal_states(first, second):
    return all(torch.equal(t, second[name]) for name, t in first.items())


def run_adapt(adapter, tmp_path, **changes):
    options = {"config": config(), "output_dir": tmp_path, "progress": False, "stop": None}
    return adapt(adapter, IMAGES, **(options | changes))


def run_that_improves(adapter, folder):
    """A run of seconds with seven held-out windows, which keeps statistics of the images."""
    shifted = adapter.with_model(copy.deepcopy(adapter.model))
    shifted.model.stem[1].running_var *= 1e3  # statistics of quite other images
    images = [  # of the first one, which finds nothing, another is kept where it finds many
        np.concatenate([discs(100 * half + k, (96, 120))[0] for half in (2, 3)]) for k in range(12)
    ]
    settings = config(iterations=1, learning_rate=1e-6, validation_images=8, validation_share=0.6)
    return adapt(shifted, images, config=settings, output_dir=folder, progress=False)
