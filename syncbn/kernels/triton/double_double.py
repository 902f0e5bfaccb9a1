"""Double-double arithmetic and the packing of moments for the Triton kernels; see `packing` for both."""

# mypy: disable-error-code="no-untyped-def"

import triton
import triton.language as tl


@triton.jit
def store_float64(pointer, value, mask):
    """Stores float64 values in the type of `pointer`; half types are converted via float32, as in torch."""
    if pointer.dtype.element_ty.primitive_bitwidth < 32:
        value = value.to(tl.float32)
    tl.store(pointer, value.to(pointer.dtype.element_ty), mask=mask)


@triton.jit
def two_sum(a, b):
    high = a + b
    shadow = high - a
    return high, (a - (high - shadow)) + (b - shadow)


@triton.jit
def two_product(a, b):
    # Dekker's splitting rather than a fused multiply-add, which Triton's interpreter does not support.
    high = a * b
    a_split, b_split = a * 134217729.0, b * 134217729.0  # 2^27 + 1
    a_high, b_high = a_split - (a_split - a), b_split - (b_split - b)
    a_low, b_low = a - a_high, b - b_high
    return high, ((a_high * b_high - high) + a_high * b_low + a_low * b_high) + a_low * b_low


@triton.jit
def pair_sum(a_high, a_low, b_high, b_low):
    high, low = two_sum(a_high, b_high)
    tail, tail_low = two_sum(a_low, b_low)
    high, low = two_sum(high, low + tail)
    return two_sum(high, low + tail_low)


@triton.jit
def pair_product(a_high, a_low, b_high, b_low):
    high, low = two_product(a_high, b_high)
    return two_sum(high, low + (a_high * b_low + a_low * b_high))


@triton.jit
def _power_of_two(exponent):
    """2^exponent in float64; infinity on overflow, 0 below the smallest normal number."""
    inside = tl.minimum(tl.maximum(exponent, -1022), 1023)
    power = ((inside + 1023) << 52).to(tl.float64, bitcast=True)
    return tl.where(exponent > 1023, float("inf"), tl.where(exponent < -1022, 0.0, power))


@triton.jit
def _split(high, low, exponent):
    shift = 1.5 * _power_of_two(exponent + 28)  # 28: the 52 bits of a mantissa less the 24 of the quantum
    part = (high + shift) - shift
    part = tl.where(tl.abs(part) < float("inf"), part, high)
    return part, (high - part) + low


@triton.jit
def pack(n, pivot, first, second):
    """`packing.pack` of channels: the sum and the sum of squares, each as a high and a low part."""
    high, low = two_product(pivot, n)
    sum_high, sum_low = pair_sum(high, low, first, first * 0.0)
    cross_high, cross_low = two_product(2.0 * pivot, first)
    square_high, square_low = two_product(pivot, pivot)
    square_high, square_low = pair_product(square_high, square_low, n, n * 0.0)
    cross_high, cross_low = pair_sum(cross_high, cross_low, second, second * 0.0)
    square_high, square_low = pair_sum(square_high, square_low, cross_high, cross_low)

    field = ((sum_high / n).to(tl.int64, bitcast=True) >> 52) & 0x7FF
    exponent = tl.where(field == 0, 0, field - 1022)  # as by frexp, but 0 for subnormal numbers
    sum_part, sum_rest = _split(sum_high, sum_low, exponent)
    square_part, square_rest = _split(square_high, square_low, 2 * exponent)
    return sum_part, sum_rest, square_part, square_rest


@triton.jit
def store_packed(packed, channel, num_channels, count, pivot, first, second):
    """Packs and stores the channels of one program; the count is stored by program 0."""
    n = count.to(tl.float64)
    sum_part, sum_rest, square_part, square_rest = pack(n, pivot, first, second)
    inside = channel < num_channels
    tl.store(packed + 1 + channel, sum_part, mask=inside)
    tl.store(packed + 1 + num_channels + channel, sum_rest, mask=inside)
    tl.store(packed + 1 + 2 * num_channels + channel, square_part, mask=inside)
    tl.store(packed + 1 + 3 * num_channels + channel, square_rest, mask=inside)
    if tl.program_id(0) == 0:
        tl.store(packed, n)
