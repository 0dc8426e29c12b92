"""What a saved run must share with the one that goes on from it."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from selfadapt._errors import CheckpointError


def refuse_difference(what: str, theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> None:
    """Raise CheckpointError at the first value that is another; it is called a `what`."""
    for name in [*ours, *theirs]:
        if theirs.get(name) != ours.get(name):
            raise CheckpointError(
                f"the saved run differs from this one: {what} {name} was "
                f"{theirs.get(name, 'absent')}, now it is {ours.get(name, 'absent')}. Give the "
                "same, or start a new run."
            )


def refuse_other_tensors(name: str, theirs: Any, ours: Mapping[str, Tensor]) -> None:
    """Raise CheckpointError unless both have tensors of the same names and shapes."""
    same = isinstance(theirs, Mapping) and theirs.keys() == ours.keys()
    if not same or any(
        not isinstance(theirs[key], Tensor) or theirs[key].shape != ours[key].shape for key in ours
    ):
        raise CheckpointError(f"the saved {name} has other tensors than this network.")
