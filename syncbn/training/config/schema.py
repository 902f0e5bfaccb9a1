"""The schema of the configuration: types, documentation and checks. Default values are in `configs/`.

Never imports torch, because composing a configuration has to be fast.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from os.path import expanduser
from typing import Any

from syncbn.training.config.data import (
    DataConfig,
    DigitsConfig,
    FashionMnistConfig,
    HfConfig,
    ImageFolderConfig,
    MaskFolderConfig,
    ShapesConfig,
    SyntheticConfig,
    TableConfig,
)
from syncbn.training.config.errors import (
    ConfigError,
    parse_duration,
    require,
    require_choice,
    require_seconds,
)
from syncbn.training.config.keys import OTHER_TASKS, TASKS
from syncbn.training.config.losses import (
    BinaryCrossEntropyConfig,
    CrossEntropyAndDiceConfig,
    CrossEntropyConfig,
    DiceConfig,
    LossConfig,
    MeanSquaredErrorConfig,
)
from syncbn.training.config.model import (
    BnConfig,
    FreezeRuleConfig,
    InitConfig,
    ModelConfig,
    ResnetSmallConfig,
    UnetSmallConfig,
)
from syncbn.training.config.optim import (
    AdamwConfig,
    ConstantConfig,
    CosineConfig,
    OptimizerConfig,
    PolyConfig,
    ScheduleConfig,
    SgdConfig,
    StepConfig,
)
from syncbn.training.config.output import mask_of, output_root
from syncbn.training.config.run import (
    AuditConfig,
    EvalConfig,
    ExportConfig,
    ParityConfig,
    PredictConfig,
    RecalibrateConfig,
    SaveConfig,
    TrackerConfig,
)
from syncbn.training.config.trust import is_trust_entry


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
    compile: bool | str
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
    data: DataConfig
    model: ModelConfig
    loss: LossConfig
    metrics: dict[str, dict[str, Any]]
    best: str
    optimizer: OptimizerConfig
    schedule: ScheduleConfig
    freeze: dict[str, FreezeRuleConfig]
    init: dict[str, InitConfig]
    trust: list[str] = field(default_factory=list)
    output_dir: str = "outputs"
    share: str = "private"
    parity: ParityConfig = field(default_factory=ParityConfig)
    early_stop: str | None = None
    predict: PredictConfig = field(default_factory=PredictConfig)
    graph: bool = False
    swa: str | None = None

    def __post_init__(self) -> None:
        other = OTHER_TASKS.get(str(self.task).lower())
        require(other is None, "task", f"task={other}, which is its name here", self.task)
        require_choice("task", self.task, TASKS)
        named = all(is_trust_entry(entry) for entry in self.trust)
        require(named, "trust", "dotted names such as mine.Net, or mine.* for a package", self.trust)
        output_root(self.output_dir)
        self.resume, self.load = expanduser(self.resume), None if self.load is None else expanduser(self.load)
        mask_of(self.share)
        if gpu := re.fullmatch(r"(?:cuda:|gpu:?)?(\d+)", self.device):
            raise ConfigError(f"device: expected cuda, got {self.device!r}; CUDA_VISIBLE_DEVICES={gpu[1]} in front of"
                              " the command chooses the GPU, and torchrun gives each rank one")  # fmt: skip
        require_choice("device", self.device, ("auto", "cpu", "cuda"))
        require_choice("precision", self.precision, ("fp64", "fp32", "bf16", "fp16"))
        is_backend = isinstance(self.compile, bool) or (isinstance(self.compile, str) and self.compile != "")
        require(is_backend, "compile", "true, false or the name of a backend of torch.compile", self.compile)
        require(self.clip_norm is None or self.clip_norm > 0, "clip_norm", "null or a number above 0", self.clip_norm)
        require_choice("on_nonfinite", self.on_nonfinite, ("raise", "stop", "skip"))
        require(self.ema is None or 0 < self.ema < 1, "ema", "null or a number between 0 and 1", self.ema)
        require(self.ema is None or self.swa is None, "swa",
                f"null beside ema={self.ema}, since a run has one average; set one to null", self.swa)  # fmt: skip
        require_seconds("collective_timeout", self.collective_timeout)
        require(self.task in ("train", "data", "check", "parity") or self.load is not None, "load",
                f"a checkpoint or a run directory for task={self.task}", None)  # fmt: skip
        require(self.task != "predict" or self.predict.path is not None, "predict.path",
                "a directory of images, a file, or a list of them for task=predict", None)  # fmt: skip
        for key in ("overfit", "profile"):
            require(getattr(self, key) is None or getattr(self, key) >= 1, key, "null or 1 or more", getattr(self, key))
        require(self.batch_size >= 1, "batch_size", "1 or more samples over all ranks", self.batch_size)
        require(1 <= self.accumulate <= self.batch_size, "accumulate", "between 1 and batch_size", self.accumulate)
        require(self.best != "", "best", "auto, loss, or the name of a validation metric", self.best)
        for key in ("duration", "eval_every", "log_every", "early_stop"):
            if getattr(self, key) is None and key == "early_stop":
                continue
            duration = parse_duration(key, getattr(self, key))
            require(duration.value > 0, key, "more than 0", getattr(self, key))
        if self.swa is not None:
            parse_duration("swa", self.swa)


# Named choices of each group. A node with `_target_` has no schema: its keys are the target's arguments.
SCHEMAS: dict[str, dict[str, type]] = {
    "data": {
        "digits": DigitsConfig,
        "fashion_mnist": FashionMnistConfig,
        "synthetic": SyntheticConfig,
        "image_folder": ImageFolderConfig,
        "hf": HfConfig,
        "shapes": ShapesConfig,
        "mask_folder": MaskFolderConfig,
        "table": TableConfig,
    },
    "model": {"resnet_small": ResnetSmallConfig, "unet_small": UnetSmallConfig},
    "loss": {
        "cross_entropy": CrossEntropyConfig,
        "dice": DiceConfig,
        "ce_dice": CrossEntropyAndDiceConfig,
        "bce": BinaryCrossEntropyConfig,
        "mse": MeanSquaredErrorConfig,
    },
    "optimizer": {"sgd": SgdConfig, "adamw": AdamwConfig},
    "schedule": {"cosine": CosineConfig, "poly": PolyConfig, "constant": ConstantConfig, "step": StepConfig},
}
