"""Synchronized batch normalization as a function: moments -> all-reduce -> finish -> normalize, and its gradient.

(Longer than other files: forward and backward save and read the same tensors, so they stand together.)
"""

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from syncbn.kernels import activations, cpu, cpu_step, cuda, cuda_step, operators, reference
from syncbn.kernels.step import Statistics
from syncbn.nn import lean
from syncbn.nn.checkpointing import Recomputation, refuse_checkpoint_around_compiled
from syncbn.nn.groups import collective_group, is_distributed
from syncbn.nn.rank_checks import reduce, sum_in_place
from syncbn.nn.recorder import sum_and_record
from syncbn.nn.tracing import (
    add_and_activate,
    is_traced,
    normalize_by_local_batch,
    refuse_context,
    refuse_group,
)
from syncbn.torch_compat import hidden_from_modes, transforms_active

_RESIDUAL = 3  # index of `residual` among the arguments of `NormalizeByBatch`


class Call(NamedTuple):
    """The arguments of `normalize_by_batch` that need no gradient."""

    statistics: Statistics
    group: dist.ProcessGroup | None
    mask: Tensor | None
    pool: Tensor | None
    owner: nn.Module | None
    recomputation: Recomputation | None
    record: Tensor | None
    activation: str | None
    is_lean: bool
    finite_type: torch.dtype | None  # in which a batch has to be finite to move running statistics; None: it need not
    is_plain: bool  # nothing traces, and moments are neither masked, recalled, recorded nor pooled


class NormalizeByBatch(torch.autograd.Function):
    """Normalization with the statistics of the global batch.

    One all-reduce in forward, and one in backward if the input needs a gradient.
    """

    @staticmethod
    def forward(
        ctx: Any, input: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None, call: Call
    ) -> Tensor:
        group, activation = call.group, call.activation
        done = None
        kernels = operators.IMPLEMENTATIONS.get(input.device.type) if call.is_plain else None
        if kernels is cpu and group is None:
            done = cpu_step.forward(input, weight, bias, residual, activation, call.statistics)
        elif kernels is cuda:
            total = None if group is None else partial(sum_in_place, group=group, owner=call.owner, direction="forward")
            done = cuda_step.forward(input, weight, bias, residual, activation, call.statistics, total)
        output, mean, invstd, count = done or _forward(input, weight, bias, residual, call)
        kept = None
        if residual is not None and activation is not None:
            kept = output if activations.output_tells(activation) else residual
        if call.is_lean:
            index = lean.channels_to_keep(weight, bias, activation, input.dtype)
            part = None if index is None else input.index_select(1, index)
            ctx.save_for_backward(output, weight, mean, invstd, count, None, bias, None, index, part)
        else:
            of_activation = (None if activation is None else bias, kept)
            ctx.save_for_backward(input, weight, mean, invstd, count, call.mask, *of_activation)
        ctx.activation, ctx.is_lean = activation, call.is_lean
        ctx.bias_dtype = None if bias is None else bias.dtype
        if weight is None:
            ctx.affine_dtype = mean.dtype if bias is None else bias.dtype
        else:
            ctx.affine_dtype = weight.dtype if bias is None or bias.dtype == weight.dtype else mean.dtype
        ctx.eps, ctx.group, ctx.owner = call.statistics.eps, group, call.owner
        return output

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        input, weight, mean, invstd, count, mask, bias, kept, *of_lean = ctx.saved_tensors
        needs_input, needs_weight, needs_bias, needs_residual, _ = ctx.needs_input_grad
        scale = weight
        grad_residual: Tensor | None
        grad_input: Tensor | None
        is_batched = not torch.compiler.is_compiling() and transforms_active()  # several gradients at once
        if is_batched and ctx.group is not None:
            refuse_group(ctx.group.size())
        if ctx.is_lean:
            kept = input  # a lean layer has saved its output in the place of the input
            input, mean, invstd, scale = _from_output(ctx, kept, weight, mean, invstd, bias, *of_lean)
        # create_graph=True: every step, collectives included, has to be differentiable; or ATen's operators alone
        if torch.is_grad_enabled() or is_batched:
            grad_input, grad_weight, grad_bias, grad_residual = reference.differentiable_backward(
                grad,
                input,
                weight,
                mean,
                count,
                ctx.eps,
                lambda tensor: reduce(tensor, ctx.group, ctx.owner, "backward"),
                mask,
                _activation_backward(ctx) if ctx.activation is not None else None,
            )
        else:
            done = None
            if not torch.compiler.is_compiling() and operators.IMPLEMENTATIONS.get(input.device.type) is cuda:
                total = None
                if ctx.group is not None:
                    total = partial(sum_in_place, group=ctx.group, owner=ctx.owner, direction="backward")
                done = cuda_step.backward(
                    grad, input, mean, invstd, scale, bias, kept, ctx.activation, count, ctx.affine_dtype, total,
                    needs_residual, needs_input,
                )  # fmt: skip
            grad_input, affine, grad_residual = done or _backward(
                ctx, grad, input, mean, invstd, scale, bias, kept, count
            )
            grad_bias, grad_weight = affine.unbind()
        return (
            grad_input,
            grad_weight.to(weight.dtype) if needs_weight else None,
            grad_bias.to(ctx.bias_dtype) if needs_bias else None,
            grad_residual.to(input.dtype) if needs_residual else None,
            None,
        )


def _forward(
    input: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None, call: Call
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The output, and mean, inverse standard deviation and count of the global batch."""
    group, owner, record = call.group, call.owner, call.record
    kernels: Any = operators
    if not torch.compiler.is_compiling() and not operators.are_observed(input, weight, bias, residual):
        kernels = operators.IMPLEMENTATIONS.get(input.device.type, operators)

    def over_ranks(local: Tensor) -> Tensor:
        if record is None:
            return reduce(local, group, owner, "forward")
        return sum_and_record(local, lambda payload: reduce(payload, group, owner, "watched forward"), record)

    packed = kernels.moments(input, call.mask)
    packed = over_ranks(packed) if call.recomputation is None else call.recomputation.total(packed, over_ranks)
    dtype = reference.compute_dtype(input.dtype)
    if call.finite_type is None:
        mean, invstd, count = kernels.finish(packed, *call.statistics, dtype)
        if call.pool is not None:
            call.pool.add_(packed)
    else:
        mean, invstd, count = kernels.finish(packed, None, None, None, 0.0, call.statistics.eps, dtype)
        # A recomputation does none of this, so selective checkpointing must not see it.
        with nullcontext() if call.recomputation is None else hidden_from_modes():
            _move_if_finite(packed, call.statistics, call.pool, call.finite_type, kernels)
    output = kernels.normalize(input, mean, invstd, weight, bias, residual, call.activation)
    return output, mean, invstd, count


def _move_if_finite(
    packed: Tensor, statistics: Statistics, pool: Tensor | None, dtype: torch.dtype, kernels: Any
) -> None:
    """Moves running statistics, or the pool, unless count, mean or variance of the batch is not finite in `dtype`.

    A batch that is left out is replaced by one without samples, which moves nothing.
    """
    num_channels = (packed.numel() - 1) // 4
    mean, var = (packed.new_zeros(num_channels, dtype=dtype) for _ in range(2))
    kernels.finish(packed, mean, var, None, 1.0, 0.0, torch.float64)  # momentum 1: they become those of the batch
    is_finite = packed[0].isfinite() & mean.isfinite().all() & var.isfinite().all()
    counted = torch.where(is_finite, packed, 0.0)
    if pool is not None:
        pool.add_(counted)
    else:
        kernels.finish(counted, *statistics, torch.float64)


def _backward(
    ctx: Any,
    grad: Tensor,
    input: Tensor,
    mean: Tensor,
    invstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    kept: Tensor | None,
    count: Tensor,
) -> tuple[Tensor | None, Tensor, Tensor]:
    """The gradients of the input, of bias and weight (2, C), and of the activation's input."""
    needs_input, needs_residual = ctx.needs_input_grad[0], ctx.needs_input_grad[_RESIDUAL]
    kernels: Any = operators
    if not torch.compiler.is_compiling() and not operators.are_observed(grad, input, weight, bias, kept):
        kernels = operators.IMPLEMENTATIONS.get(input.device.type, operators)
    if needs_input and ctx.group is None and ctx.activation is None:
        grad_input, affine = kernels.backward_local(grad, input, mean, invstd, weight, count, ctx.affine_dtype)
        return grad_input, affine, grad
    if ctx.activation is None:
        sums, affine = kernels.backward_reduce(grad, input, mean, invstd, ctx.affine_dtype)
    else:
        sums, affine, grad = kernels.activated_reduce(
            grad, input, mean, invstd, weight, bias, kept, ctx.activation, ctx.affine_dtype
        )
    if not needs_input:
        return None, affine, grad
    sums = reduce(sums, ctx.group, ctx.owner, "backward")
    if ctx.activation is None or needs_residual:
        return kernels.backward_elementwise(grad, input, mean, invstd, weight, sums, count), affine, grad
    # Nothing else needs the gradient of the activation's input: reuse its memory.
    kernels.backward_elementwise_(grad, input, mean, invstd, weight, sums, count)
    return grad, affine, grad


def _from_output(
    ctx: Any,
    output: Tensor,
    weight: Tensor | None,
    mean: Tensor,
    invstd: Tensor,
    bias: Tensor | None,
    index: Tensor | None,
    part: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What the backward pass of a lean layer takes: xhat in place of the input, its mean 0 and invstd 1, the weight."""
    if torch.is_grad_enabled() or (not torch.compiler.is_compiling() and transforms_active()):
        raise RuntimeError(
            'a SyncBatchNorm with memory="lean" keeps no input by which its backward pass could be differentiated or'
            ' batched (create_graph=True, vmap); use memory="default"'
        )
    xhat = lean.restore(output, mean, invstd, weight, bias, ctx.activation, index, part)
    scale = invstd if weight is None else invstd * weight.to(invstd.dtype)
    return xhat, torch.zeros_like(mean), torch.ones_like(invstd), scale


def _activation_backward(ctx: Any) -> Callable[[Tensor, Tensor], Tensor]:
    """The activation's backward pass, as `reference.differentiable_backward` takes it (`activation_backward`)."""
    input, weight, mean, invstd, _, _, bias, kept = ctx.saved_tensors

    def backward(grad: Tensor, xhat: Tensor) -> Tensor:
        if not activations.output_tells(ctx.activation):
            z = xhat if weight is None else xhat * reference.per_channel(weight.to(xhat.dtype), xhat)
            z = z if bias is None else z + reference.per_channel(bias.to(xhat.dtype), xhat)
            z = z if kept is None else z + kept.to(xhat.dtype)
        else:  # only the sign of z is needed, which has no derivative; it must be exactly that of the forward pass
            with torch.no_grad():
                z = operators.normalize(input, mean, invstd, weight, bias) if kept is None else kept
            z = z.detach().to(xhat.dtype)
        return activations.backward(grad, z, ctx.activation)

    return backward


def normalize_by_batch(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    statistics: Statistics,
    group: dist.ProcessGroup | None,
    *,
    mask: Tensor | None = None,
    residual: Tensor | None = None,
    activation: str | None = None,
    owner: nn.Module | None = None,
    pool: Tensor | None = None,
    record: Tensor | None = None,
    is_lean: bool = False,
    skip_nonfinite: bool = False,
) -> Tensor:
    """Normalizes with the statistics of the global batch, as in training, and updates the running statistics.

    A recomputation (activation checkpointing) uses the statistics of the first run and updates nothing. Where a tool
    looks at operators (see `tracing`), ATen's do the work.

    Args:
        group: the ranks whose samples form the batch; None for this process alone.
        mask: (N, 1, ...) bool; positions where it is False are ignored. The input has to be finite there; output and
            input gradient there are meaningless.
        residual: same shape and type as the input, added to the normalized values; not with a mask.
        activation: applied last; not with a mask.
        owner: the layer, named in errors, and by which a recomputation finds its first run.
        pool: (4C+1,) float64 accumulator, to which the batch's packed moments are added instead of updating the running
            statistics.
        record: accumulator of the batch's statistics (see `recorder`); must be given on all ranks or on none.
        is_lean: saves the output for backward instead of the input (see `nn.lean`).
        skip_nonfinite: moves nothing, pool included, if the batch's statistics are not finite in some channel.

    Raises:
        ValueError: a single value per channel in a process that is not part of a job: the variance is undefined. (In a
            job, even of one rank, the output is then the bias, as the last batch of an epoch may be a single sample.)
        RuntimeError: `torch.export`, `torch.jit.trace` or a transform of `torch.func` around a sum over ranks.
    """
    running_mean = statistics.running_mean
    if is_traced(input, weight, bias, residual):
        if group is not None:
            refuse_group(group.size())
        if pool is not None or record is not None:
            refuse_context()
        return normalize_by_local_batch(
            input, weight, bias, statistics, mask, residual, activation, skip_nonfinite and running_mean is not None
        )
    if mask is None and input.numel() == input.size(1) > 0 and not is_distributed():
        raise ValueError(f"Expected more than 1 value per channel when training, got input size {input.size()}")
    recomputation = None
    if torch.compiler.is_compiling():
        owner = None
        if torch.compiler.is_dynamo_compiling():
            refuse_checkpoint_around_compiled()
    else:
        recomputation = Recomputation.of(owner if owner is not None else running_mean)
    is_second = recomputation is not None and recomputation.is_second
    finite_type = running_mean.dtype if skip_nonfinite and running_mean is not None and not is_second else None
    if pool is not None or is_second:
        statistics = Statistics(None, None, None, statistics.momentum, statistics.eps)
    if is_second:
        pool = None
    is_lean = is_lean and torch.is_grad_enabled()  # else nothing is saved, and weights need no check
    is_plain = not torch.compiler.is_compiling() and mask is pool is recomputation is record is finite_type is None
    call = Call(statistics, group, mask, pool, owner, recomputation, record, activation, is_lean, finite_type, is_plain)
    return NormalizeByBatch.apply(input, weight, bias, residual, call)


def normalize_by_running(
    input: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    residual: Tensor | None = None,
    activation: str | None = None,
) -> Tensor:
    """Normalizes with the running statistics, as in evaluation or with frozen statistics; no communication.

    Computes (x - running_mean) * scale + bias, never x * scale + shift, which cancels where |mean| >> std. The residual
    (same shape and type as the input) and the activation are applied in place to the result. Only ATen operators are
    called, so that an exported program has no custom operators. No activation is saved for backward unless `weight`
    needs a gradient.
    """
    dtype = reference.compute_dtype(input.dtype)
    scale = (running_var.to(dtype) + eps).rsqrt()
    if weight is not None:
        scale = scale * weight.to(dtype)
    centred = input.to(dtype) - reference.per_channel(running_mean.to(dtype), input)
    if bias is None:
        output = centred * reference.per_channel(scale, input)
    else:
        shift = reference.per_channel(bias.to(dtype), input)
        output = torch.addcmul(shift, centred, reference.per_channel(scale, input))
    output = output.to(input.dtype)
    if not torch.compiler.is_compiling() and transforms_active():
        return add_and_activate(output, residual, activation)
    return activations.apply_in_place(output, residual, activation)


def sync_batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    process_group: dist.ProcessGroup | None = None,
) -> Tensor:
    """`torch.nn.functional.batch_norm` over the samples of all ranks.

    In training, normalizes with mean and (biased) variance of the concatenated batches of all ranks of `process_group`
    (default: all ranks of the job), and updates the running statistics in place:
    new = (1 - momentum) * old + momentum * batch, with the variance unbiased by the global count. Otherwise normalizes
    with the running statistics and communicates nothing.

    Communication: one all-reduce of 4C+1 float64 numbers forward, one of 2C backward; none in a world of one. Every
    rank has to call it; batch and spatial sizes may differ between ranks, and a rank may have no samples.

    Args:
        input: (N, C, ...), at least two dimensions, any floating type and memory format; the output keeps both.
        running_mean: (C,), or None together with `running_var`.
        running_var: (C,), or None together with `running_mean`.
        weight: (C,) or None for 1.
        bias: (C,) or None for 0.

    Raises:
        ValueError: fewer than two dimensions; eps not above 0; one value per channel in a single process; one of the
            running statistics without the other; not training, and no running statistics.
        RuntimeError: a per-channel argument that is not of length C; this rank is outside `process_group`.

    Example:
        >>> import torch
        >>> x = torch.randn(4, 3, 8, 8)
        >>> y = sync_batch_norm(x, None, None, training=True)
        >>> torch.allclose(y.mean((0, 2, 3)), torch.zeros(3), atol=1e-6)
        True
    """
    statistics = Statistics(running_mean, running_var, None, momentum, eps)
    check_arguments(input, statistics, weight, bias, training)
    if training:
        return normalize_by_batch(input, weight, bias, statistics, collective_group(process_group))
    if running_mean is None or running_var is None:
        raise ValueError("Expected running_mean and running_var when training=False, got None")
    return normalize_by_running(input, running_mean, running_var, weight, bias, eps)


def as_mask(mask: Tensor, input: Tensor) -> Tensor:
    """The mask as bool.

    Raises:
        ValueError: it does not broadcast to the input, or has more than one channel.
    """
    fits = mask.dim() == input.dim() and all(
        size in (1, wanted) for size, wanted in zip(mask.shape, (input.size(0), 1, *input.shape[2:]), strict=True)
    )
    if not fits:
        wanted = (input.size(0), 1, *input.shape[2:])
        raise ValueError(
            f"mask: expected a shape that broadcasts to {wanted}, one channel for all, got {tuple(mask.shape)}"
        )
    return mask if mask.dtype == torch.bool else mask != 0


def check_arguments(
    input: Tensor, statistics: Statistics, weight: Tensor | None, bias: Tensor | None, training: bool
) -> None:
    """Validates the arguments before any rank communicates.

    Raises:
        ValueError: a bad eps; fewer than two dimensions; one of the running statistics without the other.
        RuntimeError: an input that is not of floating type; a per-channel vector that is not of length C.
    """
    running_mean, running_var, _, _, eps = statistics
    if eps < 0 or (training and eps == 0):
        kind = "positive during training" if training else "non-negative"
        raise ValueError(f"batch_norm eps must be {kind}, but got {eps}")
    if input.dim() < 2:
        raise ValueError(f"expected at least 2D input (N, C, ...), got {input.dim()}D input")
    if not input.is_floating_point():
        raise RuntimeError(f"expected an input of floating type, got {input.dtype}")
    if (running_mean is None) != (running_var is None):
        raise ValueError("Expected running_mean and running_var both or neither, got one of them")
    named = {"running_mean": running_mean, "running_var": running_var, "weight": weight, "bias": bias}
    for name, vector in named.items():
        if vector is not None and (vector.dim() != 1 or vector.numel() != input.size(1)):
            raise RuntimeError(
                f"{name} should contain {input.size(1)} elements not {vector.numel()}: the input of shape"
                f" {tuple(input.shape)} has {input.size(1)} channels, {name} has shape {tuple(vector.shape)}"
            )
