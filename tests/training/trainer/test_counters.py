"""When a checkpoint is due, and what counts as the best."""

import math

import pytest

from syncbn.training.config.duration import Duration
from syncbn.training.trainer import counters
from syncbn.training.trainer.counters import Counters, SaveClock, Throughput
from tests.training.checkpoint.test_resume import SMALL


def clock_of(text):
    return SaveClock(Duration.parse(text, allow_minutes=True), steps_per_epoch=10)


@pytest.mark.parametrize(("every", "due"), [("3", [3, 6, 9, 12]), ("0.5ep", [5, 10]), ("1ep", [10])])
def test_by_steps_or_epochs(every, due):
    clock = clock_of(every)
    assert [step for step in range(1, 13) if clock.is_due(step)] == due


def test_by_minutes_since_the_last_one(monkeypatch):
    now = [1000.0]
    monkeypatch.setattr(counters.time, "monotonic", lambda: now[0])
    clock = clock_of("10min")
    answers = []
    for minute in (9.9, 10.1, 12, 20.2, 20.3, 31):
        now[0] = 1000.0 + 60 * minute
        answers.append(clock.is_due(1))
    assert answers == [False, True, False, True, False, True]


@pytest.mark.slow
@pytest.mark.parametrize("num_ranks", [1, 2])
def test_a_job_saves_by_the_minute_where_its_ranks_have_clocks_of_their_own(job, num_ranks):
    often = job(*SMALL, "duration=6", "save.every=0.00001min", "save.keep=99", "run=often", num_ranks=num_ranks)
    assert len(list(often.glob("checkpoints/step_*.pt"))) == 6
    rarely = job(*SMALL, "duration=6", "save.every=10min", "run=rarely", num_ranks=num_ranks)
    assert len(list(rarely.glob("checkpoints/step_*.pt"))) == 1  # the last step's


def test_the_best_is_the_most_accurate_and_among_equals_the_one_of_least_loss():
    best = Counters()
    answers = [
        best.is_best(dict(zip(("accuracy", "loss"), result, strict=True)), "accuracy")
        for result in [(0.5, 1.0), (0.5, 0.9), (0.4, 0.1), (0.5, math.nan), (0.6, math.nan)]
    ]
    assert answers == [True, True, False, False, True]


@pytest.mark.parametrize("by", ["mae", "loss"])
def test_of_an_error_and_of_the_loss_the_lowest_is_the_best(by):
    best = Counters()
    answers = [best.is_best({by: value}, by, lowest=True) for value in (2.0, math.nan, 3.0, 1.0, -math.inf, -1.0)]
    assert answers == [True, False, False, True, False, True]


def test_the_macro_recall_of_the_best_is_noted_beside_the_highest():
    counts = Counters()
    for step, (accuracy, recall) in enumerate([(0.5, 0.5), (0.9, 0.4), (0.8, 0.7)], start=1):
        counts.step = step
        counts.is_best({"accuracy": accuracy, "loss": 1.0}, "accuracy")
        counts.note_recall(recall, ratio=5.0)
    assert counts.macro_recall == {"ratio": 5.0, "chosen": 0.4, "highest": 0.7, "step": 3}


def test_where_the_best_model_is_lost_the_highest_macro_recall_stays_noted():
    counts = Counters()
    counts.step = 7
    counts.is_best({"accuracy": 0.5, "loss": 1.0}, "accuracy")
    counts.note_recall(0.7, ratio=5.0)
    counts.forget_best()
    counts.step = 14
    assert counts.is_best({"accuracy": 0.4, "loss": 1.0}, "accuracy")
    counts.note_recall(0.6, ratio=5.0)
    assert counts.macro_recall == {"ratio": 5.0, "chosen": 0.6, "highest": 0.7, "step": 7}


def test_counters_of_version_0_1_0_have_no_macro_recall():
    stored = {name: value for name, value in Counters().state_dict().items() if name != "macro_recall"}
    counts = Counters()
    counts.load_state_dict({**stored, "step": 7})
    assert (counts.step, counts.macro_recall) == (7, {})


def test_time_that_a_batch_takes_to_come_is_time_waited_and_a_pause_is_no_time(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(counters.time, "perf_counter", lambda: now[0])

    def batches():
        for seconds in (3.0, 1.0):
            now[0] += seconds
            yield seconds

    clock = Throughput()
    for _ in clock.waiting(batches()):
        now[0] += 2.0  # a step
    with clock.paused():
        now[0] += 100.0
    clock.add(4)
    assert clock.overall() == 4 / 8.0
    clock.samples_per_second()
    assert clock.waited() == 4.0 / 8.0
    assert clock.overall() == 4 / 8.0
