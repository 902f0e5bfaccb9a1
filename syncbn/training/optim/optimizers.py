"""Optimizers: torch's, from the configuration."""

from __future__ import annotations

from typing import assert_never

import torch
from torch import nn

from syncbn.training.config.optim import OptimizerConfig, SgdConfig


def build(config: OptimizerConfig, model: nn.Module) -> torch.optim.Optimizer:
    """The optimizer of the configuration over all parameters, frozen ones too: its membership never changes."""
    match config:
        case SgdConfig():
            return torch.optim.SGD(
                model.parameters(),
                lr=config.lr,
                momentum=config.momentum,
                weight_decay=config.weight_decay,
                nesterov=config.nesterov,
                fused=True,  # can leave a step out on the device; see update.py
            )
        case _:
            assert_never(config)
