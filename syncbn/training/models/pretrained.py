"""Pretrained sub-networks: loading, a report of what was loaded, and the drift of their running statistics."""

from __future__ import annotations

import logging
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from syncbn.report.metric_names import DRIFT
from syncbn.training.checkpoint.contents import MalformedError, require_usable, shown
from syncbn.training.checkpoint.weights import read_model_weights
from syncbn.training.config.errors import ConfigError, listed
from syncbn.training.config.model import InitConfig

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class LoadOutcome:
    """Outcome for every key of a file and of the sub-network it was loaded into; keys are relative to the sub-network.

    `loaded`: in both, in the same shape. `missing`: in the sub-network only, except batch counters. `unexpected`: in
    the file only. `mismatched`: in both, in different shapes.
    """

    loaded: list[str]
    missing: list[str]
    unexpected: list[str]
    mismatched: list[str]

    @property
    def missing_statistics(self) -> list[str]:
        """Missing running means and variances, whose layers keep those they were built with, usually 0 and 1."""
        return [key for key in self.missing if key.endswith(("running_mean", "running_var"))]

    def problems(self) -> list[str]:
        """Describes the mismatches: a phrase for each kind that is not empty."""
        kinds = {
            "lacks": self.missing,
            "has besides": self.unexpected,
            "has in another shape": self.mismatched,
        }
        return [f"{kind} {listed([*map(shown, keys)], 3)}" for kind, keys in kinds.items() if keys]


def load_subnet(model: nn.Module, name: str, config: InitConfig) -> LoadOutcome:
    """Loads a pretrained state into the sub-network `name` of the model.

    Args:
        config: `path` is a checkpoint of this package, a run directory (its best checkpoint), or a state dict saved by
            torch or safetensors. `prefix` is the prefix of the sub-network's keys in it; None: `name.` or nothing,
            whichever matches more keys. With `strict` all keys and shapes have to match; without, those that match
            are loaded.

    Raises:
        ConfigError: no such sub-network or file; with `strict`, a mismatch; no key that matches; a tensor that matches
            and cannot be used.
    """
    key = f"init.{name}"
    try:
        subnet = model.get_submodule(name)
    except AttributeError:
        children = ", ".join(child for child, _ in model.named_children())
        raise ConfigError(f"{key}: the model has no sub-network {name!r}; its top-level ones are {children}") from None
    own = subnet.state_dict()
    state = _below_prefix(read_model_weights(Path(config.path), f"{key}.path"), name, key, config, own)
    try:
        require_usable({k: state[k] for k in own if k in state}, complex_too=any(map(torch.is_complex, own.values())))
    except MalformedError as error:
        raise ConfigError(f"{key}.path: {config.path} {error}") from None
    fitting = [k for k in own if k in state and own[k].shape == state[k].shape]
    report = LoadOutcome(
        loaded=fitting,
        # num_batches_tracked may be missing: old torch versions saved none, and torch's strict loading accepts that.
        missing=[k for k in own if k not in state and not k.endswith("num_batches_tracked")],
        unexpected=[k for k in state if k not in own],
        mismatched=[k for k in own if k in state and own[k].shape != state[k].shape],
    )
    if all(k.endswith("num_batches_tracked") for k in fitting):
        raise ConfigError(f"{key}.path: nothing in {config.path} fits {name}: it {'; it '.join(report.problems())}")
    if config.strict and report.problems():
        raise ConfigError(
            f"{key}.path: {config.path} {'; it '.join(report.problems())}; expected the state of {name}, or set"
            f" {key}.strict=false to load what fits"
        )
    subnet.load_state_dict({**own, **{k: state[k] for k in fitting}})
    log.info("loaded %d of %d tensors into %s from %s", len(fitting), len(own), name, config.path)
    for problem in report.problems():
        log.warning("%s: %s %s", key, config.path, problem)
    if report.missing_statistics:
        log.warning("%s: running statistics are missing, these layers normalize with mean 0 and variance 1: %s", key,
                    listed(report.missing_statistics, 3))  # fmt: skip
    return report


def _below_prefix(
    weights: dict[str, Tensor], name: str, key: str, config: InitConfig, own: Collection[str]
) -> dict[str, Tensor]:
    """The part of the file's weights below the prefix, which is removed from the keys."""

    def below(prefix: str) -> dict[str, Tensor]:
        return {k.removeprefix(prefix): value for k, value in weights.items() if k.startswith(prefix)}

    if config.prefix is None:  # the file holds a whole model or the sub-network alone: take what matches more keys
        return max(weights, below(f"{name}."), key=lambda state: len(state.keys() & set(own)))
    found = below(config.prefix if config.prefix.endswith(".") or not config.prefix else f"{config.prefix}.")
    if not found:
        heads = sorted({shown(k.split(".")[0]) + "." for k in weights})
        raise ConfigError(
            f"{key}.prefix: no key of {config.path} begins with {config.prefix!r}; they begin with {listed(heads, 3)}"
        )
    return found


class Drift:
    """Drift of running means of pretrained sub-networks since loading, in units of the loaded standard deviation.

    For each sub-network the maximum over layers and channels of |mean - loaded mean| / sqrt(loaded variance + eps);
    exactly 0 if the statistics are frozen.
    """

    def __init__(self) -> None:
        self._loaded: dict[str, dict[str, list[Tensor]]] = {}

    def remember(self, model: nn.Module, subnet: str) -> None:
        """Stores a copy of the sub-network's current running statistics as the loaded ones."""
        self._loaded[subnet] = {
            name: [layer.running_mean.clone(), layer.running_var.clone()]
            for name, layer in model.get_submodule(subnet).named_modules()
            if isinstance(layer, _BatchNorm) and layer.running_mean is not None and layer.running_var is not None
        }

    def measure(self, model: nn.Module) -> dict[str, float]:
        """Returns the metric `drift/<subnet>` for every sub-network that was loaded."""
        drifts = {}
        for subnet, layers in self._loaded.items():
            modules = dict(model.get_submodule(subnet).named_modules())
            moved = [
                ((_mean_of(modules[name]) - mean).abs() / (var + modules[name].eps).sqrt()).max()
                for name, (mean, var) in layers.items()
            ]
            # float() synchronizes with the device; `measure` is called at evaluation only.
            drifts[f"{DRIFT}/{subnet}"] = float(torch.stack(moved).max()) if moved else 0.0
        return drifts

    def state_dict(self) -> dict[str, Any]:
        """The loaded statistics, so that a resumed run measures from the same reference."""
        return self._loaded

    def load_state_dict(self, state_dict: dict[str, Any], /) -> None:
        """Restores the loaded statistics."""
        self._loaded = state_dict

    def require_layers(self, model: nn.Module) -> None:
        """Raises a ValueError if the statistics are not those of layers of the model."""
        layers = dict(model.named_modules())
        for subnet, loaded in self._loaded.items():
            for name, statistics in loaded.items():
                layer = layers.get(f"{subnet}.{name}" if subnet and name else subnet or name)
                mean = layer.running_mean if isinstance(layer, _BatchNorm) else None
                if mean is None or [value.shape for value in statistics] != [mean.shape] * 2:
                    raise ValueError(f"it has the statistics of {subnet}.{name}, which are none of the model")


def _mean_of(layer: nn.Module) -> Tensor:
    assert isinstance(layer, _BatchNorm)
    assert layer.running_mean is not None
    return layer.running_mean
