"""Results of past steps, read without waiting for the device."""

from __future__ import annotations

import time
from collections import deque
from typing import Protocol

import torch
from torch import Tensor

_PAUSE = 1e-4  # seconds between looks at a copy: short beside a step


class Arrival(Protocol):
    """A point in the work of a device, as `torch.cuda.Event`."""

    def query(self) -> bool: ...

    def synchronize(self) -> None: ...


def wait_for(arrival: Arrival, step: int, timeout: float | None) -> None:
    """Waits until the device has come to a point.

    Args:
        timeout: seconds; None waits without an end.

    Raises:
        RuntimeError: it did not within `timeout`.
    """
    if timeout is None:
        arrival.synchronize()
        return
    deadline = time.monotonic() + timeout
    while not arrival.query():
        if time.monotonic() >= deadline:
            raise RuntimeError(f"Timed out after {timeout:g} s: the device has not finished step {step}")
        time.sleep(_PAUSE)


class DeferredResults:
    """A queue of small results of past steps, read without waiting for the work that the device still has.

    On a GPU a result is read one step later, from an asynchronous copy to pinned memory; on the CPU at once.

    Args:
        lag: steps between posting a result and reading it; None is 1 on a GPU and 0 on the CPU.
        timeout: seconds that a result may take, for steps replayed from a graph, whose collectives nobody else watches.
    """

    def __init__(self, device: torch.device, lag: int | None = None, timeout: float | None = None) -> None:
        self._timeout = timeout
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
                wait_for(arrived, step, self._timeout)
            due.append((step, values.tolist()))
        return due

    def wait(self) -> None:
        """Waits for the results that have not been read, without reading them."""
        for step, _, arrived in self._waiting:
            if arrived is not None:
                wait_for(arrived, step, self._timeout)

    def clear(self) -> None:
        """Discards the results that have not been read."""
        self._waiting.clear()
