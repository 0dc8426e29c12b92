"""Blocks of a large image: where they lie, which objects are whose, and how they come together.

Each block sees its surroundings, too, and keeps whole objects: those whose centre lies in it. So
none is cut, and blocks can be segmented in any order, on any machine. Near a seam two blocks may
each see an object with a slightly other centre: both keep it then, and the second is left out where
the blocks come together, which is in one order always.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise, product
from typing import Any

import numpy as np
import scipy
import skimage
from numpy.typing import NDArray

Labels = NDArray[np.int32]
Place = tuple[slice, slice]

SHARED = 0.25
"""Blocks keep objects with a centre beyond their border, too, by that share of the overlap."""
COVERED = 0.5
"""An object of which more than that share is there already was seen by another block, too."""


@dataclass(frozen=True)
class Block:
    """A part of an image.

    Args:
        row, column: which one, counted from 0.
        core: rows and columns that are its own.
        window: rows and columns that it sees.
        shared: how far beyond its core, in pixels, it keeps objects, too.
    """

    row: int
    column: int
    core: Place
    window: Place
    shared: int

    def __str__(self) -> str:
        return f"block{self.row},{self.column}"


def blocks_of(
    size: tuple[int, int], block: int, overlap: int, step: tuple[int, int]
) -> list[Block]:
    """Blocks of an image of `size`, in the order in which they come together.

    Args:
        size: height and width, in pixels.
        block: largest side of a core.
        overlap: how far a block sees beyond its core, at least.
        step: corners are multiples of these, so that pooling sees the same pixels together as in
            the whole image.
    """
    sides = [list(_parts(n, block, overlap, s)) for n, s in zip(size, step, strict=True)]
    return [
        Block(i, j, (rows, columns), (down, across), int(SHARED * overlap))
        for (i, (rows, down)), (j, (columns, across)) in product(*map(enumerate, sides))
    ]


def _parts(size: int, block: int, overlap: int, step: int) -> Iterator[tuple[slice, slice]]:
    """Core and window of each part of a side, of about equal lengths."""
    count = math.ceil(size / block)
    borders = [k * size // count // step * step for k in range(count)] + [size]
    for start, stop in pairwise(borders):
        if start < stop:
            near, far = max(start - overlap, 0) // step * step, stop + overlap
            yield slice(start, stop), slice(near, min(-(-far // step) * step, size))


def keep_own(labels: Labels, block: Block, size: tuple[int, int]) -> tuple[Labels, int]:
    """The objects of `labels`, of a block's window, that are the block's own.

    Returns:
        Labels from 1 on, and how many of these objects reach the end of the window, within an
        image of `size`: they are larger than the overlap, and may be cut.
    """
    kept = np.zeros(int(labels.max(initial=0)) + 1, bool)
    reaching = 0
    for number, place in enumerate(scipy.ndimage.find_objects(labels), 1):
        if place is None:
            continue
        is_own, is_cut = True, False
        for at, core, window, side in zip(place, block.core, block.window, size, strict=True):
            start, stop = at.start + window.start, at.stop + window.start
            least = core.start - block.shared if core.start > 0 else 0
            most = core.stop + block.shared if core.stop < side else side
            is_own &= 2 * least <= start + stop - 1 < 2 * most
            is_cut |= 0 < start == window.start or window.stop == stop < side
        kept[number] = is_own
        reaching += is_own and is_cut
    numbered = skimage.segmentation.relabel_sequential(np.where(kept[labels], labels, 0))[0]
    return numbered.astype(np.int32), reaching


def add_objects(target: Any, block: Block, labels: Labels, count: int) -> int:
    """Write the objects of a block's window to `target`, `[H, W]`, on what is still free.

    Those that are there already, seen by another block, are left out.

    Args:
        target: an array, of zarr for instance, with the objects of the blocks before.
        block: the block.
        labels: what `keep_own` has given of it.
        count: how many objects `target` has.

    Returns:
        How many it has now; they are labelled 1, 2, ...
    """
    there = np.asarray(target[block.window])
    for number, place in enumerate(scipy.ndimage.find_objects(labels), 1):
        own = labels[place] == number
        free = own & (there[place] == 0)
        if free.sum() >= (1 - COVERED) * own.sum():
            count += 1
            there[place][free] = count
    target[block.window] = there
    return count
