"""Modes are set for a while and put back, module by module."""

import pytest
from torch import nn

from syncbn.nn.modes import evaluating, restored_modes


@pytest.fixture
def model():
    model = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.BatchNorm1d(2), nn.Dropout()))
    model[1][0].eval()  # by hand, in a model that trains
    return model


def modes(model):
    return [module.training for module in model.modules()]


def test_every_module_gets_its_own_mode_back_after_an_exception_too(model):
    before = modes(model)

    def fails():
        with restored_modes(model):
            model[1].eval()
            raise KeyError

    with pytest.raises(KeyError):
        fails()
    assert modes(model) == before == [True, True, True, False, True]


def test_all_evaluate_but_those_that_are_named(model):
    before = modes(model)
    with evaluating(model, but=[model[1][0]]):
        assert modes(model) == [False, False, False, True, False]
    assert modes(model) == before
