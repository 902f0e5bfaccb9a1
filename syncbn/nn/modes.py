"""Context managers that set the training or evaluation mode of a model's modules and restore it."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def restored_modes(model: nn.Module) -> Iterator[None]:
    """Restores the mode (`training`) of every module at the end of the context, also after an exception."""
    modes = {module: module.training for module in model.modules()}
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


@contextmanager
def evaluating(model: nn.Module, *, but: Collection[nn.Module] = ()) -> Iterator[None]:
    """Evaluation mode for every module inside of the context; training mode for those of `but` and their submodules."""
    with restored_modes(model):
        model.eval()
        for module in but:
            module.train()
        yield
