"""Statistics on the CPU from the sums of x and x^2, and from them the running statistics.

Small activations are bound by the number of operators, so these are few, and the check that plain sums do for every
channel is a single number.
"""

import math

import torch
from torch import Tensor

from syncbn.kernels import reference
from syncbn.kernels.cpu_blocks import constants, pair_sums
from syncbn.kernels.packing import pack

# Two limits on r = |mean| / std of a channel; the third is in `cpu`.
# Raw sums are used up to this r: the variance inherits their relative error, multiplied by about 1 + r^2.
_SUMS_UP_TO = 1.0
# float32 sums around a pivot are used up to this r: beyond, float32 represents the values too coarsely for them.
_PIVOT_UP_TO = 64.0


def pack_sums(input: Tensor, sums: Tensor) -> Tensor:
    """The packed moments from the sums of x and x^2, (2, C) float64; sums the channels again for which they do not do.

    Divides `sums` by the number of values in place.
    """
    num_channels = input.size(1)
    count = input.numel() // num_channels
    low, _ = constants(num_channels, torch.float64)
    packed = torch.cat([torch.full((1,), float(count), dtype=torch.float64), sums[0], low, sums[1], low])
    mean, mean_square = sums.div_(count).unbind()
    if not are_near(mean, mean_square):
        # False for NaN, which no other way of summing would help either.
        ill = (mean.square() * (1.0 + _SUMS_UP_TO**-2) > mean_square) | (mean_square == math.inf)
        if ill.any():
            parts = packed[1:].view(4, num_channels)
            parts[:, ill] = _around_pivot(input, mean, mean_square, ill)
    return packed


def _around_pivot(input: Tensor, mean: Tensor, mean_square: Tensor, ill: Tensor) -> Tensor:
    """The packed sums of the `ill` channels, (4, their number), around a pivot; float64 where float32 does not do."""
    part, pivot = (input, mean) if ill.all() else (input[:, ill], mean[ill])
    if ((mean.square() * (1.0 + _PIVOT_UP_TO**-2) > mean_square) | (mean_square == math.inf)).any():
        return reference.moments(part)[1:].view(4, -1)
    pivot = pivot.to(reference.compute_dtype(input.dtype))
    centred = part.to(pivot.dtype) - reference.per_channel(pivot, part)
    count = input.numel() // input.size(1)
    first, second = pair_sums(centred, centred, None)
    if pivot.dtype == torch.float64:
        return pack(count, pivot, first, second)[1:].view(4, -1)
    # Here r is at most _PIVOT_UP_TO on every rank, hence for all ranks together, and sums in float64 give the variance
    # with an error of 1e-12. That is nothing beside the 1e-7 that `first` and `second` have from float32, so what
    # float64 rounds off is not kept (as `pack` does, with some sixty operators).
    wide = pivot.to(torch.float64)
    total = torch.add(first, wide, alpha=count)
    low = torch.zeros_like(total)
    return torch.stack([total, low, torch.addcmul(second, wide, first + total), low])


def are_near(mean: Tensor, mean_square: Tensor) -> bool:
    """Whether the sums of x and x^2 do for all channels: mean^2 <= r^2 * variance; variance = E[x^2] - mean^2.

    They do not where float32 overflows in x^2, nor where x is not finite.
    """
    least, largest = torch.addcmul(mean_square, mean, mean, value=-(1.0 + _SUMS_UP_TO**-2)).aminmax()
    return float(least) >= 0.0 and float(largest) < math.inf


def move(
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
    momentum: float | None,
    count: float,
    mean: Tensor,
    variance: Tensor,
) -> None:
    """Moves the running statistics by a batch of at least one value per channel; its statistics are float64."""
    if num_batches_tracked is not None:
        num_batches_tracked.add_(1)
    if running_mean is None or running_var is None:
        return
    if momentum is not None:
        rate = momentum
    else:
        rate = 0.0 if num_batches_tracked is None else 1.0 / float(num_batches_tracked)
    _move(running_mean, mean, rate)
    if count > 1.0:
        _move(running_var, variance * (count / (count - 1.0)), rate)


def _move(running: Tensor, batch: Tensor, rate: float) -> None:
    """running + rate * (batch - running), computed in float64 and rounded once."""
    if rate < 0.5:
        running.add_(batch - running, alpha=rate)
    else:  # `lerp` starts from the other end here, and is exact for 1
        running.copy_(running.to(torch.float64).lerp_(batch, rate))


def rounded(mean: Tensor, variance: Tensor, eps: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Mean, (2, C), and inverse standard deviation in `dtype`, from float64."""
    high = mean.to(dtype)
    return torch.stack([high, (mean - high).to(dtype)]), (variance + eps).rsqrt_().to(dtype)
