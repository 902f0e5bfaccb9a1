"""disable_running_stats: training forwards that leave no trace in the running statistics."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.lazy import LazyModuleMixin

from syncbn.nn.batchnorm import SyncBatchNorm
from syncbn.nn.patterns import Patterns, select

_SWITCH = "_stats_disabled"


@contextmanager
def disable_running_stats(model: nn.Module, match: Patterns = "*", *, exclude: Patterns | None = ()) -> Iterator[None]:
    """Leaves the running statistics and counters of the selected `SyncBatchNorm` layers alone inside of the context.

    A training forward still normalizes with the (global) batch, gives the same output and gradients, and communicates
    the same; running mean, running variance and counter stay bitwise the same. For forward passes of which the running
    statistics should not know: the second pass of sharpness-aware minimization, a discriminator in the generator's
    step, pseudo-labels. For layers that should normalize with the running statistics there is `freeze`.

    The context may be entered again inside of itself, for the same layers or others, and ends with an exception too.
    Frozen layers stay frozen. A recomputation (activation checkpointing) never moves statistics, and normalizes as its
    first run, wherever either of them runs. `torch.compile` compiles a graph for the inside and one for the outside.
    Micro-batches of `accumulate_stats` inside of this context are left out of its pool. Enter it on every rank or on
    one alone: no collective depends on it. But running statistics, which are the same on all ranks, then differ.

    Args:
        model: a model, wrapped or not.
        match: patterns of module names; a plain name selects the module and all below it.
        exclude: patterns of modules to leave out.

    Raises:
        ValueError: a pattern that selects nothing; no selected layer has running statistics.
        TypeError: a selected normalization with running statistics that is not a `SyncBatchNorm`.

    Example:
        >>> import torch
        >>> layer = SyncBatchNorm(3)
        >>> with disable_running_stats(layer):
        ...     output = layer(torch.randn(8, 3))
        >>> layer.num_batches_tracked.item()
        0
    """
    layers = _selected(model, match, exclude)
    for layer in layers:
        layer.__dict__[_SWITCH] = layer.__dict__.get(_SWITCH, 0) + 1
    try:
        yield
    finally:
        for layer in layers:
            left = layer.__dict__.pop(_SWITCH, 0) - 1  # a layer that has been reverted since has none
            if left > 0:
                layer.__dict__[_SWITCH] = left


def are_disabled(layer: nn.Module) -> bool:
    """Whether a `disable_running_stats` is open for the layer."""
    return layer.__dict__.get(_SWITCH, 0) > 0


def _selected(model: nn.Module, match: Patterns, exclude: Patterns | None) -> list[SyncBatchNorm]:
    layers = []
    selected = select(model, match, exclude)
    for name, layer in selected.items():
        if not (isinstance(layer, _NormBase) and layer.track_running_stats):
            continue
        name = name or "the module"
        if isinstance(layer, SyncBatchNorm):
            if isinstance(layer, LazyModuleMixin) or isinstance(layer.running_mean, Tensor):
                layers.append(layer)
        elif isinstance(layer, nn.modules.batchnorm._BatchNorm):
            raise TypeError(
                f"{name} is a {type(layer).__name__}: its statistics move whenever it is in training mode; convert the"
                " model with syncbn.convert_sync_batchnorm first (works in a single process too)"
            )
        else:
            raise TypeError(
                f"{name} is a {type(layer).__name__} with running statistics, which move whenever it is in training"
                f" mode; leave it out with exclude={name!r}"
            )
    if not layers:
        raise ValueError(
            f"match={match!r} selects no SyncBatchNorm with running statistics, in {len(selected)} modules; choose"
            " others, or convert the model with syncbn.convert_sync_batchnorm first"
        )
    return layers
