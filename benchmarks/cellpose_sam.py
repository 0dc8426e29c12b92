"""Cellpose 4's full network, 304 million parameters: built, saved, opened, one step, memory.

    python benchmarks/cellpose_sam.py --out runs/cpsam        # in an environment with cellpose>=4

Weights are random, as Cellpose's own need a download; sizes do not depend on them. What one crop
of 256 x 256 pixels keeps for the backward pass is counted tensor by tensor, on any device; on CUDA
the peak of allocated memory is printed, too. Needs about 16 GB of memory.
"""

import argparse
import gc
import json
import time
from pathlib import Path
from typing import Any

import torch
from cellpose.models import CellposeModel
from cellpose.vit import CPSAM

from selfadapt import Config, SelfAdaptation
from selfadapt_cellpose import CellposeAdapter

GIB = 2**30
CASES: dict[str, dict[str, Any]] = {
    "all parameters": {},
    "all parameters, checkpoint": {"checkpoint": True},
    "last 4 blocks, neck and readout": {
        "trainable": r"encoder\.blocks\.(20|21|22|23)\.|encoder\.neck|^out"
    },
}


def gib(tensors: Any) -> float:
    return sum(t.numel() * t.element_size() for t in tensors) / GIB


def one_step(file: Path, device: str, *, checkpoint: bool = False, **changes: Any) -> Any:
    """Figures of one step on one crop, and the run after it."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    adapter = CellposeAdapter(file, checkpoint=checkpoint)
    run = SelfAdaptation(adapter, Config(batch_size=1, views=1, device=device, **changes))
    parameters = [*run.student.parameters(), *run.initial.parameters()]
    weights = {p.untyped_storage().data_ptr() for p in parameters}
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    image = torch.rand(1, 3, 256, 256)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        run.loss(image)[0].backward()
    run.optimizer.zero_grad(set_to_none=True)
    start = time.perf_counter()
    info = run.step(image)
    assert bool(info["loss"].isfinite())
    moved = sum(
        not torch.equal(now, first)
        for now, first in zip(run.student.parameters(), run.initial.parameters(), strict=True)
    )
    optimizer = [t for state in run.optimizer.state.values() for t in state.values()]
    figures = {
        "networks (student, teacher, initial)": 3 * gib(run.student.parameters()),
        "gradients": gib(p.grad for p in run.parameters() if p.grad is not None),
        "optimiser": gib(optimizer),
        "kept per crop": sum(kept.values()) / GIB,
    }
    print(f"  {len(run.parameters())} tensors adapt, {moved} moved")
    print(f"  step of one crop, one view: {time.perf_counter() - start:.1f} s on {run.device}")
    if run.device.type == "cuda":
        figures["peak allocated"] = torch.cuda.max_memory_allocated() / GIB
    return {name: round(value, 2) for name, value in figures.items()}, adapter, run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    torch.save(CPSAM().state_dict(), args.out / "random")
    for name in args.cases:
        print(name, flush=True)
        figures, adapter, run = one_step(args.out / "random", args.device, **CASES[name])
        print(json.dumps({name: figures}), flush=True)
        if not CASES[name]:
            adapter.with_model(run.student).save(args.out / "adapted")
            state = run.student.state_dict()
            del run, adapter
            gc.collect()
            opened = CellposeModel(
                pretrained_model=str(args.out / "adapted"), use_bfloat16=False
            ).net.state_dict()
            assert opened.keys() == state.keys()
            assert all(torch.equal(state[key].cpu(), opened[key]) for key in opened)
            print(f"  saved and opened by CellposeModel: {len(opened)} tensors equal bit for bit")
            del opened, state
        adapter = run = None
        gc.collect()


if __name__ == "__main__":
    main()
