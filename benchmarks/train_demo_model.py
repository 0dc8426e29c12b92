"""Train the bundled demo network: a small SMP U-Net with a foreground and a distance head.

    python benchmarks/train_demo_model.py --data ../shared/data/dsb2018 --out DIR

then, to score what was trained on images it has not seen:

    python benchmarks/train_demo_model.py --data ../shared/data/dsb2018 --out DIR --steps 0

Source domains: the first 75 images (by file name) of fluo520 and of fluo360. fluo256 and the
H&E images are never seen, so that they can serve as targets. About ten minutes on two CPU cores.
"""

import argparse
import time
from pathlib import Path

import imageio.v3 as iio
import numpy as np
import segmentation_models_pytorch as smp
import torch
from scipy import ndimage
from skimage.measure import regionprops
from skimage.transform import resize

from selfadapt import Matches, match
from selfadapt_smp import Decode, SmpAdapter

CROP, BATCH = 128, 8
SCALES = (0.35, 1.2)  # nuclei of 28 and 47 pixels become 10 to 56


def distance_target(labels: np.ndarray) -> np.ndarray:
    """Distance to the edge of the own instance, divided by its maximum there: [H, W] in [0, 1]."""
    target = np.zeros(labels.shape, np.float32)
    for region in regionprops(labels):
        box = ndimage.distance_transform_edt(np.pad(region.image, 1))[1:-1, 1:-1]
        target[region.slice][region.image] = (box / box.max())[region.image]
    return target


def normalise(image: np.ndarray) -> np.ndarray:
    low, high = np.percentile(image, (1, 99))
    return ((image - low) / max(high - low, 1e-6)).astype(np.float32)


def load(folder: Path) -> list[tuple[np.ndarray, np.ndarray]]:
    pairs = []
    for path in sorted((folder / "images").iterdir())[:75]:
        labels = iio.imread(folder / "masks" / path.name).astype(np.int32)
        pairs.append((normalise(iio.imread(path).astype(np.float32)), labels))
    return pairs


def crop(pair: tuple[np.ndarray, np.ndarray], rng: np.random.Generator) -> np.ndarray:
    """One augmented crop: image, foreground, distance as [3, CROP, CROP]."""
    image, labels = pair
    scale = np.exp(rng.uniform(*np.log(SCALES)))
    side = min(round(CROP / scale), *image.shape)
    y, x = (rng.integers(0, n - side + 1) for n in image.shape)
    window = np.s_[y : y + side, x : x + side]
    image = resize(image[window], (CROP, CROP), order=1, anti_aliasing=scale < 1)
    rows = (np.arange(CROP) * side) // CROP
    labels = labels[window][np.ix_(rows, rows)]
    stack = np.stack([image, labels > 0, distance_target(labels)]).astype(np.float32)
    stack = np.rot90(stack, rng.integers(4), axes=(1, 2))
    if rng.random() < 0.5:
        stack = stack[:, :, ::-1]
    stack = np.ascontiguousarray(stack)
    stack[0] = stack[0] * rng.uniform(0.8, 1.2) + rng.normal(0, 0.02, stack[0].shape)
    return stack


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=2500)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.steps:
        train(args)
    score(args)


def score(args: argparse.Namespace) -> None:
    """Print AP at IoU 0.5, counts pooled, on the held-out images of each domain."""
    adapter = SmpAdapter(
        smp.from_pretrained(args.out),
        "foreground,distance",
        decode=Decode(min_distance=5, smoothing=2.0),
    )
    for domain, first in (("fluo520", 75), ("fluo360", 75), ("fluo256", 0), ("he", 0)):
        adapter.gray = "inverted" if domain == "he" else "no"
        files = sorted((args.data / domain / "images").iterdir())[first:]
        counts = Matches()
        for path in files:
            labels = iio.imread(args.data / domain / "masks" / path.name).astype(np.int32)
            axis = -1 if domain == "he" else None
            counts += match(labels, adapter.segment(iio.imread(path), channel_axis=axis))[0]
        print(f"{domain}: AP {counts.ap:.3f} on {len(files)} images")


def train(args: argparse.Namespace) -> None:
    torch.manual_seed(args.seed)
    rng = np.random.default_rng(args.seed)
    pairs = load(args.data / "fluo520") + load(args.data / "fluo360")
    model = smp.Unet(
        "tu-test_efficientnet",
        encoder_weights=None,
        in_channels=1,
        classes=2,
        decoder_channels=(96, 64, 32, 24, 16),
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=1e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=args.steps)
    start = time.time()
    for step in range(args.steps):
        picks = rng.integers(len(pairs), size=BATCH)
        batch = torch.from_numpy(np.stack([crop(pairs[i], rng) for i in picks]))
        foreground, distance = model(batch[:, :1]).unbind(1)
        loss = torch.nn.functional.binary_cross_entropy_with_logits(foreground, batch[:, 1])
        loss = loss + 4 * torch.nn.functional.mse_loss(distance, batch[:, 2])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 100 == 0:
            print(f"step {step} loss {loss.item():.4f} {time.time() - start:.0f} s", flush=True)
    model.eval().save_pretrained(args.out)


if __name__ == "__main__":
    main()
