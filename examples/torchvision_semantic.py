"""Adapt a network of torchvision that tells classes only: no instances.

    python examples/torchvision_semantic.py

The network is torchvision's LR-ASPP with MobileNet 3, not pretrained (its weights are a download),
but trained for a minute to tell background, nucleus and edge, on half of a real image of the
package stardist. The other half, with another contrast, blurred and noisy, plays the new
microscope. Without instances nothing tells whether a network got better, only how far it has
moved: see the pictures yourself before you use what comes out.
"""

import os

import numpy as np
import torch
from scipy import ndimage
from skimage.segmentation import find_boundaries
from stardist.data import test_image_nuclei_2d
from torch.nn import functional
from torchvision.models.segmentation import lraspp_mobilenet_v3_large

from selfadapt import (
    Adapter,
    Categorical,
    Config,
    EmbeddingDrift,
    OutputSpec,
    adapt,
    predict,
    prepare,
)


class SemanticAdapter(Adapter):
    channels = 1
    size_multiple = 16
    outputs = OutputSpec(classes=Categorical(3))

    def __init__(self, model):
        self.model = model

    def forward(self, model, images):
        # the same for all models of torchvision.models.segmentation
        return {"classes": model(images.expand(-1, 3, -1, -1))["out"]}

    def embedding_module(self, model):
        return model.backbone["16"]  # of a DeepLab or FCN: model.backbone.layer4, or the like

    def classes(self, image):
        """The class of each pixel of `[H, W]`."""
        outputs = predict(self, self.model, prepare(self, image[None], "the image")).outputs
        return outputs["classes"].argmax(0).numpy()


def network():
    return lraspp_mobilenet_v3_large(weights=None, weights_backbone=None, num_classes=3)


def nuclei():
    """Image and classes of one microscope, and of one with another contrast, blur and noise."""
    image, labels = test_image_nuclei_2d(return_mask=True)
    image = (image / image.max()).astype(np.float32)
    classes = np.where(labels == 0, 0, np.where(find_boundaries(labels), 2, 1))
    rng = np.random.default_rng(0)
    new = ndimage.gaussian_filter(image[:, 256:], 1) ** 0.7 + rng.normal(0, 0.05, (512, 256))
    return image[:, :256], classes[:, :256], new.astype(np.float32), classes[:, 256:]


def train(adapter, image, classes, steps):
    """On random crops, flipped and turned, by cross entropy."""
    torch.manual_seed(0)
    prepared = torch.from_numpy(adapter.prepare(image[None]))
    everything = torch.cat([prepared, torch.from_numpy(classes)[None].float()])
    optimizer = torch.optim.AdamW(adapter.model.parameters(), 2e-3)
    for layer in adapter.model.modules():
        if isinstance(layer, torch.nn.BatchNorm2d):
            layer.momentum = 0.1  # torchvision's 0.01 takes more steps than there are here
    adapter.model.train()
    for _ in range(steps):
        batch = []
        for _ in range(4):
            y, x = (int(torch.randint(n - 127, ())) for n in everything.shape[1:])
            crop = everything[:, y : y + 128, x : x + 128].rot90(int(torch.randint(4, ())), (1, 2))
            batch.append(crop.flip(1) if torch.rand(()) < 0.5 else crop)
        batch = torch.stack(batch)
        outputs = adapter.forward(adapter.model, batch[:, :1])["classes"]
        loss = functional.cross_entropy(outputs, batch[:, 1].long())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    adapter.model.eval()


def mean_iou(truth, found):
    """Over the classes."""
    pairs = [(truth == k, found == k) for k in range(3)]
    return float(np.mean([(a & b).sum() / max((a | b).sum(), 1) for a, b in pairs]))


if __name__ == "__main__":
    iterations = int(os.environ.get("ITERATIONS", "100"))
    old, classes, new, truth = nuclei()
    adapter = SemanticAdapter(network())
    train(adapter, old, classes, steps=3 * iterations)
    config = Config(iterations=iterations)
    result = adapt(adapter, new, config=config, stop=EmbeddingDrift(0.5))
    print(result.reason)
    result.adapter.save("adapted.pt")
    for when, one in (("before", adapter), ("after", result.adapter)):
        print(f"{when}: mean IoU of the classes {mean_iou(truth, one.classes(new)):.2f}")
