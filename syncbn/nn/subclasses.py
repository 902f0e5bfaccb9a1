"""Synchronized classes for subclasses of torch's batch normalization, which preserve what the subclasses add.

A layer of class `Fused(nn.BatchNorm2d)` gets the generated class `SyncFused(Fused, SyncBatchNorm)`. Python's method
resolution order does most of the work: what `Fused` defines takes precedence, and its `super().forward(...)` calls
`SyncBatchNorm.forward`. A `forward` that calls `F.batch_norm` itself runs with this one function replaced by the
synchronized one for the duration of the call.
"""

from __future__ import annotations

import inspect
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

from syncbn.kernels.step import Statistics
from syncbn.nn.bytecode import names_in
from syncbn.nn.injected import own_class
from syncbn.nn.tracing import PROXIES, record_call

if TYPE_CHECKING:

    class _Base(_BatchNorm):
        """Methods of the synchronized layer that `SyncSubclass` calls; for type checking only."""

        def _normalize_with(self, *args: Any) -> Tensor: ...

        def _frozen_text(self) -> str: ...
else:
    _Base = object

_BATCH_NORMS = (F.batch_norm, torch.batch_norm)


class _SynchronizedCalls(TorchFunctionMode):
    """Redirects the layer's calls of `F.batch_norm` to its synchronized version while its original `forward` runs."""

    def __init__(self, layer: SyncSubclass) -> None:
        super().__init__()
        self.layer = layer
        self.tensors = {id(tensor) for tensor in (*layer._parameters.values(), *layer._buffers.values())}

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in _BATCH_NORMS and self._is_the_layers(*args, **(kwargs or {})):
            return self.layer._batch_norm(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))

    def _is_the_layers(
        self,
        input: Tensor,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        weight: Any = None,
        *_: Any,
        **__: Any,
    ) -> bool:
        """Whether a call normalizes for the layer itself, not for a batch normalization nested in it."""
        if running_mean is not None:
            return id(running_mean) in self.tensors
        return not isinstance(weight, nn.Parameter) or id(weight) in self.tensors


class SyncSubclass(_Base):
    """First base of the generated classes, before the original class and `SyncBatchNorm` in the resolution order."""

    # Set in the generated classes. (A layer's own `_original_class` is the one to revert to.)
    _original_class: type[_BatchNorm]
    _original_forward: Callable[..., Any] | None
    _fused_activation: str | None = None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The original forward, with synchronized statistics.

        Raises:
            RuntimeError: a training forward made no normalization call that could be synchronized.
        """
        if args and isinstance(args[0], PROXIES):
            return record_call(self, SyncSubclass.forward, *args, **kwargs)
        # The attributes are missing if a lazy layer has just become an ordinary one, inside of this call.
        original_forward = getattr(type(self), "_original_forward", None)
        if original_forward is None:  # torch's forward, not overridden: use the synchronized layer's
            layer_class = getattr(type(self), "_layer_class", None)
            if layer_class is None:
                layer_class = type(self)
                self.__dict__.update(activation=None, memory="default")  # as in conversion
            return layer_class.forward(self, *args, **kwargs)
        self.__dict__["_num_normalized"] = 0
        with self._scratch_counter(), _SynchronizedCalls(self):
            output = original_forward(self, *args, **kwargs)
        if self.__dict__.pop("_num_normalized") == 0 and self.training:
            original = type(self)._original_class
            raise RuntimeError(
                f"the forward of {original.__name__} normalized without super().forward or F.batch_norm: its statistics"
                " were not synchronized; leave this layer out of the conversion"
            )
        return output

    @contextmanager
    def _scratch_counter(self) -> Iterator[None]:
        """Gives the original forward a copy of the batch counter to increment; the layer itself updates the true one.

        The true counter counts global batches, and none while the statistics are frozen.
        """
        counter = self._buffers["num_batches_tracked"]
        if counter is None:
            yield
            return
        self.__dict__["_true_counter"] = counter
        self._buffers["num_batches_tracked"] = counter.clone()
        try:
            yield
        finally:
            self._buffers["num_batches_tracked"] = counter
            self.__dict__.pop("_true_counter", None)

    def _counter(self) -> Tensor | None:
        counter: Tensor | None = self.__dict__.get("_true_counter", self.num_batches_tracked)
        return counter if self.__dict__.get("_num_normalized", 0) == 0 else None  # one forward is one batch

    def _activation_name(self) -> str | None:
        """The activation that `fuse` has set; an attribute `activation` of a subclass is another thing."""
        return self._fused_activation

    def _normalize_with(self, *args: Any) -> Tensor:
        if "_num_normalized" in self.__dict__:  # inside the original forward
            self.__dict__["_num_normalized"] += 1
        return super()._normalize_with(*args)

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
        """Synchronized `F.batch_norm`, with the arguments that the original forward passed."""
        counter = self._counter()
        rate = None if self._is_cumulative(momentum) and counter is not None else momentum
        activation = self._activation_name()
        statistics = Statistics(running_mean, running_var, counter, rate, eps)
        return self._normalize_with(input, statistics, weight, bias, training, None, None, activation)

    def _is_cumulative(self, momentum: float) -> bool:
        """Whether the original forward uses the cumulative average: its momentum is then 1 / num_batches_tracked."""
        if self.momentum is not None or self.num_batches_tracked is None:
            return False
        counted = float(self.num_batches_tracked)  # waits for the device, as the original forward's own read did
        return counted > 0 and abs(momentum * counted - 1.0) < 1e-6

    def extra_repr(self) -> str:
        """That of the original class, with the frozen switches added if it lacks them."""
        text, frozen = super().extra_repr(), self._frozen_text()
        return text if frozen in text else f"{text}, {frozen}"

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        # The generated class cannot be imported by name, so pickle the class that it was generated from. A subclass of
        # it can, or else is not ours to pickle.
        members = type(self).__dict__
        if "_original_class" not in members:
            return super().__reduce_ex__(protocol)  # type: ignore[return-value]
        return rebuild, (members["_original_class"], members["_layer_class"]), self.__getstate__()


def rebuild(original: type[_BatchNorm], layer_class: type[_BatchNorm]) -> nn.Module:
    """An uninitialized layer of the synchronized class of `original`, for unpickling."""
    cls = synchronized_class(original, layer_class)
    return cls.__new__(cls)


_classes: dict[tuple[type, type], type[_BatchNorm]] = {}


def synchronized_class(original: type[_BatchNorm], layer_class: type[_BatchNorm]) -> type[_BatchNorm]:
    """The synchronized class of a subclass of torch's batch normalization; generated once, then cached.

    Args:
        layer_class: the synchronized layer that it inherits from, after the original class.
    """
    if (original, layer_class) not in _classes:
        _classes[original, layer_class] = _make_class(original, layer_class)
    return _classes[original, layer_class]


def _make_class(original: type[_BatchNorm], layer_class: type[_BatchNorm]) -> type[_BatchNorm]:
    forward = None if original.forward is _BatchNorm.forward else original.forward
    members = {
        "_original_class": original,
        "_original_forward": forward,
        "_layer_class": layer_class,
        "__module__": original.__module__,
    }
    bases = (SyncSubclass, original, layer_class)
    if issubclass(original, LazyModuleMixin):
        members["cls_to_become"] = layer_class
    return types.new_class(f"Sync{original.__name__}", bases, exec_body=lambda namespace: namespace.update(members))


def why_not(layer: _BatchNorm) -> str | None:
    """Why a subclass's behavior would be lost in conversion; None if it would be preserved."""
    original = own_class(type(layer))
    if "forward" in layer.__dict__:
        return "its forward was replaced on the instance"
    if issubclass(original, nn.SyncBatchNorm):
        return "it subclasses torch's SyncBatchNorm, which communicates by itself"
    if original.forward is _BatchNorm.forward or _reaches_batch_norm(original, original.forward, set()):
        return None
    return "its forward neither calls super().forward nor F.batch_norm"


def _reaches_batch_norm(cls: type, function: Any, seen: set[Any]) -> bool:
    """Whether `function`, directly or through functions that it names, calls a batch normalization we can replace.

    Judged by the names in its bytecode. The proof is the first training forward, which raises if nothing was replaced.
    """
    function = inspect.unwrap(function)
    code = getattr(function, "__code__", None)
    if code is None or code in seen:
        return False
    seen.add(code)
    names = names_in(code)
    if "batch_norm" in names or ("forward" in names and "super" in names):
        return True
    if "forward" in names and any(base.__name__ in names for base in cls.__mro__ if issubclass(base, _BatchNorm)):
        return True  # nn.BatchNorm2d.forward(self, input), which calls F.batch_norm
    closure = [cell.cell_contents for cell in function.__closure__ or () if cell.cell_contents is not None]
    called = [*closure, *(getattr(cls, name, None) for name in names), *(function.__globals__.get(n) for n in names)]
    if any(item is known for item in called for known in _BATCH_NORMS):
        return True
    return any(_reaches_batch_norm(cls, item, seen) for item in called if isinstance(item, types.FunctionType))
