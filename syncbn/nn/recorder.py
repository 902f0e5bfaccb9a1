"""Statistics of a layer's forward passes, recorded for a `Monitor` on watched steps only.

On such a step the payload of the forward pass has C more numbers, each rank's sum of squared deviations from its *own*
mean. Together with the squared deviations from the global mean, which the layer computes anyway, they split the
variance:

    total    sum over all of (x - mean)^2                                    = within + between
    within   sum over ranks of sum over its samples of (x - mean_r)^2
    between  sum over ranks of n_r (mean_r - mean)^2

(analysis of variance; n_r and mean_r are count and mean of rank r). All three are sums of squares, so only the
computation of between = total - within can cancel.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from syncbn.kernels import operators
from syncbn.torch_compat import hidden_from_modes

Reduce = Callable[[Tensor], Tensor]


def new_record(num_channels: int, device: torch.device) -> Tensor:
    """A zero accumulator of forward passes: `[packed moments (4C+1), between (C), total (C), calls]`, float64."""
    return torch.zeros(6 * num_channels + 2, dtype=torch.float64, device=device)


def split_record(record: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The parts of a record.

    Returns:
        packed moments (4C+1,); sums of squares between ranks (C,) and in total (C,); number of calls that normalized
        with the batch, (1,).
    """
    num_channels = (record.numel() - 2) // 6
    packed, between, total, calls = record.split([4 * num_channels + 1, num_channels, num_channels, 1])
    return packed, between, total, calls


def sum_and_record(local: Tensor, reduce: Reduce, record: Tensor) -> Tensor:
    """The packed moments summed over ranks, by one collective; adds the statistics of the batch to `record`."""
    with _hidden():
        payload = torch.cat([local, _squares(local)])
    payload = reduce(payload)
    with _hidden():
        packed, within = payload[: local.numel()], payload[local.numel() :]
        total = _squares(packed)
        record.add_(torch.cat([packed, (total - within).clamp(min=0.0), total, torch.ones_like(total[:1])]))
    return packed


def record_local(input: Tensor, mask: Tensor | None, record: Tensor) -> None:
    """Adds the moments of this rank's samples to `record`, without a collective.

    For forward passes that do not normalize with the batch.
    """
    with _hidden():
        packed = operators.moments(input.detach(), mask)
        record[: packed.numel()].add_(packed)


def _squares(packed: Tensor) -> Tensor:
    """sum((x - mean)^2) over all samples of the packed moments, (C,) float64: count / invstd^2 from `finish`."""
    _, invstd, count = operators.finish(packed, None, None, None, 0.0, 0.0, torch.float64)
    return count / invstd.square()  # 0 where the variance or the count is 0


def _hidden() -> AbstractContextManager[object]:
    """Hides the recorder's operators from selective checkpointing, which would miss them in the recomputation."""
    return nullcontext() if torch.compiler.is_compiling() else hidden_from_modes()
