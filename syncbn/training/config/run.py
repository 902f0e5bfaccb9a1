"""The schemas of what surrounds the training: tracking, checkpoints, the audit, the tasks with `load`."""

from __future__ import annotations

from dataclasses import dataclass

from syncbn.training.config.errors import parse_duration as parse_duration
from syncbn.training.config.errors import require as require
from syncbn.training.config.errors import require_choice as require_choice


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
