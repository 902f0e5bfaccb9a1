"""Applies the `bn` settings to a model: momentum, eps, synchronization over ranks, fusion."""

from __future__ import annotations

import logging

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from syncbn.nn.batchnorm import SyncBatchNorm
from syncbn.nn.groups import new_bn_groups, new_world_group
from syncbn.surgery.convert import convert_sync_batchnorm
from syncbn.surgery.fuse import FusionOutcome, fuse
from syncbn.training.config.errors import ConfigError, listed
from syncbn.training.config.model import BnConfig

log = logging.getLogger(__name__)


def set_up(model: nn.Module, bn: BnConfig) -> None:
    """Applies `bn` to the batch normalization layers of a newly built model, in place.

    Every rank calls it: making a process group (`bn.group`, `bn.own_group`) is a collective.

    Raises:
        ConfigError: a process group that cannot be made, or a layer class whose behavior conversion would lose.
    """
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
        for layer in model.modules():  # those that the model was built with, too
            if bn.skip_nonfinite and isinstance(layer, SyncBatchNorm):
                layer.skip_nonfinite = True
    if bn.fuse:
        reports = fuse(model, memory=bn.memory)
        left = [report for report in reports if report.reason]
        log.info("bn.fuse: fused %d of %d batch normalizations", len(reports) - len(left), len(reports))
        _log_reasons("bn.fuse: left", {report.name: report.reason for report in left if report.reason})
        if bn.memory == "lean":
            _log_memory(reports)


def _log_memory(reports: list[FusionOutcome]) -> None:
    num_lean = sum(report.memory == "lean" for report in reports)
    level = logging.INFO if num_lean else logging.WARNING
    log.log(level, "bn.memory: %d of %d batch normalizations are lean", num_lean, len(reports))
    keep = {report.name: report.memory_reason for report in reports if report.memory_reason}
    _log_reasons("bn.memory: keep their input:", keep)


def _log_reasons(what: str, reasons: dict[str, str]) -> None:
    """Logs one line per reason, with the names of the layers that it applies to."""
    layers: dict[str, list[str]] = {}
    for name, reason in reasons.items():
        layers.setdefault(reason, []).append(name or "the model")
    for reason, names in layers.items():
        log.info("%s %s: %s", what, listed(names, 3), reason)
