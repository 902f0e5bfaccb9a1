"""The schema of the configuration: types, documentation and checks. Values live in `configs/`, each in one place.

This module never imports torch: composing a configuration has to be quick.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from syncbn.training.duration import Duration


class ConfigError(ValueError):
    """A mistake in the configuration; the message names the key and the remedy, and is all that a user sees."""


class TrainingError(RuntimeError):
    """Training cannot go on; the message says why, and is all that a user sees."""


def require(condition: bool, key: str, expected: str, got: object) -> None:
    """Raises a ConfigError unless the condition holds."""
    if not condition:
        raise ConfigError(f"{key}: expected {expected}, got {got!r}")


def require_choice(key: str, value: object, choices: tuple[str, ...]) -> None:
    """Raises a ConfigError unless the value is one of the choices."""
    require(value in choices, key, f"one of {', '.join(choices)}", value)


def parse_duration(key: str, text: str | int | float, *, minutes: bool = False) -> Duration:
    """A `Duration`, or a ConfigError that names the key."""
    try:
        return Duration.parse(text, allow_minutes=minutes)
    except ValueError as error:
        raise ConfigError(f"{key}: {error}") from None


@dataclass
class DigitsConfig:
    """scikit-learn's digits."""

    name: str
    shift: int
    """Random shift in pixels."""
    flip: bool
    """Random mirroring."""
    classes: list[int] | None
    """Labels to keep, renumbered from 0; None for all."""

    def __post_init__(self) -> None:
        require(self.shift >= 0, "data.shift", "a number of pixels, 0 or more", self.shift)
        _check_classes(self.classes)


@dataclass
class FashionMnistConfig:
    """Fashion-MNIST from IDX files."""

    name: str
    path: str
    """Directory of the four IDX files, plain or gzipped."""
    shift: int
    flip: bool
    classes: list[int] | None
    train_samples: int | None
    """Train on the first so many samples; None for all 55,000."""

    def __post_init__(self) -> None:
        require(self.shift >= 0, "data.shift", "a number of pixels, 0 or more", self.shift)
        require(self.train_samples is None or self.train_samples > 0, "data.train_samples", "null or 1 or more",
                self.train_samples)  # fmt: skip
        _check_classes(self.classes)


@dataclass
class SyntheticConfig:
    """A pattern per class plus noise."""

    name: str
    num_samples: int
    num_classes: int
    channels: int
    size: int
    noise: float
    shift: int
    flip: bool

    def __post_init__(self) -> None:
        require(self.num_samples >= 10, "data.num_samples", "10 or more", self.num_samples)
        for key in ("num_classes", "channels", "size"):
            require(getattr(self, key) >= 1, f"data.{key}", "1 or more", getattr(self, key))
        require(self.noise >= 0, "data.noise", "0 or more", self.noise)
        require(self.shift >= 0, "data.shift", "a number of pixels, 0 or more", self.shift)


@dataclass
class ResnetSmallConfig:
    """A small residual network."""

    name: str
    width: int
    """Channels of the first stage."""
    depth: int
    """Residual blocks per stage."""
    stages: int

    def __post_init__(self) -> None:
        for key in ("width", "depth", "stages"):
            require(getattr(self, key) >= 1, f"model.{key}", "1 or more", getattr(self, key))


@dataclass
class CrossEntropyConfig:
    """Cross entropy, a mean over samples."""

    name: str
    label_smoothing: float

    def __post_init__(self) -> None:
        require(0 <= self.label_smoothing < 1, "loss.label_smoothing", "0 or more and below 1", self.label_smoothing)


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
    """The momentum of a parameter that is unfrozen: "keep" it from before it was frozen, or "reset" it."""

    def __post_init__(self) -> None:
        require(self.lr > 0, "optimizer.lr", "a number above 0", self.lr)
        require(0 <= self.momentum < 1, "optimizer.momentum", "0 or more and below 1", self.momentum)
        require(self.weight_decay >= 0, "optimizer.weight_decay", "0 or more", self.weight_decay)
        require_choice("optimizer.on_unfreeze", self.on_unfreeze, ("keep", "reset"))
        require(not self.nesterov or self.momentum > 0, "optimizer.nesterov", "false where optimizer.momentum=0", True)


@dataclass
class CosineConfig:
    """Linear warm-up, then half a cosine."""

    name: str
    warmup: str
    final: float
    """Learning rate at the end, as a share of the peak."""

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


@dataclass
class TrackerConfig:
    """Where metrics go besides metrics.jsonl."""

    mode: str
    project: str
    group: str | None
    timeout: float
    """Seconds that wandb's server may take to start the run, and again to take in the rest at its end."""

    def __post_init__(self) -> None:
        require_choice("tracker.mode", self.mode, ("offline", "online", "disabled"))
        require(self.timeout > 0, "tracker.timeout", "a number of seconds above 0", self.timeout)


@dataclass
class SaveConfig:
    """Checkpoints."""

    every: str
    keep: int
    """Newest checkpoints kept; the best one is kept besides."""

    def __post_init__(self) -> None:
        parse_duration("save.every", self.every, minutes=True)
        require(self.keep >= 1, "save.keep", "1 or more", self.keep)


@dataclass
class BnConfig:
    """Batch normalization."""

    sync: bool
    """Convert to SyncBatchNorm; False leaves statistics local to each rank."""
    group: Any
    """The ranks to sum over: "world", "node", or a number of neighbouring ranks."""
    buffers: str
    """Running statistics that differ between ranks: "pool" them before evaluation and checkpoint, or keep "per_group".
    """
    momentum: Any
    """None: as built; a number; "cumulative" for torch's momentum=None."""
    eps: float | None
    debug: bool
    """Compare the ranks' places before each collective."""

    def __post_init__(self) -> None:
        is_number = isinstance(self.group, int) and not isinstance(self.group, bool) and self.group >= 1
        require(
            self.group in ("world", "node") or is_number, "bn.group", "world, node, or a number of ranks", self.group
        )
        require(self.sync or self.group == "world", "bn.group", "world where bn.sync=false", self.group)
        require_choice("bn.buffers", self.buffers, ("pool", "per_group"))
        number = isinstance(self.momentum, int | float) and not isinstance(self.momentum, bool)
        valid = self.momentum in (None, "cumulative") or (number and 0 < self.momentum <= 1)
        require(valid, "bn.momentum", "null, cumulative, or a number above 0 and at most 1", self.momentum)
        require(self.eps is None or self.eps > 0, "bn.eps", "null or a number above 0", self.eps)


@dataclass
class FreezeRuleConfig:
    """What a rule of the freeze plan selects (see `syncbn.FreezePlan`); times are durations."""

    match: Any
    exclude: Any = None
    stats: bool = True
    affine: bool = True
    weights: bool = False
    start: Any = None
    until: Any = None


@dataclass
class InitConfig:
    """A pretrained sub-network."""

    path: str
    """A checkpoint of ours, a run directory, or a state dict saved by torch or safetensors."""
    prefix: str | None = None
    """What its keys have in front; None: the name of the sub-network, where they have it."""
    strict: bool = True
    """Everything has to fit; False loads what does."""


@dataclass
class Config:
    """The whole configuration; the comments in `configs/train.yaml` are its documentation for users."""

    task: str
    run: str | None
    resume: str
    load: str | None
    seed: int
    device: str
    precision: str
    batch_size: int
    accumulate: int
    ema: float | None
    on_nonfinite: str
    collective_timeout: float
    duration: str
    eval_every: str
    log_every: str
    overfit: int | None
    profile: int | None
    save: SaveConfig
    bn: BnConfig
    tracker: TrackerConfig
    data: Any
    model: Any
    loss: Any
    optimizer: Any
    schedule: Any
    freeze: dict[str, Any]
    init: dict[str, Any]

    def __post_init__(self) -> None:
        require_choice("task", self.task, ("train", "eval"))
        require_choice("device", self.device, ("auto", "cpu", "cuda"))
        require_choice("precision", self.precision, ("fp64", "fp32", "bf16", "fp16"))
        require_choice("on_nonfinite", self.on_nonfinite, ("raise", "stop", "skip"))
        require(self.ema is None or 0 < self.ema < 1, "ema", "null or a number between 0 and 1", self.ema)
        require(
            self.collective_timeout > 0, "collective_timeout", "a number of seconds above 0", self.collective_timeout
        )
        require(self.task == "train" or self.load is not None, "load",
                f"a checkpoint or a run directory for task={self.task}", None)  # fmt: skip
        for key in ("overfit", "profile"):
            require(getattr(self, key) is None or getattr(self, key) >= 1, key, "null or 1 or more", getattr(self, key))
        require(self.batch_size >= 1, "batch_size", "1 or more samples over all ranks", self.batch_size)
        require(1 <= self.accumulate <= self.batch_size, "accumulate", "between 1 and batch_size", self.accumulate)
        for key in ("duration", "eval_every", "log_every"):
            duration = parse_duration(key, getattr(self, key))
            require(duration.value > 0, key, "more than 0", getattr(self, key))


def _check_classes(classes: list[int] | None) -> None:
    if classes is not None:
        distinct = len(classes) >= 2 and len(set(classes)) == len(classes)
        require(distinct, "data.classes", "two or more labels, each once", classes)


# The named choices of each group. A node with `_target_` is open instead: its keys are the target's arguments.
SCHEMAS: dict[str, dict[str, type]] = {
    "data": {"digits": DigitsConfig, "fashion_mnist": FashionMnistConfig, "synthetic": SyntheticConfig},
    "model": {"resnet_small": ResnetSmallConfig},
    "loss": {"cross_entropy": CrossEntropyConfig},
    "optimizer": {"sgd": SgdConfig},
    "schedule": {"cosine": CosineConfig, "constant": ConstantConfig},
}
