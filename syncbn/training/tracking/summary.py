"""`summary.json`: how a run ended, for the table of a multirun and for a command that resumes a finished run."""

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
    """Writes the summary of a run that has ended; metrics that are not finite become strings.

    Args:
        step: the number of steps done; -1 for a run that failed, and 0 for a task without training.
        overrides: those of the command line, without secrets.
        stopped: training ended before its last step, and would end there again.
        failed: the reason of a failure; empty if there was none.
    """
    numbers = {name: value if math.isfinite(value) else str(value) for name, value in metrics.items()}
    content = {"step": step, "metrics": numbers, "overrides": overrides, "stopped": stopped, "failed": failed}
    write_text(run_dir / SUMMARY, json.dumps(content, indent=1) + "\n")


def read_summary(run_dir: Path) -> dict[str, Any] | None:
    """The content of `summary.json`, its metrics as floats; None if the file does not exist."""
    path = run_dir / SUMMARY
    if not path.exists():
        return None
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    content["metrics"] = {name: float(value) for name, value in content["metrics"].items()}
    return content
