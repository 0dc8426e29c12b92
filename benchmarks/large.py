"""Segmenting block by block: what it changes, and the memory that it takes.

    python benchmarks/large.py seams [--side 4096]
    python benchmarks/large.py memory [--side 20000] [--tissue 0.15] [--limit-gib 3]

The image is a mosaic of the real image of nuclei that StarDist ships, each piece of 512 x 512
turned or flipped at random (seed 0), uint16; the network is the bundled one.

`seams`: how many objects there are in one piece and by blocks of the default size, and the pooled
scores of one against the other. `memory`: the peak resident set (Linux, torch included) of a
process that segments a zarr image of side x side pixels into OME-Zarr and into a tiled BigTIFF;
it fails above the limit. Of that image a share `tissue`, in one piece, is mosaic, and the rest is
blank as glass is; 1 fills all of it.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

PIECE = 512


def pieces() -> Callable[[], Any]:
    """Draws pieces of the mosaic, with a little noise, so that no two are alike."""
    from stardist.data import test_image_nuclei_2d

    piece = test_image_nuclei_2d(return_mask=True)[0].astype(np.uint16)
    rng = np.random.default_rng(0)

    def draw() -> Any:
        turned = np.rot90(piece, rng.integers(4))
        turned = turned[:, ::-1] if rng.random() < 0.5 else turned
        return turned + rng.integers(0, 8, turned.shape, dtype=np.uint16)

    return draw


def write_image(path: Path, side: int, tissue: float) -> None:
    import zarr

    draw = pieces()
    array = zarr.create_array(path, shape=(side, side), chunks=(PIECE, PIECE), dtype=np.uint16)
    filled = round(side * tissue**0.5)
    for y in range(0, filled, PIECE):
        for x in range(0, filled, PIECE):
            height, width = min(PIECE, filled - y), min(PIECE, filled - x)
            array[y : y + height, x : x + width] = draw()[:height, :width]


def seams(side: int) -> dict[str, Any]:
    from selfadapt import match, open_images, segment_large
    from selfadapt_smp import SmpAdapter

    adapter = SmpAdapter.from_pretrained("demo")
    draw, count = pieces(), -(-side // PIECE)
    image = np.block([[draw() for _ in range(count)] for _ in range(count)])[:side, :side]
    whole = adapter.segment(image)
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "labels.zarr"
        found = segment_large(adapter, image, out, progress=False)
        labels = open_images(out, labels=True)[0].read()[0]
    (at50, at90) = match(whole, labels, (0.5, 0.9))
    objects = int(whole.max())
    return {
        "in one piece": objects,
        "by blocks": found,
        "difference, %": round(100 * abs(found - objects) / objects, 3),
        "F1 at IoU 0.5": round(2 * at50.tp / (objects + found), 5),
        "F1 at IoU 0.9": round(2 * at90.tp / (objects + found), 5),
    }


def segment_and_measure(path: str, out: str) -> None:
    import torch

    from selfadapt import segment_large
    from selfadapt_smp import SmpAdapter

    torch.set_num_threads(2)
    found = segment_large(SmpAdapter.from_pretrained("demo"), path, out, progress=False)
    status = Path("/proc/self/status").read_text().splitlines()
    peak = next(int(line.split()[1]) for line in status if line.startswith("VmHWM")) / 2**20
    print(json.dumps({"objects": found, "peak resident GiB": round(peak, 2)}))


def memory(side: int, tissue: float, limit: float, kinds: list[str]) -> list[dict[str, Any]]:
    reports = []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "image.zarr"
        write_image(path, side, tissue)
        for kind in kinds:
            start, out = time.monotonic(), str(Path(folder) / f"labels.{kind}")
            output = subprocess.check_output([sys.executable, __file__, "measure", str(path), out])
            report = {"side": side, "tissue": tissue, "image GiB": round(side**2 * 2 / 2**30, 2)}
            report |= {"out": kind} | json.loads(output.splitlines()[-1])
            reports.append(report | {"seconds": round(time.monotonic() - start)})
            if report["peak resident GiB"] > limit:
                raise SystemExit(f"{report}: more than {limit} GiB")
    return reports


def main() -> None:
    if sys.argv[1:2] == ["measure"]:
        segment_and_measure(*sys.argv[2:])
        return
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=("seams", "memory"))
    parser.add_argument("--side", type=int)
    parser.add_argument("--tissue", type=float, default=0.15)
    parser.add_argument("--limit-gib", type=float, default=3.0)
    parser.add_argument("--kinds", nargs="+", default=["zarr", "tif"])
    args = parser.parse_args()
    if args.what == "seams":
        print(json.dumps(seams(args.side or 4096), indent=2))
    else:
        told = memory(args.side or 20_000, args.tissue, args.limit_gib, args.kinds)
        print(json.dumps(told, indent=2))


if __name__ == "__main__":
    main()
