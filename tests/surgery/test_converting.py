"""Conversion in place: nothing that a model holds is lost, and revert gives it back."""

import pytest
import torch
from torch import nn

from syncbn import SyncBatchNorm, convert_sync_batchnorm, revert_sync_batchnorm
from tests.reference import max_error, set_affine


def make_model():
    model = nn.Sequential(
        nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Sequential(nn.Conv2d(4, 3, 3), nn.BatchNorm2d(3))
    )
    set_affine(model[1])
    model(torch.randn(5, 2, 8, 8))
    return model


def test_a_converted_plain_layer_has_exactly_the_class():
    model = convert_sync_batchnorm(make_model())
    assert type(model[1]) is SyncBatchNorm
    assert type(model[3][1]) is SyncBatchNorm


def test_parameters_buffers_modes_and_hooks_are_the_same_objects():
    model = make_model()
    layer = model[1].eval()
    layer.bias.requires_grad_(False)
    seen = []
    layer.register_forward_hook(lambda *_: seen.append(1))
    before = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    assert convert_sync_batchnorm(model) is model
    after = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    assert all(after[name] is before[name] for name in before)
    assert not model[1].training
    assert not model[1].bias.requires_grad
    assert any(parameter is model[1].weight for parameter in optimizer.param_groups[0]["params"])
    model(torch.randn(2, 2, 8, 8))
    assert seen == [1]


def test_a_module_in_two_places_stays_one():
    shared = nn.BatchNorm1d(3)
    model = convert_sync_batchnorm(nn.ModuleDict({"a": shared, "b": nn.Sequential(shared)}))
    assert model["a"] is model["b"][0]
    assert type(model["a"]) is SyncBatchNorm


def test_output_and_statistics_do_not_change():
    plain, converted = make_model(), convert_sync_batchnorm(make_model())
    converted.load_state_dict(plain.state_dict())
    input = torch.randn(6, 2, 8, 8)
    assert max_error(converted(input), plain(input)) < 1e-5
    assert max_error(converted[1].running_var, plain[1].running_var) < 1e-6


def test_match_and_exclude_choose_layers():
    model = convert_sync_batchnorm(make_model(), match="3")
    assert type(model[1]) is nn.BatchNorm2d
    assert type(model[3][1]) is SyncBatchNorm
    model = convert_sync_batchnorm(make_model(), exclude="3")
    assert type(model[1]) is SyncBatchNorm
    assert type(model[3][1]) is nn.BatchNorm2d


def test_other_normalizations_and_lazy_layers_are_left():
    model = nn.Sequential(nn.InstanceNorm2d(3), nn.GroupNorm(1, 3), nn.LayerNorm(3), nn.LazyBatchNorm2d())
    classes = [type(layer) for layer in model]
    assert [type(layer) for layer in convert_sync_batchnorm(model)] == classes


def test_a_subclass_is_an_error_that_names_the_layer_and_converts_nothing():
    class Special(nn.BatchNorm2d):
        pass

    model = nn.Sequential(nn.BatchNorm2d(3), Special(3))
    with pytest.raises(TypeError, match=r"1 is a Special.*exclude='1'"):
        convert_sync_batchnorm(model)
    assert type(model[0]) is nn.BatchNorm2d


def test_converting_twice_is_converting_once():
    model = convert_sync_batchnorm(convert_sync_batchnorm(make_model()))
    revert_sync_batchnorm(model)
    assert type(model[1]) is nn.BatchNorm2d


@pytest.mark.parametrize("original", [nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm])
def test_revert_gives_back_the_original_class(original):
    layer = original(3)
    keys = set(vars(layer))
    model = revert_sync_batchnorm(convert_sync_batchnorm(nn.Sequential(layer)))
    assert type(model[0]) is original
    assert set(vars(model[0])) == keys


def test_revert_leaves_a_layer_that_was_built_synchronized():
    model = revert_sync_batchnorm(nn.Sequential(SyncBatchNorm(3)))
    assert type(model[0]) is SyncBatchNorm


def test_the_classmethod_converts_as_torchs_does():
    assert type(SyncBatchNorm.convert_sync_batchnorm(nn.BatchNorm2d(3))) is SyncBatchNorm
