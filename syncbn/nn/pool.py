"""Pooled moments of several forward passes, which update a layer's running statistics as one batch."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from syncbn.nn.moments import Moments


class Pool:
    """Sum of the packed moments of a layer's training forward passes since the context began."""

    def __init__(self, layer: _BatchNorm) -> None:
        assert layer.running_mean is not None
        self.running_mean = layer.running_mean
        size = 4 * layer.running_mean.numel() + 1
        self.packed = torch.zeros(size, dtype=torch.float64, device=layer.running_mean.device)

    def commit(self, layer: _BatchNorm) -> None:
        """Updates the layer's running statistics as one batch with the pooled moments; does nothing without samples."""
        counter: Tensor | None = layer.num_batches_tracked
        Moments(self.packed).move(layer.running_mean, layer.running_var, counter, layer.momentum)
