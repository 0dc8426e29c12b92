"""Adapt a network with the heads of Mesmer: cells and nuclei from a nuclear and a membrane image.

    python examples/mesmer_like.py

Head layout, targets, normalisation and watershed are those of Mesmer: for cells and for nuclei an
inner distance and three classes per pixel. Normalisation and watershed give what deepcell-toolbox
gives, the watershed to the pixel (`tests/mesmer_references/`). Mesmer itself is a TensorFlow model
and was not run: the network is a small U-Net of segmentation_models_pytorch here, trained for a
minute. The nuclei are real (an image of the package stardist); the cells around them, and their
membranes, are drawn.
"""

import os

import numpy as np
import segmentation_models_pytorch as smp
import torch
from scipy import ndimage
from skimage.exposure import equalize_adapthist, rescale_intensity
from skimage.measure import label, regionprops
from skimage.morphology import disk, h_maxima, remove_small_holes, remove_small_objects
from skimage.segmentation import expand_labels, find_boundaries, relabel_sequential, watershed
from stardist.data import test_image_nuclei_2d
from torch import nn
from torch.nn import functional

from selfadapt import Adapter, Categorical, Config, OutputSpec, Scalar, adapt, match

INTERIOR = 1
"""The classes are edge, interior and background."""
PROMINENCE = {"cell": 0.075, "nucleus": 0.1}
"""By which the inner distance at a seed is above what is around it."""


class MesmerLikeAdapter(Adapter):
    channels = 2  # nucleus, membrane
    size_multiple = 8  # the encoder halves three times
    outputs = OutputSpec(
        cell_distance=Scalar(),
        cell_classes=Categorical(3, logits=False),
        nucleus_distance=Scalar(),
        nucleus_classes=Categorical(3, logits=False),
    )

    def __init__(self, model, compartment="cell"):
        self.model = model
        self.compartment = compartment

    def forward(self, model, images):
        return dict(zip(self.outputs, model(images), strict=True))

    def embedding_module(self, model):
        return model.unet.encoder

    def normalise(self, image, whole):
        """Cut at the 99.9th percentile of what is not 0, then local contrast, by channel."""
        channels = []
        for channel, all_of_it in zip(image, whole, strict=True):
            if all_of_it.min() == all_of_it.max():  # no membrane image, for instance
                channels.append(np.zeros(channel.shape, np.float32))
                continue
            low, high = all_of_it.min(), np.percentile(all_of_it[all_of_it != 0], 99.9)
            unit = rescale_intensity(channel, (float(low), float(high)), (0.0, 1.0))
            channels.append(equalize_adapthist(unit, kernel_size=128))
        return np.stack(channels).astype(np.float32)

    def decode(self, outputs, size):
        """Mesmer's watershed, as it sets it for cells and for nuclei."""
        distance = outputs[f"{self.compartment}_distance"][0].numpy()
        interior = outputs[f"{self.compartment}_classes"][INTERIOR].numpy()
        interior = ndimage.gaussian_filter(interior, 2)
        seeds = label(h_maxima(distance, PROMINENCE[self.compartment], disk(2)))
        found = watershed(-interior, seeds, mask=interior > 0.2)
        found = remove_small_objects(found, max_size=14)
        for cell in regionprops(found):
            if cell.euler_number < 1:
                box = found[cell.slice]
                box[remove_small_holes(box == cell.label, max_size=14)] = cell.label
        return relabel_sequential(found)[0].astype(np.int32)


class MesmerLike(nn.Module):
    """Four maps: inner distance and probabilities of the classes, of cells, then of nuclei."""

    def __init__(self):
        super().__init__()
        self.unet = smp.Unet(
            "resnet18", encoder_depth=3, encoder_weights=None, decoder_channels=(64, 32, 16),
            in_channels=2, classes=8,
        )  # fmt: skip

    def forward(self, images):
        cell, cell_classes, nucleus, nucleus_classes = self.unet(images).split([1, 3, 1, 3], 1)
        return [cell, cell_classes.softmax(1), nucleus, nucleus_classes.softmax(1)]


def targets(labels):
    """Inner distance `[H, W]`, as deepcell encodes it, and class `[H, W]`, of one compartment."""
    labels, _, _ = relabel_sequential(labels)
    index = np.arange(1, labels.max() + 1)
    centres = np.array(ndimage.center_of_mass(labels > 0, labels, index))
    size = np.sqrt(np.bincount(labels.ravel())[1:])
    at = np.maximum(labels, 1) - 1
    rows, columns = np.indices(labels.shape)
    off = np.hypot(rows - centres[at, 0], columns - centres[at, 1]) / size[at]
    distance = np.where(labels > 0, 1 / (1 + off), 0).astype(np.float32)
    edge = find_boundaries(labels, mode="inner")
    return distance, np.where(labels == 0, 2, np.where(edge, 0, INTERIOR))


def cells():
    """Images `[2, H, W]` of one microscope and of a blurred, noisy one, with their cells."""
    image, nuclei = test_image_nuclei_2d(return_mask=True)
    nuclei = nuclei.astype(np.int32)
    grown = expand_labels(nuclei, 5)
    membrane = ndimage.gaussian_filter(find_boundaries(grown, mode="inner").astype(float), 1)
    both = np.stack([image / image.max(), membrane / membrane.max()]).astype(np.float32)
    rng = np.random.default_rng(0)
    old, new = both[:, :, :256], ndimage.gaussian_filter(both[:, :, 256:], (0, 1, 1))
    old = old + rng.normal(0, 0.02, old.shape)
    new = new**0.7 + rng.normal(0, 0.04, new.shape)
    return old, (grown[:, :256], nuclei[:, :256]), new, grown[:, 256:]


def train(adapter, image, compartments, steps):
    """On random crops, flipped and turned, with Mesmer's losses: squares and cross entropy."""
    torch.manual_seed(0)
    prepared = torch.from_numpy(adapter.prepare(image))
    maps = [torch.from_numpy(m) for labels in compartments for m in targets(labels)]
    everything = torch.cat([prepared, torch.stack(maps)]).float()
    optimizer = torch.optim.AdamW(adapter.model.parameters(), 2e-3)
    adapter.model.train()
    for _ in range(steps):
        batch = []
        for _ in range(4):
            y, x = (int(torch.randint(n - 95, ())) for n in everything.shape[1:])
            crop = everything[:, y : y + 96, x : x + 96].rot90(int(torch.randint(4, ())), (1, 2))
            batch.append(crop.flip(1) if torch.rand(()) < 0.5 else crop)
        batch = torch.stack(batch)
        outputs = adapter.model(batch[:, :2])
        loss = 0
        for k in (0, 1):
            distance, classes = outputs[2 * k : 2 * k + 2]
            loss += 10 * functional.mse_loss(distance[:, 0], batch[:, 2 + 2 * k])
            loss += functional.nll_loss(classes.clamp(min=1e-6).log(), batch[:, 3 + 2 * k].long())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    adapter.model.eval()


if __name__ == "__main__":
    iterations = int(os.environ.get("ITERATIONS", "100"))
    old, compartments, new, truth = cells()
    adapter = MesmerLikeAdapter(MesmerLike())
    train(adapter, old, compartments, steps=2 * iterations)
    looks = min(iterations, 12)  # few where it runs for a moment only
    config = Config(iterations=iterations, crop=96, candidates="default", validation_images=looks)
    # the scale is known: no calibration
    result = adapt(adapter, [new], channel_axis=0, config=config, calibrate=False)
    print(result.reason)
    result.adapter.save("adapted.pt")
    for when, one in (("before", adapter), ("after", result.adapter)):
        found = one.segment(new, channel_axis=0)
        print(f"{when}: AP at IoU 0.5 {match(truth, found)[0].ap:.2f}, {found.max()} cells")
    nuclei = MesmerLikeAdapter(result.adapter.model, "nucleus").segment(new, channel_axis=0)
    print(f"{nuclei.max()} nuclei after")
