"""Fusing the activation that a subclass applies in a forward of its own, such as timm's `BatchNormAct2d`.

Such a forward branches on the mode and counts batches, so it cannot be traced. Instead it is run, in both modes, on
stand-ins for the normalization and for the layer's children: that tells what the activation gets and whether its output
is that of the layer. The activation is then exchanged for an `nn.Identity`, and the normalization performs it.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from syncbn.nn.bytecode import names_in
from syncbn.nn.subclasses import SyncSubclass
from syncbn.surgery.fusion_sites import has_hooks, kind_of
from syncbn.surgery.fusion_tracing import UNSTEADY
from syncbn.torch_compat import is_written

# An input's further dimensions, one of which the layer's class accepts.
_SIZES = ((2, 2), (2,), (2, 2, 2), ())
# What a forward may read of its layer: the state that every batch normalization has, which evaluation and training of
# the fused layer go by, too.
_STATE = {*nn.BatchNorm1d(1).__dict__, "_original_class", "process_group"}


def has_own_forward(layer: nn.Module) -> bool:
    """Whether a layer was converted from a subclass of torch's classes that has a forward of its own."""
    return getattr(type(layer), "_original_forward", None) is not None


def fuse_own_activation(layer: SyncSubclass, is_changed_in_place: bool) -> str:
    """Moves the activation that a layer's own forward applies into its normalization; returns the activation's name.

    Args:
        is_changed_in_place: whether the layer's output is changed in place, or may be.

    Raises:
        ValueError: there is no such activation, or it cannot be moved; the message says why, and nothing has changed.
    """
    reason = f"is a {type(layer).__name__}, which has a forward of its own"
    name, activation = _activation_of(layer, reason)
    kind = kind_of(activation)
    if kind == "leaky_relu" and is_changed_in_place:
        raise ValueError(f"{reason}, and its output may be changed in place, which backward would go by")
    _check_code(layer, reason)
    for training in (True, False):
        _check_forward(layer, name, training, reason)
    layer.__dict__.update(_fused_activation=kind, _fused_activations={name: activation})
    layer._modules[name] = nn.Identity()
    return str(kind)


def _activation_of(layer: SyncSubclass, reason: str) -> tuple[str, nn.Module]:
    """The layer's activation and its name; the layer's other children must not change anything."""
    found = {name: child for name, child in layer._modules.items() if child is not None}
    found = {name: child for name, child in found.items() if type(child) is not nn.Identity}
    if not found:
        raise ValueError(f"{reason}, and no activation among its children")
    if any(kind_of(child) is None for child in found.values()) or len(found) > 1:
        kinds = ", ".join(f"{name} ({type(child).__name__})" for name, child in found.items())
        raise ValueError(f"{reason}, with children that cannot be fused: {kinds}")
    name, activation = found.popitem()
    if has_hooks(activation):
        raise ValueError(f"{reason}, and its activation {name} has hooks")
    return name, activation


def _check_code(layer: SyncSubclass, reason: str) -> None:
    """Raises if one run of the forward does not tell how it will run the next time."""
    forward: Any = type(layer)._original_forward
    parameters = [*inspect.signature(forward).parameters.values()][1:]
    if len(parameters) != 1 or parameters[0].default is not inspect.Parameter.empty:
        raise ValueError(f"{reason}, with optional arguments")
    names = names_in(inspect.unwrap(forward).__code__)
    if names & UNSTEADY:
        raise ValueError(f"{reason}, which calls {min(names & UNSTEADY)}")
    own = names & (layer.__dict__.keys() - _STATE)
    if own:
        raise ValueError(f"{reason}, which reads self.{min(own)}")


def _check_forward(layer: SyncSubclass, name: str, training: bool, reason: str) -> None:
    """Raises unless the activation gets what the normalization returns, and the forward what the activation returns."""
    steps: list[Tensor] = []
    with _stand_ins(layer, steps, name, training), torch.random.fork_rng(devices=[]), torch.no_grad():
        output = _run(layer, steps)
    if output is None:
        raise ValueError(f"{reason}, which could not be run")
    is_straight = len(steps) == 3 and steps[0] is steps[1] and steps[2] is output
    if not is_straight or any(map(is_written, steps)):
        raise ValueError(f"{reason}, which does more than to normalize and apply {name}")


def _run(layer: SyncSubclass, steps: list[Tensor]) -> Any:
    """The output for a small input of a shape that the layer accepts; None if it accepts none."""
    vector = layer.running_mean if layer.running_mean is not None else layer.weight
    like = torch.zeros(0) if vector is None else vector
    for size in _SIZES:
        steps.clear()
        input = torch.zeros(2, layer.__dict__["num_features"], *size, dtype=like.dtype, device=like.device)
        try:
            return layer.forward(input)
        except Exception:  # of another number of dimensions, or whatever else the forward of a stranger raises
            continue
    return None


class _StandIn(nn.Module):
    """Appends its input, and an output that is another tensor, to `steps`."""

    def __init__(self, steps: list[Tensor]) -> None:
        super().__init__()
        self.steps = steps

    def forward(self, input: Tensor) -> Tensor:
        self.steps += [input, input.clone()]
        return self.steps[-1]


@contextmanager
def _stand_ins(layer: SyncSubclass, steps: list[Tensor], name: str, training: bool) -> Iterator[None]:
    """Inside of the context the normalization appends its output to `steps`, the activation its input and output."""

    def normalize(input: Tensor, *_: Any) -> Tensor:
        layer.__dict__["_num_normalized"] += 1
        steps.append(input.clone())
        return steps[-1]

    state, children, buffers = dict(layer.__dict__), dict(layer._modules), dict(layer._buffers)
    layer.__dict__.update(training=training, _normalize_with=normalize)
    layer._modules[name] = _StandIn(steps)
    layer._buffers.update({key: None if buffer is None else buffer.clone() for key, buffer in buffers.items()})
    try:
        yield
    finally:
        layer.__dict__.clear()
        layer.__dict__.update(state)
        layer._modules.update(children)
        layer._buffers.update(buffers)
