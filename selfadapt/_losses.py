"""The loss: Eq. 1 (self-training) and Eq. 2 (L2-SP)."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from selfadapt import _ranks as ranks


def masked_mean(loss: Tensor, mask: Tensor, inside: Tensor | None = None) -> Tensor:
    """One term of Eq. 1, `loss * M` averaged over **all** pixels, or over those of objects.

    Masked pixels contribute zero, so that a batch that is trusted little also moves little.

    Of a batch that several processes share, the mean of theirs is the term of all of it.

    Args:
        loss: `[B, K, H, W]`.
        mask: the same shape.
        inside: weight of each pixel in the average, `[B, 1, H, W]`; None: all are equal.
    """
    masked = loss * mask
    if inside is None:
        return masked.mean()
    return (masked * inside).mean() / ranks.mean(inside.mean()).clamp(min=1e-3)


class _L2SP(torch.autograd.Function):
    """sum_i (w_i - w_i^0)^2 over lists of tensors in a handful of fused calls."""

    @staticmethod
    def forward(ctx: Any, initial: Sequence[Tensor], *weights: Tensor) -> Tensor:
        shift = torch._foreach_sub(weights, list(initial))
        ctx.count = len(weights)
        ctx.save_for_backward(*weights, *initial)  # no copies: the shift is computed again
        return torch.stack(torch._foreach_norm(shift)).square().sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        weights, initial = ctx.saved_tensors[: ctx.count], ctx.saved_tensors[ctx.count :]
        return None, *torch._foreach_mul(torch._foreach_sub(weights, initial), 2 * grad)


def l2_sp(weights: Sequence[Tensor], initial: Sequence[Tensor]) -> Tensor:
    """Eq. 2 without its factor: the sum of (w_i - w_i^0)^2, no 1/2.

    >>> l2_sp([torch.tensor([3.0])], [torch.tensor([1.0])]).item()
    4.0
    """
    total: Tensor = _L2SP.apply(initial, *weights)
    return total
