"""Collectives of layers: errors that name the layer, and debug checks that ranks call the same collective.

Ranks whose layers do not call the same collectives in the same order wait for each other forever, or add up numbers of
different layers. With `SYNCBN_DEBUG=1` in the environment (or `bn.debug=true`) the ranks compare layer, direction and
number of calls before each collective, over a separate process group, and all of them raise if these differ. Without
debug mode there is no additional communication.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from syncbn.nn import collectives
from syncbn.nn.collectives import all_reduce_sum, sum_over_ranks
from syncbn.nn.patterns import named_modules
from syncbn.torch_compat import all_reduce_options, coalescing_groups, timeout_of

enabled = os.environ.get("SYNCBN_DEBUG", "0") not in ("", "0")


@contextmanager
def enabling(wanted: bool) -> Iterator[None]:
    """Enables the checks inside of the context if `wanted`, or if the environment does; then restores the setting."""
    global enabled
    before, enabled = enabled, enabled or wanted
    try:
        yield
    finally:
        enabled = before


_names = WeakIdKeyDictionary()  # layer -> dotted name
_calls = WeakIdKeyDictionary()  # layer -> {direction: number of collectives so far}
_SUM = all_reduce_options() if dist.is_available() else None
_BARE = nn.Identity()  # key in _calls for sync_batch_norm, which has no layer
_channels: list[tuple[dist.ProcessGroup, dist.ProcessGroup]] = []


class CollectiveError(RuntimeError):
    """A collective of a layer failed, or the ranks are about to call different ones.

    Args:
        where: the layer and the direction.
    """

    def __init__(self, where: str, message: str) -> None:
        super().__init__(message)
        self.where = where


def reduce(tensor: Tensor, group: dist.ProcessGroup | None, owner: nn.Module | None, direction: str) -> Tensor:
    """`all_reduce_sum` for a layer, which errors name.

    Args:
        owner: the layer; None for the bare function.
        direction: "forward", "watched forward" (see `recorder`) or "backward".

    Raises:
        CollectiveError: the collective failed, or, in debug mode, the ranks are in different layers or passes.
    """
    if group is None or torch.compiler.is_compiling():
        return all_reduce_sum(tensor, group)
    if torch.is_grad_enabled() and tensor.requires_grad:
        return all_reduce_sum(tensor, group, partial(sum_in_place, group=group, owner=owner, direction=direction))
    sum_in_place(tensor, group, owner, direction)
    return tensor


def sum_in_place(total: Tensor, group: dist.ProcessGroup, owner: nn.Module | None, direction: str) -> None:
    """`reduce` of a tensor that autograd does not record and nothing traces, in place."""
    if enabled:
        check(group, owner, direction, total.device)
    try:
        if coalescing_groups() or (total.device.type == "cpu" and group.size() <= collectives.GATHER_UP_TO):
            sum_over_ranks(total, group)
        else:  # what `dist.all_reduce` does, without its wrappers, which take longer on the host than all the rest
            work = group.allreduce([total], _SUM)
            if work is not None:
                work.wait()
    except RuntimeError as error:
        where = f"the {direction} pass of {name_of(owner)}"
        raise CollectiveError(
            where, f"rank {dist.get_rank()}: the sum over ranks in {where} failed: {error}"
        ) from error


def check(group: dist.ProcessGroup, owner: nn.Module | None, direction: str, device: torch.device) -> None:
    """Compares across the ranks of the group which sum each is about to call; itself a collective.

    Raises:
        CollectiveError: the ranks differ, or some of them did not arrive.
    """
    calls = _calls.setdefault(_BARE if owner is None else owner, {})
    calls[direction] = calls.get(direction, 0) + 1
    mine = CallSite(name_of(owner), direction, calls[direction])
    sites: list[CallSite] = [mine] * dist.get_world_size(group)
    try:
        dist.all_gather_object(sites, mine, group=_channel(group, device))
    except RuntimeError as error:
        raise CollectiveError(
            f"the {direction} pass of {mine.name}",
            f"rank {dist.get_rank()} waits in {mine}; not all other ranks have come to a layer of this group: {error}",
        ) from error
    if all(site.fits(sites[0]) for site in sites):
        return
    ranks = dist.get_process_group_ranks(group)
    listed = "; ".join(f"rank {rank}: {site}" for rank, site in zip(ranks, sites, strict=True))
    raise CollectiveError(
        f"the {direction} pass of {mine.name}",
        f"the ranks are not in the same place, and would have waited for each other: {listed}",
    )


@dataclass(frozen=True)
class CallSite:
    """The collective that a rank is about to call: layer name, direction, and the number of such calls so far."""

    name: str
    direction: str
    call: int

    def fits(self, other: CallSite) -> bool:
        """Whether both denote the same collective.

        One name may be a suffix of the other, because one rank's model may be part of a larger module. An unknown name
        fits any other.
        """
        names = sorted((self.name, other.name), key=len)
        same = names[0] == names[1] or names[1].endswith("." + names[0]) or any(n.startswith("a ") for n in names)
        return same and (self.direction, self.call) == (other.direction, other.call)

    def __str__(self) -> str:
        return f"the {self.direction} pass of {self.name}, call {self.call}"


def _channel(group: dist.ProcessGroup, device: torch.device) -> dist.ProcessGroup:
    """A gloo group of the same ranks, used for the checks only; created at the first call."""
    for known, channel in _channels:
        if known is group:
            return channel
    timeout = timeout_of(group, device)  # that of the group itself
    members = dist.get_process_group_ranks(group)
    channel = dist.new_group(members, backend="gloo", timeout=timeout, use_local_synchronization=True)
    _channels.append((group, channel))
    return channel


def name_of(owner: nn.Module | None) -> str:
    """A layer's dotted name in the largest module of this process that contains it; slow, for errors and debugging."""
    if owner is None:
        return "sync_batch_norm"
    if owner not in _names:
        _name_all()
    return str(_names.get(owner, f"a {type(owner).__name__} that no module holds"))


def _name_all() -> None:
    modules = [item for item in gc.get_objects() if issubclass(type(item), nn.Module)]
    children = {id(child) for module in modules for child in module.__dict__.get("_modules", {}).values()}
    found: dict[int, tuple[str, nn.Module]] = {}
    for root in modules:
        if id(root) in children or "_modules" not in root.__dict__:
            continue
        for name, module in named_modules(root):
            text = name or f"a {type(module).__name__}"
            if id(module) not in found or len(text) > len(found[id(module)][0]):
                found[id(module)] = (text, module)
    for text, module in found.values():
        _names[module] = text
