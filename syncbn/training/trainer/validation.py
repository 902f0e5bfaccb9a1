"""Validation in the course of a run, which chooses the best weights, and the test of those at its end."""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import nn

from syncbn.report import file_names
from syncbn.report.metric_names import ACCURACY, LOSS, TEST, VAL, prefixed
from syncbn.training.checkpoint.files import read, write_atomically
from syncbn.training.checkpoint.state import Checkpoints, copied
from syncbn.training.config.errors import TrainingError
from syncbn.training.config.output import unwritable
from syncbn.training.data.loader import Loader
from syncbn.training.distributed import world
from syncbn.training.distributed.stopping import StopRequest
from syncbn.training.evaluation.evaluate import evaluate
from syncbn.training.evaluation.mistakes import Mistakes
from syncbn.training.evaluation.tallies import ClassBalance, Tally
from syncbn.training.losses.losses import ignored_label
from syncbn.training.trainer.build import RunComponents, build_model
from syncbn.training.trainer.counters import Counters
from syncbn.training.trainer.population import NoRunningStatisticsError, NotFiniteError, recalibrate

log = logging.getLogger(__name__)

UNEVEN = 3.0  # classes are uneven where the most frequent has so many times the samples of the rarest
MISLED = 0.1  # and accuracy misleads where it is so much above the macro recall
_BALANCE = "/balance"  # a name that no metric of the configuration can have


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
        self._balance: dict[str, Tally] = {}
        self._renewed: dict[str, float] = {}  # metrics of the best weights with the statistics of the population
        if components.config.best == "auto" and components.best.by == ACCURACY:
            assert components.data.num_classes is not None
            self._balance[_BALANCE] = ClassBalance(components.data.num_classes, ignored_label(components.loss))

    def validate(self) -> dict[str, float]:
        """`val/*` and `drift/*` after the present step; weights that beat all before are saved as the best."""
        step, components = self._counters.step, self._components
        values = self._evaluate(self._evaluated, components.data.val, self._balance)
        recall, ratio = values.pop(f"{_BALANCE}/recall", None), values.pop(f"{_BALANCE}/ratio", None)
        if not math.isfinite(loss := values[LOSS]):
            log.warning("step %d: the validation loss is %s; this model counts as no better than any", step, loss)
        self._counters.evaluated_step = step
        if self._counters.is_best(values, *components.best) and components.context.is_first:
            self._checkpoints.save_best(step, self._evaluated)
        if recall is not None and ratio is not None:
            self._counters.note_recall(recall, ratio)
        return prefixed(VAL, values) | components.drift.measure(components.model)

    def renew_statistics(self) -> None:
        """Gives averaged best weights the population statistics of the training set, in their file too (`bn.averaged`).

        Every rank calls it; the best checkpoint has to be written. What chose the weights is still what they had when
        they were chosen, so that a run that goes on chooses as if it had not ended here.

        Raises:
            TrainingError: on every rank: the file could not be written.
            StopAgreed: a stop was requested meanwhile; the file is as it was.
        """
        components, step = self._components, self._counters.best_step
        if self._evaluated is components.model or components.config.bn.averaged != "population":
            return
        config, model = components.config, self._best_model()
        if config.bn.virtual_ranks is not None:  # whose layers have statistics of many ranks; their keys are the same
            config = replace(config, bn=replace(config.bn, virtual_ranks=None))
            plain = build_model(config, components.data, components.context)
            plain.load_state_dict(model.state_dict())
            model = plain
        try:
            found = recalibrate(model, step, config, components.data, components.context, components.loss, self._loader,
                                plan=components.plan, stop=self._stop)  # fmt: skip
        except NoRunningStatisticsError:
            return
        except NotFiniteError as error:
            log.warning("%s: the averaged weights keep averaged statistics", error)
            return
        values = self._evaluate(model, components.data.val)
        self._write_best(model)
        self._renewed = values
        by = components.best.by
        log.info("averaged weights of step %d, statistics of the population (%s): %s/%s %.4f, was %.4f", step,
                 found.describe(), VAL, by, values[by], self._counters.best[by])  # fmt: skip

    def _write_best(self, model: nn.Module) -> None:
        """Writes the model into the best checkpoint, on rank 0; no rank goes on before."""
        path = self._checkpoints.directory / file_names.BEST
        failure = None
        if self._components.context.is_first:
            try:
                write_atomically(path, {**read(path, "run"), "model": copied(model.state_dict())})
            except OSError as error:
                failure = unwritable(error)
        failure = world.on_all_ranks(failure)[0]
        if failure is not None:
            raise TrainingError(f"the best checkpoint could not be written: {failure}; the same command goes on")

    def test(self) -> dict[str, float]:
        """`test/*` of the best weights, and `val/*` of the same; the best checkpoint has to be written.

        Without a test split, `val/*` alone: nothing has been tested.
        """
        self._warn_of_imbalance()
        drift = self._components.drift.measure(self._components.model)  # of the weights that training ended with
        tested: dict[str, float] = {}
        if self._components.data.test is not None:
            tested = prefixed(TEST, self._evaluate(self._best_model(), self._components.data.test))
        return {**prefixed(VAL, self._renewed or self._counters.best), **tested, **drift}

    def mistakes(self, num_examples: int) -> Mistakes:
        """What the best weights get wrong on the validation set, which is evaluated once more; see `Mistakes`."""
        found = Mistakes(self._components.data, self._components.loss, num_examples)
        if found.applies:
            self._evaluate(self._best_model(), self._components.data.val, mistakes=found)
        return found

    def _best_model(self) -> nn.Module:
        """A copy: a signal meanwhile has to find the state that training ended with."""
        model = copy.deepcopy(self._evaluated)
        model.load_state_dict(read(self._checkpoints.directory / file_names.BEST, "run")["model"])
        return model

    def _warn_of_imbalance(self) -> None:
        """Warns where `best=auto` has gone by accuracy, classes are uneven, and macro recall says something else."""
        noted, by_accuracy = self._counters.macro_recall, self._counters.best.get(ACCURACY)
        if by_accuracy is None or "chosen" not in noted or noted["ratio"] < UNEVEN:
            return
        chosen, highest = noted["chosen"], noted["highest"]
        if highest <= chosen and by_accuracy - chosen <= MISLED:
            return
        log.warning(
            "best=auto chose step %d by its accuracy of %.4f, but the most frequent class of the validation set has"
            " %.1f times as many as the rarest, and the recall averaged over classes is %.4f%s; metrics=macro_recall"
            " best=macro_recall chooses by that, loss.class_weights=balanced trains for it",
            self._counters.best_step, by_accuracy, noted["ratio"], chosen,
            f" (at step {noted['step']:.0f}: {highest:.4f})" if highest > chosen else "",
        )  # fmt: skip

    def _evaluate(
        self,
        model: nn.Module,
        split: Any,
        others: Mapping[str, Tally] | None = None,
        mistakes: Mistakes | None = None,
    ) -> dict[str, float]:
        components = self._components
        return evaluate(
            model, components.data, split, components.loss, components.context, self._stop,
            {**components.metrics, **(others or {})}, self._loader, mistakes,
        )  # fmt: skip
