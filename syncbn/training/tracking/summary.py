"""The end of a multirun: a table of its jobs."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

SUMMARY = "summary.json"


def write_summary(
    run_dir: Path,
    step: int,
    metrics: dict[str, float],
    overrides: list[str],
    *,
    stopped: bool = False,
    failed: str = "",
) -> None:
    """What a run that is over has to say, for the table of a sweep and for a run that is asked again.

    Args:
        step: the number of steps done; -1 for a run that failed.
        stopped: training ended before its last step, and will again.
        failed: why it failed.
    """
    numbers = {name: value if math.isfinite(value) else str(value) for name, value in metrics.items()}
    content = {"step": step, "metrics": numbers, "overrides": overrides, "stopped": stopped, "failed": failed}
    (run_dir / SUMMARY).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def read_summary(run_dir: Path) -> dict[str, Any] | None:
    """The summary of a run that is over; None if there is none."""
    path = run_dir / SUMMARY
    if not path.exists():
        return None
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    content["metrics"] = {name: float(value) for name, value in content["metrics"].items()}
    return content


def print_table(sweep_dir: Path) -> None:
    """A row per job of a multirun: its overrides but for those of all jobs, its final metrics, or why it failed."""
    from syncbn.training.tracking import console

    jobs = sorted((path.parent for path in sweep_dir.glob(f"*/{SUMMARY}")), key=lambda path: path.name.zfill(9))
    if not jobs:  # of a task that leaves none, such as audit: each job has printed its own
        return
    summaries = [(job.name, read_summary(job) or {}) for job in jobs]
    found = dict.fromkeys(name for _, s in summaries for name in s.get("metrics", {}))
    splits = ("val", "test", "precise/val", "precise/test")
    names = [name for name in found if name.rpartition("/")[0] in splits]  # not each class
    names = [name for name in names if not name.endswith("/loss")] or names
    names += sorted(name for name in found if name.startswith("drift/"))
    given = [[override.lstrip("+") for override in s["overrides"]] for _, s in summaries]
    common = set(given[0]).intersection(*given[1:]) if len(given) > 1 else set()
    rows = [
        (
            job,
            " ".join(text for text in texts if text not in common),
            *(f"{s['metrics'][n]:.4g}" if n in s["metrics"] else "" for n in names),
            s["failed"],
        )
        for (job, s), texts in zip(summaries, given, strict=True)
    ]
    headers = ("job", "overrides", *names, "failed")
    if not any(row[-1] for row in rows):
        headers, rows = headers[:-1], [row[:-1] for row in rows]
    console.print_rows(f"sweep {sweep_dir}", headers, rows)
