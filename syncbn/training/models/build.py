"""Models: the residual network that comes with the service, and anybody's own."""

from __future__ import annotations

import logging
from importlib.util import find_spec
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from syncbn.nn.groups import new_bn_groups, new_world_group
from syncbn.surgery.convert import convert_sync_batchnorm
from syncbn.surgery.fuse import FusionReport, fuse
from syncbn.training.config.instantiate import build_target
from syncbn.training.config.model import BnConfig, ResnetSmallConfig, UnetSmallConfig
from syncbn.training.config.schema import ConfigError
from syncbn.training.models.resnet import Norm, ResnetSmall, group_norm
from syncbn.training.models.unet import UnetSmall

log = logging.getLogger(__name__)


def build(config: Any, bn: BnConfig, in_channels: int, num_classes: int | None) -> nn.Module:
    """The model of the configuration, its batch normalization set up and, with `bn.sync`, synchronized.

    Arguments of a `_target_` that are the words `data.num_channels` or `data.num_classes` become what the data has.

    Raises:
        ConfigError: a `_target_` that cannot be imported or called; a model without a trainable parameter.
    """
    if num_classes is None and not isinstance(config, dict):
        raise ConfigError(f"model: {config.name} is for classes, which this data has not; choose model=custom")
    if isinstance(config, ResnetSmallConfig):
        norm: Norm = group_norm if config.norm == "group" else nn.BatchNorm2d
        size = (config.width, config.depth, config.stages)
        model: nn.Module = ResnetSmall(in_channels, num_classes or 0, *size, norm)
    elif isinstance(config, UnetSmallConfig):
        model = UnetSmall(in_channels, num_classes or 0, config.width, config.depth)
    else:
        model = _build_own(config, in_channels, num_classes)
    for layer in model.modules():
        if isinstance(layer, _BatchNorm):
            if bn.momentum is not None:
                layer.momentum = None if bn.momentum == "cumulative" else float(bn.momentum)
            if bn.eps is not None:
                layer.eps = bn.eps
    if bn.sync:
        try:
            if bn.group != "world":
                group = new_bn_groups(bn.group)
            else:
                group = new_world_group() if bn.own_group else None
        except ValueError as error:
            raise ConfigError(f"bn.group: {error}") from None
        try:
            convert_sync_batchnorm(model, group)
        except TypeError as error:
            reason = str(error).partition("; leave it out")[0]
            raise ConfigError(f"bn.sync: {reason}; set bn.sync=false") from None
    if bn.fuse:
        reports = fuse(model, memory=bn.memory)
        left = [report for report in reports if report.reason]
        log.info("bn.fuse: fused %d of %d batch normalizations", len(reports) - len(left), len(reports))
        _log_reasons("bn.fuse: left", {report.name: report.reason for report in left if report.reason})
        if bn.memory == "lean":
            _log_memory(reports)
    return model


def _log_memory(reports: list[FusionReport]) -> None:
    num_lean = sum(report.memory == "lean" for report in reports)
    level = logging.INFO if num_lean else logging.WARNING
    log.log(level, "bn.memory: %d of %d batch normalizations are lean", num_lean, len(reports))
    keep = {report.name: report.memory_reason for report in reports if report.memory_reason}
    _log_reasons("bn.memory: keep their input:", keep)


def _log_reasons(what: str, reasons: dict[str, str]) -> None:
    """A line per reason, however many layers it is the reason of."""
    layers: dict[str, list[str]] = {}
    for name, reason in reasons.items():
        layers.setdefault(reason, []).append(name or "the model")
    for reason, names in layers.items():
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        log.info("%s %s%s: %s", what, ", ".join(names[:3]), more, reason)


def _build_own(config: dict[str, Any], in_channels: int, num_classes: int | None) -> nn.Module:
    """The user's model; `data.num_channels` and `data.num_classes` as values stand for what they name."""
    target = str(config["_target_"])
    if target.startswith("timm.") and find_spec("timm") is None:
        raise ConfigError(f"model._target_={target}: timm is not installed; pip install timm")
    known = {"data.num_channels": in_channels, "data.num_classes": num_classes}
    named = {key: known.get(value, value) if isinstance(value, str) else value for key, value in config.items()}
    model: nn.Module = build_target("model", named, nn.Module, in_channels=in_channels, num_classes=num_classes)
    return model
