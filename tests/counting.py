"""Counting what is sent, whichever collective sends it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor


@contextmanager
def collectives() -> Iterator[list[tuple[int, torch.dtype]]]:
    """A list that grows by (numbers, type) of what this rank gives to each collective."""
    sent: list[tuple[int, torch.dtype]] = []
    all_reduce, all_gather = dist.all_reduce, dist.all_gather

    def counting_all_reduce(tensor: Tensor, *args: object, **kwargs: object) -> object:
        sent.append((tensor.numel(), tensor.dtype))
        return all_reduce(tensor, *args, **kwargs)

    def counting_all_gather(outputs: list[Tensor], tensor: Tensor, *args: object, **kwargs: object) -> object:
        sent.append((tensor.numel(), tensor.dtype))
        return all_gather(outputs, tensor, *args, **kwargs)

    with (
        mock.patch.object(dist, "all_reduce", counting_all_reduce),
        mock.patch.object(dist, "all_gather", counting_all_gather),
    ):
        yield sent
