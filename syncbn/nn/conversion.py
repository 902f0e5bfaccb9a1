"""A layer's class exchanged for a synchronized one, in place, and what it was before.

A layer keeps its identity: only its class changes. Parameters, buffers, hooks, modes, an optimizer built before, and
every other reference to the layer stay what they were, because nothing is copied. The synchronized class is handed in:
the layer's own module imports this one.
"""

from __future__ import annotations

import logging

import torch.distributed as dist
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.lazy import LazyModuleMixin

from syncbn.nn.patterns import Patterns, select
from syncbn.nn.subclasses import synchronized_class, why_not

log = logging.getLogger(__name__)

_PLAIN = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


def convert(
    module: nn.Module,
    layer_class: type[_BatchNorm],
    process_group: dist.ProcessGroup | None = None,
    *,
    match: Patterns = "*",
    exclude: Patterns | None = (),
) -> nn.Module:
    """Gives every selected batch normalization of `module` the class `layer_class`; see `convert_sync_batchnorm`."""
    layers = {
        name: layer
        for name, layer in select(module, match, exclude).items()
        if isinstance(layer, _BatchNorm) and not isinstance(layer, layer_class)
    }
    for name, layer in layers.items():
        reason = why_not_convertible(layer)
        if reason is not None:
            raise TypeError(
                f"{name or 'the module'} is a {type(layer).__name__} whose own behaviour would be lost: {reason};"
                f" leave it out with exclude={name!r}"
            )
    for layer in layers.values():
        original = type(layer)
        group = process_group if process_group is not None else getattr(layer, "process_group", None)
        layer.__class__ = layer_class if original in _PLAIN else synchronized_class(original, layer_class)
        layer.__dict__.update(process_group=group, _original_class=original)
    if layers:
        log.debug("converted %d layers: %s", len(layers), ", ".join(layers))
    return module


def why_not_convertible(layer: _BatchNorm) -> str | None:
    """Why the behaviour of a layer could not be kept; None where it can."""
    if type(layer) in _PLAIN and "forward" not in layer.__dict__:
        return None
    return why_not(layer)


def class_before(layer: _BatchNorm) -> type | None:
    """The class to revert to: of a lazy layer that has seen its width, the one it would have become."""
    original: type | None = layer.__dict__.get("_original_class")
    if original is not None and issubclass(original, LazyModuleMixin) and not isinstance(layer, LazyModuleMixin):
        return original.cls_to_become
    return original
