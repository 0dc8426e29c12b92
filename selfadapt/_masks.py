"""Label images that were given where images were meant."""

from collections.abc import Sequence

import numpy as np

from selfadapt._errors import ImageError
from selfadapt._lazy import LazyImage
from selfadapt._normalize import Image


def refuse_masks(sources: Sequence[LazyImage]) -> None:
    """Raise ImageError if the first images look like label images: flat objects on 0.

    In a label image nearly every inner pixel equals its neighbours; next to none does in a
    photograph.
    """
    if sources and all(_is_flat(source.read()) for source in sources[:4]):
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
