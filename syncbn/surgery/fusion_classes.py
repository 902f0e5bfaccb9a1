"""The classes made for modules whose forward was rewritten, and how they pickle."""

from __future__ import annotations

import importlib
import types
from collections.abc import Callable
from typing import Any

from torch import nn


class Fused(nn.Module):
    """What the classes made here share; after the original class in the method order."""

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        # The class exists in this process alone: pickle what makes it.
        members = type(self).__dict__
        names = {
            name: (value.__name__,) if isinstance(value, types.ModuleType) else value
            for name, value in members["_globals"].items()
        }
        return _rebuild, (members["_original_class"], members["_source"], names), self.__getstate__()


def _rebuild(original: type[nn.Module], source: str, names: dict[str, Any]) -> nn.Module:
    used = {name: _import(value[0]) if isinstance(value, tuple) else value for name, value in names.items()}
    cls = fused_class(original, source, used)
    return cls.__new__(cls)


def _import(name: str) -> types.ModuleType:
    return importlib.import_module(name)


_classes: dict[tuple[type, str], type[nn.Module]] = {}


def fused_class(original: type[nn.Module], source: str, used: dict[str, Any]) -> type[nn.Module]:
    """The subclass of a module's class with this forward; the same at every call."""
    if (original, source) not in _classes:
        space = dict(used)
        exec(compile(source, f"<fused {original.__name__}>", "exec"), space)  # torch.fx's own
        forward: Callable[..., Any] = space["forward"]
        members = {
            "forward": forward,
            "__reduce_ex__": Fused.__reduce_ex__,
            "__module__": original.__module__,
            "_original_class": original,
            "_source": source,
            "_globals": used,
        }
        bases = (original, Fused)
        name = f"Fused{original.__name__}"
        _classes[original, source] = types.new_class(name, bases, exec_body=lambda namespace: namespace.update(members))
    return _classes[original, source]
