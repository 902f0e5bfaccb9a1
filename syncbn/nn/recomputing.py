"""Activation checkpointing: a forward pass that runs again during backward uses the statistics of its first run.

Otherwise running statistics would move twice per step, and the second run would issue collectives of its own in the
middle of the backward pass. Only where something may ask for them later are the moments of a forward pass kept: while
saved tensors are being intercepted (`torch.utils.checkpoint`, use_reentrant=False), and without gradients inside of
another autograd function (use_reentrant=True, and the implementations that follow it). They live as long as the graph
that may ask. A few kilobytes per layer; nothing at all without checkpointing.

The second run finds its first by its own local moments, on the device: they are the same but for rounding.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable
from types import FrameType

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx
from torch.utils.weak import WeakIdKeyDictionary

_FAR = 0.1  # see _distance
_memories = WeakIdKeyDictionary()  # layer (or running mean) -> weak references to its memories, the newest first


class Memory:
    """The moments of one forward pass of one layer: this rank's own, and the sum over all ranks."""

    def __init__(self, local: Tensor, total: Tensor) -> None:
        self.local, self.total = local, total


class Rerun:
    """What a forward pass has to do for checkpointing: remember its moments, or recall those of its first run.

    Args:
        owner: the layer, or what else is the same object in both runs; None for nothing.
        keeper: whose lifetime the memory shares: the context of the autograd function around this forward pass; None
            for the forward pass's own.
    """

    def __init__(self, owner: object, is_second: bool, keeper: FunctionCtx | None) -> None:
        self.owner, self.is_second, self._keeper = owner, is_second, keeper

    @classmethod
    def of(cls, owner: object) -> Rerun | None:
        """For the coming forward pass; None where nothing can ever run it again. To be called in its gradient mode."""
        if torch._C._current_graph_task_id() != -1:  # inside of a backward pass
            return cls(owner, True, None)
        if torch.is_grad_enabled():
            intercepted = torch._C._autograd._top_saved_tensors_default_hooks(True) is not None
            return cls(owner, False, None) if intercepted else None
        keeper = _function_around()
        return None if keeper is None else cls(owner, False, keeper)

    def total(self, local: Tensor, ctx: FunctionCtx, reduce: Callable[[Tensor], Tensor]) -> Tensor:
        """The sum over all ranks of this rank's moments.

        Args:
            ctx: the context of the forward pass.
            reduce: sums over the ranks, in place or not.
        """
        if self.owner is None:
            return reduce(local)
        if self.is_second:
            recalled = _recall(self.owner, local)
            return reduce(local) if recalled is None else recalled
        memory = Memory(local.clone(), reduce(local))
        (ctx if self._keeper is None else self._keeper).__dict__.setdefault("_syncbn_memories", []).append(memory)
        alive = [reference for reference in _memories.get(self.owner, ()) if reference() is not None]
        _memories[self.owner] = [weakref.ref(memory), *alive]
        return memory.total


def _function_around() -> FunctionCtx | None:
    """The context of the innermost autograd function in whose forward this runs."""
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        if frame.f_code.co_name == "forward" and isinstance(frame.f_locals.get("ctx"), FunctionCtx):
            return frame.f_locals["ctx"]
        frame = frame.f_back
    return None


def _recall(owner: object, local: Tensor) -> Tensor | None:
    """The global moments of the forward pass that had these local ones; None if there is no memory at all.

    On the device it is an error if the nearest one differs by more than rounding explains.
    """
    memories = [memory for reference in _memories.get(owner, ()) if (memory := reference()) is not None]
    if not memories:
        return None
    distances = torch.stack([_distance(memory.local, local) for memory in memories])
    nearest = distances.argmin().view(1)
    torch._assert_async(
        distances[nearest] < _FAR,
        "a training forward of a SyncBatchNorm inside of a backward pass fits no forward before it; call the model"
        " outside of autograd's hooks",
    )
    return torch.stack([memory.total for memory in memories]).index_select(0, nearest).squeeze(0)


def _distance(one: Tensor, other: Tensor) -> Tensor:
    """How far two packed moments are apart: 0 for equal ones, about 1 for unrelated ones, infinite for other counts."""
    sums, squares = ((one - other)[1:].view(2, 2, -1)).sum(1).abs()
    mean_square = one[1:].view(2, 2, -1).sum(1)[1]
    scale = (one[0] * mean_square).sqrt().clamp(min=1e-300)  # bounds |sum|, by Cauchy and Schwarz
    relative = torch.cat([sums / scale, squares / mean_square.clamp(min=1e-300)]).clamp(max=1.0)
    return torch.where(one[0] == other[0], relative.mean().nan_to_num(nan=0.0), torch.inf)
