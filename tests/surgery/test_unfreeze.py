"""`unfreeze` brings back every parameter, whatever became of it while it was frozen."""

import copy
import pickle
import weakref

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

from syncbn import SyncBatchNorm, convert_sync_batchnorm, freeze, unfreeze
from syncbn.training.checkpoint.frozen import FrozenSwitches


def network():
    return convert_sync_batchnorm(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()))


def do_nothing(_module):
    pass


def remove_parametrization(module):
    parametrize.remove_parametrizations(module, "weight")


def rename(module):
    module.kernel = module.weight
    del module.weight


def prune_half(module):
    prune.l1_unstructured(module, "weight", 0.5)


def old_weight_norm(module):
    with pytest.warns(FutureWarning):
        nn.utils.weight_norm(module)


CHANGES = {  # what has been done before freeze, and what is done while frozen
    "weight_norm": (do_nothing, old_weight_norm),
    "weight_norm removed": (old_weight_norm, nn.utils.remove_weight_norm),
    "parametrized": (do_nothing, parametrizations.weight_norm),
    "parametrization removed": (parametrizations.weight_norm, remove_parametrization),
    "parametrized and removed": (
        do_nothing,
        lambda module: remove_parametrization(parametrizations.weight_norm(module)),
    ),
    "orthogonal": (do_nothing, parametrizations.orthogonal),
    "orthogonal removed": (parametrizations.orthogonal, remove_parametrization),
    "spectral_norm": (do_nothing, nn.utils.spectral_norm),
    "pruned": (do_nothing, prune_half),
    "pruning removed": (prune_half, lambda module: prune.remove(module, "weight")),
    "renamed": (do_nothing, rename),
    "replaced": (do_nothing, lambda module: setattr(module, "weight", nn.Parameter(module.weight.data.clone()))),
}


@pytest.mark.parametrize("change", CHANGES)
def test_parameters_that_change_while_frozen_come_back(change):
    before, during = CHANGES[change]
    model = network()
    before(model[0])
    num_parameters = len(list(model[0].parameters()))
    freeze(model, weights=True)
    values = copy.deepcopy([parameter.detach() for parameter in model[0].parameters()])
    during(model[0])
    assert "0" in unfreeze(model, weights=True)
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert len(values) == num_parameters
    assert len(list(model[0].parameters())) >= 2  # none has become a buffer
    model(torch.randn(2, 3, 6, 6)).sum().backward() if change != "renamed" else None
    assert change == "renamed" or all(parameter.grad is not None for parameter in model[0].parameters())


@pytest.mark.parametrize("change", ["parametrized", "pruned", "renamed", "orthogonal"])
def test_requires_grad_set_by_hand_before_comes_back_too(change):
    model = network()
    model[0].weight.requires_grad_(False)
    freeze(model, weights=True)
    CHANGES[change][1](model[0])
    unfreeze(model, weights=True)
    assert [name for name, parameter in model[0].named_parameters() if parameter.requires_grad] == ["bias"]


def test_a_parameter_moved_to_another_module_comes_back():
    model = nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.Module()})
    freeze(model, "a", weights=True)
    model["b"].weight = model["a"].weight
    del model["a"].weight
    unfreeze(model, "a", weights=True)
    assert model["b"].weight.requires_grad


@pytest.mark.parametrize("change", [do_nothing, lambda module: to_new_parameters(module)], ids=["new", "replaced"])
def test_a_parameter_that_cannot_be_matched_is_named(change):
    model = network()
    freeze(model, weights=True)
    change(model[0])
    model[0].scale = nn.Parameter(torch.ones(1), requires_grad=False)
    with pytest.warns(UserWarning, match=r"unfreeze: 0\.scale needs no gradient .* was not there at freeze"):
        unfreeze(model, weights=True)
    assert model[0].weight.requires_grad


def test_freezing_again_takes_in_what_came_since():
    model = network()
    freeze(model, weights=True)
    parametrizations.weight_norm(model[0])
    model[0].scale = nn.Parameter(torch.ones(1))
    freeze(model, weights=True)
    assert not any(parameter.requires_grad for parameter in model.parameters())
    unfreeze(model, weights=True)
    assert all(parameter.requires_grad for parameter in model.parameters())


def through_pickle(model):
    return pickle.loads(pickle.dumps(model))


def to_another_type(model):
    return model.to(torch.float64)


def to_new_parameters(model):
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    try:
        return model.to(torch.float64)
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(False)


@pytest.mark.parametrize(
    ("carry", "change"),
    [
        *(
            (carry, change)
            for carry in (copy.deepcopy, through_pickle, to_another_type)
            for change in ("parametrized", "pruned", "renamed")
        ),
        (to_new_parameters, "parametrized"),
        (to_new_parameters, "pruned"),
    ],
)
def test_what_is_remembered_outlives_copies_pickles_and_conversions(carry, change):
    model = network()
    model[0].bias.requires_grad_(False)
    freeze(model, weights=True)
    carried = carry(model)
    CHANGES[change][1](carried[0])
    unfreeze(carried, weights=True)
    assert [name for name, parameter in carried[0].named_parameters() if not parameter.requires_grad] == ["bias"]
    if carried is not model:
        assert not any(parameter.requires_grad for parameter in model.parameters())  # the original is another one
        unfreeze(model, weights=True)
        assert model[0].weight.requires_grad


def test_a_module_may_be_converted_by_swapping_while_it_is_frozen():
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        model = network()
        freeze(model, weights=True)
        model.to(torch.float64)
        unfreeze(model, weights=True)
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_a_module_pickled_by_version_0_1_0_comes_back():
    model = network()
    freeze(model, weights=True)
    model[0]._thawed_requires_grad = {"weight": True, "bias": False}
    assert unfreeze(model, "0", weights=True) == ["0"]
    assert [parameter.requires_grad for parameter in model[0].parameters()] == [True, False]


def test_no_parameter_is_kept_alive_and_none_gets_into_a_state_dict():
    model = network()
    keys = list(model.state_dict())
    freeze(model, weights=True)
    assert list(model.state_dict()) == keys
    gone = weakref.ref(model[0].weight)
    model[0].weight = nn.Parameter(torch.zeros(4, 3, 3, 3))
    assert gone() is None


def test_a_resumed_run_thaws_what_has_been_parametrized_since():
    model, resumed = network(), network()
    freeze(model, weights=True)
    FrozenSwitches(resumed).load_state_dict(FrozenSwitches(model).state_dict())
    parametrizations.weight_norm(resumed[0])
    unfreeze(resumed, weights=True)
    assert all(parameter.requires_grad for parameter in resumed.parameters())


def test_tied_parameters_that_are_parametrized_stay_until_both_modules_let_go():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), SyncBatchNorm(4))
    model[1].weight = model[0].weight
    freeze(model, weights=True)
    prune_half(model[0])
    unfreeze(model, "0", weights=True)
    assert not model[0].weight_orig.requires_grad  # the other module still holds it
    unfreeze(model, "1", weights=True)
    assert model[0].weight_orig.requires_grad
