"""The lines of settings in docs/stardist.md, run with the networks of the PyTorch ports themselves.

    python benchmarks/stardist_ports.py --clones DIR

DIR holds clones of the four repositories named below, each under its own name. One of them ships
weights: it segments the image of the package stardist (AP at IoU 0.5), and both ray conventions
are tried on it. The others are built with random weights, which shows that the outputs are what
`Port` says.
"""

import argparse
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from stardist.data import test_image_nuclei_2d
from torch import nn

from selfadapt import ModelError, match, open_images, predict, prepare
from selfadapt_stardist import Port, StardistAdapter


def load(clones: Path, file: str) -> Any:
    """A module of a clone, with its own folder's package where it imports relatively."""
    path = clones / file
    name = f"{path.parent.name}.{path.stem}"
    sys.path.insert(0, str(path.parent.parent))
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.__dict__.setdefault("np", np)  # one of them forgets to import it
    return module


def with_weights(clones: Path) -> nn.Module:
    network = load(clones, "stardist_pytorch/unet/unet_model.py").UNetStar(1, 32)
    file = clones / "stardist_pytorch/pretrained_weights/model_weights.t7"
    network.load_state_dict(torch.load(file, map_location="cpu"))
    return network


def resnet(clones: Path) -> nn.Module:
    networks = load(clones, "pytorch-stardist/src/models/networks.py")
    return networks.StarDistResnet(1, n_rays=32, n_downs=(2, 2), kernel_size=(3, 3))


PORTS: dict[str, tuple[Callable[[Path], nn.Module], dict[str, Any]]] = {
    "ASHISRAVINDRAN/stardist_pytorch": (
        with_weights,
        {"outputs": ("dist", "prob"), "logits": False, "embedding": "down3", "size_multiple": 8},
    ),
    "hthierno/pytorch-stardist": (
        resnet,
        {"outputs": ("dist", "prob"), "grid": (2, 2), "embedding": "resnet", "size_multiple": 2},
    ),
    "MLbyML/StarDistPyTorch, branch BaseImplementation": (
        lambda c: load(c, "StarDistPyTorch/stardistPytorch/unet/model.py").UNet(32, depth=3),
        {"outputs": ("dist", "prob"), "embedding": "down_convs.2", "size_multiple": 4},
    ),
    "TaiTranDang145/stardist-pytorch": (
        lambda c: load(c, "stardist-pytorch/models.py").StarDist2D(),
        {
            "outputs": ("prob", "dist"),
            "logits": False,
            "embedding": "bottleneck",
            "size_multiple": 8,
        },
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--clones", type=Path, required=True)
    args = parser.parse_args()
    torch.set_num_threads(2)
    image, labels = test_image_nuclei_2d(return_mask=True)
    sources = open_images(image)
    for name, (build, settings) in PORTS.items():
        network = build(args.clones).eval()
        port = Port(**settings)
        adapter = StardistAdapter(network, port)
        prediction = predict(adapter, network, prepare(adapter, image[None], name))
        shapes = {head: list(output.shape) for head, output in prediction.outputs.items()}
        assert prediction.embedding is not None
        print(f"{name}: {shapes}, embedding of {len(prediction.embedding)}")
        if build is not with_weights:
            continue
        adapter.check(sources)
        found = adapter.segment(image)
        inside = prediction.outputs["prob"][0] > 0.5
        for row_first in (False, True):
            fall = port.fall(prediction.outputs["dist"], inside, row_first)
            print(f"  row_first={row_first}: distances fall by {fall:.2f} per pixel")
        print(f"  AP at IoU 0.5: {match(labels, found)[0].ap:.3f}")
        try:
            StardistAdapter(network, Port(**settings, row_first=True)).check(sources)
        except ModelError as error:
            print(f"  refused: {error}")


if __name__ == "__main__":
    main()
