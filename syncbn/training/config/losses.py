"""Schemas of losses."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from syncbn.training.config.errors import require as require

BALANCED = "balanced"


@dataclass
class CrossEntropyConfig:
    """Cross entropy, averaged over samples (or pixels, for masks)."""

    name: str
    label_smoothing: float
    ignore_index: int | None
    """Targets of this value are excluded; None: 255 in masks, no value in labels."""
    class_weights: str | list[float] | None = None
    """A number for each class, or "balanced": n / (classes * n of the class) over the training data; then the average
    is weighted, in validation too.
    """

    def __post_init__(self) -> None:
        _check_smoothing(self.label_smoothing)
        _check_weights(self.class_weights)


@dataclass
class DiceConfig:
    """1 - Dice of the classes but 0, averaged over the classes of an image, then over images; for masks."""

    name: str
    ignore_index: int | None
    """Pixels of this value are excluded; None: 255."""
    smooth: float
    """Added above and below the fraction: more than 0 gives a class that only the prediction has a gradient."""

    def __post_init__(self) -> None:
        require(self.smooth >= 0, "loss.smooth", "0 or more", self.smooth)


@dataclass
class CrossEntropyAndDiceConfig:
    """Cross entropy, averaged over the pixels of an image first, plus Dice; for masks."""

    name: str
    label_smoothing: float
    ignore_index: int | None
    """Pixels of this value are excluded; None: 255."""
    class_weights: str | list[float] | None
    """Of the cross entropy: a number for each class, or "balanced", as for cross entropy alone."""
    smooth: float
    """Of Dice: added above and below the fraction."""

    def __post_init__(self) -> None:
        _check_smoothing(self.label_smoothing)
        _check_weights(self.class_weights)
        require(self.smooth >= 0, "loss.smooth", "0 or more", self.smooth)


@dataclass
class BinaryCrossEntropyConfig:
    """Binary cross entropy, averaged over samples and labels, of targets with a 0 or 1 for each label."""

    name: str
    ignore_index: int | None
    """Targets of this value are excluded; None: no such value."""


@dataclass
class MeanSquaredErrorConfig:
    """Squared error, averaged over all numbers of the targets."""

    name: str


# dict: a user's `_target_` and its arguments
LossConfig = (
    CrossEntropyConfig
    | DiceConfig
    | CrossEntropyAndDiceConfig
    | BinaryCrossEntropyConfig
    | MeanSquaredErrorConfig
    | dict[str, Any]
)


def _check_smoothing(value: float) -> None:
    require(0 <= value < 1, "loss.label_smoothing", "0 or more and below 1", value)


def _check_weights(value: object) -> None:
    numbers = value if isinstance(value, list) else []
    are_numbers = all(isinstance(one, int | float) and not isinstance(one, bool) and one >= 0 for one in numbers)
    valid = value in (None, BALANCED) or (are_numbers and any(numbers))
    require(valid, "loss.class_weights", "null, balanced, or a number of 0 or more for each class", value)
