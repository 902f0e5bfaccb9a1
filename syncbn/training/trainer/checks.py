"""Checks before a run starts, for mistakes that would otherwise end it in the middle, or silently change it."""

from __future__ import annotations

import copy
import logging
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from syncbn.nn.modes import evaluating
from syncbn.report import file_names
from syncbn.surgery.convert import convert_sync_batchnorm
from syncbn.surgery.freeze_plan import FreezePlan, FreezeRule
from syncbn.training.config.duration import Duration
from syncbn.training.config.errors import ConfigError, TrainingError, one_line
from syncbn.training.config.output import short
from syncbn.training.config.schema import Config
from syncbn.training.data.by_size import each_size
from syncbn.training.data.dataset import Data
from syncbn.training.data.native import NativeData
from syncbn.training.data.sampler import Sampler
from syncbn.training.distributed import world
from syncbn.training.distributed.rank_context import RankContext, in_dtype
from syncbn.training.losses.losses import Loss, are_classes, check_loss

log = logging.getLogger(__name__)


def build_freeze_plan(config: Config, model: nn.Module, steps_per_epoch: int) -> FreezePlan:
    """Builds the freeze plan of the configuration and checks it on the model.

    Raises:
        ConfigError: a rule cannot work, every parameter is frozen at some step, or the model has no parameter.
    """

    def in_steps(value: object) -> int | None:
        return None if value is None else Duration.parse(str(value)).in_steps(steps_per_epoch)

    rules = {
        name: FreezeRule(
            match=rule.match,
            exclude=rule.exclude,
            stats=rule.stats,
            affine=rule.affine,
            weights=rule.weights,
            start=in_steps(rule.start),
            until=in_steps(rule.until),
        )
        for name, rule in config.freeze.items()
    }
    plan, num_steps = FreezePlan(rules), Duration.parse(config.duration).in_steps(steps_per_epoch)
    try:
        warnings = plan.check(model, num_steps)
    except (ValueError, TypeError) as error:
        remedy = "" if config.bn.sync else " (bn.sync=true converts the model)"
        raise ConfigError(f"freeze.{error}{remedy}") from None
    for warning in warnings:
        log.warning("freeze.%s", warning)
    with_parameters = {name for name, module in model.named_modules() if [*module.parameters(recurse=False)]}
    if not with_parameters:
        raise ConfigError("model: has no parameter to train")
    for step in sorted({0, *(boundary for boundary in plan.boundaries if boundary < num_steps)}):
        frozen = plan.frozen_at(model, step)
        if all(frozen.get(name, set()) & {"affine", "weights"} for name in with_parameters):
            raise ConfigError(f"freeze: every parameter is frozen at step {step}; leave something to train")
    return plan


def average_from(config: Config, steps_per_epoch: int) -> int | None:
    """The number of steps after which an equal-weight average begins; None without `swa`.

    Raises:
        ConfigError: that is not before the end of the run.
    """
    if config.swa is None:
        return None
    begin, num_steps = (Duration.parse(text).in_steps(steps_per_epoch) for text in (config.swa, config.duration))
    if begin >= num_steps:
        raise ConfigError(f"swa: expected less than duration={config.duration} ({num_steps} steps), or nothing would be"
                          f" averaged, got {config.swa} ({begin} steps)")  # fmt: skip
    return begin


def check_averaged(config: Config, model: nn.Module, context: RankContext) -> None:
    """Checks that the layers can be synchronized where `bn.averaged` needs that at the end of the run.

    Raises:
        ConfigError: they cannot.
    """
    has_average = config.ema is not None or config.swa is not None
    if not has_average or config.bn.averaged == "running" or context.world_size == 1:
        return
    if config.bn.sync or config.bn.virtual_ranks is not None:  # then they are synchronized, or of torch's own classes
        return
    try:
        convert_sync_batchnorm(copy.deepcopy(model))
    except TypeError as error:
        reason = str(error).partition("; leave it out")[0]
        raise ConfigError(f"bn.averaged: {reason}, which statistics of the population over several ranks need; set"
                          " bn.averaged=running") from None  # fmt: skip


def check_model(
    model: nn.Module, data: Data, sampler: Sampler, context: RankContext, loss: Loss
) -> tuple[object, Tensor]:
    """Runs the model in evaluation mode, and the loss, on at most two training samples; returns outputs and targets.

    Raises:
        ConfigError: the model cannot take the images; its outputs have another shape than the loss needs; the
            loss cannot take the outputs, or does not return a sum and a count; the model cannot take zero rows, where
            the last batch of an epoch leaves a rank without samples.
    """
    index = data.samples_to_try() if isinstance(data, NativeData) else torch.arange(min(2, len(data.train)))
    for _, images, targets in each_size(index, *data.train_batch(index, 0, 0, context.dtype)):
        images = context.put(images)
        outputs, targets = _check_outputs(model, images, targets, data, context, loss)
    if sampler.smallest_micro_batch() <= (context.world_size - 1) * sampler.groups_per_rank:
        failure, _ = _try(model, images[:0])
        if failure is not None:
            raise ConfigError(
                f"model: cannot take zero rows, which the last batch leaves to some ranks (failed in {failure}); use"
                " flatten(1) instead of view(x.size(0), -1), or choose batch_size and ranks so that no rank is left"
                " without samples"
            )
    return outputs, targets


def _check_outputs(
    model: nn.Module, images: Tensor, targets: Tensor, data: Data, context: RankContext, loss: Loss
) -> tuple[Any, Tensor]:
    failure, outputs = _try(model, images)
    if failure is not None:
        raise ConfigError(f"model: cannot take images of shape {tuple(images.shape)} (failed in {failure})")
    output_shape = getattr(loss, "output_shape", None)  # that of a user's own loss is not known
    wanted = None if output_shape is None else output_shape(targets, data.num_classes)
    if wanted is not None and not (isinstance(outputs, Tensor) and outputs.shape == wanted):
        got = tuple(outputs.shape) if isinstance(outputs, Tensor) else type(outputs).__name__
        like = "" if are_classes(loss) else ", that of the targets"
        kind = "logits" if are_classes(loss) else "outputs"
        raise ConfigError(f"model: expected {kind} of shape {wanted}{like}, got {got}{_other_kind(wanted, got)}")
    outputs, targets = in_dtype(outputs, context.dtype), targets.to(context.device)
    check_loss(loss, outputs, targets)
    return outputs, targets


def check_division(data: Data) -> None:
    """Raises a ConfigError, on every rank, unless a table is divided alike on all of them; a collective."""
    if data.division is None:
        return
    found = world.on_all_ranks(data.division)
    if len({*found}) > 1:
        other = next(rank for rank, division in enumerate(found) if division != found[0])
        raise ConfigError(f"data.path: rank {other} reads another table than rank 0, which divides it otherwise; give"
                          " every machine the same")  # fmt: skip


def _other_kind(wanted: object, got: object) -> str:
    """What to say where the outputs are for labels and the targets are masks, or the other way round."""
    if not isinstance(wanted, tuple) or not isinstance(got, tuple):
        return "; the model has to return that tensor alone" if isinstance(wanted, tuple) else ""
    if len(wanted) == len(got):
        return f"; the data has {wanted[1]} classes" if got[:1] + got[2:] == wanted[:1] + wanted[2:] else ""
    if len(wanted) > len(got) == 2:
        return "; this data has masks, a class for each pixel: model=unet_small, or a segmentation network of your own"
    return "; this data has one label an image: model=resnet_small, or a classifier of your own"


def check_run_directory(run_dir: Path, step: int) -> None:
    """Checks that the run directory has not been deleted since the run began; every rank has to call it.

    Raises:
        TrainingError: on every rank: it has, and what it held is lost.
    """
    if not world.on_all_ranks((run_dir / file_names.CONFIG).exists())[0]:  # rank 0 wrote it
        raise TrainingError(
            f"run: {short(run_dir)} has been deleted or moved while the run trained: its metrics up to step {step} and"
            " its checkpoints are lost, or where they were moved to, and nothing more can be saved; put it back and"
            " give the same command again, or start anew"
        )


def warn_of_dropout(model: nn.Module) -> None:
    """Logs a warning if the model has dropout, whose masks differ with the number of ranks."""
    dropout = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.modules.dropout._DropoutNd) and module.p > 0
    ]
    if dropout:
        log.warning("dropout draws per rank (%s): this run's trajectory depends on the number of ranks", dropout[0])


def warn_of_large_batch(batch_size: int, num_samples: int) -> None:
    """Logs a warning if a step takes fewer samples than `batch_size` says, because there are no more."""
    if batch_size > num_samples:
        log.warning("batch_size=%d is more than the %d training samples: each step takes all of them, and an epoch is"
                    " one step", batch_size, num_samples)  # fmt: skip


def _try(model: nn.Module, images: Tensor) -> tuple[str | None, object]:
    """Runs the model in evaluation mode; returns the last module entered with its error, or None, and the outputs."""
    names = {module: name or "the model" for name, module in model.named_modules()}
    running: list[str] = []
    handles = [
        module.register_forward_pre_hook(lambda module, _: running.append(names[module])) for module in model.modules()
    ]
    try:
        with evaluating(model), torch.no_grad():
            return None, model(images)
    except Exception as error:
        return f"{running[-1]}: {one_line(error)}", None
    finally:
        for handle in handles:
            handle.remove()
