"""A loss that is not finite: noticed, named, and without a trace in what is saved."""

import functools
import json
import logging
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from syncbn.training.data.images import ImageData
from syncbn.training.data.sampler import Sampler
from syncbn.training.losses.losses import CrossEntropy
from syncbn.training.trainer.deferred import DeferredResults
from syncbn.training.trainer.faults import NonFiniteError
from tests.training.checkpoint.test_resume import SMALL
from tests.training.jobs import read_metrics, run_rank

JOB = [*SMALL, "duration=9", "log_every=1", "eval_every=4", "save.every=1", "save.keep=99", "ema=0.9", "run=a"]
WORLDS = [pytest.param(1, marks=pytest.mark.slow), 2]


def run_poisoned(cwd, overrides, sample, lag=None):
    """The job with NaN in the pixels of one training sample."""
    original = ImageData.train_batch

    def poisoned(self, index, *rest):
        images, labels = original(self, index, *rest)
        return torch.where((index == sample)[:, None, None, None], torch.nan, images), labels

    reports = functools.partial(DeferredResults, lag=lag)
    with (
        mock.patch.object(ImageData, "train_batch", poisoned),
        mock.patch("syncbn.training.trainer.trainer.DeferredResults", reports),
    ):
        return run_rank(cwd, overrides)


def run_raising(cwd, overrides, sample, lag=None):
    """The message of the error that the poisoned job ends with."""
    try:
        run_poisoned(cwd, overrides, sample, lag)
    except NonFiniteError as error:
        return str(error)
    raise AssertionError("no error")


def checkpoint(run, step):
    return torch.load(run / f"checkpoints/step_{step:08d}.pt", weights_only=True)


def check_equal(one, other, *parts):
    for part in parts:
        torch.testing.assert_close(one[part], other[part], rtol=0, atol=0)


@pytest.fixture
def poisoned(ranks, tmp_path):
    def run(*overrides, num_ranks, sample, run=run_poisoned, lag=None):
        if num_ranks == 1:
            return run(tmp_path, overrides, sample, lag)
        return ranks(num_ranks, run, tmp_path, overrides, sample, lag)[0]

    return run


@pytest.fixture
def clean(job):
    return functools.partial(job, *JOB[:-1], "run=clean")


def step_that_sees(sample):
    """The first step of the job that a training sample is part of."""
    sampler = Sampler(104, 16, 1, 0, 0, 1)
    return next(step for step in range(7) if sample in sampler.samples(step, 0))


SAMPLE = next(sample for sample in range(104) if step_that_sees(sample) == 5)


@pytest.mark.parametrize("num_ranks", WORLDS)
def test_skip_leaves_the_step_out_bit_for_bit_and_goes_on(poisoned, num_ranks, caplog):
    with caplog.at_level(logging.WARNING):
        run = poisoned(*JOB, "on_nonfinite=skip", num_ranks=num_ranks, sample=SAMPLE)
    before, after, end = (checkpoint(run, step) for step in (5, 6, 9))
    check_equal(after, before, "model", "average")
    check_equal(after["optimizer"], before["optimizer"], "state")
    assert after["step"] == 6
    assert not torch.equal(end["model"]["head.weight"], after["model"]["head.weight"])
    assert int(end["model"]["backbone.stem.bn.num_batches_tracked"]) == 8
    records = read_metrics(run)
    assert [r["train/steps_left_out"] for r in records if "train/steps_left_out" in r] == [1, 1, 1, 1]
    assert [r["step"] for r in records if "train/loss" in r] == [1, 2, 3, 4, 5, 7, 8, 9]  # step 6 has none to tell
    if num_ranks == 1:
        assert f"step 5: the loss is not finite; training samples with pixels that are not: {SAMPLE};" in caplog.text


@pytest.mark.parametrize("num_ranks", WORLDS)
@pytest.mark.parametrize("lag", [pytest.param(0, marks=pytest.mark.slow), pytest.param(1, marks=pytest.mark.slow), 3])
def test_raise_names_step_and_samples_and_keeps_the_state_before_it(poisoned, clean, num_ranks, lag):
    # A lag is what a GPU brings: the fault is noticed steps later, and the steps in between must not count.
    overrides = [*JOB, "log_every=50", "save.every=5", "eval_every=50"]
    message = poisoned(*overrides, num_ranks=num_ranks, sample=SAMPLE, run=run_raising, lag=lag)
    assert message.startswith(f"step 5: the loss is not finite; training samples with pixels that are not: {SAMPLE}; ")
    undisturbed = clean(num_ranks=num_ranks)
    run = undisturbed.parent / "a"
    ours, theirs = checkpoint(run, 5), checkpoint(undisturbed, 5)
    check_equal(ours, theirs, "model", "average")
    check_equal(ours["optimizer"], theirs["optimizer"], "state", "param_groups")
    assert ours["schedule"]["last_epoch"] == theirs["schedule"]["last_epoch"] == 5
    assert ours["counters"]["step"] == 5


def test_after_raise_the_run_can_go_on_without_the_step(poisoned):
    poisoned(*JOB, num_ranks=1, sample=SAMPLE, run=run_raising)
    run = poisoned(*JOB, "on_nonfinite=skip", num_ranks=1, sample=SAMPLE)
    steps = [record["step"] for record in read_metrics(run) if "train/lr" in record]
    assert steps == list(range(1, 10))
    assert checkpoint(run, 9)["counters"]["steps_left_out"] == 1


@pytest.mark.parametrize("num_ranks", WORLDS)
def test_stop_ends_the_run_with_what_there_is(poisoned, num_ranks):
    run = poisoned(*JOB, "eval_every=50", "on_nonfinite=stop", num_ranks=num_ranks, sample=SAMPLE)
    summary = json.loads((run / "summary.json").read_text())
    assert (summary["step"], summary["stopped"]) == (5, True)
    assert 0 <= summary["metrics"]["test/accuracy"] <= 1
    assert all(value.isfinite().all() for value in checkpoint(run, 5)["model"].values())


def test_a_run_that_was_stopped_says_what_it_said_unless_it_may_go_on(poisoned):
    stop = [*JOB, "on_nonfinite=stop"]
    run = poisoned(*stop, num_ranks=1, sample=SAMPLE)
    before = read_metrics(run)
    with mock.patch("syncbn.training.trainer.trainer.Trainer.run", side_effect=AssertionError):
        poisoned(*stop, num_ranks=1, sample=SAMPLE)
    assert read_metrics(run) == before
    poisoned(*JOB, "on_nonfinite=skip", num_ranks=1, sample=SAMPLE)
    assert checkpoint(run, 9)["step"] == 9


def test_a_gradient_alone_that_is_not_finite_names_every_rank_s_samples(tmp_path):
    # A loss of 0 whose gradient is 0/0: sqrt at 0.
    def loss(self, outputs, targets):
        return torch.sqrt((outputs * 0).sum()), torch.tensor(float(len(targets)))

    with mock.patch.object(CrossEntropy, "__call__", loss), pytest.raises(NonFiniteError) as error:
        run_rank(tmp_path, tuple(JOB))
    samples, run = Sampler(104, 16, 1, 0, 0, 1).samples(0, 0).tolist(), tmp_path / "outputs/a"
    assert str(error.value) == (
        "step 0: the gradient is not finite; training samples of rank 0:"
        f" {', '.join(map(str, samples[:10]))} and 6 more (all are in outputs/a/nonfinite.jsonl);"
        " learning rate 0.0125. The state before the step is saved,"
        " outputs/a/checkpoints/step_00000000.pt: the same command with run=a on_nonfinite=skip goes on from"
        " there without it; a lower optimizer.lr, or clip_norm=1 (there is none now), needs a run from the beginning"
    )
    [line] = (run / "nonfinite.jsonl").read_text().splitlines()
    assert json.loads(line)["samples_by_rank"] == {"0": samples}
    assert (run / "checkpoints/step_00000000.pt").exists()


@pytest.mark.parametrize("precision", [pytest.param("bf16", marks=pytest.mark.slow), "fp16"])
@pytest.mark.parametrize("num_ranks", WORLDS)
def test_narrow_types_train_with_wide_weights_and_statistics(job, precision, num_ranks):
    run = job(*SMALL, "duration=3ep", f"precision={precision}", "run=a", num_ranks=num_ranks)
    state = torch.load(sorted((run / "checkpoints").glob("step_*.pt"))[-1], weights_only=True)
    assert {value.dtype for key, value in state["model"].items() if "tracked" not in key} == {torch.float32}
    assert ("scale" in state["scaler"]) == (precision == "fp16")
    losses = [record["val/loss"] for record in read_metrics(run) if "val/loss" in record]
    assert losses[-1] < losses[0]


def run_with_a_bad_loss(cwd, overrides, rank):
    """The error of the job where the loss itself, of one rank alone, is infinite in step 0."""
    original = CrossEntropy.__call__

    def loss(self, outputs, targets):
        total, count = original(self, outputs, targets)
        return (total * torch.inf if dist.get_rank() == rank and outputs.requires_grad else total), count

    try:
        with mock.patch.object(CrossEntropy, "__call__", loss):
            run_rank(cwd, overrides)
    except NonFiniteError as error:
        return str(error)
    raise AssertionError("no error")


def test_without_a_culprit_all_samples_of_the_ranks_at_fault_are_named(ranks, tmp_path):
    messages = ranks(2, run_with_a_bad_loss, tmp_path, JOB, 1)
    assert messages[0] == messages[1]
    expected = ", ".join(map(str, Sampler(104, 16, 1, 0, 0, 2).samples(0, 1).tolist()))
    assert messages[0].startswith(f"step 0: the loss is not finite; training samples of rank 1: {expected}; learning ")
    assert not (tmp_path / "outputs/a/nonfinite.jsonl").exists()  # all of them are in the message
