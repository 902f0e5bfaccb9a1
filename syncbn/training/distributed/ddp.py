"""A DistributedDataParallel wrapper with stable bucket order from the first step, and totals in its buckets."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from syncbn.torch_compat import ddp_without_buffer_sync
from syncbn.training.distributed.rank_context import RankContext

_WARM_UP_PASSES = 2  # the first backward records the order of gradients, the second forward rebuilds buckets by it


class WrappedModel:
    """A model wrapped in DistributedDataParallel (DDP), or the model itself if there is one rank.

    A few totals of a step (loss sum, count, flags) have to be summed over all ranks before the optimizer steps. They
    are the gradient of an extra parameter and so travel in DDP's buckets: they add no collective to a step.

    DDP reduces in its initial bucket layout until after its first backward pass, then rebuilds the buckets in another
    order. A run that is resumed, or that wraps the model again after unfreezing, would therefore differ by rounding
    from an uninterrupted one. To avoid that, the constructor runs warm-up passes until the buckets are rebuilt, then
    restores the buffers and clears the gradients; no optimizer steps.

    Every rank has to construct it at the same time: DDP and the warm-up passes communicate.

    Args:
        is_first: broadcast rank 0's parameters and buffers to all ranks. Only for the first wrapper of a job: later
            it would overwrite running statistics that differ between groups of ranks.
        num_totals: number of totals.
        loss_of: computes this rank's loss, a scalar, for the warm-up passes, by calling the wrapper that it is given.
        num_warm_up_passes: their number, two or more.
    """

    def __init__(
        self,
        model: nn.Module,
        context: RankContext,
        *,
        is_first: bool,
        num_totals: int,
        loss_of: Callable[[WrappedModel], Tensor],
        num_warm_up_passes: int = _WARM_UP_PASSES,
    ) -> None:
        self.model, self._world_size = model, context.world_size
        self._ddp: DistributedDataParallel | None = None
        if context.world_size == 1:
            return
        self._carrying = _Carrying(model, num_totals, context.device)
        # Synchronized running statistics are equal on all ranks by construction; local ones are pooled when needed.
        self._ddp = ddp_without_buffer_sync(
            self._carrying,
            device_ids=[context.device] if context.device.type == "cuda" else None,
            init_sync=is_first,
            gradient_as_bucket_view=True,
        )
        before = [buffer.clone() for buffer in model.buffers()]
        for _ in range(num_warm_up_passes):
            self.backward(loss_of(self), torch.zeros(num_totals, device=context.device))
        model.zero_grad(set_to_none=True)
        with torch.no_grad():
            for buffer, value in zip(model.buffers(), before, strict=True):
                buffer.copy_(value)

    def __call__(self, *args: Any) -> Any:
        """The model's forward pass, through DDP if there are several ranks."""
        return (self.model if self._ddp is None else self._ddp)(*args)

    def without_communication(self) -> AbstractContextManager[None]:
        """Context for forward and backward of every micro-batch but the last of a step: gradients stay local."""
        return nullcontext() if self._ddp is None else self._ddp.no_sync()

    def backward(self, loss: Tensor, totals: Tensor) -> Tensor:
        """The last backward of a step; DDP's all-reduces average the gradients over all ranks.

        Args:
            loss: this rank's loss, a scalar tensor.
            totals: this rank's totals, (num_totals,).

        Returns:
            The totals summed over all ranks, (num_totals,) float64. With several ranks they are rounded to float32
            (float64 if a trained parameter is float64) on the way, because they travel as a gradient.
        """
        if self._ddp is None:
            loss.backward()
            return totals.double()
        carrier = self._carrying.totals
        # DDP divides by the world size again. For 2, 3 and most other world sizes, integers survive that exactly.
        given = (totals * self._world_size).to(carrier.dtype)
        torch.autograd.backward([loss, carrier], [None, given])
        arrived, carrier.grad = carrier.grad, None
        assert arrived is not None
        return arrived.to(torch.float64, copy=True)  # a copy: the gradient is a view of DDP's bucket


class _Carrying(nn.Module):
    """A model together with an extra parameter whose gradient carries the totals."""

    wrapped_child = "model"  # so that module names and patterns are those of the model

    def __init__(self, model: nn.Module, num_totals: int, device: torch.device) -> None:
        super().__init__()
        self.model = model
        trained = {parameter.dtype for parameter in model.parameters() if parameter.requires_grad}
        # A bucket holds one dtype: in that of the parameters, the totals need no bucket of their own.
        wide = torch.float64 if torch.float64 in trained else torch.float32
        self.totals = nn.Parameter(torch.zeros(num_totals, dtype=wide, device=device))

    def forward(self, *args: Any) -> Any:
        return self.model(*args)
