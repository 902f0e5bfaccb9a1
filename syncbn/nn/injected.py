"""Classes that torch puts above a module's own class, and exchanging the own class below them.

`register_parametrization`, `fully_shard` and `replicate` make a subclass of a module's class at run time and assign it
to the module. Such a class adds attributes or methods, but no forward. Conversion, fusion and their undoing exchange
the class below: the injected class is made again on top of another one.

Recognized by the torch module that the class was made in; torch has no public way to ask. Tested with the versions in
docs/compatibility.md.
"""

from __future__ import annotations

import sys
from typing import Any, TypeVar

from torch import nn

from syncbn.torch_compat import parametrized_class

_PARAMETRIZE = "torch.nn.utils.parametrize"
_MAKERS = (_PARAMETRIZE, "torch.distributed.")  # the latter: fully_shard, replicate
_NOT_COPIED = ("__dict__", "__weakref__", "__doc__")
_rebuilt: dict[tuple[type, type], Any] = {}
M = TypeVar("M", bound=nn.Module)


def own_class(cls: type[M]) -> type[M]:
    """The class of a module without the classes that torch has injected above it; `cls` itself if there are none."""
    while _is_injected(cls):
        cls = cls.__bases__[-1]  # torch puts its mixins in front
    return cls


def rebuilt(cls: type[M], own: type[nn.Module]) -> type[M]:
    """`cls` with its own class exchanged for `own`: the classes that torch has injected, on top of `own`."""
    made: Any = own
    if not _is_injected(cls):
        return made
    *others, below = cls.__bases__
    below = rebuilt(below, own)
    if cls.__module__ == _PARAMETRIZE:  # a class for each module, with a property for each parametrized tensor
        made = parametrized_class(below)
        for name, member in vars(cls).items():
            if isinstance(member, property):
                setattr(made, name, member)
        return made
    if (cls, below) not in _rebuilt:
        name = cls.__name__.removesuffix(cls.__bases__[-1].__name__) + below.__name__
        members = {key: member for key, member in vars(cls).items() if key not in _NOT_COPIED}
        _rebuilt[cls, below] = type(name, (*others, below), members)
    made = _rebuilt[cls, below]
    return made


def _is_injected(cls: type) -> bool:
    return (
        cls.__module__.startswith(_MAKERS)
        and getattr(sys.modules.get(cls.__module__), cls.__qualname__, None) is not cls  # made at run time
        and "forward" not in vars(cls)
    )
