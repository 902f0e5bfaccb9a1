"""The moments of several forward passes, pooled until they move a layer's running statistics as one batch."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from syncbn.nn.moments import Moments


class Pool:
    """The moments that a layer has seen since the context began."""

    def __init__(self, layer: _BatchNorm) -> None:
        assert layer.running_mean is not None
        self.running_mean = layer.running_mean
        size = 4 * layer.running_mean.numel() + 1
        self.packed = torch.zeros(size, dtype=torch.float64, device=layer.running_mean.device)

    def commit(self, layer: _BatchNorm) -> None:
        """Moves the layer's running statistics by all of them, as one batch; without samples nothing moves."""
        counter: Tensor | None = layer.num_batches_tracked
        Moments(self.packed).move(layer.running_mean, layer.running_var, counter, layer.momentum)
