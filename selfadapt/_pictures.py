"""PNG, JPEG and BMP, by Pillow, and palettes."""

import io
import math
from pathlib import Path
from typing import Any

import imagecodecs
import numpy as np
from numpy.typing import NDArray
from PIL import Image as Pillow
from PIL import UnidentifiedImageError

from selfadapt._errors import ImageError
from selfadapt._lazy import naming
from selfadapt._normalize import Image, as_channels_first

_CONVERTED = {"CMYK", "YCbCr", "LAB", "HSV"}
"""Modes of Pillow whose values are no intensities of red, green and blue."""


def _colours_of(picture: Pillow.Image) -> NDArray[Any]:
    """Of a palette, `[3, 256]` as TIFF has them."""
    packed = np.array(picture.getpalette("RGB") or [], np.uint16).reshape(-1, 3)
    used = packed[np.minimum(np.arange(256), len(packed) - 1)]  # the last colour goes on
    return np.asarray(used.T * 257)


def read_picture(path: Path, labels: bool) -> Image:
    """Pixels at the depth they are stored in. An alpha channel is no measurement: left out."""
    with naming(path.name):
        packed = path.read_bytes()
        with _opened(path.name, packed) as picture:
            if picture.format == "PNG" and packed[24] == 16:
                pixels = imagecodecs.png_decode(packed)  # of colour Pillow makes 8 bits
            elif picture.mode == "P":
                pixels = np.asarray(picture)
                colours = _colours_of(picture)
                if not labels and (palette := palette_of(colours)) is not None:
                    pixels = palette[pixels]
            elif picture.mode in _CONVERTED:
                pixels = np.asarray(picture.convert("RGB"))
            else:
                pixels = np.asarray(picture)
    if pixels.ndim == 3 and pixels.shape[-1] in (2, 4):
        pixels = pixels[..., :-1]
    if pixels.ndim == 3 and pixels.shape[-1] == 1:
        pixels = pixels[..., 0]
    return as_channels_first(pixels, -1, path.name)


def _opened(name: str, packed: bytes) -> Pillow.Image:
    """Its header read, and no pixel.

    Raises:
        ImageError: it is none that Pillow knows, or several.
    """
    try:
        picture = Pillow.open(io.BytesIO(packed))
    except UnidentifiedImageError:
        raise ImageError(f"{name} cannot be read as an image: it is damaged, or none.") from None
    frames = getattr(picture, "n_frames", 1)
    if frames > 1 and picture.format != "MPO":  # a photograph, behind which cameras put previews
        raise ImageError(f"{name} is a film of {frames} frames: save each of them as a file.")
    return picture


def to_rgb(pixels: Image, mode: str) -> Image:
    """Red, green and blue of bytes `[..., samples]` of another of Pillow's modes."""
    count = math.prod(pixels.shape[:-1])
    picture = Pillow.frombytes(mode, (count, 1), pixels.tobytes(), "raw", mode)
    return np.asarray(picture.convert("RGB")).reshape(*pixels.shape[:-1], 3)


def palette_of(colours: NDArray[Any] | None) -> NDArray[Any] | None:
    """What values stand for, `[values, 3]`, or `[values, 1]` where all are gray.

    None where colours only tint an intensity or stretch its contrast, as ImageJ's tables do.
    """
    if colours is None or (np.diff(colours.astype(np.int64), axis=1) >= 0).all():
        return None
    if (colours == colours[0]).all():
        colours = colours[:1]
    eight = (colours % 257 == 0).all() or (colours % 256 == 0).all()  # both ways are in use
    return ((colours >> 8).astype(np.uint8) if eight else colours).T
