"""Builds the components of a run from its configuration: model, data, sampler, loss, metrics, freeze plan, dtypes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from syncbn.surgery.freeze_plan import FreezePlan
from syncbn.training.checkpoint.files import StoredCheckpoint
from syncbn.training.config.duration import Duration
from syncbn.training.config.errors import ConfigError
from syncbn.training.config.parsing import to_dict
from syncbn.training.config.redaction import redacted
from syncbn.training.config.schema import Config
from syncbn.training.data import dataset, registry
from syncbn.training.data.balance import ClassMembers
from syncbn.training.data.counting import check_training_classes
from syncbn.training.data.images import ImageData
from syncbn.training.data.native import NativeData
from syncbn.training.data.sampler import Sampler
from syncbn.training.distributed.rank_context import RankContext
from syncbn.training.evaluation.metrics import Best, build_metrics, choose_best
from syncbn.training.losses import class_weights, losses
from syncbn.training.losses.losses import Loss
from syncbn.training.models.build import build_network
from syncbn.training.models.pretrained import Drift, load_pretrained
from syncbn.training.models.virtual_ranks import groups_per_rank, make_virtual
from syncbn.training.optim.optimizers import BuiltOptimizer, build_optimizer
from syncbn.training.optim.schedules import build_schedule
from syncbn.training.trainer import execution, native_checks, overfit
from syncbn.training.trainer.checks import (
    average_from,
    build_freeze_plan,
    check_averaged,
    check_division,
    check_model,
    warn_of_dropout,
    warn_of_large_batch,
)
from syncbn.training.trainer.early_stop import EarlyStop
from syncbn.training.trainer.graph_checks import check_parts
from syncbn.training.trainer.pixels import with_statistics_of_init

if TYPE_CHECKING:
    from torchmetrics import Metric

DTYPES = {"fp64": torch.float64}  # of parameters and images; float32 for any other precision
AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}  # no autocast for any other precision


def build_model(config: Config, data: dataset.ModelShape, context: RankContext) -> nn.Module:
    """The model with its initial weights, the same on every rank.

    Raises:
        ConfigError: see `build_network`, `groups_per_rank` and `make_virtual`.
    """
    torch.manual_seed(config.seed)
    model = build_network(config.model, config.bn, data.num_channels, data.num_classes).to(
        context.device, context.dtype
    )
    if config.bn.virtual_ranks is not None:
        num_groups = groups_per_rank(config.bn, context.world_size)
        make_virtual(model, num_groups, skip_nonfinite=config.bn.skip_nonfinite)
    if context.channels_last:
        execution.lay_out(model)
    return model


@dataclass(frozen=True)
class RunComponents:
    """The components of a training run; model, loss and metrics have been tried on some samples."""

    config: Config
    config_dict: dict[str, Any]
    """The configuration for files and trackers: plain containers, without secrets."""
    context: RankContext
    data: dataset.Data
    sampler: Sampler
    model: nn.Module
    loss: Loss
    metrics: Mapping[str, Metric]
    best: Best
    plan: FreezePlan
    drift: Drift
    built: BuiltOptimizer
    schedule: Callable[[int], float]
    """Function from a step to its learning rate as a fraction of the peak."""
    early_stop: EarlyStop
    average_from: int | None
    """See `Update`."""


def build_components(config: Config, context: RankContext, checkpoint: StoredCheckpoint | None) -> RunComponents:
    """Builds everything that a run trains with; every rank has to call it.

    Args:
        checkpoint: what is loaded afterwards, so that pretrained sub-networks are not, and whose pixel statistics and
            class weights are taken; None for a new run.

    Raises:
        ConfigError: a component cannot be built, or does not fit the others; see `build_model`, `check_model`,
            `build_freeze_plan`, `average_from`, `check_averaged`, `build_optimizer`, `build_schedule`, `EarlyStop`,
            `check_training_classes`, `check_parts`, `native_checks`.
    """
    data = registry.load_data(config.data)
    check_division(data)
    if config.overfit is not None:
        data = overfit.only_a_few(data, config.overfit)
    elif checkpoint is None:
        check_training_classes(data)
    if isinstance(data, ImageData):
        data.check_augmentation(config.seed)
    if checkpoint is not None:
        data = dataset.normalized_as_trained(data, checkpoint.content)
    else:
        data = with_statistics_of_init(data, config.init)
    model = build_model(config, data, context)
    drift = Drift()
    if checkpoint is None:
        load_pretrained(model, config.init)
        for name in config.init:
            drift.remember(model, name)
    sampler = sampler_for(config, data, context)
    if config.overfit is None:
        warn_of_large_batch(config.batch_size, len(data.train))
    plan = build_freeze_plan(config, model, sampler.steps_per_epoch)
    begin = average_from(config, sampler.steps_per_epoch)
    check_averaged(config, model, context)
    loss = losses.build_loss(config.loss, data, class_weights.stored({} if checkpoint is None else checkpoint.content))
    data = losses.with_known_labels(data, loss, config.data)
    outputs, targets = check_model(model, data, sampler, context, loss)
    if isinstance(data, NativeData):
        native_checks.check_network(model, context.put(data.smallest()))
    metrics = build_metrics(config.metrics, data.num_classes)
    has_accuracy = data.num_classes is not None and losses.are_classes(loss)
    labels = losses.metric_targets(loss, targets)
    best = choose_best(config.best, metrics, outputs, labels, has_accuracy=has_accuracy)
    warn_of_dropout(model)
    num_steps = Duration.parse(config.duration).in_steps(sampler.steps_per_epoch)
    built = build_optimizer(config.optimizer, model, scaled=context.autocast == torch.float16)
    check_parts(config, built, model, sampler.steps_per_epoch)
    return RunComponents(
        config, redacted(to_dict(config)), context, data, sampler, model, loss, metrics, best, plan, drift,
        built=built,
        schedule=build_schedule(config.schedule, max(1, num_steps), sampler.steps_per_epoch),
        early_stop=EarlyStop(config, plan, sampler.steps_per_epoch),
        average_from=begin,
    )  # fmt: skip


def sampler_for(config: Config, data: dataset.Data, context: RankContext) -> Sampler:
    """The sampler that selects this rank's training samples.

    Raises:
        ConfigError: `data.sampler=balanced` for masks, or for data of which the labels are not known.
    """
    groups = groups_per_rank(config.bn, context.world_size)
    return Sampler(
        len(data.train), config.batch_size, config.accumulate, config.seed, context.rank, context.world_size, groups,
        balance=_members(data) if config.data.sampler == "balanced" else None,
    )  # fmt: skip


def _members(data: dataset.Data) -> ClassMembers:
    labels = data.train_labels
    if data.has_masks:
        raise ConfigError("data.sampler: balanced is for one label per image, and a mask has many; use shuffled, and"
                          " loss.class_weights to balance them")  # fmt: skip
    if labels is None:
        raise ConfigError("data.sampler: balanced needs labels without reading images; give the training dataset an"
                          " attribute `targets` with the class of each sample, or use shuffled")  # fmt: skip
    return ClassMembers(labels)


def context_for(config: Config, context: RankContext) -> RankContext:
    """`context` with the dtypes and the memory format of this configuration."""
    return replace(
        context,
        dtype=DTYPES.get(config.precision, torch.float32),
        autocast=AUTOCAST.get(config.precision),
        channels_last=config.channels_last,
    )
