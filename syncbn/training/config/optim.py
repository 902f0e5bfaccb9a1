"""Schemas of optimizers, their parameter groups, and learning rate schedules."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from syncbn.training.config.errors import parse_duration as parse_duration
from syncbn.training.config.errors import require as require
from syncbn.training.config.errors import require_choice as require_choice


@dataclass
class GroupConfig:
    """A group of parameters with settings of its own: those of the modules that the patterns select."""

    match: str | list[str]
    """Patterns of module names; a group holds all parameters of the modules."""
    exclude: str | list[str] | None = None
    lr_scale: float = 1.0
    """Factor of the learning rate that the schedule gives."""
    weight_decay: float | None = None
    """None: that of the optimizer."""


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
    """State of a parameter when it is unfrozen: "keep" the one from before it was frozen, or "reset" it."""
    decay_norm_and_bias: bool = True
    """False: no weight decay for parameters of one dimension (gamma and beta of norms) and for biases."""
    groups: dict[str, GroupConfig] = field(default_factory=dict)
    """Groups by name; parameters that none selects form the group "rest"."""

    def __post_init__(self) -> None:
        _check_common(self)
        require(0 <= self.momentum < 1, "optimizer.momentum", "0 or more and below 1", self.momentum)
        require(not self.nesterov or self.momentum > 0, "optimizer.nesterov", "false where optimizer.momentum=0", True)


@dataclass
class AdamwConfig:
    """Adam with decoupled weight decay (Loshchilov and Hutter 2019, arXiv:1711.05101)."""

    name: str
    lr: float
    """Peak learning rate."""
    betas: list[float]
    """Decays of the averages of gradients and of their squares."""
    eps: float
    weight_decay: float
    on_unfreeze: str
    """See `SgdConfig`."""
    decay_norm_and_bias: bool = True
    """See `SgdConfig`."""
    groups: dict[str, GroupConfig] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _check_common(self)
        are_decays = len(self.betas) == 2 and all(0 <= beta < 1 for beta in self.betas)
        require(are_decays, "optimizer.betas", "two numbers, each 0 or more and below 1", self.betas)
        require(self.eps > 0, "optimizer.eps", "a number above 0", self.eps)


class CustomOptimizer(dict[str, Any]):
    """An optimizer of the user's choice: `_target_`, its arguments, and the settings that every optimizer has."""

    SETTINGS = ("on_unfreeze", "decay_norm_and_bias", "groups")

    def __init__(self, node: Mapping[str, Any]) -> None:
        super().__init__(node)
        require_choice("optimizer.on_unfreeze", self.on_unfreeze, ("keep", "reset"))
        require(isinstance(self.decay_norm_and_bias, bool), "optimizer.decay_norm_and_bias", "true or false",
                self.decay_norm_and_bias)  # fmt: skip
        for key in self.arguments:
            require(not key.startswith("_") or key in ("_target_", "_recursive_"), f"optimizer.{key}",
                    "the name of an argument", self[key])  # fmt: skip

    @property
    def name(self) -> str:
        """The `_target_`: import path of the optimizer."""
        return str(self["_target_"])

    @property
    def on_unfreeze(self) -> str:
        """See `SgdConfig`."""
        return self.get("on_unfreeze", "reset")

    @property
    def decay_norm_and_bias(self) -> bool:
        """See `SgdConfig`."""
        return self.get("decay_norm_and_bias", True)

    @property
    def groups(self) -> dict[str, GroupConfig]:
        """The groups by name."""
        return self.get("groups", {})

    @groups.setter
    def groups(self, groups: dict[str, GroupConfig]) -> None:
        self["groups"] = groups

    @property
    def arguments(self) -> dict[str, Any]:
        """`_target_` and its arguments, without the settings."""
        return {key: value for key, value in self.items() if key not in self.SETTINGS}


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
class PolyConfig:
    """Linear warm-up, then a power of the share of steps that are left, down to `final`."""

    name: str
    warmup: str
    power: float
    """1: a straight line; below 1 the learning rate stays high for longer."""
    final: float
    """Learning rate at the end, as a fraction of the peak."""

    def __post_init__(self) -> None:
        parse_duration("schedule.warmup", self.warmup)
        require(self.power > 0, "schedule.power", "a number above 0", self.power)
        require(0 <= self.final <= 1, "schedule.final", "a share between 0 and 1", self.final)


@dataclass
class ConstantConfig:
    """Linear warm-up, then constant."""

    name: str
    warmup: str

    def __post_init__(self) -> None:
        parse_duration("schedule.warmup", self.warmup)


@dataclass
class StepConfig:
    """Linear warm-up, and a learning rate that is multiplied by `gamma` at the milestones, or every `step_size`.

    All durations are counted from the beginning of the run.
    """

    name: str
    warmup: str
    milestones: list[str] | None
    """Durations that increase; None where there is a `step_size`."""
    step_size: str | None
    gamma: float
    """Factor of the learning rate at each of these times."""

    def __post_init__(self) -> None:
        parse_duration("schedule.warmup", self.warmup)
        one = (self.milestones is None) != (self.step_size is None)
        require(one, "schedule", "either schedule.milestones=[10ep,15ep] or schedule.step_size=5ep", "both" if
                self.milestones is not None else "neither")  # fmt: skip
        require(self.milestones != [], "schedule.milestones", "one duration or more", self.milestones)
        for text in self.milestones or ():
            require(parse_duration("schedule.milestones", text).value > 0, "schedule.milestones", "more than 0", text)
        if self.step_size is not None:
            size = parse_duration("schedule.step_size", self.step_size)
            require(size.value > 0, "schedule.step_size", "more than 0", self.step_size)
        require(0 < self.gamma < 1, "schedule.gamma", "a number between 0 and 1", self.gamma)


def _check_common(config: SgdConfig | AdamwConfig) -> None:
    require(config.lr > 0, "optimizer.lr", "a number above 0", config.lr)
    require(config.weight_decay >= 0, "optimizer.weight_decay", "0 or more", config.weight_decay)
    require_choice("optimizer.on_unfreeze", config.on_unfreeze, ("keep", "reset"))


OptimizerConfig = SgdConfig | AdamwConfig | CustomOptimizer
ScheduleConfig = CosineConfig | PolyConfig | ConstantConfig | StepConfig
