"""The progress of a run, as a logging step records and prints it."""

from __future__ import annotations

import math
from dataclasses import dataclass

from syncbn.report.metric_names import EPOCH, GRADIENT_NORM, LEARNING_RATE, STEPS_LEFT_OUT, THROUGHPUT, TRAIN_LOSS


@dataclass(frozen=True)
class Progress:
    """A training run after `step` steps; means are over the steps since the previous record."""

    step: int
    num_steps: int
    epoch: float
    loss: float | None
    """None if every step since the previous record was left out."""
    lr: float
    samples_per_second: float
    gradient_norm: float | None
    """Mean norm before clipping; None without clipping, or if every step was left out."""
    steps_left_out: int
    """Steps left out since the beginning of the run, because a loss or gradient was not finite."""

    def metrics(self) -> dict[str, float]:
        """The metrics for the tracker, without those that are None and without a count of 0."""
        metrics = {
            EPOCH: self.epoch,
            **({} if self.loss is None else {TRAIN_LOSS: self.loss}),
            LEARNING_RATE: self.lr,
            THROUGHPUT: self.samples_per_second,
        }
        if self.gradient_norm is not None:
            metrics[GRADIENT_NORM] = self.gradient_norm
        if self.steps_left_out:
            metrics[STEPS_LEFT_OUT] = self.steps_left_out
        return metrics

    def line(self) -> str:
        """One line for the console."""
        loss = math.nan if self.loss is None else self.loss
        return (
            f"step {self.step}/{self.num_steps}  epoch {self.epoch:.2f}  loss {loss:.4f}  lr {self.lr:.4f}"
            f"  {self.samples_per_second:.0f} samples/s"
        )
