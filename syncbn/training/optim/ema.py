"""Exponential moving average of weights."""

from __future__ import annotations

from torch import nn

from syncbn.training.optim.averages import WeightAverage


class ExponentialAverage(WeightAverage):
    """An exponential moving average of a model's weights and floating-point buffers.

    The decay is smaller in the first steps. With a constant decay of 0.999 the initial weights would still make up a
    third of the average after a thousand steps (0.999^1000 = 0.37), and earlier validation results would say nothing.

    Args:
        model: the model to average; it is deep-copied.
        decay: factor of the old average in an update, such as 0.999; at step t at most (1 + t) / (10 + t).
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        super().__init__(model)
        self.decay = decay

    def share_of(self, step: int) -> float:
        """Weight of the model in the average after `step` steps, from 1: 1 minus the decay, which `step` limits."""
        return 1.0 - min(self.decay, (1 + step) / (10 + step))
