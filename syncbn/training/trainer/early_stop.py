"""Early stopping: the end of a run whose validation has not improved for a while."""

from __future__ import annotations

from syncbn.surgery.freeze_plan import FreezePlan
from syncbn.training.config.duration import Duration
from syncbn.training.config.errors import ConfigError
from syncbn.training.config.schema import Config
from syncbn.training.trainer.counters import Counters


class EarlyStop:
    """Decides, at evaluations, whether training ends: when no validation of the last `early_stop` was the best.

    Counted from the later of the best step and the last freeze boundary of the plan: what is about to be thawed has not
    had its turn yet. A function of the counters, so that a resumed run decides alike.

    Raises:
        ConfigError: `early_stop` is shorter than `eval_every`.
    """

    def __init__(self, config: Config, plan: FreezePlan, steps_per_epoch: int) -> None:
        num_steps, eval_every = (
            max(1, Duration.parse(text).in_steps(steps_per_epoch)) for text in (config.duration, config.eval_every)
        )
        self._patience: int | None = None
        if config.early_stop is not None:
            self._patience = Duration.parse(config.early_stop).in_steps(steps_per_epoch)
            if self._patience < eval_every:
                raise ConfigError(
                    f"early_stop: expected eval_every={config.eval_every} ({eval_every} steps) or more, got"
                    f" {config.early_stop} ({self._patience} steps)"
                )
        self._last_boundary = max((step for step in plan.boundaries if step < num_steps), default=0)

    def is_due(self, counters: Counters) -> bool:
        """Whether training ends after the present step, which has been evaluated if so."""
        if self._patience is None or counters.evaluated_step != counters.step or counters.step == 0:
            return False
        return counters.step - max(counters.best_step, self._last_boundary) >= self._patience
