"""Running statistics of layers that do not synchronize over all ranks, and their pooling into one set."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from torch import nn

from syncbn.stats.pooling import pool_running_stats, unsynchronized_layers
from syncbn.training.data.sampler import Sampler
from syncbn.training.models.virtual_ranks import virtual_layers


class LocalStatistics:
    """Pools running statistics that ranks, sub-groups or virtual ranks gather on their own.

    Does nothing where all layers are synchronized over all ranks.

    Args:
        models: the model and its weight average; duplicates are ignored.
        sampler: gives the number of samples that each (virtual) rank has processed: the weights of the pooling.
        keep_apart: whether each rank keeps its own statistics (`bn.buffers=per_group`).
    """

    def __init__(self, models: Iterable[nn.Module], sampler: Sampler, *, keep_apart: bool) -> None:
        self._models, self._sampler = list(dict.fromkeys(models)), sampler
        self._is_pooled = not keep_apart and sampler.world_size * sampler.groups_per_rank > 1

    def _layers(self) -> list[nn.Module]:
        return [layer for model in self._models for layer in unsynchronized_layers(model)]

    def pool(self, step: int) -> None:
        """Replaces the statistics by the pooled ones on every rank, as of before `step`; every rank has to call it."""
        if not self._is_pooled or not self._layers():  # skips counting the samples, which iterates over an epoch
            return
        num_seen = self._sampler.num_seen(step)
        for model in self._models:
            for layer in virtual_layers(model):
                layer.pool(num_seen)
            pool_running_stats(unsynchronized_layers(model), weight=sum(num_seen))
            for layer in virtual_layers(model):
                layer.begin()

    @contextmanager
    def pooled(self, step: int) -> Iterator[None]:
        """Context with pooled statistics, for evaluation and checkpoints before `step`; every rank has to enter it.

        At its end each rank gets its own statistics back, since evaluating or saving must not change the training.
        """
        buffers = [buffer for layer in self._layers() for buffer in layer.buffers(recurse=False)]
        before = [buffer.clone() for buffer in buffers]
        self.pool(step)
        try:
            yield
        finally:
            for buffer, value in zip(buffers, before, strict=True):
                buffer.copy_(value)
