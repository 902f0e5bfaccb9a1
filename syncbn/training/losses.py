"""Losses: a sum and what it is to be divided by, so that the mean over all ranks is exact."""

from __future__ import annotations

from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from syncbn.training.config import CrossEntropyConfig


class Loss(Protocol):
    """A loss returns the sum over what it counts, and the count, both tensors without dimensions.

    The service divides by the count of the *global* batch. For no rows the sum is 0 and still depends on the outputs,
    so that a rank without samples takes part in the backward pass.
    """

    def __call__(self, outputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]: ...


class CrossEntropy:
    """Cross entropy of logits (N, num_classes) and labels (N,), counted per sample."""

    def __init__(self, label_smoothing: float = 0.0) -> None:
        self.label_smoothing = label_smoothing

    def __call__(self, outputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """The sum over samples, and their number."""
        total = F.cross_entropy(outputs, targets, reduction="sum", label_smoothing=self.label_smoothing)
        return total, torch.tensor(float(len(targets)), dtype=torch.float64, device=outputs.device)


def build(config: Any) -> Loss:
    """The loss of the configuration."""
    assert isinstance(config, CrossEntropyConfig)
    return CrossEntropy(config.label_smoothing)
