"""Schemas of optimizers and learning rate schedules."""

from __future__ import annotations

from dataclasses import dataclass

from syncbn.training.config.errors import parse_duration as parse_duration
from syncbn.training.config.errors import require as require
from syncbn.training.config.errors import require_choice as require_choice


@dataclass
class SgdConfig:
    """Stochastic gradient descent with momentum."""

    name: str
    lr: float
    """Peak learning rate."""
    momentum: float
    weight_decay: float
    nesterov: bool
    on_unfreeze: str
    """Momentum of a parameter when it is unfrozen: "keep" the one from before it was frozen, or "reset" it."""

    def __post_init__(self) -> None:
        require(self.lr > 0, "optimizer.lr", "a number above 0", self.lr)
        require(0 <= self.momentum < 1, "optimizer.momentum", "0 or more and below 1", self.momentum)
        require(self.weight_decay >= 0, "optimizer.weight_decay", "0 or more", self.weight_decay)
        require_choice("optimizer.on_unfreeze", self.on_unfreeze, ("keep", "reset"))
        require(not self.nesterov or self.momentum > 0, "optimizer.nesterov", "false where optimizer.momentum=0", True)


@dataclass
class CosineConfig:
    """Linear warm-up, then half a cosine down to `final`."""

    name: str
    warmup: str
    final: float
    """Learning rate at the end, as a fraction of the peak."""

    def __post_init__(self) -> None:
        parse_duration("schedule.warmup", self.warmup)
        require(0 <= self.final <= 1, "schedule.final", "a share between 0 and 1", self.final)


@dataclass
class ConstantConfig:
    """Linear warm-up, then constant."""

    name: str
    warmup: str

    def __post_init__(self) -> None:
        parse_duration("schedule.warmup", self.warmup)


OptimizerConfig = SgdConfig
ScheduleConfig = CosineConfig | ConstantConfig
