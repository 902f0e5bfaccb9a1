"""An update is taken or left out on the device, and what is left out leaves no trace."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils._python_dispatch import TorchDispatchMode

from syncbn import SyncBatchNorm
from syncbn.training.optim.ema import ExponentialAverage
from syncbn.training.optim.foreach import all_finite, multiply
from syncbn.training.optim.update import Update
from syncbn.training.trainer.deferred import DeferredResults


def build(**options):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), SyncBatchNorm(4), nn.Linear(4, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01, fused=True)
    update = Update(model, optimizer, LambdaLR(optimizer, lambda step: 1 / (step + 1)), torch.device("cpu"), **options)
    return model, update


def step(model, update, seed, *, loss_factor=1.0, gradient_factor=1.0, halt=False):
    """One training step; the factors poison it."""
    generator = torch.Generator().manual_seed(seed)
    update.begin()
    loss = (model(torch.randn(8, 3, generator=generator)) ** 2).sum()
    update.scaler.scale(loss).backward()
    for parameter in model.parameters():
        if parameter.grad is not None:
            parameter.grad.mul_(gradient_factor)
    outcome = update.apply(loss.detach().double() * loss_factor, torch.tensor(1.0, dtype=torch.float64), halt=halt)
    update.advance()
    return outcome


def state_of(model, update):
    parts = {"model": model.state_dict(), "optimizer": update.optimizer.state_dict()["state"]}
    return copy.deepcopy(parts | ({"average": update.average.state_dict()} if update.average else {}))


def check_equal(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)


POISONS = [{"loss_factor": float("nan")}, {"loss_factor": float("inf")}, {"gradient_factor": float("nan")}]


@pytest.mark.parametrize("poison", POISONS, ids=str)
def test_a_step_that_is_not_finite_changes_nothing_and_the_next_goes_on(poison):
    (model, update), (clean, clean_update) = build(decay=0.9), build(decay=0.9)
    for seed in (1, 2):
        step(model, update, seed), step(clean, clean_update, seed)
    before = state_of(model, update)
    outcome = step(model, update, 3, **poison)
    assert outcome.left_out
    assert outcome.at_fault
    check_equal(state_of(model, update), before)
    clean_update.schedule.step()  # the learning rate goes on
    assert not step(model, update, 4).left_out
    step(clean, clean_update, 4)
    check_equal(state_of(model, update), state_of(clean, clean_update))


def test_the_very_first_step_may_be_left_out():
    # torch's fused SGD alone would keep uninitialized memory as the momentum here.
    model, update = build()
    step(model, update, 1, loss_factor=float("nan"))
    assert all((state["momentum_buffer"] == 0).all() for state in update.optimizer.state.values())
    assert int(model[1].num_batches_tracked) == 0


def test_a_parameter_that_joins_later_starts_with_no_momentum():
    model, update = build()
    model[0].requires_grad_(False)
    step(model, update, 1)
    model[0].requires_grad_(True)
    step(model, update, 2)
    buffer = update.optimizer.state[model[0].weight]["momentum_buffer"]
    assert buffer.abs().max() > 0
    assert buffer.isfinite().all()


def test_after_a_fault_that_halts_nothing_moves_until_restart():
    (model, update), (clean, clean_update) = build(), build()
    step(model, update, 1), step(clean, clean_update, 1)
    before = state_of(model, update)
    step(model, update, 2, loss_factor=float("nan"), halt=True)
    assert step(model, update, 3, halt=True).left_out
    check_equal(state_of(model, update), before)
    update.restart(1)  # step 1 is the second one
    for seed in (4, 5):
        step(model, update, seed, halt=True), step(clean, clean_update, seed)
    check_equal(state_of(model, update), state_of(clean, clean_update))
    assert update.schedule.last_epoch == clean_update.schedule.last_epoch


def test_an_overflow_of_scaled_gradients_is_left_out_too_and_is_no_fault():
    model, update = build(half=True, decay=0.9)
    step(model, update, 1)
    before = state_of(model, update)
    scale = update.scaler.get_scale()
    outcome = step(model, update, 2, gradient_factor=float("inf"))
    assert outcome.left_out
    assert not outcome.at_fault
    check_equal(state_of(model, update), before)
    assert update.scaler.get_scale() == scale / 2
    assert step(model, update, 3, loss_factor=float("nan")).at_fault


def test_a_fault_leaves_the_scaler_as_it_was():
    model, update = build(half=True)
    step(model, update, 1)
    before = update.scaler.state_dict()
    step(model, update, 2, loss_factor=float("nan"))
    assert update.scaler.state_dict() == before


def test_a_scaled_gradient_that_is_never_finite_is_a_fault_in_the_end():
    model, update = build(half=True)
    verdicts = [step(model, update, seed, gradient_factor=float("nan")) for seed in range(18)]
    assert not verdicts[10].at_fault  # 65536 is halved 16 times before it is 1
    assert verdicts[-1].at_fault


def test_an_update_never_reads_a_value_on_the_host():
    class Reads(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            assert function is not torch.ops.aten._local_scalar_dense.default, "waits for the device"
            return function(*args, **(kwargs or {}))

    model, update = build(decay=0.9)
    reports = DeferredResults(torch.device("cpu"))
    loss = (model(torch.randn(8, 3)) ** 2).sum()
    update.begin()
    loss.backward()
    with Reads():
        outcome = update.apply(loss.detach().double(), torch.tensor(1.0, dtype=torch.float64), halt=True)
        update.advance()
        reports.post(0, torch.stack(outcome))
        update.begin()


@pytest.mark.parametrize("value", [1.0, float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_one_element_of_one_gradient_decides_whether_all_are_finite(dtype, value):
    gradients = [torch.ones(5, dtype=kind) for kind in (torch.float32, torch.float64, torch.bfloat16, dtype)]
    gradients[-1][3] = value
    assert all_finite(gradients, torch.device("cpu")).item() == math.isfinite(value)


def test_gradients_of_every_type_are_multiplied_in_their_own_precision():
    gradients = [torch.ones(2, dtype=kind) for kind in (torch.float32, torch.float64, torch.bfloat16)]
    multiply(gradients, torch.tensor(1 / 3, dtype=torch.float64))
    for gradient in gradients:
        torch.testing.assert_close(gradient, torch.full((2,), 1 / 3, dtype=gradient.dtype), rtol=0, atol=0)


def test_the_average_is_exponential_over_weights_and_statistics_and_copies_counters():
    model, _ = build()
    average = ExponentialAverage(model, decay=0.75)
    start = {name: value.clone() for name, value in model.state_dict().items()}
    with torch.no_grad():
        for value in (*model.parameters(), *model.buffers()):
            value.add_(1)
    average.update(model, torch.tensor(False), step=1000)
    for name, value in average.state_dict().items():
        moved = 1 if name.endswith("num_batches_tracked") else 0.25
        torch.testing.assert_close(value, start[name] + moved, msg=name)


def test_the_average_forgets_the_initial_weights_early_on():
    model = nn.Linear(1, 1)
    average = ExponentialAverage(model, decay=0.9)
    kept, start = 1.0, model.weight.item()
    with torch.no_grad():
        model.weight.add_(1)
    for step in range(1, 101):
        average.update(model, torch.tensor(False), step)
        kept *= min(0.9, (1 + step) / (10 + step))
        assert average.model.weight.item() == pytest.approx(start + 1 - kept, abs=1e-5)


@pytest.mark.parametrize("lag", [0, 1, 2])
def test_reports_come_in_order_once_and_as_late_as_they_may(lag):
    reports = DeferredResults(torch.device("cpu"), lag)
    seen = []
    for number in range(5):
        reports.post(number, torch.tensor([float(number)]))
        seen += [step for step, _ in reports.take()]
        assert len(seen) == max(0, number + 1 - lag)
    seen += [step for step, _ in reports.take(everything=True)]
    assert seen == list(range(5))
