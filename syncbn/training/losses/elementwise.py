"""Losses of targets that are not classes: several labels at once, and numbers. Outputs and targets have one shape."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from syncbn.training.config.errors import ConfigError


class BinaryCrossEntropy:
    """Binary cross entropy of logits and targets between 0 and 1, both (N, num_labels, ...).

    Its count is the number of targets: N * num_labels * ..., without those that are ignored.

    Args:
        ignore_index: targets of this value (of labels that are not known) are excluded; None for no such value.
    """

    targets_are_classes = False

    def __init__(self, ignore_index: int | None = None) -> None:
        self.ignore_index = ignore_index

    def __call__(self, outputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the sum over targets and the number of targets (float64)."""
        if self.ignore_index is None:
            total = F.binary_cross_entropy_with_logits(outputs, targets.to(outputs.dtype), reduction="sum")
            return total, _number_of(targets)
        counted = targets != self.ignore_index
        known = torch.where(counted, targets, 0).to(outputs.dtype)
        losses = F.binary_cross_entropy_with_logits(outputs, known, reduction="none")
        return torch.where(counted, losses, 0.0).sum(), counted.sum(dtype=torch.float64)

    def metric_targets(self, targets: Tensor) -> Tensor:
        """The targets as metrics of torchmetrics take them: whole numbers; soft ones are 1 above a half."""
        labels = (targets > 0.5).to(torch.int64)
        return (
            labels if self.ignore_index is None else torch.where(targets != self.ignore_index, labels, targets.long())
        )

    def output_shape(self, targets: Tensor, num_classes: int | None) -> tuple[int, ...]:
        """The shape of the outputs that these targets need; a ConfigError if they are no labels of 0 and 1."""
        counted = targets if self.ignore_index is None else targets[targets != self.ignore_index]
        if targets.dim() < 2 or ((counted < 0) | (counted > 1)).any():
            raise ConfigError(
                "loss=bce: expected targets of 0 and 1, one for each label (num_labels,), got the shape"
                f" {tuple(targets.shape[1:])} with values from {counted.min().item():g} to {counted.max().item():g};"
                " loss.ignore_index=-1 excludes what is -1"
            )
        return tuple(targets.shape)


class MeanSquaredError:
    """Squared error of outputs and targets, both (N, ...); its count is the number of numbers."""

    targets_are_classes = False

    def __call__(self, outputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the sum over numbers and how many they are (float64)."""
        return F.mse_loss(outputs, targets.to(outputs.dtype), reduction="sum"), _number_of(targets)

    def output_shape(self, targets: Tensor, num_classes: int | None) -> tuple[int, ...]:
        """The shape of the outputs that these targets need: torch would stretch (N, 1) and (N,) to (N, N)."""
        return tuple(targets.shape)


def _number_of(targets: Tensor) -> Tensor:
    return torch.full((), float(targets.numel()), dtype=torch.float64, device=targets.device)
