"""What reading images costs: bioio, and what `open_images` uses instead.

    python benchmarks/reading.py

Each figure is that of a process of its own: seconds until the library is imported, and, for a
window of 512 x 512 pixels of a tiled TIFF of 12,000 x 12,000 (288 MB), seconds and how far memory
rises. The median of three, on one thread.
"""

import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import tifffile
from common import table

SIDE, WINDOW = 12_000, "4000:4512"
MEASURE = """
import logging, re, time, warnings
warnings.simplefilter("ignore"); logging.disable()
import numpy, torch
def peak():
    return int(re.search(r"VmHWM:\\s*(\\d+)", open("/proc/self/status").read())[1]) / 1024
began = time.perf_counter()
{imported}
imported = time.perf_counter() - began
open("/proc/self/clear_refs", "w").write("5")  # the peak counts from here
before, began = peak(), time.perf_counter()
{read}
assert pixels.shape[-2:] == (512, 512) and pixels.mean() > 0
print(imported, time.perf_counter() - began, peak() - before)
"""
WAYS = {
    "open_images (tifffile, zarr)": (
        "from selfadapt._images import open_images",
        "rows = slice({0}); pixels = open_images({1!r})[0].read_window(rows, rows)",
    ),
    "bioio, bioio-tifffile": (
        "from bioio import BioImage; import bioio_tifffile",
        "pixels = BioImage({1!r}, reader=bioio_tifffile.Reader).dask_data[..., {2}, {2}].compute()",
    ),
}


def measured(way: str, file: Path) -> list[float]:
    """Median seconds to import, seconds to read, and MiB."""
    imported, read = WAYS[way]
    told = read.format(WINDOW.replace(":", ", "), str(file), WINDOW)
    command = [sys.executable, "-c", MEASURE.format(imported=imported, read=told)]
    runs = [
        subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True) for _ in range(3)
    ]
    figures = [list(map(float, run.stdout.split()[-3:])) for run in runs]
    return [statistics.median(column) for column in zip(*figures, strict=True)]


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "slide.tif"
        pixels = np.random.default_rng(0).integers(0, 4000, (SIDE, SIDE)).astype(np.uint16)
        tifffile.imwrite(file, pixels, tile=(512, 512))
        rows = []
        for way in WAYS:
            seconds, reading, rise = measured(way, file)
            rows.append([way, f"{seconds:.1f}", f"{reading:.2f}", f"{rise:.0f}"])
    print(table(["way", "import, s", "window, s", "memory, MiB"], rows))


if __name__ == "__main__":
    main()
