"""Precise batch normalization: running statistics pooled over many batches, instead of a moving average."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from itertools import islice
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

from syncbn.nn.accumulate import pooling
from syncbn.nn.batchnorm import SyncBatchNorm
from syncbn.nn.collectives import sum_over_ranks
from syncbn.nn.disabled_stats import are_disabled
from syncbn.nn.even_steps import even_steps
from syncbn.nn.groups import collective_group, spans_world
from syncbn.nn.modes import evaluating
from syncbn.nn.moments import Moments
from syncbn.stats.calls import has_lazy_layers, input_of


@torch.no_grad()
def precise_bn(model: nn.Module, batches: Iterable[Any], *, num_batches: int | None = None) -> None:
    """Replaces the running statistics by those of the population: all samples of `batches`, of all ranks together.

    Each layer normalizes every batch with the statistics of that (global) batch, as in training, while all other
    modules are in evaluation mode, so that dropout does not change the statistics. The moments of all batches are
    pooled, weighted by their numbers of samples, and the variance includes that between the batch means (Wu and Johnson
    2021, "Rethinking 'Batch' in BatchNorm"). Mean and unbiased variance are written to the buffers in place. Weights,
    batch counters, momentum and modes do not change; after an exception the buffers do not either. Layers with frozen
    statistics or without running statistics are skipped; a plain `nn.BatchNorm` takes part and normalizes with this
    rank's batch alone.

    Every rank has to call it. Ranks may have different numbers of batches: those that run out continue with empty
    batches (see `even_steps`), so the model then has to accept an input of zero rows. The statistics are bitwise equal
    on all ranks.

    Args:
        model: a model, wrapped in DDP or not.
        batches: this rank's shard; each batch is the model's input, or a tuple or list that begins with it.
        num_batches: the number of batches to use on each rank; None for all. If no rank has so many, the statistics
            are those of all batches, with a warning on every rank.

    Raises:
        ValueError: no batch on any rank; no layer that could take part; lazy layers that are not initialized;
            num_batches below 1.
        RuntimeError: a context of `accumulate_stats` or `disable_running_stats` is open for a layer.
        TypeError: batches that cannot be cut to zero rows, on every rank (see `even_steps`).

    Example:
        >>> layer = SyncBatchNorm(3)
        >>> x = torch.randn(8, 3, 4, 4)
        >>> precise_bn(layer, x.split(2))
        >>> torch.allclose(layer.running_mean, x.mean((0, 2, 3)), atol=1e-6)
        True
    """
    if num_batches is not None and num_batches < 1:
        raise ValueError(f"num_batches: expected None or 1 or more, got {num_batches}")
    if isinstance(model, DistributedDataParallel):
        model = model.module
    if has_lazy_layers(model):
        raise ValueError("model: has lazy layers that have not seen their width; run it once before")
    if any(are_disabled(layer) for layer in model.modules()):
        raise RuntimeError("precise_bn: a context of disable_running_stats of this model is open; leave it first")
    with ExitStack() as stack:
        synchronized = stack.enter_context(pooling(model, "precise_bn"))
        plain = stack.enter_context(_watching(model))
        if not synchronized and not plain:
            raise ValueError("model: has no batch normalization with running statistics that are not frozen")
        stack.enter_context(evaluating(model, but=[*synchronized, *plain]))
        seen = 0
        for batch in even_steps(islice(batches, num_batches)):
            model(batch[0] if isinstance(batch, tuple | list) else batch)
            seen += 1
        if seen == 0:
            raise ValueError("batches: expected at least one, got none")
        if num_batches is not None and seen < num_batches:  # on every rank: all take equally many steps
            warnings.warn(
                f"num_batches: asked for {num_batches}, but batches ended after {seen} on every rank: the statistics"
                f" are those of {seen}",
                stacklevel=3,
            )
        found: list[tuple[_BatchNorm, Tensor]] = []
        for layer in synchronized:
            assert layer._pool is not None
            found.append((layer, _over_all_groups(layer, layer._pool.packed)))
        found += [(other, moments.all_reduce().packed) for other, moments in plain.items() if moments is not None]
    for one, packed in found:  # in place; a layer without samples keeps its statistics
        Moments(packed).move(one.running_mean, one.running_var, None, momentum=1.0)


def _over_all_groups(layer: SyncBatchNorm, packed: Tensor) -> Tensor:
    """The packed moments summed over all ranks of the job, from those summed over the layer's process group.

    Every rank of a group holds the sum of that group: it is divided by the group's size before it is summed.
    """
    if not (dist.is_available() and dist.is_initialized()) or spans_world(layer.process_group):
        return packed
    group = collective_group(layer.process_group)
    total = packed / (1 if group is None else dist.get_world_size(group))
    assert dist.group.WORLD is not None
    sum_over_ranks(total, dist.group.WORLD)
    return total


@contextmanager
def _watching(model: nn.Module) -> Iterator[dict[_BatchNorm, Moments | None]]:
    """Collects the moments of this rank's inputs to each layer of torch's own classes; None for a layer without input.

    Inside of the context these layers update copies of their buffers.
    """
    layers = [
        layer
        for layer in model.modules()
        if isinstance(layer, _BatchNorm) and not isinstance(layer, SyncBatchNorm) and layer.running_mean is not None
    ]
    seen: dict[_BatchNorm, Moments | None] = dict.fromkeys(layers)

    def look(layer: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        assert isinstance(layer, _BatchNorm)
        input = input_of(arguments, keywords)
        if input is not None:
            before, new = seen[layer], Moments.of(input)
            seen[layer] = new if before is None else before + new

    handles = [layer.register_forward_pre_hook(look, with_kwargs=True) for layer in layers]
    buffers = {layer: dict(layer._buffers) for layer in layers}
    for layer, own in buffers.items():
        layer._buffers.update({name: None if buffer is None else buffer.clone() for name, buffer in own.items()})
    try:
        yield seen
    finally:
        for layer, own in buffers.items():
            layer._buffers.update(own)
        for handle in handles:
            handle.remove()
