"""Learning rate schedules: the share of the peak at a step."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from syncbn.training.config.duration import Duration
from syncbn.training.config.optim import CosineConfig


def build(config: Any, num_steps: int, steps_per_epoch: int) -> Callable[[int], float]:
    """The share of the peak learning rate at a step: linear warm-up, then half a cosine or constant."""
    warmup = Duration.parse(config.warmup).in_steps(steps_per_epoch)

    def share(step: int) -> float:
        if step < warmup:
            return (step + 1) / (warmup + 1)
        if not isinstance(config, CosineConfig):
            return 1.0
        done = min(1.0, (step - warmup) / max(1, num_steps - warmup))
        return config.final + (1.0 - config.final) * 0.5 * (1.0 + math.cos(math.pi * done))

    return share
