"""`task=recalibrate`: replaces moving averages by population statistics, and writes a checkpoint with them.

What the statistics are made of is in `trainer.population`.
"""

from __future__ import annotations

from pathlib import Path

from syncbn.report import file_names
from syncbn.report.metric_names import DRIFT, PRECISE, prefixed
from syncbn.training.checkpoint import files
from syncbn.training.checkpoint.state import copied
from syncbn.training.config.parsing import to_dict
from syncbn.training.config.redaction import redacted
from syncbn.training.config.schema import Config
from syncbn.training.data.dataset import describe_data
from syncbn.training.distributed.rank_context import RankContext
from syncbn.training.losses import class_weights
from syncbn.training.tasks.loaded import LoadedRun, load_run
from syncbn.training.tracking import console
from syncbn.training.tracking.console import shown
from syncbn.training.trainer import population
from syncbn.training.trainer.population import Population


def run(config: Config, run_dir: Path, context: RankContext) -> dict[str, float]:
    """Recalibrates the model that `load` names and writes `recalibrated.pt`, which `load` and `init.*.path` accept.

    Every rank calls it. The model is evaluated on validation data before and after, so that the statistics can be
    compared; the test set is not used.

    Returns:
        `val/...` with the old statistics, `precise/val/...` with the new ones, and `drift/<layer>`, the change of the
        layer's mean (see `Moved`); the same on every rank.
    """
    loaded, path = load_run(config, run_dir, context), run_dir / file_names.RECALIBRATED
    before = loaded.evaluate("val")
    found = recalibrate(loaded, config.recalibrate.batches)
    after = loaded.evaluate("val")
    drift = prefixed(DRIFT, {name: moved.mean for name, moved in found.layers.items()})
    metrics = before | prefixed(PRECISE, after) | drift
    described = class_weights.describe(loaded.loss())  # on every rank: it may be a collective
    if context.is_first:
        content = {"step": loaded.step, "config": redacted(to_dict(loaded.config)), "weights": loaded.weights}
        content |= describe_data(loaded.data) | described
        files.write_atomically(path, copied({**content, "model": loaded.model.state_dict()}))
    loaded.record(run_dir, metrics)
    if context.is_first:
        rows = [(name, f"{value:.4f}", f"{after[name]:.4f}") for name, value in before.items()]
        console.print_rows(loaded.describe(), ("metric", "before", "after"), rows)
        moves = [(name, f"{m.mean:.4f}", f"{m.std[0]:.3f} to {m.std[1]:.3f}") for name, m in found.layers.items()]
        console.print_rows("how far statistics moved", ("layer", "mean, in std", "std, times"), moves)
        made_of = [("statistics of", found.describe()), ("written", shown(path))]
        console.print_table("population statistics", [*made_of, ("run directory", shown(run_dir))])
    return metrics


def recalibrate(loaded: LoadedRun, num_batches: int | None) -> Population:
    """Replaces the running statistics of the model, in place; see `population.recalibrate`, which it calls."""
    with loaded.loader() as loader:
        return population.recalibrate(
            loaded.model, loaded.step, loaded.config, loaded.data, loaded.context, loaded.loss(), loader,
            num_batches=num_batches,
        )  # fmt: skip
