"""Training steps replayed from a graph: which ones are, and when the step is captured.

A step of the regular kind does the same work every time: as many samples over all ranks as the first step of an epoch
has, and no layer is watched. After every change (the start, a freeze or unfreeze) the first regular step runs eagerly,
which makes the optimizer's state and compiles kernels, the next one is captured, and those that follow are replayed.
All other steps run eagerly. Which kind a step is follows from numbers that all ranks have, so that they do alike.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor

from syncbn.training.config.errors import ConfigError, TrainingError, one_line
from syncbn.training.data.by_size import of_one_size
from syncbn.training.data.loader import Batch
from syncbn.training.trainer.capture import Capture, Captured

Compute = Callable[[Iterable[Batch], Sequence[int]], Tensor]
"""A step on the device, from its micro-batches and the number of samples of each over all ranks."""


class GraphedSteps:
    """Runs the training steps of a run, a context around all of them.

    Args:
        regular: samples, over all ranks, of each micro-batch of a step of the regular kind.
    """

    def __init__(self, capture: Capture, regular: Sequence[int], device: torch.device) -> None:
        self._capture, self._regular, self._device = capture, list(regular), device
        self._captured: Captured | None = None
        # The memory from which the captured step reads its micro-batches.
        self._inputs: list[tuple[Tensor, Tensor]] = []
        self._is_warm = False
        self._contexts = ExitStack()
        self.num_warm_up_passes = capture.num_warm_up_passes

    def __enter__(self) -> GraphedSteps:
        self._contexts.enter_context(self._capture.training())
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None or not issubclass(kind, Exception):
            self.forget()  # while the process groups of its collectives are still there
        # After an error the device may hang in a collective, and to discard a graph is to wait for it.
        self._contexts.close()

    def run(
        self, step: int, batches: Iterable[Batch], sizes: Sequence[int], compute: Compute, *, is_watched: bool
    ) -> Tensor:
        """Does a step; returns what `compute` returns.

        Args:
            is_watched: the layers record statistics in this step.

        Raises:
            ConfigError: the step cannot be captured.
            TrainingError: images or labels have another shape than in the captured step.
        """
        if is_watched or list(sizes) != self._regular:
            return compute(batches, sizes)
        given = list(batches)
        if self._captured is not None:
            self._put(step, given)
            self._captured.replay()
        elif self._is_warm:
            self._inputs = [(of_one_size(images).clone(), of_one_size(labels).clone()) for images, labels in given]
            self._captured = self._captured_step(step, lambda: compute(self._inputs, sizes))
        else:
            self._is_warm = True
            return compute(given, sizes)
        return self._captured.output.clone()

    def forget(self) -> None:
        """Discards the graph; call before what it reads or writes is replaced by other memory."""
        if self._captured is not None:
            self._captured.close()
        self._captured, self._inputs, self._is_warm = None, [], False

    def _put(self, step: int, batches: Sequence[Batch]) -> None:
        for given, inputs in zip(batches, self._inputs, strict=True):
            for what, pixels, memory in zip(("images", "labels"), given, inputs, strict=True):
                one = of_one_size(pixels)
                if (one.shape, one.dtype) != (memory.shape, memory.dtype):
                    raise TrainingError(
                        f"graph: step {step} has {what} of shape {tuple(one.shape)} and {one.dtype}, the captured step"
                        f" {tuple(memory.shape)} and {memory.dtype}; give all images one size, or set graph=false"
                    )
                memory.copy_(one, non_blocking=True)

    def _captured_step(self, step: int, compute: Callable[[], Tensor]) -> Captured:
        before = _host_generators(self._device)
        try:
            captured = self._capture(compute)
        except RuntimeError as error:
            first: BaseException = error  # the capture itself fails after it, and says less
            while first.__context__ is not None:
                first = first.__context__
            raise ConfigError(f"graph: step {step} cannot be captured: {one_line(first)}; set graph=false") from error
        if drawn := [name for name, state in _host_generators(self._device).items() if state != before[name]]:
            captured.close()
            raise ConfigError(
                f"graph: the model or the loss draws random numbers by {drawn[0]} on the host, which a graph would"
                " repeat in every step; draw them on the device, or set graph=false"
            )
        return captured


def _host_generators(device: torch.device) -> dict[str, Any]:
    """The states of the generators of the host, by name, for comparison."""
    states: dict[str, Any] = {"random": random.getstate()}
    numpy = sys.modules.get("numpy")  # one that is not imported draws nothing
    if numpy is not None:
        kind, key, *others = numpy.random.get_state()
        states["numpy.random"] = (kind, key.tobytes(), *others)
    if device.type != "cpu":
        states["torch"] = torch.default_generator.get_state().tolist()
    return states
