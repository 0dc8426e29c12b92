"""What the processes of tests/test_ranks.py do: `torchrun --nproc_per_node 2 ranks_at_work.py DIR`.

With a file per process it says what came of it.
"""

import sys
import time
from pathlib import Path

import torch
from helpers import IMAGES, SmallAdapter, config, trained_adapter
from torch import nn

from selfadapt import (
    Binary,
    CheckpointError,
    ConfigError,
    Crops,
    OutputSpec,
    SelfAdaptation,
    Vector,
    adabn,
    adapt,
    open_images,
)
from selfadapt import _ranks as ranks

LOOPS = {"candidates": "default,gentle,teacher", "batch_norm": "source", "batch_size": 4}


def without_dropout(adapter):
    """Each rank draws its own."""
    for layer in adapter.model.modules():
        if isinstance(layer, nn.Dropout2d):
            layer.p = 0.0
    return adapter


def steps(**settings):
    """Twenty steps with everything that a batch decides together; the state."""
    adapter = without_dropout(SmallAdapter())
    adapter.outputs = OutputSpec(flow=Vector(joint=True, within="cellprob"), cellprob=Binary())
    given = {"iterations": 20, "learning_rate": 1e-3, "gradient_clip": 0.5, "batch_size": 4}
    told = config(**given | settings)
    crops = Crops(adapter, open_images(IMAGES), told)
    crops.check()
    run = SelfAdaptation(adapter, told)
    for last in run.iterate(crops.batches(0, 20)):
        info = {name: float(value) for name, value in last.items()}
    thresholds = {name: t.threshold for name, t in run.thresholds.items()}
    return {"student": run.student.state_dict(), "teacher": run.teacher.state_dict(),
            "info": info, "thresholds": thresholds}  # fmt: skip


def statistics():
    """Batch-norm statistics of the images."""
    adapter = SmallAdapter()
    told = config(batch_size=4)
    crops = Crops(adapter, open_images(IMAGES), told)
    crops.check()
    return adabn(adapter, crops.batches(0, 8)).state_dict()


def whole(adapter, folder, callback=None, *, resume=False):
    """A run from end to end."""
    result = adapt(adapter, IMAGES, config=config(**LOOPS), output_dir=folder, resume=resume,
                   progress=False, callback=callback)  # fmt: skip
    return {"history": result.history, "reason": result.reason, "iteration": result.iteration,
            "weights": result.adapter.model.state_dict()}  # fmt: skip


def refused(kind, work):
    """What an error says."""
    try:
        work()
    except kind as error:
        return str(error)
    return None


def main(root):
    torch.set_num_threads(1)
    with ranks.joined():
        told = {"steps": steps(), "batch": steps(batch_norm="batch"), "statistics": statistics()}
        adapter = without_dropout(trained_adapter())
        told["model"] = adapter.model.state_dict()
        told["whole"] = whole(adapter, root / "whole")
        asked = []

        def cancel(event):
            asked.append(event)
            return (event.kind, event.candidate, event.iteration) == ("step", "default", 5)

        if ranks.rank() == 1:
            time.sleep(1)  # the first one is here long before
            (root / "all have come").touch()
        told["waited"] = ranks.first((root / "all have come").exists)
        told["cancelled"] = whole(adapter, root / "cancelled", cancel)
        told["asked"] = len(asked)
        (root / "foreign").mkdir(exist_ok=True)
        (root / "foreign" / "notes.txt").touch()
        told["foreign"] = refused(CheckpointError, lambda: whole(adapter, root / "foreign"))
        told["uneven"] = refused(ConfigError, lambda: steps(batch_size=3))
        uneven = config(batch_size=3)  # said before the images are looked for
        told["early"] = refused(ConfigError, lambda: adapt(adapter, "nowhere", config=uneven))
        told["temporary"] = whole(adapter, None)["reason"]
        torch.save(told, root / f"{ranks.rank()}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
