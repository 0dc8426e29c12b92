"""Images in files and folders. Nothing is read that is not asked for."""

import logging
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from selfadapt._disk import UNFINISHED
from selfadapt._errors import ImageError, first_line
from selfadapt._lazy import MICROSCOPES, PICTURES, SUFFIXES, TIFF, LazyImage, failing
from selfadapt._masks import made_of
from selfadapt._microscopes import list_scenes, readable, remedy
from selfadapt._pictures import read_picture
from selfadapt._tiff import list_tiff
from selfadapt._zarr import is_zarr, list_zarr, open_zarr

logger = logging.getLogger(__name__)


def list_guarded(path: Path, channel_axis: int | None, *, labels: bool) -> Iterator[LazyImage]:
    """As `list_path`, of one among others: what is wrong with it shows when it is read."""
    try:
        yield from list(list_path(path, channel_axis, labels=labels))
    except ImageError as error:
        yield failing(path.name, error)


def list_path(path: Path, channel_axis: int | None, *, labels: bool) -> Iterator[LazyImage]:
    """Images of a file or folder; `labels` says that they are label images."""
    refuse_missing(path)
    if not path.is_dir():
        yield from _list_file(path, channel_axis, labels)
    elif is_zarr(path):
        yield from list_zarr(open_zarr(path), path.name, channel_axis)
    else:
        try:
            entries = _entries(path, labels)
        except OSError as error:  # it may not be looked into
            raise ImageError(f"folder {str(path)!r} cannot be read: {first_line(error)}.") from None
        for entry in entries:
            yield from list_guarded(entry, channel_axis, labels=labels)


def _entries(folder: Path, labels: bool) -> list[Path]:
    """What in a folder is images, by name."""
    # systems and editors put hidden files there
    entries = sorted(
        entry
        for entry in folder.iterdir()
        if entry.name[0] != "." and entry.suffix not in UNFINISHED
    )
    names = {entry.name for entry in entries if _suffix(entry) in SUFFIXES or is_zarr(entry)}
    made = set() if labels else made_of(names)
    for entry in entries:
        if entry.name in made:
            logger.warning(
                "%s was made of another image (masks, flows, ...): left out.", entry.name
            )
    return [entry for entry in entries if entry.name not in made and _is_listed(entry)]


def _is_listed(entry: Path) -> bool:
    """Whether an entry of a folder is images; what could be and is not is named."""
    if entry.is_dir() and is_zarr(entry):
        return True
    if (suffix := _suffix(entry)) in MICROSCOPES and not readable(suffix):
        logger.warning("%s: left out. %s", entry.name, remedy(suffix))
    elif suffix not in SUFFIXES and not (suffix == ".zarr" and entry.is_dir()):
        pass
    elif entry.is_dir():
        logger.warning("%s is a folder: left out. Give it by itself.", entry.name)
    elif not entry.exists():
        logger.warning("%s is a link to nothing: left out.", entry.name)
    elif not entry.is_file():  # a pipe would wait for ever
        logger.warning("%s is no file: left out.", entry.name)
    else:
        return True
    return False


def refuse_missing(path: Path) -> None:
    """Raise ImageError if there is nothing of that name."""
    try:
        exists = path.exists()
    except (OSError, ValueError) as error:  # a name that no file can have, a folder that is closed
        raise ImageError(f"{str(path)!r} is no file to be read: {first_line(error)}.") from None
    if not exists:
        raise ImageError(f"there is no file or folder {str(path)!r}.")


def _suffix(path: Path) -> str:
    return path.suffix.lower()


def _list_file(path: Path, channel_axis: int | None, labels: bool) -> Iterator[LazyImage]:
    suffix = _suffix(path)
    if suffix in (*TIFF, *PICTURES):
        kind = _content(path) or suffix
        if kind in TIFF:
            yield from list_tiff(path, channel_axis, labels)
        else:
            yield LazyImage(path.name, partial(read_picture, path, labels))
    elif suffix in MICROSCOPES:
        yield from list_scenes(path)
    else:
        raise ImageError(f"{path.name} is no image that can be read: {', '.join(SUFFIXES)} are.")


STARTS = {
    b"II*\0": ".tif", b"MM\0*": ".tif", b"II+\0": ".tif", b"MM\0+": ".tif",
    b"\x89PNG": ".png", b"\xff\xd8\xff": ".jpg",
}  # fmt: skip
"""First bytes of a file, and what it then is, whatever it is called."""


def _content(path: Path) -> str | None:
    """What a file is by its first bytes; None where they do not say it."""
    try:
        with path.open("rb") as file:
            start = file.read(4)
    except OSError:  # named where it is read
        return None
    return next((kind for magic, kind in STARTS.items() if start.startswith(magic)), None)
