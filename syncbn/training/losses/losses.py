"""Losses that return a sum and its divisor, so that the mean over all ranks is exact."""

from __future__ import annotations

from typing import Any, Protocol, assert_never

import torch
import torch.nn.functional as F
from torch import Tensor

from syncbn.training.config.data import DataConfig, OpenData
from syncbn.training.config.errors import ConfigError, one_line
from syncbn.training.config.instantiate import build_target
from syncbn.training.config.losses import (
    BinaryCrossEntropyConfig,
    CrossEntropyAndDiceConfig,
    CrossEntropyConfig,
    DiceConfig,
    LossConfig,
    MeanSquaredErrorConfig,
)
from syncbn.training.data.by_size import BySize, Pixels
from syncbn.training.data.custom import LabelRange, with_label_range
from syncbn.training.data.dataset import IGNORE, Data
from syncbn.training.losses.class_weights import Weights, class_weights
from syncbn.training.losses.dice import CrossEntropyAndDice, Dice
from syncbn.training.losses.elementwise import BinaryCrossEntropy, MeanSquaredError


class Loss(Protocol):
    """Protocol of a loss: it returns a sum over samples (or pixels, or weights) and their count, as scalar tensors.

    The trainer divides by the count of the *global* batch. For outputs without rows the sum has to be 0 and still
    depend on the outputs, so that a rank without samples takes part in the backward pass.
    """

    def __call__(self, outputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]: ...


def summed(loss: Loss, outputs: Any, targets: Pixels) -> tuple[Tensor, Tensor]:
    """Sum and count of a batch, added up over its sizes where `targets` are `BySize` and `outputs` a list."""
    if not isinstance(targets, BySize):
        return loss(outputs, targets)
    pairs = [loss(output, part) for output, part in zip(outputs, targets.parts, strict=True)]
    return torch.stack([total for total, _ in pairs]).sum(), torch.stack([count for _, count in pairs]).sum()


class CrossEntropy:
    """Cross entropy of logits (N, num_classes, ...) and labels (N, ...) int64; its count is the number of labels.

    Args:
        ignore_index: labels of this value are excluded from the sum and the count; None for no such value.
        weights: of classes, (num_classes,) float64; the count is then the sum of the labels' weights.
    """

    def __init__(
        self, label_smoothing: float = 0.0, ignore_index: int | None = None, weights: Tensor | None = None
    ) -> None:
        self.label_smoothing, self.ignore_index, self.weights = label_smoothing, ignore_index, Weights(weights)

    def __call__(self, outputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the sum over labels and the number of labels, or the sum of their weights (float64)."""
        weights = self.weights.like(outputs)
        if self.ignore_index is None:
            total = F.cross_entropy(outputs, targets, weights, reduction="sum", label_smoothing=self.label_smoothing)
            if weights is not None:
                return total, weights[targets].sum(dtype=torch.float64)
            return total, torch.full((), float(targets.numel()), dtype=torch.float64, device=outputs.device)
        total = F.cross_entropy(
            outputs, targets, weights, reduction="sum", label_smoothing=self.label_smoothing,
            ignore_index=self.ignore_index,
        )  # fmt: skip
        counted = targets != self.ignore_index
        if weights is not None:
            return total, (weights[torch.where(counted, targets, 0)] * counted).sum(dtype=torch.float64)
        return total, counted.sum(dtype=torch.float64)

    def output_shape(self, targets: Tensor, num_classes: int | None) -> tuple[int | None, ...]:
        """The shape of the outputs that these targets need."""
        return len(targets), num_classes, *targets.shape[1:]


def build_loss(config: LossConfig, data: Data, weights: Tensor | None = None) -> Loss:
    """Builds the loss of the configuration; for masks, IGNORE (255) is the default of `ignore_index`.

    With `class_weights=balanced` it is a collective.

    Args:
        weights: those that "balanced" has meant since the run began; None for a new run.

    Raises:
        ConfigError: a loss that the targets of the data are not for; class weights that do not fit; a `_target_` that
            cannot be built or called.
    """
    if isinstance(config, dict):
        return _build_own(config)
    _require_targets(config, data)
    match config:
        case BinaryCrossEntropyConfig():
            return BinaryCrossEntropy(config.ignore_index)
        case MeanSquaredErrorConfig():
            return MeanSquaredError()
    ignore = IGNORE if config.ignore_index is None and data.has_masks else config.ignore_index
    match config:
        case CrossEntropyConfig():
            own = class_weights(config.class_weights, data, ignore, weights)
            return CrossEntropy(config.label_smoothing, ignore, own)
        case DiceConfig():
            return Dice(ignore, config.smooth)
        case CrossEntropyAndDiceConfig():
            own = class_weights(config.class_weights, data, ignore, weights)
            return CrossEntropyAndDice(Weights(own), config.label_smoothing, ignore, config.smooth)
        case _:
            assert_never(config)


# What targets are, in words, and the loss that is for them.
_WORDS = {"classes": "classes", "labels": "a 0 or 1 for each label", "numbers": "numbers"}
_LOSSES = {"classes": "cross_entropy", "labels": "bce", "numbers": "mse"}


def _require_targets(config: Any, data: Data) -> None:
    """Raises a ConfigError unless the data may have targets of the kind that the loss is for."""
    own, name = data.targets == "any", config.name
    if isinstance(config, BinaryCrossEntropyConfig | MeanSquaredErrorConfig):
        what = "labels" if isinstance(config, BinaryCrossEntropyConfig) else "numbers"
        if not own and data.targets != what:
            found = "masks" if data.has_masks else data.targets
            raise ConfigError(
                f"loss: {name} is for targets of {_WORDS[what]}, which only data=table with data.target={what} and"
                f" data=custom have, this data has {found}; choose loss={_LOSSES[data.targets]}, or other data"
            )
    elif data.targets in ("labels", "numbers"):
        raise ConfigError(f"loss: {name} is for classes, this data has {_WORDS[data.targets]} (data.target="
                          f"{data.targets}); choose loss={_LOSSES[data.targets]}")  # fmt: skip
    elif data.num_classes is None:
        raise ConfigError(f"loss: {name} is for classes, which this data has not; choose loss=custom")
    elif not isinstance(config, CrossEntropyConfig) and not (own or data.has_masks):
        raise ConfigError(f"loss: {name} is for masks, this data has one label an image; choose loss=cross_entropy")


def are_classes(loss: Loss) -> bool:
    """Whether the targets of the loss are class numbers, if the data has classes at all."""
    return bool(getattr(loss, "targets_are_classes", True))


def ignored_label(loss: Loss) -> int | None:
    """The label that the loss excludes from sum and count; None if it has none, as a user's loss need not have."""
    ignored: int | None = getattr(loss, "ignore_index", None)
    return ignored


def metric_targets(loss: Loss, targets: Tensor) -> Tensor:
    """The targets as metrics take them: those of the loss, or in whole numbers where torchmetrics asks for that."""
    convert = getattr(loss, "metric_targets", None)
    converted: Tensor = targets if convert is None else convert(targets)
    return converted


def with_known_labels(data: Data, loss: Loss, config: DataConfig) -> Data:
    """A user's data set that refuses labels which are no class; other data, or losses of other targets, as they are.

    Raises:
        ConfigError: see `with_label_range`; labels of a table are unknown (-1), and the loss would count them.
    """
    if data.targets == "labels" and isinstance(loss, BinaryCrossEntropy):
        _require_known(data, loss)
    if not isinstance(config, OpenData) or not isinstance(loss, CrossEntropy | CrossEntropyAndDice | Dice):
        return data
    if data.num_classes is None:
        return data
    return with_label_range(data, LabelRange(data.num_classes, loss.ignore_index), f"data._target_={config.name}")


def _require_known(data: Data, loss: BinaryCrossEntropy) -> None:
    for name in ("train", "val", "test"):
        split = getattr(data, name)
        labels = torch.zeros(0) if split is None else split.labels[torch.arange(len(split))]
        unknown = ((labels < 0) & (labels != loss.ignore_index)).any(0) if len(labels) else labels
        if unknown.any():
            column = data.class_names[int(unknown.nonzero()[0])]
            raise ConfigError(f"loss.ignore_index: column {column!r} has labels of -1, which are not known; give"
                              " loss.ignore_index=-1 to leave them out of loss and metrics")  # fmt: skip


def _build_own(config: dict[str, Any]) -> Loss:
    loss: Loss = build_target("loss", config)
    if not callable(loss):
        raise ConfigError(f"loss._target_={config['_target_']}: expected something to call, got {type(loss).__name__}")
    return loss


def check_loss(loss: Loss, outputs: object, targets: Tensor) -> None:
    """Calls the loss once on a model's outputs and checks what it returns.

    Raises:
        ConfigError: the call fails, or does not return a sum and a count as scalar tensors.
    """
    try:
        returned = loss(outputs, targets)  # type: ignore[arg-type]
    except Exception as error:
        raise ConfigError(f"loss: cannot take the model's outputs: {one_line(error)}") from None
    pair = returned if isinstance(returned, tuple) else (returned,)
    if len(pair) != 2 or not all(isinstance(part, Tensor) and part.dim() == 0 for part in pair):
        got = [f"shape {tuple(part.shape)}" if isinstance(part, Tensor) else type(part).__name__ for part in pair]
        raise ConfigError(
            f"loss: expected a sum and a count, two tensors without dimensions, got {', '.join(got)}; return the sum"
            " over what it counts (not the mean), and how many these are"
        )
