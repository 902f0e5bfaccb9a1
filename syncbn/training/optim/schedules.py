"""Learning-rate schedules, as a fraction of the peak learning rate per step."""

from __future__ import annotations

import logging
import math
from bisect import bisect_right
from collections.abc import Callable
from typing import assert_never

from syncbn.training.config.duration import Duration
from syncbn.training.config.errors import ConfigError
from syncbn.training.config.optim import ConstantConfig, CosineConfig, PolyConfig, ScheduleConfig, StepConfig

log = logging.getLogger(__name__)


def build_schedule(config: ScheduleConfig, num_steps: int, steps_per_epoch: int) -> Callable[[int], float]:
    """Builds a function from a step to its learning rate as a fraction of the peak.

    A linear warm-up over w steps, (step + 1) / (w + 1), is followed by a constant 1, or by half a cosine from 1 at the
    end of the warm-up to `config.final` at `num_steps` (Loshchilov and Hutter 2017, arXiv:1608.03983, without
    restarts), or by (1 - share of the steps done) to the power `config.power` (Chen et al. 2016, arXiv:1606.00915).
    Steps by `gamma` are counted from the beginning of the run, and multiply the warm-up too.

    Raises:
        ConfigError: milestones that do not increase.
    """
    warmup = Duration.parse(config.warmup).in_steps(steps_per_epoch)
    num_drops = _drops(config, num_steps, steps_per_epoch) if isinstance(config, StepConfig) else None

    def done(step: int) -> float:
        """The share of the steps after the warm-up."""
        return min(1.0, max(0, step - warmup) / max(1, num_steps - warmup))

    def share(step: int) -> float:
        rising = (step + 1) / (warmup + 1) if step < warmup else 1.0
        match config:
            case ConstantConfig():
                return rising
            case StepConfig():
                assert num_drops is not None
                return rising * config.gamma ** num_drops(step)
            case PolyConfig():
                left = 1.0 - done(step)
                return rising * (config.final + (1.0 - config.final) * left**config.power)
            case CosineConfig():
                return rising * (config.final + (1.0 - config.final) * 0.5 * (1.0 + math.cos(math.pi * done(step))))
            case _:
                assert_never(config)

    return share


def _drops(config: StepConfig, num_steps: int, steps_per_epoch: int) -> Callable[[int], int]:
    """A function from a step to how often the learning rate has been multiplied by `gamma`."""
    if config.step_size is not None:
        size = Duration.parse(config.step_size).in_steps(steps_per_epoch)
        return lambda step: step // size
    texts = config.milestones or []
    times = [Duration.parse(text).in_steps(steps_per_epoch) for text in texts]
    if times != sorted(set(times)):
        raise ConfigError(f"schedule.milestones: expected times that increase, got {texts} ({times} in steps)")
    for text, time in zip(texts, times, strict=True):
        if time >= num_steps:
            log.warning("schedule.milestones: %s is after the last step %d; it has no effect", text, num_steps - 1)
    return lambda step: bisect_right(times, step)
