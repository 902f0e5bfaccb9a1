"""Detection of a `DistributedDataParallel` that wrapped the model before parameters were frozen or unfrozen.

DDP fixes the list of parameters that it reduces at construction. A parameter that is unfrozen later would silently
train on each rank's own gradient; with one that is frozen later, backward fails with an error about unfinished
reductions. So every `SyncBatchNorm` checks that the wrapper around its training forward is not stale: an integer
comparison, unless something was frozen or unfrozen since the last check. The check compares which parameters `freeze`
has frozen, not `requires_grad`, because switching that by hand (the discriminator of a GAN) is legitimate. A wrapped
model without a `SyncBatchNorm` is not checked.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from syncbn.nn import frozen
from syncbn.torch_compat import assume_constant_result, ddp_around, num_parameters_reduced_by

# Attributes of the wrapper: `frozen.num_changes()` at the last check, and the names of the parameters that were frozen
# at its first forward.
_SEEN, _FROZEN = "_syncbn_seen", "_syncbn_held"


def check_wrapper() -> None:
    """Raises on every rank, before any rank communicates, if the DDP wrapper around the running forward is stale.

    Raises:
        RuntimeError: with a parameter that has changed, or the numbers of parameters, and the remedy.
    """
    if not torch.compiler.is_dynamo_compiling():
        _check()
    elif _is_wrapped():
        _check_while_tracing(frozen.num_changes())


@assume_constant_result  # without a wrapper, no freeze anywhere has to cause a retrace
def _is_wrapped() -> bool:
    return ddp_around() is not None


@assume_constant_result  # runs at trace time; a new num_changes() causes a retrace
def _check_while_tracing(_: int) -> None:
    _check()


def _check() -> None:
    wrapper = ddp_around()
    if wrapper is None or wrapper.__dict__.get(_SEEN) == frozen.num_changes():
        return
    # Reentrant checkpointing disables gradients in a training forward, so that alone does not end the check.
    if not torch.is_grad_enabled() and not wrapper.training:
        return
    frozen_names = _frozen_names(wrapper.module)
    before = wrapper.__dict__.get(_FROZEN)
    if before is None:
        _check_count(wrapper, frozen_names)
        wrapper.__dict__[_FROZEN] = frozen_names
    elif before != frozen_names:
        name = min(before ^ frozen_names)
        _refuse(f"{name} has been {'frozen' if name in frozen_names else 'unfrozen'} since it wrapped the model")
    wrapper.__dict__[_SEEN] = frozen.num_changes()


def _frozen_names(model: nn.Module) -> set[str]:
    return {
        f"{prefix}.{name}" if prefix else name
        for prefix, module in model.named_modules()
        if frozen.has_frozen_parameters(module)
        for name in frozen.own_parameters(module)
    }


def _check_count(wrapper: DistributedDataParallel, frozen_names: set[str]) -> None:
    """Check at the first forward, by number: DDP reports how many parameters it reduces, not which."""
    reduced = num_parameters_reduced_by(wrapper)
    if reduced is None or frozen.num_changes() == 0:
        return
    candidates = {
        name: parameter
        for name, parameter in wrapper.module.named_parameters()
        if name not in wrapper.parameters_to_ignore
    }
    trained = sum(parameter.requires_grad for parameter in candidates.values())
    not_frozen = len(candidates.keys() - frozen_names)  # reduced, if requires_grad was cleared by hand since
    if reduced not in (trained, not_frozen):
        _refuse(f"{reduced} parameters were trained when it wrapped the model, {trained} are now")


def _refuse(reason: str) -> None:
    raise RuntimeError(
        f"this DistributedDataParallel is stale: {reason}; wrap again after freeze or unfreeze:"
        " model = DistributedDataParallel(model.module, ...)"
    )
