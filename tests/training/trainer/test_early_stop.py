"""Early stopping is decided at evaluations, from the best step and from what the freeze plan still has to do."""

from types import SimpleNamespace

import pytest

from syncbn import FreezePlan
from syncbn.surgery.freeze_plan import FreezeRule
from syncbn.training.config.errors import ConfigError
from syncbn.training.trainer.counters import Counters
from syncbn.training.trainer.early_stop import EarlyStop


def stops_at(early_stop, *, best_step=0, plan=None, eval_every="2", duration="10ep"):
    """The first evaluated step at which training ends, in a run whose best step is given; None for the last one."""
    config = SimpleNamespace(duration=duration, eval_every=eval_every, early_stop=early_stop)
    stop, counters = EarlyStop(config, FreezePlan(plan or {}), steps_per_epoch=10), Counters()
    counters.best_step = best_step
    for counters.step in range(100):
        assert not stop.is_due(counters)  # no evaluation, no decision
        if counters.step % int(eval_every) == 0 and counters.step >= best_step:
            counters.evaluated_step = counters.step
            if stop.is_due(counters):
                return counters.step
    return None


@pytest.mark.parametrize(("early_stop", "best_step", "expected"),
                         [("6", 4, 10), ("5", 4, 10), ("1ep", 4, 14), ("2", 0, 2), (None, 4, None)])  # fmt: skip
def test_training_ends_at_the_first_evaluation_that_is_late_enough(early_stop, best_step, expected):
    assert stops_at(early_stop, best_step=best_step) == expected


@pytest.mark.parametrize(("until", "expected"), [(30, 36), (3, 10), (100, 10)])
def test_what_the_plan_has_yet_to_thaw_has_its_turn_first(until, expected):
    # One at the end of the run, or after it, changes nothing any more.
    assert stops_at("6", best_step=4, plan={"a": FreezeRule("x", until=until)}) == expected


def test_less_than_the_time_between_evaluations_is_an_error():
    with pytest.raises(ConfigError, match=r"^early_stop: expected eval_every=20 \(20 steps\) or more, got 1ep"):
        stops_at("1ep", eval_every="20")
