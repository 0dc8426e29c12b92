"""What microscopes write, read by bioio where it is installed.

bioio does not read the other formats: it takes whole planes where a window of a slide is asked
for, and knows no alpha (docs/benchmarks.md).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from selfadapt._errors import ImageError
from selfadapt._lazy import MICROSCOPES, LazyImage, list_axes, naming
from selfadapt._normalize import Image


def readable(suffix: str) -> bool:
    return find_spec("bioio") is not None and (
        find_spec(MICROSCOPES[suffix].replace("-", "_")) is not None
    )


def remedy(suffix: str) -> str:
    return f"To read {suffix} files: pip install 'selfadapt[{suffix[1:]}]'"


@dataclass(frozen=True)
class _Scene:
    """A scene of a file that bioio reads, opened at each access."""

    path: Path
    scene: int
    shape: tuple[int, ...]

    def __getitem__(self, index: Any) -> Image:
        from bioio import BioImage  # seconds, and only here

        with naming(self.path.name):
            image = BioImage(self.path)
            image.set_scene(self.scene)
            return np.asarray(image.dask_data[index].compute(scheduler="synchronous"))


def list_scenes(path: Path) -> Iterator[LazyImage]:
    if not readable(path.suffix.lower()):
        raise ImageError(f"{path.name} cannot be read. {remedy(path.suffix.lower())}")
    from bioio import BioImage

    with naming(path.name):
        image = BioImage(path)
        scenes = []
        for index in range(len(image.scenes)):
            image.set_scene(index)
            scenes.append((_Scene(path, index, tuple(image.shape)), str(image.dims.order)))
    for scene, axes in scenes:
        part = f"series{scene.scene}" if len(scenes) > 1 else ""
        yield from list_axes(scene, axes, path.name, part)
