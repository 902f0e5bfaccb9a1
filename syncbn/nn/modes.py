"""The modes of a model, training or evaluation, module by module: set for a while, and put back."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def restored_modes(model: nn.Module) -> Iterator[None]:
    """Whatever happens inside, every module is in its own mode again afterwards, on every path."""
    modes = {module: module.training for module in model.modules()}
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


@contextmanager
def evaluating(model: nn.Module, *, but: Collection[nn.Module] = ()) -> Iterator[None]:
    """Evaluation mode for every module; the modules of `but`, and all below them, train."""
    with restored_modes(model):
        model.eval()
        for module in but:
            module.train()
        yield
