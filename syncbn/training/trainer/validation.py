"""Validation in the course of a run, which chooses the best weights, and the test of those at its end."""

from __future__ import annotations

import copy
import logging
import math
from typing import Any

from torch import nn

from syncbn.report.metric_names import TEST, VAL, prefixed
from syncbn.training.checkpoint.files import BEST, read
from syncbn.training.checkpoint.state import Checkpoints
from syncbn.training.data.loader import Loader
from syncbn.training.distributed.stopping import StopRequest
from syncbn.training.evaluation.evaluate import evaluate
from syncbn.training.trainer.build import RunComponents
from syncbn.training.trainer.counters import Counters

log = logging.getLogger(__name__)


class Validation:
    """Evaluates a run's model; every rank calls it, and rank 0 keeps the best.

    Args:
        evaluated: the model that is evaluated: the one that is trained, or its average.
        stop: a request to stop interrupts an evaluation (`StopAgreed`).
    """

    def __init__(
        self,
        components: RunComponents,
        evaluated: nn.Module,
        loader: Loader,
        counters: Counters,
        checkpoints: Checkpoints,
        stop: StopRequest,
    ) -> None:
        self._components, self._evaluated, self._loader, self._stop = components, evaluated, loader, stop
        self._counters, self._checkpoints = counters, checkpoints

    def validate(self) -> dict[str, float]:
        """`val/*` and `drift/*` after the present step; weights that beat all before are saved as the best."""
        step, components = self._counters.step, self._components
        values = self._evaluate(self._evaluated, components.data.val)
        if not math.isfinite(loss := values["loss"]):
            log.warning("step %d: the validation loss is %s; this model counts as no better than any", step, loss)
        self._counters.evaluated_step = step
        if self._counters.is_best(values, *components.best) and components.context.is_first:
            self._checkpoints.save_best(step, self._evaluated)
        return prefixed(VAL, values) | components.drift.measure(components.model)

    def test(self) -> dict[str, float]:
        """`test/*` of the best weights, and the `val/*` that they had; the best checkpoint has to be written.

        Without a test split, `val/*` alone: nothing has been tested.
        """
        drift = self._components.drift.measure(self._components.model)  # of the weights that training ended with
        tested: dict[str, float] = {}
        if self._components.data.test is not None:
            # A copy: a signal during the test has to find the state that training ended with.
            model = copy.deepcopy(self._evaluated)
            model.load_state_dict(read(self._checkpoints.directory / BEST, "run")["model"])
            tested = prefixed(TEST, self._evaluate(model, self._components.data.test))
        return {**prefixed(VAL, self._counters.best), **tested, **drift}

    def _evaluate(self, model: nn.Module, split: Any) -> dict[str, float]:
        components = self._components
        return evaluate(
            model, components.data, split, components.loss, components.context, self._stop, components.metrics,
            self._loader,
        )  # fmt: skip
