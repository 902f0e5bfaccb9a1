"""Schemas of losses."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from syncbn.training.config.errors import require as require


@dataclass
class CrossEntropyConfig:
    """Cross entropy, averaged over samples (or pixels, for masks)."""

    name: str
    label_smoothing: float
    ignore_index: int | None
    """Targets of this value are excluded; None: 255 in masks, no value in labels."""

    def __post_init__(self) -> None:
        require(0 <= self.label_smoothing < 1, "loss.label_smoothing", "0 or more and below 1", self.label_smoothing)


LossConfig = CrossEntropyConfig | dict[str, Any]  # dict: a user's `_target_` and its arguments
