"""Label images that are written part by part: OME-Zarr and tiled BigTIFF."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import tifffile
import zarr
from numpy.typing import NDArray

NOTE = "selfadapt"
"""What facts are called in a file that has names."""
CHUNK, TILE = 1024, 512
"""Sides of what is written at a time, in pixels."""


def create_ome_zarr(
    path: Path,
    size: tuple[int, int],
    name: str,
    facts: Mapping[str, Any],
    kind: "np.dtype[Any] | type[np.int32]" = np.int32,
) -> "zarr.Array[Any]":
    """An empty image-label group of OME-Zarr 0.5, in one resolution; its array.

    Args:
        path: the folder to write.
        size: height and width.
        name: of the image.
        facts: what it was made of, for its attributes.
        kind: type of the labels.
    """
    axes = ("y", "x")  # of what unit is not known
    scale = {"type": "scale", "scale": [1.0, 1.0]}
    multiscale = {
        "name": name,
        "axes": [{"name": axis, "type": "space"} for axis in axes],
        "datasets": [{"path": "0", "coordinateTransformations": [scale]}],
    }
    ome = {"version": "0.5", "multiscales": [multiscale], "image-label": {}}
    group = zarr.create_group(path, zarr_format=3, attributes={"ome": ome, NOTE: dict(facts)})
    sides = min(CHUNK, size[0]), min(CHUNK, size[1])
    return group.create_array(
        "0", shape=size, chunks=sides, dtype=kind, fill_value=0, dimension_names=axes
    )


def write_tiled_tiff(
    path: Path, labels: "zarr.Array[Any]", count: int, facts: Mapping[str, Any]
) -> None:
    """A tiled BigTIFF of labels up to `count`, tile by tile: uint16 where that holds them."""
    kind = np.uint16 if count < 2**16 else np.int32
    tifffile.imwrite(
        path,
        _tiles(labels, np.dtype(kind)),
        shape=labels.shape,
        dtype=kind,
        tile=(TILE, TILE),
        bigtiff=True,
        compression="zlib",
        photometric="minisblack",
        description=json.dumps(facts),
        metadata=None,
    )


def _tiles(labels: "zarr.Array[Any]", kind: np.dtype[Any]) -> Iterator[NDArray[Any]]:
    height, width = labels.shape
    for y in range(0, height, TILE):
        strip = np.asarray(labels[y : y + TILE]).astype(kind)
        for x in range(0, width, TILE):
            tile = np.zeros((TILE, TILE), kind)
            part = strip[:, x : x + TILE]
            tile[: part.shape[0], : part.shape[1]] = part
            yield tile
