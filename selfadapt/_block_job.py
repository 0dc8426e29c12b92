"""One block of a large image, segmented by whichever process, and the folder that collects them."""

import io
import json
import threading
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock, Timeout

from selfadapt._adapter import Adapter, refuse_broken
from selfadapt._blocks import Block, Labels, blocks_of, keep_own
from selfadapt._disk import write_file
from selfadapt._errors import CheckpointError, OutputError
from selfadapt._input import prepare
from selfadapt._lazy import LARGE, LazyImage
from selfadapt._normalize import Image, is_constant
from selfadapt._predict import predict
from selfadapt._state import first_difference


@dataclass(frozen=True)
class Job:
    """What a process must know to segment any block.

    Args:
        adapter: which network, and how images go in.
        image: one that is read in windows.
        whole: pixels that tell how it is normalised (`LazyImage.sample`).
    """

    adapter: Adapter
    image: LazyImage
    whole: Image

    def __call__(self, block: Block) -> bytes:
        """The block's own objects, packed for `unpacked`."""
        with _ONE:
            found, reaching = keep_own(self._labels(block), block, size_of(self.image))
        packed = io.BytesIO()
        np.savez_compressed(packed, labels=found, reaching=reaching)
        return packed.getvalue()

    def _labels(self, block: Block) -> Labels:
        name = f"{self.image} {block}"
        pixels = _read(self.image, block)
        size = pixels.shape[1], pixels.shape[2]
        if is_constant(pixels):  # nothing to find, as in a black frame
            return np.zeros(size, np.int32)
        prepared = prepare(self.adapter, pixels, name, self.whole)
        try:
            found = predict(self.adapter, self.adapter.model, prepared, size)
            refuse_broken(found.outputs.values())
        except OutputError as error:
            raise OutputError(f"{name}: {error}") from None
        assert found.instances is not None
        return found.instances


_ONE = threading.Lock()
"""A process works at one block at a time, however many threads dask gives it: this bounds its
memory, and torch has threads of its own."""


def unpacked(file: Path) -> tuple[Labels, int]:
    """A block's own objects, and how many of them reach the end of what it sees."""
    with np.load(file) as packed:
        return packed["labels"], int(packed["reaching"])


def size_of(image: LazyImage) -> tuple[int, int]:
    """Height and width of an image that is read in windows."""
    assert image.size is not None
    return image.size


def _read(image: LazyImage, block: Block) -> Image:
    assert image.read_window is not None
    return image.read_window(*block.window)


def pixels_checksum(image: LazyImage) -> str:
    """Of type, shape and pixels of an image that is read in windows."""
    checksum, told = 0, ""
    for block in blocks_of(size_of(image), LARGE, 0, (1, 1)):
        pixels = _read(image, block)
        checksum = zlib.crc32(np.ascontiguousarray(pixels).tobytes(), checksum)
        told = f"{pixels.dtype} {(len(pixels), *size_of(image))}"
    return f"{told} {checksum:08x}"


@contextmanager
def working_folder(out: Path, facts: Mapping[str, Any], *, resume: bool) -> Iterator[Path]:
    """The folder of finished blocks of `out`, in which this process works alone.

    Args:
        out: what is to be written.
        facts: what it is made of, as JSON gives it back; of other things no block is taken.
        resume: whether blocks that are there are gone on with.

    Raises:
        CheckpointError: there are such, and they are not to be, or are of other facts; or another
            process is at work.
    """
    folder = out.with_name(f"{out.name}.blocks")
    told = folder / "made_of.json"
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / ".lock", timeout=0)
    try:
        held = lock.acquire()
    except Timeout:
        raise CheckpointError(f"another process is at work on {str(out)!r}: wait for it.") from None
    with held:
        remedy = f"or remove {str(folder)!r}."
        if told.exists() and not resume:
            raise CheckpointError(
                f"{str(out)!r} was begun: go on with it (resume=True, --resume), {remedy}"
            )
        theirs = json.loads(told.read_text()) if told.exists() else facts
        for name in {**theirs, **facts}:
            if theirs.get(name) == facts.get(name):
                continue
            what, was, now = first_difference(name, theirs.get(name), facts.get(name))
            raise CheckpointError(
                f"{str(out)!r} was begun with {what} = {was}, not {now}: give the same to go on "
                f"with it, {remedy}"
            )
        if not told.exists():
            write_file(told, json.dumps(facts, indent=2).encode())
        yield folder
