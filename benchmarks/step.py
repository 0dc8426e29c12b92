"""Time and peak memory of one step as a ratio to what the models alone cost.

    python benchmarks/step.py [--rounds 5] [--network cellpose|small|stardist]

The floor of a step: the teacher's forward on `views` x `batch` crops, the student's forward and
backward, and AdamW. Both sides run in the same process, in turns, on the same crops. Peak memory
is that of a fresh process per side (resident set on the CPU, allocated memory on CUDA), less what
the process held before its first step.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from selfadapt import Adapter, Binary, Config, OutputSpec, SelfAdaptation, Vector
from selfadapt_stardist import Architecture, StarDist2D, StardistAdapter


class CellposeSized(Adapter):
    """Cellpose's CPnet, its heads and its bottleneck, with random weights."""

    size_multiple = 8
    channels = 2

    def __init__(self, widths: list[int]) -> None:
        from cellpose.resnet_torch import CPnet

        torch.manual_seed(0)
        self.model = CPnet(widths, 3, sz=3)
        self.model.mkldnn = False
        self.outputs = OutputSpec(flow=Vector(), cellprob=Binary())

    def forward(self, model: nn.Module, images: Tensor) -> dict[str, Tensor]:
        return self.outputs.split(model(images)[0])

    def embedding_module(self, model: nn.Module) -> nn.Module:
        return model.get_submodule("downsample.down.res_down_3")


WIDTHS = {"small": [2, 12, 24, 48, 96], "cellpose": [2, 32, 64, 128, 256]}


def floor_step(run: SelfAdaptation, config: Config) -> Callable[[Tensor], None]:
    """The models alone: no view is moved, no mask, no augmentation, no L2-SP, no EMA."""
    adapter, trained = run.adapter, run.parameters()
    optimizer = torch.optim.AdamW(trained, lr=config.learning_rate)

    def step(images: Tensor) -> None:
        with torch.no_grad():
            adapter.forward(run.teacher, images.repeat(config.views, 1, 1, 1))
        outputs = adapter.forward(run.student, images)
        loss = torch.stack([output.square().mean() for output in outputs.values()]).sum()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()

    return step


def make(args: argparse.Namespace) -> tuple[dict[str, Callable[[Tensor], object]], Tensor]:
    adapter: Adapter
    if args.network == "stardist":
        adapter = StardistAdapter(StarDist2D(Architecture(grid=(2, 2))))
    else:
        adapter = CellposeSized(WIDTHS[args.network])
    config = Config(batch_size=args.batch, crop=args.crop, views=args.views, iterations=10**6)
    run = SelfAdaptation(adapter, config)
    run._set_training()
    images = torch.randn(args.batch, adapter.channels or 1, args.crop, args.crop, device=run.device)
    return {"floor": floor_step(run, config), "step": run.step}, images


def synchronise() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def peak_mib(args: argparse.Namespace) -> float:
    """Peak memory of three steps of one side, in MiB beyond what was there before."""
    steps, images = make(args)
    before = resident_mib("VmRSS")
    if not torch.cuda.is_available():
        Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far (Linux)
    for _ in range(3):
        steps[args.side](images)
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    return resident_mib("VmHWM") - before


def resident_mib(name: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(name))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--network", choices=(*WIDTHS, "stardist"), default="small")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--crop", type=int, default=96)
    parser.add_argument("--views", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--side", choices=("floor", "step"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.side:
        print(peak_mib(args))
        return
    steps, images = make(args)
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for round_ in range(args.rounds + 1):
        for name, step in steps.items():
            synchronise()
            start = time.perf_counter()
            step(images)
            synchronise()
            if round_:  # the first round warms up
                seconds[name].append(time.perf_counter() - start)
    ratios = [s / f for s, f in zip(seconds["step"], seconds["floor"], strict=True)]
    memory = {
        side: float(subprocess.check_output([sys.executable, *sys.argv, "--side", side]))
        for side in steps
    }
    print(
        json.dumps(
            {
                "network": args.network,
                "device": "cuda" if torch.cuda.is_available() else "cpu",
                "threads": args.threads,
                "batch, crop, views": [args.batch, args.crop, args.views],
                "floor seconds (median)": round(statistics.median(seconds["floor"]), 4),
                "step seconds (median)": round(statistics.median(seconds["step"]), 4),
                "time ratio (median, min, max)": [
                    round(f(ratios), 3) for f in (statistics.median, min, max)
                ],
                "floor peak MiB": round(memory["floor"]),
                "step peak MiB": round(memory["step"]),
                "memory ratio": round(memory["step"] / memory["floor"], 3),
            },
            indent=2,
        )
    )


if __name__ == "__main__":
    main()
