"""Builds torch optimizers, with their parameter groups, from the configuration."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, assert_never

import torch
from torch import nn

from syncbn.training.config.errors import ConfigError, one_line
from syncbn.training.config.instantiate import build_target, find_target
from syncbn.training.config.optim import AdamwConfig, CustomOptimizer, OptimizerConfig, SgdConfig
from syncbn.training.optim.groups import ParameterGroup, parameter_groups
from syncbn.training.optim.trial import Make, node_of, require_steps, skips_on_device

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class BuiltOptimizer:
    """An optimizer over all parameters of a model, frozen ones included, so that its groups never change."""

    optimizer: torch.optim.Optimizer
    groups: Sequence[ParameterGroup]
    """Its groups, in the same order."""
    skips_on_device: bool
    """Whether it leaves a step out where its attribute `found_inf` is 1, without the host (see trial.py)."""
    may_draw: bool
    """Whether a step may draw random numbers, which have to be the same on all ranks."""

    def table(self) -> list[tuple[str, ...]]:
        """A row (group, parameters, tensors, lr_scale, weight decay) for every group."""
        return [
            (
                group.name,
                str(sum(parameter.numel() for parameter in group.parameters.values())),
                str(len(group.parameters)),
                f"{group.lr_scale:g}",
                f"{own['weight_decay']:g}" if "weight_decay" in own else "none",
            )
            for group, own in zip(self.groups, self.optimizer.param_groups, strict=True)
        ]


def build_optimizer(config: OptimizerConfig, model: nn.Module, *, scaled: bool = False) -> BuiltOptimizer:
    """Builds the optimizer; its first learning rate is the peak, times `lr_scale` of the group.

    Tries it on copies of a few parameters, which draws and keeps nothing.

    Args:
        scaled: the loss is scaled, as with float16.

    Raises:
        ConfigError: groups that do not fit the model (see `parameter_groups`), sparse gradients, an argument that the
            optimizer does not take, or an optimizer that does not work here (see `require_steps`).
    """
    _require_dense(model)
    groups = parameter_groups(config, model)
    named, make = f"optimizer={config.name}", _maker(config)
    if isinstance(config, CustomOptimizer):
        named = f"optimizer._target_={config.name}"
    optimizer = _made(make, groups, named)
    with torch.random.fork_rng(devices=sorted({p.device.index for p in model.parameters() if p.is_cuda})):
        can_skip = False
        for candidate in _fused_first(make, config):
            if can_skip := skips_on_device(candidate, groups, scaled=scaled):
                optimizer = _made(candidate, groups, named)
                break
        require_steps(candidate if can_skip else make, groups, named)
    if not can_skip:
        log.info("%s cannot leave a step out on the device: the host waits for the device once a step", named)
    for group, own in zip(groups, optimizer.param_groups, strict=True):
        own["lr"] = own["lr"] * group.lr_scale
    return BuiltOptimizer(optimizer, groups, can_skip, may_draw=isinstance(config, CustomOptimizer))


def _maker(config: OptimizerConfig) -> Make:
    match config:
        case SgdConfig():
            return partial(torch.optim.SGD, lr=config.lr, momentum=config.momentum, weight_decay=config.weight_decay,
                           nesterov=config.nesterov)  # fmt: skip
        case AdamwConfig():
            first, second = config.betas
            return partial(torch.optim.AdamW, lr=config.lr, betas=(first, second), eps=config.eps,
                           weight_decay=config.weight_decay)  # fmt: skip
        case CustomOptimizer():
            make: Make = build_target("optimizer", {**_checked(config), "_partial_": True, "_convert_": "all"})
            return make
        case _:
            assert_never(config)


def _checked(config: CustomOptimizer) -> dict[str, Any]:
    """The node of the optimizer, whose keys are all arguments of it; a ConfigError for one that is not."""
    known = _arguments(find_target("optimizer", config.name))
    for key in config.arguments:
        if known is not None and key not in known and not key.startswith("_"):
            raise ConfigError(f"optimizer.{key}: {config.name} takes no such argument, only {', '.join(known)}")
    return config.arguments


def _arguments(target: Callable[..., Any]) -> list[str] | None:
    """Names of the arguments after the first, which are the parameters; None if any name may be one."""
    try:
        _, *others = inspect.signature(target).parameters.values()
    except (TypeError, ValueError):  # some builtins have no signature
        return None
    return None if any(one.kind is one.VAR_KEYWORD for one in others) else [one.name for one in others]


def _fused_first(make: Make, config: OptimizerConfig) -> list[Make]:
    """The ways in which it may skip a step on the device, the most likely one first."""
    assert isinstance(make, partial)
    is_open = "fused" in (_arguments(make.func) or ()) and "fused" not in make.keywords
    return [partial(make, fused=True), make] if is_open else [make]


def _made(make: Make, groups: Sequence[ParameterGroup], named: str) -> torch.optim.Optimizer:
    try:
        optimizer = make([node_of(group) for group in groups])
    except Exception as error:
        raise ConfigError(f"{named}: {one_line(error)}") from None
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise ConfigError(f"{named}: expected a torch.optim.Optimizer, got {type(optimizer).__name__}")
    if "lr" not in optimizer.param_groups[0]:
        raise ConfigError(f"{named}: has no lr in its parameter groups, which the schedule sets; choose another")
    if "weight_decay" not in optimizer.defaults and any(group.weight_decay is not None for group in groups):
        raise ConfigError(
            f"{named}: has no weight_decay; leave it out of optimizer.groups, and optimizer.decay_norm_and_bias too"
        )
    return optimizer


def _require_dense(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding | nn.EmbeddingBag) and module.sparse:
            raise ConfigError(f"model: {name or 'its embedding'} makes sparse gradients, which no optimizer takes here;"
                              " make it with sparse=False")  # fmt: skip
