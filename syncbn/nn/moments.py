"""Moments: count, mean and variance of samples that lie on several ranks, or arrive in several batches."""

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
    """The first two moments of each channel, in a form that adds.

    Two sets of samples pool by `a + b`, ranks by `all_reduce`; both are a sum of 4C+1 float64 numbers and lose nothing
    that matters even where |mean| is a million times the standard deviation (see `kernels.packing`).

    Example:
        >>> import torch
        >>> x = torch.randn(8, 3, 4, 4)
        >>> pooled = Moments.of(x[:3]) + Moments.of(x[3:])
        >>> torch.allclose(pooled.mean, x.double().mean((0, 2, 3)))
        True
    """

    packed: Tensor
    """The payload, (4C+1,) float64; not meant to be read, only to be added."""

    @classmethod
    def of(cls, input: Tensor, mask: Tensor | None = None) -> Moments:
        """The moments of `input`, (N, C, ...) of any floating type; an empty input has a count of 0.

        Args:
            mask: (N, 1, ...) bool, broadcasts to the input; what is False does not count.
        """
        return cls(reference.moments(input, mask))  # not the quick kernels of the layer: nothing is to be lost here

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
        """Moves running statistics in place as one batch with these moments does; a count of 0 moves nothing."""
        operators.finish(self.packed, running_mean, running_var, num_batches_tracked, momentum, 0.0, torch.float64)

    def __add__(self, other: Moments) -> Moments:
        return Moments(self.packed + other.packed)

    def all_reduce(self, process_group: dist.ProcessGroup | None = None) -> Moments:
        """The moments of all ranks' samples; one collective, or none in a world of one."""
        return Moments(all_reduce_sum(self.packed.clone(), collective_group(process_group)))

    @property
    def count(self) -> Tensor:
        """Values per channel, float64 without dimensions (exact up to 2^53)."""
        return unpack(self.packed)[0]

    @property
    def mean(self) -> Tensor:
        """(C,) float64; 0 where there are no samples."""
        high, low = unpack(self.packed)[1]
        return high + low

    @property
    def var(self) -> Tensor:
        """(C,) float64, biased (divided by the count), never negative."""
        return unpack(self.packed)[2]
