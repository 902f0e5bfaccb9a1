"""Modules of which tests/data holds whole pickles that version 0.1.0 wrote: their names and places must not change."""

import torch.nn.functional as F
from torch import Tensor, nn


class Doubled(nn.BatchNorm2d):
    """A subclass with a forward of its own."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * 2.0


class Block(nn.Module):
    """A layer and the activation that `fuse` leaves to it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 2, 3)
        self.bn = nn.BatchNorm2d(2)

    def forward(self, input: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(input)))
