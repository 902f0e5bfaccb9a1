"""Stopping on request: SIGTERM and Ctrl-C set a flag, the ranks agree on a step, the state is saved, the job leaves."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import torch
import torch.distributed as dist
from torch import Tensor

_SIGNALS = (signal.SIGTERM, signal.SIGINT)
EXIT_CODE = 128 + signal.SIGTERM  # as a shell reports a process that the signal ended: the job is not done


class StopAgreed(Exception):  # noqa: N818 - it is no error
    """All ranks have agreed to stop where they are."""


class Stopped(SystemExit):
    """The state is saved and the job leaves; not an error, but not the end of the run either."""

    def __init__(self, step: int) -> None:
        super().__init__(EXIT_CODE)
        self.step = step


@contextmanager
def deferred() -> Iterator[None]:
    """A SIGTERM waits for the end of this context, as far as nobody else listens inside.

    A rank that fails is followed at once by torchrun's signal to all others: the first one has yet to write the report.
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
    """Whether this process has been asked to stop.

    One rank may be asked a moment before the others, and collectives must match: ask `agreed` for a decision, on all
    ranks at once.
    """

    def __init__(self) -> None:
        self.requested = False

    @contextmanager
    def listen(self) -> Iterator[None]:
        """Takes the signals. A second Ctrl-C ends the process; a second SIGTERM does not, because who signals every
        process of a job reaches the ranks twice, once through torchrun (which kills them after 30 s anyway).
        """
        before = {number: signal.signal(number, self._take) for number in _SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _take(self, number: int, _: FrameType | None) -> None:
        self.requested = True
        if number == signal.SIGINT:
            signal.signal(number, signal.SIG_DFL)

    def agreed(self) -> bool:
        """Whether any rank has been asked; a collective."""
        if not dist.is_initialized() or dist.get_world_size() == 1:
            return self.requested
        backend_device = "cpu" if dist.get_backend() == "gloo" or "cpu" in str(dist.get_backend_config()) else "cuda"
        flag: Tensor = torch.tensor(float(self.requested), device=backend_device)
        dist.all_reduce(flag)
        return bool(flag.item() > 0)
