"""`summary.json`: how a run ended, for the table of a multirun and for a command that resumes a finished run."""

from __future__ import annotations

import json
import logging
import math
from pathlib import Path
from typing import Any

from syncbn.atomic_write import write_text
from syncbn.report import file_names
from syncbn.training.config.run_files import read_json

log = logging.getLogger(__name__)


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
    write_text(run_dir / file_names.SUMMARY, json.dumps(content, indent=1) + "\n")


def read_summary(run_dir: Path) -> dict[str, Any] | None:
    """The content of `summary.json`, its metrics as floats; None without one, or with a warning if it is damaged."""
    path = run_dir / file_names.SUMMARY
    try:
        return _checked(read_json(path))
    except FileNotFoundError:
        return None
    except ValueError as error:
        log.warning("%s %s; it is passed over", path, error)
        return None


def _checked(content: Any) -> dict[str, Any]:
    """The content as `write_summary` wrote it; a ValueError for any other."""
    kinds = {"step": int, "metrics": dict, "overrides": list, "stopped": bool, "failed": str}
    if not isinstance(content, dict) or not all(isinstance(content.get(key), kind) for key, kind in kinds.items()):
        raise ValueError(f"is no summary of a run, with the keys {', '.join(kinds)}")
    try:
        metrics = {name: float(value) for name, value in content["metrics"].items()}
    except (TypeError, ValueError, OverflowError):
        raise ValueError("has a metric that is no number") from None
    return {**content, "metrics": metrics, "overrides": [str(override) for override in content["overrides"]]}
