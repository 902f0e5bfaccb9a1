"""Converting a model's batch normalization to `SyncBatchNorm` and back, in place.

A layer keeps its identity: only its class changes. Parameters, buffers, hooks, modes, an optimizer built before, and
    every other
reference to the layer stay what they were, because nothing is copied.
"""

import torch.distributed as dist
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.lazy import LazyModuleMixin

from syncbn.nn.batchnorm import SyncBatchNorm
from syncbn.nn.holding import release
from syncbn.nn.patterns import Patterns, select

_PLAIN = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


def convert_sync_batchnorm(
    module: nn.Module,
    process_group: dist.ProcessGroup | None = None,
    *,
    match: Patterns = "*",
    exclude: Patterns | None = (),
) -> nn.Module:
    """Makes every selected `nn.BatchNorm1d/2d/3d` and `nn.SyncBatchNorm` of `module` a `SyncBatchNorm`, in place.

    Needs no process group. A layer that is one already, a lazy layer that has not seen its width, and every other kind
    of normalization are left as they are.

    Args:
        module: any model, or a single layer.
        process_group: the ranks to sum over; None for all ranks of the job (a torch `SyncBatchNorm` keeps its own).
        match: patterns of the modules to convert (see `patterns`).
        exclude: patterns of the modules to leave.

    Returns:
        `module` itself.

    Raises:
        TypeError: a subclass whose behaviour would be lost; the message names the layer. Nothing has been converted
            then.
        ValueError: a pattern that selects nothing.
    """
    selected = select(module, match, exclude)
    layers = {name: layer for name, layer in selected.items() if _is_convertible(name, layer)}
    for layer in layers.values():
        original = type(layer)
        group = process_group if process_group is not None else getattr(layer, "process_group", None)
        layer.__class__ = SyncBatchNorm
        layer.__dict__.update(process_group=group, _original_class=original)
    return module


def _is_convertible(name: str, layer: nn.Module) -> bool:
    if not isinstance(layer, _BatchNorm) or isinstance(layer, SyncBatchNorm | LazyModuleMixin):
        return False
    if type(layer) not in _PLAIN:
        raise TypeError(
            f"{name or 'the module'} is a {type(layer).__name__}, a subclass of batch normalization whose own behaviour"
            f" a SyncBatchNorm would lose; leave it out with exclude={name!r}"
        )
    return True


def revert_sync_batchnorm(module: nn.Module) -> nn.Module:
    """Gives every converted layer of `module` its original class back, in place; returns `module`.

    A layer that was built as `SyncBatchNorm` has no other class and is left. Frozen affine parameters get back the
    `requires_grad` that they had; a layer with frozen statistics cannot be expressed by its original class and is an
    error.

    Raises:
        ValueError: a layer whose statistics are frozen; the message names it. Nothing has been reverted then.
    """
    converted = {
        name: layer
        for name, layer in select(module).items()
        if isinstance(layer, SyncBatchNorm) and hasattr(layer, "_original_class")
    }
    for name, layer in converted.items():
        if layer.stats_frozen and layer.training:
            raise ValueError(
                f"{name or 'the module'}: its statistics are frozen, which its original class cannot keep in training;"
                " call unfreeze or eval first"
            )
    for layer in converted.values():
        release(layer)
        original = layer.__dict__.pop("_original_class")
        group = layer.__dict__.pop("process_group", None)
        layer.__dict__.pop("_stats_frozen", None)
        layer.__class__ = original
        if original is nn.SyncBatchNorm:
            layer.process_group = group
    return module
