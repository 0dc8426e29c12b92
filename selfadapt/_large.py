"""Instances of an image that is larger than memory, block by block, on one machine or many."""

import json
import logging
import shutil
from collections.abc import Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from tqdm import tqdm

from selfadapt._adapter import Adapter, no_decode
from selfadapt._block_job import Job, pixels_checksum, size_of, unpacked, working_folder
from selfadapt._blocks import Block, add_objects, blocks_of
from selfadapt._cluster import Cluster
from selfadapt._disk import appearing, write_file
from selfadapt._errors import ConfigError, ImageError
from selfadapt._images import open_images
from selfadapt._input import check_settled, refuse_not_finite
from selfadapt._label_files import create_ome_zarr, write_tiled_tiff
from selfadapt._lazy import LazyImage
from selfadapt._network import check_network, checksum_of

logger = logging.getLogger(__name__)

WHOLE = 2**24
"""The shell segments images of up to so many pixels (4096 x 4096) in one piece."""
BLOCK, OVERLAP = 2048, 128
"""Default sides of a block and of what it sees beyond, in pixels of the network."""
LEAST_BLOCK = 16
"""In pixels of the image."""


def segment_large(
    adapter: Adapter,
    image: Any,
    out: str | Path,
    *,
    block: int | None = None,
    overlap: int | None = None,
    client: Any = None,
    resume: bool = False,
    channel_axis: int | None = None,
    progress: bool = True,
    notes: Mapping[str, Any] | None = None,
) -> int:
    """Write the instances of an image of any size, which memory need not hold.

    The image is read in blocks that overlap and are normalised as the whole of it. An object
    belongs to the block in which its centre lies, which has seen all of it: none is cut.

    Args:
        adapter: which network, and how images go in.
        image: an image that can be read in windows: zarr, tiled TIFF, an array or a `LazyImage`;
            anything that `open_images` takes and that holds one image.
        out: what to write: OME-Zarr 0.5 (`.zarr`, int32) or a tiled BigTIFF (`.tif`, `.tiff`;
            uint16 where that holds the labels, else int32). Beside it lies a folder `.blocks`
            until it is done.
        block: side of a block, in pixels of the image; memory grows with its square. Default: 2048
            at the network's scale, or at the image's where that is finer.
        overlap: how far a block sees beyond its border, in pixels of the image: more than the
            diameter of the largest objects. Default: 128 at the network's scale.
        client: of a dask cluster, a `distributed.Client` or the address of its scheduler, whose
            workers segment the blocks, each one at a time; they read the image themselves. None:
            this process does.
        resume: go on with what was left by a process that was ended.
        channel_axis: position of the channels, as in `open_images`.
        progress: whether a bar is shown.
        notes: facts for the description of a TIFF, or `selfadapt` in the attributes of zarr.

    Returns:
        How many objects there are, labelled 1, 2, ...

    Raises:
        ConfigError: an option is out of range; `out` is there, or of no known kind.
        ImageError: there is not one image, or it cannot be read in windows or used.
        ModelError: the adapter cannot decode.
        CheckpointError: `out` was begun, and this is not to go on with it, or is something else;
            it cannot be written; or another process is at work on it.
    """
    out = Path(out)
    lazy = _one_image(image, channel_axis)
    check_network(getattr(adapter, "model", None), finite=False)
    if not adapter.can_decode:
        raise no_decode(adapter)
    check_settled(adapter)
    block, overlap = _sides(adapter, block, overlap)
    if out.suffix.lower() not in (".zarr", ".tif", ".tiff"):
        raise ConfigError(f"{str(out)!r} is of no known kind: it must end in .zarr, .tif or .tiff.")
    if out.exists():
        raise ConfigError(f"{str(out)!r} exists already: give a new name.")
    cluster = None if client is None else Cluster(client)
    rows, columns = (max(round(m / adapter.input.scale), 1) for m in adapter.multiples)
    blocks = blocks_of(size_of(lazy), block, overlap, (rows, columns))
    facts = _facts(adapter, lazy, block, overlap) | dict(notes or {})
    facts = json.loads(json.dumps(facts))  # tuples are lists in a file
    whole = lazy.sample()
    refuse_not_finite(whole, str(lazy))
    with working_folder(out, facts, resume=resume) as folder:
        job = Job(adapter, lazy, whole)
        _segment_blocks(job, blocks, folder, cluster, progress=progress)
        count = _join(lazy, blocks, folder, out, facts)
    shutil.rmtree(folder)
    return count


def is_large(image: LazyImage) -> bool:
    """Whether the shell segments an image block by block: a large one, read in windows."""
    size = image.size
    return image.read_window is not None and size is not None and size[0] * size[1] > WHOLE


def _segment_blocks(
    job: Job, blocks: Sequence[Block], folder: Path, cluster: Cluster | None, *, progress: bool
) -> None:
    """Do those that are not in the folder yet."""
    missing = [block for block in blocks if not _file(folder, block).exists()]
    alone = ((block, job(block)) for block in missing)
    done = alone if cluster is None else cluster.map(job, missing)
    bar = tqdm(total=len(blocks), unit="block", leave=False, disable=not progress)
    with bar, closing(done):
        bar.update(len(blocks) - len(missing))
        for block, packed in done:
            write_file(_file(folder, block), packed)
            bar.update()


def _join(
    image: LazyImage, blocks: Sequence[Block], folder: Path, out: Path, facts: Mapping[str, Any]
) -> int:
    """Write the objects of all blocks to `out`; how many there are."""
    as_zarr = out.suffix.lower() == ".zarr"
    count = reaching = 0
    with appearing(out if as_zarr else folder / "labels.zarr") as partial:
        labels = create_ome_zarr(partial, size_of(image), "labels", facts)
        for block in blocks:
            found, too_far = unpacked(_file(folder, block))
            count = add_objects(labels, block, found, count)
            reaching += too_far
        if not as_zarr:
            with appearing(out) as tiff:
                write_tiled_tiff(tiff, labels, count, facts)
    if reaching:
        logger.warning(
            "%s: %d object(s) reach the end of what their block sees, and may be cut: give an "
            "overlap larger than the largest object.",
            image,
            reaching,
        )
    return count


def _file(folder: Path, block: Block) -> Path:
    return folder / f"{block}.npz"


def _one_image(image: Any, channel_axis: int | None) -> LazyImage:
    given = [image] if isinstance(image, LazyImage) else image
    images = open_images(given, channel_axis=channel_axis)
    if len(images) != 1:
        raise ImageError(f"there are {len(images)} images: give one at a time.")
    if images[0].size is None or images[0].read_window is None:
        raise ImageError(
            f"{images[0]} cannot be read in windows: save it as zarr or tiled TIFF, or segment it "
            "whole."
        )
    return images[0]


def _sides(adapter: Adapter, block: int | None, overlap: int | None) -> tuple[int, int]:
    """Block and overlap in pixels of the image, as given or by the adapter's scale."""
    scale = adapter.input.scale
    overlap = round(OVERLAP / scale) if overlap is None else overlap
    block = max(round(BLOCK / max(scale, 1)), overlap) if block is None else block
    for name, value, least in (("block", block, LEAST_BLOCK), ("overlap", overlap, 0)):
        if type(value) is not int or value < least:
            raise ConfigError(f"{name}={value!r} is not allowed: give pixels, {least} or more.")
    return block, overlap


def _facts(adapter: Adapter, image: LazyImage, block: int, overlap: int) -> dict[str, Any]:
    """What the instances depend on."""
    return {
        "image": pixels_checksum(image),
        "model": checksum_of(adapter.model),
        "adapter": type(adapter).__name__,
        "options": adapter.options(),
        "input": adapter.input.to_dict(),
        "block": block,
        "overlap": overlap,
    }
