"""In-place conversion of layers to a synchronized class, and the class to revert them to.

Only the class of a layer changes; nothing is copied. So parameters, buffers, hooks, modes, optimizers built before the
conversion, and every other reference to the layer stay valid. The synchronized class is an argument, because its
module, `batchnorm`, imports this one.
"""

from __future__ import annotations

import logging

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.lazy import LazyModuleMixin

from syncbn.nn.injected import own_class, rebuilt
from syncbn.nn.patterns import Patterns, select
from syncbn.nn.subclasses import SyncSubclass, synchronized_class, why_not
from syncbn.torch_compat import set_eps

log = logging.getLogger(__name__)

_PLAIN = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
_SCRIPTED = {cls.__name__ for cls in _PLAIN}  # their classes are gone, their names are kept


def convert(
    module: nn.Module,
    layer_class: type[_BatchNorm],
    process_group: dist.ProcessGroup | None = None,
    *,
    match: Patterns = "*",
    exclude: Patterns | None = (),
    skip_nonfinite: bool = False,
) -> nn.Module:
    """Converts every selected batch normalization of `module` to `layer_class`; see `syncbn.convert_sync_batchnorm`."""
    selected = select(module, match, exclude)
    for name, layer in selected.items():
        if isinstance(layer, torch.jit.ScriptModule) and layer.original_name in _SCRIPTED:
            raise TypeError(
                f"{name or 'the module'} is a {layer.original_name} that torch.jit has compiled: convert the model that"
                f" it was compiled from, or leave it out with exclude={name!r}"
            )
    layers = {
        name: layer
        for name, layer in selected.items()
        if isinstance(layer, _BatchNorm) and not isinstance(layer, layer_class)
    }
    for name, layer in layers.items():
        reason = why_not_convertible(layer)
        if reason is not None:
            raise TypeError(
                f"{name or 'the module'} is a {type(layer).__name__} whose own behaviour would be lost: {reason};"
                f" leave it out with exclude={name!r}"
            )
    classes = [_converted_class(type(layer), layer_class) for layer in layers.values()]
    for layer, cls in zip(layers.values(), classes, strict=True):
        group = process_group if process_group is not None else getattr(layer, "process_group", None)
        layer.__dict__.update(process_group=group, _original_class=own_class(type(layer)))
        layer.__class__ = cls
        # What compiled code is to guard has to exist: Dynamo does not notice a key that comes into `__dict__` later.
        if not isinstance(layer, SyncSubclass):
            layer.__dict__.update(activation=None, memory="default")
        set_eps(layer, layer.__dict__["eps"])
        if skip_nonfinite:
            layer.__dict__["skip_nonfinite"] = True
    if layers:
        log.debug("converted %d layers: %s", len(layers), ", ".join(layers))
    return module


def _converted_class(cls: type[_BatchNorm], layer_class: type[_BatchNorm]) -> type[_BatchNorm]:
    """The class after conversion; what torch has injected above the original class stays above the new one."""
    original = own_class(cls)
    return rebuilt(cls, layer_class if original in _PLAIN else synchronized_class(original, layer_class))


def why_not_convertible(layer: _BatchNorm) -> str | None:
    """Why conversion would change the behavior that a layer's class adds; None if it would not."""
    if own_class(type(layer)) in _PLAIN and "forward" not in layer.__dict__:
        return None
    return why_not(layer)


def class_before(layer: _BatchNorm) -> type | None:
    """The class to revert to; for a lazy layer that has been initialized, the class it would have become."""
    original: type | None = layer.__dict__.get("_original_class")
    if original is not None and issubclass(original, LazyModuleMixin) and not isinstance(layer, LazyModuleMixin):
        return original.cls_to_become
    return original
