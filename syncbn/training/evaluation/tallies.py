"""What every evaluation counts, by sums alone: without torchmetrics, whose import takes as long as torch's."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor


class Tally(ABC):
    """Sums over the samples of a split, and what follows from them; `add_over_ranks` makes them those of all ranks."""

    def __init__(self, size: int) -> None:
        self.sums = torch.zeros(size, dtype=torch.float64)

    def begin(self, device: torch.device) -> None:
        """Zeros on the device."""
        self.sums = torch.zeros_like(self.sums, device=device)

    @abstractmethod
    def update(self, outputs: Tensor, targets: Tensor) -> None:
        """Adds a batch."""

    @abstractmethod
    def compute(self) -> Tensor | dict[str, Tensor]:
        """The value, or values by name."""


class Total(Tally):
    """Sum and count of a loss; its value is the mean over all that the loss counts, not one of batches or ranks."""

    def __init__(self) -> None:
        super().__init__(2)

    def update(self, outputs: Tensor, targets: Tensor) -> None:
        """Adds a sum (the outputs) and its count (the targets), each without dimensions."""
        self.sums += torch.stack([outputs.to(self.sums), targets.to(self.sums)])

    def compute(self) -> Tensor:
        """The mean."""
        return self.sums[0] / self.sums[1]


class Accuracy(Tally):
    """The share of right labels among those that count.

    Args:
        ignore_index: labels of this value do not count; None: all do.
    """

    def __init__(self, ignore_index: int | None) -> None:
        super().__init__(2)
        self._ignore = ignore_index

    def update(self, outputs: Tensor, targets: Tensor) -> None:
        """Adds logits (N, C, ...) and labels (N, ...)."""
        predicted, labels = _counted(outputs, targets, self._ignore)
        self.sums[0] += (predicted == labels).sum()
        self.sums[1] += labels.numel()

    def compute(self) -> Tensor:
        """The share in float32, as torchmetrics has it; 0 if no label counts."""
        right, all_of_them = self.sums.to(torch.float32)
        return right / all_of_them.clamp(min=1)


class ClassBalance(Tally):
    """How far accuracy can mislead: the recall averaged over classes, and how uneven the classes are.

    Its values: `recall`, over the classes that occur; `ratio`, of the most frequent class to the rarest that occurs.
    """

    def __init__(self, num_classes: int, ignore_index: int | None) -> None:
        super().__init__(2 * num_classes)
        self._num_classes, self._ignore = num_classes, ignore_index

    def update(self, outputs: Tensor, targets: Tensor) -> None:
        """Adds logits (N, C, ...) and labels (N, ...)."""
        predicted, labels = _counted(outputs, targets, self._ignore)
        counts = [torch.bincount(of, minlength=self._num_classes) for of in (labels[predicted == labels], labels)]
        self.sums += torch.cat(counts)

    def compute(self) -> dict[str, Tensor]:
        """The values of the split."""
        right, counts = self.sums.view(2, -1)
        occurs = counts > 0
        counts = counts[occurs]
        return {"recall": (right[occurs] / counts).mean(), "ratio": counts.max() / counts.min()}


def _counted(outputs: Tensor, targets: Tensor, ignore: int | None) -> tuple[Tensor, Tensor]:
    """Predicted and true labels, flat, without those that do not count."""
    predicted = outputs.argmax(1) if outputs.dim() == targets.dim() + 1 else outputs
    predicted, labels = predicted.flatten(), targets.flatten()
    if ignore is None:
        return predicted, labels
    counts = labels != ignore
    return predicted[counts], labels[counts]


def add_over_ranks(tallies: Sequence[Tally]) -> None:
    """Replaces the sums by those over all ranks, in one collective; with the same bits on each of them."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return
    packed = torch.cat([tally.sums for tally in tallies])
    parts = [torch.empty_like(packed) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, packed)
    sums = torch.stack(parts).sum(0).split([len(tally.sums) for tally in tallies])
    for tally, summed in zip(tallies, sums, strict=True):
        tally.sums = summed
