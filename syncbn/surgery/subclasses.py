"""Synchronizing subclasses of torch's batch normalization without losing what they add.

A subclass `Fused(nn.BatchNorm2d)` becomes `SyncFused(Fused, SyncBatchNorm)`, a class made for it. Python's method order
then does most of the work: what `Fused` defines stays, and its `super().forward(...)` arrives at
`SyncBatchNorm.forward`. A `forward` that calls `F.batch_norm` itself is run with that one function replaced, for the
time of the call, by the synchronized one.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.lazy import LazyModuleMixin
from torch.overrides import TorchFunctionMode

from syncbn.nn.batchnorm import SyncBatchNorm

if TYPE_CHECKING:  # every class made here has SyncBatchNorm as a base of its own, after the original class
    _Base = SyncBatchNorm
else:
    _Base = object

_BATCH_NORMS = (F.batch_norm, torch.batch_norm)


class _SynchronizedCalls(TorchFunctionMode):
    """Replaces `F.batch_norm` by the layer's own statistics while the layer's original `forward` runs."""

    def __init__(self, layer: SyncSubclass) -> None:
        super().__init__()
        self.layer = layer
        self.num_calls = 0

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in _BATCH_NORMS:
            self.num_calls += 1
            return self.layer._batch_norm(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


class SyncSubclass(_Base):
    """What the classes made here share; first in the method order, before the original class and `SyncBatchNorm`."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The original forward, its statistics synchronized."""
        # No such attribute: a lazy layer has just become an ordinary one, inside this very call.
        original_forward = getattr(type(self), "_original_forward", None)
        if original_forward is None:  # not overridden: torch's own, so ours
            return SyncBatchNorm.forward(self, *args, **kwargs)
        calls = _SynchronizedCalls(self)
        with self._scratch_counter(), calls:
            return original_forward(self, *args, **kwargs)

    def _counter(self) -> Tensor | None:
        counter: Tensor | None = self.__dict__.get("_true_counter", self.num_batches_tracked)
        return counter

    def _activation_name(self) -> None:
        """An `activation` of a subclass is its own affair."""

    @contextmanager
    def _scratch_counter(self) -> Iterator[None]:
        """Hands the original forward a counter of its own to add to: ours counts by the global batch, and not while
        frozen.
        """
        counter = self._buffers["num_batches_tracked"]
        if counter is None:
            yield
            return
        self._true_counter = counter
        self._buffers["num_batches_tracked"] = counter.clone()
        try:
            yield
        finally:
            self._buffers["num_batches_tracked"] = counter
            del self._true_counter

    def _batch_norm(
        self,
        input: Tensor,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        training: bool = False,
        momentum: float = 0.1,
        eps: float = 1e-5,
        cudnn_enabled: bool = True,
    ) -> Tensor:
        """`F.batch_norm` with the arguments that the original forward chose, over all ranks."""
        counter = self._counter()
        rate = None if self.momentum is None and counter is not None else momentum
        return self._normalize_with(input, running_mean, running_var, counter, weight, bias, training, rate, eps)

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        # The class exists in this process alone: pickle by the original, which can be imported.
        return _rebuild, (type(self).__dict__["_original_class"],), self.__getstate__()


def _rebuild(original: type[_BatchNorm]) -> nn.Module:
    cls = synchronized_class(original)
    return cls.__new__(cls)


_classes: dict[type, type[SyncBatchNorm]] = {}


def synchronized_class(original: type[_BatchNorm]) -> type[SyncBatchNorm]:
    """The synchronized class of a subclass of torch's batch normalization; the same at every call."""
    if original not in _classes:
        _classes[original] = _make_class(original)
    return _classes[original]


def _make_class(original: type[_BatchNorm]) -> type[SyncBatchNorm]:
    forward = None if original.forward is _BatchNorm.forward else original.forward
    members = {"_original_class": original, "_original_forward": forward, "__module__": original.__module__}
    bases = (SyncSubclass, original, SyncBatchNorm)
    if issubclass(original, LazyModuleMixin):
        members["cls_to_become"] = SyncBatchNorm
    return types.new_class(f"Sync{original.__name__}", bases, exec_body=lambda namespace: namespace.update(members))


def why_not(original: type[_BatchNorm]) -> str | None:
    """Why the behaviour of a subclass could not be kept; None where it can."""
    if issubclass(original, nn.SyncBatchNorm):
        return "it subclasses torch's SyncBatchNorm, which communicates by itself"
    if original.forward is _BatchNorm.forward or _reaches_batch_norm(original, original.forward, set()):
        return None
    return "its forward neither calls super().forward nor F.batch_norm"


def _reaches_batch_norm(cls: type, function: Any, seen: set[Any]) -> bool:
    """Whether a method, or a method of the class that it calls, calls a batch normalization that we can replace."""
    code = getattr(function, "__code__", None)
    if code is None or code in seen:
        return False
    seen.add(code)
    names = set(code.co_names)
    if "batch_norm" in names or ("forward" in names and "super" in names):
        return True
    if "forward" in names and any(base.__name__ in names for base in cls.__mro__ if issubclass(base, _BatchNorm)):
        return True  # nn.BatchNorm2d.forward(self, input), which calls F.batch_norm
    return any(
        _reaches_batch_norm(cls, getattr(cls, name), seen) for name in names if callable(getattr(cls, name, None))
    )
