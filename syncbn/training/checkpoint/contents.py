"""What a file may hold, checked once when it is read, so that the code behind can rely on it.

`plain` is for every file, whoever wrote it. `check_values` and `check_parts` are for the checkpoints of a run, whose
digest says that they are as somebody wrote them, not that this somebody was `train.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from syncbn.training.config.errors import printable

MAX_DEPTH = 100
MAX_ITEMS = 1_000_000
# Bytes in memory per byte of the file. torch and safetensors compress nothing, but a file may hold a tensor under
# several names, and a small one that is expanded.
MAX_EXPANSION = 16

_FLOATS = ("float16", "bfloat16", "float32", "float64", "float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2",
           "float8_e5m2fnuz", "float8_e8m0fnu")  # fmt: skip
_WHOLE = ("bool", "uint8", "uint16", "uint32", "uint64", "int8", "int16", "int32", "int64")
_REAL = frozenset(getattr(torch, name) for name in (*_FLOATS, *_WHOLE) if hasattr(torch, name))
_COMPLEX = frozenset((torch.complex64, torch.complex128))


class MalformedError(ValueError):
    """The content of a file is not what it has to be; the message continues "<file> ..."."""


def plain(content: Any, num_bytes: int) -> Any:
    """The content with dicts, lists and tuples instead of subclasses of them, and detached tensors.

    Args:
        num_bytes: size of the file.

    Raises:
        MalformedError: it is nested too deeply or endlessly, or takes far more memory than the file.
    """
    return _Copier(num_bytes).copy(content, 0)


class _Copier:
    def __init__(self, num_bytes: int) -> None:
        self._num_bytes, self._left, self._num_items = num_bytes, MAX_EXPANSION * num_bytes, 0

    def copy(self, value: Any, depth: int) -> Any:
        self._num_items += 1
        if depth > MAX_DEPTH:
            raise MalformedError(f"is nested more than {MAX_DEPTH} levels deep")
        if self._num_items > MAX_ITEMS:
            raise MalformedError(f"has more than {MAX_ITEMS} entries")
        # The methods are those of the classes: a file may set attributes of the objects in it.
        if isinstance(value, dict):
            return {key: self.copy(below, depth + 1) for key, below in dict.items(value)}
        if isinstance(value, list | tuple):
            kind: type[list[Any]] | type[tuple[Any, ...]] = list if isinstance(value, list) else tuple
            return kind(self.copy(below, depth + 1) for below in kind(value))
        if isinstance(value, bytearray):
            self._take(len(value))
        if type(value) not in (Tensor, Parameter):
            return value
        if _why_not_dense(value) is None:
            self._take(value.numel() * value.element_size())
        return Tensor.detach(value)

    def _take(self, num_bytes: int) -> None:
        self._left -= num_bytes
        if self._left < 0:
            raise MalformedError(f"has {self._num_bytes} bytes and would take more than {MAX_EXPANSION} times as many"
                                 " in memory; expected tensors that are stored in full")  # fmt: skip


def why_unusable(tensor: Any, *, complex_too: bool = False) -> str | None:
    """Why a value of a file is no tensor with numbers to use, in words that follow its name; None if it is one.

    Args:
        complex_too: complex numbers are fine.
    """
    if not isinstance(tensor, Tensor):
        return f"is a {type(tensor).__name__}"
    if tensor.is_meta:
        return "is on the device meta, which has no values"
    reason = _why_not_dense(tensor)
    if reason is None and tensor.dtype not in (_REAL | _COMPLEX if complex_too else _REAL):
        reason = f"has the type {str(tensor.dtype).removeprefix('torch.')}"
    return reason


def _why_not_dense(tensor: Tensor) -> str | None:
    if tensor.is_nested:
        return "is a nested tensor"
    if tensor.is_quantized:
        return "is quantized"
    if tensor.layout is not torch.strided:
        return f"is sparse ({str(tensor.layout).removeprefix('torch.')})"
    return None if tensor.device.type in ("cpu", "meta") else f"is on the device {tensor.device}"


def require_usable(tensors: Mapping[str, Any], *, complex_too: bool = False) -> None:
    """Raises MalformedError for the first that is no dense tensor of real numbers; see `why_unusable`."""
    for name, tensor in tensors.items():
        if (reason := why_unusable(tensor, complex_too=complex_too)) is not None:
            kind = "numbers" if complex_too else "real numbers"
            raise MalformedError(f"cannot be used: {clipped(name)} {reason}, expected a dense tensor of {kind}")


def check_values(value: Any, name: str = "") -> None:
    """Raises MalformedError for a value that cannot be digested, or that overflows where it is used."""
    if isinstance(value, dict):
        for key, below in value.items():
            check_values(below, f"{name}.{key}" if name else str(key))
    elif isinstance(value, list | tuple):
        for below in value:
            check_values(below, name)
    elif isinstance(value, Tensor):
        if (reason := why_unusable(value, complex_too=True)) is not None:
            raise MalformedError(f"is malformed: {clipped(name)} {reason}; expected a dense tensor on the CPU")
    elif isinstance(value, int) and not -(2**63) <= value < 2**64:
        raise MalformedError(f"is malformed: {clipped(name)} is a whole number of more than 64 bits")


# Types of the parts. A dict with names lists required entries, further ones may be there; a dict with one type as its
# key, and a list, say the type of all entries; a tuple lists alternatives.
_STATISTICS = [Tensor]
_PARTS: dict[str, Any] = {
    "step": int,
    "config": {str: object},
    "model": {str: object},
    "average": {str: object},
    "averaged_steps": {"value": Tensor},
    "weights": ("raw", "ema"),
    "data": {"classes": [str], "mean": Tensor, "std": Tensor},
    "loss": {"class_weights": Tensor},
    "optimizer": {"state": {int: {str: object}}, "param_groups": [{"params": [int], "lr": (float, Tensor)}]},
    "parameter_groups": {str: [str]},
    "schedule": {"base_lrs": [float], "last_epoch": int, "_step_count": int, "lr_lambdas": [None]},
    "scaler": {str: float},
    "counters": {str: (int, {str: float})},
    "totals": {"values": Tensor},
    "drift": {str: {str: _STATISTICS}},
    "tracker": {"id": (None, str), "run": str},
    "frozen": {str: [("stats", "affine", "weights")]},
}
_RUN = ("step", "config", "model")
_WORDS = {int: "a whole number", float: "a number", str: "a string", Tensor: "a tensor", None: "null"}


def is_of_run(content: Mapping[Any, Any]) -> bool:
    """Whether the content has the entries of every checkpoint of a run."""
    return content.keys() >= {*_RUN}


def check_parts(content: Mapping[Any, Any]) -> None:
    """Raises MalformedError unless every part of a run's checkpoint that is there has the type that the code needs."""
    for name, kind in _PARTS.items():
        if name in content:
            _check(kind, content[name], name)
    if content.get("step", 0) < 0:
        raise MalformedError(f"is malformed: step is {content['step']}, expected 0 or more")
    for name in ("model", "average"):
        for key, value in content.get(name, {}).items():
            if not isinstance(value, Tensor) and not key.endswith("_extra_state"):
                raise MalformedError(f"is malformed: {clipped(f'{name}.{key}')} is {_word(value)}, expected a tensor")


def _check(kind: Any, value: Any, name: str) -> None:
    if not _is(kind, value):
        raise MalformedError(f"is malformed: {clipped(name)} is {_word(value)}, expected {_expected(kind)}")
    if isinstance(kind, dict):
        for key, below in kind.items():
            if isinstance(key, str):
                if key not in value:
                    raise MalformedError(f"is malformed: {clipped(name)} has no {key!r}")
                _check(below, value[key], f"{name}.{key}")
                continue
            for own, item in value.items():
                if not _is(key, own):
                    raise MalformedError(
                        f"is malformed: {clipped(name)} has the key {_word(own)}, expected {_expected(key)}"
                    )
                _check(below, item, f"{name}.{own}")
    elif isinstance(kind, list):
        for position, item in enumerate(value):
            _check(kind[0], item, f"{name}[{position}]")
    elif isinstance(kind, tuple) and isinstance(value, dict):
        _check(next(one for one in kind if isinstance(one, dict)), value, name)


def _is(kind: Any, value: Any) -> bool:
    """Whether the value is of this kind, without a look at what it contains."""
    if isinstance(kind, tuple):
        return any(_is(one, value) for one in kind)
    if isinstance(kind, dict | list):
        return isinstance(value, dict if isinstance(kind, dict) else list | tuple)
    if kind is None or isinstance(kind, str):
        return bool(type(value) is type(kind) and value == kind)
    if kind in (int, float):
        return isinstance(value, int if kind is int else (int, float)) and not isinstance(value, bool)
    return isinstance(value, kind)


def _expected(kind: Any) -> str:
    if isinstance(kind, tuple):
        return " or ".join(map(_expected, kind))
    if isinstance(kind, dict | list):
        return "a mapping" if isinstance(kind, dict) else "a list"
    return repr(kind) if isinstance(kind, str) else _WORDS[kind]


def _word(value: Any) -> str:
    """A value in an error: itself if it is short, else its type."""
    if value is None:
        return "null"
    if isinstance(value, bool | int | float | str):
        return clipped(repr(value))
    return "a mapping" if isinstance(value, dict) else f"a {type(value).__name__}"


def clipped(name: object) -> str:
    """A name out of a file in an error: printable, and not longer than a line has room for."""
    text = printable(str(name))
    return text if len(text) <= 100 else f"{text[:97]}..."
