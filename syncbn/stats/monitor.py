"""Monitor: what the batch normalization layers of a model hold, read with one copy to the host."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from syncbn.nn.batchnorm import SyncBatchNorm
from syncbn.nn.holding import is_held
from syncbn.nn.patterns import named_modules

DEAD_WEIGHT = 1e-3  # |gamma| below this: the channel's output hardly depends on its input
DEAD_VARIANCE = 1e-8  # running variance below this: the channel hardly varies


@dataclass(frozen=True)
class LayerSnapshot:
    """One layer at one moment; vectors are (C,) float64 on the CPU, None where the layer has no such tensor."""

    running_mean: Tensor | None
    running_var: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    stats_frozen: bool
    affine_frozen: bool

    def scalars(self) -> dict[str, float]:
        """The layer in a few numbers: means over channels, the share of dead channels, and the frozen switches as 0 or
        1.
        """
        numbers: dict[str, float] = {}
        if self.running_mean is not None and self.running_var is not None:
            numbers["running_mean_abs"] = self.running_mean.abs().mean().item()
            numbers["running_var"] = self.running_var.mean().item()
        if self.weight is not None:
            numbers["weight_abs"] = self.weight.abs().mean().item()
        if self.bias is not None:
            numbers["bias"] = self.bias.mean().item()
        dead = [self.weight.abs() < DEAD_WEIGHT] if self.weight is not None else []
        dead += [self.running_var < DEAD_VARIANCE] if self.running_var is not None else []
        if dead:
            numbers["dead_channels"] = torch.stack(dead).any(dim=0).to(torch.float64).mean().item()
        numbers["stats_frozen"] = float(self.stats_frozen)
        numbers["affine_frozen"] = float(self.affine_frozen)
        return numbers

    def vectors(self) -> dict[str, Tensor]:
        """The layer channel by channel, for histograms."""
        named = {
            "running_mean": self.running_mean,
            "running_var": self.running_var,
            "weight": self.weight,
            "bias": self.bias,
        }
        return {name: vector for name, vector in named.items() if vector is not None}


class Monitor:
    """Snapshots of every batch normalization layer of a model, of any class, by name.

    Reading costs one copy from the device to the host, for all layers together; between readings nothing at all. In a
    synchronized model every rank reads the same numbers, so one rank's reading is enough.

    Example:
        >>> from syncbn import Monitor, SyncBatchNorm
        >>> model = nn.Sequential(nn.Conv2d(1, 4, 3), SyncBatchNorm(4))
        >>> Monitor(model).snapshot()["1"].scalars()["running_var"]
        1.0
    """

    _VECTORS = ("running_mean", "running_var", "weight", "bias")

    def __init__(self, model: nn.Module) -> None:
        self._layers = {name: layer for name, layer in named_modules(model) if isinstance(layer, _BatchNorm)}

    def snapshot(self) -> dict[str, LayerSnapshot]:
        """What every layer holds now."""
        found = [
            (name, kind, vector.detach())
            for name, layer in self._layers.items()
            for kind in self._VECTORS
            if (vector := getattr(layer, kind, None)) is not None
        ]
        # The one copy to the host (on a GPU: the one wait) of a logging step.
        flat = torch.cat([vector.to(torch.float64) for _, _, vector in found]).cpu() if found else torch.empty(0)
        pieces = flat.split([vector.numel() for _, _, vector in found])
        values: dict[str, dict[str, Tensor]] = {name: {} for name in self._layers}
        for (name, kind, _), piece in zip(found, pieces, strict=True):
            values[name][kind] = piece
        return {name: self._layer_snapshot(layer, values[name]) for name, layer in self._layers.items()}

    def _layer_snapshot(self, layer: nn.Module, values: dict[str, Tensor]) -> LayerSnapshot:
        return LayerSnapshot(
            **{kind: values.get(kind) for kind in self._VECTORS},
            stats_frozen=isinstance(layer, SyncBatchNorm) and layer.stats_frozen,
            affine_frozen=is_held(layer),
        )
