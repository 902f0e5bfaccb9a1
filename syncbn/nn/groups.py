"""The process groups that layers sum over."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from syncbn.torch_compat import timeout_of

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

# Set by tests and benchmarks only: a group of one then calls the collective that it does not need.
_force_collective = False
# Set by `world_of_one`: a process without a process group then follows the rules for a job, of one rank.
_world_of_one = False


def is_distributed() -> bool:
    """Whether this process is a rank of a distributed job, even the only one."""
    return _world_of_one or (dist.is_available() and dist.is_initialized())


@contextmanager
def world_of_one() -> Iterator[None]:
    """Inside of the context, a process without a process group behaves like the only rank of a job."""
    global _world_of_one
    before, _world_of_one = _world_of_one, True
    try:
        yield
    finally:
        _world_of_one = before


@dataclass(frozen=True)
class LostGroup:
    """Placeholder for the sub-group of a pickled layer: a group is a handle into a running job and cannot be stored."""

    size: int


def as_group(process_group: dist.ProcessGroup | DeviceMesh | None) -> dist.ProcessGroup | None:
    """The process group that a one-dimensional device mesh stands for; anything else as it is.

    Raises:
        ValueError: a device mesh of several dimensions.
    """
    # In this order, because torch.compile does not support hasattr on a process group without the attribute.
    if isinstance(process_group, dist.ProcessGroup) or not hasattr(process_group, "get_group"):
        return process_group
    if process_group.ndim != 1:  # type: ignore[union-attr]
        raise ValueError(
            f"process_group: expected a process group or a one-dimensional DeviceMesh, got {process_group};"
            ' choose one of its dimensions, as in mesh["data"]'
        )
    return process_group.get_group()  # type: ignore[union-attr]


def collective_group(process_group: dist.ProcessGroup | DeviceMesh | LostGroup | None) -> dist.ProcessGroup | None:
    """The group to sum over, or None where there is nothing to sum: no distributed job, or a group of one.

    `process_group=None` means all ranks of the job.

    Raises:
        RuntimeError: this rank is not a member of `process_group`, or the group was lost in pickling.
        ValueError: a device mesh of several dimensions.
    """
    if isinstance(process_group, LostGroup):
        raise RuntimeError(
            f"this layer summed over a sub-group of {process_group.size} ranks, which pickling left out; set its"
            " process_group to a group of this job, or to None for all ranks"
        )
    if process_group is None and not torch.compiler.is_compiling():  # in every step of nearly every layer
        world = dist.group.WORLD if dist.is_available() else None
        return None if world is None or (world.size() == 1 and not _force_collective) else world
    if not (dist.is_available() and dist.is_initialized()):
        return None
    group = dist.group.WORLD if process_group is None else as_group(process_group)
    if process_group is not None and (group is dist.GroupMember.NON_GROUP_MEMBER or dist.get_rank(group) < 0):
        raise RuntimeError(
            f"rank {dist.get_rank()} is not a member of the process group of this layer; give each rank the group that"
            " it belongs to (dist.new_group returns a placeholder to ranks outside the group)"
        )
    if dist.get_world_size(group) == 1 and not _force_collective:
        return None
    return group


def new_bn_groups(size: int | str) -> dist.ProcessGroup | None:
    """Divides the ranks of the job into groups of `size` consecutive ranks; returns the group of this rank.

    Every rank has to call it, in the same order as other calls that create groups.

    Args:
        size: ranks per group, a divisor of the world size; or "node" for the ranks of each machine (by torchrun's
            GROUP_RANK, else by host name; machines may have different numbers of ranks).

    Returns:
        This rank's group, or None (all ranks) without a distributed job and where one group holds the whole world.

    Raises:
        ValueError: a size that is not a positive divisor of the world size, or a string other than "node".
    """
    if not (size == "node" or (isinstance(size, int) and not isinstance(size, bool) and size >= 1)):
        raise ValueError(f'size: expected a number of ranks or "node", got {size!r}')
    if not (dist.is_available() and dist.is_initialized()):
        return None
    world_size = dist.get_world_size()
    if size == "node":
        nodes: list[str] = [""] * world_size
        dist.all_gather_object(nodes, os.environ.get("GROUP_RANK") or socket.gethostname())
        members = [[rank for rank in range(world_size) if nodes[rank] == node] for node in dict.fromkeys(nodes)]
    else:
        assert isinstance(size, int)
        if world_size % size:
            raise ValueError(f"size: expected a divisor of the world size {world_size}, got {size}")
        members = [list(range(first, first + size)) for first in range(0, world_size, size)]
    if len(members) == 1:
        return None
    assert dist.group.WORLD is not None
    group, _ = dist.new_subgroups_by_enumeration(members, timeout=timeout_of(dist.group.WORLD))
    return group


def new_world_group() -> dist.ProcessGroup | None:
    """A new group of all ranks of the job, whose collectives do not queue behind those of other groups.

    Every rank has to call it, in the same order as other calls that create groups. The timeout is that of the default
    group. On GPUs two NCCL communicators are then active at once, which has not been tested on several GPUs yet.

    Returns:
        The group, or None without a distributed job and in a world of one.
    """
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return None
    assert dist.group.WORLD is not None
    return dist.new_group(timeout=timeout_of(dist.group.WORLD))


def spans_world(process_group: dist.ProcessGroup | DeviceMesh | LostGroup | None) -> bool:
    """Whether a group consists of all ranks of the job: the default group (None), or another one with all ranks."""
    if process_group is None or isinstance(process_group, LostGroup):
        return process_group is None
    group = as_group(process_group)
    return dist.is_initialized() and dist.get_world_size(group) == dist.get_world_size()
