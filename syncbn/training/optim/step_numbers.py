"""The numbers of a step that differ from those of the step before, as tensors on the device.

A CUDA graph repeats the numbers that it was captured with. What it shall find anew has to lie in memory, where it reads
it, and is written there before each step.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch


class StepNumbers:
    """Learning rates, the share of a step in the weight average, and whether this rank has been asked to stop.

    Seeds are none of them: a generator on the device keeps its seed in memory, where a graph reads it.

    Args:
        num_groups: parameter groups of the optimizer, of which each has a learning rate.
    """

    def __init__(self, num_groups: int, device: torch.device) -> None:
        # The fused optimizers read float32 on CUDA; on the CPU they take a number, for which float64 loses nothing.
        wide = torch.float32 if device.type == "cuda" else torch.float64
        self.rates = [torch.zeros((), dtype=wide, device=device) for _ in range(num_groups)]
        self.share = torch.zeros((), device=device)
        self.asked_to_stop = torch.zeros((), dtype=torch.float64, device=device)
        self._written = [0.0] * (num_groups + 2)

    def write(self, rates: Sequence[float], share: float, asked_to_stop: bool) -> None:
        """Writes the numbers of the next step, without waiting for the device.

        Args:
            rates: the learning rate of each group.
            share: `share_of` the step in the weight average: 1 - decay, or of an equal-weight one whether it counts.
        """
        tensors, numbers = [*self.rates, self.share, self.asked_to_stop], [*rates, share, float(asked_to_stop)]
        for tensor, number, written in zip(tensors, numbers, self._written, strict=True):
            if number != written:
                tensor.fill_(number)
        self._written = numbers
