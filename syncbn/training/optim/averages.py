"""Base of the averages of a model's weights, exponential (`ema.py`) and equal (`swa.py`)."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor, nn


class WeightAverage(ABC):
    """An average of a model's weights and floating-point buffers over steps; other buffers are copied.

    `torch.optim.swa_utils.AveragedModel` averages too, but synchronizes with the device at every update and cannot skip
    a step.

    Args:
        model: the model to average; it is deep-copied.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = copy.deepcopy(model).requires_grad_(False)

    @torch.no_grad()
    def update(self, model: nn.Module, left_out: Tensor, step: int, share: Tensor | None = None) -> None:
        """Moves the average toward the model's weights, unless the step was skipped.

        Args:
            model: the model after the step.
            left_out: bool scalar tensor on the device: the step was skipped.
            step: number of steps done, from 1.
            share: `share_of` the step as a scalar tensor of the default dtype, which a graph reads anew in every step.
        """
        weight = self._weight(left_out, self.share_of(step) if share is None else share)
        for averaged, current in zip(_tensors(self.model), _tensors(model), strict=True):
            if averaged.is_floating_point():
                averaged.lerp_(current.detach(), weight.to(averaged.dtype))
            else:
                averaged.copy_(current)

    @abstractmethod
    def share_of(self, step: int) -> float:
        """Weight of the model in the average after `step` steps, from 1, before `_weight` looks at the device."""

    def _weight(self, left_out: Tensor, share: Tensor | float) -> Tensor:
        """Weight of the model in the average as a scalar tensor, 0 for a step that was skipped."""
        return torch.where(left_out, 0.0, share)

    def state_dict(self) -> dict[str, Any]:
        """State dict of the averaged model, with the keys of the model."""
        return self.model.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any], /) -> None:
        """Loads the state dict of an averaged model."""
        self.model.load_state_dict(state_dict)


def _tensors(model: nn.Module) -> list[Tensor]:
    return [*model.parameters(), *model.buffers()]
