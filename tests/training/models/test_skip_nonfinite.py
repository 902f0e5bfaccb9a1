"""`bn.skip_nonfinite`: which layers of a run it reaches."""

import copy

import pytest
import torch
from torch import nn

from syncbn import SyncBatchNorm
from syncbn.training.models.normalization import set_up
from syncbn.training.models.virtual_ranks import make_virtual
from tests.training.jobs import compose_config

GOOD = torch.randn(6, 3, 4, 4, generator=torch.Generator().manual_seed(0)) + 2


def test_the_key_of_a_run_sets_it():
    for given in (True, False):
        config = compose_config(f"bn.skip_nonfinite={str(given).lower()}")
        model = nn.Sequential(nn.BatchNorm2d(3))
        set_up(model, config.bn)
        assert model[0].skip_nonfinite is given


def test_it_reaches_the_layers_that_a_model_was_built_with_too():
    model = nn.Sequential(SyncBatchNorm(3), nn.BatchNorm2d(3))
    set_up(model, compose_config("bn.skip_nonfinite=true").bn)
    assert [layer.skip_nonfinite for layer in model] == [True, True]


@pytest.mark.parametrize("momentum", [0.1, None])
def test_virtual_ranks_skip_each_by_itself(momentum):
    layer, plain = (nn.BatchNorm2d(3, momentum=momentum) for _ in range(2))
    make_virtual(layer, 2, skip_nonfinite=True)
    make_virtual(plain, 2)
    layer(GOOD), plain(GOOD)
    bad = GOOD.clone()
    bad[1, 2, 0, 0] = float("nan")
    layer(bad)  # of the first group
    expected = copy.deepcopy(plain)
    expected(GOOD)
    torch.testing.assert_close(layer.group_mean[0], plain.group_mean[0], rtol=0, atol=0)
    torch.testing.assert_close(layer.group_var[1], expected.group_var[1], rtol=0, atol=0)
    assert layer.running_mean.isfinite().all()
    assert layer.num_batches_tracked == 2
    before = copy.deepcopy(layer)
    layer(torch.cat([bad[:3]] * 2))
    torch.testing.assert_close(dict(layer.state_dict()), dict(before.state_dict()), rtol=0, atol=0)


def test_virtual_ranks_that_skip_have_the_gradients_of_those_that_do_not():
    layers, gradients = [nn.BatchNorm2d(3) for _ in range(2)], []
    for layer, skips in zip(layers, (True, False), strict=True):
        make_virtual(layer, 2, skip_nonfinite=skips)
        input = GOOD.clone().requires_grad_()
        layer(input).pow(3).sum().backward()
        gradients.append(input.grad)
    torch.testing.assert_close(*gradients, rtol=0, atol=0)
    torch.testing.assert_close(*(dict(layer.state_dict()) for layer in layers), rtol=0, atol=0)
