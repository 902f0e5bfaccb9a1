"""Results of past steps, read without waiting for the device."""

from __future__ import annotations

from collections import deque

import torch
from torch import Tensor


class DeferredResults:
    """A queue of small results of past steps, read without waiting for the work that the device still has.

    On a GPU a result is read one step later, from an asynchronous copy to pinned memory; on the CPU at once.

    Args:
        lag: steps between posting a result and reading it; None is 1 on a GPU and 0 on the CPU.
    """

    def __init__(self, device: torch.device, lag: int | None = None) -> None:
        self._lag = int(device.type == "cuda") if lag is None else lag
        self._waiting: deque[tuple[int, Tensor, torch.cuda.Event | None]] = deque()

    def post(self, step: int, values: Tensor) -> None:
        """Starts the copy of a step's values to the host."""
        if values.device.type == "cuda":
            on_host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            on_host.copy_(values, non_blocking=True)
            arrived = torch.cuda.Event()
            arrived.record()
            self._waiting.append((step, on_host, arrived))
        else:
            self._waiting.append((step, values, None))

    def take(self, *, everything: bool = False) -> list[tuple[int, list[float]]]:
        """Removes and returns the results that are due, oldest first; with `everything` all, waiting for copies."""
        due = []
        while len(self._waiting) > (0 if everything else self._lag):
            step, values, arrived = self._waiting.popleft()
            if arrived is not None:
                arrived.synchronize()
            due.append((step, values.tolist()))
        return due

    def clear(self) -> None:
        """Discards the results that have not been read."""
        self._waiting.clear()
