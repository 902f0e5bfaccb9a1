"""Activation checkpointing: a forward pass recomputed during backward uses the batch moments of its first run.

Otherwise running statistics would be updated twice per step, and the recomputation would issue collectives of its own
in the middle of the backward pass. The moments of a forward pass are saved only where a recomputation may need them:
while saved-tensor hooks are active (`torch.utils.checkpoint`, use_reentrant=False), and, with gradients disabled,
inside of another autograd function (use_reentrant=True, and implementations that follow it). Saved moments live as long
as the hook or function context. They take a few kilobytes per layer; without checkpointing nothing is saved.

A recomputation is matched to its first run by the identity of the checkpoint. Nested checkpoints create their inner
checkpoints anew; those are matched by this rank's own moments, which are the same up to rounding.
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

_FAR = 1e-3  # `_distance` from which on moments are not those of the same forward pass
_KEPT_AFTER_USE = 8  # saved moments per layer that stay after use: a retained graph may be recomputed again
_memories = WeakIdKeyDictionary()  # owner (layer or running mean) -> weak references to its SavedMoments, oldest first


class SavedMoments:
    """The packed moments of one forward pass of one layer: this rank's (`local`), and the sum over ranks (`total`).

    Args:
        checkpoint: identifies the checkpoint: torch's frame object or the autograd function's context; None if unknown.
    """

    def __init__(self, local: Tensor, total: Tensor, checkpoint: Any) -> None:
        self.local, self.total = local, total
        self.checkpoint = None if checkpoint is None else weakref.ref(checkpoint)
        self.used_in = -1  # id of the backward pass that last recalled these moments; -1 for none


class Recomputation:
    """Handles the moments of one forward pass for checkpointing: saves them, or recalls those of the first run.

    Args:
        owner: the layer, or another object that is the same in both runs; None to save and recall nothing.
        backward_pass: id of the backward pass that the forward pass runs in; None in a first run.
        checkpoint: see `SavedMoments`.
        keeper: the object to which saved moments are attached, so that they live as long as it does.
    """

    def __init__(self, owner: object, backward_pass: int | None, checkpoint: Any, keeper: Any = None) -> None:
        self.owner, self.backward_pass, self._checkpoint, self._keeper = owner, backward_pass, checkpoint, keeper

    @classmethod
    def of(cls, owner: object) -> Recomputation | None:
        """The instance for a forward pass that is about to run; None if it cannot be recomputed later.

        Must be called in the gradient mode of that forward pass.
        """
        backward_pass = torch_compat.backward_pass()
        hooks = torch_compat.saved_tensor_hooks()
        if backward_pass != -1:
            frame = None if hooks is None else checkpoint_frame(hooks[0])
            return cls(owner, backward_pass, frame or function_context("backward"))
        if torch.is_grad_enabled():
            # The unpack hook lives as long as any tensor that it may have to unpack.
            return None if hooks is None else cls(owner, None, checkpoint_frame(hooks[0]), hooks[1])
        context = function_context("forward")
        return None if context is None else cls(owner, None, context, context)

    @property
    def is_second(self) -> bool:
        """Whether the forward pass is a recomputation."""
        return self.backward_pass is not None

    def total(self, local: Tensor, reduce: Callable[[Tensor], Tensor]) -> Tensor:
        """The global moments: recalled in a recomputation, else `local` summed over the ranks, and saved.

        Args:
            local: this rank's packed moments.
            reduce: sums a tensor over the ranks and returns the sum, in place or not.
        """
        if self.owner is None:
            return reduce(local)
        if self.is_second:
            recalled = self._recall(local)
            return reduce(local) if recalled is None else recalled
        # Selective checkpointing records operators, and would miss this copy in the recomputation, which does not make
        # one. It may also have saved the local moments, which must then not change, hence the copy.
        with torch_compat.hidden_from_modes():
            copy = local.clone()
        memory = SavedMoments(local, reduce(copy), self._checkpoint)
        self._keeper.__dict__.setdefault("_syncbn_memories", []).append(memory)
        alive = [other for reference in _memories.get(self.owner, ()) if (other := reference()) is not None]
        # If the graphs of past steps stay alive (a loss summed up without detach), their moments need not.
        dropped = [other for other in alive if other.used_in != -1][:-_KEPT_AFTER_USE]
        for other in dropped:
            other.local = other.total = torch.empty(0)
        _memories[self.owner] = [weakref.ref(other) for other in (*alive, memory) if other not in dropped]
        return memory.total

    def _recall(self, local: Tensor) -> Tensor | None:
        """The global moments of the first run of this forward pass; None if nothing is saved for the owner."""
        alive = [memory for reference in _memories.get(self.owner, ()) if (memory := reference()) is not None]
        fresh = [memory for memory in alive if memory.used_in != self.backward_pass]
        for memory in fresh:  # several calls of a layer in one checkpoint are recomputed in their order
            if (
                self._checkpoint is not None
                and memory.checkpoint is not None
                and memory.checkpoint() is self._checkpoint
            ):
                memory.used_in = self.backward_pass
                return memory.total
        return _nearest(fresh[::-1] or alive[::-1], local, self.backward_pass) if alive else None


def _nearest(memories: list[SavedMoments], local: Tensor, backward_pass: int | None) -> Tensor:
    """The global moments saved with the local moments nearest to `local`; asserts that they differ by rounding only."""
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
    """Distance of two packed moments: 0 if equal, about 1 if unrelated, infinite if the counts differ."""
    sums, squares = ((one - other)[1:].view(2, 2, -1)).sum(1).abs()
    mean_square = one[1:].view(2, 2, -1).sum(1)[1]
    scale = (one[0] * mean_square).sqrt().clamp(min=1e-300)  # bounds |sum|, by Cauchy and Schwarz
    relative = torch.cat([sums / scale, squares / mean_square.clamp(min=1e-300)]).clamp(max=1.0)
    both_undefined = one.isnan().any() & other.isnan().any()
    distance = torch.where(both_undefined, 0.0, relative.sum() / max(relative.numel(), 1)).nan_to_num(nan=torch.inf)
    return torch.where(one[0] == other[0], distance, torch.inf)


@torch_compat.assume_constant_result
def refuse_checkpoint_around_compiled() -> None:
    """Rejects compilation inside of a checkpoint; runs while `torch.compile` traces, not in the compiled graph.

    Raises:
        RuntimeError: the graph is traced inside of a checkpoint, which would run it twice without the graph knowing.
    """
    hooks = torch_compat.saved_tensor_hooks()
    if torch_compat.backward_pass() != -1 or (hooks is not None and checkpoint_frame(hooks[0]) is not None):
        raise RuntimeError(
            "a compiled SyncBatchNorm inside of torch.utils.checkpoint would move its statistics twice per step;"
            " compile around the checkpoint instead: torch.compile of a module that calls checkpoint"
        )
