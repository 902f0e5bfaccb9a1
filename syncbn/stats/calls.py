"""Arguments of a batch normalization layer's forward, as forward hooks receive them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.lazy import LazyModuleMixin

from syncbn.nn.batchnorm import SyncBatchNorm
from syncbn.nn.functional import as_mask


def has_lazy_layers(model: nn.Module) -> bool:
    """Whether any module is lazy and not initialized: its first batch determines its width."""
    return any(isinstance(module, LazyModuleMixin) and module.has_uninitialized_params() for module in model.modules())


def input_of(arguments: Sequence[Any], keywords: Mapping[str, Any]) -> Tensor | None:
    """The input of a forward call, given by position or by keyword; None if it is not a tensor."""
    input = arguments[0] if arguments else keywords.get("input")
    return input if isinstance(input, Tensor) else None


def counted(layer: nn.Module, arguments: Sequence[Any], keywords: Mapping[str, Any]) -> tuple[Tensor, Tensor | None]:
    """The detached input of a forward call, 0 where it is masked out, and the mask as bool (None without one).

    Raises:
        ValueError: a mask that does not fit the input.
    """
    input = input_of(arguments, keywords)
    assert input is not None
    mask = arguments[1] if len(arguments) > 1 else keywords.get("mask")
    # The forward of another class may take a different second argument.
    if type(layer).forward is not SyncBatchNorm.forward or mask is None:
        return input.detach(), None
    mask = as_mask(mask, input)
    return torch.where(mask, input.detach(), 0.0), mask
