"""The schema of the configuration: types, documentation and checks. Values live in `configs/`, each in one place.

This module never imports torch: composing a configuration has to be quick.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from syncbn.training.config.data import (
    DigitsConfig,
    FashionMnistConfig,
    HfConfig,
    ImageFolderConfig,
    MaskFolderConfig,
    ShapesConfig,
    SyntheticConfig,
)
from syncbn.training.config.errors import ConfigError as ConfigError
from syncbn.training.config.errors import TrainingError as TrainingError
from syncbn.training.config.errors import parse_duration as parse_duration
from syncbn.training.config.errors import require as require
from syncbn.training.config.errors import require_choice as require_choice

CHANNELS_PER_GROUP = 4  # of GroupNorm


@dataclass
class ResnetSmallConfig:
    """A small residual network."""

    name: str
    width: int
    """Channels of the first stage."""
    depth: int
    """Residual blocks per stage."""
    stages: int
    norm: str
    """The normalization: "batch", or "group" for GroupNorm, in groups of 4 channels."""

    def __post_init__(self) -> None:
        for key in ("width", "depth", "stages"):
            require(getattr(self, key) >= 1, f"model.{key}", "1 or more", getattr(self, key))
        require_choice("model.norm", self.norm, ("batch", "group"))
        in_groups = self.norm == "batch" or self.width % CHANNELS_PER_GROUP == 0
        require(in_groups, "model.width", f"a multiple of {CHANNELS_PER_GROUP} where model.norm=group", self.width)


@dataclass
class UnetSmallConfig:
    """A small U-Net."""

    name: str
    width: int
    """Channels at full resolution."""
    depth: int
    """How often height and width are halved."""

    def __post_init__(self) -> None:
        for key in ("width", "depth"):
            require(getattr(self, key) >= 1, f"model.{key}", "1 or more", getattr(self, key))


@dataclass
class CrossEntropyConfig:
    """Cross entropy, a mean over samples or pixels."""

    name: str
    label_smoothing: float
    ignore_index: int | None
    """Targets of this value do not count; None: 255 in masks, else none."""

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
    report: bool = True
    """Write report.html at the end."""

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
    own_group: bool
    """Where `group` is the world: a process group for BN alone, so that its sums do not queue behind DDP's buckets."""
    buffers: str
    """Running statistics that differ between ranks: "pool" them before evaluation and checkpoint, or keep "per_group".
    """
    virtual_ranks: int | None
    """Local statistics as of so many ranks in all, a multiple of those that there are; see `virtual`."""
    momentum: Any
    """None: as built; a number; "cumulative" for torch's momentum=None."""
    eps: float | None
    fuse: bool
    """Let SyncBatchNorm do the activation, and the addition, that follow it (`syncbn.fuse`)."""
    memory: str
    """"lean": with `fuse`, layers with a leaky ReLU keep their output for backward instead of their input."""
    debug: bool
    """Compare the ranks' places before each collective."""

    def __post_init__(self) -> None:
        is_number = isinstance(self.group, int) and not isinstance(self.group, bool) and self.group >= 1
        require(
            self.group in ("world", "node") or is_number, "bn.group", "world, node, or a number of ranks", self.group
        )
        require(self.sync or self.group == "world", "bn.group", "world where bn.sync=false", self.group)
        expected = "false unless bn.sync=true and bn.group=world (other groups are BN's own anyway)"
        require(not self.own_group or (self.sync and self.group == "world"), "bn.own_group", expected, self.own_group)
        require(self.sync or not self.fuse, "bn.fuse", "false where bn.sync=false", self.fuse)
        require_choice("bn.memory", self.memory, ("default", "lean"))
        require(self.fuse or self.memory == "default", "bn.memory", "default unless bn.fuse=true", self.memory)
        require_choice("bn.buffers", self.buffers, ("pool", "per_group"))
        if self.virtual_ranks is not None:
            require(self.virtual_ranks >= 1, "bn.virtual_ranks", "null or 1 or more ranks", self.virtual_ranks)
            require(not self.sync, "bn.virtual_ranks", "null unless bn.sync=false", self.virtual_ranks)
            require(self.buffers == "pool", "bn.buffers", "pool with bn.virtual_ranks", self.buffers)
        number = isinstance(self.momentum, int | float) and not isinstance(self.momentum, bool)
        valid = self.momentum in (None, "cumulative") or (number and 0 < self.momentum <= 1)
        require(valid, "bn.momentum", "null, cumulative, or a number above 0 and at most 1", self.momentum)
        require(self.eps is None or self.eps > 0, "bn.eps", "null or a number above 0", self.eps)


@dataclass
class AuditConfig:
    """The audit at the start of a run."""

    level: str
    """What findings do: "warning" prints them, "error" stops the job at those of severity error, "off"."""

    def __post_init__(self) -> None:
        require_choice("audit.level", self.level, ("warning", "error", "off"))


@dataclass
class EvalConfig:
    """What the tasks with `load` evaluate."""

    weights: str
    """Of a checkpoint: "auto" those that training evaluated, "raw", or "ema", the averaged ones."""
    precise_bn: int | None
    """task=eval: evaluate once more, with population statistics of so many global batches; None does not."""

    def __post_init__(self) -> None:
        require_choice("eval.weights", self.weights, ("auto", "raw", "ema"))
        require(self.precise_bn is None or self.precise_bn >= 1, "eval.precise_bn", "null or 1 or more global batches",
                self.precise_bn)  # fmt: skip


@dataclass
class RecalibrateConfig:
    """Population statistics."""

    batches: int | None
    """Global batches of training; None for the whole training set."""

    def __post_init__(self) -> None:
        require(self.batches is None or self.batches >= 1, "recalibrate.batches", "null or 1 or more global batches",
                self.batches)  # fmt: skip


EXPORT_FORMATS = ("safetensors", "pt2", "onnx")


@dataclass
class ExportConfig:
    """A model for the use without this package."""

    formats: list[str] | None
    """Of EXPORT_FORMATS; None for all that can be written here."""

    def __post_init__(self) -> None:
        formats = self.formats if self.formats is not None else EXPORT_FORMATS
        require(bool(formats) and set(formats) <= set(EXPORT_FORMATS), "export.formats",
                f"null or some of {', '.join(EXPORT_FORMATS)}", self.formats)  # fmt: skip


class OpenData(dict[str, Any]):
    """A data set of the user's own: `_target_`, its arguments, and how its batches are prepared."""

    def __init__(self, node: dict[str, Any]) -> None:
        super().__init__(node)
        for key, least in (("workers", 0), ("prefetch", 1)):
            value = getattr(self, key)
            is_number = isinstance(value, int) and not isinstance(value, bool) and value >= least
            require(is_number, f"data.{key}", f"a number, {least} or more", value)

    @property
    def name(self) -> str:
        """What is built."""
        return str(self["_target_"])

    @property
    def workers(self) -> int:
        """See `LoadingConfig`."""
        return self.get("workers", 0)

    @property
    def prefetch(self) -> int:
        """See `LoadingConfig`."""
        return self.get("prefetch", 2)

    @property
    def arguments(self) -> dict[str, Any]:
        """`_target_` and its arguments alone."""
        return {key: value for key, value in self.items() if key not in ("workers", "prefetch")}


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
    compile: Any
    channels_last: bool
    tf32: bool
    deterministic: bool
    batch_size: int
    accumulate: int
    clip_norm: float | None
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
    audit: AuditConfig
    eval: EvalConfig
    recalibrate: RecalibrateConfig
    export: ExportConfig
    tracker: TrackerConfig
    data: Any
    model: Any
    loss: Any
    metrics: dict[str, Any]
    best: str
    optimizer: Any
    schedule: Any
    freeze: dict[str, Any]
    init: dict[str, Any]

    def __post_init__(self) -> None:
        require_choice("task", self.task, ("train", "eval", "audit", "recalibrate", "export", "data"))
        require_choice("device", self.device, ("auto", "cpu", "cuda"))
        require_choice("precision", self.precision, ("fp64", "fp32", "bf16", "fp16"))
        is_backend = isinstance(self.compile, bool) or (isinstance(self.compile, str) and self.compile != "")
        require(is_backend, "compile", "true, false or the name of a backend of torch.compile", self.compile)
        require(self.clip_norm is None or self.clip_norm > 0, "clip_norm", "null or a number above 0", self.clip_norm)
        require_choice("on_nonfinite", self.on_nonfinite, ("raise", "stop", "skip"))
        require(self.ema is None or 0 < self.ema < 1, "ema", "null or a number between 0 and 1", self.ema)
        require(
            self.collective_timeout > 0, "collective_timeout", "a number of seconds above 0", self.collective_timeout
        )
        require(self.task in ("train", "data") or self.load is not None, "load",
                f"a checkpoint or a run directory for task={self.task}", None)  # fmt: skip
        for key in ("overfit", "profile"):
            require(getattr(self, key) is None or getattr(self, key) >= 1, key, "null or 1 or more", getattr(self, key))
        require(self.batch_size >= 1, "batch_size", "1 or more samples over all ranks", self.batch_size)
        require(1 <= self.accumulate <= self.batch_size, "accumulate", "between 1 and batch_size", self.accumulate)
        require(self.best != "", "best", "auto, loss, or the name of a validation metric", self.best)
        for key in ("duration", "eval_every", "log_every"):
            duration = parse_duration(key, getattr(self, key))
            require(duration.value > 0, key, "more than 0", getattr(self, key))


# The named choices of each group. A node with `_target_` is open instead: its keys are the target's arguments.
SCHEMAS: dict[str, dict[str, type]] = {
    "data": {
        "digits": DigitsConfig,
        "fashion_mnist": FashionMnistConfig,
        "synthetic": SyntheticConfig,
        "image_folder": ImageFolderConfig,
        "hf": HfConfig,
        "shapes": ShapesConfig,
        "mask_folder": MaskFolderConfig,
    },
    "model": {"resnet_small": ResnetSmallConfig, "unet_small": UnetSmallConfig},
    "loss": {"cross_entropy": CrossEntropyConfig},
    "optimizer": {"sgd": SgdConfig},
    "schedule": {"cosine": CosineConfig, "constant": ConstantConfig},
}
