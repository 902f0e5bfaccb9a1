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
    all_reduce, all_gather = dist.ProcessGroup.allreduce, dist.ProcessGroup.allgather

    def counting_all_reduce(group: dist.ProcessGroup, tensors: list[Tensor], *args: object, **kwargs: object) -> object:
        sent.extend((tensor.numel(), tensor.dtype) for tensor in tensors)
        return all_reduce(group, tensors, *args, **kwargs)

    def counting_all_gather(
        group: dist.ProcessGroup, outputs: list[list[Tensor]], tensors: list[Tensor], *args: object, **kwargs: object
    ) -> object:
        sent.extend((tensor.numel(), tensor.dtype) for tensor in tensors)
        return all_gather(group, outputs, tensors, *args, **kwargs)

    with (
        mock.patch.object(dist.ProcessGroup, "allreduce", counting_all_reduce),
        mock.patch.object(dist.ProcessGroup, "allgather", counting_all_gather),
    ):
        yield sent
