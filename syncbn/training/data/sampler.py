"""The samples of each step: a function of (seed, step), split over the ranks, of which there may be any number."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor

from syncbn.training.data.balance import ClassMembers, repeats_of
from syncbn.training.data.randomness import Draw, mix_key


@dataclass(frozen=True)
class Shard:
    """One rank's share of one micro-batch."""

    index: Tensor
    """(N,) int64, positions of this rank's samples in the data set; N may be 0."""
    num_global: int
    """Number of samples of the micro-batch over all ranks."""
    repeats: Tensor | None = None
    """(N,) int64, how often each sample was drawn in this epoch before; None where no sample is drawn twice."""


@dataclass(frozen=True)
class Sampler:
    """Splits an epoch into steps, a step into micro-batches, and a micro-batch over the ranks; never pads or drops.

    Every sample is visited once per epoch, or with `balance` as many are drawn, equally many of each class. The last
    step of an epoch takes the rest, so a rank may have fewer samples than the others, or none. Virtual ranks differ by
    at most one sample per micro-batch, shards by `groups_per_rank`.
    """

    num_samples: int
    batch_size: int
    """Samples per step over all ranks."""
    accumulate: int
    seed: int
    rank: int
    world_size: int
    groups_per_rank: int = 1
    """Virtual ranks per rank; a shard is the concatenation of their samples, in order."""
    balance: ClassMembers | None = None
    """Draws as many samples of every class; None: each sample once."""

    @property
    def steps_per_epoch(self) -> int:
        """Number of steps in which as many samples are visited as there are."""
        return -(-self.num_samples // self.batch_size)

    def epoch_of(self, step: int) -> int:
        """The epoch that a step belongs to, counted from 0."""
        return step // self.steps_per_epoch

    def shards(self, step: int) -> list[Shard]:
        """This rank's shard of each micro-batch of a step."""
        return list(_shards(self, step))

    def samples(self, step: int, rank: int) -> Tensor:
        """Positions of all samples of a step on the given rank, (N,) int64."""
        return torch.cat([shard.index for shard in replace(self, rank=rank).shards(step)])

    def num_seen(self, step: int) -> list[int]:
        """Numbers of samples in all steps before `step`, from 0 on, for each group (virtual rank) of this rank."""
        epochs, position = divmod(step, self.steps_per_epoch)
        order = torch.arange(self.num_samples)
        sizes = torch.tensor(
            [
                [sum(len(group) for group in groups) for groups in zip(*self._groups(order, at), strict=True)]
                for at in range(self.steps_per_epoch)
            ]
        )
        return (epochs * sizes.sum(0) + sizes[:position].sum(0)).tolist()

    def _cut(self, order: Tensor, repeats: Tensor | None, position: int) -> list[Shard]:
        """This rank's shard of each micro-batch of the step at `position` in an epoch with the given order."""
        micro_batches = self._micro_batches(order, position)
        indices = [torch.cat(mine) for mine in self._groups(order, position)]
        times = [None for _ in indices] if repeats is None else map(torch.cat, self._groups(repeats, position))
        cut = zip(indices, micro_batches, times, strict=True)
        return [Shard(index, len(part), again) for index, part, again in cut]

    def _micro_batches(self, order: Tensor, position: int) -> Sequence[Tensor]:
        batch = order[position * self.batch_size : (position + 1) * self.batch_size]
        return batch.tensor_split(min(self.accumulate, len(batch)))

    def _groups(self, order: Tensor, position: int) -> list[list[Tensor]]:
        """The samples of each micro-batch, by group (virtual rank) of this rank."""
        num_groups, first = self.world_size * self.groups_per_rank, self.rank * self.groups_per_rank
        return [
            list(part.tensor_split(num_groups)[first : first + self.groups_per_rank])
            for part in self._micro_batches(order, position)
        ]

    def smallest_micro_batch(self) -> int:
        """Number of samples, over all ranks, of the smallest micro-batch of an epoch."""
        last = self.num_samples - (self.steps_per_epoch - 1) * self.batch_size
        return last // min(self.accumulate, last)


@lru_cache(maxsize=2)  # the trainer and its loader both ask for the same step
def _shards(sampler: Sampler, step: int) -> tuple[Shard, ...]:
    epoch, position = divmod(step, sampler.steps_per_epoch)
    order, repeats = _epoch_order(sampler.num_samples, sampler.seed, epoch, sampler.balance)
    return tuple(sampler._cut(order, repeats, position))


@lru_cache(maxsize=2)
def _epoch_order(num_samples: int, seed: int, epoch: int, balance: ClassMembers | None) -> tuple[Tensor, Tensor | None]:
    """The samples of an epoch in their order, and how often each was drawn before, if any may be drawn twice."""
    if balance is not None:
        order = balance.order(seed, epoch)
        return order, repeats_of(order)
    generator = torch.Generator().manual_seed(mix_key(seed, epoch, Draw.SHUFFLE))
    return torch.randperm(num_samples, generator=generator), None
