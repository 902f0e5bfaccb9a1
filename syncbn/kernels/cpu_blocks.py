"""An activation cut into dense parts that stay in the cache, and per-channel sums over them by ATen's own kernels.

`native_batch_norm_backward` in evaluation mode computes sum(g) and sum(g * (x - mean)) of a channel in one vectorized
read, in the input's type. `pair_sums` cuts each channel into short pieces and adds those up in float64: float32 sums
then come out with an error near 1e-7.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

# Values that one accumulator adds up. Their rounding errors average out over the accumulators of a channel.
PIECE = 256
# The same in channels_last, and how many accumulators there are side by side.
ROWS, _COLUMNS = 256, 1024
# Values of a temporary that stays in the cache.
_BLOCK = 2**18

_aten = torch.ops.aten


def pieces_of(input: Tensor) -> int:
    """Into how many equal pieces a plane of the contiguous layout is cut; 0 where it is large and cannot be."""
    size = plane_size(input)
    fewest = -(-size // PIECE)
    found = next((number for number in range(fewest, min(size, 64 * fewest) + 1) if size % number == 0), 0)
    return found if found or size > 32 * PIECE else 1


def plane_size(input: Tensor) -> int:
    """The values of one channel of one sample."""
    return math.prod(input.shape[2:])


class Blocks:
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
            return pair_sums(grad, input, mean)
        return torch.stack(native_sums(grad, input, mean, torch.ones_like(mean)))

    def total(self, parts: list[Tensor]) -> Tensor:
        """(2, C) float64 from the pairs of sums of all parts."""
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
    blocks = [native_sums(g, x, long_mean, ones) for g, x in zip(long_grad.split(ROWS), long.split(ROWS), strict=True)]
    every = torch.stack([torch.stack(vectors) for vectors in zip(*blocks, strict=True)]).view(2, -1, num_channels)
    sums = every.sum(1, dtype=torch.float64)
    if whole < num_rows:
        sums += torch.stack(native_sums(grad_rows[whole:], rows[whole:], mean, ones[:num_channels]))
    return sums


def native_sums(grad: Tensor, input: Tensor, mean: Tensor, ones: Tensor) -> tuple[Tensor, Tensor]:
    """sum(grad) and sum(grad * (input - mean)) of each column, in the compute type."""
    _, product, first = _aten.native_batch_norm_backward(
        grad, input, ones, mean, ones, mean, ones, False, 0.0, [False, True, True]
    )
    return first, product
