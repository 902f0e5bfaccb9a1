"""Triton kernels that reduce an activation, or moments, to per-channel values. Importing this module imports Triton.

An activation is read in the order of memory, in one of two layouts. In planes (contiguous), the value of sample n,
channel c and position s lies at (n * C + c) * S + s. In rows (channels_last, and inputs with a single position), row n
holds the values of all channels, at n * C + c. `CHANNELS_LAST` selects rows. A tile is `BLOCK_ROWS` by `BLOCK_COLS`
values.

Accumulators are float64: the kernels are bound by memory, and partial sums of several programs then add without loss
that matters. Each program sums a fixed part in a fixed order, and no two programs write to the same address, so results
are bitwise reproducible on the same device. Double-double arithmetic is as in `packing`. Kernels are compiled without
floating-point contraction, which would break it, and call `tl.fma` where a fused multiply-add is wanted.

`UNIT` is a power of two that divides the length of a row; it tells the compiler how wide its loads may be. `FOLD` is
how many values of a tile are added up before their sum is accumulated (see `tiles.folded`), and `STAGES` how many tiles
are on their way at a time. With `INT64_OFFSETS`, offsets are computed in 64 bits.
"""

# mypy: disable-error-code="no-untyped-def"
# ruff: noqa: N803

import triton
import triton.language as tl

from syncbn.kernels.triton.double_double import (
    pack,
    pair_product,
    pair_sum,
    store_float64,
    store_packed,
    two_product,
    two_sum,
)
from syncbn.kernels.triton.elementwise import activation_backward, normalized, with_residual
from syncbn.kernels.triton.tiles import (
    SIZES,
    accumulator,
    channels_of,
    folded,
    reduced_tile,
    row_length,
    total_per_channel,
)


@triton.jit(do_not_specialize=SIZES)
def moments(
    input, partial, packed, count, num_channels, planes, units, tiles, tiles_across, tiles_per_split,
    CHANNELS_LAST: tl.constexpr, UNIT: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr,
    FOLD: tl.constexpr, STAGES: tl.constexpr, INT64_OFFSETS: tl.constexpr, SINGLE_SPLIT: tl.constexpr,
):  # fmt: skip
    """Sums of (x - pivot) and (x - pivot)^2 over a part of a channel, where pivot is the channel's first value.

    The sums are stored to `partial` (splits, 2, C) or, if one program covers the whole channel (`SINGLE_SPLIT`), packed
    and stored to `packed` (4C+1,).
    """
    block, split = tl.program_id(0), tl.program_id(1)
    if INT64_OFFSETS:
        block, split = block.to(tl.int64), split.to(tl.int64)
    size = row_length(units, UNIT, INT64_OFFSETS)
    channel = channels_of(block, CHANNELS_LAST, BLOCK_COLS)
    inside = channel < num_channels
    if CHANNELS_LAST:
        pivot = tl.load(input + channel, mask=inside, other=0.0).to(tl.float64)
    else:
        pivot = tl.load(input + block * size).to(tl.float64)
    first = accumulator(CHANNELS_LAST, BLOCK_ROWS, BLOCK_COLS, FOLD)
    second = accumulator(CHANNELS_LAST, BLOCK_ROWS, BLOCK_COLS, FOLD)
    start = split * tiles_per_split
    for tile in tl.range(start, tl.minimum(start + tiles_per_split, tiles), num_stages=STAGES):
        offset, exists = reduced_tile(
            tile, block, num_channels, planes, size, tiles_across, CHANNELS_LAST, BLOCK_ROWS, BLOCK_COLS
        )
        x = tl.load(input + offset, mask=exists, other=0.0).to(tl.float64)
        centred = tl.where(exists, x - pivot, 0.0)
        first += folded(centred, CHANNELS_LAST, BLOCK_ROWS, BLOCK_COLS, FOLD)
        second += folded(centred * centred, CHANNELS_LAST, BLOCK_ROWS, BLOCK_COLS, FOLD)
    first_total, second_total = total_per_channel(first, CHANNELS_LAST), total_per_channel(second, CHANNELS_LAST)
    if SINGLE_SPLIT:
        store_packed(packed, channel, num_channels, count, pivot, first_total, second_total)
    else:
        address = partial + split * 2 * num_channels + channel
        tl.store(address, first_total, mask=inside)
        tl.store(address + num_channels, second_total, mask=inside)


@triton.jit
def _sum_partial(partial, channel, num_channels, splits, BLOCK_SPLITS: tl.constexpr, BLOCK_CHANNELS: tl.constexpr):
    """Adds up the two partial sums of each channel over the splits, in a fixed order."""
    first = tl.zeros([BLOCK_SPLITS, BLOCK_CHANNELS], tl.float64)
    second = tl.zeros([BLOCK_SPLITS, BLOCK_CHANNELS], tl.float64)
    for start in range(0, splits, BLOCK_SPLITS):
        split = start + tl.arange(0, BLOCK_SPLITS)[:, None]
        address = partial + split * 2 * num_channels + channel[None, :]
        exists = (split < splits) & (channel < num_channels)[None, :]
        first += tl.load(address, mask=exists, other=0.0)
        second += tl.load(address + num_channels, mask=exists, other=0.0)
    return tl.sum(first, 0), tl.sum(second, 0)


@triton.jit(do_not_specialize=[*SIZES, "stride"])
def combine_moments(
    input, partial, packed, count, num_channels, splits, stride, BLOCK_SPLITS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
):  # fmt: skip
    """Adds up the partial sums of `moments` and packs them; `stride` is the distance between channels' first values."""
    channel = tl.program_id(0) * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
    pivot = tl.load(input + channel.to(tl.int64) * stride, mask=channel < num_channels, other=0.0).to(tl.float64)
    first, second = _sum_partial(partial, channel, num_channels, splits, BLOCK_SPLITS, BLOCK_CHANNELS)
    store_packed(packed, channel, num_channels, count, pivot, first, second)


@triton.jit
def finish_channels(
    channel, num_channels, count, counts, sum_part, sum_rest, square_part, square_rest, running_mean, running_var, mean,
    invstd, rate, eps,
):  # fmt: skip
    """`reference.finish` for the channels of one program, by their packed moments and the rate of the update.

    Returns:
        both parts of the mean, and the inverse standard deviation, as they are stored.
    """
    inside = channel < num_channels
    n = tl.maximum(count, 1.0)
    sum_high, sum_low = two_sum(sum_part, sum_rest)
    square_high, square_low = two_sum(square_part, square_rest)
    high = sum_high / n
    product, product_low = two_product(high, n)
    mean_high, mean_low = two_sum(high, (((sum_high - product) - product_low) + sum_low) / n)
    scaled_high, scaled_low = pair_product(square_high, square_low, n, n * 0.0)
    squared_high, squared_low = pair_product(sum_high, sum_low, sum_high, sum_low)
    spread, rest = pair_sum(scaled_high, scaled_low, -squared_high, -squared_low)
    spread += rest
    variance = tl.where(spread < 0.0, 0.0, spread) / (n * n)  # a maximum with 0 would lose NaN

    if running_mean is not None:
        old_mean = tl.load(running_mean + channel, mask=inside, other=0.0).to(tl.float64)
        old_var = tl.load(running_var + channel, mask=inside, other=0.0).to(tl.float64)
        unbiased = variance * (count / tl.maximum(count - 1.0, 1.0))
        new_mean = (1.0 - rate) * old_mean + rate * (mean_high + mean_low)
        new_var = (1.0 - rate) * old_var + rate * unbiased
        store_float64(running_mean + channel, new_mean, inside & (counts > 0))
        store_float64(running_var + channel, new_var, inside & (counts > 1))

    narrow = mean_high.to(mean.dtype.element_ty)
    narrow_low = ((mean_high - narrow.to(tl.float64)) + mean_low).to(mean.dtype.element_ty)
    tl.store(mean + channel, narrow, mask=inside)
    tl.store(mean + num_channels + channel, narrow_low, mask=inside)
    inverse = (1.0 / tl.sqrt(variance + eps)).to(invstd.dtype.element_ty)
    tl.store(invstd + channel, inverse, mask=inside)
    return narrow, narrow_low, inverse


@triton.jit(do_not_specialize=["num_channels"])
def finish(
    packed, running_mean, running_var, num_batches_tracked, mean, invstd, count_copy, momentum: tl.float64,
    eps: tl.float64, num_channels, CUMULATIVE: tl.constexpr, BLOCK_CHANNELS: tl.constexpr,
):  # fmt: skip
    """`reference.finish`; `CUMULATIVE` is momentum=None.

    `CUMULATIVE` needs a grid of one program: the rate depends on the batch counter, which program 0 increments.
    """
    count = tl.load(packed)
    # The count as a block: Triton's interpreter cannot combine a mask with a comparison of scalars.
    counts = tl.zeros([BLOCK_CHANNELS], tl.float64) + count
    rate = tl.zeros([BLOCK_CHANNELS], tl.float64)
    if not CUMULATIVE:
        rate += momentum
    if num_batches_tracked is not None:  # noqa: SIM102 - decided at compile time; the inner condition at run time
        if tl.program_id(0) == 0:
            counted = tl.load(num_batches_tracked)
            counted += (count > 0).to(counted.dtype)
            if CUMULATIVE:
                rate += 1.0 / tl.maximum(counted.to(tl.float64), 1.0)
            tl.debug_barrier()  # every thread reads the counter before it is overwritten
            tl.store(num_batches_tracked, counted)
    if tl.program_id(0) == 0:
        tl.store(count_copy, count)

    for start in range(tl.program_id(0) * BLOCK_CHANNELS, num_channels, tl.num_programs(0) * BLOCK_CHANNELS):
        channel = start + tl.arange(0, BLOCK_CHANNELS)
        inside = channel < num_channels
        part = packed + 1 + channel
        finish_channels(
            channel, num_channels, count, counts,
            tl.load(part, mask=inside, other=0.0), tl.load(part + num_channels, mask=inside, other=0.0),
            tl.load(part + 2 * num_channels, mask=inside, other=0.0),
            tl.load(part + 3 * num_channels, mask=inside, other=0.0),
            running_mean, running_var, mean, invstd, rate, eps,
        )  # fmt: skip


@triton.jit(do_not_specialize=[*SIZES, "stride"])
def combine_and_finish(
    input, partial, running_mean, running_var, num_batches_tracked, mean, invstd, count_copy, momentum: tl.float64,
    eps: tl.float64, count, num_channels, splits, stride, BLOCK_SPLITS: tl.constexpr, BLOCK_CHANNELS: tl.constexpr,
):  # fmt: skip
    """`combine_moments` and `finish` of a batch that is not summed over ranks; not for the cumulative average."""
    channel = tl.program_id(0) * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
    pivot = tl.load(input + channel.to(tl.int64) * stride, mask=channel < num_channels, other=0.0).to(tl.float64)
    first, second = _sum_partial(partial, channel, num_channels, splits, BLOCK_SPLITS, BLOCK_CHANNELS)
    n = count.to(tl.float64)
    sum_part, sum_rest, square_part, square_rest = pack(n, pivot, first, second)
    counts = tl.zeros([BLOCK_CHANNELS], tl.float64) + n
    rate = tl.zeros([BLOCK_CHANNELS], tl.float64) + momentum
    finish_channels(
        channel, num_channels, n, counts, sum_part, sum_rest, square_part, square_rest, running_mean, running_var,
        mean, invstd, rate, eps,
    )  # fmt: skip
    if tl.program_id(0) == 0:
        tl.store(count_copy, n)
        if num_batches_tracked is not None:
            counted = tl.load(num_batches_tracked) + 1
            tl.debug_barrier()  # every thread reads the counter before it is overwritten
            tl.store(num_batches_tracked, counted)


@triton.jit
def _store_sums(sums, affine, invstd, channel, num_channels, first, second):
    inside = channel < num_channels
    second *= tl.load(invstd + channel, mask=inside, other=0.0).to(tl.float64)
    tl.store(sums + channel, first, mask=inside)
    tl.store(sums + num_channels + channel, second, mask=inside)
    store_float64(affine + channel, first, inside)
    store_float64(affine + num_channels + channel, second, inside)


@triton.jit(do_not_specialize=SIZES)
def backward_sums(
    grad, input, mean, invstd, weight, bias, kept, grad_z, partial, sums, affine, num_channels, planes, units,
    tiles, tiles_across, tiles_per_split, ACTIVATION: tl.constexpr, CHANNELS_LAST: tl.constexpr, UNIT: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr, FOLD: tl.constexpr, STAGES: tl.constexpr,
    INT64_OFFSETS: tl.constexpr, SINGLE_SPLIT: tl.constexpr,
):  # fmt: skip
    """Sums of g and g * (x - mean) over a part of a channel.

    The sums are stored to `partial` (splits, 2, C) or, if one program covers the whole channel (`SINGLE_SPLIT`), to
    `sums` and `affine` (see `reference.backward_reduce`). With an `ACTIVATION`, g is first made that of its input and
    stored to `grad_z` (see `reference.activated_reduce`).
    """
    block, split = tl.program_id(0), tl.program_id(1)
    if INT64_OFFSETS:
        block, split = block.to(tl.int64), split.to(tl.int64)
    size = row_length(units, UNIT, INT64_OFFSETS)
    channel = channels_of(block, CHANNELS_LAST, BLOCK_COLS)
    inside = channel < num_channels
    # One float64 number holds both float32 parts of the mean; of a float64 mean it is the high part.
    high = tl.load(mean + channel, mask=inside, other=0.0).to(tl.float64)
    low = tl.load(mean + num_channels + channel, mask=inside, other=0.0).to(tl.float64)
    first = accumulator(CHANNELS_LAST, BLOCK_ROWS, BLOCK_COLS, FOLD)
    second = accumulator(CHANNELS_LAST, BLOCK_ROWS, BLOCK_COLS, FOLD)
    start = split * tiles_per_split
    for tile in tl.range(start, tl.minimum(start + tiles_per_split, tiles), num_stages=STAGES):
        offset, exists = reduced_tile(
            tile, block, num_channels, planes, size, tiles_across, CHANNELS_LAST, BLOCK_ROWS, BLOCK_COLS
        )
        g = tl.load(grad + offset, mask=exists, other=0.0)
        x = tl.load(input + offset, mask=exists, other=0.0)
        if ACTIVATION is not None:
            if kept is not None and ACTIVATION != "silu":
                z = tl.load(kept + offset, mask=exists, other=0.0).to(mean.dtype.element_ty)
            else:
                z = normalized(x, mean, invstd, weight, bias, num_channels, channel, inside, x.dtype)
                z = with_residual(z, kept, offset, exists, x.dtype)
            g = tl.where(exists, activation_backward(g, z, ACTIVATION), 0.0).to(x.dtype)
            tl.store(grad_z + offset, g, mask=exists)
        g, x = g.to(tl.float64), x.to(tl.float64)
        centred = tl.where(exists, (x - high) - low, 0.0)
        first += folded(g, CHANNELS_LAST, BLOCK_ROWS, BLOCK_COLS, FOLD)
        second += folded(g * centred, CHANNELS_LAST, BLOCK_ROWS, BLOCK_COLS, FOLD)
    first_total, second_total = total_per_channel(first, CHANNELS_LAST), total_per_channel(second, CHANNELS_LAST)
    if SINGLE_SPLIT:
        _store_sums(sums, affine, invstd, channel, num_channels, first_total, second_total)
    else:
        address = partial + split * 2 * num_channels + channel
        tl.store(address, first_total, mask=inside)
        tl.store(address + num_channels, second_total, mask=inside)


@triton.jit(do_not_specialize=SIZES)
def combine_backward_sums(
    partial, invstd, sums, affine, num_channels, splits, BLOCK_SPLITS: tl.constexpr, BLOCK_CHANNELS: tl.constexpr,
):  # fmt: skip
    """Adds up the partial sums of `backward_sums`; stores them in float64 and in the type of weight and bias."""
    channel = tl.program_id(0) * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
    first, second = _sum_partial(partial, channel, num_channels, splits, BLOCK_SPLITS, BLOCK_CHANNELS)
    _store_sums(sums, affine, invstd, channel, num_channels, first, second)
