"""Peak memory of `adapt` on a zarr array that is larger than the memory it is allowed.

    python benchmarks/memory.py [--side 40000] [--limit-gib 2]

Writes an uint16 image of side x side pixels (40000: 3.2 GB in memory) made of tiles of a real
image of nuclei, adapts the bundled network to it in a process of its own, prints the peak resident
set of that process (Linux), torch included, and fails if it exceeds the limit.
"""

import argparse
import json
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


def adapt_and_measure(path: str) -> None:
    import torch

    from selfadapt import Config, adapt
    from selfadapt_smp import SmpAdapter

    torch.set_num_threads(2)
    config = Config(iterations=40, validate_every=20, device="cpu")
    adapter = SmpAdapter.from_pretrained("demo")
    result = adapt(adapter, path, config=config, stop=None, progress=False)
    status = Path("/proc/self/status").read_text().splitlines()
    peak = next(int(line.split()[1]) for line in status if line.startswith("VmHWM")) / 2**20
    print(json.dumps({"iterations": result.iteration, "peak resident GiB": round(peak, 2)}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--side", type=int, default=40000)
    parser.add_argument("--limit-gib", type=float, default=2.0)
    parser.add_argument("--adapt", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.adapt:
        adapt_and_measure(args.adapt)
        return
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "image.zarr"
        size = write_image(path, args.side)
        start = time.monotonic()
        output = subprocess.check_output([sys.executable, __file__, "--adapt", str(path)])
    report = json.loads(output.splitlines()[-1])
    report |= {"image GiB": round(size, 2), "limit GiB": args.limit_gib}
    print(json.dumps(report | {"seconds": round(time.monotonic() - start)}, indent=2))
    if report["peak resident GiB"] > args.limit_gib:
        raise SystemExit("the process needed more memory than it is allowed")


if __name__ == "__main__":
    main()
