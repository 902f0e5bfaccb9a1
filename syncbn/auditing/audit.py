"""audit(): checks a model in its present state for classic batch normalization mistakes.

The rules are conservative: a finding means that something is wrong or very probably not intended. `docs/audit.md`
lists all of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.lazy import LazyModuleMixin

from syncbn.auditing.dropout import after_dropout
from syncbn.auditing.inputs import of_input
from syncbn.auditing.probe import LayerInput, probe
from syncbn.auditing.ranks import is_frozen, is_synchronized, members_of, on_all_ranks, world_size
from syncbn.auditing.rules import Finding, new_finding, ordered
from syncbn.auditing.statistics import of_running_statistics
from syncbn.nn.batchnorm import SyncBatchNorm
from syncbn.nn.patterns import select

# Samples up to which few-values-per-channel is reported. Wu and He (2018), error of ResNet-50 on ImageNet by samples
# per device: 24.8 % at 8, 27.3 % at 4, 34.7 % at 2, compared to 23.6 % with large batches. The values of one sample are
# similar to each other, so many pixels do not make up for few samples.
FEW_SAMPLES = 4


def audit(
    model: nn.Module,
    *,
    batch: Any = None,
    optimizer: torch.optim.Optimizer | None = None,
    batch_size: int | None = None,
    trained: bool = False,
) -> list[Finding]:
    """Checks `model` for classic batch normalization mistakes; returns the findings, the most severe first.

    Batch normalization layers of any class are checked, torch's too. The present mode decides what the model is checked
    for: in training mode it is about to be trained, in evaluation mode about to be evaluated. The audit changes
    nothing: parameters, gradients, buffers, modes and the state of torch's random number generators stay the same.

    In a distributed job every rank has to call it, and all return the same list. Communication: one
    `all_gather_object` of findings and digests of the layers; with `batch`, also the collectives of a forward pass and
    one all-reduce. A layer with a sub-group is compared within that group.

    Args:
        model: a model, with or without wrappers of DDP or torch.compile.
        batch: this rank's part of a batch as in training, for the rules that need data: the model's input, or a tuple
            or list that begins with it. The model runs once on it, in its present mode and without a backward pass.
        optimizer: the model's optimizer, for the rules about frozen parameters that it would update and trainable ones
            that it lacks.
        batch_size: samples of a training forward over all ranks; needed if `batch` is smaller or not given.
        trained: whether the model has been trained or loaded completely. Running statistics with initial values are
            then a mistake in training mode too; in a new model they are not.

    Raises:
        ValueError: `batch` with a model that has lazy layers, which a forward pass would initialize.

    Example:
        >>> from syncbn import SyncBatchNorm
        >>> model = nn.Sequential(nn.Conv2d(1, 4, 3), SyncBatchNorm(4))
        >>> audit(model)
        []
        >>> _ = model.requires_grad_(False)
        >>> [(finding.layer, finding.rule) for finding in audit(model)]
        [('1', 'parameters-frozen-statistics-moving')]
    """
    modules = select(model)
    layers = {
        name: layer
        for name, layer in modules.items()
        if isinstance(layer, _BatchNorm)
        and not (isinstance(layer, LazyModuleMixin) and layer.has_uninitialized_params())
    }
    feeding = _feeding(modules)
    seen = {} if batch is None else probe(model, layers, batch)
    findings = [*after_dropout(modules)]
    evaluated = trained or not next(iter(modules.values())).training
    for name, layer in layers.items():
        parent = modules.get(name.rpartition(".")[0]) if name else None
        findings += _of_settings(name, layer, feeding[name], parent)
        runs = batch is None or name in seen
        findings += _of_statistics(name, layer, is_evaluated=evaluated, runs=runs)
        findings += _of_world(name, layer)
        findings += _of_size(name, layer, seen.get(name), batch_size)
        findings += of_input(name, layer, seen[name]) if name in seen else ()
        findings += _of_checkpointing(name, layer, modules, seen.get(name))
        findings += _of_optimizer(name, layer, optimizer) if optimizer is not None else ()
    return ordered(on_all_ranks(findings, layers))


def is_moving(layer: _BatchNorm) -> bool:
    """Whether a forward in the present mode updates the running statistics."""
    return _normalizes_by_batch(layer) and layer.running_mean is not None and layer.track_running_stats


def _normalizes_by_batch(layer: _BatchNorm) -> bool:
    return layer.training and not is_frozen(layer)


def _feeding(modules: dict[str, nn.Module]) -> dict[str, nn.Module | None]:
    """For each module, the last one before it that has parameters of its own and is no batch normalization, or None.

    "Before" means in the order of `modules`, which need not be the order in which they run.
    """
    before: dict[str, nn.Module | None] = {}
    last: nn.Module | None = None
    for name, module in modules.items():
        before[name] = last
        if not isinstance(module, _BatchNorm) and next(module.parameters(recurse=False), None) is not None:
            last = module
    return before


def _of_settings(
    name: str, layer: _BatchNorm, feeding: nn.Module | None, parent: nn.Module | None
) -> Iterator[Finding]:
    """Findings from a layer's settings: tracking of statistics, frozen parameters, momentum.

    Args:
        feeding: the last module with parameters before the layer; None without one.
        parent: the module that contains the layer; None for the model itself.
    """
    if layer.running_mean is None:
        yield new_finding("no-running-statistics", name)
    elif not layer.track_running_stats:
        yield new_finding("statistics-switched-off", name)
    if not is_moving(layer):
        return
    own = list(layer.parameters(recurse=False))
    if own and not any(parameter.requires_grad for parameter in own):
        # If the layer before it trains, the statistics have to follow: then this may be intended.
        is_fed_by_frozen = feeding is None or not any(p.requires_grad for p in feeding.parameters(recurse=False))
        severity = "error" if is_fed_by_frozen else "warning"
        yield new_finding("parameters-frozen-statistics-moving", name, severity=severity)
    elif not own and parent is not None and _is_all_frozen(parent):  # a linear probe's parent has trainable parameters
        yield new_finding("parameters-frozen-statistics-moving", name)
    if layer.momentum is None:
        yield new_finding("momentum-cumulative", name)
    elif layer.momentum == 0:
        yield new_finding("momentum-zero", name)


def _is_all_frozen(module: nn.Module) -> bool:
    parameters = list(module.parameters())
    return bool(parameters) and not any(parameter.requires_grad for parameter in parameters)


def _of_statistics(name: str, layer: _BatchNorm, *, is_evaluated: bool, runs: bool) -> Iterator[Finding]:
    rule = None
    if not runs:
        pass  # not part of this forward: an auxiliary head, for example, need not have been updated
    elif is_frozen(layer) or (not layer.training and not is_evaluated):  # the latter: frozen by eval()
        rule = "frozen-at-initial-values"
    elif is_evaluated:
        rule = "never-updated"
    yield from of_running_statistics(
        name, layer.running_mean, layer.running_var, layer.num_batches_tracked, rule_if_initial=rule
    )


def _of_world(name: str, layer: _BatchNorm) -> Iterator[Finding]:
    if isinstance(layer, nn.SyncBatchNorm):
        buffer = next(layer.buffers(), next(layer.parameters(), None))
        on_cpu = buffer is not None and buffer.device.type == "cpu"
        raises = on_cpu and layer.training and dist.is_available() and dist.is_initialized()
        detail = (
            "; its training forward raises on the CPU" if raises else ", which freezes nothing and fails on the CPU"
        )
        yield new_finding("torch-syncbn", name, severity="error" if raises else None, detail=detail)
    elif world_size() > 1 and not isinstance(layer, SyncBatchNorm) and _normalizes_by_batch(layer):
        yield new_finding("plain-bn-in-distributed-job", name)


def _of_size(name: str, layer: _BatchNorm, seen: LayerInput | None, batch_size: int | None) -> Iterator[Finding]:
    """Findings about statistics of a training forward that are computed from few samples, or from a single value."""
    if not _normalizes_by_batch(layer) or (seen is None and batch_size is None):
        return
    members = members_of(layer)
    share = (1 if members is None else len(members)) / world_size()
    samples = 0.0 if batch_size is None else batch_size * share
    values: float | None = None
    if seen is not None:
        here, all_ranks = seen.rows_here, seen.rows * share
        samples = max(samples, all_ranks if is_synchronized(layer) else here)
        values = samples * seen.values_per_row
    if samples == 0:  # this rank has no samples of the batch
        return
    if values is not None and round(values) <= 1:
        yield new_finding("few-values-per-channel", name, severity="error", observed="a single value per channel")
    elif samples <= FEW_SAMPLES:
        yield new_finding("few-values-per-channel", name, observed=f"{samples:.3g} samples")


def _of_checkpointing(
    name: str, layer: _BatchNorm, modules: dict[str, nn.Module], seen: LayerInput | None
) -> Iterator[Finding]:
    if isinstance(layer, SyncBatchNorm) or not is_moving(layer):
        return
    parts = name.split(".")
    above = (modules.get(".".join(parts[:end])) for end in range(len(parts)))
    # torch's wrapper is recognized by name: importing its class would import torch.distributed.algorithms.
    if (seen is not None and seen.under_checkpoint) or any(type(m).__name__ == "CheckpointWrapper" for m in above):
        yield new_finding("updated-twice", name)


def _of_optimizer(name: str, layer: _BatchNorm, optimizer: torch.optim.Optimizer) -> Iterator[Finding]:
    optimized = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    own = list(layer.parameters(recurse=False))
    # torch's optimizers skip a parameter whose gradient is None; freezing by hand keeps the gradient that it had.
    if any(id(p) in optimized and not p.requires_grad and p.grad is not None for p in own):
        yield new_finding("frozen-parameter-updated", name)
    if any(id(p) not in optimized and p.requires_grad for p in own):
        yield new_finding("affine-not-optimized", name)
