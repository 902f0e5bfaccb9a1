"""Results of steps that are over, read without waiting for the device."""

from __future__ import annotations

from collections import deque

import torch
from torch import Tensor


class DeferredResults:
    """Small results of past steps, read without waiting for what the device is still doing.

    On a GPU a result is read one step later, from a copy that travels meanwhile; on the CPU at once.

    Args:
        lag: steps between a result and its reading; None: by device.
    """

    def __init__(self, device: torch.device, lag: int | None = None) -> None:
        self._lag = int(device.type == "cuda") if lag is None else lag
        self._waiting: deque[tuple[int, Tensor, torch.cuda.Event | None]] = deque()

    def post(self, step: int, values: Tensor) -> None:
        """Sends a step's values on their way to the host."""
        if values.device.type == "cuda":
            on_host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            on_host.copy_(values, non_blocking=True)
            arrived = torch.cuda.Event()
            arrived.record()
            self._waiting.append((step, on_host, arrived))
        else:
            self._waiting.append((step, values, None))

    def take(self, *, everything: bool = False) -> list[tuple[int, list[float]]]:
        """The steps that are due, oldest first, each once; with `everything` also those that have to be waited for."""
        due = []
        while len(self._waiting) > (0 if everything else self._lag):
            step, values, arrived = self._waiting.popleft()
            if arrived is not None:
                arrived.synchronize()
            due.append((step, values.tolist()))
        return due

    def clear(self) -> None:
        """Forgets what has not been read."""
        self._waiting.clear()
