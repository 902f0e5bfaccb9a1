"""Gradient accumulation for running statistics: the moments of several micro-batches, pooled and committed once."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn

from syncbn.nn.batchnorm import SyncBatchNorm
from syncbn.nn.pool import Pool


@contextmanager
def accumulate_stats(model: nn.Module) -> Iterator[None]:
    """Updates running statistics once per context, as if the micro-batches inside of it were one batch.

    Each training forward of a `SyncBatchNorm` still normalizes with the statistics of its own (global) micro-batch. The
    moments of all micro-batches are pooled, and at the end of the context the running statistics are updated once and
    the batch counter is incremented by one. For given inputs of a layer, the result is that of one forward of the
    concatenated micro-batches, up to rounding: the mean, and the variance *including the spread of the micro-batches'
    means*. This holds for a model's first batch normalization. A deeper one gets inputs that earlier layers normalized
    per micro-batch, so it pools what the network computed, not what it would have computed for one large batch.

    After an exception, running statistics and counters are those from before the context. The context communicates
    nothing. It ignores layers with frozen statistics, without running statistics or of another class, and layers that
    are frozen or reverted inside of it. Running buffers that `torch.func.functional_call` puts in place of a layer's
    own are updated at once, as outside of the context.

    Args:
        model: the model whose `SyncBatchNorm` layers take part.

    Raises:
        RuntimeError: another such context is already open for one of the layers.

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
            if pool is not None and not layer.stats_frozen:  # neither reverted nor frozen inside of the context
                pool.commit(layer)


@contextmanager
def pooling(model: nn.Module, who: str) -> Iterator[list[SyncBatchNorm]]:
    """Pools the moments of all training forwards in each layer's `_pool`, in place of running-statistics updates.

    Yields the layers that take part; `who` is the caller's name for errors.
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
