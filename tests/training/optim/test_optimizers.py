"""Optimizers are tried before they are trusted, and their groups hold every parameter once."""

import logging
import random

import numpy
import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from syncbn import SyncBatchNorm, freeze, unfreeze
from syncbn.torch_compat import count_as_stepped
from syncbn.training.config.errors import ConfigError
from syncbn.training.config.optim import (
    AdamwConfig,
    ConstantConfig,
    CustomOptimizer,
    GroupConfig,
    PolyConfig,
    SgdConfig,
    StepConfig,
)
from syncbn.training.optim.groups import names_of, require_same_groups
from syncbn.training.optim.optimizers import build_optimizer
from syncbn.training.optim.schedules import build_schedule
from syncbn.training.optim.update import Update
from syncbn.training.trainer.drawing import drawing_alike
from tests.training.optim.test_update import check_equal, state_of, step

CPU = torch.device("cpu")
OF_TORCH = ["SGD", "Adam", "AdamW", "Adagrad", "NAdam", "RAdam", "RMSprop", "Adadelta", "Adamax", "ASGD", "Rprop",
            "Adafactor"]  # fmt: skip
ON_DEVICE = {"SGD", "Adam", "AdamW", "Adagrad"}  # by torch's fused kernels for the CPU


class Noisy(torch.optim.SGD):
    """Draws from every generator that there is."""

    @torch.no_grad()
    def step(self, closure=None):
        super().step(closure)
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter += 1e-3 * (torch.randn_like(parameter) + numpy.random.rand() + random.random())


class Decaying(torch.optim.SGD):
    """Takes weight from parameters that have no gradient, as the momentum of naive loops does."""

    @torch.no_grad()
    def step(self, closure=None):
        super().step(closure)
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.mul_(0.99)


class Sharpness(torch.optim.SGD):
    def step(self, closure=None):
        assert closure is not None, "needs a closure for the second pass"


class Remembering(torch.optim.SGD):
    def step(self, closure=None):
        super().step(closure)
        self.param_groups[0]["history"] = {1, 2}


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), SyncBatchNorm(4), nn.Linear(4, 2))


def sgd(**settings):
    return SgdConfig("sgd", 0.1, 0.9, 0.01, nesterov=True, on_unfreeze="reset", **settings)


def adamw(**settings):
    return AdamwConfig("adamw", 0.1, [0.9, 0.99], 1e-8, 0.01, "reset", **settings)


def own(target, **arguments):
    return CustomOptimizer({"_target_": target, **arguments})


def build(config, *, half=False, **options):
    model = network()
    built = build_optimizer(config, model, scaled=half)
    schedule = LambdaLR(built.optimizer, lambda step: 1 / (step + 1))
    update = Update(model, built.optimizer, schedule, CPU, skips_on_device=built.skips_on_device, half=half, **options)
    return model, update, built


def of_torch(name):
    return own(f"torch.optim.{name}", lr=0.01, **({"momentum": 0.9} if name in ("SGD", "RMSprop") else {}))


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("name", OF_TORCH)
def test_whatever_the_optimizer_a_step_left_out_leaves_no_trace_and_the_next_goes_on(name, half):
    # NAdam takes found_inf and ignores it; zeros as momentum_buffer would keep RMSprop from making its square_avg.
    (model, update, built), (clean, clean_update, _) = (build(of_torch(name), half=half, decay=0.9) for _ in range(2))
    assert built.skips_on_device == (name in ON_DEVICE)
    count_as_stepped(clean_update.optimizer)  # its schedule may go first
    for number, poison in enumerate(({"loss_factor": float("nan")}, {}, {"gradient_factor": float("nan")}, {})):
        before = state_of(model, update)
        assert bool(step(model, update, number, **poison).left_out) == bool(poison)
        if poison:
            clean_update.schedule.step()  # the learning rate goes on
            assert all(torch.equal(value, before["model"][key]) for key, value in model.state_dict().items())
        else:
            step(clean, clean_update, number)
    check_equal(state_of(model, update), state_of(clean, clean_update))


@pytest.mark.parametrize("name", OF_TORCH)
@pytest.mark.parametrize("forgets", [False, True])
def test_what_is_frozen_does_not_move_and_trains_again_when_it_is_unfrozen(name, forgets):
    model, update, _ = build(of_torch(name))
    step(model, update, 1)
    freeze(model, "0", weights=True)
    before, kept = model[0].weight.clone(), update.optimizer.state_dict()["state"][0]
    step(model, update, 2)
    assert torch.equal(model[0].weight, before)
    check_equal(update.optimizer.state_dict()["state"][0], kept)
    unfreeze(model, "0", weights=True)
    if forgets:  # as optimizer.on_unfreeze=reset does
        update.optimizer.state.pop(model[0].weight)
    step(model, update, 3)
    assert model[0].weight.isfinite().all()
    assert not torch.equal(model[0].weight, before)


def test_an_optimizer_that_waits_for_the_host_says_so_at_start(caplog):
    with caplog.at_level(logging.INFO):
        build(sgd())
        assert caplog.text == ""
        build(own("torch.optim.NAdam"))
    assert "optimizer._target_=torch.optim.NAdam cannot leave a step out on the device: the host waits" in caplog.text


def test_dampening_is_not_what_zeros_as_momentum_would_make_of_it():
    _, _, built = build(own("torch.optim.SGD", lr=0.1, momentum=0.9, dampening=0.5))
    assert not built.skips_on_device


MISTAKES = [
    (
        own("torch.optim.Adam", momentum=0.9),
        r"^optimizer.momentum: torch.optim.Adam takes no such argument, only lr",
    ),
    (own("torch.optim.Adam", lr=-1), r"^optimizer._target_=torch.optim.Adam: Invalid learning rate: -1"),
    (own("torch.optim.Nope"), r"^optimizer._target_=torch.optim.Nope: "),
    (
        own("torch.nn.Identity"),
        r"^optimizer._target_=torch.nn.Identity: expected a torch.optim.Optimizer, got",
    ),
    (own("torch.optim.LBFGS"), r"^optimizer._target_=torch.optim.LBFGS: its step needs a closure"),
    (own(f"{__name__}.Sharpness"), r"cannot take a step: needs a closure for the second pass"),
    (own("torch.optim.SparseAdam"), r"cannot take a step: SparseAdam does not support dense gradients"),
    (own(f"{__name__}.Decaying"), r"moves parameters without a gradient, so that nothing can be frozen"),
    (own(f"{__name__}.Remembering"), r"a checkpoint cannot hold its state, which has a set"),
    (
        own("torch.optim.Rprop", groups={"a": GroupConfig("2", weight_decay=0.1)}),
        r"Rprop: has no weight_decay; leave",
    ),
    (
        sgd(groups={"a": GroupConfig("nope")}),
        r"^optimizer.groups.a: match='nope' selects no module; the top-level",
    ),
    (
        sgd(groups={"a": GroupConfig("2", "2")}),
        r"^optimizer.groups.a: match='2' exclude='2' selects no parameter, in",
    ),
    (
        sgd(groups={"a": GroupConfig("0"), "b": GroupConfig(["2", "0"])}),
        r"0.weight is in two groups, a and b; chan",
    ),
    (sgd(groups={"rest": GroupConfig("0")}), r"^optimizer.groups.rest: is what no group selects; choose another name"),
    (
        sgd(groups={"bn": GroupConfig("1", weight_decay=0.1)}, decay_norm_and_bias=False),
        r"^optimizer.groups.bn.weight_",
    ),
]


@pytest.mark.parametrize(("config", "message"), MISTAKES, ids=[message[1:40] for _, message in MISTAKES])
def test_an_optimizer_or_a_group_that_cannot_work_is_one_line(config, message):
    with pytest.raises(ConfigError, match=message) as error:
        build_optimizer(config, network())
    assert "\n" not in str(error.value)


def test_sparse_gradients_are_an_error_at_start_or_where_they_first_appear():
    with pytest.raises(ConfigError, match=r"^model: 0 makes sparse gradients, which no optimizer takes here"):
        build_optimizer(sgd(), nn.Sequential(nn.Embedding(4, 2, sparse=True)))
    model, update, _ = build(sgd())
    update.begin()
    model[0].weight.grad = torch.zeros(4, 3).to_sparse()
    with pytest.raises(ConfigError, match=r"^model: the gradient of 0.weight is sparse"):
        update.apply(torch.zeros(()), torch.ones(()), halt=False)


def test_the_table_lists_every_parameter_in_one_group_with_what_holds_for_it():
    groups = {"head": GroupConfig("2", lr_scale=10, weight_decay=0.5)}
    plain = build_optimizer(sgd(groups=groups), network())
    assert plain.table() == [("rest", "24", "4", "1", "0.01"), ("head", "10", "2", "10", "0.5")]
    assert [group["lr"] for group in plain.optimizer.param_groups] == [0.1, 1.0]
    assert names_of(plain.groups)["head"] == ["2.weight", "2.bias"]
    exempt = build_optimizer(sgd(groups=groups, decay_norm_and_bias=False), network())
    assert exempt.table() == [
        ("rest", "12", "1", "1", "0.01"),
        ("rest, norm and bias", "12", "3", "1", "0"),
        ("head", "8", "1", "10", "0.5"),
        ("head, norm and bias", "2", "1", "10", "0"),
    ]


def test_other_groups_than_those_of_a_checkpoint_are_named():
    groups = build_optimizer(sgd(groups={"head": GroupConfig("2")}), network()).groups
    stored = names_of(groups)
    require_same_groups(groups, stored)
    for other, message in (
        (
            {"rest": [*stored["rest"], *stored["head"]]},
            r"has 2.weight in the group 'rest', here it is in the group 'head'",
        ),
        ({**stored, "old": ["3.weight"]}, r"has 3.weight in the group 'old', here it is nowhere"),
        ({"head": stored["head"], "rest": stored["rest"]}, r"has the parameters in another order"),
    ):
        with pytest.raises(ValueError, match=message):
            require_same_groups(groups, other)


def test_a_parameter_that_modules_share_is_in_one_group_once():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].weight = model[0].weight
    groups = build_optimizer(sgd(groups={"last": GroupConfig("1")}), model).groups
    assert [[*group.parameters] for group in groups] == [["0.bias"], ["0.weight", "1.bias"]]


@pytest.mark.parametrize("make", [sgd, adamw])
def test_groups_of_like_settings_train_as_one_bit_for_bit(make):
    one, split = make(), make(groups={"head": GroupConfig("2")})
    (model, update, _), (other, other_update, _) = build(one), build(split)
    for number in range(3):
        step(model, update, number), step(other, other_update, number)
    check_equal(model.state_dict(), other.state_dict())


def test_a_group_has_its_share_of_the_learning_rate_at_every_step():
    built = build_optimizer(sgd(groups={"head": GroupConfig("2", lr_scale=0.5)}), network())
    schedule = LambdaLR(built.optimizer, build_schedule(ConstantConfig("constant", "3"), 10, 5))
    for _ in range(5):
        first, second = built.optimizer.param_groups
        assert second["lr"] == pytest.approx(0.5 * first["lr"])
        built.optimizer.step()
        schedule.step()
    assert (first["lr"], second["lr"]) == (0.1, 0.05)


def test_a_poly_schedule_falls_by_a_power_of_the_steps_left():
    share = build_schedule(PolyConfig("poly", "4", 2.0, 0.2), num_steps=14, steps_per_epoch=5)
    assert [share(step) for step in (0, 3, 4, 9, 14, 99)] == pytest.approx([0.2, 0.8, 1.0, 0.4, 0.2, 0.2])
    line = build_schedule(PolyConfig("poly", "0", 1.0, 0.0), num_steps=4, steps_per_epoch=5)
    assert [line(step) for step in range(4)] == [1.0, 0.75, 0.5, 0.25]


def test_a_step_schedule_drops_at_its_times_and_keeps_the_warm_up():
    milestones = build_schedule(StepConfig("step", "4", ["2ep", "15"], None, 0.1), num_steps=20, steps_per_epoch=5)
    assert [milestones(at) for at in (0, 3, 4, 9)] == [0.2, 0.8, 1.0, 1.0]
    assert [milestones(at) for at in (10, 14, 15, 20)] == pytest.approx([0.1, 0.1, 0.01, 0.01])
    regular = build_schedule(StepConfig("step", "0", None, "1ep", 0.5), num_steps=20, steps_per_epoch=5)
    assert [regular(at) for at in (0, 4, 5, 19)] == [1.0, 1.0, 0.5, 0.125]
    with pytest.raises(ConfigError, match=r"^schedule.milestones: expected times that increase, got \['15', '2ep'\]"):
        build_schedule(StepConfig("step", "0", ["15", "2ep"], None, 0.1), num_steps=20, steps_per_epoch=5)


def test_a_milestone_after_the_end_is_a_warning(caplog):
    build_schedule(StepConfig("step", "0", ["2", "20"], None, 0.1), num_steps=20, steps_per_epoch=5)
    assert caplog.messages == ["schedule.milestones: 20 is after the last step 19; it has no effect"]


def test_what_an_optimizer_draws_is_of_seed_and_step_whatever_was_drawn_before():
    def train(seed, noise):
        model, update, built = build(own(f"{__name__}.Noisy", lr=0.1), drawing=drawing_alike(seed, CPU))
        assert built.may_draw
        for number in range(2):
            torch.rand(noise), numpy.random.rand(noise)
            random.seed(noise)
            before = random.getstate()
            step(model, update, number)
            assert random.getstate() == before
        return model[0].weight

    assert torch.equal(train(1, 1), train(1, 2))
    assert not torch.equal(train(1, 1), train(2, 1))


def test_to_try_an_optimizer_draws_nothing():
    model = network()
    before = torch.get_rng_state()
    build_optimizer(own(f"{__name__}.Noisy", lr=0.1), model)
    assert torch.equal(torch.get_rng_state(), before)
