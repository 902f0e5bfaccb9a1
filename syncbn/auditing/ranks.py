"""Comparison of the ranks of a job: which of them share a layer's statistics, and whether their layers agree."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from syncbn.auditing.rules import Finding, new_finding
from syncbn.nn.batchnorm import SyncBatchNorm
from syncbn.nn.groups import LostGroup, as_group


def world_size() -> int:
    """The number of ranks; 1 without a distributed job."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def is_frozen(layer: _BatchNorm) -> bool:
    """Whether the running statistics of a layer are frozen by `freeze`."""
    return isinstance(layer, SyncBatchNorm) and layer.stats_frozen


def is_synchronized(layer: _BatchNorm) -> bool:
    """Whether a layer normalizes with samples of other ranks too: `SyncBatchNorm` of this package or of torch."""
    return isinstance(layer, SyncBatchNorm | nn.SyncBatchNorm)


def members_of(layer: _BatchNorm) -> tuple[int, ...] | None:
    """The ranks whose statistics a layer shares in training; None for a local layer."""
    if not is_synchronized(layer):
        return None
    if world_size() == 1:
        return (0,)
    group = getattr(layer, "process_group", None)
    if group is None:
        return tuple(range(world_size()))
    resolved = None if isinstance(group, LostGroup) else as_group(group)
    if resolved is None or resolved is dist.GroupMember.NON_GROUP_MEMBER:
        return (dist.get_rank(),)  # not a member of the group: the next training forward raises
    return tuple(dist.get_process_group_ranks(resolved))


def on_all_ranks(findings: list[Finding], layers: Mapping[str, _BatchNorm]) -> list[Finding]:
    """The findings of all ranks, and those of a comparison between the ranks; the same on every rank.

    Communication: one `all_gather_object` of findings and digests; no statistics are sent. A synchronized layer is
    compared among the ranks that share its statistics. A local layer is compared among all ranks, because all of them
    start from the same state, and evaluation needs the same state on each.
    """
    if world_size() == 1:
        return findings
    digests = {name: (members_of(layer), *_digests(layer)) for name, layer in layers.items()}
    everybodys: list[Any] = [None] * world_size()
    dist.all_gather_object(everybodys, (findings, digests))
    result = [finding for theirs, _ in everybodys for finding in theirs]
    for name in dict.fromkeys(name for _, theirs in everybodys for name in theirs):
        per_rank = [theirs.get(name, (None, "", "")) for _, theirs in everybodys]
        for members, settings, values in per_rank:
            peers = [per_rank[other] for other in (range(len(per_rank)) if members is None else members)]
            if any(settings != other[1] for other in peers):
                result.append(new_finding("ranks-differ-in-mode", name))
            elif any(values != other[2] for other in peers):
                # Local statistics differ after each step: a warning, as DDP or evaluation may still make them equal.
                result.append(
                    new_finding("ranks-differ-in-statistics", name, severity="error" if members else "warning")
                )
    return result


def _digests(layer: _BatchNorm) -> tuple[str, str]:
    """Digests of a layer's settings and of its statistics, 8 bytes each as hexadecimal text."""
    settings = (type(layer).__name__, layer.training, is_frozen(layer), layer.track_running_stats, layer.momentum)
    values = hashlib.blake2b(digest_size=8)
    for buffer in (layer.running_mean, layer.running_var, layer.num_batches_tracked):
        if buffer is not None and not buffer.is_meta:
            values.update(buffer.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return hashlib.blake2b(repr(settings).encode(), digest_size=8).hexdigest(), values.hexdigest()
