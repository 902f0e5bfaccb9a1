"""Noticing a `DistributedDataParallel` that wrapped the model before parameters were frozen or unfrozen.

DDP fixes the list of parameters that it reduces when it wraps. Unfrozen later, a parameter would train on each rank's
own gradient without a word; frozen later, backward ends in an error about unfinished reductions. So every layer of ours
looks, in a forward that will need gradients, whether the wrapper around it still fits: an integer comparison, unless
something was frozen or unfrozen since it last looked.
"""

from __future__ import annotations

import torch
from torch.nn.parallel import DistributedDataParallel

from syncbn.nn import holding

_SEEN, _PARAMETERS = "_syncbn_seen", "_syncbn_parameters"  # on the wrapper: number of changes, what it reduces


def check_wrapper() -> None:
    """Raises on every rank, before any of them communicates, if the DDP around the present forward is stale.

    Raises:
        RuntimeError: the message names a parameter that has changed, and the remedy.
    """
    wrapper = DistributedDataParallel._active_ddp_module
    if wrapper is None or wrapper.__dict__.get(_SEEN) == holding.num_changes() or not torch.is_grad_enabled():
        return
    trained = {name for name, parameter in wrapper.module.named_parameters() if parameter.requires_grad}
    reduced = wrapper.__dict__.get(_PARAMETERS)
    if reduced is None:  # the first forward: DDP tells how many it reduces, not which
        num_reduced = wrapper._get_ddp_logging_data().get("num_parameter_tensors", len(trained))
        if num_reduced != len(trained):
            _refuse(f"{num_reduced} parameters were trained when it wrapped the model, {len(trained)} are now")
        wrapper.__dict__[_PARAMETERS] = trained
    elif reduced != trained:
        name = min(reduced ^ trained)
        _refuse(f"{name} has been {'unfrozen' if name in trained else 'frozen'} since it wrapped the model")
    wrapper.__dict__[_SEEN] = holding.num_changes()


def _refuse(reason: str) -> None:
    raise RuntimeError(
        f"this DistributedDataParallel is stale: {reason}; wrap again after freeze or unfreeze:"
        " model = DistributedDataParallel(model.module, ...)"
    )
