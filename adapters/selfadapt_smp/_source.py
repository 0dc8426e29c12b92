"""Python that builds a network of SMP without selfadapt, for packages of bioimage.io."""

import json
from collections.abc import Sequence
from pathlib import Path

import segmentation_models_pytorch as smp
from torch import nn

from selfadapt import NetworkSource
from selfadapt_smp._packaged import Network

PACKAGED = Path(__file__).with_name("_packaged.py")


def source_of(model: nn.Module, heads: Sequence[int]) -> NetworkSource | None:
    """None of a network that names and numbers do not describe.

    Args:
        model: the network.
        heads: number of channels of each head, in their order.
    """
    if not isinstance(model, smp.base.SegmentationModel):
        return None
    state = model.state_dict()
    try:
        told = {name: value for name, value in model.config.items() if name[:1] != "_"}
        told |= {"architecture": type(model).__name__, "heads": list(heads)}
        kwargs = json.loads(json.dumps(told | {"encoder_weights": None}))
        again = Network(**kwargs).network.state_dict()
    except Exception:  # a class of somebody's own, an activation that is a function, ...
        return None
    if {k: t.shape for k, t in again.items()} != {k: t.shape for k, t in state.items()}:
        return None
    return NetworkSource(
        PACKAGED,
        Network.__name__,
        kwargs,
        {f"network.{name}": tensor for name, tensor in state.items()},
        (f"segmentation-models-pytorch=={smp.__version__}",),
    )
