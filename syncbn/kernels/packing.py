"""Packed moments: count, sums and sums of squares of C channels as 4C+1 float64 numbers that can be all-reduced.

Adding them over ranks is almost free of rounding.

A rank describes its samples by their count n, a pivot p near their mean, and the two centered sums D1 = sum(x - p) and
D2 = sum((x - p)^2). Only S1 = sum(x) and S2 = sum(x^2) add over ranks, but N*S2 - S1^2, which is N^2 times the
variance, cancels catastrophically when |mean| >> std. So S1 and S2 are formed from (n, p, D1, D2) in double-double
arithmetic (about 106 bits) and each is sent as two float64 numbers:

    high = S rounded to a multiple of a quantum q,    low = S - high,    q = 2^-24 * 2^ceil(log2 |m|^k),  k = 1, 2

where m is the rank's mean. Ranks whose means share a binary exponent share q, and float64 adds multiples of q without
rounding while there are fewer than 2^28 values per channel in the world (beyond that, and for means of different
magnitude, the usual rounding of 2^-53 sets in, relative to a variance that is then large). |low| <= q/2, so rounding in
the low parts is about 2^-78 of m^2. The mean comes out as an unevaluated sum of two numbers, the variance with full
relative accuracy up to |mean|/std of about 1e7 in float64 data.

The error-free transformations are Dekker's and Knuth's (Dekker 1971, "A floating-point technique for extending the
available precision"). Payloads are pooled by plain addition, so any sum all-reduce will do.
"""

import torch
from torch import Tensor

_SPLITTER = 2.0**27 + 1.0  # splits a float64 into two 26-bit halves, whose products are exact
_QUANTUM_BITS = 24  # the quantum q is 2^-24 times a power of two; see above

Pair = tuple[Tensor, Tensor]  # a double-double number high + low with |low| <= ulp(high)/2


def two_sum(a: Tensor, b: Tensor) -> Pair:
    """a + b without rounding, as high + low (Knuth)."""
    high = a + b
    shadow = high - a
    return high, (a - (high - shadow)) + (b - shadow)


def two_product(a: Tensor, b: Tensor) -> Pair:
    """a * b without rounding, as high + low (Dekker, Veltkamp), barring overflow above 2^996."""
    high = a * b
    a_split, b_split = a * _SPLITTER, b * _SPLITTER
    a_high, b_high = a_split - (a_split - a), b_split - (b_split - b)
    a_low, b_low = a - a_high, b - b_high
    return high, ((a_high * b_high - high) + a_high * b_low + a_low * b_high) + a_low * b_low


def pair_sum(a: Pair, b: Pair) -> Pair:
    """a + b, with a relative error near 2^-104."""
    high, low = two_sum(a[0], b[0])
    tail, tail_low = two_sum(a[1], b[1])
    high, low = two_sum(high, low + tail)
    return two_sum(high, low + tail_low)


def pair_product(a: Pair, b: Pair) -> Pair:
    """a * b, with a relative error near 2^-102."""
    high, low = two_product(a[0], b[0])
    return two_sum(high, low + (a[0] * b[1] + a[1] * b[0]))


def _single(a: Tensor) -> Pair:
    return a, torch.zeros_like(a)


def _split(total: Pair, exponent: Tensor) -> Pair:
    """Splits `total` into (a multiple of 2^(exponent - 24), the remainder)."""
    shift = torch.ldexp(torch.full_like(total[0], 1.5), exponent + (52 - _QUANTUM_BITS))
    high = (total[0] + shift) - shift
    # Far from any cancellation the shift can exceed the range (mean above 1e135) or be lost (mean 0): keep the sum as
    # it is.
    high = torch.where(torch.isfinite(high), high, total[0])
    return high, (total[0] - high) + total[1]


def pack(count: Tensor | float, pivot: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """The payload `[n, S1 high, S1 low, S2 high, S2 low]`, (4C+1,) float64.

    Args:
        count: values per channel on this rank, a number (or a float64 tensor without dimensions).
        pivot: (C,) float64, any value near the channel's mean. It need not be the mean, but must be the exact value
            that was subtracted in `first` and `second`.
        first: (C,) float64, sum(x - pivot).
        second: (C,) float64, sum((x - pivot)^2).
    """
    n = torch.zeros_like(pivot) + count
    sum_pair = pair_sum(two_product(n, pivot), _single(first))
    cross = two_product(2.0 * pivot, first)
    square_pair = pair_sum(pair_product(two_product(pivot, pivot), _single(n)), pair_sum(cross, _single(second)))
    exponent = torch.frexp(sum_pair[0] / n.clamp(min=1.0)).exponent
    sum_high, sum_low = _split(sum_pair, exponent)
    square_high, square_low = _split(square_pair, 2 * exponent)
    return torch.cat([n[:1], sum_high, sum_low, square_high, square_low])


def unpack(packed: Tensor) -> tuple[Tensor, Pair, Tensor]:
    """The statistics of a payload, or of the sum of several payloads.

    Returns:
        count: values per channel, float64 without dimensions.
        mean: two (C,) float64 parts whose sum is the mean.
        variance: (C,) float64, biased (divided by count), never negative.

    A count of 0 gives a mean and a variance of 0.
    """
    count = packed[0]
    n = count.clamp(min=1.0)
    sum_high, sum_low, square_high, square_low = packed[1:].chunk(4)
    total = two_sum(sum_high, sum_low)
    squares = two_sum(square_high, square_low)

    high = total[0] / n
    product = two_product(high, n.expand_as(high))
    low = (((total[0] - product[0]) - product[1]) + total[1]) / n
    mean = two_sum(high, low)

    scaled = pair_product(squares, _single(n.expand_as(high)))
    square_of_sum = pair_product(total, total)
    spread = pair_sum(scaled, (-square_of_sum[0], -square_of_sum[1]))
    variance = (spread[0] + spread[1]).clamp(min=0.0) / (n * n)
    return count, mean, variance
