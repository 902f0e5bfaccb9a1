"""The table at the end of a multirun: a row per job, and mean and spread over folds and seeds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from syncbn.report import file_names
from syncbn.report.metric_names import DRIFT, EVAL, PRECISE, TEST, VAL, below
from syncbn.training.config.redaction import redact
from syncbn.training.launch.overrides import typed
from syncbn.training.launch.typed import as_typed
from syncbn.training.tracking.summary import read_summary

# Keys whose values make repetitions of one experiment, over which a mean says something.
REPETITIONS = ("data.fold", "seed")
_SPLITS = (VAL, TEST, EVAL, f"{PRECISE}/{VAL}", f"{PRECISE}/{TEST}")


def print_table(sweep_dir: Path) -> None:
    """Prints a row per job: overrides that not all jobs share, final metrics, the reason of a failure.

    Jobs that differ in REPETITIONS alone have two rows more: the mean and the sample standard deviation of each metric.
    """
    from syncbn.training.tracking import console

    jobs = sorted(
        (path.parent for path in sweep_dir.glob(f"*/{file_names.SUMMARY}")), key=lambda path: path.name.zfill(9)
    )
    read = [(job.name, read_summary(job)) for job in jobs]
    summaries = [(job, summary) for job, summary in read if summary is not None]
    if summaries:  # some tasks, such as audit, write no summary; each job has printed its own result
        console.print_rows(f"sweep {sweep_dir}", *rows_of(summaries))


def rows_of(summaries: Sequence[tuple[str, Mapping[str, Any]]]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Header and rows.

    Args:
        summaries: name and summary (see `tracking.summary`) of each job.
    """
    found = dict.fromkeys(name for _, summary in summaries for name in summary["metrics"])
    # Without values per class, which are one level deeper.
    names = [name for name in found if name.rpartition("/")[0] in _SPLITS]
    names = [name for name in names if not name.endswith("/loss")] or names
    names += sorted(below(DRIFT, found))
    given = [[override.lstrip("+") for override in summary["overrides"]] for _, summary in summaries]
    common = set(given[0]).intersection(*given[1:]) if len(given) > 1 else set()
    differing = [[text for text in texts if text not in common] for texts in given]
    own = [[redact(text) for text in as_typed(texts, typed())] for texts in differing]
    rows = [
        (job, " ".join(texts), *_cells([summary["metrics"]], names, mean), summary["failed"])
        for (job, summary), texts in zip(summaries, own, strict=True)
    ]
    for shared, repetitions in _repeated([summary for _, summary in summaries], own).items():
        whole = [summary["metrics"] for summary in repetitions if not summary["failed"]]
        lacking = "" if len(whole) == len(repetitions) else f"{len(whole)} of {len(repetitions)} jobs"
        if len(whole) > 1:
            rows += [("mean", shared, *_cells(whole, names, mean), lacking)]
            rows += [("spread", shared, *_cells(whole, names, stdev), lacking)]
    header = ("job", "overrides", *names, "failed")
    return (header, rows) if any(row[-1] for row in rows) else (header[:-1], [row[:-1] for row in rows])


def _repeated(
    summaries: Sequence[Mapping[str, Any]], own: Sequence[Sequence[str]]
) -> dict[str, list[Mapping[str, Any]]]:
    """The jobs by the overrides that are left without those of REPETITIONS; empty if no job has any of these."""
    found: dict[str, list[Mapping[str, Any]]] = {}
    for summary, texts in zip(summaries, own, strict=True):
        shared = [text for text in texts if text.partition("=")[0] not in REPETITIONS]
        if len(shared) < len(texts):
            found.setdefault(" ".join(shared), []).append(summary)
    return found


def _cells(jobs: Sequence[Mapping[str, float]], names: Sequence[str], summarize: Any) -> list[str]:
    """A cell per metric; empty where a job lacks it."""
    return [
        f"{summarize([metrics[name] for metrics in jobs]):.4g}" if all(name in metrics for metrics in jobs) else ""
        for name in names
    ]
