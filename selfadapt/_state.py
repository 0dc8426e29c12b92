"""What a saved run must share with the one that goes on from it."""

import copy
import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

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
        raise CheckpointError(f"the saved run has other tensors as {name} than this one.")


def refuse_other_state(theirs: Any, ours: Mapping[str, Any]) -> None:
    """Raise CheckpointError unless a saved state of a run can take the place of `ours`."""
    if not isinstance(theirs, Mapping):
        raise CheckpointError(f"a {type(theirs).__name__} is no state of a SelfAdaptation.")
    missing = ours.keys() - theirs.keys()
    if missing:
        raise CheckpointError(
            f"this is no state of a SelfAdaptation: {', '.join(sorted(missing))} missing."
        )
    for name in ("config", "model"):
        if not isinstance(theirs[name], Mapping):
            raise CheckpointError(f"the saved run is damaged: its {name} holds no names.")
    refuse_difference("setting", theirs["config"], ours["config"])
    refuse_difference("heads", {"": theirs["outputs"]}, {"": ours["outputs"]})
    refuse_difference("initial model's", theirs["model"], ours["model"])
    for name in ("student", "teacher", "thresholds"):
        refuse_other_tensors(name, theirs[name], ours[name])


def refuse_damaged_optimizer(parameters: list[nn.Parameter], state: dict[str, Any]) -> None:
    """Raise an error of some kind unless an AdamW of these parameters can go on from the state."""
    optimizer = torch.optim.AdamW(parameters)
    usual = {name: type(value) for name, value in optimizer.param_groups[0].items()}
    optimizer.load_state_dict(copy.deepcopy(state))
    for group in optimizer.param_groups:
        for name, kind in usual.items():
            if not isinstance(group.get(name), kind):
                raise ValueError(f"the optimizer has no {name} that could be used")
        for parameter in group["params"]:
            averages = optimizer.state.get(parameter, {})
            if averages and not all(
                getattr(averages.get(name), "shape", None) == parameter.shape
                and bool(averages[name].isfinite().all())
                for name in ("exp_avg", "exp_avg_sq")
            ):
                raise ValueError("the optimizer's averages do not fit the weights")


def first_difference(name: str, was: Any, now: Any) -> tuple[str, str, str]:
    """Name of the first value that differs, and how it is written on both sides."""
    if isinstance(was, dict) and isinstance(now, dict):
        for key in {**was, **now}:
            if was.get(key) != now.get(key):
                return first_difference(f"{name}: {key}", was.get(key), now.get(key))
    if isinstance(was, list) and isinstance(now, list) and len(was) == len(now):
        for old, new in zip(was, now, strict=True):
            if old != new:
                return first_difference(name, old, new)
    return name, _shortened(was), _shortened(now)


def _shortened(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
