"""`graph=true`: checks at start that the steps of a run can be captured."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from syncbn.nn import rank_checks
from syncbn.nn.batchnorm import SyncBatchNorm
from syncbn.training.config.duration import Duration
from syncbn.training.config.errors import ConfigError
from syncbn.training.config.schema import Config
from syncbn.training.optim.optimizers import BuiltOptimizer
from syncbn.training.trainer.capture import CAPTURES, Capture


def check(config: Config, device: torch.device, world_size: int) -> None:
    """Checks that a run with this configuration can be captured on this machine, if `graph` is set.

    Raises:
        ConfigError: it cannot; the message names the key and the remedy.
    """
    if not config.graph:
        return
    if device.type not in CAPTURES:
        raise ConfigError("graph: expected an NVIDIA GPU, whose graphs these are, got a CPU; set graph=false")
    if config.compile is not False:
        raise ConfigError(
            "graph: goes without compile, which launches in its own way; set compile=false or graph=false"
        )
    if config.bn.debug or rank_checks.enabled:
        raise ConfigError(
            "graph: bn.debug compares the ranks on the host before each collective, which a graph leaves out; set"
            " bn.debug=false (and unset SYNCBN_DEBUG), or graph=false"
        )
    if world_size > 1 and config.bn.sync and (config.bn.own_group or config.bn.group != "world"):
        key = "own_group=false" if config.bn.own_group else "group=world"
        raise ConfigError(
            "graph: all collectives of a step have to go through one communicator, whose order is the same on every"
            f" rank; set bn.{key}, or graph=false"
        )


def check_parts(config: Config, built: BuiltOptimizer, model: nn.Module, steps_per_epoch: int) -> None:
    """Checks that optimizer and layers can be captured, and that there are steps to replay, if `graph` is set.

    Raises:
        ConfigError: not so; the message names the key and the remedy.
    """
    if not config.graph:
        return
    if built.may_draw or not built.skips_on_device:
        reason = "may draw random numbers on the host" if built.may_draw else "waits for the device in every step"
        raise ConfigError(f"graph: this optimizer {reason}; choose optimizer=sgd or adamw, or set graph=false")
    for key in ("log_every", "eval_every"):
        text = getattr(config, key)
        if Duration.parse(text).in_steps(steps_per_epoch) <= 1:
            raise ConfigError(
                f"graph: has no effect with {key}={text}, because steps that record statistics are not replayed; choose"
                f" a larger {key}, or set graph=false"
            )
    for name, module in model.named_modules():
        is_plain = isinstance(module, _NormBase) and not isinstance(module, SyncBatchNorm)
        if is_plain and module.momentum is None and module.track_running_stats:
            raise ConfigError(
                f"graph: {name}, a {type(module).__name__} with momentum=None, waits for its counter in every step; set"
                " bn.sync=true, which counts on the device, or graph=false"
            )


def capture_for(config: Config, device: torch.device) -> Capture | None:
    """What captures the steps of a run that has been checked; None without `graph`."""
    return CAPTURES[device.type](device) if config.graph else None
