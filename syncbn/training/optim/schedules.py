"""Learning rate schedules: the share of the peak at a step."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import assert_never

from syncbn.training.config.duration import Duration
from syncbn.training.config.optim import ConstantConfig, CosineConfig, ScheduleConfig


def build(config: ScheduleConfig, num_steps: int, steps_per_epoch: int) -> Callable[[int], float]:
    """The share of the peak learning rate at a step: linear warm-up, then half a cosine or constant."""
    warmup = Duration.parse(config.warmup).in_steps(steps_per_epoch)

    def share(step: int) -> float:
        if step < warmup:
            return (step + 1) / (warmup + 1)
        match config:
            case ConstantConfig():
                return 1.0
            case CosineConfig():
                done = min(1.0, (step - warmup) / max(1, num_steps - warmup))
                return config.final + (1.0 - config.final) * 0.5 * (1.0 + math.cos(math.pi * done))
            case _:
                assert_never(config)

    return share
