"""Peak memory of `adapt` on a zarr array that is larger than the memory it is allowed.

    python benchmarks/memory.py [--side 40000] [--limit-gib 2]

Writes an uint16 image of side x side pixels (40000: 3.2 GB in memory) made of tiles of a real
image of nuclei, adapts the bundled network to it in a process whose data segment is limited, and
prints the peak resident set of that process.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np


def write_image(path: Path, side: int) -> float:
    import zarr
    from stardist.data import test_image_nuclei_2d

    tile = test_image_nuclei_2d(return_mask=True)[0].astype(np.uint16)
    rng = np.random.default_rng(0)
    array = zarr.create_array(path, shape=(side, side), chunks=(512, 512), dtype=np.uint16)
    for y in range(0, side, 512):
        height = min(512, side - y)
        row = np.tile(tile[:height], (1, -(-side // 512)))[:, :side]
        array[y : y + height] = row + rng.integers(0, 8, row.shape, dtype=np.uint16)
    return float(np.prod(array.shape)) * 2 / 2**30


def adapt_limited(path: str, limit_gib: float) -> None:
    import torch

    from selfadapt import Config, adapt
    from selfadapt_smp import SmpAdapter

    torch.set_num_threads(2)
    # private data (heap, arrays), not the mapped libraries of torch
    resource.setrlimit(resource.RLIMIT_DATA, (int(limit_gib * 2**30),) * 2)
    config = Config(iterations=40, validate_every=20, device="cpu")
    result = adapt(
        SmpAdapter.from_pretrained("demo"), path, config=config, stop=None, progress=False
    )
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(json.dumps({"iterations": result.iteration, "peak resident GiB": round(peak, 2)}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--side", type=int, default=40000)
    parser.add_argument("--limit-gib", type=float, default=2.0)
    parser.add_argument("--adapt", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.adapt:
        adapt_limited(args.adapt, args.limit_gib)
        return
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "image.zarr"
        size = write_image(path, args.side)
        start = time.monotonic()
        command = [
            sys.executable,
            __file__,
            "--adapt",
            str(path),
            "--limit-gib",
            str(args.limit_gib),
        ]
        report = json.loads(subprocess.check_output(command).splitlines()[-1])
    report |= {"image GiB": round(size, 2), "limit GiB": args.limit_gib}
    print(json.dumps(report | {"seconds": round(time.monotonic() - start)}, indent=2))


if __name__ == "__main__":
    main()
