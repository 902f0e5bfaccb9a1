"""The forward pass of a process that has the whole batch, on the CPU, for layers that a step calls hundreds of times.

It computes what the operators of `cpu` compute one by one, and gives the same bits, with fewer operators of ATen:
nothing is packed for a sum over ranks, and the check of the sums tells that no mean is far from 0. Small activations
are bound by the number of operators.
"""

from operator import call

import torch
from torch import Tensor

from syncbn.kernels import cpu, reference
from syncbn.kernels.cpu_blocks import pair_sums
from syncbn.kernels.cpu_statistics import are_near, move, pack_sums, rounded
from syncbn.kernels.step import PLAIN, Statistics
from syncbn.torch_compat import INTERCEPTORS


def forward(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    activation: str | None,
    statistics: Statistics,
) -> tuple[Tensor, Tensor, Tensor, Tensor] | None:
    """The operators `moments`, `finish` and `normalize`.

    Returns:
        output, mean, invstd and count; or None, with nothing done: the operators have to do the work.
    """
    # `operators.are_observed`, without its frame.
    if any(map(call, INTERCEPTORS)) or not PLAIN.issuperset(map(type, (input, weight, bias, residual))):
        return None
    if not cpu.is_regular(input):
        return None
    dtype = reference.compute_dtype(input.dtype)
    sums = pair_sums(input, input, None)
    count = input.numel() / input.size(1)
    mean, mean_square = (sums / count).unbind()
    if not are_near(mean, mean_square):
        mean, invstd, total = cpu.finish(pack_sums(input, sums), *statistics, dtype)
        return cpu.normalize(input, mean, invstd, weight, bias, residual, activation), mean, invstd, total
    variance = torch.addcmul(mean_square, mean, mean, value=-1)
    move(*statistics[:4], count, mean, variance)
    mean, invstd = rounded(mean, variance, statistics.eps, dtype)
    scale = invstd if weight is None else invstd * weight.to(dtype)
    output = cpu.normalize_near(input, scale, cpu.shift_of(mean, scale, bias), residual, activation)
    return output, mean, invstd, torch.full((), count, dtype=torch.float64)
