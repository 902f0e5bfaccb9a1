"""Converting a model's batch normalization to `SyncBatchNorm` and back, in place.

A layer keeps its identity: only its class changes. Parameters, buffers, hooks, modes, an optimizer built before, and
every other reference to the layer stay what they were, because nothing is copied.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

import torch.distributed as dist
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase
from torch.nn.modules.lazy import LazyModuleMixin

from syncbn.nn.batchnorm import SyncBatchNorm
from syncbn.nn.frozen import release
from syncbn.nn.patterns import Patterns, named_modules, select
from syncbn.nn.subclasses import SyncSubclass, synchronized_class, why_not
from syncbn.surgery.fuse import fused_layers, unfuse

log = logging.getLogger(__name__)

_PLAIN = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


@dataclass(frozen=True)
class LayerReport:
    """What conversion makes, or has made, of one normalization layer."""

    name: str
    kind: str
    """Its original class."""
    status: str
    """"converted", "built" (as SyncBatchNorm), "convertible", "waiting" (lazy), "refused", or "other"."""
    reason: str


def convert_sync_batchnorm(
    module: nn.Module,
    process_group: dist.ProcessGroup | None = None,
    *,
    match: Patterns = "*",
    exclude: Patterns | None = (),
) -> nn.Module:
    """Makes every selected batch normalization of `module` a `SyncBatchNorm`, in place.

    Needs no process group. `nn.BatchNorm1d/2d/3d` and `nn.SyncBatchNorm` become exactly `SyncBatchNorm`. A subclass
    keeps what it adds (a fused activation, say): its class becomes a subclass of both it and `SyncBatchNorm`. A lazy
    layer is converted when it has seen its width. Every other normalization, and a layer that is synchronized already,
    is left. `conversion_report` tells which layer is what, and why.

    Args:
        module: any model, or a single layer.
        process_group: the ranks to sum over; None for all ranks of the job (a torch `SyncBatchNorm` keeps its own).
        match: patterns of the modules to convert: shell globs over dotted names; a plain name selects all below it.
        exclude: patterns of the modules to leave.

    Returns:
        `module` itself.

    Raises:
        TypeError: a subclass whose behaviour cannot be kept; the message names the layer. Nothing has been converted
            then.
        ValueError: a pattern that selects nothing.
    """
    layers = {
        name: layer
        for name, layer in select(module, match, exclude).items()
        if isinstance(layer, _BatchNorm) and not isinstance(layer, SyncBatchNorm)
    }
    for name, layer in layers.items():
        reason = _why_not(layer)
        if reason is not None:
            raise TypeError(
                f"{name or 'the module'} is a {type(layer).__name__} whose own behaviour would be lost: {reason};"
                f" leave it out with exclude={name!r}"
            )
    for layer in layers.values():
        original = type(layer)
        group = process_group if process_group is not None else getattr(layer, "process_group", None)
        layer.__class__ = SyncBatchNorm if original in _PLAIN else synchronized_class(original)
        layer.__dict__.update(process_group=group, _original_class=original)
    if layers:
        log.debug("converted %d layers: %s", len(layers), ", ".join(layers))
    return module


def revert_sync_batchnorm(module: nn.Module, default: type[_BatchNorm] | None = None) -> nn.Module:
    """Gives every converted layer of `module` its original class back, in place; returns `module`.

    For export and for inference without this package. What `fuse` has fused is taken apart again. Parameters, buffers,
    modes and `requires_grad` stay; affine parameters that were frozen by `freeze` get back the `requires_grad` that
    they had.

    Args:
        default: the class for layers that were built as `SyncBatchNorm` and so have no original one, such as
            `nn.BatchNorm2d`; None leaves them (`conversion_report` lists them as "built").

    Raises:
        ValueError: a layer in training mode whose statistics are frozen, which its original class cannot express; a
            layer whose `activation` the class `default` does not have. The message names the layer, and nothing has
            been reverted then.
    """
    targets: dict[str, tuple[SyncBatchNorm, type]] = {}
    fused = {id(layer) for layer in fused_layers(module)}
    for name, layer in select(module).items():
        if not isinstance(layer, SyncBatchNorm):
            continue
        original = _class_before(layer) or default
        if original is None:
            log.info("%s was built as SyncBatchNorm: left, as no default is given", name or "the module")
            continue
        if layer.stats_frozen and layer.training:
            raise ValueError(
                f"{name or 'the module'}: its statistics are frozen, which {original.__name__} cannot keep in training;"
                " call unfreeze or eval first"
            )
        if layer._activation_name() is not None and id(layer) not in fused:
            raise ValueError(f"{name or 'the module'}: {original.__name__} has no activation={layer.activation!r}")
        targets[name] = (layer, original)
    unfuse(module)
    for layer, original in targets.values():
        release([layer], module)
        group = layer.__dict__.pop("process_group", None)
        own = ("_original_class", "_stats_frozen", "_pool", "_record")
        for attribute in own if isinstance(layer, SyncSubclass) else (*own, "activation", "memory"):
            layer.__dict__.pop(attribute, None)
        layer.__class__ = original
        if original is nn.SyncBatchNorm:
            layer.process_group = group
    return module


def conversion_report(module: nn.Module) -> list[LayerReport]:
    """What every normalization layer of `module` is, before or after conversion."""
    reports = []
    for name, layer in named_modules(module):
        described = _describe(layer)
        if described is not None:
            reports.append(LayerReport(name, *described))
    return reports


def _describe(layer: nn.Module) -> tuple[str, str, str] | None:
    """Original class, status and reason; None for a module that normalizes nothing."""
    if isinstance(layer, SyncBatchNorm):
        original = _class_before(layer)
        if original is None:
            return type(layer).__name__, "built", "has no original class to revert to"
        if isinstance(layer, LazyModuleMixin):
            return original.__name__, "waiting", "is synchronized as soon as it has seen its width"
        return original.__name__, "converted", "statistics of the global batch"
    kind = type(layer).__name__
    if isinstance(layer, _BatchNorm):
        reason = _why_not(layer)
        return (kind, "convertible", "statistics of the local batch") if reason is None else (kind, "refused", reason)
    if isinstance(layer, _NormBase | nn.GroupNorm | nn.LayerNorm | nn.RMSNorm | nn.LocalResponseNorm):
        return kind, "other", "its statistics do not depend on the batch"
    return None


def _why_not(layer: _BatchNorm) -> str | None:
    if type(layer) in _PLAIN and "forward" not in layer.__dict__:
        return None
    return why_not(layer)


def _class_before(layer: SyncBatchNorm) -> type | None:
    """The class to revert to: of a lazy layer that has seen its width, the one it would have become."""
    original: type | None = layer.__dict__.get("_original_class")
    if original is not None and issubclass(original, LazyModuleMixin) and not isinstance(layer, LazyModuleMixin):
        return original.cls_to_become
    return original
