"""What `train.py` does with a checked configuration: build everything, run the task, close everything."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from syncbn.surgery.plan import FreezePlan, FreezeRule
from syncbn.training import console, launch, losses, models, state
from syncbn.training import data as datasets
from syncbn.training.config import Config, ConfigError
from syncbn.training.duration import Duration
from syncbn.training.loop import Trainer
from syncbn.training.metrics import evaluate as evaluate_split
from syncbn.training.parsing import apply_overrides, parse, to_dict
from syncbn.training.place import Place
from syncbn.training.sampling import Sampler
from syncbn.training.state import Checkpoints
from syncbn.training.tracker import Tracker

log = logging.getLogger(__name__)

DTYPES = {"fp32": torch.float32, "fp64": torch.float64}


def run(config: Config, run_dir: Path, job: str = "0", overrides: Sequence[str] = ()) -> dict[str, float]:
    """Runs the task on this rank; returns its metrics (the same on every rank).

    Args:
        job: a name that differs between the jobs of one multirun.
        overrides: what was given on the command line; tasks that take their configuration from `load` apply it to that.

    Raises:
        ConfigError: a mistake in the configuration, found before training starts.
    """
    device = _device(config)
    place = Place(launch.rank(), launch.world_size(), device, DTYPES[config.precision])
    with launch.process_group(device.type, job):
        if config.task == "eval":
            return evaluate(config, run_dir, place, overrides)
        return train(config, run_dir, place)


def evaluate(config: Config, run_dir: Path, place: Place, overrides: Sequence[str]) -> dict[str, float]:
    """`task=eval`: validation and test metrics of a run or checkpoint, by the configuration of its training."""
    assert config.load is not None
    path = Path(config.load)
    checkpoint = state.read(state.best_or_newest(path, "load") if path.is_dir() else path, "load")
    if "config" not in checkpoint or "model" not in checkpoint:
        raise ConfigError(f"load: {config.load!r} is not a checkpoint of a run; expected one that train.py wrote")
    config = parse(apply_overrides(checkpoint["config"], overrides))
    place = replace(place, dtype=DTYPES[config.precision])
    data, model = _build(config, place)
    model.load_state_dict(checkpoint["model"])
    loss = losses.build(config.loss)
    metrics: dict[str, float] = {}
    for name, split in (("val", data.val), ("test", data.test)):
        values = evaluate_split(model, data, split, loss, place)
        metrics |= {f"{name}/{key}": value for key, value in values.items()}
    if place.is_first:
        with (run_dir / "metrics.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": checkpoint["step"], **metrics}) + "\n")
        rows = [(name, f"{value:.4f}") for name, value in metrics.items()]
        console.print_table(f"{config.load}, step {checkpoint['step']}", [*rows, ("run directory", _shown(run_dir))])
    return metrics


def train(config: Config, run_dir: Path, place: Place) -> dict[str, float]:
    """`task=train`."""
    data, model = _build(config, place)
    for name, init in config.init.items():
        log.info(models.load_subnet(model, name, init))
    sampler = Sampler(len(data.train), config.batch_size, config.accumulate, config.seed, place.rank, place.world_size)
    plan = _freeze_plan(config, model, sampler.steps_per_epoch)
    config_dict = to_dict(config)
    with Tracker(config.tracker, run_dir, config_dict, active=place.is_first) as tracker:
        loss = losses.build(config.loss)
        trainer = Trainer(config, run_dir, place, data, sampler, model, loss, plan, tracker)
        checkpoint = _checkpoint_to_resume(config, trainer.checkpoints)
        if checkpoint is not None:
            trainer.resume(checkpoint)
            log.info("resumed from %s at step %d", checkpoint, trainer.counters.step)
        _check(trainer)
        _announce(config, run_dir, trainer)
        metrics = trainer.run(config_dict)
    if place.is_first:
        _print_summary(metrics, config, run_dir, trainer)
    return metrics


def _build(config: Config, place: Place) -> tuple[datasets.Data, nn.Module]:
    """Data and model; the same initial weights on every rank."""
    data = datasets.load(config.data)
    torch.manual_seed(config.seed)
    model = models.build(config.model, config.bn, data.num_channels, data.num_classes)
    return data, model.to(place.device, place.dtype)


def _device(config: Config) -> torch.device:
    if config.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device: cuda is not available here; use device=cpu or device=auto")
    if config.device == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    torch.cuda.set_device(device)
    return device


def _freeze_plan(config: Config, model: nn.Module, steps_per_epoch: int) -> FreezePlan:
    """The plan of the configuration, proven on the model."""

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
    plan = FreezePlan(rules)
    try:
        warnings = plan.check(model, Duration.parse(config.duration).in_steps(steps_per_epoch))
    except (ValueError, TypeError) as error:
        remedy = "" if config.bn.sync else " (bn.sync=true converts the model)"
        raise ConfigError(f"freeze.{error}{remedy}") from None
    for warning in warnings:
        log.warning("freeze.%s", warning)
    return plan


def _check(trainer: Trainer) -> None:
    """What would fail, or differ between world sizes, in the middle of a run."""
    model, place = trainer.model, trainer.place
    with_parameters = {name for name, module in model.named_modules() if [*module.parameters(recurse=False)]}
    for step in sorted({trainer.counters.step, *trainer.plan.boundaries}):
        frozen = trainer.plan.frozen_at(model, step)
        if all(frozen.get(name, set()) & {"affine", "weights"} for name in with_parameters):
            raise ConfigError(f"freeze: every parameter is frozen at step {step}; leave something to train")
    if trainer.sampler.smallest_micro_batch() < place.world_size:
        images, _ = trainer.data.train_batch(torch.arange(1), 0, 0, place.dtype)
        models.check_takes_zero_rows(model, images.to(place.device))
    dropout = [name for name, module in model.named_modules() if isinstance(module, nn.modules.dropout._DropoutNd)]
    if dropout:
        log.warning("dropout draws per rank (%s): this run's trajectory depends on the number of ranks", dropout[0])


def _checkpoint_to_resume(config: Config, checkpoints: Checkpoints) -> Path | None:
    if config.resume == "none":
        return None
    if config.resume != "auto":
        return Path(config.resume)
    found = checkpoints.all()
    return found[-1] if found else None


def _announce(config: Config, run_dir: Path, trainer: Trainer) -> None:
    place = trainer.place
    num_parameters = sum(parameter.numel() for parameter in trainer.model.parameters())
    log.info(
        "%d rank(s) on %s  global batch %d  %d steps of %d per epoch  %d parameters  %s",
        place.world_size, place.device.type, config.batch_size, trainer.num_steps, trainer.steps_per_epoch,
        num_parameters, _shown(run_dir),
    )  # fmt: skip
    if place.is_first and trainer.plan.rules:
        rows = trainer.plan.table(trainer.model)
        console.print_rows("freeze plan", ("rule", "module", "frozen", "steps"), rows)


def _shown(run_dir: Path) -> str:
    return os.path.relpath(run_dir)


def _print_summary(metrics: dict[str, float], config: Config, run_dir: Path, trainer: Trainer) -> None:
    rows = [(name, f"{metrics[name]:.4f}") for name in ("val/accuracy", "val/loss", "test/accuracy", "test/loss")]
    rows += [
        ("train/samples_per_second", f"{metrics['train/samples_per_second']:.0f}"),
        ("global batch", f"{config.batch_size} samples over {trainer.place.world_size} rank(s)"),
        ("best step", f"{trainer.counters.best_step} of {trainer.num_steps}"),
        ("run directory", _shown(run_dir)),
    ]
    console.print_table("summary (weights of the best validation)", rows)
