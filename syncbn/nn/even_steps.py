"""Training loops in which ranks have different numbers of batches."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils import _pytree as pytree

Batch = TypeVar("Batch")


def even_steps(loader: Iterable[Batch], process_group: dist.ProcessGroup | None = None) -> Iterator[Batch]:
    """Yields the batches of `loader`, then empty ones until every rank is out of data: all take equally many steps.

    A training forward of a `SyncBatchNorm`, like the backward of DDP, is a collective: a rank that leaves the loop
    early leaves the others waiting. An empty batch has the structure, types and further sizes of a real one (a rank
    without any batch takes them from another rank), and zero rows in every tensor. It adds nothing to statistics and
    gradients; divide the loss by the global count, and clear the gradients before it, as in any step.

    Communication: one number per step, and one exchange of structures before the first. Without a distributed job this
    is `iter(loader)`. Every rank has to iterate to the end.

    Args:
        loader: any iterable of batches: a tensor, or tuples, lists and dictionaries of them, rows in the first
            dimension.
        process_group: the ranks that step together; None for all ranks of the job.

    Raises:
        ValueError: no rank has a batch; raised on every rank.

    Example:
        >>> import torch
        >>> [len(batch) for batch in even_steps(torch.arange(5).split(2))]
        [2, 2, 1]
    """
    if not (dist.is_available() and dist.is_initialized()):
        yield from loader
        return
    batches = iter(loader)
    batch = next(batches, None)
    empty = _agree_on_empty(batch, process_group)
    while _any_rank(batch is not None, process_group):
        yield empty if batch is None else batch
        batch = next(batches, None) if batch is not None else None


def _any_rank(here: bool, group: dist.ProcessGroup | None) -> bool:
    device = "cuda" if dist.get_backend(group) == "nccl" else "cpu"
    flag = torch.tensor(float(here), device=device)
    dist.all_reduce(flag, group=group)
    return bool(flag.item())  # the loop cannot go on without an answer


def _agree_on_empty(batch: Any, group: dist.ProcessGroup | None) -> Any:
    """A batch with zero rows, modeled on this rank's first batch, or on another rank's if this one has none."""
    templates: list[Any] = [None] * dist.get_world_size(group)
    mine = None if batch is None else pytree.tree_map_only(Tensor, lambda t: t[:0].cpu(), batch)
    dist.all_gather_object(templates, mine, group=group)
    if batch is not None:
        return pytree.tree_map_only(Tensor, lambda t: t[:0], batch)
    template = next((other for other in templates if other is not None), None)
    if template is None:
        raise ValueError("loader: expected a batch on at least one rank, got none on any")
    return template
