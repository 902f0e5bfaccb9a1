"""Which steps run eagerly, which is captured, which are replayed; and what ends a run instead."""

import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from syncbn.training.config.errors import ConfigError, TrainingError
from syncbn.training.optim.step_numbers import StepNumbers
from syncbn.training.trainer.deferred import DeferredResults, wait_for
from syncbn.training.trainer.graph import GraphedSteps
from tests.recording import RecordingCapture

CPU = torch.device("cpu")
LABELS = torch.zeros(2, dtype=torch.int64)


class Steps:
    """Steps of 2 + 2 samples, which add up the pixels of their images; `ways` says how each was done."""

    def __init__(self, compute=None):
        self.capture = RecordingCapture()
        self.graphed = GraphedSteps(self.capture, [2, 2], CPU)
        self.ways, self.num_steps, self.num_calls, self._of_user = [], 0, 0, compute

    def compute(self, batches, sizes):
        self.num_calls += 1
        if self._of_user is not None:
            self._of_user()
        return torch.stack([images.sum() for images, _ in batches]).sum() * 1.0

    def do(self, sizes=(2, 2), *, is_watched=False, shape=(1,)):
        self.num_steps += 1
        batches = [(torch.full((size, *shape), float(self.num_steps)), LABELS[:size]) for size in sizes]
        calls, num_captured = self.num_calls, len(self.capture.recordings)
        result = self.graphed.run(self.num_steps, iter(batches), sizes, self.compute, is_watched=is_watched)
        assert float(result) == sum(sizes) * self.num_steps * torch.Size(shape).numel()
        if len(self.capture.recordings) > num_captured:
            self.ways.append("captured")
        else:
            self.ways.append("eager" if self.num_calls > calls else "replayed")
        return result


def test_the_first_regular_step_is_eager_the_second_captured_and_all_others_of_its_kind_replayed():
    steps = Steps()
    with steps.graphed:
        steps.do(is_watched=True), steps.do((2, 1))  # these do not count: they do other work
        for _ in range(4):
            steps.do()
        steps.do((2, 1)), steps.do((3,)), steps.do(is_watched=True), steps.do()
    assert steps.ways == ["eager"] * 3 + ["captured"] + ["replayed"] * 2 + ["eager"] * 3 + ["replayed"]


def test_after_a_change_a_step_is_captured_again():
    steps = Steps()
    with steps.graphed:
        for _ in range(3):
            steps.do()
        steps.graphed.forget()
        for _ in range(3):
            steps.do()
    assert steps.ways == ["eager", "captured", "replayed"] * 2
    assert [len(recording) for recording in steps.capture.recordings] == [0, 0]  # both are closed


def test_what_a_step_returned_outlives_the_next_one():
    steps = Steps()
    results = [steps.do() for _ in range(4)]
    assert [float(result) for result in results] == [4.0, 8.0, 12.0, 16.0]


def test_after_an_error_nothing_is_waited_for():
    steps = Steps()

    def train():
        with steps.graphed:
            steps.do(), steps.do()
            raise RuntimeError("hangs")

    with pytest.raises(RuntimeError, match="hangs"):
        train()
    assert len(steps.capture.recordings[0]) > 0


def test_images_of_another_size_are_an_error_that_says_what_to_do():
    steps = Steps()
    steps.do(), steps.do()
    with pytest.raises(TrainingError, match=r"^graph: step 3 has images of shape \(2, 5\) .* or set graph=false"):
        steps.do(shape=(5,))


def test_a_step_that_waits_for_the_device_is_an_error_that_says_what_to_do():
    steps = Steps(lambda: torch.ones(()).item())
    steps.do()
    with pytest.raises(ConfigError, match=r"^graph: step 2 cannot be captured: .* waits for the device.*graph=false"):
        steps.do()


def test_the_error_is_the_first_one_and_not_what_the_capture_says_of_it():
    steps = Steps()
    steps.do()

    def failing(step):
        try:
            raise ValueError("a copy to the host")
        finally:
            raise RuntimeError("the capture was invalidated")

    steps.graphed._capture = failing
    with pytest.raises(ConfigError, match=r"^graph: step 2 cannot be captured: a copy to the host; set graph=false"):
        steps.do()


@pytest.mark.parametrize(("draw", "name"), [(random.random, "random"), (np.random.rand, "numpy.random")])
def test_a_draw_on_the_host_is_an_error_that_says_what_to_do(draw, name):
    steps = Steps(draw)
    steps.do()
    with pytest.raises(ConfigError, match=f"^graph: .* draws random numbers by {name} on the host"):
        steps.do()


def test_numbers_of_a_step_are_written_to_the_same_memory_as_they_are():
    numbers = StepNumbers(2, CPU)
    memory_of_rates, memory_of_share, memory_of_asked = [*numbers.rates], numbers.share, numbers.asked_to_stop
    for rates, share, asked in (([0.1, 0.2], 0.5, False), ([0.3, 0.2], 1 / 3, True), ([0.0, 0.0], 0.0, False)):
        numbers.write(rates, share, asked)
        assert [rate.item() for rate in memory_of_rates] == rates  # float64
        assert torch.equal(memory_of_share, torch.tensor(share))
        assert bool(memory_of_asked) == asked


def test_a_device_that_does_not_come_to_the_end_of_a_step_is_an_error_of_the_step():
    stuck = SimpleNamespace(query=lambda: False)
    with pytest.raises(RuntimeError, match="Timed out after 0 s: the device has not finished step 7"):
        wait_for(stuck, 7, timeout=0.0)
    arrives = iter([False, False, True])
    wait_for(SimpleNamespace(query=lambda: next(arrives)), 7, timeout=60.0)
    assert next(arrives, None) is None


def test_without_a_timeout_the_driver_waits():
    waited = []
    wait_for(SimpleNamespace(synchronize=lambda: waited.append(True)), 7, timeout=None)
    assert waited == [True]


def test_all_steps_of_the_device_can_be_waited_for_without_reading_their_results():
    results = DeferredResults(CPU, lag=1, timeout=0.0)
    results.post(3, torch.ones(1))
    results.wait()
    results._waiting.append((4, torch.ones(1), SimpleNamespace(query=lambda: False)))
    with pytest.raises(RuntimeError, match="not finished step 4"):
        results.wait()
    assert results.take() == [(3, [1.0])]


def test_results_of_replayed_steps_are_read_as_others():
    results = DeferredResults(CPU, lag=1, timeout=60.0)
    steps = Steps()
    for number in range(4):
        results.post(number, steps.do().view(1))
    assert results.take(everything=True) == [(0, [4.0]), (1, [8.0]), (2, [12.0]), (3, [16.0])]
