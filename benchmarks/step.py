"""One step as a ratio to what the networks alone cost, beside others' steps.

    python benchmarks/step.py [--networks stardist ...] [--views 1 4 8] [--batch 1 8 32]
    python benchmarks/step.py --tables --docs docs

The floor of a step: the teacher's forward on `views` x `batch` crops, the student's forward and
backward, and AdamW. All sides run in one process, in turns, on the same crops. On a CPU, the time
is that of the processor, so that other work on the machine counts little. Peak memory is that of
a fresh process per side (resident set on the CPU, allocated memory on CUDA), less what the process
held before its first step. What the other sides do, and leave out, stands in `step_peers.py`.
"""

import argparse
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from common import add_line, fill, read_lines, table
from step_peers import Literal, TorchEm
from torch import Tensor, nn

from selfadapt import Adapter, Binary, Categorical, Config, OutputSpec, SelfAdaptation, Vector
from selfadapt._batch_norm import set_training
from selfadapt_smp import SmpAdapter
from selfadapt_stardist import Architecture, StarDist2D, StardistAdapter

RESULTS = Path(__file__).parent / "results" / "step.jsonl"
SIDES = {"step": "selfadapt", "torch_em": "torch-em", "literal": "the paper word by word"}


class CellposeSized(Adapter):
    """Cellpose's CPnet, its heads and its bottleneck, with random weights."""

    size_multiple = 8
    channels = 2

    def __init__(self) -> None:
        from cellpose.resnet_torch import CPnet

        self.model = CPnet([2, 32, 64, 128, 256], 3, sz=3)
        self.model.mkldnn = False
        self.outputs = OutputSpec(flow=Vector(), cellprob=Binary())

    def forward(self, model: nn.Module, images: Tensor) -> dict[str, Tensor]:
        return self.outputs.split(model(images)[0])

    def embedding_module(self, model: nn.Module) -> nn.Module:
        return model.get_submodule("downsample.down.res_down_3")


class Classes(Adapter):
    """A U-Net over a ResNet-18 with three classes, with random weights."""

    size_multiple = 32
    channels = 3

    def __init__(self) -> None:
        import segmentation_models_pytorch as smp

        self.model = smp.Unet("resnet18", encoder_weights=None, classes=3)
        self.outputs = OutputSpec(classes=Categorical(3))

    def forward(self, model: nn.Module, images: Tensor) -> dict[str, Tensor]:
        return {"classes": model(images)}

    def embedding_module(self, model: nn.Module) -> nn.Module:
        return model.get_submodule("encoder.layer4")


NETWORKS: dict[str, tuple[str, Callable[[], Adapter]]] = {
    "cellpose": ("Cellpose: CPnet (Vector, Binary)", CellposeSized),
    "smp": ("SMP: bundled U-Net (Binary, Scalar)", lambda: SmpAdapter.from_pretrained("demo")),
    "stardist": (
        "StarDist, 32 rays, grid 2 (Rays, Binary)",
        lambda: StardistAdapter(StarDist2D(Architecture(grid=(2, 2)))),
    ),
    "classes": ("U-Net over ResNet-18 (Categorical)", Classes),
}


def floor_step(run: SelfAdaptation) -> Callable[[Tensor], None]:
    """The networks alone: no view is moved, no mask, no augmentation, no L2-SP, no EMA."""
    adapter, trained, views = run.adapter, run.parameters(), _views(run)
    optimizer = torch.optim.AdamW(trained, lr=run.config.learning_rate)

    def step(images: Tensor) -> None:
        with torch.no_grad():
            run._forward_teacher(images.repeat(views, 1, 1, 1))
        outputs = adapter.forward(run.student, images)
        loss = torch.stack([output.square().mean() for output in outputs.values()]).sum()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()

    return step


def _views(run: SelfAdaptation) -> int:
    return min(run.config.views, len(run.symmetries))


def make(
    network: str, views: int, batch: int, crop: int
) -> tuple[dict[str, Callable[[Tensor], object]], Tensor, int]:
    """All sides, the crops, and how many views the heads admit."""
    torch.manual_seed(0)
    adapter = NETWORKS[network][1]()
    config = Config(batch_size=batch, crop=crop, views=views, iterations=10**6)
    run, second = SelfAdaptation(adapter, config), SelfAdaptation(adapter, config)
    set_training(second.student, second._frozen, config.batch_norm)
    images = torch.randn(batch, adapter.channels or 1, crop, crop, device=run.device)
    adapter.model.to(run.device)
    peers = {"torch_em": TorchEm(adapter, config), "literal": Literal(adapter, config)}
    return {"floor": floor_step(second), "step": run.step, **peers}, images, _views(run)


def clock() -> float:
    """Seconds: of the processor, or where it waits for a GPU, by the wall."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()


def measure(network: str, views: int, batch: int, crop: int, rounds: int) -> dict[str, Any]:
    steps, images, views = make(network, views, batch, crop)
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for round_ in range(rounds + 1):
        for name, step in steps.items():
            start = clock()
            step(images)
            if round_:  # the first round warms up
                seconds[name].append(clock() - start)
    ratios = {
        name: [s / f for s, f in zip(seconds[name], seconds["floor"], strict=True)]
        for name in SIDES
    }
    return {
        "views": views,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "threads": torch.get_num_threads(),
        "floor": statistics.median(seconds["floor"]),
        "ratios": ratios,
    }


def peak_mib(side: str, network: str, views: int, batch: int, crop: int) -> float:
    """Peak memory of three steps of one side, in MiB beyond what was there before."""
    steps, images, _ = make(network, views, batch, crop)
    before = resident_mib("VmRSS")
    if not torch.cuda.is_available():
        Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far (Linux)
    for _ in range(3):
        steps[side](images)
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    return resident_mib("VmHWM") - before


def resident_mib(name: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(name))


def times_table(lines: list[dict[str, Any]]) -> str:
    rows = []
    for line in lines:
        if "ratios" in line:
            spread = [
                f"{statistics.median(each):.2f} ({min(each):.2f} to {max(each):.2f})"
                for each in (line["ratios"][side] for side in SIDES)
            ]
            title = NETWORKS[line["network"]][0]
            rows.append([title, str(line["views"]), str(line["batch"]), *spread])
    return table(["network", "views", "batch", *SIDES.values()], rows)


def memory_table(lines: list[dict[str, Any]]) -> str:
    rows = [
        [NETWORKS[line["network"]][0], str(line["views"]), str(line["batch"])]
        + [f"{line['mib'][side] / line['mib']['floor']:.2f}" for side in SIDES]
        for line in lines
        if "mib" in line
    ]
    return table(["network", "views", "batch", *SIDES.values()], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--crop", type=int, default=96)
    parser.add_argument("--views", type=int, nargs="+", default=[1, 4, 8])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--docs", type=Path, help="folder whose benchmarks.md gets the tables")
    parser.add_argument("--tables", action="store_true", help="of what is there; measure nothing")
    parser.add_argument("--side", choices=("floor", *SIDES), help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.side:
        print(peak_mib(args.side, args.networks[0], args.views[0], args.batch[0], args.crop))
        return
    done = [(*map(line.get, ("network", "asked", "batch", "crop")), "mib" in line)
            for line in read_lines(args.out)]  # fmt: skip
    for network in () if args.tables else args.networks:
        for views in args.views:
            for batch in args.batch:
                cell = {"network": network, "asked": views, "batch": batch, "crop": args.crop}
                if (*cell.values(), False) not in done:
                    found = measure(network, views, batch, args.crop, args.rounds)
                    add_line(args.out, cell | found)
        views, batch = max(args.views), 8
        cell = {"network": network, "asked": views, "batch": batch, "crop": args.crop}
        if (*cell.values(), True) not in done:
            words = ["--networks", network, "--views", str(views), "--batch", str(batch)]
            command = [sys.executable, __file__, *words, "--crop", str(args.crop), "--side"]
            peaks = {
                side: float(subprocess.check_output([*command, side])) for side in ("floor", *SIDES)
            }
            add_line(args.out, cell | {"views": views, "mib": peaks})
    lines = read_lines(args.out)
    tables = {"step times": times_table(lines), "step memory": memory_table(lines)}
    print(*tables.values(), sep="\n\n")
    fill(args.docs, tables, "benchmarks.md")


if __name__ == "__main__":
    main()
