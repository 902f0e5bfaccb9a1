"""Count, mean and variance of samples that are distributed over several ranks or batches."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from syncbn.kernels import operators, reference
from syncbn.kernels.packing import pack, unpack
from syncbn.nn.collectives import all_reduce_sum
from syncbn.nn.groups import collective_group


@dataclass(frozen=True)
class Moments:
    """Count and first two moments of each channel, in a form that can be added.

    `a + b` pools two sets of samples, and `all_reduce` those of all ranks. Both are a sum of 4C+1 float64 numbers, and
    stay accurate even where |mean| is a million times the standard deviation (see `kernels.packing`).

    Example:
        >>> import torch
        >>> x = torch.randn(8, 3, 4, 4)
        >>> pooled = Moments.of(x[:3]) + Moments.of(x[3:])
        >>> torch.allclose(pooled.mean, x.double().mean((0, 2, 3)))
        True
    """

    packed: Tensor
    """Packed moments, (4C+1,) float64; meant only to be added (see `kernels.packing`)."""

    @classmethod
    def of(cls, input: Tensor, mask: Tensor | None = None) -> Moments:
        """The moments of `input`, (N, C, ...) of any floating type; an empty input has a count of 0.

        Args:
            mask: (N, 1, ...) bool, broadcasts to the input; positions where it is False are ignored.
        """
        return cls(reference.moments(input, mask))  # not the layer's faster kernels: accuracy matters more

    @classmethod
    def of_statistics(cls, mean: Tensor, var: Tensor, count: float) -> Moments:
        """The moments of `count` values per channel with this mean and this (biased) variance, both (C,)."""
        mean, var = mean.to(torch.float64), var.to(torch.float64)
        return cls(pack(count, mean, torch.zeros_like(mean), count * var))

    def move(
        self,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        num_batches_tracked: Tensor | None,
        momentum: float | None,
    ) -> None:
        """Updates running statistics in place, as one batch with these moments does; a count of 0 changes nothing."""
        operators.finish(self.packed, running_mean, running_var, num_batches_tracked, momentum, 0.0, torch.float64)

    def __add__(self, other: Moments) -> Moments:
        return Moments(self.packed + other.packed)

    def all_reduce(self, process_group: dist.ProcessGroup | None = None) -> Moments:
        """The moments of the samples of all ranks of the group; one collective, or none in a group of one."""
        return Moments(all_reduce_sum(self.packed.clone(), collective_group(process_group)))

    @property
    def count(self) -> Tensor:
        """Values per channel, float64 without dimensions (exact up to 2^53)."""
        return unpack(self.packed)[0]

    @property
    def mean(self) -> Tensor:
        """Mean of each channel, (C,) float64; 0 if there are no samples."""
        high, low = unpack(self.packed)[1]
        return high + low

    @property
    def var(self) -> Tensor:
        """Biased variance (divided by the count) of each channel, (C,) float64, never negative."""
        return unpack(self.packed)[2]
