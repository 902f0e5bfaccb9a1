"""The sum over the ranks of a group: by one collective, with a gradient, the same bits on every rank."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor

SumInPlace = Callable[[Tensor], object]
# Up to this many ranks a gather and a local sum are quicker on CPU than an all-reduce: fewer rounds, and the payloads
# are small (benchmarks/layer.md).
_GATHER_UP_TO = 8


def sum_over_ranks(tensor: Tensor, group: dist.ProcessGroup) -> None:
    """The sum over the group, in place: the same bits on every rank, by one collective."""
    world_size = dist.get_world_size(group)
    if tensor.device.type != "cpu" or world_size > _GATHER_UP_TO:
        dist.all_reduce(tensor, group=group)
        return
    gathered = tensor.new_empty((world_size, tensor.numel()))
    dist.all_gather(list(gathered.unbind(0)), tensor, group=group)
    tensor.copy_(gathered.sum(0))  # in the order of ranks, on every rank


class _AllReduceSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx, tensor: Tensor, sum_in_place: SumInPlace) -> Tensor:  # type: ignore[no-untyped-def]
        ctx.sum_in_place = sum_in_place
        total = tensor.clone()
        sum_in_place(total)
        return total

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[no-untyped-def]
        # Every rank's output is the same sum, so a rank's input feels the gradients of all outputs. Through `apply`
        # again, for derivatives of any order.
        return _AllReduceSum.apply(grad, ctx.sum_in_place), None


def all_reduce_sum(tensor: Tensor, group: dist.ProcessGroup | None, sum_in_place: SumInPlace | None = None) -> Tensor:
    """The sum of `tensor` over the group, in place where no gradient is wanted; `group=None` returns it as it is.

    Args:
        sum_in_place: the collective, where it is to be more than `sum_over_ranks`.
    """
    if group is None:
        return tensor
    if sum_in_place is None:
        sum_in_place = partial(sum_over_ranks, group=group)
    if torch.is_grad_enabled() and tensor.requires_grad:
        return _AllReduceSum.apply(tensor, sum_in_place)
    sum_in_place(tensor)
    return tensor
