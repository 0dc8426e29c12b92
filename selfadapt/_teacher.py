"""The teacher: an exponential moving average of the student."""

import torch
from torch import nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from selfadapt._network import copy_network


def make_teacher(student: nn.Module) -> nn.Module:
    """A frozen copy of the student, in eval mode for good."""
    return copy_network(student, next(student.parameters()).device, frozen=True)


@torch.no_grad()
def update_teacher(teacher: nn.Module, student: nn.Module, decay: float) -> None:
    """teacher = decay * teacher + (1 - decay) * student, for all parameters.

    Buffers (batch-norm statistics, counters) are copied: they are averages already, and
    averaging integer counters has no meaning.
    """
    average = get_ema_multi_avg_fn(decay)
    average(tuple(teacher.parameters()), tuple(student.parameters()), torch.tensor(1))
    if buffers := list(teacher.buffers()):
        torch._foreach_copy_(buffers, list(student.buffers()))
