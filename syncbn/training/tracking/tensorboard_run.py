"""TensorBoard event files of a run, by torch's own writer, whose thread does the writing."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from torch import Tensor

from syncbn.report import file_names
from syncbn.report.metric_names import STEP
from syncbn.training.config.errors import ConfigError, one_line

log = logging.getLogger(__name__)

_QUEUE = 1000  # events that wait for the writer's thread before logging waits for it


def require_installed() -> None:
    """Raises a ConfigError unless the package is there that torch's writer needs."""
    if find_spec("tensorboard") is None:
        raise ConfigError("tracker.tensorboard: needs the package tensorboard, which is not installed; pip install"
                          " tensorboard, or choose tracker=none")  # fmt: skip


class TensorBoardRun:
    """Writes scalars and histograms under their names. The first failure is one warning, and nothing is written after.

    Args:
        run_dir: the files are made in its directory `tensorboard`, one more for each attempt.
        step: the step at which the attempt begins; what earlier attempts wrote of later steps is hidden.
        config: of the run, shown as text.
    """

    def __init__(self, run_dir: Path, step: int, config: Mapping[str, Any]) -> None:
        self._writer: Any = None
        self._try(lambda: self._open(run_dir / file_names.TENSORBOARD, step, config))

    def log(self, step: int, record: Mapping[str, Any], histograms: Mapping[str, Tensor]) -> None:
        """Writes numbers, and histograms of vectors, by name."""
        if self._writer is not None:
            self._try(lambda: self._write(step, record, histograms))

    def close(self) -> None:
        """Writes what is left."""
        if self._writer is not None:
            self._try(self._writer.close)

    def _open(self, directory: Path, step: int, config: Mapping[str, Any]) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(directory), purge_step=step + 1 if step else None, max_queue=_QUEUE)
        text = json.dumps(config, indent=1, default=str)
        self._writer.add_text("config", "".join(f"    {line}\n" for line in text.splitlines()), step)

    def _write(self, step: int, record: Mapping[str, Any], histograms: Mapping[str, Tensor]) -> None:
        for name, value in record.items():
            if name != STEP and isinstance(value, int | float):
                self._writer.add_scalar(name, value, step)
        for name, vector in histograms.items():
            self._writer.add_histogram(name, vector.numpy(), step)

    def _try(self, action: Callable[[], Any]) -> None:
        try:
            action()
        except Exception as error:  # of whatever kind: metrics.jsonl has everything
            self._writer = None
            log.warning("TensorBoard failed and is switched off, metrics.jsonl goes on: %s", one_line(error))
