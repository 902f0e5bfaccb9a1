"""Tracking: metrics.jsonl always, wandb beside it. Written by rank 0; tracking can fail, training goes on."""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TextIO

from torch import Tensor

from syncbn.stats.monitor import LayerSnapshot
from syncbn.training.config import TrackerConfig

log = logging.getLogger(__name__)


class Tracker:
    """One record per logged step, flat keys with `/`, in `metrics.jsonl` and in wandb.

    Off rank 0 every method does nothing.
    """

    def __init__(self, config: TrackerConfig, run_dir: Path, full_config: dict[str, Any], *, active: bool) -> None:
        self._active = active
        self._file: TextIO | None = None
        self._wandb: Any = None
        if not active:
            return
        # Line-buffered: a line is written whole or, after a kill, not at all.
        self._file = (run_dir / "metrics.jsonl").open("a", buffering=1, encoding="utf-8")
        if config.mode != "disabled":
            self._guard(lambda: self._start_wandb(config, run_dir, full_config))

    def log(self, step: int, metrics: Mapping[str, float], layers: Mapping[str, LayerSnapshot] | None = None) -> None:
        """Records numbers, and per layer scalars under `bn/<layer>/` (in wandb histograms over channels too)."""
        if self._file is None:
            return
        record: dict[str, Any] = {"step": step, **metrics}
        for name, layer in (layers or {}).items():
            record |= {f"bn/{name}/{key}": value for key, value in layer.scalars().items()}
        self._file.write(json.dumps({key: _jsonable(value) for key, value in record.items()}) + "\n")
        if self._wandb is not None:
            self._guard(lambda: self._wandb.log({**record, **self._histograms(layers or {})}))

    def summarize(self, metrics: Mapping[str, float]) -> None:
        """Final values, in wandb's summary."""
        if self._wandb is not None:
            self._guard(lambda: self._wandb.summary.update(dict(metrics)))

    def __enter__(self) -> Tracker:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.close(failed=kind is not None)

    def close(self, *, failed: bool = False) -> None:
        """Ends the wandb run and closes the file."""
        if self._wandb is not None:
            self._guard(lambda: self._wandb.finish(exit_code=int(failed)))
        if self._file is not None:
            self._file.close()

    def _start_wandb(self, config: TrackerConfig, run_dir: Path, full_config: dict[str, Any]) -> None:
        os.environ.setdefault("WANDB_SILENT", "true")
        import wandb

        self._wandb = wandb.init(
            project=config.project,
            group=config.group or run_dir.name,
            name=run_dir.name,
            dir=run_dir,
            mode="offline" if config.mode == "offline" else "online",
            config=full_config,
            settings=wandb.Settings(silent=True, console="off"),
        )
        # One step metric for everything, so that curves from several attempts share an axis.
        self._wandb.define_metric("step")
        self._wandb.define_metric("*", step_metric="step")

    def _histograms(self, layers: Mapping[str, LayerSnapshot]) -> dict[str, Any]:
        import wandb

        return {
            f"bn/{name}/hist/{kind}": wandb.Histogram(_finite(vector))
            for name, layer in layers.items()
            for kind, vector in layer.vectors().items()
            if len(_finite(vector))
        }

    def _guard(self, action: Callable[[], Any]) -> None:
        try:
            action()
        except Exception as error:
            self._wandb = None
            log.warning("wandb failed and is switched off, metrics.jsonl goes on: %s", error)


def _finite(vector: Tensor) -> Any:
    return vector[vector.isfinite()].numpy()


def _jsonable(value: float) -> float | str:
    """JSON has no NaN and no infinity: as strings they stay readable by every parser."""
    return value if math.isfinite(value) else str(value)
