"""Capture and replay on the CPU: the operators of a function are recorded, and called again with the same tensors.

A stand-in for CUDA graphs that shows what they would do. Replaying calls no Python: whatever the function took from the
host is what it was when it was recorded, results are written to the memory that they had then, and values that changed
elsewhere are seen only if they changed in place. Running the function again would hide all of that.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

# Their result is memory, and what a replay finds in it is what was there before.
_UNINITIALIZED = ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "empty_permuted")
_WITHOUT_EFFECT = ("profiler",)  # namespaces of operators that only mark places
_COLLECTIVES = "c10d"


class Recording:
    """Operators in the order of their calls, with the tensors that they took and gave.

    Args:
        output: what the recorded function returned; a replay writes to it.
    """

    def __init__(self) -> None:
        self.output: Any = None
        self.num_replays = 0
        self._calls: list[tuple[Any, Any, Any, Any]] = []

    def __len__(self) -> int:
        return len(self._calls)

    def add(self, operator: Any, args: Any, kwargs: Any, result: Any) -> None:
        """Adds a call. Its tensors are kept without autograd, by aliases: so their memory is never used again."""
        kept = tree_map_only(Tensor, Tensor.detach, (args, kwargs, result))
        self._calls.append((operator, *kept))

    @torch.no_grad()
    def replay(self) -> None:
        """Calls the operators again; a collective is waited for at once."""
        self.num_replays += 1
        for operator, args, kwargs, result in self._calls:
            again = operator(*args, **kwargs)
            if operator.namespace == _COLLECTIVES:
                wait(again)
            for before, now in zip(tensors_of(result), tensors_of(again), strict=True):
                if now.untyped_storage().data_ptr() != before.untyped_storage().data_ptr():  # not changed in place
                    before.copy_(now)

    def close(self) -> None:
        """Forgets the calls, and with them the memory."""
        self._calls.clear()


class OperatorRecorder(TorchDispatchMode):
    """Records what is called inside of the context into `recording`, and calls it.

    Raises:
        RuntimeError: an operator whose result the host waits for: a value, or a shape that depends on values.
    """

    def __init__(self, recording: Recording) -> None:
        super().__init__()
        self._recording = recording

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # else the first operator imports the compiler, which takes seconds

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if waits_for_device(operator, args):
            raise RuntimeError(f"{operator} waits for the device, which a captured step cannot")
        result = operator(*args, **kwargs)
        if not (is_memory_alone(operator) or is_view(operator)):
            self._recording.add(operator, args, kwargs, result)
        return result


class RecordingCapture:
    """Captures steps by recording their operators; see `syncbn.training.trainer.capture.Capture`."""

    num_warm_up_passes = 11

    def __init__(self, device: torch.device | None = None) -> None:
        self.recordings: list[Recording] = []

    def training(self) -> AbstractContextManager[None]:
        """The context that a run trains in: none is needed."""
        return nullcontext()

    def __call__(self, step: Callable[[], Tensor]) -> Recording:
        """Runs the step, and records it."""
        recording = Recording()
        with OperatorRecorder(recording):
            recording.output = step()
        self.recordings.append(recording)
        return recording


def waits_for_device(operator: Any, args: Any) -> bool:
    """Whether on a GPU the host would wait for the result of this call."""
    if operator is torch.ops.aten.index.Tensor:  # of bool it counts, of numbers it does not
        return any(one is not None and one.dtype in (torch.bool, torch.uint8) for one in args[1])
    tags = (torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape)
    return any(tag in operator.tags for tag in tags)


def is_memory_alone(operator: Any) -> bool:
    """Whether a call leaves no values behind."""
    return operator.namespace in _WITHOUT_EFFECT or (
        operator.namespace == "aten" and operator._opname in _UNINITIALIZED
    )


def is_view(operator: Any) -> bool:
    """Whether the call only looks at the memory of an argument in another way, which stays true."""
    schema = operator._schema
    return not schema.is_mutable and any(result.alias_info is not None for result in schema.returns)


def tensors_of(tree: Any) -> Iterator[Tensor]:
    """The tensors in nested containers."""
    return (leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor))


def wait(result: Any) -> None:
    """Waits for the works that a collective has returned."""
    for leaf in tree_leaves(result):
        if isinstance(leaf, torch.ScriptObject):
            leaf.wait()
