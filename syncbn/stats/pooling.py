"""Pooling of running statistics that ranks have gathered separately."""

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
    """Replaces each layer's running statistics by those of all ranks together, in place, bitwise equal on every rank.

    Where BN is local to a rank or a sub-group, each rank or sub-group gathers running statistics of its own. The pooled
    mean is the weighted mean of the means; the pooled variance is the weighted mean of the variances *plus the variance
    of the means*, which an average of the variances would leave out. Communication: one all-reduce for all layers.
    Without a distributed job, or if all weights are 0, nothing changes.

    Args:
        layers: batch normalization layers, the same on every rank; those without running statistics are skipped.
        weight: weight of this rank's statistics, usually the number of samples that it has processed; may be 0.
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
        has_weight = pooled_moments.count > 0  # stays on the device: the host does not wait
        layer.running_mean.copy_(torch.where(has_weight, mean, layer.running_mean))
        layer.running_var.copy_(torch.where(has_weight, var, layer.running_var))


def unsynchronized_layers(model: nn.Module) -> list[nn.Module]:
    """The batch normalization layers whose running statistics may differ between the ranks of the job.

    These are the layers of torch's classes, and each `SyncBatchNorm` with a sub-group; one with frozen statistics is
    left out, because they do not change.
    """
    return [
        layer
        for layer in model.modules()
        if isinstance(layer, _BatchNorm)
        and not (isinstance(layer, SyncBatchNorm) and (spans_world(layer.process_group) or layer.stats_frozen))
    ]
