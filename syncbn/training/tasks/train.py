"""`task=train`: builds a run or resumes it, trains, and writes its summary."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from contextlib import ExitStack, nullcontext
from pathlib import Path

from omegaconf import OmegaConf

from syncbn.atomic_write import write_text
from syncbn.nn import rank_checks
from syncbn.report import file_names
from syncbn.report.metric_names import TEST, THROUGHPUT, TRAIN, VAL, VAL_ACCURACY, VAL_LOSS, WAITED, below
from syncbn.training.checkpoint import files
from syncbn.training.checkpoint.paths import step_of
from syncbn.training.checkpoint.resume import checkpoint_to_resume, is_below, merge_with_stored, record_classes
from syncbn.training.config.errors import ConfigError, configured_by
from syncbn.training.config.redaction import redact
from syncbn.training.config.run_files import require_regular_files
from syncbn.training.config.schema import Config
from syncbn.training.distributed import world
from syncbn.training.distributed.failures import failing_together
from syncbn.training.distributed.rank_context import RankContext
from syncbn.training.distributed.stopping import StopRequest, deferred
from syncbn.training.tasks import audit
from syncbn.training.tasks.report import EndOfRun
from syncbn.training.tracking import console
from syncbn.training.tracking.console import shown
from syncbn.training.tracking.environment import describe
from syncbn.training.tracking.summary import read_summary, write_summary
from syncbn.training.tracking.tensorboard_run import require_installed
from syncbn.training.tracking.tracker import Tracker, cut_back
from syncbn.training.trainer import execution, graph_checks, native_checks, overfit
from syncbn.training.trainer.build import build_components, context_for
from syncbn.training.trainer.trainer import Trainer

log = logging.getLogger(__name__)


def train(
    config: Config, run_dir: Path, context: RankContext, overrides: Sequence[str], tracking: ExitStack
) -> dict[str, float]:
    """Trains, or resumes the run of `run_dir`; every rank calls it.

    Args:
        context: this rank and its device; dtypes and memory format are set here.
        tracking: an exit stack of the caller, which closes the tracker and then delivers a deferred SIGTERM.

    Returns:
        The final metrics; all but the throughput are the same on every rank.

    Raises:
        ConfigError: a mistake in the configuration, found before training starts.
    """
    tracking.enter_context(deferred())
    stop = StopRequest()
    with stop.listen():
        with failing_together():
            require_regular_files(run_dir)
            checkpoint = checkpoint_to_resume(config, run_dir)
        _require_shared(run_dir, checkpoint)
        if checkpoint is not None:
            with failing_together():
                command, config = config, merge_with_stored(config, checkpoint, overrides)
                if not is_below(checkpoint.path, run_dir):  # a stranger's checkpoint must not upload this run
                    config.tracker.mode = command.tracker.mode
        # From the stored configuration of the run: the command that resumes it need not repeat the options.
        context = context_for(config, context)
        with nullcontext() if checkpoint is None else configured_by(checkpoint.path, overrides):
            native_checks.check(config)
            execution.check(config, context.device)
            if config.tracker.tensorboard:
                require_installed()
            graph_checks.check(config, context.device, context.world_size)
        with execution.applied(config), rank_checks.enabling(config.bn.debug):
            return _train(config, run_dir, context, checkpoint, overrides, tracking, stop)


def _train(
    config: Config,
    run_dir: Path,
    context: RankContext,
    checkpoint: files.StoredCheckpoint | None,
    overrides: Sequence[str],
    tracking: ExitStack,
    stop: StopRequest,
) -> dict[str, float]:
    with nullcontext() if checkpoint is None else configured_by(checkpoint.path, overrides):
        components = build_components(config, context, checkpoint)
    model, plan, sampler, config_dict = components.model, components.plan, components.sampler, components.config_dict
    if context.is_first:
        write_text(run_dir / file_names.CONFIG, OmegaConf.to_yaml(OmegaConf.create(config_dict)))
        cut_back(run_dir / file_names.METRICS, None if checkpoint is None else step_of(checkpoint.path))
    record_classes(run_dir, components.data.class_names, context)
    environment = describe(context, overrides)
    if context.is_first:
        write_text(run_dir / file_names.ENVIRONMENT, json.dumps(environment, indent=2) + "\n")
    tracked = {**config_dict, "environment": environment}
    tracker = tracking.enter_context(Tracker(config.tracker, run_dir, tracked, active=context.is_first))
    if context.is_first and config.tracker.report:
        tracking.push(EndOfRun(run_dir, overrides).end)  # before wandb's upload, which may take long or fail
    trainer = Trainer(components, run_dir, tracker, stop, graph_checks.capture_for(config, context.device))
    if checkpoint is not None:
        trainer.resume(checkpoint)
        log.info("resumed from %s at step %d", shown(checkpoint.path), trainer.counters.step)
    elif context.is_first:
        trainer.checkpoints.begin(0)
    metrics = _metrics_of_finished(run_dir, trainer)
    if metrics is None and config.audit.level != "off":
        findings = audit.audit_at(model, plan, sampler, trainer.counters.step)
        audit.record(findings, trainer.counters.step, run_dir, context, ("error", "warning"))
        audit.stop_at_errors(findings, config.audit, run_dir)
    tracker.start(trainer.counters.step)
    _announce(run_dir, trainer, overrides)
    if metrics is not None:
        tested = {name: metrics[name] for name in below(TEST, metrics)}
        log.info("this run is finished%s", "; the test set has been used and is not used again" if tested else "")
        if tested:
            tracker.log(trainer.counters.step, tested)
    else:
        metrics = trainer.run()
    if context.is_first:
        given = [redact(override) for override in overrides]
        stopped = trainer.counters.step < trainer.num_steps
        write_summary(run_dir, trainer.counters.step, metrics, given, stopped=stopped)
        _print_summary(metrics, run_dir, trainer)
    if config.overfit is not None:
        overfit.judge(config.overfit, metrics[VAL_ACCURACY], metrics[VAL_LOSS], trainer.counters.step, model)
    return metrics


def _metrics_of_finished(run_dir: Path, trainer: Trainer) -> dict[str, float] | None:
    """The final metrics of a run that has finished before; None for a run with steps left to do."""
    summary = read_summary(run_dir)
    if summary is None or summary["step"] != trainer.counters.step:
        return None
    if THROUGHPUT not in summary["metrics"]:
        log.warning("%s is not that of a training run; it is passed over", run_dir / file_names.SUMMARY)
        return None
    would_stop_again = summary["stopped"] and (trainer.config.on_nonfinite == "stop" or trainer.ends_early())
    return summary["metrics"] if would_stop_again or trainer.counters.step >= trainer.num_steps else None


def _require_shared(run_dir: Path, checkpoint: files.StoredCheckpoint | None) -> None:
    """Raises a ConfigError, on every rank, unless all ranks see the same run directory."""
    mark = run_dir / ".shared"
    if world.rank() == 0:
        mark.touch()
    found = world.on_all_ranks(None if checkpoint is None else checkpoint.path.name)
    visible = world.on_all_ranks(mark.exists())
    if world.rank() == 0:
        mark.unlink()
    if len(set(found)) > 1 or not all(visible):
        other = next(rank for rank in range(len(found)) if found[rank] != found[0] or not visible[rank])
        raise ConfigError(
            f"run: rank {other} does not see the directory {shown(run_dir)} of rank 0 (checkpoint there: {found[0]},"
            f" here: {found[other]}); output_dir has to be on storage that all machines share"
        )


def _announce(run_dir: Path, trainer: Trainer, overrides: Sequence[str]) -> None:
    num_parameters = sum(parameter.numel() for parameter in trainer.model.parameters())
    context = trainer.context
    if overrides:
        log.info("overrides: %s", " ".join(overrides))
    log.info(
        "%d rank(s) on %s  global batch %d  %d steps of %d per epoch  %d parameters  %s",
        context.world_size, context.device.type, trainer.config.batch_size, trainer.num_steps, trainer.steps_per_epoch,
        num_parameters, shown(run_dir),
    )  # fmt: skip
    if context.is_first and trainer.plan.rules:
        rows = trainer.plan.table(trainer.model)
        console.print_rows("freeze plan", ("rule", "module", "frozen", "steps"), rows)
    if context.is_first and len(trainer.built.groups) > 1:
        header = ("group", "parameters", "tensors", "lr_scale", "weight decay")
        console.print_rows("parameter groups of the optimizer", header, trainer.built.table())


def _by_split(name: str) -> int:
    """Sort key of metric names in the summary: validation first, then test, then the rest."""
    return next((position for position, split in enumerate((VAL, TEST)) if name.startswith(f"{split}/")), 2)


def _print_summary(metrics: dict[str, float], run_dir: Path, trainer: Trainer) -> None:
    names = sorted((name for name in metrics if not name.startswith(f"{TRAIN}/")), key=_by_split)
    rows = [(name, f"{metrics[name]:.4f}") for name in names]
    best = trainer.counters.best_step  # 0: of a finished run whose best weights are gone
    rows += [
        (THROUGHPUT, f"{metrics[THROUGHPUT]:.0f}"),
        *([("waited for data", f"{100 * metrics[WAITED]:.1f} % of the time")] if WAITED in metrics else []),
        ("global batch", f"{trainer.config.batch_size} samples over {trainer.context.world_size} rank(s)"),
        *([("best step", f"{best} of {trainer.num_steps}")] if best else []),
        ("run directory", shown(run_dir)),
    ]
    console.print_table("summary (weights of the best validation)", rows)
