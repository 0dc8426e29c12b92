"""Files and folders that appear complete or not at all, also after a power cut.

Each is written under another name, flushed to the disk, and renamed.
"""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from selfadapt._errors import CheckpointError, first_line

UNFINISHED = (".partial", ".old")
"""Ends of the names that files and folders have until they appear."""


def write_file(path: Path, data: bytes) -> None:
    """Write a file that appears complete or not at all."""
    with appearing(path) as partial:
        partial.write_bytes(data)


@contextmanager
def appearing(target: Path) -> Iterator[Path]:
    """A path to write a file or folder to, which then takes the place of `target`.

    Raises:
        CheckpointError: it cannot be written.
    """
    partial, old = (target.with_name(target.name + end) for end in UNFINISHED)
    try:
        _remove(partial)  # were it a link, writing would follow it
        _remove(old)
        yield partial
        _flush(partial)
        if target.is_dir() and not target.is_symlink():
            os.replace(target, old)
        os.replace(partial, target)
        _remove(old)
        _flush_one(target.parent)
    except (OSError, SafetensorError) as error:
        raise _not_written(target, error) from None
    except RuntimeError as error:  # torch's for a full disk, among others
        if not any(word in str(error) for word in _TORCH_WRITES):
            raise
        raise _not_written(target, error) from None


_TORCH_WRITES = ("PytorchStreamWriter", "inline_container", "open file")
"""What is in such an error."""


def _not_written(target: Path, error: Exception) -> CheckpointError:
    reason = getattr(error, "strerror", None) or first_line(error)
    return CheckpointError(
        f"{str(target)!r} cannot be written ({reason}): mend that and go on with it (resume); "
        "what was written before is whole."
    )


def _flush(path: Path) -> None:
    """Bring a file or all of a folder to the disk."""
    for entry in path.rglob("*") if path.is_dir() else ():
        _flush_one(entry)
    _flush_one(path)


def _flush_one(path: Path) -> None:
    if path.is_dir() and os.name == "nt":  # Windows opens no folders
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
