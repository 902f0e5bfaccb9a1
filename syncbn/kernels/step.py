"""What `cpu_step` and `cuda_step` share: the running statistics of a layer, and the tensors that they may take."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor, nn

# Types of tensors whose operators nobody overrides.
PLAIN = frozenset([Tensor, nn.Parameter, type(None)])


class Statistics(NamedTuple):
    """The running statistics that a forward pass moves, and how."""

    running_mean: Tensor | None
    running_var: Tensor | None
    num_batches_tracked: Tensor | None
    momentum: float | None
    eps: float
