"""Running statistics that ranks, groups of ranks or virtual ranks gather on their own, and one set out of them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

from torch import nn

from syncbn.stats.pooling import pool_running_stats, unsynchronized_layers
from syncbn.training.virtual import virtual_layers


class LocalStatistics:
    """Those of a model and of its average; does nothing where all layers are synchronized over all ranks.

    Args:
        models: may name one twice.
        pooled: False leaves each rank its own (`bn.buffers=per_group`, or a single rank).
    """

    def __init__(self, models: Iterable[nn.Module], *, pooled: bool) -> None:
        self._models, self._pooled = list(dict.fromkeys(models)), pooled

    def pool(self, num_seen: Sequence[int]) -> None:
        """One set for all ranks, for good.

        Args:
            num_seen: the samples of each (virtual) rank of this process so far, by which its statistics count.
        """
        if not self._pooled:
            return
        for model in self._models:
            for layer in virtual_layers(model):
                layer.pool(num_seen)
            pool_running_stats(unsynchronized_layers(model), weight=sum(num_seen))
            for layer in virtual_layers(model):
                layer.begin()

    @contextmanager
    def pooled(self, num_seen: Sequence[int]) -> Iterator[None]:
        """One set for all ranks, for evaluation and checkpoints.

        Afterwards each rank goes on with its own: how often a run is saved must not change it.
        """
        layers = [layer for model in self._models for layer in unsynchronized_layers(model)]
        buffers = [buffer for layer in layers for buffer in layer.buffers(recurse=False)]
        before = [buffer.clone() for buffer in buffers]
        self.pool(num_seen)
        try:
            yield
        finally:
            for buffer, value in zip(buffers, before, strict=True):
                buffer.copy_(value)
