"""The mean and the standard deviation that `data.mean` and `data.std` name, where they are not those of the images."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from syncbn.training.config.errors import ConfigError

# Of ImageNet's training images, RGB between 0 and 1, as torchvision's and timm's pretrained networks expect them.
IMAGENET = {"data.mean": (0.485, 0.456, 0.406), "data.std": (0.229, 0.224, 0.225)}
OF_INIT = "init."


def given_statistic(key: str, value: Any, num_channels: int) -> Tensor | str | None:
    """The statistic that a configuration gives.

    Args:
        key: "data.mean" or "data.std".
        value: its checked value.

    Returns:
        (1, C, 1, 1) float64; None for "auto"; "init.<name>" as it is, because the data set does not know that file.

    Raises:
        ConfigError: numbers for another number of channels.
    """
    if value == "auto":
        return None
    if isinstance(value, str) and value.startswith(OF_INIT):
        return value
    numbers = IMAGENET[key] if value == "imagenet" else value if isinstance(value, list) else [value] * num_channels
    if len(numbers) != num_channels:
        raise ConfigError(f"{key}: expected a number, or {num_channels} for the channels of the images, got {value!r}")
    return torch.tensor(numbers, dtype=torch.float64)[None, :, None, None]
