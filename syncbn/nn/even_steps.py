"""Training loops in which ranks have different numbers of batches."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from syncbn.nn.empty_batches import cut_to_nothing, pack_batch

Batch = TypeVar("Batch")


def even_steps(
    loader: Iterable[Batch],
    process_group: dist.ProcessGroup | None = None,
    *,
    empty: Callable[[Batch], Batch] | None = None,
) -> Iterator[Batch]:
    """Yields the batches of `loader`, then empty ones until every rank is out of data: all take equally many steps.

    A training forward of a `SyncBatchNorm`, like the backward of DDP, is a collective: a rank that leaves the loop
    early leaves the others waiting. An empty batch has the structure, classes, types and further sizes of a real one (a
    rank without any batch takes them from another rank), and zero rows in every tensor. It adds nothing to statistics
    and gradients; divide the loss by the global count, and clear the gradients before it, as in any step.

    Rows are the first dimension of tensors and NumPy arrays, wherever they are: in tuples, named tuples, lists,
    mappings (`UserDict` and what derives from it included), dataclasses, classes of attrs, and nodes registered with
    torch's pytree. A list with one entry for each row (strings, say) is cut too. Single values (a number, a string,
    None, a tensor without dimensions) are handed on.

    Communication: one number per step, and one exchange of structures before the first. Without a distributed job this
    is `iter(loader)`. Every rank has to iterate to the end.

    Args:
        loader: any iterable of batches, of the types above.
        process_group: the ranks that step together; None for all ranks of the job.
        empty: makes the empty batch from a real one, for batches of other types, as in `lambda batch: batch[:0]`.

    Raises:
        TypeError: a batch that cannot be cut, by its type; raised on every rank, before the first step.
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
    nothing = _agree_on_empty(batch, process_group, cut_to_nothing if empty is None else empty)
    while _any_rank(batch is not None, process_group):
        yield nothing if batch is None else batch
        batch = next(batches, None) if batch is not None else None


def _any_rank(here: bool, group: dist.ProcessGroup | None) -> bool:
    device = "cuda" if dist.get_backend(group) == "nccl" else "cpu"
    flag = torch.tensor(float(here), device=device)
    dist.all_reduce(flag, group=group)
    return bool(flag.item())  # the loop cannot go on without an answer


@dataclass(frozen=True)
class _Offer:
    """What one rank tells the others of its empty batch."""

    packed: bytes | None = None  # None if it has no batch, or one that cannot be pickled
    error: str | None = None  # why there is no empty batch although there is a batch
    unsendable: str | None = None  # why the empty batch cannot be sent


def _agree_on_empty(batch: Any, group: dist.ProcessGroup | None, cut: Callable[[Any], Any]) -> Any:
    """A batch with zero rows, modeled on this rank's first batch, or on another rank's if this one has none."""
    mine, cause = None, None
    offer = _Offer()
    if batch is not None:
        try:
            mine = cut(batch)
            offer = _pack(mine)
        except Exception as error:  # `cut` may be the user's
            cause = error
            offer = _Offer(error=str(error) if isinstance(error, TypeError) else f"{type(error).__name__}: {error}")
    offers = [offer] * dist.get_world_size(group)
    dist.all_gather_object(offers, offer, group=group)
    refused = {rank: one.error for rank, one in enumerate(offers) if one.error is not None}
    if refused:
        rank, error_text = next(iter(refused.items()))
        raise TypeError(f"rank {rank}: {error_text}") from cause
    if all(one == _Offer() for one in offers):
        raise ValueError("loader: expected a batch on at least one rank, got none on any")
    packed = next((one.packed for one in offers if one.packed is not None), None)
    if packed is None and any(one == _Offer() for one in offers):
        reason = next(one.unsendable for one in offers if one.unsendable is not None)
        raise TypeError(f"loader: a rank has no batch, and an empty one cannot be sent to it: {reason}")
    return pickle.loads(packed) if batch is None and packed is not None else mine


def _pack(empty: Any) -> _Offer:
    try:
        return _Offer(packed=pack_batch(empty))
    except Exception as error:  # a class or a function that has no importable name
        return _Offer(unsendable=f"{type(error).__name__}: {error}")
