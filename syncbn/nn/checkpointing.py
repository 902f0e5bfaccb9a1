"""Activation checkpointing: a forward pass that runs again during backward uses the statistics of its first run.

Otherwise running statistics would move twice per step, and the second run would issue collectives of its own in the
middle of the backward pass. Only where something may ask for them later are the moments of a forward pass kept: while
saved tensors are being intercepted (`torch.utils.checkpoint`, use_reentrant=False), and without gradients inside of
another autograd function (use_reentrant=True, and the implementations that follow it). They live as long as what may
ask. A few kilobytes per layer; nothing at all without checkpointing.

The second run of a checkpoint finds its first by the checkpoint itself. Where checkpoints are nested the inner ones are
made anew, and it goes by this rank's own moments, which are the same but for rounding.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from syncbn import torch_compat
from syncbn.nn.call_stack import function_context
from syncbn.torch_compat import checkpoint_frame

_FAR = 1e-3  # see _distance
_KEPT_AFTER_USE = 8  # a graph that is kept may be recomputed again
_memories = WeakIdKeyDictionary()  # layer (or running mean) -> weak references to its memories, the oldest first


class SavedMoments:
    """The moments of one forward pass of one layer: this rank's own, and the sum over all ranks.

    Args:
        checkpoint: what tells one checkpoint from another: torch's frame object, or the autograd function's context.
    """

    def __init__(self, local: Tensor, total: Tensor, checkpoint: Any) -> None:
        self.local, self.total = local, total
        self.checkpoint = None if checkpoint is None else weakref.ref(checkpoint)
        self.used_in = -1  # the backward pass that has recalled it


class Recomputation:
    """What a forward pass has to do for checkpointing: remember its moments, or recall those of its first run.

    Args:
        owner: the layer, or what else is the same object in both runs; None for nothing.
        backward_pass: torch's number of the backward pass that this runs in; None in a first run.
        checkpoint: see `SavedMoments`; None where it cannot be told.
        keeper: the object whose lifetime a memory shares.
    """

    def __init__(self, owner: object, backward_pass: int | None, checkpoint: Any, keeper: Any = None) -> None:
        self.owner, self.backward_pass, self._checkpoint, self._keeper = owner, backward_pass, checkpoint, keeper

    @classmethod
    def of(cls, owner: object) -> Recomputation | None:
        """For the coming forward pass; None where nothing can ever run it again. To be called in its gradient mode."""
        backward_pass = torch_compat.backward_pass()
        hooks = torch_compat.saved_tensor_hooks()
        if backward_pass != -1:
            frame = None if hooks is None else checkpoint_frame(hooks[0])
            return cls(owner, backward_pass, frame or function_context("backward"))
        if torch.is_grad_enabled():
            # The hook that unpacks lives as long as any tensor that it may be asked for.
            return None if hooks is None else cls(owner, None, checkpoint_frame(hooks[0]), hooks[1])
        context = function_context("forward")
        return None if context is None else cls(owner, None, context, context)

    @property
    def is_second(self) -> bool:
        """Whether this is a second run."""
        return self.backward_pass is not None

    def total(self, local: Tensor, reduce: Callable[[Tensor], Tensor]) -> Tensor:
        """The sum over all ranks of this rank's moments.

        Args:
            reduce: sums over the ranks, in place or not.
        """
        if self.owner is None:
            return reduce(local)
        if self.is_second:
            recalled = self._recall(local)
            return reduce(local) if recalled is None else recalled
        # Selective checkpointing records operators, and would miss in the second run those that are for us alone; it
        # may also keep the local moments, which must not change then.
        with torch_compat.hidden_from_modes():
            copy = local.clone()
        memory = SavedMoments(local, reduce(copy), self._checkpoint)
        self._keeper.__dict__.setdefault("_syncbn_memories", []).append(memory)
        alive = [other for reference in _memories.get(self.owner, ()) if (other := reference()) is not None]
        # Who keeps the graph of past steps (a loss that is summed up undetached) must not keep all of their moments.
        dropped = [other for other in alive if other.used_in != -1][:-_KEPT_AFTER_USE]
        for other in dropped:
            other.local = other.total = torch.empty(0)
        _memories[self.owner] = [weakref.ref(other) for other in (*alive, memory) if other not in dropped]
        return memory.total

    def _recall(self, local: Tensor) -> Tensor | None:
        """The global moments of the first run of this forward pass; None if there is no memory at all."""
        alive = [memory for reference in _memories.get(self.owner, ()) if (memory := reference()) is not None]
        fresh = [memory for memory in alive if memory.used_in != self.backward_pass]
        for memory in fresh:  # the calls of one layer in one checkpoint come in their order
            if (
                self._checkpoint is not None
                and memory.checkpoint is not None
                and memory.checkpoint() is self._checkpoint
            ):
                memory.used_in = self.backward_pass
                return memory.total
        return _nearest(fresh[::-1] or alive[::-1], local, self.backward_pass) if alive else None


def _nearest(memories: list[SavedMoments], local: Tensor, backward_pass: int | None) -> Tensor:
    """The total of the memory whose local moments these are; an error where they differ by more than rounding."""
    with torch_compat.hidden_from_modes():
        distances = torch.stack([_distance(memory.local, local) for memory in memories])
        nearest = distances.argmin().view(1)
        torch_compat.assert_on_device(
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
    both_undefined = one.isnan().any() & other.isnan().any()
    distance = torch.where(both_undefined, 0.0, relative.sum() / max(relative.numel(), 1)).nan_to_num(nan=torch.inf)
    return torch.where(one[0] == other[0], distance, torch.inf)


@torch.compiler.assume_constant_result
def refuse_checkpoint_around_compiled() -> None:
    """Runs when a graph is made.

    Raises:
        RuntimeError: it is made inside of a checkpoint, which would run it twice: it could not tell the second run.
    """
    hooks = torch_compat.saved_tensor_hooks()
    if torch_compat.backward_pass() != -1 or (hooks is not None and checkpoint_frame(hooks[0]) is not None):
        raise RuntimeError(
            "a compiled SyncBatchNorm inside of torch.utils.checkpoint would move its statistics twice per step;"
            " compile around the checkpoint instead: torch.compile of a module that calls checkpoint"
        )
