"""Schemas of tracking, checkpoints, the audit, and the tasks that load a checkpoint."""

from __future__ import annotations

from dataclasses import dataclass, field

from syncbn.training.config.errors import parse_duration, require, require_choice, require_seconds


@dataclass
class TrackerConfig:
    """Tracking of metrics by wandb and in a report, in addition to metrics.jsonl."""

    mode: str
    project: str
    group: str | None
    timeout: float
    """Seconds to wait for wandb's server when the run starts, and again for the remaining uploads at its end."""
    report: bool = True
    """Write report.html at the end of the run, whatever the tracker, and at the end of a multirun one of all jobs."""
    tensorboard: bool = False
    """Write files for TensorBoard below the run directory, beside wandb or (`mode: disabled`) instead."""
    examples: int = 12
    """Validation images in the report, those that are most wrong, with their truth; 0 for none."""

    def __post_init__(self) -> None:
        require_choice("tracker.mode", self.mode, ("offline", "online", "disabled"))
        require_seconds("tracker.timeout", self.timeout)
        require(0 <= self.examples <= 100, "tracker.examples", "a number of images from 0 to 100", self.examples)


@dataclass
class SaveConfig:
    """Saving of checkpoints; `every` is a duration."""

    every: str
    keep: int
    """Number of newest checkpoints to keep, in addition to the best one."""

    def __post_init__(self) -> None:
        every = parse_duration("save.every", self.every, minutes=True)
        require(every.value > 0, "save.every", "more than 0", self.every)
        require(self.keep >= 1, "save.keep", "1 or more", self.keep)


@dataclass
class AuditConfig:
    """The audit at the start of a run."""

    level: str
    """Effect of findings: "warning" prints them, "error" stops the job at one of severity error; "off": no audit."""

    def __post_init__(self) -> None:
        require_choice("audit.level", self.level, ("warning", "error", "off"))


@dataclass
class EvalConfig:
    """Evaluation in the tasks that load a checkpoint."""

    weights: str
    """Weights of the checkpoint: "auto" (those that training evaluated), "raw", or "ema" (averaged, by `swa` too)."""
    precise_bn: int | None
    """task=eval: evaluate again with population statistics of this many global batches; None: do not."""
    path: str | None = None
    """task=eval: another folder to evaluate on, whole; None: validation and test data of the training."""

    def __post_init__(self) -> None:
        require_choice("eval.weights", self.weights, ("auto", "raw", "ema"))
        require(self.precise_bn is None or self.precise_bn >= 1, "eval.precise_bn", "null or 1 or more global batches",
                self.precise_bn)  # fmt: skip
        require(self.precise_bn is None or self.path is None, "eval.precise_bn",
                "null with eval.path, which has no training data", self.precise_bn)  # fmt: skip


@dataclass
class RecalibrateConfig:
    """Estimation of population statistics (task=recalibrate)."""

    batches: int | None
    """Number of global training batches; None for the whole training set."""

    def __post_init__(self) -> None:
        require(self.batches is None or self.batches >= 1, "recalibrate.batches", "null or 1 or more global batches",
                self.batches)  # fmt: skip


@dataclass
class PredictConfig:
    """Prediction for image files (task=predict)."""

    path: str | list[str] | None = None
    """A directory, a file, or a list of them."""
    flip: bool = False
    """Average over each image and its mirror image."""
    batch_size: int = 32
    """Images per forward pass of a rank."""

    def __post_init__(self) -> None:
        paths = [self.path] if isinstance(self.path, str) else self.path
        valid = paths is None or (
            isinstance(paths, list) and bool(paths) and all(isinstance(path, str) and path for path in paths)
        )
        require(valid, "predict.path", "a directory, a file, or a list of them", self.path)
        require(self.batch_size >= 1, "predict.batch_size", "1 or more images", self.batch_size)

    @property
    def paths(self) -> list[str]:
        """The entries of `path`."""
        return [self.path] if isinstance(self.path, str) else list(self.path or [])


@dataclass
class ParityConfig:
    """Comparison of training on several ranks with training in one process (task=parity)."""

    world_sizes: list[int] = field(default_factory=lambda: [1, 2])
    """Numbers of ranks; 1 stands for the one process that all are compared with."""
    steps: int = 2
    timeout: float = 600.0
    """Seconds for the whole comparison."""

    def __post_init__(self) -> None:
        sizes = self.world_sizes
        valid = bool(sizes) and all(isinstance(size, int) and size >= 1 for size in sizes) and max(sizes) > 1
        require(valid, "parity.world_sizes", "a list of numbers of ranks, one of them above 1", sizes)
        require(self.steps >= 1, "parity.steps", "1 or more", self.steps)
        require_seconds("parity.timeout", self.timeout)


EXPORT_FORMATS = ("safetensors", "pt2", "onnx")


@dataclass
class ExportConfig:
    """Export of a model for use without this package."""

    formats: list[str] | None
    """A subset of EXPORT_FORMATS; None for all that the installed packages can write."""

    def __post_init__(self) -> None:
        formats = self.formats if self.formats is not None else EXPORT_FORMATS
        require(bool(formats) and set(formats) <= set(EXPORT_FORMATS), "export.formats",
                f"null or some of {', '.join(EXPORT_FORMATS)}", self.formats)  # fmt: skip
