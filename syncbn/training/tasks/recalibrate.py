"""`task=recalibrate`: replaces moving averages by population statistics, and writes a checkpoint with them.

The statistics come from the global batches of a training epoch, divided among the ranks: the order of epoch 0,
micro-batches as in training, images as in evaluation, without augmentation. Each layer normalizes a micro-batch with
the statistics of all its samples on all ranks, whatever `bn.sync` and `bn.group` say, so the result depends on the
checkpoint and the data, not on the number of ranks. Layers whose statistics are frozen at the checkpoint's step keep
them.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from syncbn.nn.batchnorm import SyncBatchNorm
from syncbn.nn.patterns import named_modules
from syncbn.report.metric_names import DRIFT, PRECISE, prefixed
from syncbn.stats.precise_bn import precise_bn
from syncbn.surgery.convert import convert_sync_batchnorm
from syncbn.training.checkpoint import files
from syncbn.training.checkpoint.paths import RECALIBRATED
from syncbn.training.checkpoint.state import copied
from syncbn.training.config.errors import ConfigError, TrainingError
from syncbn.training.config.parsing import to_dict
from syncbn.training.config.redaction import redacted
from syncbn.training.config.schema import Config
from syncbn.training.data.dataset import describe_data
from syncbn.training.data.native import NativeData
from syncbn.training.data.sampler import Sampler
from syncbn.training.distributed.rank_context import RankContext
from syncbn.training.losses import class_weights
from syncbn.training.tasks.loaded import LoadedRun, load_run
from syncbn.training.tracking import console
from syncbn.training.tracking.console import shown
from syncbn.training.trainer.build import sampler_for
from syncbn.training.trainer.checks import build_freeze_plan, check_model
from syncbn.training.trainer.of_sizes import OfSizes


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
    """By layer name, in the order of the model."""

    def describe(self) -> str:
        """The numbers of batches and samples, in words."""
        return f"{self.num_batches} global batches, {self.num_samples} samples"


def run(config: Config, run_dir: Path, context: RankContext) -> dict[str, float]:
    """Recalibrates the model that `load` names and writes `recalibrated.pt`, which `load` and `init.*.path` accept.

    Every rank calls it. The model is evaluated on validation data before and after, so that the statistics can be
    compared; the test set is not used.

    Returns:
        `val/...` with the old statistics, `precise/val/...` with the new ones, and `drift/<layer>`, the change of the
        layer's mean (see `Moved`); the same on every rank.
    """
    loaded = load_run(config, run_dir, context)
    before = loaded.evaluate("val")
    found = recalibrate(loaded, config.recalibrate.batches)
    after = loaded.evaluate("val")
    drift = prefixed(DRIFT, {name: moved.mean for name, moved in found.layers.items()})
    metrics = before | prefixed(PRECISE, after) | drift
    described = class_weights.describe(loaded.loss())  # on every rank: it may be a collective
    if context.is_first:
        content = {"step": loaded.step, "config": redacted(to_dict(loaded.config)), "weights": loaded.weights}
        content |= describe_data(loaded.data) | described
        files.write_atomically(run_dir / RECALIBRATED, copied({**content, "model": loaded.model.state_dict()}))
    loaded.record(run_dir, metrics)
    if context.is_first:
        rows = [(name, f"{value:.4f}", f"{after[name]:.4f}") for name, value in before.items()]
        console.print_rows(loaded.describe(), ("metric", "before", "after"), rows)
        moves = [(name, f"{m.mean:.4f}", f"{m.std[0]:.3f} to {m.std[1]:.3f}") for name, m in found.layers.items()]
        console.print_rows("how far statistics moved", ("layer", "mean, in std", "std, times"), moves)
        made_of = [("statistics of", found.describe()), ("written", shown(run_dir / RECALIBRATED))]
        console.print_table("population statistics", [*made_of, ("run directory", shown(run_dir))])
    return metrics


def recalibrate(loaded: LoadedRun, num_batches: int | None) -> Population:
    """Replaces the running statistics of the model, in place, by those of the first global batches of the training set.

    Every rank has to call it, and ends up with the same bits.

    Args:
        num_batches: how many; None, or more than an epoch has, means the whole training set.

    Raises:
        ConfigError: no layer has running statistics that are not frozen; on several ranks, a layer cannot be
            synchronized; where a rank has no sample, the model cannot take zero rows.
        TrainingError: the statistics are not finite.
    """
    config, context, model = loaded.config, loaded.context, loaded.model
    num_train, sampler = len(loaded.data.train), sampler_for(config, loaded.data, context)
    num_batches = min(num_batches or sampler.steps_per_epoch, sampler.steps_per_epoch)
    worker = _synchronized_copy(loaded, sampler)
    check_model(worker, loaded.data, sampler, context, loaded.loss())
    before = _statistics(model)
    with loaded.loader() as loader, context.forward_context():
        shards = (shard.index for step in range(num_batches) for shard in sampler.shards(step))
        model_of_batch = OfSizes(worker) if isinstance(loaded.data, NativeData) else worker
        precise_bn(model_of_batch, (images for images, _ in loader.eval_batches(loaded.data.train, shards)))
    after = _statistics(worker)
    for name, statistics in after.items():
        if not all(statistic.isfinite().all() for statistic in statistics):
            raise TrainingError(f"the statistics of {name or 'the model'} are not finite; nothing was written")
    model.load_state_dict(worker.state_dict())
    layers = {name: _compare(before[name], after[name], layer.eps) for name, layer in _layers(worker).items()}
    return Population(num_batches, min(num_batches * config.batch_size, num_train), layers)


def _synchronized_copy(loaded: LoadedRun, sampler: Sampler) -> nn.Module:
    """A copy to recalibrate: layers synchronize over all ranks, and are frozen as in the checkpoint's last step."""
    copied = copy.deepcopy(loaded.model)
    plan = build_freeze_plan(loaded.config, copied, sampler.steps_per_epoch)
    plan.apply(copied, max(loaded.step - 1, 0))
    try:
        convert_sync_batchnorm(copied)
    except TypeError as error:
        if loaded.context.world_size > 1:
            reason = str(error).partition("; leave it out")[0]
            raise ConfigError(f"task: {reason}, which statistics over several ranks would need; use one rank") from None
    for layer in copied.modules():
        if isinstance(layer, SyncBatchNorm):
            layer.process_group = None
    if not any(not (isinstance(layer, SyncBatchNorm) and layer.stats_frozen) for layer in _layers(copied).values()):
        raise ConfigError("load: the model has no batch normalization with running statistics that are not frozen")
    return copied


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
