"""Random crops of prepared images: what the student and the teacher see."""

import logging
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice

import numpy as np
import torch
from torch import Tensor

from selfadapt import _ranks as ranks
from selfadapt._adapter import Adapter
from selfadapt._config import Config
from selfadapt._errors import ConfigError, ImageError
from selfadapt._input import prepare, refuse_not_finite
from selfadapt._lazy import LazyImage
from selfadapt._masks import refuse_masks
from selfadapt._normalize import Image, checksum, is_constant
from selfadapt._tiles import pad_far_side, round_up
from selfadapt._verdict import Thresholds

logger = logging.getLogger(__name__)

CHECKED = 256
"""That many images are read before the run starts."""
CACHE_BYTES = 256 * 2**20
"""Prepared images are kept in memory up to this size."""


class Crops:
    """Batches of random square crops; batch k depends on the seed and k alone.

    Args:
        adapter: prepares the images.
        images: an image is drawn evenly, whatever its size; then a place in it.
        config: `batch_size`, `crop`, `seed`.

    Raises:
        ConfigError: `batch_size` is no multiple of the number of processes.
    """

    def __init__(self, adapter: Adapter, images: Sequence[LazyImage], config: Config) -> None:
        self._adapter = adapter
        self._images = images
        self._config = config
        self._cache: OrderedDict[int, Tensor] = OrderedDict()
        self._useless: set[int] = set()
        self._checked = False
        self._error: ImageError | None = None
        self._channels: int | None = None
        self.fingerprints = [str(image) for image in images]
        """Name of each image, in order; after `check` those that it has read have a checksum."""
        self.used: dict[str, str] = {}
        """Checksum of each image that could be used, by its number."""
        self._before: dict[str, str] = {}
        self.side = crop_side(adapter, config)
        self._size = share_of_batch(config)

    def check(self) -> None:
        """Read the first images, so that bad ones are named before any work starts.

        One that cannot be read or used, or is smaller than the network takes, is left out.

        Raises:
            ImageError: none can be used, all are masks or constant, or they differ in channels.
        """
        refuse_masks(self._images)
        channels: dict[int, str] = {}
        for index, source in enumerate(self._images[:CHECKED]):
            if (image := self._load(index)) is not None:
                channels.setdefault(len(image), str(source))
        if len(self._useless) == len(self._images):
            raise self._error or ImageError(
                f"{self._images[0]} is constant: there is nothing to see in it, and no other image "
                "is left to learn from."
            )
        if len(channels) > 1:
            listed = ", ".join(f"{name} has {count}" for count, name in channels.items())
            raise ImageError(
                f"images differ in their number of channels ({listed}): give images of one kind, "
                "or the adapter's option that converts them."
            )
        self._channels = next(iter(channels), None)
        self._checked = True

    def go_on(self, used: dict[str, str]) -> None:
        """Take it that these images were `used` before, by another process."""
        self._before = used
        self.used = used | self.used

    def batch(self, k: int) -> Tensor:
        """Batch number k, float32 `[batch_size, C, side, side]`; of several ranks one's slice."""
        ours = range(self._config.batch_size)[ranks.slice_of(self._size)]
        seeds = [(self._config.seed, k, index) for index in ours]
        return torch.stack([self._crop(np.random.default_rng(seed)) for seed in seeds])

    def batches(self, first: int, last: int) -> Iterator[Tensor]:
        """Batches `first` to `last - 1`; the next one is read while the current one is used."""
        with ThreadPoolExecutor(1) as reader:
            ahead = reader.submit(self.batch, first)
            for k in range(first, last):
                batch = ahead.result()
                if k + 1 < last:
                    ahead = reader.submit(self.batch, k + 1)
                yield batch

    def _crop(self, rng: np.random.Generator) -> Tensor:
        while len(self._useless) < len(self._images):
            image = self._load(int(rng.integers(len(self._images))))
            if image is not None:
                image = pad_far_side(image, (self.side, self.side), self._adapter.padding)
                top, left = (int(rng.integers(n - self.side + 1)) for n in image.shape[-2:])
                return image[:, top : top + self.side, left : left + self.side]
        raise ImageError("no image is left that could be used: all are constant or unreadable.")

    def _load(self, index: int) -> Tensor | None:
        """A prepared image, or None if there is nothing to see in it.

        An image that cannot be used is left out and named: a run of hours does not die of it. One
        that was used before, and has vanished or was changed, ends the run, which can go on, as it
        would have, once the image is back.
        """
        if index in self._useless:
            return None
        if index in self._cache:
            self._cache.move_to_end(index)
            return self._cache[index]
        source, key = self._images[index], str(index)
        try:
            pixels = source.read()
            mark = checksum(pixels)
            if not self._checked:
                self.fingerprints[index] += f" {mark}"
            if self._before.get(key, mark) != mark:
                raise ImageError(f"{source} has other pixels than before.")
            image = self._prepared(source, pixels)
        except ImageError as error:
            if key in self.used:
                raise ImageError(
                    f"{error} It was used before: put it back, and go on with the run (resume)."
                ) from None
            logger.warning("%s Left out.", error)
            self._error = self._error or error
            image = None
        if image is None:
            self._useless.add(index)
            return None
        self.used[key] = mark
        self._cache[index] = image
        while len(self._cache) > 1 and sum(i.nbytes for i in self._cache.values()) > CACHE_BYTES:
            self._cache.popitem(last=False)
        return image

    def _prepared(self, source: LazyImage, pixels: Image) -> Tensor | None:
        if is_constant(pixels):
            if not source.is_window:
                logger.warning("%s is constant: there is nothing to see in it. Left out.", source)
            return None
        image = prepare(self._adapter, pixels, str(source), source.whole())
        if self._channels not in (None, len(image)):
            raise ImageError(
                f"{source} has {len(image)} channel(s), and the first images {self._channels}."
            )
        least = self._adapter.side_multiple
        if min(image.shape[1:]) < least:
            raise ImageError(
                f"{source} is {image.shape[1]} x {image.shape[2]} pixels for the network, which "
                f"takes at least {least} x {least}: adapt to larger images, or rescale them "
                "otherwise."
            )
        return image


def evenly(
    sources: Sequence[LazyImage], most: int, *, blank_images: bool = True
) -> list[LazyImage]:
    """Some of them, evenly spread; without those that cannot be used, and blank windows.

    Where they differ in their number of channels, those stay that have the one most of them have.

    `blank_images` says whether whole images that are blank may be among them.

    Raises:
        ImageError: none of them can be used.
    """
    step = -(-len(sources) // most)
    order = [source for first in range(step) for source in sources[first::step]]
    chosen: list[LazyImage] = []
    channels: list[int] = []
    first_error: ImageError | None = None
    for source in order:
        try:
            pixels = _read(source)
            if not is_constant(pixels) or (blank_images and not source.is_window):
                chosen.append(source)
                channels.append(len(pixels))
        except ImageError as error:
            logger.warning("%s Left out.", error)
            first_error = first_error or error
        if len(chosen) == most:
            break
    if not chosen and first_error:
        raise first_error
    usual = max(channels, key=channels.count, default=0)
    for source, count in zip(chosen, channels, strict=True):
        if count != usual:
            logger.warning(
                "%s has %d channel(s), most others have %d. Left out.", source, count, usual
            )
    return [each for each, count in zip(chosen, channels, strict=True) if count == usual]


def is_blank(source: LazyImage) -> bool:
    """Whether there is nothing to see in it.

    Raises:
        ImageError: it cannot be read, or has pixels that are no numbers.
    """
    return is_constant(_read(source))


def _read(source: LazyImage) -> Image:
    pixels = source.read()
    refuse_not_finite(pixels, str(source))
    return pixels


def hold_out(
    sources: Sequence[LazyImage], config: Config
) -> tuple[Sequence[LazyImage], Sequence[LazyImage]]:
    """Split into training and held-out images, by `config.seed`; a single image serves as both.

    Images that are constant or cannot be used, and blank windows of large ones, are not held out;
    `Crops` names them. Where no other image is left, the held-out ones serve as both.

    Raises:
        ImageError: none can be used.
    """
    if len(sources) == 1:
        return sources, sources
    # of an image the judge may have one window, and it wants several
    least = max(1, min(Thresholds.windows, len(sources) // 2))
    wanted = max(least, round(config.validation_share * len(sources)))
    count = min(wanted, config.validation_images, len(sources) - 1)
    order = np.random.default_rng(config.seed).permutation(len(sources)).tolist()
    held_out = set(islice((index for index in order if _is_useful(sources[index])), count))
    if not held_out:
        is_blank(sources[0])  # raises where it is not
        raise ImageError("all images are constant: there is nothing to adapt to.")
    rest = [source for i, source in enumerate(sources) if i not in held_out]
    chosen = [source for i, source in enumerate(sources) if i in held_out]
    return (rest if any(map(_is_useful, rest)) else chosen), chosen


def exchange(
    adapter: Adapter, sources: Sequence[LazyImage], held_out: Sequence[LazyImage]
) -> tuple[Sequence[LazyImage], Sequence[LazyImage]]:
    """As `hold_out` gave them, but for what the network cannot take, such as other channels.

    That goes to the images to learn from, where `Crops` names it, and others take its place.
    """
    unfit = [source for source in held_out if not _is_fit(adapter, source)]
    fit = (source for source in sources if _is_fit(adapter, source))
    taken = list(islice(fit, len(unfit)))
    if sources is held_out or not taken:
        return sources, held_out
    kept = [source for source in held_out if source not in unfit] + taken
    rest = [source for source in sources if source not in taken]
    return (rest if any(_is_fit(adapter, source) for source in rest) else kept) + unfit, kept


def _is_fit(adapter: Adapter, source: LazyImage) -> bool:
    try:
        prepare(adapter, source.read(), str(source), source.whole())
    except ImageError:
        return False
    return True


def _is_useful(source: LazyImage) -> bool:
    try:
        return not is_blank(source)
    except ImageError:
        return False


def share_of_batch(config: Config) -> int:
    """How many crops of a batch each process takes.

    Raises:
        ConfigError: they would not all take as many.
    """
    share, left = divmod(config.batch_size, ranks.count())
    if left:
        raise ConfigError(
            f"batch_size={config.batch_size} cannot be shared by {ranks.count()} processes: give a "
            "multiple of their number."
        )
    return share


def crop_side(adapter: Adapter, config: Config) -> int:
    """`config.crop`, rounded up to what the network takes."""
    if adapter.fixed_size is not None:
        return adapter.fixed_size
    return round_up(config.crop, adapter.side_multiple)
