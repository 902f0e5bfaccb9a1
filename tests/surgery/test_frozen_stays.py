"""Frozen statistics and weights do not move, whoever writes; what cannot be held is an error that changes nothing."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations
from torch.optim.swa_utils import update_bn

from syncbn import FreezePlan, SyncBatchNorm, convert_sync_batchnorm, freeze, revert_sync_batchnorm, unfreeze
from syncbn.surgery.freeze_plan import FreezeRule

X = torch.randn(8, 3, 6, 6, generator=torch.Generator().manual_seed(0)) + 3


def network(*more):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), *more)
    return convert_sync_batchnorm(model)


def frozen_network():
    model = network()
    model(X)
    freeze(model)
    return model


def as_lightning_averages_weights(model):
    """What Lightning 2.6 does in `StochasticWeightAveraging.reset_batch_norm_and_save_state`."""
    layer = model[1]
    layer.running_mean = torch.zeros_like(layer.running_mean)
    layer.running_var = torch.ones_like(layer.running_var)
    layer.momentum = None
    layer.num_batches_tracked *= 0
    model(X)


@pytest.mark.parametrize(
    "write",
    [
        lambda model: update_bn([X, X], model),
        lambda model: model[1].reset_running_stats(),
        lambda model: model[1].reset_parameters(),
        as_lightning_averages_weights,
        lambda model: setattr(model[1], "num_batches_tracked", torch.tensor(7)),
    ],
    ids=["update_bn", "reset_running_stats", "reset_parameters", "lightning", "assignment"],
)
@pytest.mark.parametrize("change", [lambda model: model, copy.deepcopy], ids=["as it is", "copied"])
def test_frozen_statistics_are_not_reset_and_a_warning_names_the_layer(write, change):
    model = change(frozen_network())
    before = copy.deepcopy(model.state_dict())
    with pytest.warns(UserWarning, match=r"statistics of \S+ are frozen and have not been reset; call unfreeze"):
        write(model)
    torch.testing.assert_close(dict(model.state_dict()), dict(before), rtol=0, atol=0)
    assert before["1.num_batches_tracked"] == 1


def test_a_reset_of_one_frozen_layer_is_one_warning_by_its_name():
    model = frozen_network()
    with pytest.warns(UserWarning, match="frozen") as caught:
        update_bn([X], model)
    assert [str(warning.message).split(" are frozen")[0] for warning in caught] == ["the running statistics of 1"]


def test_a_layer_that_is_free_is_reset_beside_a_frozen_one_and_so_is_one_that_was_frozen():
    model = network(nn.BatchNorm2d(4))
    model(X)
    freeze(model, "1")
    with pytest.warns(UserWarning, match="of 1 are frozen"):
        update_bn([X], model)
    assert [int(layer.num_batches_tracked) for layer in (model[1], model[3])] == [1, 1]
    unfreeze(model)
    model[1].num_batches_tracked *= 0
    assert model[1].num_batches_tracked == 0
    freeze(model)
    revert_sync_batchnorm(model.eval())
    model[1].reset_running_stats()
    assert model[1].running_mean.abs().max() == 0


@pytest.mark.parametrize("assign", [False, True])
def test_loading_a_state_dict_writes_frozen_statistics_and_they_stay_frozen(assign):
    model = frozen_network()
    other = network()
    other(2 * X)
    other(2 * X)
    model.load_state_dict(copy.deepcopy(other.state_dict()), assign=assign)
    torch.testing.assert_close(model[1].running_var, other[1].running_var, rtol=0, atol=0)
    with pytest.warns(UserWarning, match="are frozen"):
        as_lightning_averages_weights(model)
    torch.testing.assert_close(dict(model.state_dict()), dict(other.state_dict()), rtol=0, atol=0)


def test_statistics_that_are_moved_elsewhere_are_no_reset():
    layer = SyncBatchNorm(4).freeze()
    layer.running_mean = layer.running_mean.double()
    layer.to(torch.bfloat16)
    assert layer.running_mean.dtype == torch.bfloat16


class OldForward(nn.BatchNorm2d):
    """Increments its counter by assignment, as torch did before 1.11 and copies of its code still do."""

    def forward(self, input):
        self.num_batches_tracked = self.num_batches_tracked + 1
        return super().forward(input)


def test_the_forward_of_a_subclass_may_assign_to_its_counter():
    layer = convert_sync_batchnorm(OldForward(3)).freeze()
    layer(X)
    assert layer.num_batches_tracked == 0


def sharing(kind=SyncBatchNorm, view=False):
    """Layer "1" shares its running mean with layer "3", of another class or the same; as a view or as the tensor."""
    model = network(kind(4, track_running_stats=True))
    held = model[1].running_mean
    model[3].running_mean = held.view(2, 2).view(4) if view else held
    return model


@pytest.mark.parametrize("kind", [SyncBatchNorm, nn.BatchNorm2d, nn.InstanceNorm2d])
@pytest.mark.parametrize("view", [False, True])
def test_a_live_layer_that_shares_frozen_buffers_is_an_error_that_names_both(kind, view):
    model = sharing(kind, view)
    with pytest.raises(ValueError, match=r"1 cannot be frozen without 3: they share running_mean"):
        freeze(model, "1", weights=True)
    assert not model[1].stats_frozen
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_layers_that_share_buffers_are_frozen_and_unfrozen_together():
    model = sharing()
    assert freeze(model) == ["1", "3"]
    with pytest.raises(ValueError, match="3 cannot be frozen without 1"):
        unfreeze(model, "1")
    assert model[1].stats_frozen
    assert model[1].affine_frozen
    unfreeze(model)
    model[3].track_running_stats = False  # it writes no statistics now
    assert freeze(model, "1") == ["1"]


def test_a_plan_that_would_part_sharers_is_an_error_before_training_and_applies_nothing():
    plan = FreezePlan({"both": FreezeRule(["1", "3"], until=5), "one": FreezeRule("1", weights=True, until=9)})
    model = sharing()
    with pytest.raises(ValueError, match=r"^one: at step 5, 1 cannot be frozen without 3"):
        plan.check(model)
    plan.apply(model, 0)
    with pytest.raises(ValueError, match="1 cannot be frozen without 3"):
        plan.apply(model, 5)
    assert model[3].stats_frozen
    assert model[3].affine_frozen
    FreezePlan({"both": FreezeRule(["1", "3"], until=5)}).check(sharing())


MOVING = {
    "spectral_norm": (lambda: nn.utils.spectral_norm(nn.Conv2d(3, 4, 3)), "weight_u and weight_v"),
    "its parametrization": (
        lambda: parametrizations.spectral_norm(nn.Conv2d(3, 4, 3)),
        r"parametrizations\.weight\.0\._u.*remove_parametrizations\(module, 'weight'\)",
    ),
    "affine InstanceNorm": (lambda: nn.InstanceNorm2d(3, affine=True, track_running_stats=True), "running_mean"),
    "InstanceNorm": (lambda: nn.InstanceNorm2d(3, track_running_stats=True), "running_mean and running_var"),
    "Embedding": (lambda: nn.Embedding(3, 4, max_norm=1.0), r"forward writes its weight \(max_norm=1.0\)"),
    "EmbeddingBag": (lambda: nn.EmbeddingBag(3, 4, max_norm=1.0), "forward writes its weight"),
}


@pytest.mark.parametrize("kind", MOVING)
def test_a_module_that_its_forward_changes_all_the_same_is_an_error_that_names_it(kind):
    make, message = MOVING[kind]
    model = nn.ModuleDict({"first": nn.Linear(2, 2), "moving": make(), "bn": SyncBatchNorm(2)})
    with pytest.raises(ValueError, match=rf"^moving .*{message}.*exclude='moving'"):
        freeze(model, weights=True)
    with pytest.raises(ValueError, match=r"^mine: moving "):
        FreezePlan({"mine": FreezeRule("*", weights=True, start=3)}).check(model)
    assert not model["bn"].stats_frozen
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert freeze(model) == ["bn"]  # nobody has asked for the weights
    assert "first" in freeze(model, weights=True, exclude="moving")


def test_what_cannot_be_frozen_can_be_unfrozen():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), SyncBatchNorm(4))
    freeze(model, weights=True)
    nn.utils.spectral_norm(model[0])
    assert unfreeze(model, weights=True) == ["0", "1"]
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_instance_normalization_may_move_where_statistics_are_not_to_be_frozen():
    model = nn.Sequential(nn.InstanceNorm2d(3, affine=True, track_running_stats=True), nn.InstanceNorm2d(3))
    assert freeze(model, stats=False, weights=True) == ["0"]
    assert freeze(nn.Sequential(nn.Linear(2, 2), nn.InstanceNorm2d(3)), weights=True) == ["0"]
