"""Running statistics that ranks, groups of ranks or virtual ranks gather on their own, and one set out of them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from torch import nn

from syncbn.stats.pooling import pool_running_stats, unsynchronized_layers
from syncbn.training.data.sampler import Sampler
from syncbn.training.models.virtual_ranks import virtual_layers


class LocalStatistics:
    """Those of a model and of its average; does nothing where all layers are synchronized over all ranks.

    Args:
        models: may name one twice.
        sampler: knows how many samples each (virtual) rank has seen, by which its statistics count.
        keep_apart: leaves each rank its own (`bn.buffers=per_group`).
    """

    def __init__(self, models: Iterable[nn.Module], sampler: Sampler, *, keep_apart: bool) -> None:
        self._models, self._sampler = list(dict.fromkeys(models)), sampler
        self._is_pooled = not keep_apart and sampler.world_size * sampler.groups_per_rank > 1

    def _layers(self) -> list[nn.Module]:
        return [layer for model in self._models for layer in unsynchronized_layers(model)]

    def pool(self, step: int) -> None:
        """One set for all ranks, for good, as of before `step`."""
        if not self._is_pooled or not self._layers():  # counting samples goes through an epoch
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
        """One set for all ranks, for evaluation and checkpoints before `step`.

        Afterwards each rank goes on with its own: how often a run is saved must not change it.
        """
        buffers = [buffer for layer in self._layers() for buffer in layer.buffers(recurse=False)]
        before = [buffer.clone() for buffer in buffers]
        self.pool(step)
        try:
            yield
        finally:
            for buffer, value in zip(buffers, before, strict=True):
                buffer.copy_(value)
