"""Averaged weights."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn


class WeightAverage:
    """An exponential moving average of a model's weights and floating-point buffers; other buffers are copied.

    The first steps forget quicker: at a decay of 0.999 the initial weights would still be a third of the average after
    a thousand steps, and no validation before that would mean anything.

    `torch.optim.swa_utils.AveragedModel` averages too, but waits for the device at every update and cannot leave a step
    out.

    Args:
        decay: what stays of the average at a step, such as 0.999; at step t at most (1 + t) / (10 + t).
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.model = copy.deepcopy(model).requires_grad_(False)
        self.decay = decay

    @torch.no_grad()
    def update(self, model: nn.Module, left_out: Tensor, step: int) -> None:
        """Moves the average towards the model as it is after `step` steps; not at all if `left_out`."""
        weight = torch.where(left_out, 0.0, 1.0 - min(self.decay, (1 + step) / (10 + step)))
        for averaged, current in zip(_tensors(self.model), _tensors(model), strict=True):
            if averaged.is_floating_point():
                averaged.lerp_(current.detach(), weight.to(averaged.dtype))
            else:
                averaged.copy_(current)

    def state_dict(self) -> dict[str, Any]:
        """The averaged model's."""
        return self.model.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any], /) -> None:
        """Takes it over."""
        self.model.load_state_dict(state_dict)


def _tensors(model: nn.Module) -> list[Tensor]:
    return [*model.parameters(), *model.buffers()]
