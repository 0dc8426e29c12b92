"""What the pages take for granted: a folder with real images, masks and networks, and names."""

import warnings
from pathlib import Path

import numpy as np
import segmentation_models_pytorch as smp
import tifffile
import torch
import zarr
from cellpose.dynamics import labels_to_flows
from cellpose.resnet_torch import CPnet
from skimage.transform import resize
from stardist.data import test_image_nuclei_2d as nuclei
from stardist.geometry import star_dist
from stardist.utils import edt_prob
from torch.nn.functional import binary_cross_entropy_with_logits

from selfadapt import SelfAdaptation, normalize_percentile, open_images, prepare
from selfadapt_smp import DEMO_MODEL, SmpAdapter
from selfadapt_stardist import Architecture, StarDist2D, StardistAdapter

IMAGE, MASK = nuclei(return_mask=True)
SIDE = 96
CORNERS = [np.s_[y : y + SIDE, x : x + SIDE] for y, x in ((0, 0), (0, 416), (416, 416))]


def fill(folder: Path) -> None:
    """Images, masks and networks, by the names that the pages use.

    The images are pieces of the one of nuclei that StarDist ships. `my_unet` is the bundled
    network; the others are of the real architectures, trained for seconds on the same image, and
    know little.
    """
    for name in ("my_images", "some_images", "images_that_it_works_on"):
        (folder / name).mkdir()
        for k, corner in enumerate(CORNERS):
            file = "cells.tif" if k == 0 else f"nuclei_{k}.tif"
            tifffile.imwrite(folder / name / file, IMAGE[corner].astype(np.uint16))
    (folder / "their_masks").mkdir()
    for k, corner in enumerate(CORNERS):
        file = "cells_masks.tif" if k == 0 else f"nuclei_{k}_masks.tif"
        tifffile.imwrite(folder / "their_masks" / file, MASK[corner].astype(np.uint16))
    zarr.save(str(folder / "slide.zarr"), IMAGE[:200, :300])
    smp.from_pretrained(DEMO_MODEL).save_pretrained(folder / "my_unet")
    (folder / "my_models").mkdir()
    _trained_stardist().save(folder / "my_models" / "nuclei")
    with warnings.catch_warnings(action="ignore"):  # TorchScript is deprecated
        torch.jit.script(_Convolutions()).save(folder / "weights.pt")


def fill_zoo(folder: Path) -> None:
    """Files where Cellpose looks before it downloads `nuclei` and `cyto3`."""
    weights = _trained_cpnet()
    for file in ("nucleitorch_0", "cyto3"):
        torch.save(weights, folder / file)


def names(page: str, folder: Path) -> dict[str, object]:
    """What a page calls yours and does not define."""
    demo = SmpAdapter.from_pretrained("demo")
    prepared = [
        prepare(demo, source.read(), source.name) for source in open_images(folder / "my_images")
    ]
    crops = [image[None, :, :64, :64] for image in prepared]
    if page == "own-model.md":
        return {"my_network": demo.model}
    if page == "own-loop.md":
        return {
            "adapter": demo,
            "loader": crops * 13,
            "my_loss": torch.zeros(()),
            "held_out": "my_images",
            "prepared_held_out": prepared,
            "window_was_closed": lambda: False,
        }
    if page == "many-gpus.md":
        run = SelfAdaptation(demo)
        return {"run": run, "loader": crops, "optimizer": torch.optim.SGD(run.parameters(), 1e-3)}
    if page == "cellpose.md":
        for file in (folder / "my_images").iterdir():  # the network is large, so little to do
            file.unlink()
        small, large = (  # with nuclei of about 21 and 40 pixels
            resize(IMAGE[:96, :96], (side, side), preserve_range=True).astype(np.uint16)
            for side in (72, 136)
        )
        tifffile.imwrite(folder / "my_images" / "cells.tif", small)
        coloured = np.stack([0 * large, large, large], -1)
        (folder / "green_cells_blue_nuclei").mkdir()
        tifffile.imwrite(folder / "green_cells_blue_nuclei" / "a.tif", coloured, photometric="rgb")
        return {"images": [small], "image": coloured}
    if page == "stardist.md":
        return {"image": IMAGE[CORNERS[0]], "network": _Port()}
    return {}


def _trained_stardist() -> StardistAdapter:
    torch.manual_seed(0)
    small = {"unet_n_filter_base": 8, "unet_n_depth": 2, "net_conv_after_unet": 16}
    network = StarDist2D(Architecture(n_rays=16, grid=(2, 2), **small))
    adapter = StardistAdapter(network, prob_thresh=0.5)
    image = prepare(adapter, IMAGE[None], "nuclei")[None]
    prob = torch.from_numpy(edt_prob(MASK)[::2, ::2].astype(np.float32))
    dist = torch.from_numpy(star_dist(MASK, 16)[::2, ::2].transpose(2, 0, 1).copy())
    optimizer = torch.optim.Adam(network.parameters(), 3e-3)
    for y, x in np.random.default_rng(0).integers(0, 208, (300, 2)):
        found, rays = network.train()(image[..., 2 * y : 2 * y + 96, 2 * x : 2 * x + 96])
        where = np.s_[..., y : y + 48, x : x + 48]
        loss = binary_cross_entropy_with_logits(found[0, 0], prob[where])
        loss = loss + 0.1 * ((rays[0] - dist[where]).abs() * prob[where]).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    network.eval()
    return adapter


def _trained_cpnet() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    network = CPnet([2, 32, 64, 128, 256], 3, sz=3).train()
    half = MASK[::2, ::2]
    prob, *flow = labels_to_flows([half], device=torch.device("cpu"))[0][1:4]
    flow = 5 * torch.from_numpy(np.stack(flow).astype(np.float32))
    prob = torch.from_numpy(prob.astype(np.float32))
    image = torch.from_numpy(normalize_percentile(IMAGE[None, ::2, ::2].astype(np.float32)))
    image = torch.cat([image, image])  # of nuclei; every other time there is none
    optimizer = torch.optim.Adam(network.parameters(), 2e-3)
    for step, (y, x) in enumerate(np.random.default_rng(0).integers(0, 192, (80, 2))):
        where = np.s_[..., y : y + 64, x : x + 64]
        second = torch.tensor([1, step % 2])[:, None, None]
        found = network((second * image[where])[None])[0][0]
        loss = (found[:2] - flow[where]).square().mean() / 2
        loss = loss + binary_cross_entropy_with_logits(found[2], prob[where])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    for diameter in (network.diam_mean, network.diam_labels):
        diameter.data.fill_(15.0)  # of a nucleus in half of the image
    return network.state_dict()


class _Convolutions(torch.nn.Module):
    """Probability of the foreground, at sides that are multiples of 8."""

    def __init__(self) -> None:
        super().__init__()
        self.down = torch.nn.Conv2d(1, 8, 8, 8)
        self.up = torch.nn.ConvTranspose2d(8, 1, 8, 8)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.up(self.down(images).relu()).sigmoid()


class _Port(torch.nn.Module):
    """Distances, then a probability."""

    def __init__(self) -> None:
        super().__init__()
        self.down3 = torch.nn.Conv2d(1, 33, 3, padding=1)

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        both = self.down3(images)
        return both[:, 1:].relu(), both[:, :1].sigmoid()
