"""The Triton programs that `cuda` launches. Importing this module imports Triton.

An activation is read in the order of memory, as one of two layouts. In planes (contiguous), a value of sample n,
channel c and position s lies at (n * C + c) * S + s. In rows (channels_last, and whatever has one position), row n
holds the values of all channels, at n * C + c. `LAST` says which; a tile is R rows by W columns.

Sums are taken in float64: the passes are bound by memory, and the sums of two programs then add without further care.
Each program sums a fixed part in a fixed order, and no two write to the same place, so results have the same bits every
time on the same device. Double-double arithmetic is as in `packing`; programs are compiled without fusing a product
into a sum (which would break it), and say `tl.fma` where that is wanted.

`UNIT` divides the length of a row, which tells the compiler how wide its loads may be. With `WIDE`, offsets are 64 bits
wide.
"""

# mypy: disable-error-code="no-untyped-def"
# ruff: noqa: N803

import triton
import triton.language as tl

# Sizes change from layer to layer; a program is compiled for types and block shapes alone.
_SIZES = ["count", "num_channels", "planes", "units", "rows", "tiles", "tiles_across", "tiles_per_split", "splits"]


@triton.jit
def _store(pointer, value, mask):
    """Stores float64 values; on the way to a half type through float32, as torch does."""
    if pointer.dtype.element_ty.primitive_bitwidth < 32:
        value = value.to(tl.float32)
    tl.store(pointer, value.to(pointer.dtype.element_ty), mask=mask)


@triton.jit
def _two_sum(a, b):
    high = a + b
    shadow = high - a
    return high, (a - (high - shadow)) + (b - shadow)


@triton.jit
def _two_product(a, b):
    # Dekker's splitting rather than a fused multiply-add, which Triton's interpreter does not have.
    high = a * b
    a_split, b_split = a * 134217729.0, b * 134217729.0  # 2^27 + 1
    a_high, b_high = a_split - (a_split - a), b_split - (b_split - b)
    a_low, b_low = a - a_high, b - b_high
    return high, ((a_high * b_high - high) + a_high * b_low + a_low * b_high) + a_low * b_low


@triton.jit
def _pair_sum(a_high, a_low, b_high, b_low):
    high, low = _two_sum(a_high, b_high)
    tail, tail_low = _two_sum(a_low, b_low)
    high, low = _two_sum(high, low + tail)
    return _two_sum(high, low + tail_low)


@triton.jit
def _pair_product(a_high, a_low, b_high, b_low):
    high, low = _two_product(a_high, b_high)
    return _two_sum(high, low + (a_high * b_low + a_low * b_high))


@triton.jit
def _power_of_two(exponent):
    """2^exponent; infinite above the range of float64, 0 below its normal numbers."""
    inside = tl.minimum(tl.maximum(exponent, -1022), 1023)
    power = ((inside + 1023) << 52).to(tl.float64, bitcast=True)
    return tl.where(exponent > 1023, float("inf"), tl.where(exponent < -1022, 0.0, power))


@triton.jit
def _split(high, low, exponent):
    shift = 1.5 * _power_of_two(exponent + 28)  # 52 bits less the quantum's 24
    part = (high + shift) - shift
    part = tl.where(tl.abs(part) < float("inf"), part, high)
    return part, (high - part) + low


@triton.jit
def _store_packed(packed, channel, num_channels, count, pivot, first, second):
    """`packing.pack` for some channels."""
    n = count.to(tl.float64)
    high, low = _two_product(pivot, n)
    sum_high, sum_low = _pair_sum(high, low, first, first * 0.0)
    cross_high, cross_low = _two_product(2.0 * pivot, first)
    square_high, square_low = _two_product(pivot, pivot)
    square_high, square_low = _pair_product(square_high, square_low, n, n * 0.0)
    cross_high, cross_low = _pair_sum(cross_high, cross_low, second, second * 0.0)
    square_high, square_low = _pair_sum(square_high, square_low, cross_high, cross_low)

    field = ((sum_high / n).to(tl.int64, bitcast=True) >> 52) & 0x7FF
    exponent = tl.where(field == 0, 0, field - 1022)  # as frexp gives it, but 0 for what is below the normal numbers
    sum_part, sum_rest = _split(sum_high, sum_low, exponent)
    square_part, square_rest = _split(square_high, square_low, 2 * exponent)
    inside = channel < num_channels
    tl.store(packed + 1 + channel, sum_part, mask=inside)
    tl.store(packed + 1 + num_channels + channel, sum_rest, mask=inside)
    tl.store(packed + 1 + 2 * num_channels + channel, square_part, mask=inside)
    tl.store(packed + 1 + 3 * num_channels + channel, square_rest, mask=inside)
    if tl.program_id(0) == 0:
        tl.store(packed, n)


@triton.jit
def _length(units, UNIT: tl.constexpr, WIDE: tl.constexpr):
    if WIDE:
        units = units.to(tl.int64)
    return units * UNIT


@triton.jit
def _reduced_tile(tile, block, num_channels, planes, size, tiles_across, LAST: tl.constexpr, R: tl.constexpr,
                  W: tl.constexpr):  # fmt: skip
    """Offsets of one tile of a channel (`LAST`: of W channels), and which of them exist."""
    down, across = tl.arange(0, R)[:, None], tl.arange(0, W)[None, :]
    if LAST:
        n = tile * R + down
        column = block * W + across
        offset = n * size + column
    else:
        n = (tile // tiles_across) * R + down
        column = (tile % tiles_across) * W + across
        offset = (n * num_channels + block) * size + column
    return offset, (n < planes) & (column < size)


@triton.jit
def _channel(block, LAST: tl.constexpr, W: tl.constexpr):
    """The channels of a program that reduces: W of them, or the one."""
    if LAST:
        channel = block * W + tl.arange(0, W)
    else:
        channel = block
    return channel


@triton.jit
def _total(values, LAST: tl.constexpr):
    """Of a tile, per channel."""
    if LAST:
        total = tl.sum(values, 0)
    else:
        total = tl.sum(tl.sum(values, 1), 0)
    return total


@triton.jit(do_not_specialize=_SIZES)
def moments(
    input, partial, packed, count, num_channels, planes, units, tiles, tiles_across, tiles_per_split,
    LAST: tl.constexpr, UNIT: tl.constexpr, R: tl.constexpr, W: tl.constexpr, WIDE: tl.constexpr, ALONE: tl.constexpr,
):  # fmt: skip
    """Sums of x - pivot and its square over a part of a channel, the pivot being the channel's first value.

    Into `partial` (splits, 2, C), or, where one program has the whole channel (`ALONE`), into `packed`.
    """
    block, split = tl.program_id(0), tl.program_id(1)
    if WIDE:
        block, split = block.to(tl.int64), split.to(tl.int64)
    size = _length(units, UNIT, WIDE)
    channel = _channel(block, LAST, W)
    inside = channel < num_channels
    if LAST:
        pivot = tl.load(input + channel, mask=inside, other=0.0).to(tl.float64)
    else:
        pivot = tl.load(input + block * size).to(tl.float64)
    first = tl.zeros([R, W], tl.float64)
    second = tl.zeros([R, W], tl.float64)
    start = split * tiles_per_split
    for tile in range(start, tl.minimum(start + tiles_per_split, tiles)):
        offset, exists = _reduced_tile(tile, block, num_channels, planes, size, tiles_across, LAST, R, W)
        x = tl.load(input + offset, mask=exists, other=0.0).to(tl.float64)
        centred = tl.where(exists, x - pivot, 0.0)
        first += centred
        second = tl.fma(centred, centred, second)
    first_total, second_total = _total(first, LAST), _total(second, LAST)
    if ALONE:
        _store_packed(packed, channel, num_channels, count, pivot, first_total, second_total)
    else:
        place = partial + split * 2 * num_channels + channel
        tl.store(place, first_total, mask=inside)
        tl.store(place + num_channels, second_total, mask=inside)


@triton.jit
def _sum_partial(partial, channel, num_channels, splits, K: tl.constexpr, BLOCK: tl.constexpr):
    """Both sums over the splits, in a fixed order."""
    first = tl.zeros([K, BLOCK], tl.float64)
    second = tl.zeros([K, BLOCK], tl.float64)
    for start in range(0, splits, K):
        split = start + tl.arange(0, K)[:, None]
        place = partial + split * 2 * num_channels + channel[None, :]
        exists = (split < splits) & (channel < num_channels)[None, :]
        first += tl.load(place, mask=exists, other=0.0)
        second += tl.load(place + num_channels, mask=exists, other=0.0)
    return tl.sum(first, 0), tl.sum(second, 0)


@triton.jit(do_not_specialize=[*_SIZES, "stride"])
def combine_moments(
    input, partial, packed, count, num_channels, splits, stride, K: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """The sums of `moments` over its splits, packed; `stride` leads from one channel's first value to the next."""
    channel = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    pivot = tl.load(input + channel.to(tl.int64) * stride, mask=channel < num_channels, other=0.0).to(tl.float64)
    first, second = _sum_partial(partial, channel, num_channels, splits, K, BLOCK)
    _store_packed(packed, channel, num_channels, count, pivot, first, second)


@triton.jit(do_not_specialize=["num_channels"])
def finish(
    packed, running_mean, running_var, num_batches_tracked, mean, invstd, count_copy, momentum: tl.float64,
    eps: tl.float64, num_channels, CUMULATIVE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """`reference.finish`. With `CUMULATIVE`, and only then, there has to be one program: it reads what it counts up."""
    count = tl.load(packed)
    n = tl.maximum(count, 1.0)
    counts = tl.zeros([BLOCK], tl.float64) + count  # Triton's interpreter cannot combine a comparison of one number
    rate = tl.zeros([BLOCK], tl.float64)
    if not CUMULATIVE:
        rate += momentum
    if num_batches_tracked is not None:  # noqa: SIM102 - decided when it is compiled, the other one when it runs
        if tl.program_id(0) == 0:
            counted = tl.load(num_batches_tracked)
            counted += (count > 0).to(counted.dtype)
            if CUMULATIVE:
                rate += 1.0 / tl.maximum(counted.to(tl.float64), 1.0)
            tl.debug_barrier()  # all threads have read it
            tl.store(num_batches_tracked, counted)
    if tl.program_id(0) == 0:
        tl.store(count_copy, count)

    for start in range(tl.program_id(0) * BLOCK, num_channels, tl.num_programs(0) * BLOCK):
        channel = start + tl.arange(0, BLOCK)
        inside = channel < num_channels
        part = packed + 1 + channel
        sum_high, sum_low = _two_sum(tl.load(part, mask=inside, other=0.0),
                                     tl.load(part + num_channels, mask=inside, other=0.0))  # fmt: skip
        square_high, square_low = _two_sum(tl.load(part + 2 * num_channels, mask=inside, other=0.0),
                                           tl.load(part + 3 * num_channels, mask=inside, other=0.0))  # fmt: skip
        high = sum_high / n
        product, product_low = _two_product(high, n)
        mean_high, mean_low = _two_sum(high, (((sum_high - product) - product_low) + sum_low) / n)
        scaled_high, scaled_low = _pair_product(square_high, square_low, n, n * 0.0)
        squared_high, squared_low = _pair_product(sum_high, sum_low, sum_high, sum_low)
        spread, rest = _pair_sum(scaled_high, scaled_low, -squared_high, -squared_low)
        spread += rest
        variance = tl.where(spread < 0.0, 0.0, spread) / (n * n)  # NaN stays what it is

        if running_mean is not None:
            old_mean = tl.load(running_mean + channel, mask=inside, other=0.0).to(tl.float64)
            old_var = tl.load(running_var + channel, mask=inside, other=0.0).to(tl.float64)
            unbiased = variance * (count / tl.maximum(count - 1.0, 1.0))
            new_mean = (1.0 - rate) * old_mean + rate * (mean_high + mean_low)
            new_var = (1.0 - rate) * old_var + rate * unbiased
            _store(running_mean + channel, new_mean, inside & (counts > 0))
            _store(running_var + channel, new_var, inside & (counts > 1))

        narrow = mean_high.to(mean.dtype.element_ty)
        narrow_low = ((mean_high - narrow.to(tl.float64)) + mean_low).to(mean.dtype.element_ty)
        tl.store(mean + channel, narrow, mask=inside)
        tl.store(mean + num_channels + channel, narrow_low, mask=inside)
        inverse = 1.0 / tl.sqrt(variance + eps)
        tl.store(invstd + channel, inverse.to(invstd.dtype.element_ty), mask=inside)


@triton.jit
def _elementwise_tile(num_channels, rows, units, tiles_across, LAST: tl.constexpr, UNIT: tl.constexpr, R: tl.constexpr,
                      W: tl.constexpr, WIDE: tl.constexpr):  # fmt: skip
    """Offsets of one tile of the whole activation, which of them exist, and the channels, (R, 1) or (1, W)."""
    tile = tl.program_id(0)
    if WIDE:
        tile = tile.to(tl.int64)
    width = _length(units, UNIT, WIDE)
    row = (tile // tiles_across) * R + tl.arange(0, R)[:, None]
    column = (tile % tiles_across) * W + tl.arange(0, W)[None, :]
    if LAST:
        channel = column
        known = column < width
    else:
        channel = row % num_channels
        known = row < rows
    return row * width + column, (row < rows) & (column < width), channel, known


@triton.jit
def _normalized(x, mean, invstd, weight, bias, num_channels, channel, known, dtype: tl.constexpr):
    """Values normalized, and rounded to `dtype`, as an operator of its own would."""
    high = tl.load(mean + channel, mask=known)
    low = tl.load(mean + num_channels + channel, mask=known)
    scale = tl.load(invstd + channel, mask=known)
    if weight is not None:
        scale *= tl.load(weight + channel, mask=known).to(scale.dtype)
    shift = -low * scale
    if bias is not None:
        shift += tl.load(bias + channel, mask=known).to(scale.dtype)
    y = tl.fma(x.to(high.dtype) - high, scale, shift)
    return y.to(dtype).to(y.dtype)


@triton.jit
def _added(y, residual, offset, exists, dtype: tl.constexpr):
    """y, or y + residual, rounded to `dtype`."""
    if residual is not None:
        y = (y + tl.load(residual + offset, mask=exists).to(y.dtype)).to(dtype).to(y.dtype)
    return y


@triton.jit
def _sigmoid(z):
    small = tl.exp(-tl.abs(z))  # which cannot overflow
    return tl.where(z >= 0.0, 1.0, small) / (1.0 + small)


@triton.jit(do_not_specialize=_SIZES)
def normalize(
    input, output, mean, invstd, weight, bias, residual, num_channels, rows, units, tiles_across,
    ACTIVATION: tl.constexpr, LAST: tl.constexpr, UNIT: tl.constexpr, R: tl.constexpr, W: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    """`reference.normalize`."""
    offset, exists, channel, known = _elementwise_tile(num_channels, rows, units, tiles_across, LAST, UNIT, R, W, WIDE)
    x = tl.load(input + offset, mask=exists)
    y = _normalized(x, mean, invstd, weight, bias, num_channels, channel, known, x.dtype)
    y = _added(y, residual, offset, exists, x.dtype)
    if ACTIVATION == "relu":
        y = tl.where(y < 0.0, 0.0, y)  # not a maximum, which would lose NaN
    elif ACTIVATION == "leaky_relu":
        y = tl.where(y > 0.0, y, y * 0.01)
    elif ACTIVATION == "silu":
        y *= _sigmoid(y)
    tl.store(output + offset, y.to(output.dtype.element_ty), mask=exists)


@triton.jit
def _store_sums(sums, affine, invstd, channel, num_channels, first, second):
    inside = channel < num_channels
    second *= tl.load(invstd + channel, mask=inside, other=0.0).to(tl.float64)
    tl.store(sums + channel, first, mask=inside)
    tl.store(sums + num_channels + channel, second, mask=inside)
    _store(affine + channel, first, inside)
    _store(affine + num_channels + channel, second, inside)


@triton.jit(do_not_specialize=_SIZES)
def backward_sums(
    grad, input, mean, invstd, weight, bias, kept, through, partial, sums, affine, num_channels, planes, units, tiles,
    tiles_across, tiles_per_split, ACTIVATION: tl.constexpr, LAST: tl.constexpr, UNIT: tl.constexpr, R: tl.constexpr,
    W: tl.constexpr, WIDE: tl.constexpr, ALONE: tl.constexpr,
):  # fmt: skip
    """Sums of g and g * (x - mean) over a part of a channel, as `moments`; `ALONE` into `sums` and `affine`.

    With an `ACTIVATION`, g goes through it first, and is written to `through` (`reference.activated_reduce`).
    """
    block, split = tl.program_id(0), tl.program_id(1)
    if WIDE:
        block, split = block.to(tl.int64), split.to(tl.int64)
    size = _length(units, UNIT, WIDE)
    channel = _channel(block, LAST, W)
    inside = channel < num_channels
    # One float64 number holds both float32 parts of the mean; of a float64 mean it is the high part.
    high = tl.load(mean + channel, mask=inside, other=0.0).to(tl.float64)
    low = tl.load(mean + num_channels + channel, mask=inside, other=0.0).to(tl.float64)
    first = tl.zeros([R, W], tl.float64)
    second = tl.zeros([R, W], tl.float64)
    start = split * tiles_per_split
    for tile in range(start, tl.minimum(start + tiles_per_split, tiles)):
        offset, exists = _reduced_tile(tile, block, num_channels, planes, size, tiles_across, LAST, R, W)
        g = tl.load(grad + offset, mask=exists, other=0.0)
        x = tl.load(input + offset, mask=exists, other=0.0)
        if ACTIVATION is not None:
            if kept is not None and ACTIVATION != "silu":
                z = tl.load(kept + offset, mask=exists, other=0.0).to(mean.dtype.element_ty)
            else:
                z = _normalized(x, mean, invstd, weight, bias, num_channels, channel, inside, x.dtype)
                z = _added(z, kept, offset, exists, x.dtype)
            wide = g.to(z.dtype)
            if ACTIVATION == "relu":
                wide = tl.where(z <= 0.0, 0.0, wide)
            elif ACTIVATION == "leaky_relu":
                wide = tl.where(z > 0.0, wide, wide * 0.01)
            else:
                s = _sigmoid(z)
                wide = wide * s * (1.0 + z * (1.0 - s))
            g = tl.where(exists, wide, 0.0).to(x.dtype)
            tl.store(through + offset, g, mask=exists)
        g, x = g.to(tl.float64), x.to(tl.float64)
        centred = tl.where(exists, (x - high) - low, 0.0)
        first += g
        second = tl.fma(g, centred, second)
    first_total, second_total = _total(first, LAST), _total(second, LAST)
    if ALONE:
        _store_sums(sums, affine, invstd, channel, num_channels, first_total, second_total)
    else:
        place = partial + split * 2 * num_channels + channel
        tl.store(place, first_total, mask=inside)
        tl.store(place + num_channels, second_total, mask=inside)


@triton.jit(do_not_specialize=_SIZES)
def combine_backward_sums(
    partial, invstd, sums, affine, num_channels, splits, K: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """The sums of `backward_sums` over its splits, in float64 and in the type of weight and bias."""
    channel = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    first, second = _sum_partial(partial, channel, num_channels, splits, K, BLOCK)
    _store_sums(sums, affine, invstd, channel, num_channels, first, second)


@triton.jit(do_not_specialize=_SIZES)
def backward_elementwise(
    grad, input, output, mean, invstd, weight, sums, count, num_channels, rows, units, tiles_across,
    LAST: tl.constexpr, UNIT: tl.constexpr, R: tl.constexpr, W: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """`reference.backward_elementwise`."""
    offset, exists, channel, known = _elementwise_tile(num_channels, rows, units, tiles_across, LAST, UNIT, R, W, WIDE)
    x = tl.load(input + offset, mask=exists).to(mean.dtype.element_ty)
    g = tl.load(grad + offset, mask=exists).to(mean.dtype.element_ty)
    high = tl.load(mean + channel, mask=known)
    low = tl.load(mean + num_channels + channel, mask=known)
    inverse = tl.load(invstd + channel, mask=known)
    share = 1.0 / tl.maximum(tl.load(count), 1.0)  # of one value, once per program: a division each would be felt
    grad_mean = (tl.load(sums + channel, mask=known) * share).to(high.dtype)
    projection = (tl.load(sums + num_channels + channel, mask=known) * share).to(high.dtype)
    scale = inverse
    if weight is not None:
        scale *= tl.load(weight + channel, mask=known).to(scale.dtype)
    slope = -inverse * projection
    projected = tl.fma((x - high) - low, slope, g - grad_mean)
    tl.store(output + offset, (projected * scale).to(output.dtype.element_ty), mask=exists)
