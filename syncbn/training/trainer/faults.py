"""The error for a step whose loss or gradient is not finite, with the training samples to look at."""

from __future__ import annotations

import torch

from syncbn.training.config.errors import TrainingError
from syncbn.training.data.dataset import Data
from syncbn.training.data.sampler import Sampler
from syncbn.training.distributed.rank_context import RankContext


class NonFiniteError(TrainingError):
    """The loss or the gradient of a step is not finite; the message names the samples to look at.

    Args:
        what: "loss" or "gradient".
        seen: training samples of the step, by rank; named if there are no culprits.
        culprits: the samples among them whose pixels are not finite.
    """

    def __init__(self, step: int, what: str, seen: dict[int, list[int]], culprits: list[int]) -> None:
        by_rank = "; ".join(f"rank {rank}: {_listed(samples)}" for rank, samples in seen.items())
        where = f"samples with pixels that are not: {_listed(culprits)}" if culprits else f"samples of {by_rank}"
        super().__init__(f"step {step}: the {what} is not finite; training {where}")


def find_fault(step: int, ranks: list[int], sampler: Sampler, data: Data, context: RankContext) -> NonFiniteError:
    """Builds the error: it names the samples with pixels that are not finite, or else all samples of these ranks.

    One sample is enough to make the statistics of a synchronized layer NaN, and with them the loss of every rank.

    Args:
        ranks: those whose loss was not finite; empty if it was the gradient, which means all ranks.
    """
    samples = {rank: sampler.samples(step, rank) for rank in (ranks if ranks else range(context.world_size))}
    index, epoch = torch.cat(list(samples.values())), sampler.epoch_of(step)
    images, _ = data.train_batch(index, sampler.seed, epoch, context.dtype)
    culprits = index[~images.flatten(1).isfinite().all(1)].tolist()
    seen = {rank: part.tolist() for rank, part in samples.items()}
    return NonFiniteError(step, "loss" if ranks else "gradient", seen, culprits)


def _listed(numbers: list[int]) -> str:
    return ", ".join(map(str, numbers))
