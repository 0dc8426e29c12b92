"""Many processes, one run: what they must agree on, by torch.distributed.

`torchrun` starts them (its *ranks*). Each has a slice of every batch, and a share of the windows
that are looked at. Where there is one process, nothing here does anything.
"""

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch import distributed as dist

T = TypeVar("T")


def count() -> int:
    """Number of processes."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Number of this one, from 0."""
    return dist.get_rank() if count() > 1 else 0


@contextmanager
def joined() -> Iterator[None]:
    """Inside, processes that `torchrun` has started work as one; others are left alone."""
    started = dist.is_available() and dist.is_torchelastic_launched()
    if not started or os.environ.get("WORLD_SIZE", "1") == "1" or dist.is_initialized():
        yield
        return
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if cuda else "gloo")
    try:
        yield
    finally:
        dist.destroy_process_group()


def first(work: Callable[[], T]) -> T:
    """Let the first process do something once all have come here; its result, or error, for all."""
    if count() == 1:
        return work()
    wait()
    told: list[Any] = [None]
    if rank() == 0:
        try:
            told = [(work(), None)]
        except Exception as error:
            told = [(None, error)]
    dist.broadcast_object_list(told, src=0)
    result, failed = told[0]
    if failed is not None:
        raise failed
    return result  # type: ignore[no-any-return]


def wait() -> None:
    """Until all processes have come here."""
    if count() > 1:
        dist.barrier()


def share(items: Sequence[T]) -> Sequence[T]:
    """Every n-th of them, as falls to this process."""
    return items[rank() :: count()]


def unite(own: Sequence[T]) -> list[T]:
    """All items, in their order, of what each process has made of its `share`."""
    if count() == 1:
        return list(own)
    parts: list[Any] = [None] * count()
    dist.all_gather_object(parts, list(own))
    longest = max(map(len, parts))
    return [part[k] for k in range(longest) for part in parts if k < len(part)]


@torch.no_grad()
def gather(tensor: Tensor) -> Tensor:
    """Tensors of one shape, one behind the other, of all processes."""
    if count() == 1:
        return tensor
    parts = [torch.empty_like(tensor).contiguous() for _ in range(count())]
    dist.all_gather(parts, tensor.contiguous())
    return torch.cat(parts)


@torch.no_grad()
def mean(tensor: Tensor) -> Tensor:
    """Mean over all processes, without gradient."""
    if count() == 1:
        return tensor.detach()
    total = tensor.detach().clone()
    dist.all_reduce(total)
    return total / count()


@torch.no_grad()
def average(tensors: Iterable[Tensor]) -> None:
    """Replace each by its mean over all processes, in one exchange."""
    if count() == 1:
        return
    tensors = list(tensors)
    flat = mean(torch.cat([tensor.flatten() for tensor in tensors]))
    for tensor, part in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
        tensor.copy_(part.view_as(tensor))


def average_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Of a joint batch, of which each process has a slice of the same size."""
    average(p.grad for p in parameters if p.grad is not None)


def slice_of(batch: int) -> slice:
    """Where the `batch` samples of this process lie in the joint batch."""
    return slice(rank() * batch, (rank() + 1) * batch)
