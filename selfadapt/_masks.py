"""Label images: beside images, in the place of images, and the pairs of both."""

import logging
import math
import re
from collections.abc import Collection, Iterator, Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np
import scipy

from selfadapt._errors import ImageError
from selfadapt._lazy import LazyImage, failing
from selfadapt._normalize import Image, is_constant

logger = logging.getLogger(__name__)

Key = tuple[str, ...]
"""Words of a file's name, in small letters: cell, 1."""


def _listed(words: str) -> frozenset[str]:
    return frozenset(words.split())


LABELS = _listed(
    """
    annotated annotation annotations groundtruth gt identities inst instance instances label
    labeled labelled labels lbl lbls manual mask masks objects seg segmentation segmentations
    segmented truth
    """
)
"""What people and programs add to the name of an image for the labels of its instances."""
OTHERS = _listed(
    """
    basins binary boundaries boundary cellpose cellprob classified contour contours dist distance
    distmap dp drawing flow flows heatmap instanseg labelids labelmap lblimg logits mesmer morpho
    ncolor omnipose outline outlined outlines overlay overlayoutlines pred prediction predictions
    preds preview prob probabilities probability probmap probs screenshot semantic skeleton softmax
    stardist style thresh threshold thresholded thumb thumbnail tracked tracking uncertainty
    watershed
    """
)
"""The same for what else is made of it, by Cellpose, ilastik and others."""
BESIDE = _listed(
    """
    catchment cell cells clean cleaned color colored copy corrected count cp curated cyto edited
    final for ground image img map multicut napari new nuc nuclei object of output result simple
    stage
    """
)
"""Words that may stand beside these, and numbers, also of a version (v2), channel or frame."""
IMAGE = _listed("im image images img input original photo raw")
"""What may be added to the name of the image itself."""


def made_of(names: Collection[str]) -> set[str]:
    """Those that are called as another one of them, and as what is made of images.

    >>> sorted(made_of(["cell_1.tif", "cell_1_cp_masks.png", "Mask of cell_1.tif", "2.tif"]))
    ['Mask of cell_1.tif', 'cell_1_cp_masks.png']
    >>> made_of(["0_img.png", "0_masks.png"])
    {'0_masks.png'}
    """
    keys = {key for name in names for key in _image_keys(name)}
    return {name for name in names if not keys.isdisjoint(_bases(name, LABELS | OTHERS))}


def _image_keys(name: str) -> Iterator[Key]:
    """Of an image's name: all words, and those without one that only says what it is."""
    key = _key(name)
    yield key
    if len(key) > 1:
        if key[-1] in IMAGE:
            yield key[:-1]
        if key[0] in IMAGE:
            yield key[1:]


def _bases(name: str, said: Collection[str]) -> Iterator[Key]:
    """What the image may be called that a file is made of: the name without what it says."""
    key = _key(name)
    for at in range(1, len(key)):
        for words, base in ((key[at:], key[:at]), (key[:at], key[at:])):
            told = [word for word in words if not re.fullmatch(r"(ch|[ctvz])?\d+", word)]
            if any(word in said for word in told) and all(w in said or w in BESIDE for w in told):
                yield base


def _key(name: str) -> Key:
    stem = re.sub(r"^[a-z]+(?=\d+(?![^\W_]))", _parted, _stem(name).lower())
    return tuple(w for w in re.findall(r"[^\W_]+", stem) if w != "ome")


def _parted(word: re.Match[str]) -> str:
    """Of img1 and mask1: img 1 and mask 1; of cell1, cell1."""
    return f"{word[0]} " if word[0] in IMAGE | LABELS | OTHERS else word[0]


def _stem(name: str) -> str:
    return Path(name).stem.removesuffix(".ome")


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
        ImageError: an image has no mask, or several, or two files have the same one. Where a file
            has more or fewer masks than images, or they are of other places, reading them raises.
    """
    ours, theirs = _by_file(sources), _by_file(masks)
    names = _matched(list(ours), list(theirs), one_folder=one_folder)
    alone = 1 in (len(ours), len(theirs)) and not any(names)
    alone &= not one_folder or ours.keys().isdisjoint(theirs)
    if alone and len(ours) == len(theirs):
        names = [*theirs]
    elif alone and len(sources) == len(masks):
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
    image_of: dict[str | None, str] = {}
    for name, mask in zip(ours, names, strict=True):
        if (other := image_of.setdefault(mask, name)) != name:
            raise ImageError(
                f"{other} and {name} would have the same mask, {mask}: name it as one of them."
            )
    paired: list[LazyImage] = []
    for (name, images), mask in zip(ours.items(), names, strict=True):
        try:
            paired += _by_place(images, theirs[mask or ""])
        except ImageError as error:  # one of the two may be cut off: the others go on
            paired += [failing(name, error) for _ in images]
    return paired


def _by_place(images: Sequence[LazyImage], masks: Sequence[LazyImage]) -> Sequence[LazyImage]:
    """The mask of each image of a file: of the same index along each axis, in whatever order these
    lie, or by order alone where the two files do not call their axes the same.

    Raises:
        ImageError: there are more of one than of the other, or axes are of other lengths.
    """
    counts = f"{len(images)} image(s)", f"{masks[0].name} {len(masks)} mask(s)"
    which = f"{images[0].name} holds {', and '.join(counts)}"
    if len(images) != len(masks):
        raise ImageError(f"{which}: they pair by their place, so give as many.")
    ours, theirs = (
        [tuple(sorted(each.part.split())) for each in either] for either in (images, masks)
    )
    at = dict(zip(theirs, masks, strict=True))
    if len(at) == len(masks) and at.keys() == set(ours):
        return [at[place] for place in ours]
    named = _axes(ours)
    if ours != theirs and named == _axes(theirs) and not any("" in place for place in named):
        raise ImageError(
            f"{which}, but not of the same places, such as {images[-1].part} and "
            f"{masks[-1].part}: give both with the same axes."
        )
    return masks


def _axes(places: Collection[Key]) -> set[Key]:
    """What the axes are called that places lie along: T, Z; a number of a series is no place."""
    return {tuple(map(_axis, place)) for place in places}


def _axis(word: str) -> str:
    if word.startswith("series"):
        return word
    return word[0] if re.fullmatch(r"[A-Z]\d+", word) else ""  # wells and the like


def _matched(ours: Sequence[str], theirs: Sequence[str], *, one_folder: bool) -> list[str | None]:
    """The file of masks of each file of images, or None."""
    exact: dict[str, list[str]] = {}
    loose: dict[str, list[str]] = {}
    made: dict[Key, list[str]] = {}
    keys = {key for name in ours for key in _image_keys(name)}
    for name in theirs:
        if not one_folder:
            exact.setdefault(_stem(name), []).append(name)
            loose.setdefault(_stem(name).lower(), []).append(name)
        bases = keys.intersection(_bases(name, LABELS))
        longest = max(map(len, bases), default=0)  # cells_1_masks is of cells_1, not of cells
        for key in bases:
            if len(key) == longest:
                made.setdefault(key, []).append(name)
    found: list[str | None] = []
    for name in ours:
        by_words = {other for key in _image_keys(name) for other in made.get(key, ())} - {name}
        stem = _stem(name)
        candidates = exact.get(stem) or loose.get(stem.lower()) or sorted(by_words)
        if len(candidates) > 1:
            raise ImageError(
                f"{name} has several masks, {' and '.join(candidates[:2])}: leave one of them."
            )
        found.append(candidates[0] if candidates else None)
    return found


def _by_number(name: str) -> list[tuple[bool, int, str]]:
    """An order in which 9 comes before 10."""
    parts = re.split(r"(\d+)", name)
    return [(part.isdecimal(), int(part) if part.isdecimal() else 0, part) for part in parts]


def _by_file(sources: Sequence[LazyImage]) -> dict[str, list[LazyImage]]:
    files: dict[str, list[LazyImage]] = {}
    for source in sources:
        files.setdefault(source.name, []).append(source)
    return files


def refuse_masks(sources: Sequence[LazyImage]) -> None:
    """Raise ImageError if the first images look like label images: flat objects on 0.

    In a label image nearly every inner pixel equals its neighbours; next to none does in a
    photograph.
    """
    first = _first(sources)
    if first and all((each == 0).any() and _flat_share(each) > 0.8 for each in first):
        raise ImageError(
            f"{sources[0]} and the others look like masks (flat objects on 0): give the images "
            "themselves. If they are images, convert them to float."
        )


def refuse_photographs(masks: Sequence[LazyImage]) -> None:
    """Raise ImageError if the first label images look like photographs; say if they are binary.

    Even where objects are of a few pixels and touch, more of these equal their neighbours.
    """
    first = _first(masks)
    if first and all(_flat_share(each) < 0.1 for each in first):
        raise ImageError(
            f"{masks[0]} and the others of --masks look like images: give label images, in which "
            "all pixels of an object have its number, and the background 0."
        )
    if first and all(_is_binary(each) for each in first):
        logger.warning(
            "%s and the others of --masks have one number for all objects, which are taken for a "
            "single one: give each its own, as scipy.ndimage.label does where they do not touch.",
            masks[0],
        )


def _is_binary(mask: Image) -> bool:
    """Whether all that is no background has one number, in several places."""
    numbers = np.unique(mask[mask != 0])
    return len(numbers) == 1 and scipy.ndimage.label(mask[0])[1] > 1


def _first(sources: Sequence[LazyImage]) -> list[Image]:
    """Parts of the first images, those that are not constant."""
    found = []
    for source in sources[:4]:
        with suppress(ImageError):  # a bad image is named where it is used
            parts = (window.read() for window in source.windows())
            part = next((part for part in parts if not is_constant(part)), None)
            if part is not None:
                found.append(part)
    return found


def _flat_share(image: Image) -> float:
    """Share of inner pixels, those beside no 0, that equal two neighbours.

    NaN where there are none, and where pixels are no counts of one channel.
    """
    if image.dtype.kind not in "biu" or image.shape[0] != 1:
        return math.nan
    pixels = image[0].astype(np.int64)
    inside = pixels != 0
    core = inside[1:-1, 1:-1] & inside[:-2, 1:-1] & inside[2:, 1:-1]
    core &= inside[1:-1, :-2] & inside[1:-1, 2:]
    centre = pixels[1:-1, 1:-1]
    equal = (centre == pixels[:-2, 1:-1]) & (centre == pixels[1:-1, :-2])
    return float(equal[core].mean()) if core.any() else math.nan
