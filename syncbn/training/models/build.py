"""Models: the residual network that comes with the service, and anybody's own."""

from __future__ import annotations

import logging
from importlib.util import find_spec
from typing import Any, assert_never

from torch import nn

from syncbn.training.config.errors import ConfigError
from syncbn.training.config.instantiate import build_target
from syncbn.training.config.model import BnConfig, ModelConfig, ResnetSmallConfig, UnetSmallConfig
from syncbn.training.models.normalization import set_up
from syncbn.training.models.resnet import Norm, ResnetSmall, group_norm
from syncbn.training.models.unet import UnetSmall

log = logging.getLogger(__name__)


def build_network(config: ModelConfig, bn: BnConfig, in_channels: int, num_classes: int | None) -> nn.Module:
    """The model of the configuration, its batch normalization set up and, with `bn.sync`, synchronized.

    Arguments of a `_target_` that are the words `data.num_channels` or `data.num_classes` become what the data has.

    Raises:
        ConfigError: a `_target_` that cannot be imported or called; a model without a trainable parameter.
    """
    if num_classes is None and not isinstance(config, dict):
        raise ConfigError(f"model: {config.name} is for classes, which this data has not; choose model=custom")
    model: nn.Module
    match config:
        case ResnetSmallConfig():
            norm: Norm = group_norm if config.norm == "group" else nn.BatchNorm2d
            size = (config.width, config.depth, config.stages)
            model = ResnetSmall(in_channels, num_classes or 0, *size, norm)
        case UnetSmallConfig():
            model = UnetSmall(in_channels, num_classes or 0, config.width, config.depth)
        case dict():
            model = _build_own(config, in_channels, num_classes)
        case _:
            assert_never(config)
    set_up(model, bn)
    return model


def _build_own(config: dict[str, Any], in_channels: int, num_classes: int | None) -> nn.Module:
    """The user's model; `data.num_channels` and `data.num_classes` as values stand for what they name."""
    target = str(config["_target_"])
    if target.startswith("timm.") and find_spec("timm") is None:
        raise ConfigError(f"model._target_={target}: timm is not installed; pip install timm")
    known = {"data.num_channels": in_channels, "data.num_classes": num_classes}
    named = {key: known.get(value, value) if isinstance(value, str) else value for key, value in config.items()}
    model: nn.Module = build_target("model", named, nn.Module, in_channels=in_channels, num_classes=num_classes)
    return model
