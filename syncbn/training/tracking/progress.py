"""How far a run is: what a logging step records and prints."""

from __future__ import annotations

import math
from dataclasses import dataclass

from syncbn.report.metric_names import EPOCH, GRADIENT_NORM, LEARNING_RATE, STEPS_LEFT_OUT, THROUGHPUT, TRAIN_LOSS


@dataclass(frozen=True)
class Progress:
    """A training run after `step` steps; means are over the steps since the record before."""

    step: int
    num_steps: int
    epoch: float
    loss: float | None
    """None: every step since the record before was left out."""
    lr: float
    samples_per_second: float
    gradient_norm: float | None
    """Before it was clipped; None where nothing is clipped, or no step counted."""
    steps_left_out: int
    """Since the beginning of the run."""

    def metrics(self) -> dict[str, float]:
        """For the tracker; what is None, and a count of 0, is left out."""
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
        """For the console."""
        loss = math.nan if self.loss is None else self.loss
        return (
            f"step {self.step}/{self.num_steps}  epoch {self.epoch:.2f}  loss {loss:.4f}  lr {self.lr:.4f}"
            f"  {self.samples_per_second:.0f} samples/s"
        )
