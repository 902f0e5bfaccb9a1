"""The end of a multirun: a table of its jobs."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from syncbn.atomic_write import write_text

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
    write_text(run_dir / SUMMARY, json.dumps(content, indent=1) + "\n")


def read_summary(run_dir: Path) -> dict[str, Any] | None:
    """The summary of a run that is over; None if there is none."""
    path = run_dir / SUMMARY
    if not path.exists():
        return None
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    content["metrics"] = {name: float(value) for name, value in content["metrics"].items()}
    return content
