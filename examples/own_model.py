"""Adapt a network that nobody bundled: a subclass of Adapter is all it takes.

    python examples/own_model.py

"Your" network is a U-Net of segmentation_models_pytorch here; any `nn.Module` will do. The image
comes from the package stardist.
"""

import os

import numpy as np
import segmentation_models_pytorch as smp
import torch
from scipy import ndimage
from stardist.data import test_image_nuclei_2d

from selfadapt import Adapter, Binary, Config, EmbeddingDrift, OutputSpec, Scalar, adapt
from selfadapt_smp import DEMO_MODEL


class MyAdapter(Adapter):
    channels = 1  # of an image
    size_multiple = 32  # the encoder halves five times
    outputs = OutputSpec(nucleus=Binary(), distance=Scalar())  # in the order of the channels

    def __init__(self, model):
        self.model = model

    def forward(self, model, images):
        return self.outputs.split(model(images))

    def embedding_module(self, model):
        return model.encoder

    def decode(self, outputs, size):  # optional
        return ndimage.label(outputs["nucleus"][0].numpy() > 0)[0].astype(np.int32)


if __name__ == "__main__":
    adapter = MyAdapter(smp.from_pretrained(DEMO_MODEL))
    image, _ = test_image_nuclei_2d(return_mask=True)
    config = Config(iterations=int(os.environ.get("ITERATIONS", "100")))
    result = adapt(adapter, image, config=config, stop=EmbeddingDrift(0.3))
    print(result.reason)
    print(
        f"{adapter.segment(image).max()} nuclei before, {result.adapter.segment(image).max()} after"
    )
    torch.save(result.adapter.model.state_dict(), "adapted.pt")
