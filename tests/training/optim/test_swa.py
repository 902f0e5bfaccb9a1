"""The equal-weight average of weights is their plain mean, whatever is skipped, and goes on where it was saved."""

import copy
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from syncbn.training.checkpoint.contents import MalformedError, check_parts
from syncbn.training.config.errors import ConfigError
from syncbn.training.distributed.rank_context import RankContext
from syncbn.training.optim.swa import AveragedSteps, EqualAverage
from syncbn.training.trainer.checks import average_from, check_averaged
from tests.training.jobs import compose_config
from tests.training.optim.test_update import build, check_equal, state_of, step


def model_of(number):
    """A model with weights and statistics that are functions of a number."""
    generator = torch.Generator().manual_seed(number)
    model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3)).double()
    for value in (*model.parameters(), *model.buffers()):
        value.data.copy_(torch.randint(-99, 99, value.shape, generator=generator) / 7)
    return model


@settings(max_examples=8, deadline=None, derandomize=True)
@given(begin=st.integers(0, 6), skipped=st.lists(st.booleans(), min_size=1, max_size=12))
def test_the_average_is_the_mean_of_the_weights_after_each_step_from_its_beginning_that_was_not_skipped(begin, skipped):
    average = EqualAverage(model_of(0), begin)
    counted, last = [], model_of(0)
    for number, left_out in enumerate(skipped, 1):
        model = last if left_out else model_of(number)  # a step that is skipped leaves the model as it was
        average.update(model, torch.tensor(left_out), number)
        last = model
        counted += [model] if number > begin and not left_out else []
    expected = {
        name: torch.stack([one.state_dict()[name].double() for one in counted or [last]]).mean(0)
        for name, value in last.state_dict().items()
        if value.is_floating_point()
    }
    actual = {name: value for name, value in average.state_dict().items() if name in expected}
    torch.testing.assert_close(actual, expected, rtol=1e-13, atol=1e-13)
    assert torch.equal(average.model[1].num_batches_tracked, last[1].num_batches_tracked)
    assert average.count.value == len(counted)


def parts_of(model, update):
    """What a checkpoint holds of them, by name."""
    return {"model": model, "optimizer": update.optimizer, "schedule": update.schedule, **update.average_parts()}


def test_a_skipped_step_and_one_that_is_saved_and_restored_leave_no_trace():
    (model, update), (other, resumed) = (build(average_from=1) for _ in range(2))
    for seed in (1, 2, 3):
        step(model, update, seed)
    before = state_of(model, update)
    step(model, update, 4, loss_factor=float("nan"))
    check_equal(state_of(model, update), before)
    own, others = parts_of(model, update), parts_of(other, resumed)
    for name, part in own.items():
        others[name].load_state_dict(copy.deepcopy(part.state_dict()))
    for seed in (5, 6):
        step(model, update, seed), step(other, resumed, seed)
    check_equal(state_of(other, resumed), state_of(model, update))
    assert resumed.average.count.value == 4  # steps 2, 3, 5 and 6


def test_numbers_on_the_device_give_the_same_bits():
    (model, update), (other, replayed) = build(average_from=2), build(average_from=2, capturable=True)
    for seed in range(6):
        poison = {"loss_factor": float("nan")} if seed == 3 else {}
        replayed.write_numbers(asked_to_stop=False)
        step(model, update, seed, **poison), step(other, replayed, seed, **poison)
    check_equal(state_of(other, replayed), state_of(model, update))


def test_a_run_has_one_average_which_begins_before_its_end():
    config = compose_config("swa=2ep", "duration=5ep")
    with pytest.raises(ConfigError, match=r"^swa: expected null beside ema=0.9, since a run has one average; set one"):
        replace(config, ema=0.9)
    with pytest.raises(ConfigError, match=r"^swa: expected a duration"):
        replace(config, swa="late")
    assert average_from(config, steps_per_epoch=10) == 20
    config.duration = "20"
    with pytest.raises(ConfigError, match=r"^swa: expected less than duration=20 \(20 steps\), .*got 2ep \(20 steps\)"):
        average_from(config, steps_per_epoch=10)


class Refused(nn.BatchNorm1d):
    """A layer that cannot be synchronized."""

    def forward(self, x):
        statistics = self.running_mean, self.running_var
        return torch.native_batch_norm(x, self.weight, self.bias, *statistics, self.training, 0.1, self.eps)[0]


def test_layers_that_cannot_be_synchronized_are_an_error_at_the_start_where_the_end_needs_it():
    config = compose_config("ema=0.9", "bn.sync=false")
    alone, one_of_two = (RankContext(0, size, torch.device("cpu"), torch.float32) for size in (1, 2))
    check_averaged(config, nn.Sequential(Refused(3)), alone)
    check_averaged(config, nn.Sequential(nn.BatchNorm1d(3)), one_of_two)
    with pytest.raises(ConfigError, match=r"^bn.averaged: .*Refused.*; set bn.averaged=running$"):
        check_averaged(config, nn.Sequential(Refused(3)), one_of_two)
    config.bn.averaged = "running"
    check_averaged(config, nn.Sequential(Refused(3)), one_of_two)


def test_a_count_of_averaged_steps_that_is_none_is_an_error():
    with pytest.raises(ValueError, match="expected one"):
        AveragedSteps(torch.device("cpu")).load_state_dict({"value": torch.zeros(2)})
    with pytest.raises(MalformedError, match=r"averaged_steps.value is 3, expected a tensor"):
        check_parts({"averaged_steps": {"value": 3}})
