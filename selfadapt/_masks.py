"""Label images that were given where images were meant."""

import re
from collections.abc import Collection, Container, Iterator, Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np

from selfadapt._errors import ImageError
from selfadapt._lazy import LazyImage, failing
from selfadapt._normalize import Image, is_constant


def _listed(words: str) -> frozenset[str]:
    return frozenset(" ".join(word.split()) for word in words.split(","))


MADE = _listed(
    """
    annotation, annotations, binary, boundaries, boundary, boundary probabilities, cell mask,
    cell masks, cellprob, contours, cp flows, cp masks, cp masks copy, cp masks overlay, cp
    outlines, cp output, cp probs, cp style, dist, distance, dp, dp cp masks, flows, flows cp
    masks, ground truth, groundtruth, gt, heatmap, inst, instance, instances, label, label
    image, labeled, labelids, labelled, labels, labels instances, lbl, lbl morpho, lbls,
    logits, manual, mask, masks, masks overlay, multicut segmentation, napari labels, nuclei
    mask, nuclei masks, object identities, object predictions, object probabilities, objects,
    omnipose, outline, outlined, outlines, overlay, overlay outlines, overlayoutlines, pred,
    prediction, predictions, preds, preview, prob, probabilities, probabilities stage 2,
    probability, probs, screenshot, seg, segmentation, segmentation mask, segmentation
    predictions, segmentations, segmented, semantic, simple segmentation, simple segmentation
    stage 2, softmax, stardist, stardist labels, thumb, thumbnail, tracking result,
    uncertainty, watershed
    """
)
"""What Cellpose, ilastik and people add to the name of an image for what is made of it."""


LABELS = _listed(
    """
    annotation, annotations, cell mask, cell masks, cp masks, ground truth, groundtruth, gt,
    inst, instance, instances, label, label image, labeled, labelled, labels, labels
    instances, lbl, lbls, manual, mask, masks, nuclei mask, nuclei masks, object identities,
    seg, segmentation, segmentation mask, segmentations, stardist labels
    """
)
"""Of these, what holds labels."""


def made_of(names: Collection[str]) -> set[str]:
    """Those that are called as another one of them, and then as what is made of images.

    >>> made_of(["cell_1.tif", "cell_1_cp_masks.png"])
    {'cell_1_cp_masks.png'}
    """
    stems = {_stem(name) for name in names}
    return {name for name in names if not stems.isdisjoint(_bases(name, MADE))}


def _bases(name: str, words: Container[str]) -> Iterator[str]:
    """What may be the stem of the image that a file is made of."""
    stem = _stem(name)
    for at in range(1, len(stem)):
        if not stem[at].isalnum() and _words(stem[at:]) in words:
            yield stem[:at].removesuffix(".ome")


def _stem(name: str) -> str:
    stem = Path(name).stem
    return stem.removesuffix(".ome").lower()


def pair(
    sources: Sequence[LazyImage], masks: Sequence[LazyImage], *, one_folder: bool
) -> list[LazyImage]:
    """The mask of each image: of the file of the same name, or of one made of it; by place in it.

    A single file pairs with a single file, or with several by their order, whatever the names are.

    Args:
        sources: the images.
        masks: label images.
        one_folder: whether both lie in one folder, in which a name alone says nothing.

    Raises:
        ImageError: an image has no mask, or a file has more or fewer of them than images.
    """
    ours, theirs = _by_file(sources), _by_file(masks)
    taken: dict[str, str] = {}
    for name in sorted(theirs):
        for stem in _bases(name, LABELS):
            taken.setdefault(stem, name)
        if not one_folder:
            taken[_stem(name)] = name
    names = [taken.get(_stem(name)) for name in ours]
    by_place = len(sources) == len(masks) and 1 in (len(ours), len(theirs))
    by_place &= not one_folder or ours.keys().isdisjoint(theirs)
    if by_place and not any(names):
        for files in (list(ours), list(theirs)):
            if files != sorted(files, key=_by_number):
                raise ImageError(
                    f"files are taken by name, in which {files[0]!r} comes before {files[1]!r}: "
                    "write the numbers with as many digits, or name the masks as the images."
                )
        return list(masks)
    missing = sum(each is None for each in names)
    if missing:
        without = next(name for name, each in zip(ours, names, strict=True) if each is None)
        raise ImageError(f"there is no mask for {without} ({missing} missing).")
    paired: list[LazyImage] = []
    for (name, images), mask in zip(ours.items(), names, strict=True):
        found = theirs[mask or ""]
        if len(found) != len(images):  # one of the two may be cut off: the others go on
            error = ImageError(
                f"{name} holds {len(images)} image(s), and {mask} {len(found)} mask(s): they pair "
                "by their place, so give as many."
            )
            found = [failing(name, error) for _ in images]
        paired += found
    return paired


def _by_number(name: str) -> list[tuple[bool, int, str]]:
    """An order in which 9 comes before 10."""
    parts = re.split(r"(\d+)", name)
    return [(part.isdecimal(), int(part) if part.isdecimal() else 0, part) for part in parts]


def _by_file(sources: Sequence[LazyImage]) -> dict[str, list[LazyImage]]:
    files: dict[str, list[LazyImage]] = {}
    for source in sources:
        files.setdefault(source.name, []).append(source)
    return files


def _words(text: str) -> str:
    return " ".join(re.split(r"[\W_]+", text.lower())).strip()


def refuse_masks(sources: Sequence[LazyImage]) -> None:
    """Raise ImageError if the first images look like label images: flat objects on 0.

    In a label image nearly every inner pixel equals its neighbours; next to none does in a
    photograph.
    """
    first = []
    for source in sources[:4]:
        with suppress(ImageError):  # a bad image is named where it is used
            if not is_constant(image := source.read()):
                first.append(_is_flat(image))
    if first and all(first):
        raise ImageError(
            f"{sources[0]} and the others look like masks (flat objects on 0): give the images "
            "themselves. If they are images, convert them to float."
        )


def _is_flat(image: Image) -> bool:
    if image.dtype.kind not in "biu" or image.shape[0] != 1:
        return False
    pixels = image[0].astype(np.int64)
    inside = pixels != 0
    if not inside.any() or inside.all():
        return False
    core = inside[1:-1, 1:-1] & inside[:-2, 1:-1] & inside[2:, 1:-1]
    core &= inside[1:-1, :-2] & inside[1:-1, 2:]
    centre = pixels[1:-1, 1:-1]
    equal = (centre == pixels[:-2, 1:-1]) & (centre == pixels[1:-1, :-2])
    return bool(core.any() and equal[core].mean() > 0.8)
