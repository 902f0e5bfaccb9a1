"""Replaces moving averages by population statistics: for `task=recalibrate`, and for averaged weights at a run's end.

The statistics come from the global batches of a training epoch, divided among the ranks: the order of epoch 0,
micro-batches as in training, images as in evaluation, without augmentation. Each layer normalizes a micro-batch with
the statistics of all its samples on all ranks, whatever `bn.sync` and `bn.group` say, so the result depends on the
weights and the data, not on the number of ranks. Layers whose statistics are frozen at the weights' step keep them.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from syncbn.nn.batchnorm import SyncBatchNorm
from syncbn.nn.patterns import named_modules
from syncbn.stats.precise_bn import precise_bn
from syncbn.surgery.convert import convert_sync_batchnorm
from syncbn.surgery.freeze_plan import FreezePlan
from syncbn.training.config.errors import ConfigError, TrainingError
from syncbn.training.config.schema import Config
from syncbn.training.data.by_size import BySize
from syncbn.training.data.dataset import Data
from syncbn.training.data.loader import Batch, Loader
from syncbn.training.data.native import NativeData
from syncbn.training.distributed.rank_context import RankContext
from syncbn.training.distributed.stopping import StopAgreed, StopRequest
from syncbn.training.losses.losses import Loss
from syncbn.training.trainer.build import sampler_for
from syncbn.training.trainer.checks import build_freeze_plan, check_model
from syncbn.training.trainer.lockstep_model import LockstepModel


class NoRunningStatisticsError(ConfigError):
    """The model has no batch normalization with running statistics that are not frozen."""


class NotFiniteError(TrainingError):
    """The statistics of the population are not finite, on any rank."""


@dataclass(frozen=True)
class Moved:
    """How far the running statistics of one layer have moved."""

    mean: float
    """The largest change of a channel's mean, in units of its old standard deviation."""
    std: tuple[float, float]
    """The smallest and the largest ratio of a channel's new to its old standard deviation."""


@dataclass(frozen=True)
class Population:
    """The number of samples behind recalibrated statistics, and how far the statistics of each layer have moved."""

    num_batches: int
    num_samples: int
    layers: dict[str, Moved]
    """How the statistics moved, by layer name, in the order of the model."""

    def describe(self) -> str:
        """The numbers of batches and samples, in words."""
        return f"{self.num_batches} global batches, {self.num_samples} samples"


def recalibrate(
    model: nn.Module,
    step: int,
    config: Config,
    data: Data,
    context: RankContext,
    loss: Loss,
    loader: Loader,
    *,
    num_batches: int | None = None,
    plan: FreezePlan | None = None,
    stop: StopRequest | None = None,
) -> Population:
    """Replaces the running statistics of the model, in place, by those of the first global batches of the training set.

    Every rank has to call it, and ends up with the same bits.

    Args:
        model: its layers are not those of virtual ranks, nor does `config` ask for them.
        step: after which the model has these weights; it tells what is frozen.
        loader: of `data`.
        num_batches: how many; None, or more than an epoch has, means the whole training set.
        plan: the freeze plan; None: that of `config`.
        stop: checked before every batch, on all ranks together.

    Raises:
        NoRunningStatisticsError: no layer has running statistics that are not frozen.
        ConfigError: on several ranks, a layer cannot be synchronized; where a rank has no sample, the model cannot take
            zero rows.
        NotFiniteError: the statistics are not finite.
        StopAgreed: `stop` was requested on any rank meanwhile. After any error the model is as it was.
    """
    sampler = sampler_for(config, data, context)
    num_batches = min(num_batches or sampler.steps_per_epoch, sampler.steps_per_epoch)
    worker = copy.deepcopy(model)
    plan = build_freeze_plan(config, worker, sampler.steps_per_epoch) if plan is None else plan
    plan.apply(worker, max(step - 1, 0))
    _synchronize(worker, context.world_size)
    check_model(worker, data, sampler, context, loss)
    before = _statistics(model)
    with context.forward_context():
        shards = (shard.index for number in range(num_batches) for shard in sampler.shards(number))
        model_of_batch = LockstepModel(worker) if isinstance(data, NativeData) else worker
        precise_bn(model_of_batch, _images(loader.eval_batches(data.train, shards), stop))
    after = _statistics(worker)
    for name, statistics in after.items():
        if not all(statistic.isfinite().all() for statistic in statistics):
            raise NotFiniteError(f"the statistics of {name or 'the model'} are not finite; nothing was written")
    model.load_state_dict(worker.state_dict())
    layers = {name: _compare(before[name], after[name], layer.eps) for name, layer in _layers(worker).items()}
    return Population(num_batches, min(num_batches * config.batch_size, len(data.train)), layers)


def _images(batches: Iterable[Batch], stop: StopRequest | None) -> Iterator[Tensor | BySize]:
    """The images of the batches, of which every rank has equally many."""
    for images, _ in batches:
        if stop is not None and stop.agreed():
            raise StopAgreed
        yield images


def _synchronize(worker: nn.Module, world_size: int) -> None:
    """Makes all layers of a copy synchronize over all ranks."""
    try:
        convert_sync_batchnorm(worker)
    except TypeError as error:
        if world_size > 1:
            reason = str(error).partition("; leave it out")[0]
            raise ConfigError(f"task: {reason}, which statistics over several ranks would need; use one rank") from None
    for layer in worker.modules():
        if isinstance(layer, SyncBatchNorm):
            layer.process_group = None
    if not any(not (isinstance(layer, SyncBatchNorm) and layer.stats_frozen) for layer in _layers(worker).values()):
        raise NoRunningStatisticsError(
            "load: the model has no batch normalization with running statistics that are not frozen"
        )


def _layers(model: nn.Module) -> dict[str, _BatchNorm]:
    """Batch normalization layers with running statistics, by name; a shared layer appears once."""
    found: dict[str, _BatchNorm] = {}
    for name, layer in named_modules(model):
        if isinstance(layer, _BatchNorm) and layer.running_mean is not None and layer not in found.values():
            found[name] = layer
    return found


def _statistics(model: nn.Module) -> dict[str, tuple[Tensor, ...]]:
    """Copies of each layer's running mean and variance, float64."""
    statistics: dict[str, tuple[Tensor, ...]] = {}
    for name, layer in _layers(model).items():
        assert layer.running_mean is not None
        assert layer.running_var is not None
        pair = (layer.running_mean, layer.running_var)
        statistics[name] = tuple(statistic.to(torch.float64, copy=True) for statistic in pair)
    return statistics


def _compare(before: tuple[Tensor, ...], after: tuple[Tensor, ...], eps: float) -> Moved:
    (mean, std), (new_mean, new_std) = ((mean, (var + eps).sqrt()) for mean, var in (before, after))
    ratio = new_std / std
    return Moved(float(((new_mean - mean).abs() / std).max()), (float(ratio.min()), float(ratio.max())))
