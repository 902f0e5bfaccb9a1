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
    scale = tl.load(invstd + channel, mask=known)
    if weight is not None:
        scale *= tl.load(weight + channel, mask=known).to(scale.dtype)
    shift = -low * scale
    if bias is not None:
        shift += tl.load(bias + channel, mask=known).to(scale.dtype)
    y = tl.fma(x.to(high.dtype) - high, scale, shift)
    return y.to(dtype).to(y.dtype)


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
    if ACTIVATION == "relu":
        y = tl.where(y < 0.0, 0.0, y)  # not a maximum, which would lose NaN
    elif ACTIVATION == "leaky_relu":
        y = tl.where(y > 0.0, y, y * 0.01)
    elif ACTIVATION == "silu":
        y *= sigmoid(y)
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
    share = 1.0 / tl.maximum(tl.load(count), 1.0)  # 1 / N: one division per program, not one per value
    grad_mean = (tl.load(sums + channel, mask=known) * share).to(high.dtype)
    projection = (tl.load(sums + num_channels + channel, mask=known) * share).to(high.dtype)
    scale = inverse
    if weight is not None:
        scale *= tl.load(weight + channel, mask=known).to(scale.dtype)
    slope = -inverse * projection
    projected = tl.fma((x - high) - low, slope, g - grad_mean)
    tl.store(output + offset, (projected * scale).to(output.dtype.element_ty), mask=exists)
