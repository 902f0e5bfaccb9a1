"""The end of a multirun: a table of its jobs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from hydra.experimental.callback import Callback
from omegaconf import DictConfig

from syncbn.training import launch

SUMMARY = "summary.json"


def write_summary(run_dir: Path, step: int, metrics: dict[str, float], overrides: list[str]) -> None:
    """What a finished run has to say, for the table of a sweep and for a run that is asked again."""
    content = {"step": step, "metrics": metrics, "overrides": overrides}
    (run_dir / SUMMARY).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def read_summary(run_dir: Path) -> dict[str, Any] | None:
    """The summary of a finished run; None if there is none."""
    path = run_dir / SUMMARY
    if not path.exists():
        return None
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return content


class SweepTable(Callback):
    """Hydra calls this when all jobs of a multirun are done."""

    def on_multirun_end(self, config: DictConfig, **_: Any) -> None:
        """Prints a row per job: what was overridden, and its final metrics."""
        if launch.rank() != 0:
            return
        from syncbn.training import console

        jobs = sorted(
            (path.parent for path in Path(config.hydra.sweep.dir).glob(f"*/{SUMMARY}")),
            key=lambda path: path.name.zfill(9),
        )
        summaries = [(job.name, read_summary(job) or {}) for job in jobs]
        names = [name for name in ("val/accuracy", "test/accuracy") if any(name in s["metrics"] for _, s in summaries)]
        names += sorted({name for _, s in summaries for name in s["metrics"] if name.startswith("drift/")})
        rows = [
            (job, " ".join(s["overrides"]), *(f"{s['metrics'][n]:.4g}" if n in s["metrics"] else "" for n in names))
            for job, s in summaries
        ]
        console.print_rows(f"sweep {config.hydra.sweep.dir}", ("job", "overrides", *names), rows)
