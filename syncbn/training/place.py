"""Where a rank works."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Place:
    """This rank among the others, its device, and the type of images and parameters there."""

    rank: int
    world_size: int
    device: torch.device
    dtype: torch.dtype

    @property
    def is_first(self) -> bool:
        """Whether this is rank 0, which alone prints, tracks and saves."""
        return self.rank == 0
