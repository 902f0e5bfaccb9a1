"""What `train.py` does with a checked configuration: build everything, run the task, close everything."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import torch
from omegaconf import OmegaConf
from torch import nn

from syncbn.nn import debugging
from syncbn.nn.groups import treat_as_world_of_one
from syncbn.training import console, launch, losses, models, overfitting, state, world
from syncbn.training import data as datasets
from syncbn.training.checks import build_freeze_plan, check_model
from syncbn.training.config import Config, ConfigError
from syncbn.training.environment import describe
from syncbn.training.loop import Trainer
from syncbn.training.metrics import evaluate as evaluate_split
from syncbn.training.parsing import apply_overrides, parse, to_dict
from syncbn.training.place import Place
from syncbn.training.pretrained import Drift, load_subnet
from syncbn.training.redaction import redact, redacted
from syncbn.training.resuming import checkpoint_to_resume, cut_back, merge_with_stored, require_secrets
from syncbn.training.sampling import Sampler
from syncbn.training.stopping import StopRequest
from syncbn.training.sweep import read_summary, write_summary
from syncbn.training.tracker import Tracker

log = logging.getLogger(__name__)

DTYPES = {"fp64": torch.float64}  # of parameters and images; anything else: float32
AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


def run(config: Config, run_dir: Path, job: str = "0", overrides: Sequence[str] = ()) -> dict[str, float]:
    """Runs the task on this rank; returns its metrics (the same on every rank).

    Args:
        job: a name that differs between the jobs of one multirun.
        overrides: what was given on the command line; a resumed run compares it with its stored configuration.

    Raises:
        ConfigError: a mistake in the configuration, found before training starts.
    """
    if not world.is_distributed():
        treat_as_world_of_one()
    device = _device(config)
    place = place_for(config, Place(world.rank(), world.world_size(), device, torch.float32))
    debugging.enabled |= config.bn.debug
    # The tracker ends after the group: the other ranks need not wait for an upload.
    with ExitStack() as tracking, launch.process_group(device.type, job, config.collective_timeout):
        if config.task == "eval":
            return evaluate(config, run_dir, place)
        return train(config, run_dir, place, overrides, tracking)


def evaluate(config: Config, run_dir: Path, place: Place) -> dict[str, float]:
    """`task=eval`: validation and test metrics of a run or checkpoint, by the configuration of its training."""
    if state.newest(run_dir) is not None:
        raise ConfigError(
            f"run: {_shown(run_dir)} holds a training run; evaluate it from another, load={_shown(run_dir)}"
        )
    assert config.load is not None
    path = Path(config.load)
    path = state.best_or_newest(path, "load") if path.is_dir() else path
    checkpoint = state.read(path, "load")
    if "config" not in checkpoint or "model" not in checkpoint:
        raise ConfigError(f"load: {config.load!r} is not a checkpoint of a run; expected one that train.py wrote")
    stored = apply_overrides(checkpoint["config"], launch.held_back())
    require_secrets(stored, path, unused=("tracker", "init"))
    config = parse(stored)
    place = place_for(config, place)
    data, model = _build(config, place)
    # A run with averaged weights evaluates those.
    state.load_into(model, checkpoint.get("average", checkpoint["model"]), path, "load")
    loss = losses.build(config.loss)
    metrics: dict[str, float] = {}
    for name, split in (("val", data.val), ("test", data.test)):
        values = evaluate_split(model, data, split, loss, place)
        metrics |= {f"{name}/{key}": value for key, value in values.items()}
    tracker = replace(config.tracker, mode="disabled")
    with Tracker(tracker, run_dir, redacted(to_dict(config)), active=place.is_first) as records:
        records.start()
        records.log(checkpoint["step"], metrics)
    if place.is_first:
        rows = [(name, f"{value:.4f}") for name, value in metrics.items()]
        console.print_table(f"{path}, step {checkpoint['step']}", [*rows, ("run directory", _shown(run_dir))])
    return metrics


def train(
    config: Config, run_dir: Path, place: Place, overrides: Sequence[str], tracking: ExitStack
) -> dict[str, float]:
    """`task=train`; `tracking` closes the tracker."""
    stop = StopRequest()
    with stop.listen():
        return _train(config, run_dir, place, overrides, tracking, stop)


def _train(
    config: Config, run_dir: Path, place: Place, overrides: Sequence[str], tracking: ExitStack, stop: StopRequest
) -> dict[str, float]:
    checkpoint = checkpoint_to_resume(config, run_dir)
    _require_shared(run_dir, checkpoint)
    if checkpoint is not None:
        config = merge_with_stored(config, checkpoint, overrides)
    data, model = _build(config, place)
    drift = Drift()
    for name, init in config.init.items() if checkpoint is None else ():
        load_subnet(model, name, init)
        drift.remember(model, name)
    sampler = Sampler(len(data.train), config.batch_size, config.accumulate, config.seed, place.rank, place.world_size)
    plan = build_freeze_plan(config, model, sampler.steps_per_epoch)
    check_model(model, data, sampler, place)
    config_dict = redacted(to_dict(config))
    if place.is_first:
        (run_dir / "config.yaml").write_text(OmegaConf.to_yaml(OmegaConf.create(config_dict)), encoding="utf-8")
        cut_back(run_dir / "metrics.jsonl", None if checkpoint is None else state.step_of(checkpoint))
    environment = describe(place, overrides)
    if place.is_first:
        (run_dir / "environment.json").write_text(json.dumps(environment, indent=2) + "\n", encoding="utf-8")
    tracked = {**config_dict, "environment": environment}
    tracker = tracking.enter_context(Tracker(config.tracker, run_dir, tracked, active=place.is_first))
    loss = losses.build(config.loss)
    trainer = Trainer(config, run_dir, place, data, sampler, model, loss, plan, tracker, drift, stop)
    if checkpoint is not None:
        trainer.resume(checkpoint)
        log.info("resumed from %s at step %d", _shown(checkpoint), trainer.counters.step)
    elif place.is_first:
        trainer.checkpoints.begin(0)
    tracker.start()
    _announce(run_dir, trainer, overrides)
    metrics = _metrics_of_finished(run_dir, trainer)
    if metrics is not None:
        log.info("this run is finished; the test set has been used and is not used again")
        tracker.log(trainer.counters.step, {key: value for key, value in metrics.items() if key.startswith("test/")})
    else:
        metrics = trainer.run(config_dict)
    if place.is_first:
        shown = [redact(override) for override in overrides]
        stopped = trainer.counters.step < trainer.num_steps
        write_summary(run_dir, trainer.counters.step, metrics, shown, stopped=stopped)
        _print_summary(metrics, run_dir, trainer)
    if config.overfit is not None:
        overfitting.judge(config.overfit, metrics["val/accuracy"], metrics["val/loss"], trainer.counters.step, model)
    return metrics


def _metrics_of_finished(run_dir: Path, trainer: Trainer) -> dict[str, float] | None:
    """What a run that was finished before has told; None for a run that has something to do."""
    summary = read_summary(run_dir)
    if summary is None or summary["step"] != trainer.counters.step:
        return None
    would_stop_again = summary["stopped"] and trainer.config.on_nonfinite == "stop"
    return summary["metrics"] if would_stop_again or trainer.counters.step == trainer.num_steps else None


def _require_shared(run_dir: Path, checkpoint: Path | None) -> None:
    """Raises a ConfigError, on every rank, unless all ranks see the same run directory."""
    mark = run_dir / ".shared"
    if world.rank() == 0:
        mark.touch()
    found = world.on_all_ranks(None if checkpoint is None else checkpoint.name)
    visible = world.on_all_ranks(mark.exists())
    if world.rank() == 0:
        mark.unlink()
    if len(set(found)) > 1 or not all(visible):
        other = next(rank for rank in range(len(found)) if found[rank] != found[0] or not visible[rank])
        raise ConfigError(
            f"run: rank {other} does not see the directory {_shown(run_dir)} of rank 0 (checkpoint there: {found[0]},"
            f" here: {found[other]}); outputs/ has to be on storage that all machines share"
        )


def _build(config: Config, place: Place) -> tuple[datasets.Data, nn.Module]:
    """Data and model; the same initial weights on every rank."""
    data = datasets.load(config.data)
    if config.overfit is not None:
        data = overfitting.only_a_few(data, config.overfit)
    torch.manual_seed(config.seed)
    model = models.build(config.model, config.bn, data.num_channels, data.num_classes)
    return data, model.to(place.device, place.dtype)


def place_for(config: Config, place: Place) -> Place:
    """`place` with the precision of this configuration."""
    autocast = AUTOCAST.get(config.precision)
    return replace(place, dtype=DTYPES.get(config.precision, torch.float32), autocast=autocast)


def _device(config: Config) -> torch.device:
    if config.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device: cuda is not available here; use device=cpu or device=auto")
    if config.device == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    torch.cuda.set_device(device)
    return device


def _announce(run_dir: Path, trainer: Trainer, overrides: Sequence[str]) -> None:
    num_parameters = sum(parameter.numel() for parameter in trainer.model.parameters())
    place = trainer.place
    if overrides:
        log.info("overrides: %s", " ".join(overrides))
    log.info(
        "%d rank(s) on %s  global batch %d  %d steps of %d per epoch  %d parameters  %s",
        place.world_size, place.device.type, trainer.config.batch_size, trainer.num_steps, trainer.steps_per_epoch,
        num_parameters, _shown(run_dir),
    )  # fmt: skip
    if place.is_first and trainer.plan.rules:
        rows = trainer.plan.table(trainer.model)
        console.print_rows("freeze plan", ("rule", "module", "frozen", "steps"), rows)


def _shown(path: Path) -> str:
    return os.path.relpath(path)


def _print_summary(metrics: dict[str, float], run_dir: Path, trainer: Trainer) -> None:
    names = ["val/accuracy", "val/loss", "test/accuracy", "test/loss", *(n for n in metrics if n.startswith("drift/"))]
    rows = [(name, f"{metrics[name]:.4f}") for name in names]
    rows += [
        ("train/samples_per_second", f"{metrics['train/samples_per_second']:.0f}"),
        ("global batch", f"{trainer.config.batch_size} samples over {trainer.place.world_size} rank(s)"),
        ("best step", f"{trainer.counters.best_step} of {trainer.num_steps}"),
        ("run directory", _shown(run_dir)),
    ]
    console.print_table("summary (weights of the best validation)", rows)
