"""What cannot be frozen, because a training forward writes it in a way that a switch of the layer does not reach."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

from syncbn.nn.batchnorm import SyncBatchNorm
from syncbn.nn.frozen_stats import sharers
from syncbn.nn.patterns import named_modules
from syncbn.torch_compat import power_iterations


def check_can_freeze_stats(name: str, layer: _BatchNorm) -> None:
    """Rejects batch normalization whose running statistics the package does not control, or that has none.

    Raises:
        TypeError: a class other than `SyncBatchNorm`.
        ValueError: no running statistics.
    """
    if not isinstance(layer, SyncBatchNorm):
        raise TypeError(
            f"{name or 'the module'} is a {type(layer).__name__}: its statistics cannot be frozen, because they move"
            " whenever it is in training mode; convert the model with syncbn.convert_sync_batchnorm first (works in a"
            " single process too)"
        )
    if layer.running_mean is None:
        raise ValueError(
            f"{name or 'the module'} keeps no running statistics (track_running_stats=False): nothing to freeze"
        )


def check_stays_frozen(name: str, module: nn.Module, *, stats: bool, weights: bool) -> None:
    """Rejects a module of which a forward writes statistics or parameters although they would be frozen.

    Args:
        weights: whether the module's own parameters would be frozen.

    Raises:
        ValueError: an instance normalization with running statistics, `spectral_norm`, an embedding with `max_norm`.
    """
    if not weights:
        return
    name = name or "the module"
    leave_out = f"or leave the module out with exclude={name!r}"
    if stats and isinstance(module, _InstanceNorm) and module.track_running_stats:
        raise ValueError(
            f"{name} is a {type(module).__name__} whose running_mean and running_var move in every training forward,"
            f" and cannot be frozen; pass stats=False if they may move, {leave_out}"
        )
    for vectors, remedy in power_iterations(module):
        raise ValueError(
            f"{name} cannot be frozen: spectral_norm moves its {vectors}, and with them the weight, in every training"
            f" forward; call {remedy} before freezing it, {leave_out}"
        )
    if isinstance(module, nn.Embedding | nn.EmbeddingBag) and module.max_norm is not None:
        raise ValueError(
            f"{name} is a {type(module).__name__} whose forward writes its weight (max_norm={module.max_norm}); set its"
            f" max_norm to None, {leave_out}"
        )


def check_sharers(root: nn.Module, changes: Iterable[tuple[nn.Module, str, bool]]) -> None:
    """Rejects changes after which a layer that is not frozen would write the statistics of one that is.

    Args:
        root: the model, which is searched for such layers.
        changes: see `freeze.apply_switches`.

    Raises:
        ValueError: names both layers.
    """
    changed = {id(module): frozen for module, switch, frozen in changes if switch == "stats"}
    if not changed:
        return
    names = {id(module): name or "the module" for name, module in reversed([*named_modules(root)])}

    def is_frozen(module: nn.Module) -> bool:
        return isinstance(module, SyncBatchNorm) and changed.get(id(module), module.stats_frozen)

    modules = [*root.modules()]
    live = [module for module in modules if not is_frozen(module)]
    for layer, buffer, other in sharers(filter(is_frozen, modules), live):
        if id(layer) in changed or id(other) in changed:
            one, two = names.get(id(layer), "a layer"), names.get(id(other), "a layer")
            raise ValueError(
                f"{one} cannot be frozen without {two}: they share {buffer}, which {two} would move in every training"
                " forward; freeze and unfreeze both in one call, or give one of them buffers of its own"
            )
