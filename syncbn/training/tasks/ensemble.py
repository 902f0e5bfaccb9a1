"""The models that `load` names for task=predict: that of a run, or those of all jobs of a multirun."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from syncbn.training.config.data import (
    DataConfig,
    DigitsConfig,
    FashionMnistConfig,
    MaskFolderConfig,
    ShapesConfig,
    TableConfig,
)
from syncbn.training.config.errors import ConfigError
from syncbn.training.config.schema import Config
from syncbn.training.data.preparation import normalized
from syncbn.training.data.trained_input import TrainedInput
from syncbn.training.distributed.rank_context import RankContext
from syncbn.training.tasks.loaded import OpenedRun, open_run
from syncbn.training.tasks.sweeps import jobs_of
from syncbn.training.trainer.build import context_for


@dataclass(frozen=True)
class Shape:
    """What a model was built for (see `ModelShape`)."""

    num_channels: int
    num_classes: int | None


@dataclass(frozen=True)
class Opened:
    """A checkpoint that has been read, and what its outputs stand for."""

    run: OpenedRun
    input: TrainedInput

    @property
    def names(self) -> list[str]:
        """Names of the classes, labels or numbers; those without names are numbered."""
        return class_names(self.run.config.data, self.input)

    @property
    def has_masks(self) -> bool:
        """Whether there is an output for each pixel."""
        data = self.run.config.data
        return isinstance(data, MaskFolderConfig | ShapesConfig) or (
            isinstance(data, TableConfig) and data.mask is not None
        )

    @property
    def kind(self) -> str:
        """What the outputs stand for: "classes", "labels" that do not exclude each other, or "numbers"."""
        return {"bce": "labels", "mse": "numbers"}.get(getattr(self.run.config.loss, "name", ""), "classes")

    def member(self, context: RankContext) -> Member:
        """Builds and loads the model; every rank calls it."""
        context = context_for(self.run.config, context)
        model = self.run.model(Shape(self.input.preparation.channels, len(self.names)), context)
        return Member(model, self.input, context, self.kind, len(self.names), self.has_masks)


@dataclass(frozen=True)
class Member:
    """A model, and how images become its input."""

    model: nn.Module
    input: TrainedInput
    context: RankContext
    kind: str
    """See `Opened`."""
    num_outputs: int
    has_masks: bool

    def scores(self, pixels: Tensor, *, flip: bool) -> Tensor:
        """Probabilities, or numbers, (N, K), or (N, K, H, W) for masks, float64 on the CPU.

        Args:
            pixels: (N, C, H, W) uint8, as `Preparation.fitted` makes them.
            flip: the average over images and their mirror images.
        """
        images = self.context.put(normalized(pixels, self.input.mean, self.input.std, self.context.dtype))
        scores = self._scores(images)
        if flip:
            mirrored = self._scores(images.flip(-1))
            scores = (scores + (mirrored.flip(-1) if self.has_masks else mirrored)) / 2
        return scores.cpu()

    def _scores(self, images: Tensor) -> Tensor:
        with self.context.forward_context():
            outputs = self.model(images)
        num_dims = 4 if self.has_masks else 2
        if not isinstance(outputs, Tensor) or outputs.dim() != num_dims or outputs.size(1) != self.num_outputs:
            wanted = f"(N, {self.num_outputs}{', H, W' if self.has_masks else ''})"
            got = tuple(outputs.shape) if isinstance(outputs, Tensor) else type(outputs).__name__
            raise ConfigError(f"task=predict: expected outputs of shape {wanted}, got {got}; export it (task=export)"
                              " and predict with a loop of your own")  # fmt: skip
        outputs = outputs.to(torch.float64)
        match self.kind:
            case "labels":
                return outputs.sigmoid()
            case "numbers":
                return outputs
        return outputs.softmax(1)


def open_members(config: Config, run_dir: Path) -> list[Opened]:
    """Reads the checkpoint that `load` names, or of a multirun that of each job.

    Raises:
        ConfigError: a checkpoint does not say how images are prepared; the jobs of a multirun do not predict the same;
            see also `open_run` and `jobs_of`.
    """
    assert config.load is not None
    jobs = [str(job) for job in jobs_of(Path(config.load), "load")] or [config.load]
    opened = []
    for job in jobs:
        run = open_run(replace(config, load=job), run_dir)
        opened.append(Opened(run, TrainedInput.of(run.checkpoint)))
    _require_alike(opened)
    return opened


def _require_alike(opened: Sequence[Opened]) -> None:
    """Raises a ConfigError unless the outputs of all stand for the same."""
    first = opened[0]
    for other in opened[1:]:
        differing = [
            (what, one, another)
            for what, one, another in (
                ("classes", ", ".join(first.names), ", ".join(other.names)),
                ("targets", first.kind, other.kind),
                ("masks", first.has_masks, other.has_masks),
                ("size and fit", *(_size_and_fit(one) if one.has_masks else "" for one in (first, other))),
            )
            if one != another
        ]
        if differing:
            what, one, another = differing[0]
            raise ConfigError(f"load: the jobs of a multirun have to predict the same; {other.run.path} has other"
                              f" {what} than {first.run.path} ({another}, there {one}); give them one by one"
                              )  # fmt: skip


def _size_and_fit(opened: Opened) -> str:
    preparation = opened.input.preparation
    return f"{preparation.size}, {preparation.fit}"


def class_names(config: DataConfig, described: TrainedInput) -> list[str]:
    """The names of the model's classes; numbers where they have none."""
    if described.class_names:
        return list(described.class_names)
    if classes := getattr(config, "classes", None):
        return [str(number) for number in classes]
    ten = 10 if isinstance(config, DigitsConfig | FashionMnistConfig) else 0
    return [str(number) for number in range(getattr(config, "num_classes", ten))]
