"""`task=eval`: validation and test metrics of a run or checkpoint, by the configuration of its training."""

from __future__ import annotations

from pathlib import Path

from syncbn.report.metric_names import EVAL, PRECISE, VAL, prefixed
from syncbn.training.config.schema import Config
from syncbn.training.distributed.rank_context import RankContext
from syncbn.training.evaluation.mistakes import write_mistakes
from syncbn.training.tasks.loaded import load_run
from syncbn.training.tasks.recalibrate import recalibrate
from syncbn.training.tracking import console
from syncbn.training.tracking.console import shown


def run(config: Config, run_dir: Path, context: RankContext) -> dict[str, float]:
    """Evaluates the checkpoint that `load` names on validation and test data, or on `eval.path`; every rank calls it.

    With `eval.precise_bn` it is evaluated a second time, with population statistics (`precise/val/...`). What it gets
    wrong is written for the report, unless the run was to have none.

    Returns:
        The metrics, the same on every rank.
    """
    loaded = load_run(config, run_dir, context)
    mistakes = loaded.mistakes()
    metrics = loaded.evaluate("val", "test", mistakes=mistakes)
    if mistakes is not None:
        write_mistakes(run_dir, loaded.step, mistakes, writes=context.is_first)
    if config.eval.path is not None:  # all of that folder is the validation split
        metrics = prefixed(EVAL, {name.removeprefix(f"{VAL}/"): value for name, value in metrics.items()})
    rows = []
    if config.eval.precise_bn is not None:
        found = recalibrate(loaded, config.eval.precise_bn)
        metrics |= prefixed(PRECISE, loaded.evaluate("val", "test"))
        rows.append(("precise statistics of", found.describe()))
    loaded.record(run_dir, metrics)
    if context.is_first:
        rows = [*((name, f"{value:.4f}") for name, value in metrics.items()), *rows]
        console.print_table(
            loaded.describe(),
            [*rows, *([("data", config.eval.path)] if config.eval.path else []), ("run directory", shown(run_dir))],
        )
    return metrics
