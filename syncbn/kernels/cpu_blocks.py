"""Cache-sized blocks of an activation for the CPU operators, and per-channel sums computed by ATen's kernels.

`native_batch_norm_backward` in evaluation mode computes sum(g) and sum(g * (x - mean)) of a channel in one vectorized
read, accumulating in the compute type. `pair_sums` cuts each channel into short pieces and adds the pieces in float64:
float32 sums then have an error near 1e-7.
"""

import math
from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from syncbn.torch_compat import hidden_from_modes

# Contiguous layout: the most values that are added up before float64 takes over. The rounding errors of such pieces
# average out over a channel.
PIECE = 256
# channels_last: the most values per accumulator (rows), and how many accumulators lie side by side (columns).
ROWS, _COLUMNS = 256, 1024
# Values of a block, chosen so that temporaries of this size stay in the cache.
_BLOCK = 2**18

_aten = torch.ops.aten


@lru_cache(maxsize=256)
def constants(size: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """`size` zeros and ones, kept because small activations feel every operator; nobody writes to them."""
    with hidden_from_modes(), torch.inference_mode(False):
        return torch.zeros(size, dtype=dtype, device="cpu"), torch.ones(size, dtype=dtype, device="cpu")


def pieces_of(input: Tensor) -> int:
    """Number of equal pieces, of at most PIECE values each, into which a plane of the contiguous layout is cut.

    Where the size of a plane has no suitable divisor: 1 for a plane of up to 32 * PIECE values, 0 (not supported) for a
    larger one.
    """
    size = plane_size(input)
    fewest = -(-size // PIECE)
    found = next((number for number in range(fewest, min(size, 64 * fewest) + 1) if size % number == 0), 0)
    return found if found or size > 32 * PIECE else 1


def plane_size(input: Tensor) -> int:
    """Number of values of one channel of one sample."""
    return math.prod(input.shape[2:])


class Blocks:
    """Cuts tensors of one shape and layout into dense blocks that stay in the cache, and per-channel vectors to match.

    In the contiguous layout a block is (samples, pieces, values): pieces of planes take the place of channels, because
    sums over short pieces are accurate enough. In channels_last a block is (positions, channels). A small activation is
    a single block and is not reshaped, because there the number of operator calls decides the time.
    """

    def __init__(self, input: Tensor) -> None:
        self._is_one = input.numel() <= _BLOCK
        if self._is_one:
            return
        self._channels = input.size(1)
        self._order: list[int] | None = None
        if input.is_contiguous() and input.dim() > 2:
            self._pieces = pieces_of(input)
            self._columns, self._size = self._channels * self._pieces, plane_size(input) // self._pieces
            self._rows = input.size(0)
            self._wide = min(self._columns, max(1, _BLOCK // self._size))
        else:
            self._order = [0, *range(2, input.dim()), 1]
            self._pieces, self._size = 1, 1
            self._columns = self._wide = self._channels
            self._rows = input.numel() // self._channels
        self._deep = max(1, _BLOCK // (self._columns * self._size))

    def cut(self, tensor: Tensor) -> Sequence[Tensor]:
        """The blocks of a tensor that has the shape and strides of the input."""
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
        """The values of a per-channel (C,) vector that belong to each block, in the order of `cut`."""
        if self._is_one:
            return (vector,)
        if self._pieces > 1:
            vector = vector.repeat_interleave(self._pieces)
        return vector.split(self._wide) * -(-self._rows // self._deep)

    def sums(self, grad: Tensor, input: Tensor, mean: Tensor) -> Tensor:
        """`pair_sums` of one block; per piece, not per channel, in the contiguous layout with several blocks."""
        if self._is_one or self._order is not None:
            return pair_sums(grad, input, mean)
        return torch.stack(native_sums(grad, input, mean))

    def total(self, parts: list[Tensor]) -> Tensor:
        """(2, C) float64: the results of `sums` for all blocks, in their order, added up per channel."""
        if self._is_one:
            return parts[0]
        across = -(-self._columns // self._wide)
        columns = [torch.stack(parts[number::across]).sum(0, dtype=torch.float64) for number in range(across)]
        return torch.cat(columns, 1).view(2, self._channels, self._pieces).sum(2)


def pair_sums(grad: Tensor, input: Tensor, mean: Tensor | None) -> Tensor:
    """sum(grad) and sum(grad * (input - mean)) per channel, (2, C) float64.

    Both tensors are dense and in the same layout; `mean` is in the compute type, None for 0.
    """
    num_channels = input.size(1)
    if input.is_contiguous() and input.dim() > 2:
        pieces = pieces_of(input)
        if pieces == 1:
            return torch.stack(native_sums(grad, input, mean)).to(torch.float64)
        shape = (input.size(0), num_channels * pieces, plane_size(input) // pieces)
        mean = None if mean is None else mean.repeat_interleave(pieces)
        pair = native_sums(grad.view(shape), input.view(shape), mean)
        return torch.stack(pair).view(2, num_channels, pieces).sum(2, dtype=torch.float64)
    # Every row holds all channels. Several rows are joined into one longer row, whose accumulators still fit into the
    # nearest cache. Where one row is already that long, a channel still gets up to 8 accumulators of 16 values or more:
    # many short sums are more accurate than few long ones.
    order = [0, *range(2, input.dim()), 1]
    rows = input.permute(order).reshape(-1, num_channels)
    grad_rows = rows if grad is input else grad.permute(order).reshape(-1, num_channels)
    num_rows = rows.size(0)
    width = min(num_rows, max(1, _COLUMNS // num_channels, min(8, num_rows // 16)))
    whole = num_rows // width * width
    long_mean = mean.repeat(width) if mean is not None and width > 1 else mean
    blocks = [
        torch.stack(native_sums(long_grad, long, long_mean))
        for long_grad, long in zip(*(_long_rows(tensor, whole, width) for tensor in (grad_rows, rows)), strict=True)
    ]
    every = blocks[0] if len(blocks) == 1 else torch.cat(blocks, 1)
    sums = every.view(2, -1, num_channels).sum(1, dtype=torch.float64)
    if whole < num_rows:
        sums += torch.stack(native_sums(grad_rows[whole:], rows[whole:], mean))
    return sums


def _long_rows(rows: Tensor, whole: int, width: int) -> Sequence[Tensor]:
    """The first `whole` rows, joined `width` at a time, in blocks of at most ROWS of the joined rows."""
    long = (rows if whole == rows.size(0) else rows[:whole]).view(-1, width * rows.size(1))
    return (long,) if long.size(0) <= ROWS else long.split(ROWS)


def native_sums(grad: Tensor, input: Tensor, mean: Tensor | None) -> tuple[Tensor, Tensor]:
    """sum(grad) and sum(grad * (input - mean)) over all dimensions but 1, in the compute type, by one ATen operator."""
    dtype = mean.dtype if mean is not None else torch.promote_types(input.dtype, torch.float32)
    zeros, ones = constants(input.size(1), dtype)
    mean = zeros if mean is None else mean
    _, product, first = _aten.native_batch_norm_backward(
        grad, input, ones, mean, ones, mean, ones, False, 0.0, [False, True, True]
    )
    return first, product
