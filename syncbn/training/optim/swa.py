"""Equal-weight average of weights: stochastic weight averaging (Izmailov et al. 2018, arXiv:1803.05407)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from syncbn.training.optim.averages import WeightAverage


class EqualAverage(WeightAverage):
    """The mean of a model's weights and floating-point buffers after every step from a certain one on.

    Until then it equals the model. Steps that are skipped do not count.

    Args:
        model: the model to average; it is deep-copied.
        begin: number of steps after which averaging begins: the weights after step `begin` + 1 are the first.
    """

    def __init__(self, model: nn.Module, begin: int) -> None:
        super().__init__(model)
        self.begin = begin
        device = next((tensor.device for tensor in model.parameters()), torch.device("cpu"))
        self.count = AveragedSteps(device)

    def share_of(self, step: int) -> float:
        """1 if the weights after `step` steps, from 1, count in the average; 0 before it begins."""
        return 1.0 if step > self.begin else 0.0

    def _weight(self, left_out: Tensor, share: Tensor | float) -> Tensor:
        number = self.count.value.add_(torch.where(left_out, 0.0, share))  # in place: a graph reads it in the next step
        return torch.where(left_out, 0.0, 1.0 / number.clamp(min=1.0))


class AveragedSteps:
    """The number of steps in an `EqualAverage`, a float64 scalar tensor on the device; part of a checkpoint."""

    def __init__(self, device: torch.device) -> None:
        self.value = torch.zeros((), dtype=torch.float64, device=device)

    def state_dict(self) -> dict[str, Any]:
        """The number."""
        return {"value": self.value}

    def load_state_dict(self, state_dict: dict[str, Any], /) -> None:
        """Restores the number; raises a ValueError if it is none."""
        if state_dict["value"].shape != self.value.shape:
            raise ValueError(f"it counts averaged steps by {state_dict['value'].numel()} numbers, expected one")
        self.value.copy_(state_dict["value"])
