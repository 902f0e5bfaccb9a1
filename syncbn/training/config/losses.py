"""The schemas of losses."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from syncbn.training.config.errors import require as require


@dataclass
class CrossEntropyConfig:
    """Cross entropy, a mean over samples or pixels."""

    name: str
    label_smoothing: float
    ignore_index: int | None
    """Targets of this value do not count; None: 255 in masks, else none."""

    def __post_init__(self) -> None:
        require(0 <= self.label_smoothing < 1, "loss.label_smoothing", "0 or more and below 1", self.label_smoothing)


LossConfig = CrossEntropyConfig | dict[str, Any]  # the latter: a `_target_` and its arguments
