"""Builds the model of the configuration: the built-in residual network or U-Net, or a user's own."""

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
    """Builds the model of the configuration and applies `bn` to its batch normalization.

    Every rank calls it: with `bn.sync`, making process groups is a collective.

    Args:
        in_channels: channels of the data's images.
        num_classes: number of classes of the data; None if its targets are not classes.

    Raises:
        ConfigError: a `_target_` that cannot be imported or called or is not an `nn.Module`; a built-in model for data
            without classes; see also `normalization.set_up`.
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
    """Builds the user's model; replaces the argument values "data.num_channels" and "data.num_classes" by numbers."""
    target = str(config["_target_"])
    if target.startswith("timm.") and find_spec("timm") is None:
        raise ConfigError(f"model._target_={target}: timm is not installed; pip install timm")
    known = {"data.num_channels": in_channels, "data.num_classes": num_classes}
    named = {key: known.get(value, value) if isinstance(value, str) else value for key, value in config.items()}
    model: nn.Module = build_target("model", named, nn.Module, in_channels=in_channels, num_classes=num_classes)
    return model
