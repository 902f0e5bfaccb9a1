"""The model in DistributedDataParallel, such that its first step is like every other and its totals travel along."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from syncbn.training.distributed.rank_context import RankContext

_WARM_UP_PASSES = 2  # the first records the order of gradients, the second's forward rebuilds the buckets by it


class WrappedModel:
    """A model to train on all ranks of a place, by DDP; as it is where there is one rank.

    A few totals of a step (the sum of the loss, what it counts) are needed from all ranks before the weights move. They
    travel as the gradient of a parameter of their own, in DDP's buckets: a step has no collective that DDP and the
    layers would not have without them.

    DDP sums in its initial bucket layout until it has seen one backward pass, then in another order. A run that is
    resumed (or unfreezes, and wraps anew) would differ there from one that went on, by rounding. So throwaway passes
    rebuild the buckets first; buffers and gradients are put back, and no optimizer has stepped.

    Args:
        is_first: takes rank 0's state for all; later that would overwrite what groups of ranks have gathered.
        num_totals: how many there are.
        loss_of: this rank's loss of some batch under the wrapper; the same batch on every rank's side of it.
    """

    def __init__(
        self,
        model: nn.Module,
        context: RankContext,
        *,
        is_first: bool,
        num_totals: int,
        loss_of: Callable[[WrappedModel], Tensor],
    ) -> None:
        self.model, self._world_size = model, context.world_size
        self._ddp: DistributedDataParallel | None = None
        if context.world_size == 1:
            return
        self._carrying = _Carrying(model, num_totals, context.device)
        self._ddp = DistributedDataParallel(
            self._carrying,
            device_ids=[context.device] if context.device.type == "cuda" else None,
            init_sync=is_first,
            # Synchronized statistics are equal on all ranks by construction; local ones are pooled when they are used.
            forward_sync_buffers=False,
            gradient_as_bucket_view=True,
        )
        before = [buffer.clone() for buffer in model.buffers()]
        for _ in range(_WARM_UP_PASSES):
            self.backward(loss_of(self), torch.zeros(num_totals, device=context.device))
        model.zero_grad(set_to_none=True)
        with torch.no_grad():
            for buffer, value in zip(model.buffers(), before, strict=True):
                buffer.copy_(value)

    def __call__(self, *args: Any) -> Any:
        """The model's forward."""
        return (self.model if self._ddp is None else self._ddp)(*args)

    def without_communication(self) -> AbstractContextManager[None]:
        """Around forward and backward of a micro-batch that is not the last of its step: gradients stay local."""
        return nullcontext() if self._ddp is None else self._ddp.no_sync()

    def backward(self, loss: Tensor, totals: Tensor) -> Tensor:
        """The last backward of a step; averages gradients over ranks.

        Args:
            loss: of this rank; no dimensions.
            totals: of this rank, `num_totals` of them.

        Returns:
            The totals summed over all ranks, in float64, with the rounding of the model's parameters: they have
            travelled as a gradient, which DDP divides by the ranks.
        """
        if self._ddp is None:
            loss.backward()
            return totals.double()
        carrier = self._carrying.totals
        # DDP averages; for two ranks, three, and most numbers of them, whole numbers come back exactly.
        given = (totals * self._world_size).to(carrier.dtype)
        torch.autograd.backward([loss, carrier], [None, given])
        arrived, carrier.grad = carrier.grad, None
        assert arrived is not None
        return arrived.to(torch.float64, copy=True)  # not the bucket itself


class _Carrying(nn.Module):
    """A model beside a parameter whose gradient carries totals."""

    wrapped_child = "model"  # names of modules are those of the model

    def __init__(self, model: nn.Module, num_totals: int, device: torch.device) -> None:
        super().__init__()
        self.model = model
        trained = {parameter.dtype for parameter in model.parameters() if parameter.requires_grad}
        wide = torch.float64 if torch.float64 in trained else torch.float32  # DDP has buckets for each type
        self.totals = nn.Parameter(torch.zeros(num_totals, dtype=wide, device=device))

    def forward(self, *args: Any) -> Any:
        return self.model(*args)
