"""Whole forward and backward passes on a CUDA device, for layers that a step calls hundreds of times.

They launch what the operators of `cuda` launch one by one, and give the same bits. What depends on the kind of input
alone is planned once and kept. Where an input or a vector would have to be copied first, or something that is active
has to see the operators, they do nothing and return None; the operators then do the work.
"""

from __future__ import annotations

from collections.abc import Callable
from operator import call
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from syncbn.kernels import cuda, reference
from syncbn.kernels.step import PLAIN, Statistics
from syncbn.kernels.triton.launch_plan import ElementwisePlan, ReductionPlan, plan_passes, plan_sums
from syncbn.torch_compat import INTERCEPTORS

SumOverRanks = Callable[[Tensor], object]  # in place
_MOST_KINDS = 4096  # of inputs whose plans are kept


class _Kind(NamedTuple):
    """Plans for inputs of one shape, layout, type and device."""

    programs: ModuleType
    num_channels: int
    values: int  # of a channel
    compute_dtype: torch.dtype
    sums: ReductionPlan
    passes: ElementwisePlan
    partial: tuple[int, int, int]  # shape of partial sums: splits, 2, num_channels
    moments: tuple[int, ...]  # scalars of the kernel `moments`
    combine: tuple[int, ...]  # scalars of `combine_moments`
    finish_grid: tuple[int, int, int]


_kinds: dict[tuple[Any, ...], _Kind | None] = {}


def forward(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    activation: str | None,
    statistics: Statistics,
    sum_over_ranks: SumOverRanks | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor] | None:
    """The operators `moments`, `finish` and `normalize`.

    Args:
        sum_over_ranks: None where this process has the whole batch.

    Returns:
        output, mean, invstd and count; or None, with nothing done.
    """
    # `operators.are_observed`, without its frame.
    if any(map(call, INTERCEPTORS)) or not PLAIN.issuperset(map(type, (input, weight, bias, residual))):
        return None
    key = (input.shape, input.stride(), input.dtype, input.device)
    kind = _kinds[key] if key in _kinds else _plan(key, input)
    running_mean, running_var, num_batches_tracked, momentum, eps = statistics
    if (
        kind is None
        or (residual is not None and residual.stride() != key[1])
        or not (weight is None or weight.is_contiguous())
        or not (bias is None or bias.is_contiguous())
        or not (running_mean is None or (running_mean.is_contiguous() and running_mean.dtype in cuda.TYPES))
        or not (running_var is None or (running_var.is_contiguous() and running_var.dtype in cuda.TYPES))
    ):
        return None
    programs, num_channels, _, dtype, sums, passes, *_ = kind
    launch = programs.launch
    mean = input.new_empty((2, num_channels), dtype=dtype)
    invstd = input.new_empty(num_channels, dtype=dtype)
    count = input.new_empty((), dtype=torch.float64)
    results = (running_mean, running_var, num_batches_tracked, mean, invstd, count)
    is_cumulative = momentum is None and num_batches_tracked is not None
    rate = 0.0 if momentum is None else float(momentum)
    output = torch.empty_like(input)
    read = (weight, bias, residual)
    is_normalized = False
    if sum_over_ranks is None and not is_cumulative and sums.whole_channels is not None:
        plan = sums.whole_channels
        scalars = (rate, float(eps), kind.values, *plan.sizes)
        launch(programs.forward_channel, plan.grid, (input, output, *results, *read), scalars, plan.forward[activation])
        is_normalized = True
    elif sum_over_ranks is None and not is_cumulative:
        partial = input.new_empty(kind.partial, dtype=torch.float64)
        launch(programs.moments, sums.grid, (input, partial, partial), kind.moments, sums.partial_moments)
        scalars = (rate, float(eps), *kind.combine)
        launch(
            programs.combine_and_finish, sums.combine_grid, (input, partial, *results), scalars, sums.combine_and_finish
        )
    else:
        packed = input.new_empty(4 * num_channels + 1, dtype=torch.float64)
        partial = packed if sums.grid[1] == 1 else input.new_empty(kind.partial, dtype=torch.float64)
        launch(programs.moments, sums.grid, (input, partial, packed), kind.moments, sums.moments)
        if partial is not packed:
            launch(
                programs.combine_moments,
                sums.combine_grid,
                (input, partial, packed),
                kind.combine,
                sums.combine_moments,
            )
        if sum_over_ranks is not None:
            sum_over_ranks(packed)
        grid = (1, 1, 1) if is_cumulative else kind.finish_grid
        scalars = (rate, float(eps), num_channels)
        launch(programs.finish, grid, (packed, *results), scalars, cuda.FINISH[is_cumulative])
    if num_batches_tracked is not None and not num_batches_tracked.is_inference():
        increment_version(statistics[:3])  # type: ignore[arg-type]  # see `cuda.mark_as_written`
    elif running_mean is not None:
        cuda.mark_as_written(running_mean, running_var, num_batches_tracked)
    if not is_normalized:
        tensors = (input, output, mean, invstd, *read)
        launch(programs.normalize, passes.grid, tensors, passes.sizes, passes.normalize[activation])
    return output, mean, invstd, count


def backward(
    grad: Tensor,
    input: Tensor,
    mean: Tensor,
    invstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    kept: Tensor | None,
    activation: str | None,
    count: Tensor,
    dtype: torch.dtype,
    sum_over_ranks: SumOverRanks | None,
    keeps_grad: bool,
    needs_input: bool,
) -> tuple[Tensor | None, Tensor, Tensor] | None:
    """The operators `activated_reduce` or `backward_reduce`, then `backward_elementwise`.

    Args:
        keeps_grad: whether the caller needs the gradient of the activation's input; otherwise its memory is reused.
        needs_input: whether the gradient of the input is needed.

    Returns:
        that gradient; those of bias and weight, (2, C) in `dtype`; that of the activation's input. Or None, with
        nothing done.
    """
    # `operators.are_observed`, without its frame.
    if any(map(call, INTERCEPTORS)) or not PLAIN.issuperset(map(type, (grad, input, weight, bias, kept))):
        return None
    key = (input.shape, input.stride(), input.dtype, input.device)
    kind = _kinds[key] if key in _kinds else _plan(key, input)
    if (
        kind is None
        or grad.stride() != key[1]
        or grad.dtype not in cuda.TYPES
        or dtype not in cuda.TYPES
        or (kept is not None and kept.stride() != key[1])
        or not (weight is None or weight.is_contiguous())
        or not (bias is None or bias.is_contiguous())
    ):
        return None
    programs, num_channels, _, _, plan, passes, *_ = kind
    launch = programs.launch
    affine = input.new_empty((2, num_channels), dtype=dtype)
    grad_z = grad if activation is None else torch.empty_like(input)
    written = None if activation is None else grad_z
    grad_input = None
    if plan.whole_channels is not None and sum_over_ranks is None and needs_input:
        grad_input = torch.empty_like(input) if keeps_grad or activation is None else grad_z
        vectors = (mean, invstd, weight, bias)
        tensors: tuple[Tensor | None, ...] = (grad, input, grad_input, *vectors, kept, written, affine, count)
        channels = plan.whole_channels
        launch(programs.backward_channel, channels.grid, tensors, channels.sizes, channels.backward[activation])
        return grad_input, affine, grad_z
    sums = input.new_empty(2 * num_channels, dtype=torch.float64)
    partial = sums if plan.grid[1] == 1 else input.new_empty(kind.partial, dtype=torch.float64)
    vectors = (mean, invstd, weight, bias) if activation is not None else (mean, invstd, None, None)
    tensors = (grad, input, *vectors, kept, written, partial, sums, affine)
    launch(programs.backward_sums, plan.grid, tensors, plan.sizes, plan.backward_sums[activation])
    if partial is not sums:
        scalars = (num_channels, plan.grid[1])
        tensors = (partial, invstd, sums, affine)
        launch(programs.combine_backward_sums, plan.combine_grid, tensors, scalars, plan.combine_backward_sums)
    if needs_input:
        if sum_over_ranks is not None:
            sum_over_ranks(sums)
        grad_input = torch.empty_like(input) if keeps_grad or activation is None else grad_z
        tensors = (grad_z, input, grad_input, mean, invstd, weight, sums, count)
        launch(programs.backward_elementwise, passes.grid, tensors, passes.sizes, passes.backward_elementwise)
    return grad_input, affine, grad_z


def _plan(key: tuple[Any, ...], input: Tensor) -> _Kind | None:
    """The plans for inputs like this one, kept by `key`; None for those that only the operators can handle."""
    if len(_kinds) >= _MOST_KINDS:
        _kinds.clear()
    _kinds[key] = kind = _new_kind(input)
    return kind


def _new_kind(input: Tensor) -> _Kind | None:
    programs = cuda.programs_for(input)
    if programs is None or input.numel() == 0:
        return None
    dense, layout = cuda.as_dense(input)
    if dense is not input or torch.empty_like(input).stride() != input.stride():
        return None
    multiprocessors = cuda.multiprocessors(input.device)
    sums = plan_sums(layout, input.dtype.itemsize, multiprocessors)
    num_channels, splits = layout.channels, sums.grid[1]
    count = input.numel() // num_channels
    return _Kind(
        programs,
        num_channels,
        count,
        reference.compute_dtype(input.dtype),
        sums,
        plan_passes(layout, input.dtype.itemsize, multiprocessors),
        (splits, 2, num_channels),
        (count, *sums.sizes),
        (count, num_channels, splits, 1 if layout.last else layout.size),
        cuda.finish_grid(num_channels),
    )
