"""Batches of zero rows, modeled on a real batch: what a rank that has run out of data goes on with."""

from __future__ import annotations

import copy
import dataclasses
import io
import pickle
import sys
from collections.abc import Callable, Iterable, Mapping, MutableMapping, Sequence, Set
from datetime import date, time, timedelta
from enum import Enum
from numbers import Number
from pathlib import PurePath
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from syncbn.torch_compat import pytree

# Values without rows, which an empty batch has as they are.
_VALUES = (
    type(None), str, bytes, Number, Enum, PurePath, date, time, timedelta, type, torch.dtype, torch.device, torch.Size,
)  # fmt: skip


class _CannotBeCutError(Exception):
    """Args: the type that cannot be cut, and why."""


def cut_to_nothing(batch: Any) -> Any:
    """A batch of the same structure, classes, types and further sizes, with zero rows.

    Tensors and NumPy arrays are cut in their first dimension; those without dimensions stay as they are, and so do
    strings, numbers and other single values. A list of anything else with one entry for each row becomes an empty list,
    as does a tuple of strings. Mappings, `UserDict`, tuples, named tuples, lists, dataclasses, classes of attrs, simple
    namespaces and nodes of `torch.utils._pytree` are rebuilt from their cut parts.

    Raises:
        TypeError: part of the batch is of another type, which may hold rows; names the type.
    """
    rows: set[int] = set()
    _note_rows(batch, rows)
    try:
        return _cut(batch, frozenset(rows))
    except _CannotBeCutError as error:
        kind, reason = error.args
        name = f"{kind.__module__}.{kind.__qualname__}"
        raise TypeError(
            f"loader: cannot make an empty batch of {name} ({reason}) for the ranks that run out of data; yield tensors"
            " in tuples, lists, dictionaries or dataclasses, or give even_steps a function that makes it, as in"
            " empty=lambda batch: batch[:0]"
        ) from error


def _is_array(value: Any) -> bool:
    numpy = sys.modules.get("numpy")  # not imported for this: without it there are no arrays
    return isinstance(value, Tensor) or (numpy is not None and isinstance(value, numpy.ndarray))


def _parts(value: Any) -> Iterable[Any]:
    """What a container holds; nothing for other values."""
    if isinstance(value, Mapping):
        return value.values()
    if isinstance(value, tuple | list):
        return value
    if isinstance(value, SimpleNamespace):
        return vars(value).values()
    names = [field.name for field in dataclasses.fields(value)] if dataclasses.is_dataclass(value) else []
    names += [field.name for field in getattr(type(value), "__attrs_attrs__", ())]
    return [getattr(value, name, None) for name in names]


def _note_rows(value: Any, rows: set[int]) -> bool:
    """Adds the first dimensions of all arrays in `value` to `rows`; returns whether there is an array at all."""
    if _is_array(value):
        rows.update(value.shape[:1])
        return True
    found = [_note_rows(part, rows) for part in _parts(value) if not isinstance(part, _VALUES)]
    return any(found)


def _is_column(value: Sequence[Any], rows: frozenset[int]) -> bool:
    """Whether a list or tuple without arrays has one entry for each row, rather than being part of the structure."""
    if isinstance(value, tuple) and not (value and all(isinstance(item, str | bytes) for item in value)):
        return False
    if not rows:  # nothing tells how many rows there are
        return all(isinstance(item, _VALUES) for item in value)
    return len(value) in rows and not _note_rows(value, set())


def _cut(value: Any, rows: frozenset[int]) -> Any:
    if _is_array(value):
        return _cut_array(value)
    if isinstance(value, _VALUES):
        return value
    if isinstance(value, Set) and all(isinstance(item, _VALUES) for item in value):
        return value
    if isinstance(value, PackedSequence):
        raise _CannotBeCutError(type(value), "it cannot have zero rows")
    try:
        return _rebuild(value, lambda part: _cut(part, rows), rows)
    except _CannotBeCutError:
        raise
    except Exception as error:  # code of a class that we know nothing about
        raise _CannotBeCutError(type(value), f"{type(error).__name__}: {error}") from error


def _cut_array(array: Any) -> Any:
    if array.ndim == 0:
        return array
    try:
        cut = array[:0]
        # Of classes whose operators return plain tensors, as those of torchvision's do.
        if isinstance(array, Tensor) and not isinstance(array, nn.Parameter) and type(cut) is not type(array):
            cut = cut.as_subclass(type(array))
            cut.__dict__.update(array.__dict__)
        return cut
    except Exception as error:
        raise _CannotBeCutError(type(array), f"{type(error).__name__}: {error}") from error


def _rebuild(value: Any, cut: Callable[[Any], Any], rows: frozenset[int]) -> Any:
    """A container of the same class whose parts are cut."""
    kind = type(value)
    if isinstance(value, Mapping):
        parts = {key: cut(part) for key, part in value.items()}
        if not isinstance(value, MutableMapping):
            return kind(parts)
        rebuilt = copy.copy(value)
        for key, part in parts.items():
            rebuilt[key] = part
        return rebuilt
    if isinstance(value, list):
        items: list[Any] = [] if _is_column(value, rows) else [cut(item) for item in value]
        copied = copy.copy(value)
        copied[:] = items
        return copied
    if isinstance(value, tuple):
        if hasattr(kind, "_make"):
            return kind._make(cut(item) for item in value)
        return kind(() if _is_column(value, rows) else [cut(item) for item in value])
    if dataclasses.is_dataclass(value):
        return _rebuild_dataclass(value, cut)
    if hasattr(kind, "__attrs_attrs__"):
        fields = [field for field in kind.__attrs_attrs__ if field.init]
        changes = {field.alias: cut(getattr(value, field.name)) for field in fields}
        return sys.modules["attr"].evolve(value, **changes)
    if isinstance(value, SimpleNamespace):
        return kind(**{name: cut(part) for name, part in vars(value).items()})
    if kind in pytree.SUPPORTED_NODES:
        return pytree.tree_map(cut, value, is_leaf=lambda node: node is not value)
    raise _CannotBeCutError(kind, "a type of which it is not known where it holds rows")


def _rebuild_dataclass(value: Any, cut: Callable[[Any], Any]) -> Any:
    fields = dataclasses.fields(value)
    changes = {field.name: cut(getattr(value, field.name)) for field in fields if field.init}
    rebuilt = dataclasses.replace(value, **changes)
    for field in fields:  # those that neither __init__ nor __post_init__ sets
        if not field.init and hasattr(value, field.name) and not hasattr(rebuilt, field.name):
            object.__setattr__(rebuilt, field.name, cut(getattr(value, field.name)))
    return rebuilt


class _Pickler(pickle.Pickler):
    """Pickles tensors with the kind of their device, so that another rank finds them on its own device of that kind."""

    def reducer_override(self, value: Any) -> Any:
        if not isinstance(value, Tensor) or value.device.type == "cpu":
            return NotImplemented
        value = value.detach()
        on_cpu = torch.empty_like(value, device="cpu") if value.numel() == 0 else value.cpu()
        return _to_device, (on_cpu, value.device.type)


def _to_device(tensor: Tensor, kind: str) -> Tensor:
    return tensor.to(kind)


def pack_batch(batch: Any) -> bytes:
    """An empty batch as another rank can read it with `pickle.loads`."""
    stream = io.BytesIO()
    _Pickler(stream).dump(batch)
    return stream.getvalue()
