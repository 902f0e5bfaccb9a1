"""Running statistics over several micro-batches as over one batch: pooled, and committed once."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn

from syncbn.nn.batchnorm import SyncBatchNorm
from syncbn.nn.pool import Pool


@contextmanager
def accumulate_stats(model: nn.Module) -> Iterator[None]:
    """Gradient accumulation for running statistics: the micro-batches inside of the context count as one batch.

    Each training forward of a `SyncBatchNorm` still normalizes with the statistics of its own (global) micro-batch. Its
    running statistics wait: the moments of all micro-batches are pooled, and at the end of the context they move once,
    and the counter by one. For sums of the layer's own inputs this is what one forward of the concatenated
    micro-batches does, to rounding: mean, and the variance *including the spread of the micro-batches' means*. It is so
    exactly for a model's first batch normalization. A deeper one sees inputs that earlier layers normalized by
    micro-batch, and so pools what the network computed, not what one large batch would have made it compute.

    After an exception, running statistics and counters are those from before the context. No communication of its own.
    Layers with frozen statistics, without running statistics, or of another class are left alone; so are layers that
    are frozen or reverted inside of the context, and running buffers that `torch.func.functional_call` puts in place of
    a layer's own move at once, as outside.

    Args:
        model: its `SyncBatchNorm` layers take part.

    Raises:
        RuntimeError: a context of the same layer is open already.

    Example:
        >>> import torch
        >>> layer = SyncBatchNorm(3)
        >>> with accumulate_stats(layer):
        ...     for micro_batch in torch.randn(8, 3, 4, 4).split(2):
        ...         output = layer(micro_batch)
        >>> layer.num_batches_tracked.item()
        1
    """
    with pooling(model, "accumulate_stats") as layers:
        yield
        for layer in layers:
            pool = layer.__dict__.get("_pool")
            if pool is not None and not layer.stats_frozen:  # neither reverted nor frozen meanwhile
                pool.commit(layer)


@contextmanager
def pooling(model: nn.Module, who: str) -> Iterator[list[SyncBatchNorm]]:
    """Collects the moments of all training forwards in each layer's `_pool`; running statistics wait. Yields the layers
    that take part; `who` is named in errors.
    """
    layers = [
        layer
        for layer in model.modules()
        if isinstance(layer, SyncBatchNorm) and isinstance(layer.running_mean, Tensor) and not layer.stats_frozen
    ]
    if any(layer._pool is not None for layer in layers):
        raise RuntimeError(f"{who}: a context of accumulate_stats of this model is open already; leave it first")
    for layer in layers:
        layer._pool = Pool(layer)
    try:
        yield layers
    finally:
        for layer in layers:
            layer.__dict__.pop("_pool", None)
