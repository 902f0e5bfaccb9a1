"""Counters of a run: steps done, sums for the log, throughput, and when the next checkpoint is due."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch

from syncbn.report.metric_names import LOSS
from syncbn.training.config.duration import Duration
from syncbn.training.config.errors import listed

Item = TypeVar("Item")


class Counters:
    """The progress of a run: steps done, and the best validation so far; part of a checkpoint."""

    def __init__(self) -> None:
        self.step = 0
        self.best: dict[str, float] = {}  # all metrics of the best validation
        self.best_step = 0
        self.evaluated_step = 0
        self.steps_left_out = 0
        self.macro_recall: dict[str, float] = {}  # see `note_recall`

    def is_best(self, metrics: dict[str, float], by: str, lowest: bool = False) -> bool:
        """Whether this validation, of the current step, is better than all before; if so, stores it as the best.

        Args:
            metrics: names without the prefix of the split; `loss` and `by` are among them.
            by: the metric that decides; if it is equal, the lower loss does.
            lowest: whether a lower value of `by` is better.
        """

        def rank(of: dict[str, float]) -> tuple[float, float]:
            values = -of.get(LOSS, math.nan), of.get(by, math.nan) * (-1 if lowest else 1)
            # values that are not finite rank last; a comparison with NaN would always be false
            loss, score = (value if math.isfinite(value) else -math.inf for value in values)
            return score, loss

        if self.best and rank(metrics) <= rank(self.best):
            return False
        self.best, self.best_step = dict(metrics), self.step
        return True

    def note_recall(self, recall: float, ratio: float) -> None:
        """Notes the macro recall of this validation, beside the metric that chooses; after `is_best`.

        Args:
            ratio: of the most frequent class to the rarest.
        """
        noted = self.macro_recall
        noted["ratio"] = ratio
        if self.best_step == self.step:
            noted["chosen"] = recall
        if recall > noted.get("highest", -math.inf):
            noted |= {"highest": recall, "step": self.step}

    def forget_best(self) -> None:
        """Resets the best validation, so that the next one becomes the best; the highest macro recall stays noted."""
        self.best, self.best_step, self.evaluated_step = {}, 0, 0
        self.macro_recall.pop("chosen", None)

    def state_dict(self) -> dict[str, Any]:
        """All counters."""
        return dict(vars(self))

    def load_state_dict(self, state_dict: dict[str, Any], /) -> None:
        """Restores the counters; raises a ValueError if they are others than these."""
        state_dict = {"macro_recall": {}, **state_dict}  # version 0.1.0 had none
        if other := sorted(state_dict.keys() ^ vars(self).keys()):
            raise ValueError(f"its counters lack, or have besides, {listed(other)}")
        for name, value in state_dict.items():
            if isinstance(value, dict) != isinstance(getattr(self, name), dict):
                raise ValueError(f"{name} of its counters is {value!r}")
        vars(self).update(state_dict)


class Totals:
    """Sums since the last log line, on the device: loss, count of the loss, gradient norms, number of updates."""

    def __init__(self, device: torch.device) -> None:
        self.values = torch.zeros(4, dtype=torch.float64, device=device)

    def state_dict(self) -> dict[str, Any]:
        """The sums, so that the first log line after a resume equals that of an uninterrupted run."""
        return {"values": self.values}

    def load_state_dict(self, state_dict: dict[str, Any], /) -> None:
        """Restores the sums; raises a ValueError if they are others than these."""
        if state_dict["values"].shape != self.values.shape:
            raise ValueError(f"it has {state_dict['values'].numel()} totals, expected {self.values.numel()}")
        self.values.copy_(state_dict["values"])

    def take(self) -> tuple[float | None, float | None]:
        """Mean loss and mean gradient norm since the last call, each None if every step was left out; resets the sums.

        This is the one synchronization with the device of a logging step.
        """
        loss_sum, count, norm_sum, updates = self.values.tolist()
        self.values.zero_()
        return loss_sum / count if count else None, norm_sum / updates if updates else None


class Throughput:
    """Samples per second of training, and how long it waited for them; the time within `paused` does not count."""

    def __init__(self) -> None:
        self._waited = 0.0
        self._samples = self._all_samples = 0
        self._seconds = self._all_seconds = 0.0
        self._since = time.perf_counter()

    def start(self) -> None:
        """Starts the clock."""
        self._since = time.perf_counter()

    def add(self, samples: int) -> None:
        """Adds the samples of a step, over all ranks."""
        self._samples += samples

    def samples_per_second(self) -> float:
        """The throughput since the last call."""
        self._stop()
        rate = self._samples / max(self._seconds, 1e-9)
        self._all_samples, self._all_seconds = self._all_samples + self._samples, self._all_seconds + self._seconds
        self._samples, self._seconds = 0, 0.0
        return rate

    def overall(self) -> float:
        """The throughput since the start, as far as the clock has been stopped (by `paused`, say)."""
        return (self._all_samples + self._samples) / max(self._all_seconds + self._seconds, 1e-9)

    def waiting(self, batches: Iterator[Item]) -> Iterator[Item]:
        """The batches, one by one; what each takes to come is time that training waited."""
        while True:
            begun = time.perf_counter()
            try:
                batch = next(batches)
            except StopIteration:
                return
            finally:
                self._waited += time.perf_counter() - begun
            yield batch

    def waited(self) -> float:
        """The share of the time, between 0 and 1, that training waited for batches, since the start."""
        return min(1.0, self._waited / max(self._all_seconds + self._seconds, 1e-9))

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
    """Decides when a checkpoint is due: every so many steps, or every so many minutes."""

    def __init__(self, every: Duration, steps_per_epoch: int) -> None:
        self._seconds = every.value * 60 if every.unit == "minutes" else None
        self._steps = None if every.unit == "minutes" else max(1, every.in_steps(steps_per_epoch))
        self._last = time.monotonic()

    @property
    def goes_by_time(self) -> bool:
        """Whether the interval is in minutes; then `is_due` may differ between ranks."""
        return self._seconds is not None

    def is_due(self, step: int) -> bool:
        """Whether to save after this many steps; if so, an interval in minutes starts again."""
        if self._steps is not None:
            return step % self._steps == 0
        assert self._seconds is not None
        if time.monotonic() - self._last < self._seconds:
            return False
        self._last = time.monotonic()
        return True
