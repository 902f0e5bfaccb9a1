"""CPU implementation of the operators, built from ATen kernels: one read of the activation instead of several.

Speed (benchmarks/layer.md): torch spends half of a local layer on the statistics, but its operator
`native_batch_norm_backward` in evaluation mode computes sum(g) and sum(g * (x - mean)) of a channel in one vectorized
read. With g = x these are the moments; with g the gradient they are the sums of the backward pass. The operator
accumulates in the compute type, so `pair_sums` cuts each channel into short pieces and adds the pieces in float64:
float32 sums then have an error near 1e-7.

Accuracy: such sums are accurate only for channels whose mean is not large compared to their standard deviation. The
sums themselves reveal the other channels, which are summed again around a pivot. In the same way, x * scale + shift
(one pass) gives way to (x - mean) * scale + shift (two passes) where a mean is large. Masks, and layouts that are
neither contiguous nor channels_last, fall back to the reference.
"""

import math

import torch
from torch import Tensor

from syncbn.kernels import activations, reference
from syncbn.kernels.cpu_blocks import PIECE, ROWS, Blocks, constants, pair_sums, pieces_of, plane_size
from syncbn.kernels.cpu_statistics import move, pack_sums, rounded

# x * scale + shift is used up to this r: beyond, the rounding error of the shift is too large for the output.
_SHIFT_UP_TO = 4.0
# Values of the largest plane for which torch's own sums, with one accumulator per SIMD lane, are accurate enough.
_LONGEST_PLANE = 16 * PIECE

_aten = torch.ops.aten


def moments(input: Tensor, mask: Tensor | None = None) -> Tensor:
    """See `reference.moments`."""
    if mask is not None or not is_regular(input):
        return reference.moments(input, mask)
    return pack_sums(input, pair_sums(input, input, None))


def finish(
    packed: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
    momentum: float | None,
    eps: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """See `reference.finish`; calls a third as many ATen operators if no channel needs double-double arithmetic."""
    total = packed[0]
    count = float(total)
    num_channels = (packed.numel() - 1) // 4
    mean, mean_square = packed[1:].view(2, 2, num_channels).sum(1).div_(max(count, 1.0)).unbind()
    variance = torch.addcmul(mean_square, mean, mean, value=-1)
    # Comparisons with NaN are false, so statistics that are not finite go to the reference too.
    if not (count >= 1.0 and float(torch.sub(mean_square, variance, alpha=1e4).amax()) <= 0.0):
        return reference.finish(packed, running_mean, running_var, num_batches_tracked, momentum, eps, dtype)
    move(running_mean, running_var, num_batches_tracked, momentum, count, mean, variance)
    return *rounded(mean, variance, eps, dtype), total.clone()


def normalize(
    input: Tensor,
    mean: Tensor,
    invstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None = None,
    activation: str | None = None,
) -> Tensor:
    """See `reference.normalize`; residual and activation are applied to each block while it is in the cache."""
    if not is_regular(input):
        return reference.normalize(input, mean, invstd, weight, bias, residual, activation)
    scale = invstd if weight is None else invstd * weight.to(invstd.dtype)
    if _is_far(mean, invstd):
        wide_shift = -mean[1] * scale if bias is None else torch.addcmul(bias.to(mean.dtype), mean[1], scale, value=-1)
        output = input.to(mean.dtype) - reference.per_channel(mean[0], input)
        shift = reference.per_channel(wide_shift, input)
        torch.addcmul(shift, output, reference.per_channel(scale, input), out=output)
        return activations.apply_in_place(output.to(input.dtype), residual, activation)
    return normalize_near(input, scale, shift_of(mean, scale, bias), residual, activation)


def normalize_near(
    input: Tensor, scale: Tensor, shift: Tensor, residual: Tensor | None, activation: str | None
) -> Tensor:
    """activation(x * scale + shift + residual), for an input that no channel's mean is far from 0 in."""
    if residual is None and activation is None:
        return _scale_and_shift(input, scale, shift)
    output = torch.empty_like(input)
    blocks = Blocks(input)
    added = None if residual is None else blocks.cut(_like(residual, input))
    columns = (blocks.cut(input), blocks.cut(output), blocks.spread(scale), blocks.spread(shift))
    for number, (x, y, scale_part, shift_part) in enumerate(zip(*columns, strict=True)):
        _scale_and_shift(x, scale_part, shift_part, y)
        activations.apply_in_place(y, None if added is None else added[number], activation)
    return output


def backward_reduce(
    grad: Tensor, input: Tensor, mean: Tensor, invstd: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """See `reference.backward_reduce`."""
    if not is_regular(input):
        return reference.backward_reduce(grad, input, mean, invstd, dtype)
    high, low = mean.unbind()
    sums = pair_sums(_like(grad, input), input, high)
    first, second = sums.unbind()
    second.addcmul_(low, first, value=-1).mul_(invstd)
    return sums.view(-1), sums.to(dtype, copy=True)


def backward_elementwise(
    grad: Tensor, input: Tensor, mean: Tensor, invstd: Tensor, weight: Tensor | None, sums: Tensor, count: Tensor
) -> Tensor:
    """See `reference.backward_elementwise`."""
    if not is_regular(input):
        return reference.backward_elementwise(grad, input, mean, invstd, weight, sums, count)
    output = torch.empty_like(input)
    _write_gradient(output, _like(grad, input), input, mean, invstd, weight, sums, count)
    return output


def backward_elementwise_(
    grad: Tensor, input: Tensor, mean: Tensor, invstd: Tensor, weight: Tensor | None, sums: Tensor, count: Tensor
) -> None:
    """See `reference.backward_elementwise_`."""
    if is_regular(input) and grad.stride() == input.stride():
        _write_gradient(grad, grad, input, mean, invstd, weight, sums, count)
    else:
        grad.copy_(backward_elementwise(grad, input, mean, invstd, weight, sums, count))


def _write_gradient(
    output: Tensor,
    grad: Tensor,
    input: Tensor,
    mean: Tensor,
    invstd: Tensor,
    weight: Tensor | None,
    sums: Tensor,
    count: Tensor,
) -> None:
    """Writes scale * grad + slope * (x - mean) - scale * mean(grad) to `output`, which may be `grad` itself."""
    offset = input
    if _is_far(mean, invstd):
        offset = input.to(mean.dtype) - reference.per_channel(mean[0], input)
        mean = torch.stack([torch.zeros_like(mean[0]), mean[1]])
    scale = invstd if weight is None else invstd * weight.to(invstd.dtype)
    grad_mean, projection = (sums / max(float(count), 1.0)).chunk(2)
    slope = (scale * invstd).mul(projection).neg_()
    shift = _in_one(mean).mul_(slope).add_(scale * grad_mean).neg_()
    blocks = Blocks(input)
    tensors = (blocks.cut(tensor) for tensor in (offset, grad, output))
    vectors = (blocks.spread(vector.to(mean.dtype)) for vector in (shift, slope, scale))
    for x, g, out, shift_part, slope_part, scale_part in zip(*tensors, *vectors, strict=True):
        per_channel = reference.per_channel(scale_part, x)
        if x.dtype == g.dtype == out.dtype == mean.dtype:
            if output is grad:  # parts of it are views
                torch.addcmul(_scale_and_shift(x, slope_part, shift_part), g, per_channel, out=out)
            else:
                _scale_and_shift(x, slope_part, shift_part, out).addcmul_(g, per_channel)
        else:  # mixed types: the wider temporary of one block stays in the cache
            wide = torch.addcmul(reference.per_channel(shift_part, x), x, reference.per_channel(slope_part, x))
            out.copy_(wide.addcmul_(g, per_channel))


def activated_reduce(
    grad: Tensor,
    input: Tensor,
    mean: Tensor,
    invstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    kept: Tensor | None,
    activation: str,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """See `reference.activated_reduce`."""
    if not is_regular(input):
        return reference.activated_reduce(grad, input, mean, invstd, weight, bias, kept, activation, dtype)
    is_output = kept is not None and activations.output_tells(activation)
    if not is_output and _is_far(mean, invstd):
        # Recompute z exactly as the forward pass did, so that its signs are the same. z can stand for the output: every
        # activation's gradient can be computed from its input.
        kept, is_output = normalize(input, mean, invstd, weight, bias, kept), True
    grad_z = torch.empty_like(input)
    scale = invstd if weight is None else invstd * weight.to(invstd.dtype)
    shift = scale if is_output else shift_of(mean, scale, bias)
    blocks = Blocks(input)
    tensors = (blocks.cut(tensor) for tensor in (_like(grad, input), input, grad_z))
    kept_parts = None if kept is None else blocks.cut(_like(kept, input))
    vectors = (blocks.spread(vector) for vector in (mean[0], scale, shift))
    parts = []
    for number, (g, x, out, mean_part, *vector_parts) in enumerate(zip(*tensors, *vectors, strict=True)):
        if is_output and kept_parts is not None:
            z = kept_parts[number]
        else:
            z = _scale_and_shift(x, *vector_parts)
            if kept_parts is not None:
                z.add_(kept_parts[number])
        activations.backward_out(g, z, activation, out)
        parts.append(blocks.sums(out, x, mean_part))
    sums = blocks.total(parts)
    sums[1].addcmul_(mean[1], sums[0], value=-1).mul_(invstd)
    return sums.view(-1), sums.to(dtype, copy=True), grad_z


def backward_local(
    grad: Tensor, input: Tensor, mean: Tensor, invstd: Tensor, weight: Tensor | None, count: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """See `reference.backward_local`; torch's own backward pass is used where its sums (one per plane) are accurate."""
    num_channels = input.size(1)
    longest, length = (_LONGEST_PLANE, plane_size(input)) if input.dim() > 2 else (ROWS, input.size(0))
    fits = input.numel() > 0 and input.is_contiguous() and length <= longest
    # With a mask, `count` is smaller than the number of values per channel, by which torch's operator divides.
    if not fits or float(count) * num_channels != input.numel() or _is_far(mean, invstd):
        sums, affine = backward_reduce(grad, input, mean, invstd, dtype)
        return backward_elementwise(grad, input, mean, invstd, weight, sums, count), affine
    scale = torch.ones_like(invstd) if weight is None else weight.to(invstd.dtype)
    grad_input, grad_weight, grad_bias = _aten.native_batch_norm_backward(
        _like(grad, input), input, scale, None, None, mean[0], invstd, True, 0.0, [True, True, True]
    )
    return grad_input, torch.stack([grad_bias, grad_weight]).to(dtype)


def is_regular(input: Tensor) -> bool:
    """Whether the fast kernels support `input`: not empty; channels_last, or contiguous with planes that can be cut."""
    if input.numel() == 0:
        return False
    return (input.is_contiguous() and pieces_of(input) > 0) or _is_channels_last(input)


def _is_channels_last(input: Tensor) -> bool:
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    return input.dim() in formats and input.is_contiguous(memory_format=formats[input.dim()])


def _like(grad: Tensor, input: Tensor) -> Tensor:
    """`grad` with the strides of `input`, copied if they differ."""
    return grad if grad.stride() == input.stride() else torch.empty_like(input, dtype=grad.dtype).copy_(grad)


def _is_far(mean: Tensor, invstd: Tensor) -> bool:
    """Whether |mean| / std of some channel is too large for x * scale + shift."""
    return float(torch.linalg.vector_norm(mean[0] * invstd, math.inf)) > _SHIFT_UP_TO


def shift_of(mean: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """bias - mean * scale, computed in float64 and rounded once."""
    exact = _in_one(mean).mul_(scale)
    return (exact.neg_() if bias is None else bias - exact).to(scale.dtype)


def _in_one(mean: Tensor) -> Tensor:
    """The two parts of the mean as one (C,) float64 vector."""
    high, low = mean.unbind()
    return torch.add(high.to(torch.float64), low)


def _scale_and_shift(input: Tensor, scale: Tensor, shift: Tensor, out: Tensor | None = None) -> Tensor:
    """x * scale + shift per channel, in the input's type and layout (torch's batch norm with mean 0 and variance 1)."""
    zero, one = constants(scale.numel(), scale.dtype)
    if out is not None:
        unused = {"save_mean": scale.new_empty(0), "save_invstd": scale.new_empty(0)}
        _aten.native_batch_norm.out(input, scale, shift, zero, one, False, 0.0, 0.0, out=out, **unused)
        return out
    output, _, _ = _aten.native_batch_norm(input, scale, shift, zero, one, False, 0.0, 0.0)
    return output
