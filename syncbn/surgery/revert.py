"""Reverting converted layers to their original class, in place."""

from __future__ import annotations

import logging

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from syncbn.nn.batchnorm import SyncBatchNorm
from syncbn.nn.conversion import class_before
from syncbn.nn.frozen import unfreeze_parameters
from syncbn.nn.frozen_stats import forget_counter
from syncbn.nn.patterns import select
from syncbn.nn.subclasses import SyncSubclass
from syncbn.surgery.fuse import fused_layers, unfuse

log = logging.getLogger(__name__)


def revert_sync_batchnorm(module: nn.Module, default: type[_BatchNorm] | None = None) -> nn.Module:
    """Reverts every converted layer of `module` to its original class, in place; returns `module`.

    For export and for inference without this package. Fused layers are unfused. Parameters, buffers, modes and
    `requires_grad` do not change, except that parameters frozen by `freeze` get back the `requires_grad` that they had
    before. `skip_nonfinite` is dropped, because no other class has it.

    Args:
        default: the class, such as `nn.BatchNorm2d`, for layers that were constructed as `SyncBatchNorm` and so have no
            original class; None leaves them unchanged (`conversion_report` lists them as "built").

    Raises:
        ValueError: a layer in training mode with frozen statistics, which its original class cannot represent; a layer
            with an `activation` that does not come from `fuse`, which the other class does not have. The message names
            the layer, and no layer has been reverted.
    """
    targets: dict[str, tuple[SyncBatchNorm, type]] = {}
    fused = {id(layer) for layer in fused_layers(module)}
    for name, layer in select(module).items():
        if not isinstance(layer, SyncBatchNorm):
            continue
        original = class_before(layer) or default
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
        unfreeze_parameters([layer], module)
        group = layer.__dict__.pop("process_group", None)
        forget_counter(layer)
        own = ("_original_class", "_stats_frozen", "_stats_disabled", "_pool", "_record", "skip_nonfinite")
        for attribute in own if isinstance(layer, SyncSubclass) else (*own, "activation", "memory"):
            layer.__dict__.pop(attribute, None)
        layer.__class__ = original
        if original is nn.SyncBatchNorm:
            layer.process_group = group
    return module
