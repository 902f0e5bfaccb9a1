"""One set of running statistics out of those that ranks gathered on their own."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from syncbn.nn.batchnorm import SyncBatchNorm
from syncbn.nn.groups import spans_world
from syncbn.nn.moments import Moments


def pool_running_stats(layers: Iterable[nn.Module], weight: float) -> None:
    """Replaces each layer's running statistics by those of all ranks together, in place, the same bits on every rank.

    Where BN is local to a rank or a sub-group, each gathers its own running statistics. Their union has the weighted
    mean of the means, and as variance the weighted mean of the variances *plus the spread of the means*, which an
    average of the variances loses. One all-reduce for all layers; without a distributed job nothing happens.

    Args:
        layers: batch normalization layers, the same on every rank; those without running statistics are passed over.
        weight: how much this rank's statistics count, usually the samples that it has seen; 0 is fine.
    """
    tracked = [layer for layer in layers if isinstance(layer, _BatchNorm) and layer.running_mean is not None]
    if not tracked or not (dist.is_available() and dist.is_initialized()):
        return
    payloads = []
    for layer in tracked:
        assert layer.running_mean is not None
        assert layer.running_var is not None
        payloads.append(Moments.of_statistics(layer.running_mean, layer.running_var, weight).packed)
    pooled = torch.cat(payloads)
    dist.all_reduce(pooled)
    for layer, payload in zip(tracked, pooled.split([len(p) for p in payloads]), strict=True):
        assert layer.running_mean is not None
        assert layer.running_var is not None
        pooled_moments = Moments(payload)
        mean, var = pooled_moments.mean.to(layer.running_mean.dtype), pooled_moments.var.to(layer.running_var.dtype)
        has_weight = pooled_moments.count > 0  # on the device: no wait
        layer.running_mean.copy_(torch.where(has_weight, mean, layer.running_mean))
        layer.running_var.copy_(torch.where(has_weight, var, layer.running_var))


def unsynchronized_layers(model: nn.Module) -> list[nn.Module]:
    """The batch normalization layers whose running statistics may differ between the ranks of the job.

    Those are the layers of torch, and ours with a sub-group; ours with frozen statistics do not move and stay as they
    are.
    """
    return [
        layer
        for layer in model.modules()
        if isinstance(layer, _BatchNorm)
        and not (isinstance(layer, SyncBatchNorm) and (spans_world(layer.process_group) or layer.stats_frozen))
    ]
