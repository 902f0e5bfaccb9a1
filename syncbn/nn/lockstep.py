"""One forward pass over batches of different sizes, whose batch normalizations see all of them as one batch.

A network takes images of one size at a time. Here each batch goes through it in a thread of its own, which pauses at
every batch normalization. When all have arrived, the layer is called once, with the values of all batches side by side,
and each thread goes on with its own part of the result. Nothing is padded: for a network whose samples meet in batch
normalizations alone, whatever else it does with a single image, the result is that of one batch. One thread runs at a
time, in the order of the batches, so results are the same from run to run.

(Longer than other files: the pass, its threads and the layers that wait in them hand work to each other.)
"""

from __future__ import annotations

import contextvars
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

_AUTOCAST = ("cpu", "cuda")  # devices whose autocast is handed on to the threads
_here = threading.local()  # of a thread that runs a `_Pass`: the pass


class LockstepError(ValueError):
    """The batches cannot go through the network side by side; the message says where they part."""


def forward_together(model: nn.Module, inputs: Sequence[Tensor]) -> list[Any]:
    """The outputs of a model for several batches, which its batch normalizations take for one.

    Each layer in training mode normalizes with the statistics of all batches (of all ranks, if it synchronizes), and
    its running statistics and counter move once. What a layer communicates does not depend on the number of batches.

    Args:
        inputs: batches (N, C, ...), one or more; each may have a height and width of its own, and zero rows.

    Returns:
        The model's output for each batch.

    Raises:
        LockstepError: the model calls its batch normalizations in another order for another size.
    """
    layers = {layer: name for name, layer in model.named_modules() if _sees_the_batch(layer)}
    if len(inputs) == 1 or not layers:
        return [model(input) for input in inputs]

    def run() -> list[Any]:
        with _pausing_at(layers):
            return _run([_Pass(partial(model, input)) for input in inputs], layers)

    # In a thread of its own, because autograd orders what is ready by numbers that it counts per thread. New threads
    # begin at 0, so that gradients are summed in the same order in every step, and after a resume.
    return _in_thread(run)


def _sees_the_batch(layer: nn.Module) -> bool:
    """Whether a layer normalizes with its batch, or moves by it."""
    if not isinstance(layer, _BatchNorm) or getattr(layer, "stats_frozen", False):
        return False
    return layer.training or layer.running_mean is None


def _run(passes: Sequence[_Pass], layers: Mapping[nn.Module, str]) -> list[Any]:
    try:
        for one in passes:
            one.advance()
        while any(one.call is not None for one in passes):
            calls = [one.call for one in passes if one.call is not None]
            if len(calls) < len(passes) or len({call.layer for call in calls}) > 1:
                places = [layers[one.call.layer] if one.call is not None else "the end" for one in passes]
                raise LockstepError(
                    "the network calls other batch normalizations for images of another size: one has come to"
                    f" {places[0]}, another to {next(place for place in places if place != places[0])}"
                )
            for one, output in zip(passes, _call_once(calls, layers), strict=True):
                one.advance(output)
        return _released_together([one.output for one in passes])
    finally:
        for one in passes:
            one.cancel()


@dataclass(frozen=True)
class _Call:
    """A call of a layer by one of the passes."""

    layer: nn.Module
    original: Callable[..., Any]
    arguments: tuple[Any, ...]
    keywords: dict[str, Any]
    takes_gradients: bool

    @property
    def input(self) -> Tensor:
        input: Tensor = self.arguments[0] if self.arguments else self.keywords["input"]
        return input


def _call_once(calls: Sequence[_Call], layers: Mapping[nn.Module, str]) -> list[Tensor]:
    """Calls the layer with the arguments of all calls joined; returns each call's part of the output."""
    first, inputs = calls[0], [call.input for call in calls]
    arguments = [_join(values, inputs) for values in zip(*(call.arguments for call in calls), strict=True)]
    keywords = {name: _join([call.keywords[name] for call in calls], inputs) for name in first.keywords}
    with torch.set_grad_enabled(first.takes_gradients):
        output = first.original(*arguments, **keywords)
        joined = arguments[0] if arguments else keywords["input"]
        if not isinstance(output, Tensor) or output.shape != joined.shape:
            raise LockstepError(f"{layers[first.layer]}: expected an output of the input's shape")
        return _part(output, inputs)


def _join(values: Sequence[Any], inputs: Sequence[Tensor]) -> Any:
    """Tensors (N, C, ...) of all calls as one, (1, C, L, 1, ...) where their sizes differ; other values as they are."""
    if not all(isinstance(value, Tensor) for value in values):
        return values[0]
    # A mask broadcasts to the input; channels stay as they are.
    whole = [value.expand(len(own), -1, *own.shape[2:]) for value, own in zip(values, inputs, strict=True)]
    if len({value.shape[1:] for value in whole}) == 1:
        return torch.cat(whole)
    num_channels, ones = whole[0].size(1), [1] * (inputs[0].dim() - 3)
    if _is_channels_last(inputs[0]):
        rows = torch.cat([value.movedim(1, -1).reshape(-1, num_channels) for value in whole])
        return rows.view(1, -1, *ones, num_channels).movedim(-1, 1)
    columns = torch.cat([value.movedim(1, 0).reshape(num_channels, -1) for value in whole], 1)
    return columns.view(1, num_channels, -1, *ones)


def _part(output: Tensor, inputs: Sequence[Tensor]) -> list[Tensor]:
    """What `_join` has joined, apart again, in the memory format of the inputs."""
    if len({input.shape[1:] for input in inputs}) == 1:
        return [*output.split([len(input) for input in inputs])]
    num_channels, lengths = output.size(1), [input.numel() // input.size(1) for input in inputs]
    if _is_channels_last(inputs[0]):
        rows = output.movedim(1, -1).reshape(-1, num_channels).split(lengths)
        return [
            part.view(len(input), *input.shape[2:], num_channels).movedim(-1, 1)
            for part, input in zip(rows, inputs, strict=True)
        ]
    columns = output.reshape(num_channels, -1).split(lengths, 1)
    return [
        part.reshape(num_channels, len(input), *input.shape[2:]).movedim(0, 1).contiguous()
        for part, input in zip(columns, inputs, strict=True)
    ]


def _is_channels_last(input: Tensor) -> bool:
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    format = formats.get(input.dim())
    return format is not None and input.is_contiguous(memory_format=format) and not input.is_contiguous()


class _Cancelled(BaseException):
    """Ends a pass that another one's error has left waiting; not an Exception, so that models let it through."""


class _Pass:
    """A forward pass that runs only inside of `advance`: to the next batch normalization, or to its end."""

    def __init__(self, function: Callable[[], Any]) -> None:
        self.call: _Call | None = None
        """Where it waits; None before it has begun and at its end."""
        self.output: Any = None
        self._value: Any = None
        self._error: BaseException | None = None
        self._is_cancelled = False
        self._turn, self._pause = threading.Semaphore(0), threading.Semaphore(0)
        self._thread = _thread(partial(self._follow, function))
        self._thread.start()

    def advance(self, value: Any = None) -> None:
        """Goes on, with `value` as the output of the layer that was called."""
        self._value, self.call = value, None
        self._turn.release()
        self._pause.acquire()
        if self._error is not None:
            raise self._error

    def cancel(self) -> None:
        """Ends the thread, if it has not come to its end."""
        if self._thread.is_alive():
            self._is_cancelled = True
            self._turn.release()
        self._thread.join()

    def pause(self, call: _Call) -> Any:
        """In its own thread: waits for the output of a layer."""
        self.call = call
        self._pause.release()
        self._turn.acquire()
        if self._is_cancelled:
            raise _Cancelled
        value, self._value = self._value, None
        return value

    def _follow(self, function: Callable[[], Any]) -> None:
        self._turn.acquire()
        if self._is_cancelled:
            return
        _here.running = self
        try:
            self.output = function()
        except _Cancelled:
            return
        except BaseException as error:
            self._error = error
        self._pause.release()


@contextmanager
def _pausing_at(layers: Mapping[nn.Module, str]) -> Iterator[None]:
    """Context in which these layers make the pass that calls them wait."""
    before = {layer: layer.__dict__.get("forward") for layer in layers}
    for layer in layers:
        layer.__dict__["forward"] = partial(_wait, layer, layer.forward)
    try:
        yield
    finally:
        for layer, own in before.items():
            if own is None:
                layer.__dict__.pop("forward", None)
            else:
                layer.__dict__["forward"] = own


def _wait(layer: nn.Module, original: Callable[..., Any], *arguments: Any, **keywords: Any) -> Any:
    running: _Pass | None = getattr(_here, "running", None)
    if running is None:
        return original(*arguments, **keywords)
    return running.pause(_Call(layer, original, arguments, keywords, torch.is_grad_enabled()))


def _in_thread(function: Callable[[], Any]) -> Any:
    """Calls a function in a new thread and waits for it."""
    found: list[Any] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            found.append(function())
        except BaseException as error:
            errors.append(error)

    thread = _thread(run)
    thread.start()
    thread.join()
    if errors:
        raise errors[0]
    return found[0]


def _thread(function: Callable[[], None]) -> threading.Thread:
    """A thread, not started, in which torch is in the state in which it is here, as far as that belongs to a thread."""
    takes_gradients = torch.is_grad_enabled()
    autocasts = [
        torch.autocast(device, dtype=torch.get_autocast_dtype(device))
        for device in _AUTOCAST
        if torch.is_autocast_enabled(device)
    ]
    stream = torch.cuda.current_stream() if torch.cuda.is_available() and torch.cuda.is_initialized() else None

    def run() -> None:
        with ExitStack() as stack:
            stack.enter_context(torch.set_grad_enabled(takes_gradients))
            if stream is not None:
                stack.enter_context(torch.cuda.stream(stream))  # its device, too
            for autocast in autocasts:
                stack.enter_context(autocast)
            function()

    return threading.Thread(target=contextvars.copy_context().run, args=(run,), name="lockstep", daemon=True)


def _released_together(outputs: list[Any]) -> list[Any]:
    """The outputs, whose gradients enter the network all at once, in this order, whatever is computed from them."""
    tensors: list[Tensor] = []
    for output in outputs:
        _collect(output, tensors)
    if not any(tensor.requires_grad for tensor in tensors):
        return outputs
    released = iter(_Released.apply(*tensors))
    return [_replaced(output, released) for output in outputs]


def _collect(output: Any, tensors: list[Tensor]) -> None:
    if isinstance(output, Tensor):
        tensors.append(output)
    elif isinstance(output, tuple | list | dict):
        for part in output.values() if isinstance(output, dict) else output:
            _collect(part, tensors)


def _replaced(output: Any, tensors: Iterator[Tensor]) -> Any:
    if isinstance(output, Tensor):
        return next(tensors)
    if isinstance(output, dict):
        return {name: _replaced(part, tensors) for name, part in output.items()}
    if isinstance(output, tuple | list):
        parts = [_replaced(part, tensors) for part in output]
        if hasattr(output, "_make"):
            return output._make(parts)
        return parts if isinstance(output, list) else tuple(parts)
    return output


class _Released(torch.autograd.Function):
    """The identity on several tensors, as one node of the graph."""

    @staticmethod
    def forward(ctx: Any, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        return tuple(tensor.view_as(tensor) for tensor in tensors)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        return gradients
