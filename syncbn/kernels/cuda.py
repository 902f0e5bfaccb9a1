"""The operators on CUDA, by the Triton programs of `triton/`.

Forward: one read for the moments and a small program that adds them up (left out where one program has a whole
channel), one for the global statistics, one read and one write to normalize. Backward: two reads for the sums and a
small program that adds them up, two reads and one write for the gradient. Nothing waits for the device: what the host
needs to know are sizes.

Triton comes with torch's CUDA builds for Linux. Where it is missing, or the device is too old for it, the reference
runs instead, with a warning: right, and slow. The reference also takes masks and types that no program knows.
"""

import math
import warnings
from functools import cache, lru_cache
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from syncbn.kernels import reference

_TYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

# Values of a tile: of a pass that sums, of one that writes, and of one that writes a small activation (of which large
# tiles are too few to keep all multiprocessors busy). Chosen by what fits into registers; nobody has timed them yet.
_SUM_TILE, _TILE, _SMALL_TILE = 2048, 2048, 512
# Warps of the programs that sum (float64 sums take two registers each), and of those that write.
_SUM_WARPS, _WARPS = 8, 4
# The widest tile: in planes it runs along a plane; in rows over channels, few, so that it has rows to add up.
_WIDEST_PLANE, _WIDEST_ROW = 1024, 64
# Where small planes are written, most rows of a tile that has not few values anyway: each row brings a channel of its
# own, whose vectors take registers.
_MOST_PLANES = 16
# Programs that sum, for each multiprocessor; and tiles that are worth a program.
_PROGRAMS_PER_PROCESSOR, _TILES_PER_PROGRAM = 4, 4
# Of the programs that add up parts of sums: channels at a time, and numbers at a time.
_COMBINED_CHANNELS, _COMBINED_NUMBERS = 8, 4096
_FINISH_BLOCK = 256


class _Layout(NamedTuple):
    """How a dense activation lies in memory: `planes` of `size` values for each channel, or (`last`) rows of channels.

    In rows, `planes` is their number and `size` that of the channels.
    """

    planes: int
    channels: int
    size: int
    last: bool


class _Sums(NamedTuple):
    """How the programs that sum are laid out."""

    grid: tuple[int, int]
    sizes: tuple[int, ...]  # num_channels, planes, units, tiles, tiles_across, tiles_per_split
    blocks: dict[str, int | bool]
    combine: dict[str, int]


class _Passes(NamedTuple):
    """How the programs that write are laid out."""

    grid: tuple[int]
    sizes: tuple[int, ...]  # num_channels, rows, units, tiles_across
    blocks: dict[str, int | bool]


def moments(input: Tensor, mask: Tensor | None = None) -> Tensor:
    """See `reference.moments`; masks take the reference's way."""
    programs = _programs(input)
    if mask is not None or programs is None or input.numel() == 0:
        return reference.moments(input, mask)
    input, layout = _dense(input)
    plan = _plan_sums(layout, input.dtype.itemsize, _multiprocessors(input.device))
    num_channels = layout.channels
    count = input.numel() // num_channels
    packed = input.new_empty(4 * num_channels + 1, dtype=torch.float64)
    splits = plan.grid[1]
    partial = input.new_empty((splits, 2, num_channels), dtype=torch.float64) if splits > 1 else packed
    with torch.cuda.device_of(input):
        programs.moments[plan.grid](input, partial, packed, count, *plan.sizes, **plan.blocks)
        if splits > 1:
            stride = 1 if layout.last else layout.size
            grid = (_ceil_div(num_channels, _COMBINED_CHANNELS),)
            programs.combine_moments[grid](input, partial, packed, count, num_channels, splits, stride, **plan.combine)
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
    programs = _programs(packed)
    buffers = [buffer for buffer in (running_mean, running_var) if buffer is not None]
    if programs is None or not all(buffer.is_contiguous() and buffer.dtype in _TYPES for buffer in buffers):
        return reference.finish(packed, running_mean, running_var, num_batches_tracked, momentum, eps, dtype)
    num_channels = (packed.numel() - 1) // 4
    mean = packed.new_empty((2, num_channels), dtype=dtype)
    invstd = packed.new_empty(num_channels, dtype=dtype)
    count = packed.new_empty(())
    is_cumulative = momentum is None and num_batches_tracked is not None
    num_programs = 1 if is_cumulative else max(1, _ceil_div(num_channels, _FINISH_BLOCK))
    with torch.cuda.device_of(packed):
        programs.finish[(num_programs,)](
            packed, running_mean, running_var, num_batches_tracked, mean, invstd, count,
            0.0 if momentum is None else float(momentum), float(eps), num_channels,
            CUMULATIVE=is_cumulative, BLOCK=_FINISH_BLOCK, num_warps=_WARPS, enable_fp_fusion=False,
        )  # fmt: skip
    return mean, invstd, count


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
    programs = _programs(input)
    if programs is None:
        return reference.normalize(input, mean, invstd, weight, bias, residual, activation)
    output = torch.empty_like(input)
    if input.numel() == 0:
        return output
    dense, layout = _dense(input)
    target = output if _same_layout(output, dense) else torch.empty_like(dense)
    plan = _plan_passes(layout, input.dtype.itemsize, _multiprocessors(input.device))
    vectors = (mean.contiguous(), invstd.contiguous(), _dense_vector(weight), _dense_vector(bias))
    added = None if residual is None else _like(residual, dense)
    with torch.cuda.device_of(input):
        programs.normalize[plan.grid](
            dense, target, *vectors, added, *plan.sizes, ACTIVATION=activation, **plan.blocks
        )  # fmt: skip
    return output if target is output else output.copy_(target)


def backward_reduce(
    grad: Tensor, input: Tensor, mean: Tensor, invstd: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """See `reference.backward_reduce`."""
    programs = _programs(input)
    if programs is None or dtype not in _TYPES or grad.dtype not in _TYPES:
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
    programs = _programs(input)
    if programs is None or dtype not in _TYPES or grad.dtype not in _TYPES:
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
    """The sums of the gradient, which goes through the activation first if there is one, and that gradient."""
    num_channels = input.size(1)
    if input.numel() == 0:
        sums = input.new_zeros(2 * num_channels, dtype=torch.float64)
        return sums, input.new_zeros((2, num_channels), dtype=dtype), torch.empty_like(input)
    dense, layout = _dense(input)
    grad = _like(grad, dense)
    plan = _plan_sums(layout, dense.dtype.itemsize, _multiprocessors(dense.device))
    sums = dense.new_empty(2 * num_channels, dtype=torch.float64)
    affine = dense.new_empty((2, num_channels), dtype=dtype)
    splits = plan.grid[1]
    partial = dense.new_empty((splits, 2, num_channels), dtype=torch.float64) if splits > 1 else sums
    through = grad if activation is None else torch.empty_like(dense)
    vectors = (mean.contiguous(), invstd.contiguous(), _dense_vector(weight), _dense_vector(bias))
    kept = None if kept is None else _like(kept, dense)
    written = None if activation is None else through
    with torch.cuda.device_of(dense):
        programs.backward_sums[plan.grid](
            grad, dense, *vectors, kept, written, partial, sums, affine, *plan.sizes, ACTIVATION=activation,
            **plan.blocks,
        )  # fmt: skip
        if splits > 1:
            grid = (_ceil_div(num_channels, _COMBINED_CHANNELS),)
            programs.combine_backward_sums[grid](
                partial, vectors[1], sums, affine, num_channels, splits, **plan.combine
            )  # fmt: skip
    if activation is not None and dense is not input:
        through = torch.empty_like(input).copy_(through)
    return sums, affine, through


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
    """The gradient of the input to `output`, which may be `grad`: each value is read before it is written."""
    programs = _programs(input)
    if programs is None or grad.dtype not in _TYPES:
        output.copy_(reference.backward_elementwise(grad, input, mean, invstd, weight, sums, count))
        return
    if input.numel() == 0:
        return
    dense, layout = _dense(input)
    target = output if _same_layout(output, dense) else torch.empty_like(dense)
    plan = _plan_passes(layout, input.dtype.itemsize, _multiprocessors(input.device))
    vectors = (mean.contiguous(), invstd.contiguous(), _dense_vector(weight), sums.contiguous(), count)
    with torch.cuda.device_of(input):
        programs.backward_elementwise[plan.grid](
            _like(grad, dense), dense, target, *vectors, *plan.sizes, **plan.blocks
        )  # fmt: skip
    if target is not output:
        output.copy_(target)


def backward_local(
    grad: Tensor, input: Tensor, mean: Tensor, invstd: Tensor, weight: Tensor | None, count: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """See `reference.backward_local`."""
    sums, affine = backward_reduce(grad, input, mean, invstd, dtype)
    return backward_elementwise(grad, input, mean, invstd, weight, sums, count), affine


def _programs(tensor: Tensor) -> ModuleType | None:
    """The Triton programs, or None where they cannot run on this tensor."""
    if tensor.dtype not in _TYPES or not _device_is_new_enough(tensor.device):
        return None
    return _import_programs()


@cache
def _import_programs() -> ModuleType | None:
    try:
        from syncbn.kernels.triton import reductions as programs
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
    """Triton needs compute capability 7.0. (On the CPU its interpreter runs, in tests.)"""
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
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def _dense(input: Tensor) -> tuple[Tensor, _Layout]:
    """The input, or a copy where it is in neither layout: channels of a channels_last tensor, say, in channels_last."""
    if not (input.is_contiguous() or _is_rows(input)):
        input = torch.empty_like(input).copy_(input)
        if not _is_rows(input):
            input = input.contiguous()
    num_channels = input.size(1)
    size = math.prod(input.shape[2:])
    if not input.is_contiguous():
        return input, _Layout(input.size(0) * size, num_channels, num_channels, True)
    if num_channels == 1:  # one plane, however many samples
        return input, _Layout(1, 1, input.numel(), False)
    if size == 1:
        return input, _Layout(input.size(0), num_channels, num_channels, True)
    return input, _Layout(input.size(0), num_channels, size, False)


def _is_rows(input: Tensor) -> bool:
    return input.permute(0, *range(2, input.dim()), 1).is_contiguous()


def _same_layout(one: Tensor, other: Tensor) -> bool:
    """Of tensors of one shape. Where a dimension has one index, its stride means nothing."""
    return one.stride() == other.stride() or all(
        a == b for a, b, size in zip(one.stride(), other.stride(), one.shape, strict=True) if size > 1
    )


def _like(grad: Tensor, input: Tensor) -> Tensor:
    """The gradient in the layout of the input."""
    return grad if _same_layout(grad, input) else torch.empty_like(input, dtype=grad.dtype).copy_(grad)


def _dense_vector(vector: Tensor | None) -> Tensor | None:
    return None if vector is None else vector.contiguous()


@lru_cache(maxsize=4096)
def _plan_sums(layout: _Layout, itemsize: int, multiprocessors: int) -> _Sums:
    """Tiles of the programs that sum, and over how many of them a channel is split."""
    width, height = _block(layout, _SUM_TILE)
    height = min(height, _power_of_two(layout.planes))
    tiles_across = 1 if layout.last else _ceil_div(layout.size, width)
    tiles = _ceil_div(layout.planes, height) * tiles_across
    programs = _ceil_div(layout.channels, width) if layout.last else layout.channels
    wanted = _ceil_div(_PROGRAMS_PER_PROCESSOR * multiprocessors, programs)
    splits = max(1, min(wanted, tiles // _TILES_PER_PROGRAM))
    per_split = _ceil_div(tiles, splits)
    splits = _ceil_div(tiles, per_split)
    unit = _unit(layout.size, itemsize)
    options = {"num_warps": _SUM_WARPS, "enable_fp_fusion": False}
    at_a_time = min(_power_of_two(splits), _COMBINED_NUMBERS // _COMBINED_CHANNELS)
    return _Sums(
        (programs, splits),
        (layout.channels, layout.planes, layout.size // unit, tiles, tiles_across, per_split),
        {**_common(layout, unit, height, width), "ALONE": splits == 1, **options},
        {"K": at_a_time, "BLOCK": _COMBINED_CHANNELS, **options},
    )


@lru_cache(maxsize=4096)
def _plan_passes(layout: _Layout, itemsize: int, multiprocessors: int) -> _Passes:
    """Tiles of the programs that write."""
    rows = layout.planes if layout.last else layout.planes * layout.channels
    is_small = rows * layout.size < 4 * _TILE * multiprocessors
    width, height = _block(layout, _SMALL_TILE if is_small else _TILE)
    if not layout.last:
        height = min(height, max(_MOST_PLANES, _SMALL_TILE // width))
    tiles_across = _ceil_div(layout.size, width)
    unit = _unit(layout.size, itemsize)
    return _Passes(
        (_ceil_div(rows, height) * tiles_across,),
        (layout.channels, rows, layout.size // unit, tiles_across),
        {**_common(layout, unit, height, width), "num_warps": _WARPS, "enable_fp_fusion": False},
    )


def _block(layout: _Layout, tile: int) -> tuple[int, int]:
    """Columns and rows of a tile of so many values."""
    width = min(_power_of_two(layout.size), _WIDEST_ROW if layout.last else _WIDEST_PLANE, tile)
    return width, tile // width


def _common(layout: _Layout, unit: int, height: int, width: int) -> dict[str, int | bool]:
    rows = layout.planes if layout.last else layout.planes * layout.channels
    # A tile may begin inside of the activation and end behind it.
    needs_wide = (rows + height) * (layout.size + width) >= 2**31
    return {"LAST": layout.last, "UNIT": unit, "R": height, "W": width, "WIDE": needs_wide}


def _unit(size: int, itemsize: int) -> int:
    """The largest power of two that divides a row, up to the 16 bytes of the widest load."""
    return math.gcd(size, 16 // itemsize)


def _power_of_two(number: int) -> int:
    """The next one, not below the number."""
    return 1 << max(0, number - 1).bit_length()


def _ceil_div(a: int, b: int) -> int:
    return -(-a // b)
