"""Two published label-free estimates of quality, on the settings that `collect.py` has segmented.

    python benchmarks/anchors.py --predictions PREDICTIONS --shared ../shared --out anchors.jsonl

One line of JSON a setting: its `file`, `cte` and `cse` (means over the crops where they are
defined, null if there are none) and on how many crops each is `defined`; `cse_pooled`, of all its
crops at once; `cte_noise` and others, for a perturbation by itself the median over the crops, which
is what the authors of CTE rank by. Resumable: settings that have a line are skipped.
Needs the package CellSegmentationEvaluator, and matplotlib, which that imports.

CTE is the consistency of Talks and Kreshuk (arXiv 2503.00450) for instances; CSE is the quality
score of Chen and Murphy (2023, doi 10.1091/mbc.E22-08-0364). `cte` and `cse` say what differs here.
"""

import argparse
import contextlib
import io
import json
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from itertools import cycle
from pathlib import Path
from typing import Any, cast
from zlib import crc32

import numpy as np
from numpy.typing import NDArray
from settings import NETWORKS, Crop, Entry, crops, pairs
from skimage.metrics import adapted_rand_error
from skimage.morphology import dilation, erosion
from skimage.segmentation import morphsnakes, relabel_sequential

Array = NDArray[Any]

PERTURBED = {"noise": -2, "contrast": -3, "dropout": -1}
"""Views of `collect.py` from the end: the number of turns before them depends on the network."""
WITHOUT_DROPOUT = ("broad",)
"""Networks with no layer to hook: their view is all background and stands for a missing one."""
CSE_EVERY = 4
"""CSE takes seconds: one setting in so many has it, by a checksum of its name."""
PIXEL = 0.5
"""Micrometres: at the 21 pixels that most networks expect, objects are 10 micrometres wide."""

# --- CTE -----------------------------------------------------------------------------------------


def consistency(plain: Array, perturbed: Array) -> float:
    """1 - adapted Rand error of the perturbed instances, the plain ones being the truth.

    As in the authors' code (kreshuklab/CRank-Consistency_based_ranking, `adaRandError_eval`):
    over both foregrounds but the outlines of `plain`, a pixel to either side, where each
    background pixel is an object of its own. NaN if `plain` or that area is empty.
    """
    if not plain.any():
        return float("nan")
    outline = dilation(plain) != erosion(plain)
    area = ((plain > 0) | (perturbed > 0)) & ~outline
    if not area.any():
        return float("nan")
    pair = _alone(plain[area]), _alone(perturbed[area])
    with np.errstate(invalid="ignore", divide="ignore"):
        return 1 - float(adapted_rand_error(*pair, ignore_labels=None)[0])


def _alone(labels: Array) -> NDArray[np.int64]:
    """Every background pixel with an identity of its own."""
    labels = labels.astype(np.int64)
    background = labels == 0
    labels[background] = labels.max(initial=0) + 1 + np.arange(background.sum())
    return labels


def cte(plain: Array, perturbed: Sequence[Array]) -> float:
    """Mean consistency `[H, W]` under the perturbations; NaN if it is defined under none.

    The authors rank by one perturbation at one strength (channel dropout at the bottleneck, or
    noise, contrast, brightness or gamma of the input); the mean over several is ours.
    """
    return _average([consistency(plain, each) for each in perturbed])


# --- CSE -----------------------------------------------------------------------------------------


SMOOTHING = next(morphsnakes._curvop.funcs), next(morphsnakes._curvop.funcs)


@contextlib.contextmanager
def _steady() -> Iterator[None]:
    """The package prints, switches warnings off for good, and its every second result differs.

    scikit-image's active contour alternates two operators across calls; each starts afresh here.
    """
    morphsnakes._curvop.funcs = cycle(SMOOTHING)
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        yield


@lru_cache(maxsize=1)
def _published_weights() -> Array:
    """Means, scales and components of the package's two-dimensional model.

    The package has them as lists, with which scikit-learn 1.9 fails; it then scores NaN.
    """
    from CellSegmentationEvaluator.functions import getPCAmodel

    scaler, pca = getPCAmodel("2Dv1.5")
    for part, names in ((scaler, ("mean_", "scale_")), (pca, ("components_",))):
        for name in names:
            setattr(part, name, np.asarray(getattr(part, name), float))
    return np.array([scaler, pca], object)  # the package takes a caller's model only as an array


def cse(image: Array, labels: Array, pixel: float = PIXEL) -> float:
    """Quality score of `labels` `[H, W]` on a non-negative `image` `[H, W]`; NaN where undefined.

    `single_method_eval` of CellSegmentationEvaluator 1.5.19 with its own weights (14 metrics,
    standardized; exp of the first two principal components by their share of variance). It takes
    several channels, and masks of cells and nuclei:

    - The channel is given twice (its axis is lost otherwise), which changes no metric. With one
      channel the three metrics of a first principal component are always 1.
    - `labels` serve as both masks. The package cuts nuclei back from the rim of their cells, so
      "nucleus" is the object without its outermost pixels, "cytoplasm" is those pixels, and the
      fraction of cells matched with nuclei is nearly always 1.
    - It clusters objects by intensity into up to 10, so fewer than 11 (in which a pixel is not
      rim) are undefined; as is foreground (above the mean, closed by 20 pixels) that is empty or
      entirely in objects, which it always is in images of fewer than 20,000 pixels.
    """
    with _steady():
        from CellSegmentationEvaluator.single_method_eval import single_method_eval

        objects = relabel_sequential(labels.astype(np.int64))[0]
        if objects.max(initial=0) < 11:
            return float("nan")
        channels = np.stack([image, image]).astype(np.float64)[None, :, None]
        masks = np.stack([objects, objects])[None, :, None]
        try:
            metrics = single_method_eval(
                {"name": "crop", "data": channels}, {"name": "crop", "data": masks},
                _published_weights(), Path(), pixelsizex=pixel, pixelsizey=pixel,
            )  # fmt: skip
        except (ValueError, IndexError):  # too few clusters, nothing to fit; no background
            return float("nan")
    return float(metrics["QualityScore"])


def cse_pooled(images: Sequence[Array], labels: Sequence[Array]) -> float:
    """CSE of the crops side by side, each divided by its mean: seldom undefined."""
    height = min(len(each) for each in labels)
    pixels, objects, count = [], [], 0
    for image, found in zip(images, labels, strict=True):
        pixels.append(image[:height] / max(float(image.mean()), 1e-6))
        objects.append(np.where(found > 0, found.astype(np.int64) + count, 0)[:height])
        count += int(found.max(initial=0))
    return cse(np.hstack(pixels), np.hstack(objects))


# --- settings ------------------------------------------------------------------------------------


class AsItIs:
    """In place of an adapter: crops of the intensities that its `prepare` gets.

    Networks often get a mean of 0, by which CSE's coefficients of variation would divide.
    """

    channels = 1

    def prepare(self, image: Array, whole: Array | None = None) -> Array:
        return image


@lru_cache(maxsize=8)
def _crops(shared: Path, domain: str, entry: Entry, count: int, side: int) -> list[Crop]:
    looked = pairs(shared, domain)[::3][0::2]
    return crops(cast(Any, AsItIs()), looked, entry, count, 0, side)


def _average(values: Sequence[float], of: Callable[[Any], Any] = np.mean) -> float:
    defined = [v for v in values if np.isfinite(v)]
    return float(of(defined)) if defined else float("nan")


def _tidy(value: float) -> float | None:
    return round(value, 6) if np.isfinite(value) else None


def evaluate(path: Path, shared: Path) -> dict[str, Any]:
    """The line of a setting."""
    with np.load(path) as file:
        facts = json.loads(str(file["facts"]))
        count = sum(name.startswith("look") for name in file.files)
        views = [file[f"look{k}"] for k in range(count)]
        truths = [file[f"truth{k}"] for k in range(count)]
    network = facts["network"]
    entry = Entry(facts["scale"], facts["invert"], facts["corruption"], facts["level"])
    looked = _crops(shared, facts["domain"], entry, count, NETWORKS[network].window)
    names = [n for n in PERTURBED if n != "dropout" or network not in WITHOUT_DROPOUT]
    slow = crc32(path.stem.encode()) % CSE_EVERY == 0
    consistent, quality = [], []
    for crop, labels, truth in zip(looked, views, truths, strict=True):
        if not np.array_equal(crop.truth, truth):  # places only: it is not used otherwise
            raise ValueError(f"the crops of {path.name} are not those that were segmented")
        consistent.append([consistency(labels[0], labels[PERTURBED[n]]) for n in names])
        quality.append(cse(crop.image[0].numpy(), labels[0]) if slow else np.nan)
    each = [_average(row) for row in consistent]
    pooled = np.nan
    if slow:
        pooled = cse_pooled([c.image[0].numpy() for c in looked], [v[0] for v in views])
    return {
        "file": path.name,
        "cte": _tidy(_average(each)),
        "cse": _tidy(_average(quality)),
        "defined": [int(np.isfinite(values).sum()) for values in (each, quality)],
        "cse_pooled": _tidy(pooled),
        **{
            f"cte_{name}": _tidy(_average(column, np.median))
            for name, column in zip(names, zip(*consistent, strict=True), strict=True)
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--predictions", type=Path, required=True)
    parser.add_argument("--shared", type=Path, required=True)
    parser.add_argument("--networks", type=Path, help="not used: no network is run")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--limit", type=int, help="stop after so many settings")
    args = parser.parse_args()
    kept = []
    for line in args.out.read_text().splitlines() if args.out.exists() else []:
        with contextlib.suppress(ValueError):  # what an interruption cut short is dropped
            kept.append(json.loads(line))
    args.out.write_text("".join(json.dumps(line) + "\n" for line in kept))
    done = {line["file"] for line in kept}
    paths = [p for p in sorted(args.predictions.glob("*.npz")) if ".partial." not in p.name]
    todo = [p for p in paths if p.name not in done][: args.limit]
    with args.out.open("a") as out:
        for number, path in enumerate(todo, 1):
            began = time.time()
            line = evaluate(path, args.shared)
            print(json.dumps(line), file=out, flush=True)
            print(f"{number}/{len(todo)} {path.name}: {time.time() - began:.1f} s", flush=True)


if __name__ == "__main__":
    main()
