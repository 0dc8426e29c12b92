"""How many crops a network should be given at once on a CPU: time of 64 crops, in parts.

    python benchmarks/parts.py [--threads 1]

Crops of 96 pixels; processor time, median of three rounds, over that of all 64 in one piece.
"""

import argparse
import statistics
import time

import torch
from common import table
from step import NETWORKS

PARTS = (2, 4, 8, 16, 32, 64)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=1)
    torch.set_num_threads(parser.parse_args().threads)
    rows = []
    for title, make in NETWORKS.values():
        adapter = make()
        model = adapter.model.eval()
        if adapter.channels_last:
            model = model.to(memory_format=torch.channels_last)
        images = torch.randn(64, adapter.channels or 1, 96, 96)
        seconds: dict[int, list[float]] = {size: [] for size in PARTS}
        for round_ in range(4):
            for size, times in seconds.items():
                began = time.process_time()
                with torch.no_grad():
                    for part in images.split(size):
                        adapter.forward(model, part)
                if round_:  # the first warms up
                    times.append(time.process_time() - began)
        whole = statistics.median(seconds[64])
        rows.append([title, *(f"{statistics.median(t) / whole:.2f}" for t in seconds.values())])
    print(table(["network", *map(str, PARTS)], rows))


if __name__ == "__main__":
    main()
