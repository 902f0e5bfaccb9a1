"""Elementwise Triton kernels, which write a whole activation: `normalize`, and the gradient of the input."""

# mypy: disable-error-code="no-untyped-def"
# ruff: noqa: N803

import triton
import triton.language as tl

from syncbn.kernels.triton.tiles import SIZES, elementwise_tile


@triton.jit
def normalized(x, mean, invstd, weight, bias, num_channels, channel, known, dtype: tl.constexpr):
    """Normalized values, rounded to `dtype` as by a separate operator, but returned in the compute type."""
    high = tl.load(mean + channel, mask=known)
    low = tl.load(mean + num_channels + channel, mask=known)
    scale, shift = scale_and_shift(low, tl.load(invstd + channel, mask=known), weight, bias, channel, known)
    return scaled(x, high, scale, shift, dtype)


@triton.jit
def scale_and_shift(low, invstd, weight, bias, channel, known):
    """What `scaled` takes, by the low part of the mean; of the channels of one program."""
    scale = invstd
    if weight is not None:
        scale *= tl.load(weight + channel, mask=known).to(scale.dtype)
    shift = -low * scale
    if bias is not None:
        shift += tl.load(bias + channel, mask=known).to(scale.dtype)
    return scale, shift


@triton.jit
def scaled(x, high, scale, shift, dtype: tl.constexpr):
    y = tl.fma(x.to(high.dtype) - high, scale, shift)
    return y.to(dtype).to(y.dtype)


@triton.jit
def activated(y, ACTIVATION: tl.constexpr):
    if ACTIVATION == "relu":
        y = tl.where(y < 0.0, 0.0, y)  # not a maximum, which would lose NaN
    elif ACTIVATION == "leaky_relu":
        y = tl.where(y > 0.0, y, y * 0.01)
    elif ACTIVATION == "silu":
        y *= sigmoid(y)
    return y


@triton.jit
def activation_backward(g, z, ACTIVATION: tl.constexpr):
    """The gradient of an activation's input z, by that of its output; in the type of z."""
    wide = g.to(z.dtype)
    if ACTIVATION == "relu":
        wide = tl.where(z <= 0.0, 0.0, wide)
    elif ACTIVATION == "leaky_relu":
        wide = tl.where(z > 0.0, wide, wide * 0.01)
    else:
        s = sigmoid(z)
        wide = wide * s * (1.0 + z * (1.0 - s))
    return wide


@triton.jit
def with_residual(y, residual, offset, exists, dtype: tl.constexpr):
    """y without a residual, else y + residual rounded to `dtype`; returned in the type of y."""
    if residual is not None:
        y = (y + tl.load(residual + offset, mask=exists).to(y.dtype)).to(dtype).to(y.dtype)
    return y


@triton.jit
def sigmoid(z):
    small = tl.exp(-tl.abs(z))  # the exponent is never positive, so exp cannot overflow
    return tl.where(z >= 0.0, 1.0, small) / (1.0 + small)


@triton.jit(do_not_specialize=SIZES)
def normalize(
    input, output, mean, invstd, weight, bias, residual, num_channels, rows, units, tiles_across,
    ACTIVATION: tl.constexpr, CHANNELS_LAST: tl.constexpr, UNIT: tl.constexpr, BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr, INT64_OFFSETS: tl.constexpr,
):  # fmt: skip
    """`reference.normalize`."""
    offset, exists, channel, known = elementwise_tile(
        num_channels, rows, units, tiles_across, CHANNELS_LAST, UNIT, BLOCK_ROWS, BLOCK_COLS, INT64_OFFSETS
    )
    x = tl.load(input + offset, mask=exists)
    y = normalized(x, mean, invstd, weight, bias, num_channels, channel, known, x.dtype)
    y = with_residual(y, residual, offset, exists, x.dtype)
    y = activated(y, ACTIVATION)
    tl.store(output + offset, y.to(output.dtype.element_ty), mask=exists)


@triton.jit(do_not_specialize=SIZES)
def backward_elementwise(
    grad, input, output, mean, invstd, weight, sums, count, num_channels, rows, units, tiles_across,
    CHANNELS_LAST: tl.constexpr, UNIT: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr,
    INT64_OFFSETS: tl.constexpr,
):  # fmt: skip
    """`reference.backward_elementwise`."""
    offset, exists, channel, known = elementwise_tile(
        num_channels, rows, units, tiles_across, CHANNELS_LAST, UNIT, BLOCK_ROWS, BLOCK_COLS, INT64_OFFSETS
    )
    x = tl.load(input + offset, mask=exists).to(mean.dtype.element_ty)
    g = tl.load(grad + offset, mask=exists).to(mean.dtype.element_ty)
    high = tl.load(mean + channel, mask=known)
    low = tl.load(mean + num_channels + channel, mask=known)
    inverse = tl.load(invstd + channel, mask=known)
    scale, slope, grad_mean = gradient_terms(
        tl.load(sums + channel, mask=known), tl.load(sums + num_channels + channel, mask=known), tl.load(count),
        inverse, weight, channel, known,
    )  # fmt: skip
    projected = tl.fma((x - high) - low, slope, g - grad_mean)
    tl.store(output + offset, (projected * scale).to(output.dtype.element_ty), mask=exists)


@triton.jit
def gradient_terms(first, second, count, inverse, weight, channel, known):
    """Scale, slope and mean of `backward_elementwise`, by the two sums over a channel of N = count values."""
    share = 1.0 / tl.maximum(count, 1.0)  # one division per program, not one per value
    scale = inverse
    if weight is not None:
        scale *= tl.load(weight + channel, mask=known).to(scale.dtype)
    return scale, -inverse * (second * share).to(inverse.dtype), (first * share).to(inverse.dtype)
