"""Applies the freeze plan during a run: changes are logged, recorded, and passed on to the optimizer's state."""

from __future__ import annotations

import logging

import torch
from torch import nn

from syncbn.report.metric_names import of_switch
from syncbn.surgery.freeze_plan import FreezePlan
from syncbn.training.config.errors import listed
from syncbn.training.tracking.tracker import Tracker

log = logging.getLogger(__name__)


class Freezing:
    """Freezes and unfreezes modules of a model as the plan says for a step, in the same way on every rank.

    Args:
        forgets_momentum: whether the optimizer's state of a parameter is deleted when it is unfrozen.
    """

    def __init__(
        self,
        plan: FreezePlan,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        tracker: Tracker,
        *,
        forgets_momentum: bool,
    ) -> None:
        self._plan, self._model, self._optimizer, self._tracker = plan, model, optimizer, tracker
        self._forgets_momentum = forgets_momentum

    def apply(self, step: int) -> bool:
        """Applies the plan at this step; returns whether anything changed, which requires a new DDP wrapper."""
        changes = self._plan.apply(self._model, step)
        for frozen in (True, False):
            modules = list(dict.fromkeys(change.module for change in changes if change.frozen == frozen))
            if modules:
                verb = "froze" if frozen else "unfroze"
                log.info("step %d: %s %s", step, verb, listed(modules, 3))
        if self._forgets_momentum:
            for change in changes:
                for parameter in self._model.get_submodule(change.module).parameters(recurse=False):
                    if not change.frozen and change.switch != "stats":
                        self._optimizer.state.pop(parameter, None)
        if changes:
            self._tracker.log(step, {of_switch(one.module, one.switch): float(one.frozen) for one in changes})
        return bool(changes)
