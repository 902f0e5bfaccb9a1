"""Where a rank works."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


def in_dtype(outputs: Any, dtype: torch.dtype) -> Any:
    """A model's outputs in `dtype`, also where they are a tuple, list or dict of tensors."""
    if isinstance(outputs, Tensor):
        return outputs.to(dtype) if outputs.is_floating_point() else outputs
    if isinstance(outputs, dict):
        return {name: in_dtype(output, dtype) for name, output in outputs.items()}
    if isinstance(outputs, tuple | list):
        return [in_dtype(output, dtype) for output in outputs]
    return outputs


@dataclass(frozen=True)
class RankContext:
    """This rank among the others, its device, and the type of images and parameters there."""

    rank: int
    world_size: int
    device: torch.device
    dtype: torch.dtype
    autocast: torch.dtype | None = None
    """What operators that gain by it compute in (torch.autocast); None for `dtype` throughout."""
    channels_last: bool = False

    @property
    def is_first(self) -> bool:
        """Whether this is rank 0, which alone prints, tracks and saves."""
        return self.rank == 0

    def put(self, images: Tensor) -> Tensor:
        """Images on the device, in the memory format of this run."""
        formats = {4: torch.channels_last, 5: torch.channels_last_3d} if self.channels_last else {}
        format = formats.get(images.dim(), torch.preserve_format)
        return images.to(self.device, memory_format=format, non_blocking=True)

    def forward_context(self) -> AbstractContextManager[None]:
        """A context for forward passes. Its outputs may be of another type than `dtype`."""
        return nullcontext() if self.autocast is None else torch.autocast(self.device.type, dtype=self.autocast)
