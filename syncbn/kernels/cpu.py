"""The operators on CPU, out of ATen's own kernels: one read of the activation where the reference takes several.

What makes it fast (benchmarks/layer.md): torch spends half of a local layer in its statistics, but its operator
`native_batch_norm_backward` in evaluation mode computes sum(g) and sum(g * (x - mean)) of a channel in one vectorized
read. With g = x these are the moments, and with the gradient the sums of the backward pass. It adds up in the input's
type, so `_pair_sums` cuts each channel into short pieces and adds those up in float64: float32 sums then come out with
an error near 1e-7.

What keeps it exact: such sums are good for channels whose mean is not large against their spread. The others, which the
sums themselves tell, are taken again around a pivot. The same holds for x * scale + shift, which is one pass, against
(x - mean) * scale + shift, which is two. Layouts that are neither contiguous nor channels_last, and masks, go to the
reference.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from syncbn.kernels import activations, reference
from syncbn.kernels.packing import pack

_aten = torch.ops.aten

# |mean| / std of a channel above which its raw sums are not good enough: their error enters the variance squared;
_SUMS_UP_TO = 1.0
# above which its values lie so coarsely in float32 that sums of that type lose too much even around a pivot;
_PIVOT_UP_TO = 64.0
# and above which x * scale + shift is not good enough: the rounding of the shift enters the output.
_SHIFT_UP_TO = 4.0
# Values that one accumulator adds up. Their rounding errors average out over the accumulators of a channel.
_PIECE = 256
# The same in channels_last, and how many accumulators there are side by side.
_ROWS, _COLUMNS = 256, 1024
# Values of a temporary that stays in the cache.
_BLOCK = 2**18
# The largest plane that torch's own sums, one accumulator per lane of the processor, are good enough for.
_LONGEST_PLANE = 16 * _PIECE


def moments(input: Tensor, mask: Tensor | None = None) -> Tensor:
    """See `reference.moments`."""
    if mask is not None or not _is_regular(input):
        return reference.moments(input, mask)
    num_channels = input.size(1)
    count = input.numel() // num_channels
    dtype = reference.compute_dtype(input.dtype)
    sums = _pair_sums(input, input, torch.zeros(num_channels, dtype=dtype))
    packed = torch.zeros(4 * num_channels + 1, dtype=torch.float64)
    packed[0] = count
    parts = packed[1:].view(4, num_channels)  # S1 high, S1 low, S2 high, S2 low
    parts[::2] = sums
    mean, mean_square = sums.div_(count).unbind()
    # mean^2 > T^2 * variance, where variance = E[x^2] - mean^2. NaN compares as false: it is no matter of conditioning.
    square = mean.square()
    ill = square * (1.0 + _SUMS_UP_TO**-2) > mean_square
    if ill.any():
        part, pivot = (input, mean) if ill.all() else (input[:, ill], mean[ill])
        if (square * (1.0 + _PIVOT_UP_TO**-2) > mean_square).any():
            careful = reference.moments(part)
        else:
            pivot = pivot.to(dtype)
            centred = part.to(dtype) - reference.per_channel(pivot, part)
            careful = pack(count, pivot.to(torch.float64), *_pair_sums(centred, centred, torch.zeros_like(pivot)))
        parts[:, ill] = careful[1:].view(4, -1)
    return packed


def finish(
    packed: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
    momentum: float | None,
    eps: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """See `reference.finish`; a third of its operators where no channel needs double-double arithmetic."""
    count = float(packed[0])
    num_channels = (packed.numel() - 1) // 4
    mean, mean_square = packed[1:].view(2, 2, num_channels).sum(1).div_(max(count, 1.0)).unbind()
    variance = torch.addcmul(mean_square, mean, mean, value=-1)
    # Comparisons with NaN are false: what is not finite takes the reference's way too.
    if not (count >= 1.0 and bool((mean_square <= 1e4 * variance).all())):
        return reference.finish(packed, running_mean, running_var, num_batches_tracked, momentum, eps, dtype)
    if num_batches_tracked is not None:
        num_batches_tracked.add_(1)
    if running_mean is not None and running_var is not None:
        if momentum is not None:
            rate = momentum
        else:
            rate = 0.0 if num_batches_tracked is None else 1.0 / float(num_batches_tracked)
        running_mean.copy_(running_mean.to(torch.float64).lerp_(mean, rate))
        if count > 1.0:
            unbiased = variance * (count / (count - 1.0))
            running_var.copy_(running_var.to(torch.float64).lerp_(unbiased, rate))
    two_parts = torch.empty((2, num_channels), dtype=dtype)
    two_parts[0] = mean
    two_parts[1] = mean - two_parts[0]
    return two_parts, (variance + eps).rsqrt_().to(dtype), packed[0].clone()


def normalize(
    input: Tensor,
    mean: Tensor,
    invstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None = None,
    activation: str | None = None,
) -> Tensor:
    """See `reference.normalize`; what follows the normalization finds its block in the cache."""
    if not _is_regular(input):
        return reference.normalize(input, mean, invstd, weight, bias, residual, activation)
    scale = invstd if weight is None else invstd * weight.to(invstd.dtype)
    if _is_far(mean, invstd):
        wide_shift = -mean[1] * scale if bias is None else torch.addcmul(bias.to(mean.dtype), mean[1], scale, value=-1)
        output = input.to(mean.dtype) - reference.per_channel(mean[0], input)
        shift = reference.per_channel(wide_shift, input)
        torch.addcmul(shift, output, reference.per_channel(scale, input), out=output)
        return activations.apply_in_place(output.to(input.dtype), residual, activation)
    shift = _shift(mean, scale, bias)
    if residual is None and activation is None:
        return _scale_and_shift(input, scale, shift)
    output = torch.empty_like(input)
    blocks = _Blocks(input)
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
    if not _is_regular(input):
        return reference.backward_reduce(grad, input, mean, invstd, dtype)
    sums = _pair_sums(_like(grad, input), input, mean[0])
    sums[1].addcmul_(mean[1], sums[0], value=-1).mul_(invstd)
    return sums.view(-1), sums.to(dtype, copy=True)


def backward_elementwise(
    grad: Tensor, input: Tensor, mean: Tensor, invstd: Tensor, weight: Tensor | None, sums: Tensor, count: Tensor
) -> Tensor:
    """See `reference.backward_elementwise`."""
    if not _is_regular(input):
        return reference.backward_elementwise(grad, input, mean, invstd, weight, sums, count)
    output = torch.empty_like(input)
    _write_gradient(output, _like(grad, input), input, mean, invstd, weight, sums, count)
    return output


def backward_elementwise_(
    grad: Tensor, input: Tensor, mean: Tensor, invstd: Tensor, weight: Tensor | None, sums: Tensor, count: Tensor
) -> None:
    """See `reference.backward_elementwise_`."""
    if _is_regular(input) and grad.stride() == input.stride():
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
    """scale * grad + slope * (x - mean) - scale * mean(grad), to `output`, which may be `grad`."""
    offset = input
    if _is_far(mean, invstd):
        offset = input.to(mean.dtype) - reference.per_channel(mean[0], input)
        mean = torch.stack([torch.zeros_like(mean[0]), mean[1]])
    scale = invstd if weight is None else invstd * weight.to(invstd.dtype)
    grad_mean, projection = (sums / max(float(count), 1.0)).chunk(2)
    slope = -(scale * invstd) * projection
    shift = -mean.sum(0, dtype=torch.float64) * slope - scale * grad_mean
    blocks = _Blocks(input)
    tensors = (blocks.cut(tensor) for tensor in (offset, grad, output))
    vectors = (blocks.spread(vector.to(mean.dtype)) for vector in (shift, slope, scale))
    for x, g, out, shift_part, slope_part, scale_part in zip(*tensors, *vectors, strict=True):
        per_channel = reference.per_channel(scale_part, x)
        if x.dtype == g.dtype == out.dtype == mean.dtype:
            torch.addcmul(_scale_and_shift(x, slope_part, shift_part), g, per_channel, out=out)
        else:  # what is wide stays in the cache
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
    if not _is_regular(input):
        return reference.activated_reduce(grad, input, mean, invstd, weight, bias, kept, activation, dtype)
    is_output = kept is not None and activations.output_tells(activation)
    if not is_output and _is_far(mean, invstd):  # as forward did it, so that the signs are the same
        kept, is_output = normalize(input, mean, invstd, weight, bias, kept), True  # z itself, which tells as well
    through = torch.empty_like(input)
    scale = invstd if weight is None else invstd * weight.to(invstd.dtype)
    shift = scale if is_output else _shift(mean, scale, bias)
    blocks = _Blocks(input)
    tensors = (blocks.cut(tensor) for tensor in (_like(grad, input), input, through))
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
    return sums.view(-1), sums.to(dtype, copy=True), through


def backward_local(
    grad: Tensor, input: Tensor, mean: Tensor, invstd: Tensor, weight: Tensor | None, count: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """See `reference.backward_local`; torch's own backward pass where its sums, one per plane, are good enough."""
    num_channels = input.size(1)
    longest, length = (_LONGEST_PLANE, _plane_size(input)) if input.dim() > 2 else (_ROWS, input.size(0))
    fits = input.numel() > 0 and input.is_contiguous() and length <= longest
    # Masked samples are in the input, and not in the count.
    if not fits or float(count) * num_channels != input.numel() or _is_far(mean, invstd):
        sums, affine = backward_reduce(grad, input, mean, invstd, dtype)
        return backward_elementwise(grad, input, mean, invstd, weight, sums, count), affine
    scale = torch.ones_like(invstd) if weight is None else weight.to(invstd.dtype)
    grad_input, grad_weight, grad_bias = _aten.native_batch_norm_backward(
        _like(grad, input), input, scale, None, None, mean[0], invstd, True, 0.0, [True, True, True]
    )
    return grad_input, torch.stack([grad_bias, grad_weight]).to(dtype)


def _is_regular(input: Tensor) -> bool:
    """Whether the fast kernels take it: something in it, dense in one of the two usual layouts, and divisible."""
    if input.numel() == 0:
        return False
    return (input.is_contiguous() and _pieces_of(input) > 0) or _is_channels_last(input)


def _pieces_of(input: Tensor) -> int:
    """Into how many equal pieces a plane of the contiguous layout is cut; 0 where it is large and cannot be."""
    size = _plane_size(input)
    fewest = -(-size // _PIECE)
    found = next((number for number in range(fewest, min(size, 64 * fewest) + 1) if size % number == 0), 0)
    return found if found or size > 32 * _PIECE else 1


def _plane_size(input: Tensor) -> int:
    """The values of one channel of one sample."""
    return math.prod(input.shape[2:])


def _is_channels_last(input: Tensor) -> bool:
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    return input.dim() in formats and input.is_contiguous(memory_format=formats[input.dim()])


def _like(grad: Tensor, input: Tensor) -> Tensor:
    """The gradient in the layout of the input."""
    return grad if grad.stride() == input.stride() else torch.empty_like(input, dtype=grad.dtype).copy_(grad)


def _is_far(mean: Tensor, invstd: Tensor) -> bool:
    """Whether some channel lies too far from 0, in its standard deviations, for x * scale + shift."""
    return float(torch.linalg.vector_norm(mean[0] * invstd, math.inf)) > _SHIFT_UP_TO


def _shift(mean: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """bias - mean * scale, rounded once."""
    exact = mean.sum(0, dtype=torch.float64).mul_(scale)
    return (exact.neg_() if bias is None else bias - exact).to(scale.dtype)


def _scale_and_shift(input: Tensor, scale: Tensor, shift: Tensor, out: Tensor | None = None) -> Tensor:
    """x * scale + shift per channel, in the input's type and layout: torch's batch norm with mean 0 and variance 1."""
    zero, one = torch.zeros_like(scale), torch.ones_like(scale)
    if out is not None:
        unused = {"save_mean": scale.new_empty(0), "save_invstd": scale.new_empty(0)}
        _aten.native_batch_norm.out(input, scale, shift, zero, one, False, 0.0, 0.0, out=out, **unused)
        return out
    output, _, _ = _aten.native_batch_norm(input, scale, shift, zero, one, False, 0.0, 0.0)
    return output


class _Blocks:
    """An activation cut into dense parts that stay in the cache, and the vectors of its channels cut alike.

    In the contiguous layout a part is (samples, pieces, values): short pieces of planes stand for channels, so that
    their sums are good enough. In channels_last it is (positions, channels). A small activation is the one part, as it
    is: there every operator counts.
    """

    def __init__(self, input: Tensor) -> None:
        self._is_one = input.numel() <= _BLOCK
        if self._is_one:
            return
        self._channels = input.size(1)
        self._order: list[int] | None = None
        if input.is_contiguous() and input.dim() > 2:
            self._pieces = _pieces_of(input)
            self._columns, self._size = self._channels * self._pieces, _plane_size(input) // self._pieces
            self._rows = input.size(0)
            self._wide = min(self._columns, max(1, _BLOCK // self._size))
        else:
            self._order = [0, *range(2, input.dim()), 1]
            self._pieces, self._size = 1, 1
            self._columns = self._wide = self._channels
            self._rows = input.numel() // self._channels
        self._deep = max(1, _BLOCK // (self._columns * self._size))

    def cut(self, tensor: Tensor) -> Sequence[Tensor]:
        """The parts of a tensor with the shape and strides of the input."""
        if self._is_one:
            return (tensor,)
        if self._order is None:
            view = tensor.view(self._rows, self._columns, self._size)
        else:
            view = tensor.permute(self._order).view(self._rows, self._columns)
        parts = view.split(self._deep)
        return (
            parts if self._wide == self._columns else [piece for part in parts for piece in part.split(self._wide, 1)]
        )

    def spread(self, vector: Tensor) -> Sequence[Tensor]:
        """A vector of channels for each part."""
        if self._is_one:
            return (vector,)
        if self._pieces > 1:
            vector = vector.repeat_interleave(self._pieces)
        return vector.split(self._wide) * -(-self._rows // self._deep)

    def sums(self, grad: Tensor, input: Tensor, mean: Tensor) -> Tensor:
        """`_pair_sums` of a part; in the contiguous layout, of its pieces."""
        if self._is_one or self._order is not None:
            return _pair_sums(grad, input, mean)
        return torch.stack(_native_sums(grad, input, mean, torch.ones_like(mean)))

    def total(self, parts: list[Tensor]) -> Tensor:
        """(2, C) float64 from the pairs of sums of all parts."""
        if self._is_one:
            return parts[0]
        across = -(-self._columns // self._wide)
        columns = [torch.stack(parts[number::across]).sum(0, dtype=torch.float64) for number in range(across)]
        return torch.cat(columns, 1).view(2, self._channels, self._pieces).sum(2)


def _pair_sums(grad: Tensor, input: Tensor, mean: Tensor) -> Tensor:
    """sum(grad) and sum(grad * (input - mean)) per channel, (2, C) float64.

    Both tensors are dense and in the same layout; `mean` is in the compute type.
    """
    num_channels = input.size(1)
    if input.is_contiguous() and input.dim() > 2:
        pieces = _pieces_of(input)
        shape = (input.size(0), num_channels * pieces, _plane_size(input) // pieces)
        mean = mean.repeat_interleave(pieces) if pieces > 1 else mean
        pair = _native_sums(grad.view(shape), input.view(shape), mean, torch.ones_like(mean))
        return torch.stack(pair).view(2, num_channels, pieces).sum(2, dtype=torch.float64)
    # Rows of channels: a few side by side are one longer row, whose accumulators still fit into the nearest cache. And
    # where there are few rows, rather more accumulators than long ones.
    order = [0, *range(2, input.dim()), 1]
    rows = input.permute(order).reshape(-1, num_channels)
    grad_rows = rows if grad is input else grad.permute(order).reshape(-1, num_channels)
    num_rows = rows.size(0)
    width = min(num_rows, max(1, _COLUMNS // num_channels, min(8, num_rows // 16)))
    whole = num_rows // width * width
    long_mean = mean.repeat(width) if width > 1 else mean
    ones = torch.ones_like(long_mean)
    long, long_grad = (tensor[:whole].view(-1, width * num_channels) for tensor in (rows, grad_rows))
    blocks = [
        _native_sums(g, x, long_mean, ones) for g, x in zip(long_grad.split(_ROWS), long.split(_ROWS), strict=True)
    ]
    every = torch.stack([torch.stack(vectors) for vectors in zip(*blocks, strict=True)]).view(2, -1, num_channels)
    sums = every.sum(1, dtype=torch.float64)
    if whole < num_rows:
        sums += torch.stack(_native_sums(grad_rows[whole:], rows[whole:], mean, ones[:num_channels]))
    return sums


def _native_sums(grad: Tensor, input: Tensor, mean: Tensor, ones: Tensor) -> tuple[Tensor, Tensor]:
    """sum(grad) and sum(grad * (input - mean)) of each column, in the compute type."""
    _, product, first = _aten.native_batch_norm_backward(
        grad, input, ones, mean, ones, mean, ones, False, 0.0, [False, True, True]
    )
    return first, product
