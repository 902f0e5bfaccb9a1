"""Where a rank works."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Place:
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
        return images.to(self.device, memory_format=formats.get(images.dim(), torch.preserve_format))

    def forward_context(self) -> AbstractContextManager[None]:
        """A context for forward passes. Its outputs may be of another type than `dtype`."""
        return nullcontext() if self.autocast is None else torch.autocast(self.device.type, dtype=self.autocast)
