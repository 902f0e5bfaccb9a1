"""Audit of a state dict without its model: batch normalization layers are recognized by their keys."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from syncbn.auditing.rules import Finding, new_finding, ordered
from syncbn.auditing.statistics import of_running_statistics

_STATISTICS = ("running_mean", "running_var")
_COUNTER = "num_batches_tracked"
# Without any buffer, only the name distinguishes a batch normalization from a layer or group normalization.
_NAMED_BN = re.compile(r"(^|[._])(sync_?)?(bn|batch_?norm)(\d+[a-z]?)?$", re.IGNORECASE)


def bn_layers(state: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """The batch normalization layers of a state dict, by name, each with its tensors.

    A module counts as one if it has running statistics or a batch counter. One with nothing but a one-dimensional
    weight and bias counts only if it is named like one (`bn1`, `batch_norm`): a layer or group normalization has the
    same keys.
    """
    tensors: dict[str, dict[str, Tensor]] = {}
    for key, tensor in state.items():
        name, _, kind = key.rpartition(".")
        tensors.setdefault(name, {})[kind] = tensor
    return {
        name: own for name, own in tensors.items() if own.keys() & {*_STATISTICS, _COUNTER} or _is_stripped(name, own)
    }


def audit_state_dict(state: Mapping[str, Tensor]) -> list[Finding]:
    """The findings that a state dict shows without its model; the rules are those of `audit`.

    Args:
        state: state dict of a model that has been trained or is about to be loaded: initial running statistics are a
            finding.
    """
    findings: list[Finding] = []
    for name, own in bn_layers(state).items():
        missing = [kind for kind in _STATISTICS if kind not in own]
        if _is_stripped(name, own):
            findings.append(new_finding("no-running-statistics", name))
        elif missing:
            findings.append(new_finding("missing-statistics", name, missing=" and ".join(missing)))
        mean, var, counter = (_as_numbers(own.get(kind)) for kind in (*_STATISTICS, _COUNTER))
        findings += of_running_statistics(name, mean, var, counter, rule_if_initial="never-updated")
    return ordered(findings)


def statistics_of(layers: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Running statistics and counters of the layers by their keys in the state dict: all that the rules look at."""
    return {
        f"{name}.{kind}" if name else kind: own[kind]
        for name, own in layers.items()
        for kind in (*_STATISTICS, _COUNTER)
        if kind in own
    }


def misshapen(layers: Mapping[str, Mapping[str, Tensor]]) -> str | None:
    """The first layer whose statistics are not one number per channel and one counter, in words; None without one."""
    for name, own in layers.items():
        shapes = {kind: tuple(own[kind].shape) for kind in _STATISTICS if kind in own}
        counter = own.get(_COUNTER)
        if len(set(shapes.values())) > 1 or any(len(shape) != 1 for shape in shapes.values()):
            found = " and ".join(f"{kind} of shape {shape}" for kind, shape in shapes.items())
            return f"{found}, expected a number per channel, in {name or 'the model'}"
        if counter is not None and counter.numel() != 1:
            return f"{counter.numel()} batch counters, expected one, in {name or 'the model'}"
    return None


def _as_numbers(tensor: Tensor | None) -> Tensor | None:
    """The values in float64, because torch has few operators for the 8 bit types."""
    return None if tensor is None or tensor.is_meta else tensor.to(torch.float64)


def _is_stripped(name: str, own: Mapping[str, Tensor]) -> bool:
    """Whether a layer has the name and the parameters of a batch normalization, and nothing else."""
    parameters = [own[kind] for kind in ("weight", "bias") if kind in own]
    return (
        own.keys() == {"weight", "bias"}
        and all(parameter.dim() == 1 and not parameter.is_nested for parameter in parameters)
        and parameters[0].shape == parameters[1].shape
        and _NAMED_BN.search(name) is not None
    )
