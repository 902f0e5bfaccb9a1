"""What a layer's forward passes see, recorded for a `Monitor` on the steps that are watched, and only then.

On such a step the payload of the forward pass carries C more numbers, each rank's sum of squared deviations from its
*own* mean. With the deviations from the common mean, which the layer knows anyway, variance separates:

    total    sum over all of (x - mean)^2                                    = within + between
    within   sum over ranks of sum over its samples of (x - mean_r)^2
    between  sum over ranks of n_r (mean_r - mean)^2

(the analysis of variance; n_r and mean_r are the rank's). All three are sums of squares: nothing cancels but in
between = total - within.
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
    """Zeros, to which passes are added: `[packed moments (4C+1), between (C), total (C), calls]`, float64."""
    return torch.zeros(6 * num_channels + 2, dtype=torch.float64, device=device)


def split_record(record: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Packed moments (4C+1), sums of squares between ranks (C) and in total (C), calls that normalized by the batch."""
    num_channels = (record.numel() - 2) // 6
    packed, between, total, calls = record.split([4 * num_channels + 1, num_channels, num_channels, 1])
    return packed, between, total, calls


def sum_and_record(local: Tensor, reduce: Reduce, record: Tensor) -> Tensor:
    """The sum over ranks of the packed moments, by one collective, with what they say added to `record`."""
    with _hidden():
        payload = torch.cat([local, _squares(local)])
    payload = reduce(payload)
    with _hidden():
        packed, within = payload[: local.numel()], payload[local.numel() :]
        total = _squares(packed)
        record.add_(torch.cat([packed, (total - within).clamp(min=0.0), total, torch.ones_like(total[:1])]))
    return packed


def record_local(input: Tensor, mask: Tensor | None, record: Tensor) -> None:
    """Adds the moments of this rank's samples, of a pass that does not normalize by them: no collective."""
    with _hidden():
        packed = operators.moments(input.detach(), mask)
        record[: packed.numel()].add_(packed)


def _squares(packed: Tensor) -> Tensor:
    """(C,) float64: sum((x - mean)^2) over all samples of the packed moments; by a kernel that is there anyway."""
    _, invstd, count = operators.finish(packed, None, None, None, 0.0, 0.0, torch.float64)
    return count / invstd.square()  # 0 where nothing varies, and where there is nothing


def _hidden() -> AbstractContextManager[object]:
    """Hides what is for us alone from selective checkpointing, which would miss it in the second run."""
    return nullcontext() if torch.compiler.is_compiling() else hidden_from_modes()
