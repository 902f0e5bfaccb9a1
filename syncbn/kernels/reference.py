"""Reference implementation of every operator: plain tensor code for any device, layout and floating type.

It is the specification that the kernels are tested against. Sums are taken in float64. (Longer than other files: every
operator has its fake implementation beside it.)

Shapes: `input` and gradients are (N, C, ...); per-channel vectors are (C,). `mean` is (2, C): a high and a low part
whose sum is the mean, in the compute type (float64 for float64 inputs, float32 for all others), like `invstd`.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from syncbn.kernels import activations
from syncbn.kernels.packing import pack, unpack

Function = Callable[..., Any]

# Fake implementations by operator name, for tracing: each returns empty tensors of the operator's output shapes, types
# and layouts.
FAKES: dict[str, Function] = {}


def _fake_of(operator: Function) -> Callable[[Function], Function]:
    """Registers the fake implementation of `operator`, which spells out only the arguments that decide the shapes."""

    def register(fake: Function) -> Function:
        FAKES[operator.__name__] = fake
        return fake

    return register


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The type in which activations of `dtype` are normalized."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def reduced_dims(input: Tensor) -> list[int]:
    """All dimensions except dimension 1, the channels."""
    return [0, *range(2, input.dim())]


def per_channel(vector: Tensor, input: Tensor) -> Tensor:
    """A (C,) vector as a (1, C, 1, ...) view that broadcasts against `input`."""
    return vector.view(1, -1, *[1] * (input.dim() - 2))


def moments(input: Tensor, mask: Tensor | None = None) -> Tensor:
    """The packed moments of the local samples (see `packing`), 4C+1 float64 numbers; zeros for an empty input.

    Args:
        mask: (N, 1, ...) bool, broadcasts to the input. Positions where it is False are ignored, even if they hold NaN.
    """
    num_channels = input.size(1)
    count = input.numel() // num_channels if num_channels else 0
    if count == 0:
        return torch.zeros(4 * num_channels + 1, dtype=torch.float64, device=input.device)
    dims = reduced_dims(input)
    wide = input.to(torch.float64)
    if mask is None:
        pivot = wide.mean(dims)
        centred = wide - per_channel(pivot, input)
        return pack(count, pivot, centred.sum(dims), centred.square().sum(dims))
    counted = mask.expand(input.size(0), 1, *input.shape[2:]).sum(dtype=torch.float64)
    pivot = torch.where(mask, wide, 0.0).sum(dims) / counted.clamp(min=1.0)
    centred = torch.where(mask, wide - per_channel(pivot, input), 0.0)
    return pack(counted, pivot, centred.sum(dims), centred.square().sum(dims))


@_fake_of(moments)
def _(input: Tensor, mask: Tensor | None = None) -> Tensor:
    return input.new_empty(4 * input.size(1) + 1, dtype=torch.float64)


def finish(
    packed: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
    momentum: float | None,
    eps: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """Mean and inverse standard deviation from the moments of the global batch; updates running statistics in place.

    new = (1 - m) * old + m * batch, where the batch variance is the unbiased one (n / (n - 1), n the global count).
    With `momentum=None`, m is 1 / num_batches_tracked after counting this batch (the cumulative average). A global
    count of 0 updates nothing; a count of 1 leaves the running variance alone, because the unbiased variance is then
    undefined. Both conditions are evaluated on the device.

    Returns:
        mean (2, C) and invstd (C,) in `dtype`, and count, a float64 tensor without dimensions.
    """
    count, (mean_high, mean_low), variance = unpack(packed)
    has_samples = count > 0
    if num_batches_tracked is not None:
        num_batches_tracked.add_(has_samples.to(num_batches_tracked.dtype))
    if running_mean is not None and running_var is not None:
        if momentum is None and num_batches_tracked is None:
            rate = torch.zeros_like(count)  # as in torch: without a batch counter the cumulative average stays put
        elif momentum is None:
            assert num_batches_tracked is not None
            rate = 1.0 / num_batches_tracked.to(torch.float64).clamp(min=1.0)
        else:
            rate = torch.full_like(count, momentum)
        unbiased = variance * (count / (count - 1.0).clamp(min=1.0))
        moved_mean = (1.0 - rate) * running_mean.to(torch.float64) + rate * (mean_high + mean_low)
        moved_var = (1.0 - rate) * running_var.to(torch.float64) + rate * unbiased
        running_mean.copy_(torch.where(has_samples, moved_mean.to(running_mean.dtype), running_mean))
        running_var.copy_(torch.where(count > 1, moved_var.to(running_var.dtype), running_var))
    high = mean_high.to(dtype)
    low = ((mean_high - high.to(torch.float64)) + mean_low).to(dtype)
    invstd = (variance + eps).rsqrt().to(dtype)
    return torch.stack([high, low]), invstd, count.clone()


@_fake_of(finish)
def _(packed: Tensor, *others: Any) -> tuple[Tensor, Tensor, Tensor]:
    dtype, num_channels = others[-1], (packed.size(0) - 1) // 4
    mean = packed.new_empty((2, num_channels), dtype=dtype)
    return mean, packed.new_empty(num_channels, dtype=dtype), packed.new_empty(())


def normalize(
    input: Tensor,
    mean: Tensor,
    invstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None = None,
    activation: str | None = None,
) -> Tensor:
    """activation((x - mean) * invstd * weight + bias + residual), in the type and layout of `input`.

    Computed as (x - high) * scale + (bias - low * scale), where high and low are the two parts of the mean: the
    subtraction is exact where cancellation would hurt, and the part of the mean that `high` cannot represent is not
    lost. The normalized values, and their sum with the residual, are rounded to the type of `input`, as if each step
    were an operator of its own.

    Args:
        residual: same shape and type as `input`.
        activation: a key of `activations.ACTIVATIONS`.
    """
    dtype = mean.dtype
    scale = invstd if weight is None else invstd * weight.to(dtype)
    shift = -mean[1] * scale
    if bias is not None:
        shift = shift + bias.to(dtype)
    centred = input.to(dtype) - per_channel(mean[0], input)
    output = (centred * per_channel(scale, input) + per_channel(shift, input)).to(input.dtype)
    return activations.apply_in_place(output, residual, activation)


@_fake_of(normalize)
def _(input: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(input)


def backward_reduce(
    grad: Tensor, input: Tensor, mean: Tensor, invstd: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """sum(g) and sum(g * xhat) of each channel over the local samples, in two forms.

    Returns:
        sums: (2C,) float64, to be all-reduced for the input's gradient.
        affine: (2, C) in `dtype`, the gradients of bias and weight, which stay local (DDP averages them).
    """
    dims = reduced_dims(input)
    wide = mean.to(torch.float64)
    centred = (input.to(torch.float64) - per_channel(wide[0], input)) - per_channel(wide[1], input)
    wide_grad = grad.to(torch.float64)
    sums = torch.cat([wide_grad.sum(dims), (wide_grad * centred).sum(dims) * invstd.to(torch.float64)])
    return sums, sums.view(2, input.size(1)).to(dtype, copy=True)


@_fake_of(backward_reduce)
def _(grad: Tensor, input: Tensor, mean: Tensor, invstd: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    num_channels = input.size(1)
    return input.new_empty(2 * num_channels, dtype=torch.float64), input.new_empty((2, num_channels), dtype=dtype)


def backward_elementwise(
    grad: Tensor, input: Tensor, mean: Tensor, invstd: Tensor, weight: Tensor | None, sums: Tensor, count: Tensor
) -> Tensor:
    """The input's gradient: weight * invstd * (g - sum(g)/N - xhat * sum(g * xhat)/N), with global sums and count N.

    The formula is that of Ioffe and Szegedy 2015, section 3, with the sums taken over all ranks.
    """
    dtype = mean.dtype
    means = sums / count.clamp(min=1.0)
    grad_mean, projection = means.to(dtype).chunk(2)
    scale = invstd if weight is None else invstd * weight.to(dtype)
    centred = (input.to(dtype) - per_channel(mean[0], input)) - per_channel(mean[1], input)
    # The first operand decides the memory format of a sum: the term with the input's format goes first, so that the
    # result has it too, whatever the format of the incoming gradient.
    projected = centred * per_channel(-invstd * projection, input) + (grad.to(dtype) - per_channel(grad_mean, input))
    return (projected * per_channel(scale, input)).to(input.dtype)


@_fake_of(backward_elementwise)
def _(grad: Tensor, input: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(input)


def backward_elementwise_(
    grad: Tensor, input: Tensor, mean: Tensor, invstd: Tensor, weight: Tensor | None, sums: Tensor, count: Tensor
) -> None:
    """`backward_elementwise` that overwrites `grad` with its result; `grad` must have the type of `input`."""
    grad.copy_(backward_elementwise(grad, input, mean, invstd, weight, sums, count))


@_fake_of(backward_elementwise_)
def _(*_: Any) -> None:
    pass


def backward_local(
    grad: Tensor, input: Tensor, mean: Tensor, invstd: Tensor, weight: Tensor | None, count: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """The whole backward pass where the local batch is the global batch, so that no all-reduce is needed.

    As one operator it can save a pass over the activation.

    Returns:
        The result of `backward_elementwise`, and `affine` of `backward_reduce`.
    """
    sums, affine = backward_reduce(grad, input, mean, invstd, dtype)
    return backward_elementwise(grad, input, mean, invstd, weight, sums, count), affine


@_fake_of(backward_local)
def _(grad: Tensor, input: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    return torch.empty_like(input), input.new_empty((2, input.size(1)), dtype=others[-1])


def _activation_backward(
    grad: Tensor,
    input: Tensor,
    mean: Tensor,
    invstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    kept: Tensor | None,
    activation: str,
) -> Tensor:
    """The gradient of the activation's input; see `activated_reduce` for `kept`."""
    if kept is not None and activations.output_tells(activation):
        return activations.backward(grad, kept, activation)
    return activations.backward(grad, normalize(input, mean, invstd, weight, bias, kept), activation)


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
    """The backward pass of the activation, followed by `backward_reduce` of the resulting gradient.

    Args:
        kept: tensor saved by the forward pass. None if there was no residual: the activation's input is then
            recomputed. With a residual, the output of the forward pass if the activation's gradient can be computed
            from it (`activations.output_tells`), else the residual.

    Returns:
        sums, affine: see `backward_reduce`.
        grad_z: the gradient of the activation's input, which `backward_elementwise` takes as `grad`; it is also the
            gradient of the residual.
    """
    grad_z = _activation_backward(grad, input, mean, invstd, weight, bias, kept, activation)
    sums, affine = backward_reduce(grad_z, input, mean, invstd, dtype)
    return sums, affine, torch.empty_like(input).copy_(grad_z)


@_fake_of(activated_reduce)
def _(grad: Tensor, input: Tensor, *others: Any) -> tuple[Tensor, Tensor, Tensor]:
    num_channels = input.size(1)
    sums = input.new_empty(2 * num_channels, dtype=torch.float64)
    return sums, input.new_empty((2, num_channels), dtype=others[-1]), torch.empty_like(input)


def differentiable_backward(
    grad: Tensor,
    input: Tensor,
    weight: Tensor | None,
    mean: Tensor,
    count: Tensor,
    eps: float,
    all_reduce: Callable[[Tensor], Tensor],
    mask: Tensor | None = None,
    activation_backward: Callable[[Tensor, Tensor], Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of input, weight, bias and residual as differentiable functions of `grad`, `input` and `weight`, in
    float64.

    Used when the backward pass is itself differentiated (`create_graph=True`). The statistics are recomputed from
    `input`, around the known global mean, so that their dependence on every rank's samples is part of the graph.

    Args:
        all_reduce: sums a tensor over the ranks; must be differentiable.
        mask: (N, 1, ...) bool. Where it is False, `grad` must be 0, and the returned gradient of the input is
            meaningless.
        activation_backward: from the gradient of the activation's output, and xhat, to that of its input.
    """
    dims = reduced_dims(input)
    n = count.clamp(min=1.0)
    centre = mean.detach().to(torch.float64)
    offset = (input.to(torch.float64) - per_channel(centre[0], input)) - per_channel(centre[1], input)
    if mask is not None:
        offset = torch.where(mask, offset, 0.0)
    first, second = (all_reduce(torch.cat([offset.sum(dims), offset.square().sum(dims)])) / n).chunk(2)
    invstd = (second - first.square() + eps).rsqrt()
    xhat = (offset - per_channel(first, input)) * per_channel(invstd, input)

    wide_grad = grad.to(torch.float64)
    if activation_backward is not None:
        wide_grad = activation_backward(wide_grad, xhat)
    grad_bias, grad_weight = wide_grad.sum(dims), (wide_grad * xhat).sum(dims)
    grad_mean, projection = (all_reduce(torch.cat([grad_bias, grad_weight])) / n).chunk(2)
    scale = invstd if weight is None else invstd * weight.to(torch.float64)
    projected = xhat * per_channel(-projection, input) + (wide_grad - per_channel(grad_mean, input))
    return (projected * per_channel(scale, input)).to(input.dtype), grad_weight, grad_bias, wide_grad
