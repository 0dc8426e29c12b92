"""Adapt a network of InstanSeg, in PyTorch, with its own head, loss and instances.

    pip install instanseg-torch seaborn edt
    python examples/instanseg_unet.py

Network, loss and postprocessing are InstanSeg's own. Its published weights are a download and were
not run: the network is a small one, trained for a minute on half of a real image of the package
stardist. The other half, with another contrast, blurred and noisy, plays the new microscope.
"""

import copy
import os
import warnings

import numpy as np
import torch
from scipy import ndimage
from stardist.data import test_image_nuclei_2d

from selfadapt import Adapter, Config, Input, OutputSpec, Scalar, Vector, adapt, match

with warnings.catch_warnings():
    warnings.simplefilter("ignore", FutureWarning)  # it uses torch.jit.script
    from instanseg.utils.loss.instanseg_loss import InstanSeg
    from instanseg.utils.models.InstanSeg_UNet import InstanSeg_UNet

SIGMAS = 2


class Offsets(Vector):
    """Where a pixel's object is: (dx, dy) in quarters of a pixel, squashed to -4 to 4."""

    def act(self, g, field):
        return super().act(g, field.flip(-3)).flip(-3)  # x comes before y

    def readings(self):  # for check_adapter
        return {"y comes before x": Vector()}

    def values(self, raw):
        return 8 * (raw.sigmoid() - 0.5)

    def raw(self, values):
        return (values / 8 + 0.5).logit(1e-6)

    def loss(self, raw, label):
        return super().loss(self.values(raw), label)


class InstanSegAdapter(Adapter):
    channels = 1
    size_multiple = 4  # the encoder halves twice; published networks: 8
    input = Input(low=0.1, high=99.9)
    outputs = OutputSpec(offset=Offsets(), sigma=Scalar(SIGMAS), seed=Scalar())

    def __init__(self, model):
        self.model = model
        # `decode` uses it, and knows the model of the adapter only
        model.pixel_classifier.requires_grad_(False)

    def forward(self, model, images):
        return self.outputs.split(model(images))

    def embedding_module(self, model):
        return model.encoder[-1]

    def decode(self, outputs, size):
        maps = torch.cat([outputs[name] for name in self.outputs])
        own = method()
        own.pixel_classifier = copy.deepcopy(self.model.pixel_classifier).cpu()
        with torch.no_grad():
            labels = own.postprocessing(maps, window_size=64)
        return labels[0].numpy().astype(np.int32)


def method():
    """InstanSeg's loss and postprocessing."""
    return InstanSeg(n_sigma=SIGMAS, device="cpu", seed_loss_fn="l1_distance", window_size=64)


def network():
    model = InstanSeg_UNet(in_channels=1, out_channels=[[2, SIGMAS, 1]], layers=[64, 32, 16])
    return method().initialize_pixel_classifier(model)


def nuclei():
    """Image and labels of one microscope, and of one with another contrast, blur and noise."""
    image, labels = test_image_nuclei_2d(return_mask=True)
    image, labels = (image / image.max()).astype(np.float32), labels.astype(np.int32)
    rng = np.random.default_rng(0)
    new = ndimage.gaussian_filter(image[:, 256:], 1) ** 0.7 + rng.normal(0, 0.05, (512, 256))
    return image[:, :256], labels[:, :256], new.astype(np.float32), labels[:, 256:]


def train(adapter, image, labels, steps):
    """On random crops, flipped and turned, by InstanSeg's loss; its classifier learns, too."""
    torch.manual_seed(0)
    prepared = torch.from_numpy(adapter.prepare(image[None]))
    everything = torch.cat([prepared, torch.from_numpy(labels)[None].float()])
    loss_of = method()
    model = loss_of.initialize_pixel_classifier(adapter.model).requires_grad_(True)
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3)
    model.train()
    for step in range(steps):
        # as InstanSeg itself: first only where objects are, then how deep inside of them
        loss_of.update_seed_loss("binary_xloss" if step < steps // 3 else "l1_distance")
        batch = []
        for _ in range(4):
            y, x = (int(torch.randint(n - 95, ())) for n in everything.shape[1:])
            crop = everything[:, y : y + 96, x : x + 96].rot90(int(torch.randint(4, ())), (1, 2))
            batch.append(crop.flip(1) if torch.rand(()) < 0.5 else crop)
        batch = torch.stack(batch)
        loss = loss_of(model(batch[:, :1]), batch[:, 1:]).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval().pixel_classifier.requires_grad_(False)


if __name__ == "__main__":
    iterations = int(os.environ.get("ITERATIONS", "100"))
    old, labels, new, truth = nuclei()
    adapter = InstanSegAdapter(network())
    train(adapter, old, labels, steps=3 * iterations)
    looks = min(iterations, 12)  # few where it runs for a moment only
    config = Config(iterations=iterations, crop=96, candidates="default", validation_images=looks)
    # the scale is known: no calibration
    result = adapt(adapter, new, config=config, calibrate=False)
    print(result.reason)
    result.adapter.save("adapted.pt")
    for when, one in (("before", adapter), ("after", result.adapter)):
        found = one.segment(new)
        print(f"{when}: AP at IoU 0.5 {match(truth, found)[0].ap:.2f}, {found.max()} nuclei")
