"""Images in files and folders. Nothing is read that is not asked for."""

import logging
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path

from selfadapt._errors import ImageError, first_line
from selfadapt._lazy import MICROSCOPES, PICTURES, SUFFIXES, TIFF, LazyImage, fail
from selfadapt._masks import is_made_of
from selfadapt._microscopes import list_scenes, readable, remedy
from selfadapt._pictures import read_picture
from selfadapt._tiff import list_tiff
from selfadapt._zarr import is_zarr, list_zarr, open_zarr

logger = logging.getLogger(__name__)


def list_paths(
    paths: Iterable[Path], channel_axis: int | None, *, labels: bool
) -> Iterator[LazyImage]:
    """As `list_path`, for each; whatever is wrong with one shows when it is read."""
    for path in paths:
        _refuse_missing(path)
        yield from _guarded(path.name, partial(list_path, path, channel_axis, labels=labels))


def list_path(path: Path, channel_axis: int | None, *, labels: bool) -> Iterator[LazyImage]:
    """Images of a file or folder; `labels` says that they are label images."""
    _refuse_missing(path)
    if not path.is_dir():
        yield from _list_file(path, channel_axis, labels)
    elif is_zarr(path):
        yield from list_zarr(open_zarr(path), path.name, channel_axis)
    else:
        entries = sorted(path.iterdir())
        names = {entry.name for entry in entries if _suffix(entry) in SUFFIXES or is_zarr(entry)}
        for entry in entries:
            yield from _list_entry(entry, names, channel_axis, labels)


def _list_entry(
    entry: Path, names: set[str], channel_axis: int | None, labels: bool
) -> Iterator[LazyImage]:
    """What one entry of a folder gives; what is left out is named, if it could be an image."""
    if entry.name.startswith("."):  # hidden: systems and editors put such files there
        return
    if entry.is_dir() and is_zarr(entry):
        if labels or not is_made_of(entry.name, names):
            yield from _guarded(entry.name, partial(list_path, entry, channel_axis, labels=labels))
        else:
            _say_made(entry.name)
    elif (suffix := _suffix(entry)) in MICROSCOPES and not readable(suffix):
        logger.warning("%s: left out. %s", entry.name, remedy(suffix))
    elif suffix not in SUFFIXES:
        return
    elif entry.is_dir():
        logger.warning("%s is a folder: left out. Give it by itself.", entry.name)
    elif not entry.exists():
        logger.warning("%s is a link to nothing: left out.", entry.name)
    elif not entry.is_file():  # a pipe would wait for ever
        logger.warning("%s is no file: left out.", entry.name)
    elif not labels and is_made_of(entry.name, names):
        _say_made(entry.name)
    else:
        yield from _guarded(entry.name, partial(_list_file, entry, channel_axis, labels))


def _say_made(name: str) -> None:
    logger.warning("%s was made of another image (masks, flows, ...): left out.", name)


def _refuse_missing(path: Path) -> None:
    try:
        exists = path.exists()
    except (OSError, ValueError) as error:  # a name that no file can have
        raise ImageError(f"{str(path)!r} is no name of a file: {first_line(error)}") from None
    if not exists:
        raise ImageError(f"there is no file or folder {str(path)!r}.")


def _guarded(name: str, listing: Callable[[], Iterator[LazyImage]]) -> Iterator[LazyImage]:
    """The images; or one whose error comes when it is read, as the others must not suffer."""
    try:
        yield from list(listing())
    except ImageError as error:
        yield LazyImage(name, partial(fail, error))


def _suffix(path: Path) -> str:
    return path.suffix.lower()


def _list_file(path: Path, channel_axis: int | None, labels: bool) -> Iterator[LazyImage]:
    suffix = _suffix(path)
    if suffix in PICTURES:
        yield LazyImage(path.name, partial(read_picture, path, labels))
    elif suffix in TIFF:
        yield from list_tiff(path, channel_axis, labels)
    elif suffix in MICROSCOPES:
        yield from list_scenes(path)
    else:
        raise ImageError(f"{path.name} is no image that can be read: {', '.join(SUFFIXES)} are.")
