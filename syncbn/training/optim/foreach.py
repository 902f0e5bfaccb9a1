"""Operators on lists of tensors, with one call per device and dtype."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor
from torch.nn.utils import get_total_norm

from syncbn.torch_compat import has_non_finite


def multiply(tensors: list[Tensor], factor: Tensor) -> None:
    """Multiplies tensors in place by a scalar tensor, with one operator per device and dtype."""
    for (device, _), group in by_type(tensors).items():
        torch._foreach_mul_(group, factor.to(device))


def all_finite(tensors: list[Tensor], device: torch.device) -> Tensor:
    """Whether every element is finite, as a bool scalar tensor on `device`; does not synchronize with the host."""
    bad = torch.zeros((), device=device)
    for (_, dtype), group in by_type(tensors).items():
        if dtype in (torch.float32, torch.float64):
            found = has_non_finite(group)
        else:
            found = ~get_total_norm(group, math.inf).isfinite()
        bad = bad + found.to(device)
    return bad == 0


def by_type(tensors: Iterable[Tensor]) -> dict[tuple[torch.device, torch.dtype], list[Tensor]]:
    """Groups tensors by device and dtype, in order, for operators that take a list of equal ones."""
    groups: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for tensor in tensors:
        groups.setdefault((tensor.device, tensor.dtype), []).append(tensor)
    return groups
