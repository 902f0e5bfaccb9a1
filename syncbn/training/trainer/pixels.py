"""Mean and standard deviation of the pixels that a pretrained sub-network was trained on (`data.mean=init.<name>`)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from syncbn.training.checkpoint.files import read_best_or_newest
from syncbn.training.config.errors import ConfigError
from syncbn.training.config.model import InitConfig
from syncbn.training.data.dataset import Data
from syncbn.training.data.images import ImageData
from syncbn.training.data.pixel_stats import OF_INIT


def with_statistics_of_init(data: Data, init: Mapping[str, InitConfig]) -> Data:
    """The data, normalized by the statistics that the files of pretrained sub-networks store, where it is to be so.

    Raises:
        ConfigError: `init` loads no such sub-network; its file stores no statistics, or those of other channels.
    """
    if not isinstance(data, ImageData):
        return data
    found: dict[str, Any] = {}
    for name, value in (("mean", data.mean), ("std", data.std)):
        if isinstance(value, str):
            found[name] = _stored(f"data.{name}={value}", name, value.removeprefix(OF_INIT), init, data.num_channels)
    return replace(data, **found) if found else data


def _stored(given: str, statistic: str, subnet: str, init: Mapping[str, InitConfig], num_channels: int) -> Tensor:
    if subnet not in init:
        raise ConfigError(f"{given}: init loads no {subnet}, only {', '.join(init) or 'nothing'}; give"
                          f" init.{subnet}.path, or numbers")  # fmt: skip
    stored = read_best_or_newest(Path(init[subnet].path), f"init.{subnet}.path")
    description = stored.content.get("data")
    value = description.get(statistic) if isinstance(description, dict) else None
    if not isinstance(value, Tensor) or not value.is_floating_point() or value.shape != (1, num_channels, 1, 1):
        what = "none" if value is None else "that of images of other channels"
        raise ConfigError(f"{given}: {stored.path} stores {what}; expected a checkpoint of train.py on images of"
                          f" {num_channels} channels, or give imagenet or numbers")  # fmt: skip
    return value
