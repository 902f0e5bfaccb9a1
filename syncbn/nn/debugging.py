"""Which layer a collective belongs to: for errors, and in debug mode for a check before each one.

Ranks whose layers do not call the same collectives in the same order wait for each other forever, or add up numbers of
different layers. With `SYNCBN_DEBUG=1` in the environment (or `bn.debug=true`) the ranks compare layer, direction and
call before each collective, over a group of their own, and all of them raise if they differ. Off, it costs nothing.
"""

from __future__ import annotations

import gc
import hashlib
import os

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from syncbn.nn.groups import all_reduce_sum
from syncbn.nn.patterns import named_modules

enabled = os.environ.get("SYNCBN_DEBUG", "0") not in ("", "0")

_names = WeakIdKeyDictionary()  # layer -> name
_calls: dict[tuple[int, str], int] = {}
_channels: list[tuple[dist.ProcessGroup, dist.ProcessGroup]] = []


class CollectiveError(RuntimeError):
    """A collective of a layer that failed, or that the ranks do not agree on.

    Args:
        where: the layer and the direction.
    """

    def __init__(self, where: str, message: str) -> None:
        super().__init__(message)
        self.where = where


def reduce(tensor: Tensor, group: dist.ProcessGroup | None, owner: nn.Module | None, direction: str) -> Tensor:
    """`all_reduce_sum` of a layer; errors name it.

    Args:
        owner: the layer; None for the bare function.
        direction: "forward" or "backward".

    Raises:
        CollectiveError: the collective failed; in debug mode also where the ranks are in different layers or passes.
    """
    if group is None or torch.compiler.is_compiling():
        return all_reduce_sum(tensor, group)
    if enabled:
        check(group, owner, direction, tensor.device)
    try:
        return all_reduce_sum(tensor, group)
    except RuntimeError as error:
        where = f"the {direction} pass of {name_of(owner)}"
        raise CollectiveError(where, f"rank {dist.get_rank()}: the all-reduce in {where} failed: {error}") from error


def check(group: dist.ProcessGroup, owner: nn.Module | None, direction: str, device: torch.device) -> None:
    """Compares with the other ranks of the group what they are about to sum; a collective of its own."""
    where = f"the {direction} pass of {name_of(owner)}"
    key = (id(owner), direction)
    _calls[key] = _calls.get(key, 0) + 1
    text = f"{where}, call {_calls[key]}"
    digest = int.from_bytes(hashlib.sha256(text.encode()).digest()[:7], "big")
    world_size = dist.get_world_size(group)
    mine, everybodys = torch.tensor([digest]), [torch.zeros(1, dtype=torch.int64) for _ in range(world_size)]
    try:
        channel = _channel(group, device)
        dist.all_gather(everybodys, mine, group=channel)
    except RuntimeError as error:
        raise CollectiveError(
            where, f"rank {dist.get_rank()} waits in {text}; not all other ranks have come to any layer: {error}"
        ) from error
    if all(int(other) == digest for other in everybodys):
        return
    texts: list[str] = [""] * world_size
    dist.all_gather_object(texts, text, group=channel)
    ranks = dist.get_process_group_ranks(group)
    listed = "; ".join(f"rank {rank}: {other}" for rank, other in zip(ranks, texts, strict=True))
    raise CollectiveError(where, f"the ranks are not in the same place, and would have waited for each other: {listed}")


def _channel(group: dist.ProcessGroup, device: torch.device) -> dist.ProcessGroup:
    """A gloo group of the same ranks, for the checks alone."""
    for known, channel in _channels:
        if known is group:
            return channel
    options = getattr(group._get_backend(device), "options", None)
    timeout = None if options is None else options._timeout  # as patient as the group itself
    members = dist.get_process_group_ranks(group)
    channel = dist.new_group(members, backend="gloo", timeout=timeout, use_local_synchronization=True)
    _channels.append((group, channel))
    return channel


def name_of(owner: nn.Module | None) -> str:
    """A layer's dotted name in the largest module of this process that holds it: slow, for errors and debugging."""
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
