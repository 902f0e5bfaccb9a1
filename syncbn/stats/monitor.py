"""Monitor: state and batch statistics of a model's batch normalization layers, read with one copy to the host."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from syncbn.nn.batchnorm import SyncBatchNorm, width_of
from syncbn.nn.frozen import has_frozen_parameters
from syncbn.nn.groups import LostGroup, collective_group
from syncbn.nn.moments import Moments
from syncbn.nn.patterns import named_modules
from syncbn.nn.recorder import new_record, split_record
from syncbn.report.metric_names import BETWEEN_RANK_SHARE, DEAD_CHANNELS, LAYER_DRIFT, VALUES_PER_CHANNEL, WEIGHT_ABS
from syncbn.stats.calls import input_of

DEAD_WEIGHT = 1e-3  # |gamma| below this: the channel's output hardly depends on its input
DEAD_VARIANCE = 1e-8  # running variance below this: the channel hardly varies

_STATE = ("running_mean", "running_var", "weight", "bias")


@dataclass(frozen=True)
class LayerSnapshot:
    """State and batch statistics of one layer at the time of a snapshot.

    Vectors are (C,) float64 on the CPU. None stands for a value that the layer does not have, or that no watched step
    has recorded.
    """

    running_mean: Tensor | None
    running_var: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    stats_frozen: bool
    """Whether the running statistics are frozen by `freeze`."""
    affine_frozen: bool
    """Whether weight and bias get no gradient, be it by `freeze` or by hand."""
    batch_mean: Tensor | None = None
    """Mean of the input in the last watched step: over all ranks that the layer sums over, if it normalized by the
    batch; otherwise (frozen statistics, evaluation mode, a class other than `SyncBatchNorm`) over this rank's
    samples."""
    batch_var: Tensor | None = None
    """Variance of the same samples, biased (divided by the count)."""
    drift: Tensor | None = None
    """|batch mean - running mean| in running standard deviations, sqrt(running_var + eps); the running statistics are
    those from before the watched step."""
    between_rank_share: Tensor | None = None
    """The share of the batch's variance that lies between the means of the ranks, 0 to 1; NaN where nothing varies."""
    values_per_channel: float | None = None
    """Number of values behind the batch statistics of one pass, over all ranks that the layer sums over: the effective
    batch size."""

    def scalars(self) -> dict[str, float]:
        """The layer summarized in scalars; those that it does not have are left out.

        `running_mean_abs`, `running_var`, `batch_mean_abs`, `batch_var`, `drift`, `between_rank_share`, `weight_abs`
        (of |weight|) and `bias` are means over channels, `dead_channels` is the share of channels with |weight| < 1e-3
        or running variance < 1e-8, `stats_frozen` and `affine_frozen` are 0 or 1; `values_per_channel` is the field.
        """
        means = {
            "running_mean_abs": None if self.running_mean is None else self.running_mean.abs(),
            "running_var": self.running_var,
            "batch_mean_abs": None if self.batch_mean is None else self.batch_mean.abs(),
            "batch_var": self.batch_var,
            LAYER_DRIFT: self.drift,
            BETWEEN_RANK_SHARE: _defined(self.between_rank_share),
            WEIGHT_ABS: None if self.weight is None else self.weight.abs(),
            "bias": self.bias,
        }
        numbers = {name: vector.mean().item() for name, vector in means.items() if vector is not None}
        if self.values_per_channel is not None:
            numbers[VALUES_PER_CHANNEL] = self.values_per_channel
        dead = [self.weight.abs() < DEAD_WEIGHT] if self.weight is not None else []
        dead += [self.running_var < DEAD_VARIANCE] if self.running_var is not None else []
        if dead:
            numbers[DEAD_CHANNELS] = torch.stack(dead).any(dim=0).to(torch.float64).mean().item()
        numbers["stats_frozen"] = float(self.stats_frozen)
        numbers["affine_frozen"] = float(self.affine_frozen)
        return numbers

    def vectors(self) -> dict[str, Tensor]:
        """The per-channel vectors that the layer has, by name, for histograms."""
        names = (*_STATE, "batch_mean", "batch_var", "drift", "between_rank_share")
        return {name: vector for name in names if (vector := getattr(self, name)) is not None}


class Monitor:
    """Takes snapshots, by name, of every batch normalization layer of a model; the layers may be of any class.

    The state of the layers (running statistics, weight, bias, frozen switches) can be read at any time. Their batch
    statistics (mean, variance, drift, the share of variance between ranks) are recorded inside of `watch`, on all
    ranks, and are part of the snapshots that follow. A watched step adds C numbers to each forward collective of a
    `SyncBatchNorm`, and no further collective. A snapshot costs one copy from the device to the host, for all layers
    together; steps that are not watched, and a model without a monitor, cost nothing.

    In a synchronized model every rank records the same numbers, so it is enough that one rank takes the snapshot.

    Example:
        >>> from syncbn import Monitor, SyncBatchNorm
        >>> model = nn.Sequential(nn.Conv2d(1, 4, 3), SyncBatchNorm(4))
        >>> monitor = Monitor(model)
        >>> for step in range(100):
        ...     with monitor.watch(step % 50 == 0):
        ...         output = model(torch.randn(8, 1, 6, 6))
        >>> monitor.snapshot()["1"].scalars()["values_per_channel"]
        128.0
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._layers: dict[_BatchNorm, str] = {}
        for name, layer in named_modules(model):
            if isinstance(layer, _BatchNorm):
                self._layers.setdefault(layer, name)  # a layer in two places: once, by its first name
        self._seen: dict[_BatchNorm, _LayerRecord] = {}

    @contextmanager
    def watch(self, enabled: bool = True) -> Iterator[None]:
        """Records the batch statistics of all forward passes inside of the context, and drops earlier records.

        Several passes (of micro-batches, or of a layer that is called twice) are pooled.

        Args:
            enabled: False makes the context do nothing, as in `with monitor.watch(step % 50 == 0)`. It has to be the
                same on all ranks, because the collectives of a watched step have a longer payload.

        Raises:
            RuntimeError: another monitor is watching a layer of this one.
        """
        if not enabled:
            yield
            return
        if any(layer.__dict__.get("_record") is not None for layer in self._layers):
            raise RuntimeError("Monitor.watch: a monitor watches this model already; leave its context first")
        device = next((tensor.device for tensor in self._model.parameters()), torch.get_default_device())
        self._seen = {layer: _LayerRecord.by(layer, device) for layer in self._layers if _has_width(layer)}
        hooks = []
        for layer, seen in self._seen.items():
            if isinstance(layer, SyncBatchNorm):
                layer._record = seen.record
            else:
                hooks.append(layer.register_forward_pre_hook(seen.look, with_kwargs=True))
        try:
            yield
        finally:
            for layer in self._layers:
                layer.__dict__.pop("_record", None)
            for hook in hooks:
                hook.remove()

    def snapshot(self) -> dict[str, LayerSnapshot]:
        """Snapshots by layer name, in model order: the state now, and the batch statistics of the last watched step."""
        parts: list[tuple[_BatchNorm, str, Tensor]] = []
        for layer in self._layers:
            state = {kind: getattr(layer, kind, None) for kind in _STATE} if _has_width(layer) else {}
            seen = self._seen[layer].parts() if layer in self._seen else {}
            parts += [(layer, kind, part.detach()) for kind, part in {**state, **seen}.items() if part is not None]
        values: dict[_BatchNorm, dict[str, Tensor]] = {layer: {} for layer in self._layers}
        for (layer, kind, _), value in zip(parts, _to_host([part for _, _, part in parts]), strict=True):
            values[layer][kind] = value
        return {name: _snapshot(layer, values[layer]) for layer, name in self._layers.items()}


@dataclass
class _LayerRecord:
    """The record of one layer's watched forward passes, on the layer's device."""

    record: Tensor  # see `nn.recorder`
    running_mean: Tensor | None  # copies of both buffers from before the watched step
    running_var: Tensor | None

    @classmethod
    def by(cls, layer: _BatchNorm, device: torch.device) -> _LayerRecord:
        """An empty record of `layer`; `device` is used for a layer that has no tensor of its own."""
        device = next((tensor.device for tensor in layer.state_dict().values()), device)
        mean, var = (None if buffer is None else buffer.clone() for buffer in (layer.running_mean, layer.running_var))
        return cls(new_record(width_of(layer), device), mean, var)

    def look(self, layer: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        """Forward pre-hook of layers that are not a `SyncBatchNorm`: records the moments of this rank's input."""
        input = input_of(arguments, keywords)
        if input is not None:
            packed = Moments.of(input.detach()).packed
            self.record[: packed.numel()].add_(packed)
            if layer.training and not isinstance(layer, nn.SyncBatchNorm):  # torch's sums over other ranks, too
                self.record[-1].add_(float(getattr(layer, "num_groups", 1)))  # a `VirtualBatchNorm` has several

    def parts(self) -> dict[str, Tensor | None]:
        return {"record": self.record, "mean_before": self.running_mean, "var_before": self.running_var}


def _to_host(tensors: list[Tensor]) -> list[Tensor]:
    """The tensors, flattened, as float64 on the CPU, by one copy from each device (on a GPU, the only wait)."""
    pieces: dict[int, Tensor] = {}
    for device in dict.fromkeys(tensor.device for tensor in tensors):
        there = [number for number, tensor in enumerate(tensors) if tensor.device == device]
        one = torch.zeros(1, dtype=torch.float64, device=device)  # `cat` promotes all to its type
        flat = torch.cat([one, *(tensors[number].flatten() for number in there)]).cpu()[1:]
        pieces |= dict(zip(there, flat.split([tensors[number].numel() for number in there]), strict=True))
    return [pieces[number] for number in range(len(tensors))]


def _snapshot(layer: _BatchNorm, values: dict[str, Tensor]) -> LayerSnapshot:
    state: dict[str, Any] = {kind: values.get(kind) for kind in _STATE}
    state |= {
        "stats_frozen": isinstance(layer, SyncBatchNorm) and layer.stats_frozen,
        "affine_frozen": _is_affine_frozen(layer),
    }
    if "record" not in values:
        return LayerSnapshot(**state)
    packed, between, total, calls = split_record(values["record"])
    moments = Moments(packed)
    count, mean, drift = moments.count, moments.mean, None
    if count == 0:
        return LayerSnapshot(**state)
    if "mean_before" in values:
        drift = (mean - values["mean_before"]).abs() / (values["var_before"] + layer.eps).sqrt()
    by_batch = bool(calls > 0)
    return LayerSnapshot(
        **state,
        batch_mean=mean,
        batch_var=moments.var,
        drift=drift,
        between_rank_share=between / total if by_batch and _sums_over_ranks(layer) else None,
        values_per_channel=(count / calls).item() if by_batch else None,
    )


def _is_affine_frozen(layer: _BatchNorm) -> bool:
    own = list(layer.parameters(recurse=False))
    return not any(parameter.requires_grad for parameter in own) if own else has_frozen_parameters(layer)


def _sums_over_ranks(layer: _BatchNorm) -> bool:
    return (
        isinstance(layer, SyncBatchNorm)
        and not isinstance(layer.process_group, LostGroup)
        and collective_group(layer.process_group) is not None
    )


def _has_width(layer: _BatchNorm) -> bool:
    return width_of(layer) > 0  # a lazy layer takes it from its first batch


def _defined(vector: Tensor | None) -> Tensor | None:
    if vector is None:
        return None
    vector = vector[~vector.isnan()]
    return vector if len(vector) else None
