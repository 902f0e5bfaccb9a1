"""The audit of a checkpoint alone: its batch normalization layers, told by their keys, and what is wrong with them."""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor

from syncbn.auditing.audit import of_values
from syncbn.auditing.rules import Finding, found, ordered

_STATISTICS = ("running_mean", "running_var")
_COUNTER = "num_batches_tracked"
# Without any buffer only the name tells a batch normalization from a layer or group normalization.
_NAMED_BN = re.compile(r"(^|[._])(sync_?)?(bn|batch_?norm)(\d+[a-z]?)?$", re.IGNORECASE)


def bn_layers(state: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """The batch normalization layers of a state dict, by name, each with its tensors.

    A layer is what has running statistics or a counter of batches, or only a weight and a bias of one dimension and a
    name that says so (`bn1`, `batch_norm`): a layer or group normalization looks the same but for its name.
    """
    tensors: dict[str, dict[str, Tensor]] = {}
    for key, tensor in state.items():
        name, _, kind = key.rpartition(".")
        tensors.setdefault(name, {})[kind] = tensor
    return {
        name: own for name, own in tensors.items() if own.keys() & {*_STATISTICS, _COUNTER} or _is_stripped(name, own)
    }


def audit_state_dict(state: Mapping[str, Tensor]) -> list[Finding]:
    """What can be told without the model; the rules, and their names, are those of `audit`.

    Args:
        state: of a model that has been trained, or is about to be loaded.
    """
    findings: list[Finding] = []
    for name, own in bn_layers(state).items():
        missing = [kind for kind in _STATISTICS if kind not in own]
        if _is_stripped(name, own):
            findings.append(found("no-running-statistics", name))
        elif missing:
            findings.append(found("missing-statistics", name, missing=" and ".join(missing)))
        mean, var, counter = (own.get(kind) for kind in (*_STATISTICS, _COUNTER))
        findings += of_values(name, mean, var, counter, rule_if_initial="never-updated")
    return ordered(findings)


def _is_stripped(name: str, own: Mapping[str, Tensor]) -> bool:
    """Whether a layer has the name and the parameters of a batch normalization, and nothing else."""
    parameters = [own[kind] for kind in ("weight", "bias") if kind in own]
    return (
        own.keys() == {"weight", "bias"}
        and all(parameter.dim() == 1 for parameter in parameters)
        and parameters[0].shape == parameters[1].shape
        and _NAMED_BN.search(name) is not None
    )
