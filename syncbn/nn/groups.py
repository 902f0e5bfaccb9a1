"""Which ranks a layer sums over, and the sum itself."""

import torch
import torch.distributed as dist
from torch import Tensor

# Tests and benchmarks alone set this: it makes a world of one call the collective that it does not need.
_force_collective = False


def collective_group(process_group: dist.ProcessGroup | None) -> dist.ProcessGroup | None:
    """The group to sum over, or None where there is nothing to sum: no distributed job, or a group of one.

    `process_group=None` means all ranks of the job.

    Raises:
        RuntimeError: this rank is not a member of `process_group`.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return None
    group = dist.group.WORLD if process_group is None else process_group
    if group is dist.GroupMember.NON_GROUP_MEMBER or dist.get_rank(group) < 0:
        raise RuntimeError(
            f"rank {dist.get_rank()} is not a member of the process group of this layer; give each rank the group that"
            " it belongs to (dist.new_group returns a placeholder to ranks outside the group)"
        )
    if dist.get_world_size(group) == 1 and not _force_collective:
        return None
    return group


class _AllReduceSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx, tensor: Tensor, group: dist.ProcessGroup) -> Tensor:  # type: ignore[no-untyped-def]
        ctx.group = group
        total = tensor.clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[no-untyped-def]
        # Every rank's output is the same sum, so a rank's input feels the gradients of all outputs. Through `apply`
        # again, for derivatives of any order.
        return _AllReduceSum.apply(grad, ctx.group), None


def all_reduce_sum(tensor: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """The sum of `tensor` over the group, in place where no gradient is wanted; `group=None` returns it as it is."""
    if group is None:
        return tensor
    if torch.is_grad_enabled() and tensor.requires_grad:
        return _AllReduceSum.apply(tensor, group)
    dist.all_reduce(tensor, group=group)
    return tensor
