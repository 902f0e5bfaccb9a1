"""`debug=profile`: profiles training steps, and writes a trace per rank and a table of operators."""

from __future__ import annotations

import logging
import os
from pathlib import Path

from torch.profiler import ProfilerActivity, profile, schedule

from syncbn.report import file_names
from syncbn.training.distributed.rank_context import RankContext

log = logging.getLogger(__name__)

WARM_UP = 5  # steps before the profiled ones, with allocations, first-time choices of kernels, DDP's buckets


class Profiler:
    """Context that profiles `num_steps` steps after WARM_UP ones, and writes to `profile/` in the run directory."""

    def __init__(self, num_steps: int, run_dir: Path, context: RankContext) -> None:
        self._directory, self._context, self._num_steps = run_dir / file_names.PROFILE, context, num_steps
        self._written = False
        os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else its library prints each start and stop
        self._profile = profile(
            activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if context.device.type == "cuda" else [])],
            schedule=schedule(wait=WARM_UP - 2, warmup=2, active=num_steps, repeat=1),
            on_trace_ready=self._write,
        )

    def __enter__(self) -> Profiler:
        self._profile.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._profile.stop()
        if not self._written and self._context.is_first:
            log.warning("profile: nothing to show, the first %d steps are warm-up; give a longer duration", WARM_UP)

    def step(self) -> None:
        """Marks the end of a training step."""
        self._profile.step()

    def _write(self, profiled: profile) -> None:
        self._written = True
        self._directory.mkdir(exist_ok=True)
        profiled.export_chrome_trace(str(self._directory / f"trace-rank{self._context.rank}.json.gz"))
        if not self._context.is_first:
            return
        by = "self_cpu_time_total" if self._context.device.type == "cpu" else "self_device_time_total"
        operators = profiled.key_averages()
        table = operators.table(sort_by=by, row_limit=30, max_name_column_width=60)
        (self._directory / file_names.OPERATORS).write_text(table + "\n", encoding="utf-8")
        top = sorted(operators, key=lambda operator: -getattr(operator, by))[:5]
        total = sum(getattr(operator, by) for operator in operators) or 1.0
        log.info(
            "profile of %d step(s), rank 0, share of its own time: %s; a trace per rank (chrome://tracing) and"
            " operators.txt in %s",
            self._num_steps,
            "  ".join(f"{operator.key} {getattr(operator, by) / total:.0%}" for operator in top),
            os.path.relpath(self._directory),
        )


def build_profiler(num_steps: int | None, run_dir: Path, context: RankContext) -> Profiler | None:
    """The profiler; None if `num_steps` is None, which turns profiling off."""
    return None if num_steps is None else Profiler(num_steps, run_dir, context)
