"""The model in DistributedDataParallel, such that its first step is like every other."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from syncbn.training.place import Place

_WARM_UP_PASSES = 2  # the first records the order of gradients, the second's forward rebuilds the buckets by it


def wrap(model: nn.Module, place: Place, is_first: bool, loss_of: Callable[[nn.Module], Tensor]) -> nn.Module:
    """The model for training on several ranks; itself on one.

    DDP sums in its initial bucket layout until it has seen one backward pass, then in another order. A run that is
    resumed (or unfreezes, and wraps anew) would differ there from one that went on, by rounding. So throwaway passes
    rebuild the buckets first; buffers and gradients are put back, and no optimizer has stepped.

    Args:
        loss_of: this rank's loss of some batch under the wrapper; the same batch on every rank's side of it.
    """
    if place.world_size == 1:
        return model
    wrapped = DistributedDataParallel(
        model,
        device_ids=[place.device] if place.device.type == "cuda" else None,
        # Rank 0's state for all, once; later it would overwrite what groups of ranks have gathered on their own.
        init_sync=is_first,
        # Synchronized statistics are equal on all ranks by construction; local ones are pooled when they are used.
        forward_sync_buffers=False,
        gradient_as_bucket_view=True,
    )
    before = [buffer.clone() for buffer in model.buffers()]
    for _ in range(_WARM_UP_PASSES):
        loss_of(wrapped).backward()
    model.zero_grad(set_to_none=True)
    with torch.no_grad():
        for buffer, value in zip(model.buffers(), before, strict=True):
            buffer.copy_(value)
    return wrapped
