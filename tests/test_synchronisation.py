"""A step never waits for the device: nothing that it computes is read back to decide what follows.

Without a GPU the operations that would read are counted; on one, torch itself refuses them.
"""

import pytest
import torch
from helpers import SmallAdapter, SmallNet, config
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from selfadapt import Binary, Categorical, OutputSpec, Rays, Scalar, SelfAdaptation, Vector

READ = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "equal")
HEADS = {
    "flow and foreground": OutputSpec(flow=Vector(), cellprob=Binary()),
    "rays": OutputSpec(prob=Binary(), dist=Rays(8, within="prob")),
    "classes and distance": OutputSpec(
        classes=Categorical(3, background=0), distance=Scalar(within="classes")
    ),
}


class Reads(TorchDispatchMode):
    """Counts operations whose result or shape depends on values: `float(t)`, `x[mask]`, ..."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        masks = args[1] if name.startswith("index") and isinstance(args[1], (list, tuple)) else ()
        masked = any(isinstance(t, Tensor) and t.dtype in (torch.bool, torch.uint8) for t in masks)
        if name in READ or masked:
            self.seen.append((name, args[0].dtype, args[0].numel()))
        return func(*args, **(kwargs or {}))


def begun(heads, **settings):
    """A run after its first step, and a batch."""
    adapter = SmallAdapter()
    adapter.outputs = HEADS[heads]
    adapter.model = SmallNet(sum(head.channels for head in adapter.outputs.values()))
    run = SelfAdaptation(adapter, config(**settings))
    batch = torch.rand(4, 1, 32, 32, generator=torch.Generator().manual_seed(0))
    run.step(batch)
    return run, batch


def test_what_would_wait_is_counted():
    values = torch.rand(5)
    with Reads() as reads:
        float(values.sum())
        values[values > 0.5]
        bool(values[0] > 0)
    assert len(reads.seen) == 3


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"views": 2, "accumulate": 2, "gradient_clip": 1.0, "ema_every": 2},
        {"batch_norm": "batch", "targets": "hard", "precision": "bfloat16"},
    ],
)
def test_a_step_reads_nothing_back(heads, settings):
    run, batch = begun(heads, **settings)
    with Reads() as reads:
        run.step(batch)
    # on the host at any rate: the seed of each part's dropout, and AdamW's count of each tensor
    host = [("_local_scalar_dense", torch.int64, 1)] * run.config.accumulate
    host += [("_local_scalar_dense", torch.float32, 1)] * len(run.parameters())
    assert sorted(reads.seen, key=str) == sorted(host, key=str)
    assert all(state["step"].device.type == "cpu" for state in run.optimizer.state.values())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("heads", HEADS)
def test_on_a_gpu_no_step_waits(heads):
    run, batch = begun(heads, device="cuda")
    batch = batch.cuda()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run.step(batch)
    finally:
        torch.cuda.set_sync_debug_mode("default")
