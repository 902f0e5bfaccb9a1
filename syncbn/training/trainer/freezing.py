"""The freeze plan in the course of a run: what changes at a step, told, recorded, and taken over by the optimizer."""

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
    """Brings the frozen switches of a model to a step, on all ranks alike.

    Args:
        forgets_momentum: a parameter that is unfrozen starts without the optimizer's state of before it was frozen.
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
        """Whether anything changed: the model has to be wrapped in DDP anew then."""
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
