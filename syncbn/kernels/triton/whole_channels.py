"""Triton kernels that do a whole pass in one launch: each program has a channel to itself, all of it.

They are for activations in planes (see `reductions`) that nobody else has a part of, and whose channels are small
enough for one program: the second reading of a channel then comes from a cache, and a step of six launches takes two.
They compute what the kernels of `reductions` and `elementwise` compute, in the same order, to the same bits.
"""

# mypy: disable-error-code="no-untyped-def"
# ruff: noqa: N803

import triton
import triton.language as tl

from syncbn.kernels.triton.double_double import pack, store_float64
from syncbn.kernels.triton.elementwise import (
    activated,
    activation_backward,
    gradient_terms,
    scale_and_shift,
    scaled,
    with_residual,
)
from syncbn.kernels.triton.reductions import finish_channels
from syncbn.kernels.triton.tiles import SIZES, accumulator, folded, reduced_tile, row_length, total_per_channel


@triton.jit(do_not_specialize=SIZES)
def forward_channel(
    input, output, running_mean, running_var, num_batches_tracked, mean, invstd, count_copy, weight, bias, residual,
    momentum: tl.float64, eps: tl.float64, count, num_channels, planes, units, tiles, tiles_across,
    ACTIVATION: tl.constexpr, UNIT: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr,
    FOLD: tl.constexpr, STAGES: tl.constexpr, INT64_OFFSETS: tl.constexpr,
):  # fmt: skip
    """`moments`, `finish` and `normalize` of a batch that is not summed over ranks; not for the cumulative average."""
    channel = tl.program_id(0)
    if INT64_OFFSETS:
        channel = channel.to(tl.int64)
    size = row_length(units, UNIT, INT64_OFFSETS)
    inside = channel < num_channels
    pivot = tl.load(input + channel * size).to(tl.float64)
    first = accumulator(False, BLOCK_ROWS, BLOCK_COLS, FOLD)
    second = accumulator(False, BLOCK_ROWS, BLOCK_COLS, FOLD)
    for tile in tl.range(0, tiles, num_stages=STAGES):
        offset, exists = reduced_tile(
            tile, channel, num_channels, planes, size, tiles_across, False, BLOCK_ROWS, BLOCK_COLS
        )
        centred = tl.where(exists, tl.load(input + offset, mask=exists, other=0.0).to(tl.float64) - pivot, 0.0)
        first += folded(centred, False, BLOCK_ROWS, BLOCK_COLS, FOLD)
        second += folded(centred * centred, False, BLOCK_ROWS, BLOCK_COLS, FOLD)

    n = count.to(tl.float64)
    sum_part, sum_rest, square_part, square_rest = pack(
        n, pivot, total_per_channel(first, False), total_per_channel(second, False)
    )
    high, low, inverse = finish_channels(
        channel, num_channels, n, n, sum_part, sum_rest, square_part, square_rest, running_mean, running_var, mean,
        invstd, momentum, eps,
    )  # fmt: skip
    if channel == 0:
        tl.store(count_copy, n)
        if num_batches_tracked is not None:
            counted = tl.load(num_batches_tracked) + 1
            tl.debug_barrier()  # every thread reads the counter before it is overwritten
            tl.store(num_batches_tracked, counted)

    scale, shift = scale_and_shift(low, inverse, weight, bias, channel, inside)
    for step in tl.range(0, tiles, num_stages=STAGES):  # backwards: the end of the channel is what caches still hold
        offset, exists = reduced_tile(
            tiles - 1 - step, channel, num_channels, planes, size, tiles_across, False, BLOCK_ROWS, BLOCK_COLS
        )
        x = tl.load(input + offset, mask=exists)
        y = with_residual(scaled(x, high, scale, shift, x.dtype), residual, offset, exists, x.dtype)
        tl.store(output + offset, activated(y, ACTIVATION).to(output.dtype.element_ty), mask=exists)


@triton.jit(do_not_specialize=SIZES)
def backward_channel(
    grad, input, output, mean, invstd, weight, bias, kept, grad_z, affine, count, num_channels, planes, units, tiles,
    tiles_across, ACTIVATION: tl.constexpr, UNIT: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr,
    FOLD: tl.constexpr, STAGES: tl.constexpr, INT64_OFFSETS: tl.constexpr,
):  # fmt: skip
    """`backward_sums` and `backward_elementwise` of a batch whose sums are not summed over ranks."""
    channel = tl.program_id(0)
    if INT64_OFFSETS:
        channel = channel.to(tl.int64)
    size = row_length(units, UNIT, INT64_OFFSETS)
    inside = channel < num_channels
    high = tl.load(mean + channel, mask=inside)
    low = tl.load(mean + num_channels + channel, mask=inside)
    inverse = tl.load(invstd + channel, mask=inside)
    if ACTIVATION is not None:
        scale, shift = scale_and_shift(low, inverse, weight, bias, channel, inside)
    wide_high, wide_low = high.to(tl.float64), low.to(tl.float64)
    first = accumulator(False, BLOCK_ROWS, BLOCK_COLS, FOLD)
    second = accumulator(False, BLOCK_ROWS, BLOCK_COLS, FOLD)
    for tile in tl.range(0, tiles, num_stages=STAGES):
        offset, exists = reduced_tile(
            tile, channel, num_channels, planes, size, tiles_across, False, BLOCK_ROWS, BLOCK_COLS
        )
        g = tl.load(grad + offset, mask=exists, other=0.0)
        x = tl.load(input + offset, mask=exists, other=0.0)
        if ACTIVATION is not None:
            if kept is not None and ACTIVATION != "silu":
                z = tl.load(kept + offset, mask=exists, other=0.0).to(mean.dtype.element_ty)
            else:
                z = with_residual(scaled(x, high, scale, shift, x.dtype), kept, offset, exists, x.dtype)
            g = tl.where(exists, activation_backward(g, z, ACTIVATION), 0.0).to(x.dtype)
            tl.store(grad_z + offset, g, mask=exists)
        g, x = g.to(tl.float64), x.to(tl.float64)
        centred = tl.where(exists, (x - wide_high) - wide_low, 0.0)
        first += folded(g, False, BLOCK_ROWS, BLOCK_COLS, FOLD)
        second += folded(g * centred, False, BLOCK_ROWS, BLOCK_COLS, FOLD)
    first_total, second_total = total_per_channel(first, False), total_per_channel(second, False)
    second_total *= inverse.to(tl.float64)
    store_float64(affine + channel, first_total, inside)
    store_float64(affine + num_channels + channel, second_total, inside)

    scale, slope, grad_mean = gradient_terms(
        first_total, second_total, tl.load(count), inverse, weight, channel, inside
    )
    source = grad
    if ACTIVATION is not None:
        source = grad_z
        tl.debug_barrier()  # other threads may read what this one has stored
    for step in tl.range(0, tiles, num_stages=STAGES):
        offset, exists = reduced_tile(
            tiles - 1 - step, channel, num_channels, planes, size, tiles_across, False, BLOCK_ROWS, BLOCK_COLS
        )
        x = tl.load(input + offset, mask=exists).to(high.dtype)
        g = tl.load(source + offset, mask=exists).to(high.dtype)
        projected = tl.fma((x - high) - low, slope, g - grad_mean)
        tl.store(output + offset, (projected * scale).to(output.dtype.element_ty), mask=exists)
