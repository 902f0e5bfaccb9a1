"""Reverting converted layers to their original class, in place."""

from __future__ import annotations

import logging

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from syncbn.nn.batchnorm import SyncBatchNorm
from syncbn.nn.conversion import class_before
from syncbn.nn.frozen import unfreeze_parameters
from syncbn.nn.frozen_stats import forget_counter
from syncbn.nn.injected import own_class, rebuilt
from syncbn.nn.patterns import select
from syncbn.nn.subclasses import SyncSubclass
from syncbn.surgery.unfuse import check_unfusable, fused_layers, unfuse

log = logging.getLogger(__name__)

_ATTRIBUTES = ("skip_nonfinite", "activation", "memory")  # that the class has, but no other


def revert_sync_batchnorm(module: nn.Module, default: type[_BatchNorm] | None = None) -> nn.Module:
    """Reverts every converted layer of `module` to its original class, in place; returns `module`.

    For export and for inference without this package. Fused layers are unfused. Parameters, buffers, modes, hooks and
    `requires_grad` do not change, except that parameters frozen by `freeze` get back the `requires_grad` that they had
    before. What torch has put above a layer's class (parametrizations, `fully_shard`, `replicate`) stays.
    `skip_nonfinite` is dropped, because no other class has it.

    Args:
        default: the class, such as `nn.BatchNorm2d`, for layers without an original class that runs in one process:
            those that were constructed as `SyncBatchNorm`, and torch's own `nn.SyncBatchNorm`, converted or not (its
            training forward raises on a CPU). None leaves the former as they are (`conversion_report`, in
            `syncbn.surgery.conversion_report`, lists them as "built"), and the latter are `nn.SyncBatchNorm`.

    Raises:
        ValueError: a layer in training mode with frozen statistics, which its original class cannot represent; a layer
            with an `activation` that does not come from `fuse`, which the other class does not have; a layer or a fused
            module whose class or forward was exchanged by other code. The message names the layer, and no layer has
            been reverted.
    """
    check_unfusable(module)
    fused = {id(layer) for layer in fused_layers(module)}
    targets: list[tuple[_BatchNorm, type[_BatchNorm], type[_BatchNorm]]] = []
    for name, layer in select(module).items():
        original = _target(name, layer, default)
        if original is None:
            continue
        assert isinstance(layer, _BatchNorm)
        reason = _why_not(layer, original, id(layer) in fused)
        if reason is not None:
            raise ValueError(f"{name or 'the module'}: {reason}")
        targets.append((layer, original, rebuilt(type(layer), original)))
    unfuse(module)
    for layer, original, cls in targets:
        unfreeze_parameters([layer], module)
        group = layer.__dict__.pop("process_group", None)
        forget_counter(layer)
        own: tuple[str, ...] = ("_original_class", "_stats_frozen", "_stats_disabled", "_pool", "_record", "_eps")
        if isinstance(layer, SyncBatchNorm):
            own = (*own, "skip_nonfinite") if isinstance(layer, SyncSubclass) else (*own, *_ATTRIBUTES)
        for attribute in own:
            layer.__dict__.pop(attribute, None)
        layer.__class__ = cls
        if original is nn.SyncBatchNorm:
            layer.process_group = group
    return module


def _target(name: str, layer: nn.Module, default: type[_BatchNorm] | None) -> type[_BatchNorm] | None:
    """The class that a layer is to have after reverting, without what torch has injected; None to leave it."""
    if isinstance(layer, nn.SyncBatchNorm):
        if default is not None and own_class(type(layer)) is not nn.SyncBatchNorm:
            log.info("%s is a %s, a subclass of torch's: left", name or "the module", type(layer).__name__)
            return None
        return default
    if not isinstance(layer, SyncBatchNorm):
        return None
    original = class_before(layer)
    if default is not None and original in (None, nn.SyncBatchNorm):
        return default
    if original is None:
        log.info("%s was built as SyncBatchNorm: left, as no default is given", name or "the module")
    return original


def _why_not(layer: _BatchNorm, original: type[_BatchNorm], is_fused: bool) -> str | None:
    """Why `original` cannot represent a layer; None if it can."""
    if "forward" in layer.__dict__:
        return "its forward was replaced on the instance, which would go on as before; undo that first"
    if not isinstance(layer, SyncBatchNorm):
        return None
    own = own_class(type(layer))
    if own.forward is not SyncBatchNorm.forward and "_original_class" not in vars(own):
        return f"its class is {own.__name__}, whose own behaviour {original.__name__} would lose"
    if layer.stats_frozen and layer.training:
        return (
            f"its statistics are frozen, which {original.__name__} cannot keep in training; call unfreeze or eval first"
        )
    if layer._activation_name() is not None and not is_fused:
        return f"{original.__name__} has no activation={layer._activation_name()!r}"
    return None
