"""Rank, device, dtypes and memory format of this process."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


def in_dtype(outputs: Any, dtype: torch.dtype) -> Any:
    """Casts the floating-point tensors among a model's outputs to `dtype`.

    Goes into tuples, lists and dicts; a tuple becomes a list. Other values are returned unchanged.
    """
    if isinstance(outputs, Tensor):
        return outputs.to(dtype) if outputs.is_floating_point() else outputs
    if isinstance(outputs, dict):
        return {name: in_dtype(output, dtype) for name, output in outputs.items()}
    if isinstance(outputs, tuple | list):
        return [in_dtype(output, dtype) for output in outputs]
    return outputs


@dataclass(frozen=True)
class RankContext:
    """Rank, world size and device of this process, and the dtype and memory format of its images and parameters."""

    rank: int
    world_size: int
    device: torch.device
    dtype: torch.dtype
    autocast: torch.dtype | None = None
    """The dtype of torch.autocast in forward passes; None: no autocast, everything computes in `dtype`."""
    channels_last: bool = False

    @property
    def is_first(self) -> bool:
        """Whether this is rank 0, the only rank that prints, tracks and saves."""
        return self.rank == 0

    def put(self, images: Tensor) -> Tensor:
        """Copies images (N, C, ...) to the device, in this run's memory format, without blocking the host."""
        formats = {4: torch.channels_last, 5: torch.channels_last_3d} if self.channels_last else {}
        format = formats.get(images.dim(), torch.preserve_format)
        return images.to(self.device, memory_format=format, non_blocking=True)

    def forward_context(self) -> AbstractContextManager[None]:
        """Context for forward passes: autocast, if any. Outputs may then have another dtype than `dtype`."""
        return nullcontext() if self.autocast is None else torch.autocast(self.device.type, dtype=self.autocast)
