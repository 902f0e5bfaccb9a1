"""Stopping on request: SIGTERM and Ctrl-C set a flag, the ranks agree on a step, save the state, and exit."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import torch
import torch.distributed as dist
from torch import Tensor

from syncbn.training.distributed import interrupts, world

_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class StopAgreed(Exception):  # noqa: N818 - not an error
    """Raised on every rank after the ranks have agreed to stop at this point of the run."""


class Stopped(SystemExit):
    """Exit of a job that was asked to stop, after its state is saved. Not an error; the run is unfinished.

    Args:
        code: the exit code, that of a process that the signal ended.
    """

    def __init__(self, step: int, code: int = interrupts.TERMINATED) -> None:
        super().__init__(code)
        self.step = step


@contextmanager
def deferred() -> Iterator[None]:
    """Context that delays SIGTERM until its end, unless a handler installed inside takes the signal.

    When a rank fails, torchrun at once sends SIGTERM to all others, but rank 0 still has to write the report.
    """
    taken: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, _: taken.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
        if taken:
            signal.raise_signal(signal.SIGTERM)


class StopRequest:
    """Flag: this process has been asked to stop.

    Signals reach the ranks at different moments, but collectives must match. Decide by `agreed`, which all ranks call
    at the same point, not by the flag `requested`.
    """

    def __init__(self) -> None:
        self.requested = False
        self.exit_code = interrupts.TERMINATED  # after Ctrl-C `interrupts.INTERRUPTED`

    @contextmanager
    def listen(self) -> Iterator[None]:
        """Context in which SIGTERM and SIGINT (Ctrl-C) set the flag.

        A second Ctrl-C ends the process, which has not saved then. Not so under torchrun, and a second SIGTERM never
        does: a sender that signals every process of a job reaches each rank twice, once through torchrun (which kills
        the ranks after 30 s anyway).
        """
        before = {number: signal.signal(number, self._take) for number in _SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _take(self, number: int, _: FrameType | None) -> None:
        if number == signal.SIGINT:
            if self.exit_code == interrupts.INTERRUPTED and not world.is_elastic():
                line = "interrupted twice (Ctrl-C); left without saving, the newest checkpoint is where the run goes on"
                interrupts.leave(interrupts.INTERRUPTED, line)
            self.exit_code = interrupts.INTERRUPTED
        self.requested = True

    def agreed(self) -> bool:
        """Whether any rank has been asked to stop, the same on every rank; an all-reduce of one number."""
        if not dist.is_initialized() or dist.get_world_size() == 1:
            return self.requested
        backend_device = "cpu" if dist.get_backend() == "gloo" or "cpu" in str(dist.get_backend_config()) else "cuda"
        flag: Tensor = torch.tensor(float(self.requested), device=backend_device)
        dist.all_reduce(flag)
        return bool(flag.item() > 0)
