"""Pretrained sub-networks: loading, a report of what was loaded, and the drift of their running statistics."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from syncbn.report.metric_names import DRIFT
from syncbn.training.checkpoint.contents import MalformedError, clipped, require_usable
from syncbn.training.checkpoint.weights import read_model_weights
from syncbn.training.config.errors import ConfigError, listed
from syncbn.training.config.model import InitConfig
from syncbn.training.models.state_names import WHOLE, Weights, nearest, renamed, skipped

log = logging.getLogger(__name__)

MOST_SKIPPED = 3  # modules that an error names; more are no head, but another network


@dataclass(frozen=True)
class LoadOutcome:
    """Outcome for every key of a file and of the sub-network it was loaded into; keys are relative to the sub-network.

    `loaded`: in both, in the same shape. `missing`: in the sub-network only, except batch counters. `unexpected`: in
    the file only. `mismatched`: in both, in different shapes. `skipped`: in either, and left out by `skip`.
    """

    loaded: list[str]
    missing: list[str]
    unexpected: list[str]
    mismatched: list[str]
    skipped: list[str]

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
        return [f"{kind} {listed([*map(clipped, keys)], 3)}" for kind, keys in kinds.items() if keys]


def subnet_of(model: nn.Module, name: str) -> nn.Module:
    """The sub-network that `init.NAME` means; `init.model` is the whole model.

    Raises:
        ConfigError: no such sub-network.
    """
    try:
        return model if name == WHOLE else model.get_submodule(name)
    except AttributeError:
        children = ", ".join(child for child, _ in model.named_children())
        raise ConfigError(
            f"init.{name}: the model has no sub-network {name!r}; its top-level ones are {children}; init.{WHOLE} is"
            " all of it"
        ) from None


def load_pretrained(model: nn.Module, init: Mapping[str, InitConfig]) -> None:
    """Loads what the configuration's `init` names, the whole model first; see `load_subnet`."""
    for name, config in sorted(init.items(), key=lambda item: item[0] != WHOLE):
        load_subnet(model, name, config)


def load_subnet(model: nn.Module, name: str, config: InitConfig) -> LoadOutcome:
    """Loads a pretrained state into the sub-network `name` of the model; `model` is all of it.

    Args:
        config: `path` is a checkpoint of this package, a run directory (its best checkpoint), or a state dict saved by
            torch or safetensors, in the file's entry `key`. `prefix` is the prefix of the sub-network's keys in it;
            None: `name.` or nothing, whichever matches more keys. `rename` exchanges prefixes of what is left, `skip`
            leaves tensors of the model as they are. With `strict` all other keys and shapes have to match; without,
            those that match are loaded.

    Raises:
        ConfigError: no such sub-network or file; with `strict`, a mismatch; no key that matches; a tensor that matches
            and cannot be used.
    """
    key = f"init.{name}"
    subnet = subnet_of(model, name)
    own = subnet.state_dict()
    weights = read_model_weights(Path(config.path), f"{key}.path", config.key)
    state = renamed(weights, name, config, own)
    report = _compare(state, own, skipped(state, own, name, config), f"{key}.path", config)
    if all(k.endswith("num_batches_tracked") for k in report.loaded):
        raise ConfigError(f"{key}.path: nothing in {config.path} fits {name}: it {'; it '.join(report.problems())}"
                          f"{nearest(state, own, name, config)}")  # fmt: skip
    if config.strict and report.problems():
        raise ConfigError(f"{key}.path: {_why_not(report, state, own, name, config)}")
    subnet.load_state_dict({**own, **{k: state[k] for k in report.loaded}})
    log.info("%s: %d of %d tensors loaded from %s%s", key, len(report.loaded), len(own), config.path,
             f", {len(report.skipped)} skipped: {listed(report.skipped, 3)}" if report.skipped else "")  # fmt: skip
    for problem in report.problems():
        log.warning("%s: %s %s", key, config.path, problem)
    if report.missing_statistics:
        log.warning("%s: running statistics are missing, these layers normalize with mean 0 and variance 1: %s", key,
                    listed(report.missing_statistics, 3))  # fmt: skip
    return report


def _compare(state: Weights, own: Weights, skip: Collection[str], key: str, config: InitConfig) -> LoadOutcome:
    """What of the state fits; a ConfigError if a tensor that would be loaded cannot be used."""
    names = [k for k in own if k not in skip]
    try:
        require_usable({k: state[k] for k in names if k in state}, complex_too=any(map(torch.is_complex, own.values())))
    except MalformedError as error:
        raise ConfigError(f"{key}: {config.path} {error}") from None
    return LoadOutcome(
        loaded=[k for k in names if k in state and own[k].shape == state[k].shape],
        # num_batches_tracked may be missing: old torch versions saved none, and torch's strict loading accepts that.
        missing=[k for k in names if k not in state and not k.endswith("num_batches_tracked")],
        unexpected=[k for k in state if k not in own and k not in skip],
        mismatched=[k for k in names if k in state and own[k].shape != state[k].shape],
        skipped=[k for k in (*own, *(k for k in state if k not in own)) if k in skip],
    )


def _why_not(report: LoadOutcome, state: Weights, own: Weights, name: str, config: InitConfig) -> str:
    """Why the state does not fit, with the remedy: to skip the modules where these are few, else `strict`."""
    modules = list(dict.fromkeys(
        clipped(k.rpartition(".")[0] or k) for k in (*report.mismatched, *report.missing, *report.unexpected)
    ))  # fmt: skip
    skip = f"init.{name}.skip={modules[0] if len(modules) == 1 else '[' + ','.join(modules) + ']'}"
    alone = not report.missing and not report.unexpected
    if alone and all(own[k].shape[1:] == state[k].shape[1:] != () or own[k].dim() == 1 for k in report.mismatched):
        first = report.mismatched[0]
        return (
            f"{config.path} has weights for other classes: {clipped(first)} is of {_length(state[first])},"
            f" expected {_length(own[first])}; {skip} loads the rest and leaves this as it was built"
        )
    why = f"{config.path} {'; it '.join(report.problems())}; expected the state of {name}"
    named = f"; {skip} leaves these out" if len(modules) <= MOST_SKIPPED else ""
    return f"{why}{named}, or set init.{name}.strict=false to load what fits"


def _length(tensor: Tensor) -> int:
    return tensor.shape[0] if tensor.dim() else 1


class Drift:
    """Drift of running means of pretrained sub-networks since loading, in units of the loaded standard deviation.

    For each sub-network the maximum over layers and channels of |mean - loaded mean| / sqrt(loaded variance + eps);
    exactly 0 if the statistics are frozen.
    """

    def __init__(self) -> None:
        self._loaded: dict[str, dict[str, list[Tensor]]] = {}

    def remember(self, model: nn.Module, subnet: str) -> None:
        """Stores a copy of the sub-network's current running statistics as the loaded ones."""
        # The whole model has the name "" that torch gives it: a network of 0.1.0 may have a child of the name "model".
        self._loaded["" if subnet == WHOLE else subnet] = {
            name: [layer.running_mean.clone(), layer.running_var.clone()]
            for name, layer in subnet_of(model, subnet).named_modules()
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
            drifts[f"{DRIFT}/{subnet or WHOLE}"] = float(torch.stack(moved).max()) if moved else 0.0
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
