"""`task=eval`: validation and test metrics of a run or checkpoint, by the configuration of its training."""

from __future__ import annotations

from pathlib import Path

from syncbn.report.metric_names import PRECISE, prefixed
from syncbn.training.config.schema import Config
from syncbn.training.distributed.rank_context import RankContext
from syncbn.training.tasks.loaded import load_run
from syncbn.training.tasks.recalibrate import recalibrate
from syncbn.training.tracking import console
from syncbn.training.tracking.console import shown


def run(config: Config, run_dir: Path, context: RankContext) -> dict[str, float]:
    """Evaluates the checkpoint that `load` names on validation and test data; every rank calls it.

    With `eval.precise_bn` it is evaluated a second time, with population statistics (`precise/val/...`).

    Returns:
        The metrics, the same on every rank.
    """
    loaded = load_run(config, run_dir, context)
    metrics = loaded.evaluate("val", "test")
    rows = []
    if config.eval.precise_bn is not None:
        found = recalibrate(loaded, config.eval.precise_bn)
        metrics |= prefixed(PRECISE, loaded.evaluate("val", "test"))
        rows.append(("precise statistics of", found.describe()))
    loaded.record(run_dir, metrics)
    if context.is_first:
        rows = [*((name, f"{value:.4f}") for name, value in metrics.items()), *rows]
        console.print_table(loaded.describe(), [*rows, ("run directory", shown(run_dir))])
    return metrics
