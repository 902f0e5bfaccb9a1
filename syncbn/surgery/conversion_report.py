"""Conversion report: the status of every normalization layer of a model, before or after conversion."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase
from torch.nn.modules.lazy import LazyModuleMixin

from syncbn.nn.batchnorm import SyncBatchNorm
from syncbn.nn.conversion import class_before, why_not_convertible
from syncbn.nn.patterns import named_modules


@dataclass(frozen=True)
class LayerConversion:
    """Conversion status of one normalization layer."""

    name: str
    kind: str
    """Name of the class before conversion; of the present class if the layer was not converted."""
    status: str
    """"converted"; "built" (constructed as a `SyncBatchNorm`, so without an original class); "waiting" (converted, but
    lazy and not initialized yet); "convertible"; "refused" (a layer whose behavior conversion could not keep); or
    "other" (normalization whose statistics do not depend on the batch)."""
    reason: str


def conversion_report(module: nn.Module) -> list[LayerConversion]:
    """Lists the conversion status of every normalization layer of `module`, in module order; changes nothing."""
    reports = []
    for name, layer in named_modules(module):
        described = _describe(layer)
        if described is not None:
            reports.append(LayerConversion(name, *described))
    return reports


def _describe(layer: nn.Module) -> tuple[str, str, str] | None:
    """Name of the original class, status and reason; None if `layer` is not a normalization layer."""
    if isinstance(layer, SyncBatchNorm):
        original = class_before(layer)
        if original is None:
            return type(layer).__name__, "built", "has no original class to revert to"
        if isinstance(layer, LazyModuleMixin):
            return original.__name__, "waiting", "is synchronized as soon as it has seen its width"
        return original.__name__, "converted", "statistics of the global batch"
    kind = type(layer).__name__
    if isinstance(layer, _BatchNorm):
        reason = why_not_convertible(layer)
        return (kind, "convertible", "statistics of the local batch") if reason is None else (kind, "refused", reason)
    if isinstance(layer, _NormBase | nn.GroupNorm | nn.LayerNorm | nn.RMSNorm | nn.LocalResponseNorm):
        return kind, "other", "its statistics do not depend on the batch"
    return None
