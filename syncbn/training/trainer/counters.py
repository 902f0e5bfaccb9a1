"""Where a run is, how fast it goes, and when the next checkpoint is due."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from syncbn.training.config.duration import Duration


class Counters:
    """Where the run is: steps done, and the best validation so far."""

    def __init__(self) -> None:
        self.step = 0
        self.best: dict[str, float] = {}  # all of its metrics
        self.best_step = 0
        self.evaluated_step = 0
        self.steps_left_out = 0

    def is_best(self, metrics: dict[str, float], by: str, lowest: bool = False) -> bool:
        """Whether this validation, of the present step, beats all before; then it is the best from now on.

        Args:
            metrics: without the name of the split; among them `loss` and `by`.
            by: the metric that decides, and among equals the lower loss.
            lowest: the lower the better, and not the higher.
        """

        def rank(of: dict[str, float]) -> tuple[float, float]:
            values = -of.get("loss", math.nan), of.get(by, math.nan) * (-1 if lowest else 1)
            # NaN compares as neither better nor worse
            loss, score = (value if math.isfinite(value) else -math.inf for value in values)
            return score, loss

        if self.best and rank(metrics) <= rank(self.best):
            return False
        self.best, self.best_step = dict(metrics), self.step
        return True

    def forget_best(self) -> None:
        """Whatever is validated next is the best."""
        self.best, self.best_step, self.evaluated_step = {}, 0, 0

    def state_dict(self) -> dict[str, Any]:
        """All of them."""
        return dict(vars(self))

    def load_state_dict(self, state_dict: dict[str, Any], /) -> None:
        """Takes them over."""
        vars(self).update(state_dict)


class Totals:
    """Sums since the last log line, on the device: loss, what the loss counts, gradient norms, updates."""

    def __init__(self, device: torch.device) -> None:
        self.values = torch.zeros(4, dtype=torch.float64, device=device)

    def state_dict(self) -> dict[str, Any]:
        """All, so that the first log line after a resume is that of an uninterrupted run."""
        return {"values": self.values}

    def load_state_dict(self, state_dict: dict[str, Any], /) -> None:
        """Takes them over."""
        self.values.copy_(state_dict["values"])

    def take(self) -> tuple[float | None, float | None]:
        """Means of loss and gradient norm, starting anew (None: every step was left out); the one wait for the device
        of a logging step.
        """
        loss_sum, count, norm_sum, updates = self.values.tolist()
        self.values.zero_()
        return loss_sum / count if count else None, norm_sum / updates if updates else None


class Throughput:
    """Samples per second of training alone: evaluation and checkpoints do not count."""

    def __init__(self) -> None:
        self._samples = self._all_samples = 0
        self._seconds = self._all_seconds = 0.0
        self._since = time.perf_counter()

    def start(self) -> None:
        """Training goes on from here."""
        self._since = time.perf_counter()

    def add(self, samples: int) -> None:
        """Counts the samples of a step, over all ranks."""
        self._samples += samples

    def samples_per_second(self) -> float:
        """Since the last call."""
        self._stop()
        rate = self._samples / max(self._seconds, 1e-9)
        self._all_samples, self._all_seconds = self._all_samples + self._samples, self._all_seconds + self._seconds
        self._samples, self._seconds = 0, 0.0
        return rate

    def overall(self) -> float:
        """Since the start."""
        return self._all_samples / max(self._all_seconds, 1e-9)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """A context whose time does not count."""
        self._stop()
        try:
            yield
        finally:
            self.start()

    def _stop(self) -> None:
        now = time.perf_counter()
        self._seconds += now - self._since
        self._since = now


class SaveClock:
    """When the next checkpoint is due: every so many steps, or minutes."""

    def __init__(self, every: Duration, steps_per_epoch: int) -> None:
        self._seconds = every.value * 60 if every.unit == "minutes" else None
        self._steps = None if every.unit == "minutes" else max(1, every.in_steps(steps_per_epoch))
        self._last = time.monotonic()

    @property
    def goes_by_time(self) -> bool:
        """Whether the clock on the wall decides, which differs between ranks."""
        return self._seconds is not None

    def is_due(self, step: int) -> bool:
        """Whether to save after this many steps."""
        if self._steps is not None:
            return step % self._steps == 0
        assert self._seconds is not None
        if time.monotonic() - self._last < self._seconds:
            return False
        self._last = time.monotonic()
        return True
