"""Noticing a `DistributedDataParallel` that wrapped the model before parameters were frozen or unfrozen.

DDP fixes the list of parameters that it reduces when it wraps. Unfrozen later, a parameter would train on each rank's
own gradient without a word; frozen later, backward ends in an error about unfinished reductions. So every layer of ours
looks whether the wrapper around a training forward still fits: an integer comparison, unless something was frozen or
unfrozen since it last looked. What is compared is what `freeze` holds, not `requires_grad`: a GAN that switches its
discriminator off and on by hand is nobody's mistake. A wrapped model without any layer of ours is not looked at.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from syncbn.nn import frozen
from syncbn.torch_compat import ddp_around, num_parameters_reduced_by

# On the wrapper: how often anything had been frozen or unfrozen when it was last looked at, and what was frozen at its
# first forward.
_SEEN, _HELD = "_syncbn_seen", "_syncbn_held"


def check_wrapper() -> None:
    """Raises on every rank, before any of them communicates, if the DDP around the present forward is stale.

    Raises:
        RuntimeError: the message names a parameter that has changed, and the remedy.
    """
    if not torch.compiler.is_dynamo_compiling():
        _check()
    elif _is_wrapped():
        _check_while_tracing(frozen.num_changes())


@torch.compiler.assume_constant_result  # without a wrapper no freeze anywhere needs another graph
def _is_wrapped() -> bool:
    return ddp_around() is not None


@torch.compiler.assume_constant_result  # runs when a graph is made; a change since then makes another graph
def _check_while_tracing(_: int) -> None:
    _check()


def _check() -> None:
    wrapper = ddp_around()
    if wrapper is None or wrapper.__dict__.get(_SEEN) == frozen.num_changes():
        return
    # Under reentrant checkpointing gradients are off in a forward that is trained all the same.
    if not torch.is_grad_enabled() and not wrapper.training:
        return
    held = _held_names(wrapper.module)
    before = wrapper.__dict__.get(_HELD)
    if before is None:
        _check_count(wrapper, held)
        wrapper.__dict__[_HELD] = held
    elif before != held:
        name = min(before ^ held)
        _refuse(f"{name} has been {'frozen' if name in held else 'unfrozen'} since it wrapped the model")
    wrapper.__dict__[_SEEN] = frozen.num_changes()


def _held_names(model: nn.Module) -> set[str]:
    return {
        f"{prefix}.{name}" if prefix else name
        for prefix, module in model.named_modules()
        if frozen.has_frozen_parameters(module)
        for name in frozen.own_parameters(module)
    }


def _check_count(wrapper: DistributedDataParallel, held: set[str]) -> None:
    """The first forward: DDP tells how many parameters it reduces, not which."""
    reduced = num_parameters_reduced_by(wrapper)
    if reduced is None or frozen.num_changes() == 0:
        return
    candidates = {
        name: parameter
        for name, parameter in wrapper.module.named_parameters()
        if name not in wrapper.parameters_to_ignore
    }
    trained = sum(parameter.requires_grad for parameter in candidates.values())
    if reduced not in (trained, len(candidates.keys() - held)):  # the latter: some switched off by hand since
        _refuse(f"{reduced} parameters were trained when it wrapped the model, {trained} are now")


def _refuse(reason: str) -> None:
    raise RuntimeError(
        f"this DistributedDataParallel is stale: {reason}; wrap again after freeze or unfreeze:"
        " model = DistributedDataParallel(model.module, ...)"
    )
