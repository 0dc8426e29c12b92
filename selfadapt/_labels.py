"""Instances of an image as files: label TIFF, OME-Zarr, GeoJSON for QuPath, ROIs for ImageJ."""

import io
import json
import zipfile
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import tifffile
import zarr
from numpy.typing import NDArray

from selfadapt._disk import appearing
from selfadapt._errors import ConfigError
from selfadapt._label_files import NOTE, create_ome_zarr
from selfadapt._outlines import Polygon, outlines

Labels = NDArray[np.int32]
Note = Mapping[str, Any]
"""Of what the labels were made, for `--resume`: what JSON can hold."""


@dataclass(frozen=True)
class LabelFormat:
    """A way to write labels.

    Args:
        suffix: of its files.
        write: makes the file or folder of labels [H, W], 0 for background, and a note.
        read_note: gives the note of such a file; raises or gives anything for one of others.
    """

    suffix: str
    write: Callable[[Path, Labels, Note], object]
    read_note: Callable[[Path], Any]


def check_format(name: str) -> None:
    """Raise ConfigError if what a format needs is missing."""
    if name == "roi" and find_spec("roifile") is None:
        raise ConfigError("--format roi needs roifile: pip install 'selfadapt[roi]'")


def write_labels(file: Path, kind: LabelFormat, labels: Labels, note: Note) -> None:
    """Write labels to a file or folder that appears complete or not at all.

    Raises:
        CheckpointError: it cannot be written.
    """
    with appearing(file) as partial:
        kind.write(partial, labels, note)


def read_note(file: Path, kind: LabelFormat) -> dict[str, Any]:
    """Of what a file was made; nothing is known of those of others."""
    with suppress(Exception):  # every decoder raises its own kinds
        note = kind.read_note(file)
        return note if isinstance(note, dict) else {}
    return {}


def _narrow(labels: Labels) -> NDArray[Any]:
    """16 bits where they suffice, which every program reads."""
    return labels.astype(np.uint16) if labels.max(initial=0) < 2**16 else labels


def _write_tiff(file: Path, labels: Labels, note: Note) -> None:
    packed = io.BytesIO()
    description = json.dumps(note)
    tifffile.imwrite(
        packed, _narrow(labels), compression="zlib", description=description, metadata=None
    )
    file.write_bytes(packed.getvalue())


def _note_of_tiff(file: Path) -> Any:
    with tifffile.TiffFile(file) as tiff:
        return json.loads(tiff.pages.first.description)


def _write_zarr(folder: Path, labels: Labels, note: Note) -> None:
    kept = _narrow(labels)
    height, width = kept.shape
    create_ome_zarr(folder, (height, width), "labels", note, kept.dtype)[:] = kept


def _note_of_zarr(folder: Path) -> Any:
    return zarr.open_group(folder, mode="r").attrs[NOTE]


def _write_geojson(file: Path, labels: Labels, note: Note) -> None:
    """A feature for each instance, in pixels, as QuPath imports them (its 0.4 and later)."""
    features = []
    for label, parts in outlines(labels):
        closed = [[[*ring.tolist(), ring[0].tolist()] for ring in part] for part in parts]
        several = len(closed) > 1
        geometry = {
            "type": "MultiPolygon" if several else "Polygon",
            "coordinates": closed if several else closed[0],
        }
        properties = {"objectType": "detection", "name": str(label), "isLocked": False}
        features.append({"type": "Feature", "geometry": geometry, "properties": properties})
    content = {"type": "FeatureCollection", "features": features, NOTE: note}
    file.write_text(json.dumps(content, separators=(",", ":")))


def _note_of_geojson(file: Path) -> Any:
    return json.loads(file.read_text())[NOTE]


def _write_rois(file: Path, labels: Labels, note: Note) -> None:
    """A ROI for each instance, in a ZIP file that ImageJ's ROI Manager opens."""
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as packed:
        for label, parts in outlines(labels):
            # without a date, the same labels are the same bytes
            entry = zipfile.ZipInfo(f"{label}.roi")
            entry.compress_type = zipfile.ZIP_DEFLATED
            packed.writestr(entry, _roi(str(label), parts))
        # an entry that is no ROI would stop roifile; a comment stops nobody
        packed.comment = json.dumps(note).encode()


def _roi(name: str, parts: list[Polygon]) -> bytes:
    """As ImageJ's wand traces it; with holes or of several parts, a composite."""
    from roifile import ROI_TYPE, ImagejRoi  # optional

    rings = [ring for part in parts for ring in part]
    if len(rings) == 1:
        roi = ImagejRoi.frompoints(rings[0], name=name)
        roi.roitype = ROI_TYPE.TRACED
        return roi.tobytes()
    path: list[int] = []
    for ring in rings:
        for k, (x, y) in enumerate(ring.tolist()):
            path += [_DRAW if k else _MOVE, x, y]
        path.append(_CLOSE)
    corners = np.concatenate(rings)
    roi = ImagejRoi(roitype=ROI_TYPE.RECT, name=name)
    roi.left, roi.top = corners.min(0).tolist()
    roi.right, roi.bottom = corners.max(0).tolist()
    roi.multi_coordinates = np.array(path, np.float32)
    roi.shape_roi_size = len(path)
    return roi.tobytes()


_MOVE, _DRAW, _CLOSE = 0, 1, 4
"""Steps of a path in Java, which fills it by the even-odd rule."""


def _note_of_rois(file: Path) -> Any:
    with zipfile.ZipFile(file) as packed:
        return json.loads(packed.comment)


FORMATS = {
    "tiff": LabelFormat(".tif", _write_tiff, _note_of_tiff),
    "ome-zarr": LabelFormat(".ome.zarr", _write_zarr, _note_of_zarr),
    "geojson": LabelFormat(".geojson", _write_geojson, _note_of_geojson),
    "roi": LabelFormat(".zip", _write_rois, _note_of_rois),
}
"""By what `segment --format` calls them."""
