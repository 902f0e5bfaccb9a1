"""Losses that return a sum and its divisor, so that the mean over all ranks is exact."""

from __future__ import annotations

from typing import Any, Protocol, assert_never

import torch
import torch.nn.functional as F
from torch import Tensor

from syncbn.training.config.data import DataConfig, OpenData
from syncbn.training.config.errors import ConfigError
from syncbn.training.config.instantiate import build_target
from syncbn.training.config.losses import CrossEntropyConfig, LossConfig
from syncbn.training.data.custom import LabelRange, with_label_range
from syncbn.training.data.dataset import IGNORE, Data


class Loss(Protocol):
    """Protocol of a loss: it returns a sum over samples (or pixels, or weights) and their count, as scalar tensors.

    The trainer divides by the count of the *global* batch. For outputs without rows the sum has to be 0 and still
    depend on the outputs, so that a rank without samples takes part in the backward pass.
    """

    def __call__(self, outputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]: ...


class CrossEntropy:
    """Cross entropy of logits (N, num_classes, ...) and labels (N, ...) int64; its count is the number of labels.

    Args:
        ignore_index: labels of this value are excluded from the sum and the count; None for no such value.
    """

    def __init__(self, label_smoothing: float = 0.0, ignore_index: int | None = None) -> None:
        self.label_smoothing, self.ignore_index = label_smoothing, ignore_index

    def __call__(self, outputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the sum over labels and the number of labels (float64)."""
        if self.ignore_index is None:
            total = F.cross_entropy(outputs, targets, reduction="sum", label_smoothing=self.label_smoothing)
            return total, torch.full((), float(targets.numel()), dtype=torch.float64, device=outputs.device)
        total = F.cross_entropy(
            outputs, targets, reduction="sum", label_smoothing=self.label_smoothing, ignore_index=self.ignore_index
        )
        return total, (targets != self.ignore_index).sum(dtype=torch.float64)


def build_loss(config: LossConfig, data: Data) -> Loss:
    """Builds the loss of the configuration; for masks, IGNORE (255) is the default of `ignore_index`.

    Raises:
        ConfigError: cross entropy for data without classes, or a `_target_` that cannot be built or called.
    """
    match config:
        case CrossEntropyConfig():
            if data.num_classes is None:
                raise ConfigError(f"loss: {config.name} is for classes, which this data has not; choose loss=custom")
            ignore = IGNORE if config.ignore_index is None and data.has_masks else config.ignore_index
            return CrossEntropy(config.label_smoothing, ignore)
        case dict():
            return _build_own(config)
        case _:
            assert_never(config)


def with_known_labels(data: Data, loss: Loss, config: DataConfig) -> Data:
    """A user's data set that refuses labels which cross entropy cannot take; other data, or losses, as they are.

    Raises:
        ConfigError: see `with_label_range`.
    """
    if not (isinstance(config, OpenData) and isinstance(loss, CrossEntropy)) or data.num_classes is None:
        return data
    return with_label_range(data, LabelRange(data.num_classes, loss.ignore_index), f"data._target_={config.name}")


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
        raise ConfigError(f"loss: cannot take the model's outputs: {' '.join(str(error).split())}") from None
    pair = returned if isinstance(returned, tuple) else (returned,)
    if len(pair) != 2 or not all(isinstance(part, Tensor) and part.dim() == 0 for part in pair):
        got = [f"shape {tuple(part.shape)}" if isinstance(part, Tensor) else type(part).__name__ for part in pair]
        raise ConfigError(
            f"loss: expected a sum and a count, two tensors without dimensions, got {', '.join(got)}; return the sum"
            " over what it counts (not the mean), and how many these are"
        )
