"""Builds torch optimizers from the configuration."""

from __future__ import annotations

from typing import assert_never

import torch
from torch import nn

from syncbn.training.config.optim import OptimizerConfig, SgdConfig


def build_optimizer(config: OptimizerConfig, model: nn.Module) -> torch.optim.Optimizer:
    """Builds the optimizer over all parameters, also frozen ones, so that its parameter groups never change."""
    match config:
        case SgdConfig():
            return torch.optim.SGD(
                model.parameters(),
                lr=config.lr,
                momentum=config.momentum,
                weight_decay=config.weight_decay,
                nesterov=config.nesterov,
                fused=True,  # needed to skip a step on the device; see update.py
            )
        case _:
            assert_never(config)
