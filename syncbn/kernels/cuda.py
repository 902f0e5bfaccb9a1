"""CUDA implementation of the operators, by the Triton kernels of `triton/`.

Forward: one read of the activation for the moments; a small kernel that combines partial sums (skipped if one program
covers a whole channel); a small kernel for the global statistics; one read and one write of the activation to
normalize. Backward: two reads (gradient and input) for the sums; the combining kernel; two reads and one write for the
input's gradient. The host never waits for the device, because launches depend on sizes only.

Triton comes with torch's CUDA builds for Linux. Where it is missing, or the device is too old for it, the reference
runs instead, with a warning: its results are right, but it is slow. The reference also handles masks, and types that
the kernels do not support. (Longer than other files: it has the host's side of every operator.)
"""

import math
import warnings
from functools import cache
from types import ModuleType

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from syncbn.kernels import reference
from syncbn.kernels.triton.launch_plan import WARPS, LaunchOptions, Layout, ceil_div, plan_passes, plan_sums

TYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

_FINISH_BLOCK = 256
# Of `finish`, by whether the statistics are a cumulative average.
FINISH = [
    LaunchOptions(
        {"CUMULATIVE": cumulative, "BLOCK_CHANNELS": _FINISH_BLOCK, "num_warps": WARPS, "enable_fp_fusion": False}
    )
    for cumulative in (False, True)
]


def moments(input: Tensor, mask: Tensor | None = None) -> Tensor:
    """See `reference.moments`; inputs with a mask are handled by the reference."""
    programs = programs_for(input)
    if mask is not None or programs is None or input.numel() == 0:
        return reference.moments(input, mask)
    input, layout = as_dense(input)
    plan = plan_sums(layout, input.dtype.itemsize, multiprocessors(input.device))
    num_channels = layout.channels
    count = input.numel() // num_channels
    packed = input.new_empty(4 * num_channels + 1, dtype=torch.float64)
    splits = plan.grid[1]
    partial = input.new_empty((splits, 2, num_channels), dtype=torch.float64) if splits > 1 else packed
    programs.launch(programs.moments, plan.grid, (input, partial, packed), (count, *plan.sizes), plan.moments)
    if splits > 1:
        scalars = (count, num_channels, splits, 1 if layout.last else layout.size)
        tensors = (input, partial, packed)
        programs.launch(programs.combine_moments, plan.combine_grid, tensors, scalars, plan.combine_moments)
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
    """See `reference.finish`."""
    programs = programs_for(packed)
    buffers = [buffer for buffer in (running_mean, running_var) if buffer is not None]
    if programs is None or not all(buffer.is_contiguous() and buffer.dtype in TYPES for buffer in buffers):
        return reference.finish(packed, running_mean, running_var, num_batches_tracked, momentum, eps, dtype)
    num_channels = (packed.numel() - 1) // 4
    mean = packed.new_empty((2, num_channels), dtype=dtype)
    invstd = packed.new_empty(num_channels, dtype=dtype)
    count = packed.new_empty(())
    is_cumulative = momentum is None and num_batches_tracked is not None
    grid = (1, 1, 1) if is_cumulative else finish_grid(num_channels)
    tensors = (packed, running_mean, running_var, num_batches_tracked, mean, invstd, count)
    scalars = (0.0 if momentum is None else float(momentum), float(eps), num_channels)
    programs.launch(programs.finish, grid, tensors, scalars, FINISH[is_cumulative])
    mark_as_written(running_mean, running_var, num_batches_tracked)
    return mean, invstd, count


def finish_grid(num_channels: int) -> tuple[int, int, int]:
    """Launch grid of the program `finish`, unless the statistics are a cumulative average."""
    return max(1, ceil_div(num_channels, _FINISH_BLOCK)), 1, 1


def mark_as_written(
    running_mean: Tensor | None, running_var: Tensor | None, num_batches_tracked: Tensor | None
) -> None:
    """Tells autograd that a kernel has written running statistics, so that a graph that has saved them raises."""
    for buffer in (running_mean, running_var, num_batches_tracked):
        if buffer is not None and not buffer.is_inference():
            increment_version(buffer)


def normalize(
    input: Tensor,
    mean: Tensor,
    invstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None = None,
    activation: str | None = None,
) -> Tensor:
    """See `reference.normalize`."""
    programs = programs_for(input)
    if programs is None:
        return reference.normalize(input, mean, invstd, weight, bias, residual, activation)
    output = torch.empty_like(input)
    if input.numel() == 0:
        return output
    dense, layout = as_dense(input)
    target = output if _same_layout(output, dense) else torch.empty_like(dense)
    plan = plan_passes(layout, input.dtype.itemsize, multiprocessors(input.device))
    vectors = (mean.contiguous(), invstd.contiguous(), _dense_vector(weight), _dense_vector(bias))
    added = None if residual is None else _like(residual, dense)
    tensors = (dense, target, *vectors, added)
    programs.launch(programs.normalize, plan.grid, tensors, plan.sizes, plan.normalize[activation])
    return output if target is output else output.copy_(target)


def backward_reduce(
    grad: Tensor, input: Tensor, mean: Tensor, invstd: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """See `reference.backward_reduce`."""
    programs = programs_for(input)
    if programs is None or dtype not in TYPES or grad.dtype not in TYPES:
        return reference.backward_reduce(grad, input, mean, invstd, dtype)
    sums, affine, _ = _reduce(programs, grad, input, mean, invstd, None, None, None, None, dtype)
    return sums, affine


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
    programs = programs_for(input)
    if programs is None or dtype not in TYPES or grad.dtype not in TYPES:
        return reference.activated_reduce(grad, input, mean, invstd, weight, bias, kept, activation, dtype)
    return _reduce(programs, grad, input, mean, invstd, weight, bias, kept, activation, dtype)


def _reduce(
    programs: ModuleType,
    grad: Tensor,
    input: Tensor,
    mean: Tensor,
    invstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    kept: Tensor | None,
    activation: str | None,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """`reference.activated_reduce`; with `activation=None`, `reference.backward_reduce` and the gradient itself."""
    num_channels = input.size(1)
    if input.numel() == 0:
        sums = input.new_zeros(2 * num_channels, dtype=torch.float64)
        return sums, input.new_zeros((2, num_channels), dtype=dtype), torch.empty_like(input)
    dense, layout = as_dense(input)
    grad = _like(grad, dense)
    plan = plan_sums(layout, dense.dtype.itemsize, multiprocessors(dense.device))
    sums = dense.new_empty(2 * num_channels, dtype=torch.float64)
    affine = dense.new_empty((2, num_channels), dtype=dtype)
    splits = plan.grid[1]
    partial = dense.new_empty((splits, 2, num_channels), dtype=torch.float64) if splits > 1 else sums
    grad_z = grad if activation is None else torch.empty_like(dense)
    vectors = (mean.contiguous(), invstd.contiguous(), _dense_vector(weight), _dense_vector(bias))
    kept = None if kept is None else _like(kept, dense)
    written = None if activation is None else grad_z
    tensors: tuple[Tensor | None, ...] = (grad, dense, *vectors, kept, written, partial, sums, affine)
    programs.launch(programs.backward_sums, plan.grid, tensors, plan.sizes, plan.backward_sums[activation])
    if splits > 1:
        tensors = (partial, vectors[1], sums, affine)
        programs.launch(
            programs.combine_backward_sums,
            plan.combine_grid,
            tensors,
            (num_channels, splits),
            plan.combine_backward_sums,
        )
    if activation is not None and dense is not input:
        grad_z = torch.empty_like(input).copy_(grad_z)
    return sums, affine, grad_z


def backward_elementwise(
    grad: Tensor, input: Tensor, mean: Tensor, invstd: Tensor, weight: Tensor | None, sums: Tensor, count: Tensor
) -> Tensor:
    """See `reference.backward_elementwise`."""
    output = torch.empty_like(input)
    _write_gradient(output, grad, input, mean, invstd, weight, sums, count)
    return output


def backward_elementwise_(
    grad: Tensor, input: Tensor, mean: Tensor, invstd: Tensor, weight: Tensor | None, sums: Tensor, count: Tensor
) -> None:
    """See `reference.backward_elementwise_`."""
    _write_gradient(grad, grad, input, mean, invstd, weight, sums, count)


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
    """Writes the input's gradient to `output`, which may be `grad` itself: each value is read before it is written."""
    programs = programs_for(input)
    if programs is None or grad.dtype not in TYPES:
        output.copy_(reference.backward_elementwise(grad, input, mean, invstd, weight, sums, count))
        return
    if input.numel() == 0:
        return
    dense, layout = as_dense(input)
    target = output if _same_layout(output, dense) else torch.empty_like(dense)
    plan = plan_passes(layout, input.dtype.itemsize, multiprocessors(input.device))
    vectors = (mean.contiguous(), invstd.contiguous(), _dense_vector(weight), sums.contiguous(), count)
    tensors = (_like(grad, dense), dense, target, *vectors)
    programs.launch(programs.backward_elementwise, plan.grid, tensors, plan.sizes, plan.backward_elementwise)
    if target is not output:
        output.copy_(target)


def backward_local(
    grad: Tensor, input: Tensor, mean: Tensor, invstd: Tensor, weight: Tensor | None, count: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """See `reference.backward_local`."""
    sums, affine = backward_reduce(grad, input, mean, invstd, dtype)
    return backward_elementwise(grad, input, mean, invstd, weight, sums, count), affine


def programs_for(tensor: Tensor) -> ModuleType | None:
    """The module of Triton kernels, or None if they cannot run on this tensor."""
    if tensor.dtype not in TYPES or not _device_is_new_enough(tensor.device):
        return None
    return _import_programs()


@cache
def _import_programs() -> ModuleType | None:
    try:
        from syncbn.kernels.triton import programs
    except ImportError as error:
        warnings.warn(
            f"syncbn: Triton cannot be imported ({error}); batch normalization on CUDA falls back to plain tensor code,"
            " which is right but slow and takes memory. Triton comes with torch's CUDA builds for Linux.",
            RuntimeWarning,
            stacklevel=2,
        )
        return None
    return programs


@cache
def _device_is_new_enough(device: torch.device) -> bool:
    """Whether the compute capability is at least 7.0, as Triton needs. True on CPU, where tests run its interpreter."""
    if device.type != "cuda" or torch.version.hip or torch.cuda.get_device_capability(device) >= (7, 0):
        return True
    warnings.warn(
        f"syncbn: {torch.cuda.get_device_name(device)} is too old for Triton; batch normalization there falls back to"
        " plain tensor code, which is right but slow and takes memory.",
        RuntimeWarning,
        stacklevel=2,
    )
    return False


@cache
def multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def as_dense(input: Tensor) -> tuple[Tensor, Layout]:
    """The input in one of the two layouts of the kernels, and the description of that layout.

    An input in neither layout, such as a slice of channels of a channels_last tensor, is copied.
    """
    if not (input.is_contiguous() or _is_rows(input)):
        input = torch.empty_like(input).copy_(input)
        if not _is_rows(input):
            input = input.contiguous()
    num_channels = input.size(1)
    size = math.prod(input.shape[2:])
    if not input.is_contiguous():
        return input, Layout(input.size(0) * size, num_channels, num_channels, True)
    if num_channels == 1:  # one plane, however many samples
        return input, Layout(1, 1, input.numel(), False)
    if size == 1:
        return input, Layout(input.size(0), num_channels, num_channels, True)
    return input, Layout(input.size(0), num_channels, size, False)


def _is_rows(input: Tensor) -> bool:
    return input.permute(0, *range(2, input.dim()), 1).is_contiguous()


def _same_layout(one: Tensor, other: Tensor) -> bool:
    """Whether tensors of one shape have the same strides, except in dimensions of size 1, where they are arbitrary."""
    return one.stride() == other.stride() or all(
        a == b for a, b, size in zip(one.stride(), other.stride(), one.shape, strict=True) if size > 1
    )


def _like(grad: Tensor, input: Tensor) -> Tensor:
    """`grad` in the layout of `input`, copied if it differs."""
    return grad if _same_layout(grad, input) else torch.empty_like(input, dtype=grad.dtype).copy_(grad)


def _dense_vector(vector: Tensor | None) -> Tensor | None:
    return None if vector is None else vector.contiguous()
