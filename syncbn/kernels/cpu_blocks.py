"""Cache-sized blocks of an activation for the CPU operators, and per-channel sums computed by ATen's kernels.

`native_batch_norm_backward` in evaluation mode computes sum(g) and sum(g * (x - mean)) of a channel in one vectorized
read, accumulating in the compute type. `pair_sums` cuts each channel into short pieces and adds the pieces in float64:
float32 sums then have an error near 1e-7.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

# Contiguous layout: the most values that are added up before float64 takes over. The rounding errors of such pieces
# average out over a channel.
PIECE = 256
# channels_last: the most values per accumulator (rows), and how many accumulators lie side by side (columns).
ROWS, _COLUMNS = 256, 1024
# Values of a block, chosen so that temporaries of this size stay in the cache.
_BLOCK = 2**18

_aten = torch.ops.aten


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
        return torch.stack(native_sums(grad, input, mean, torch.ones_like(mean)))

    def total(self, parts: list[Tensor]) -> Tensor:
        """(2, C) float64: the results of `sums` for all blocks, in their order, added up per channel."""
        if self._is_one:
            return parts[0]
        across = -(-self._columns // self._wide)
        columns = [torch.stack(parts[number::across]).sum(0, dtype=torch.float64) for number in range(across)]
        return torch.cat(columns, 1).view(2, self._channels, self._pieces).sum(2)


def pair_sums(grad: Tensor, input: Tensor, mean: Tensor) -> Tensor:
    """sum(grad) and sum(grad * (input - mean)) per channel, (2, C) float64.

    Both tensors are dense and in the same layout; `mean` is in the compute type.
    """
    num_channels = input.size(1)
    if input.is_contiguous() and input.dim() > 2:
        pieces = pieces_of(input)
        shape = (input.size(0), num_channels * pieces, plane_size(input) // pieces)
        mean = mean.repeat_interleave(pieces) if pieces > 1 else mean
        pair = native_sums(grad.view(shape), input.view(shape), mean, torch.ones_like(mean))
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
    long_mean = mean.repeat(width) if width > 1 else mean
    ones = torch.ones_like(long_mean)
    long, long_grad = (tensor[:whole].view(-1, width * num_channels) for tensor in (rows, grad_rows))
    blocks = [native_sums(g, x, long_mean, ones) for g, x in zip(long_grad.split(ROWS), long.split(ROWS), strict=True)]
    every = torch.stack([torch.stack(vectors) for vectors in zip(*blocks, strict=True)]).view(2, -1, num_channels)
    sums = every.sum(1, dtype=torch.float64)
    if whole < num_rows:
        sums += torch.stack(native_sums(grad_rows[whole:], rows[whole:], mean, ones[:num_channels]))
    return sums


def native_sums(grad: Tensor, input: Tensor, mean: Tensor, ones: Tensor) -> tuple[Tensor, Tensor]:
    """sum(grad) and sum(grad * (input - mean)) over all dimensions but 1, in the compute type, by one ATen operator."""
    _, product, first = _aten.native_batch_norm_backward(
        grad, input, ones, mean, ones, mean, ones, False, 0.0, [False, True, True]
    )
    return first, product
