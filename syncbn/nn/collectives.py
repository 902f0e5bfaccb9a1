"""Sum over the ranks of a process group: one collective, differentiable, bitwise equal on every rank."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor

SumInPlace = Callable[[Tensor], object]
# Up to this many ranks a gather and a local sum are quicker on CPU than an all-reduce: fewer rounds, and the payloads
# are small (benchmarks/layer.md).
GATHER_UP_TO = 8


def sum_over_ranks(tensor: Tensor, group: dist.ProcessGroup) -> None:
    """Replaces `tensor` by its sum over the group, bitwise equal on every rank; one collective."""
    world_size = dist.get_world_size(group)
    if tensor.device.type != "cpu" or world_size > GATHER_UP_TO:
        dist.all_reduce(tensor, group=group)
        return
    gathered = tensor.new_empty((world_size, tensor.numel()))
    dist.all_gather(list(gathered.unbind(0)), tensor, group=group)
    tensor.copy_(gathered.sum(0))  # added in the same order, by rank, on every rank


class _AllReduceSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx, tensor: Tensor, sum_in_place: SumInPlace) -> Tensor:  # type: ignore[no-untyped-def]
        ctx.sum_in_place = sum_in_place
        total = tensor.clone()
        sum_in_place(total)
        return total

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[no-untyped-def]
        # Every rank's output is the same sum, so the gradient of a rank's input is the sum of the gradients of all
        # ranks' outputs. `apply` makes the backward pass differentiable too, to any order.
        return _AllReduceSum.apply(grad, ctx.sum_in_place), None


def all_reduce_sum(tensor: Tensor, group: dist.ProcessGroup | None, sum_in_place: SumInPlace | None = None) -> Tensor:
    """The sum of `tensor` over the group, in place unless autograd records it.

    Args:
        group: None to return `tensor` itself.
        sum_in_place: the collective to use instead of `sum_over_ranks`.
    """
    if group is None:
        return tensor
    if sum_in_place is None:
        sum_in_place = partial(sum_over_ranks, group=group)
    if torch.is_grad_enabled() and tensor.requires_grad:
        return _AllReduceSum.apply(tensor, sum_in_place)
    sum_in_place(tensor)
    return tensor
