"""Capture of a training step, to be replayed without the host: a protocol, and its implementation by CUDA graphs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

import torch
from torch import Tensor


class Captured(Protocol):
    """A captured step."""

    output: Tensor
    """What the step returned; each replay overwrites it."""

    def replay(self) -> None:
        """Does on the device what was done in the captured step, with the same memory and the same numbers."""

    def close(self) -> None:
        """Gives the memory back; the step cannot be replayed any more."""


class Capture(Protocol):
    """Captures steps, one after the other."""

    num_warm_up_passes: int
    """Backward passes through a new DistributedDataParallel before a step with it may be captured."""

    def training(self) -> AbstractContextManager[None]:
        """Context that the whole training runs in, captured or not."""

    def __call__(self, step: Callable[[], Tensor]) -> Captured:
        """Captures a step that runs once: when this returns, its work is done or queued."""


class CudaCapture:
    """Captures steps as CUDA graphs.

    The training runs on the stream that steps are captured on: DistributedDataParallel has to be built there, and
    autograd adds gradients up on the stream on which it first saw a parameter.
    """

    # DistributedDataParallel records times with CUDA events in its first ten iterations, which a graph cannot.
    num_warm_up_passes = 11

    def __init__(self, device: torch.device) -> None:
        self._device, self._stream = device, torch.cuda.Stream(device)

    @contextmanager
    def training(self) -> Iterator[None]:
        """Context in which the stream is the current one."""
        outer = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(outer)
        try:
            with torch.cuda.stream(self._stream):
                yield
        finally:
            outer.wait_stream(self._stream)

    def __call__(self, step: Callable[[], Tensor]) -> Captured:
        """Captures the step, which runs nothing yet, and replays it once."""
        graph = torch.cuda.CUDAGraph()
        # thread_local: the threads that pin memory and look after NCCL call what a capture does not allow.
        with torch.cuda.graph(graph, stream=self._stream, capture_error_mode="thread_local"):
            output = step()
        captured = _CudaGraph(graph, output)
        captured.replay()
        return captured


class _CudaGraph:
    def __init__(self, graph: torch.cuda.CUDAGraph, output: Tensor) -> None:
        self._graph, self.output = graph, output

    def replay(self) -> None:
        self._graph.replay()

    def close(self) -> None:
        torch.cuda.synchronize()  # it may still run
        self._graph.reset()


# What captures steps on a device, by its type. Tests add a recorder of operators for the CPU.
CAPTURES: dict[str, Callable[[torch.device], Capture]] = {"cuda": CudaCapture}
