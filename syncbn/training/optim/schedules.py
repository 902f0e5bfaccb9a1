"""Learning-rate schedules, as a fraction of the peak learning rate per step."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import assert_never

from syncbn.training.config.duration import Duration
from syncbn.training.config.optim import ConstantConfig, CosineConfig, ScheduleConfig


def build_schedule(config: ScheduleConfig, num_steps: int, steps_per_epoch: int) -> Callable[[int], float]:
    """Builds a function from a step to its learning rate as a fraction of the peak.

    A linear warm-up over w steps, (step + 1) / (w + 1), is followed by a constant 1, or by half a cosine from 1 at the
    end of the warm-up to `config.final` at `num_steps` (Loshchilov and Hutter 2017, arXiv:1608.03983, without
    restarts).
    """
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
