"""selfadapt in napari: a dock widget. `napari.yaml` names it; docs/napari.md shows it."""

import importlib
import os
import sys
from contextlib import suppress


def _load_triton() -> None:
    """Load Triton, which comes with torch on Linux, so that it keeps to the LLVM that it brings.

    napari's window has loaded another LLVM by then, where Mesa draws it. Without this, Triton would
    be bound to that one and crash the process as soon as torch or torchvision imports it.
    """
    own = getattr(os, "RTLD_DEEPBIND", None)  # of Linux with glibc
    if own is None or "triton" in sys.modules:
        return
    before = sys.getdlopenflags()
    sys.setdlopenflags(before | own)
    try:
        with suppress(ImportError):
            importlib.import_module("triton")
    finally:
        sys.setdlopenflags(before)


_load_triton()
