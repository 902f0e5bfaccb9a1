"""Conversion in place: nothing that a model holds is lost, and revert gives it back."""

import logging

import pytest
import torch
from torch import nn

from syncbn import SyncBatchNorm, convert_sync_batchnorm, freeze, revert_sync_batchnorm
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


def test_other_normalizations_are_left():
    model = nn.Sequential(nn.InstanceNorm2d(3), nn.GroupNorm(1, 3), nn.LayerNorm(3))
    classes = [type(layer) for layer in model]
    assert [type(layer) for layer in convert_sync_batchnorm(model)] == classes


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


def test_revert_leaves_a_layer_that_was_built_synchronized_unless_a_default_is_given(caplog):
    model = nn.Sequential(SyncBatchNorm(3))
    with caplog.at_level(logging.INFO):
        assert type(revert_sync_batchnorm(model)[0]) is SyncBatchNorm
    assert "0 was built as SyncBatchNorm: left" in caplog.text
    assert type(revert_sync_batchnorm(model, default=nn.BatchNorm2d)[0]) is nn.BatchNorm2d


@pytest.mark.parametrize("is_converted", [True, False])
def test_with_a_default_torchs_synchronized_layers_become_plain_ones_with_all_that_they_hold(is_converted):
    """`torch.nn.SyncBatchNorm` cannot train on a CPU in a distributed job, and torch has no way back."""
    model = nn.Sequential(nn.Conv2d(2, 4, 1), nn.SyncBatchNorm(4, eps=1e-3, momentum=None), nn.BatchNorm2d(4))
    layer, seen = model[1].eval(), []
    layer.bias.requires_grad_(False)
    layer.num_batches_tracked.fill_(7)
    layer.register_forward_hook(lambda *_: seen.append(1))
    before = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    if is_converted:
        convert_sync_batchnorm(model)
        assert type(revert_sync_batchnorm(model)[1]) is nn.SyncBatchNorm  # without a default
        convert_sync_batchnorm(model)
    assert revert_sync_batchnorm(model, default=nn.BatchNorm2d)[1] is layer
    assert [type(module) for module in model] == [nn.Conv2d, nn.BatchNorm2d, nn.BatchNorm2d]
    assert vars(layer).keys() == vars(nn.BatchNorm2d(4)).keys()
    after = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    assert list(after) == list(before)
    assert all(after[name] is before[name] for name in before)
    assert (layer.eps, layer.momentum, layer.training, layer.bias.requires_grad) == (1e-3, None, False, False)
    assert model(torch.randn(2, 2, 3, 3)).shape == (2, 4, 3, 3)
    assert seen == [1]


class Own(nn.SyncBatchNorm):
    def forward(self, input):
        return super().forward(input).relu()


class OwnToo(SyncBatchNorm):
    def forward(self, input):
        return super().forward(input).relu()


def test_a_default_does_not_take_the_behaviour_of_subclasses_away(caplog):
    model = nn.Sequential(nn.SyncBatchNorm(3), Own(3))
    with caplog.at_level(logging.INFO):
        revert_sync_batchnorm(model, default=nn.BatchNorm2d)
    assert [type(layer) for layer in model] == [nn.BatchNorm2d, Own]
    assert "1 is a Own, a subclass of torch's: left" in caplog.text
    model = nn.Sequential(nn.SyncBatchNorm(3), OwnToo(3))
    with pytest.raises(ValueError, match="1: its class is OwnToo, whose own behaviour BatchNorm2d would lose"):
        revert_sync_batchnorm(model, default=nn.BatchNorm2d)
    assert [type(layer) for layer in model] == [nn.SyncBatchNorm, OwnToo]


def test_what_a_plain_class_cannot_express_is_not_reverted():
    model = convert_sync_batchnorm(make_model())
    freeze(model, "3")
    with pytest.raises(ValueError, match=r"3.1: its statistics are frozen, which BatchNorm2d cannot keep in training"):
        revert_sync_batchnorm(model)
    assert type(model[1]) is SyncBatchNorm  # nothing was
    revert_sync_batchnorm(model.eval())
    assert model[3][1].weight.requires_grad
    with pytest.raises(ValueError, match="BatchNorm2d has no activation='relu'"):
        revert_sync_batchnorm(SyncBatchNorm(3, activation="relu"), default=nn.BatchNorm2d)


def test_an_optimizer_built_before_trains_the_converted_model():
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    convert_sync_batchnorm(model)
    before = model[1].weight.clone()
    model(torch.randn(5, 2, 8, 8)).square().sum().backward()
    optimizer.step()
    assert not torch.equal(model[1].weight, before)


def test_conversion_needs_no_process_group_and_keeps_the_one_it_gets():
    sentinel = object()
    model = convert_sync_batchnorm(make_model(), sentinel)
    assert model[1].process_group is sentinel


def test_a_torch_sync_batch_norm_keeps_its_own_group():
    layer = nn.SyncBatchNorm(3)
    layer.process_group = sentinel = object()
    assert convert_sync_batchnorm(layer).process_group is sentinel
    assert revert_sync_batchnorm(layer).process_group is sentinel


def test_momentum_eps_type_and_counter_stay():
    layer = nn.BatchNorm2d(3, eps=1e-3, momentum=None, dtype=torch.float64)
    layer.num_batches_tracked.fill_(7)
    converted = convert_sync_batchnorm(layer)
    assert (converted.eps, converted.momentum, converted.num_batches_tracked) == (1e-3, None, 7)
    assert converted.running_mean.dtype == torch.float64


def test_the_classmethod_converts_as_torchs_does():
    assert type(SyncBatchNorm.convert_sync_batchnorm(nn.BatchNorm2d(3))) is SyncBatchNorm
