"""Subclasses of batch normalization keep what they add, and are synchronized all the same."""

import copy
import pickle

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from syncbn import SyncBatchNorm, convert_sync_batchnorm, freeze, revert_sync_batchnorm
from syncbn.surgery.conversion_report import conversion_report
from tests.reference import make_batch, max_error, set_affine


class CallsSuper(nn.BatchNorm2d):
    """A fused activation around `super().forward`."""

    def forward(self, x):
        return F.leaky_relu(super().forward(x))

    def extra_repr(self):
        return "mine"


class CallsTheFunction(nn.BatchNorm2d):
    """As timm's BatchNormAct2d: its own bookkeeping, `F.batch_norm`, dropout and activation as children."""

    def __init__(self, num_features, **options):
        super().__init__(num_features, **options)
        self.drop = nn.Identity()
        self.activation = nn.ReLU()

    def forward(self, x):
        factor = 0.0 if self.momentum is None else self.momentum
        if self.training and self.track_running_stats and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
            factor = 1.0 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
        by_batch = self.training or (self.running_mean is None and self.running_var is None)
        x = F.batch_norm(
            x,
            self.running_mean if not self.training or self.track_running_stats else None,
            self.running_var if not self.training or self.track_running_stats else None,
            self.weight,
            self.bias,
            by_batch,
            factor,
            self.eps,
        )
        return self.activation(self.drop(x))


class CallsTheBaseByName(nn.BatchNorm2d):
    def forward(self, x, scale=1.0):
        return nn.BatchNorm2d.forward(self, x) * scale


class CallsThroughAMethod(nn.BatchNorm2d):
    def forward(self, x):
        return self.normalized(x).sigmoid()

    def normalized(self, x):
        return F.batch_norm(
            x, self.running_mean, self.running_var, self.weight, self.bias, self.training, self.momentum
        )


class AddsNothing(nn.BatchNorm2d):
    pass


class OwnMaths(nn.BatchNorm2d):
    def forward(self, x):
        return (x - x.mean((0, 2, 3), keepdim=True)) * self.weight.view(1, -1, 1, 1)


KINDS = [CallsSuper, CallsTheFunction, CallsTheBaseByName, CallsThroughAMethod, AddsNothing]


def check_kind(kind, sizes, momentum):
    rank = dist.get_rank()
    layer, plain = (kind(3, momentum=momentum).double() for _ in range(2))
    for one in (layer, plain):
        set_affine(one)
    convert_sync_batchnorm(layer)
    for step in range(2):
        input, grad = make_batch((sum(sizes), 3, 4, 4), seed=step)
        mine, whole = input.split(sizes)[rank].clone().requires_grad_(), input.clone().requires_grad_()
        output, expected = layer(mine), plain(whole)
        output.backward(grad.split(sizes)[rank])
        expected.backward(grad)
        assert max_error(output, expected.split(sizes)[rank]) < 1e-12
        assert max_error(mine.grad, whole.grad.split(sizes)[rank]) < 1e-12
        assert layer.num_batches_tracked == step + 1  # also where the original forgets to count
        assert max_error(layer.running_mean, plain.running_mean) < 1e-13
        assert max_error(layer.running_var, plain.running_var) < 1e-13
    input = make_batch((4, 3, 4, 4), seed=9)[0]
    assert max_error(layer.eval()(input), plain.eval()(input)) < 1e-12


@pytest.mark.parametrize("sizes", [(3, 4), (5, 0)], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_a_subclass_computes_what_it_did_with_the_statistics_of_all_ranks(ranks, kind, sizes):
    """torch's converter drops the subclass's forward (pytorch #187298, timm #1254)."""
    ranks(2, check_kind, kind, sizes, 0.1)


@pytest.mark.parametrize("kind", [CallsSuper, CallsTheFunction])
def test_a_subclass_with_a_cumulative_average(ranks, kind):
    ranks(2, check_kind, kind, (3, 4), None)


@pytest.mark.parametrize("kind", KINDS)
def test_a_converted_subclass_is_both(kind):
    layer = convert_sync_batchnorm(kind(3))
    assert isinstance(layer, kind)
    assert isinstance(layer, SyncBatchNorm)
    assert type(convert_sync_batchnorm(kind(5))) is type(layer)
    if kind in (CallsSuper, AddsNothing):
        with pytest.raises(ValueError, match="expected 4D input"):
            layer(torch.randn(4, 3))  # still a BatchNorm2d


@pytest.mark.parametrize("kind", KINDS)
def test_frozen_statistics_hold_in_a_subclass(kind):
    model = convert_sync_batchnorm(nn.Sequential(kind(3)))
    model(torch.randn(4, 3, 5, 5))
    freeze(model)
    before = copy.deepcopy(model.state_dict())
    input = torch.randn(4, 3, 5, 5) + 2
    assert torch.equal(model.train()(input), model.eval()(input))
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "copy_of", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))], ids=["copy", "pickle"]
)
def test_copies_and_pickles_of_a_converted_subclass(kind, copy_of):
    layer = convert_sync_batchnorm(kind(3)).freeze(affine=False)
    other = copy_of(layer)
    assert type(other) is type(layer)
    assert other.stats_frozen
    input = torch.randn(2, 3, 4, 4)
    assert torch.equal(other(input), layer(input))
    assert type(revert_sync_batchnorm(other.eval())) is kind


@pytest.mark.parametrize("kind", KINDS)
def test_revert_gives_back_the_subclass_with_nothing_left_behind(kind):
    plain, layer = kind(3), kind(3)
    revert_sync_batchnorm(convert_sync_batchnorm(layer))
    assert type(layer) is kind
    assert vars(layer).keys() == vars(plain).keys()
    layer.load_state_dict(plain.state_dict())
    input = torch.randn(4, 3, 5, 5)
    assert torch.equal(layer(input), plain(input))


def test_what_else_a_subclass_overrides_stays():
    assert repr(convert_sync_batchnorm(CallsSuper(3))) == "SyncCallsSuper(mine)"


def test_an_override_that_cannot_be_kept_is_refused_by_name_and_nothing_is_converted():
    model = nn.Sequential(nn.BatchNorm2d(3), OwnMaths(3))
    with pytest.raises(
        TypeError, match=r"1 is a OwnMaths .* neither calls super\(\).forward nor F.batch_norm; .*exclude='1'"
    ):
        convert_sync_batchnorm(model)
    assert type(model[0]) is nn.BatchNorm2d
    assert type(convert_sync_batchnorm(model, exclude="1")[1]) is OwnMaths


class TwoDomains(nn.BatchNorm2d):
    """Statistics of its own for a second domain; batch normalization of another layer inside."""

    def __init__(self, num_features):
        super().__init__(num_features)
        self.register_buffer("mean2", torch.full((num_features,), 5.0))
        self.register_buffer("var2", torch.full((num_features,), 4.0))
        self.inner = nn.BatchNorm2d(num_features)

    def forward(self, x):
        x = F.batch_norm(x, self.mean2, self.var2, self.weight, self.bias, self.training, 0.5)
        return self.inner(x)


def test_buffers_of_its_own_and_layers_inside_are_what_the_original_forward_makes_of_them():
    plain, layer = TwoDomains(3).double(), convert_sync_batchnorm(TwoDomains(3).double(), exclude="inner")
    input = make_batch((6, 3, 4, 4))[0]
    assert max_error(layer(input), plain(input)) < 1e-12
    for name, value in plain.state_dict().items():
        if "num_batches" not in name:
            assert max_error(layer.state_dict()[name], value) < 1e-12, name
    assert layer.inner.num_batches_tracked == 1
    layer.freeze()
    before = copy.deepcopy(layer.state_dict())
    frozen = layer.train()(input)
    after = layer.state_dict()
    assert all(torch.equal(after[name], before[name]) for name in after if not name.startswith("inner."))
    hidden = F.batch_norm(input, before["mean2"], before["var2"])
    assert max_error(frozen, plain.inner(hidden)) < 1e-10  # by its own buffers, not by running_mean


class OwnFactor(nn.BatchNorm2d):
    def forward(self, x):
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, self.training, 0.5)


def test_a_factor_that_the_original_chose_is_kept():
    layer, plain = convert_sync_batchnorm(OwnFactor(3, momentum=None)), OwnFactor(3, momentum=None)
    input = torch.randn(4, 3, 5, 5)
    layer(input), plain(input)
    assert max_error(layer.running_mean, plain.running_mean.double()) < 1e-6


class NeverReaches(nn.BatchNorm2d):
    def forward(self, x):
        return self.batch_norm(x)

    def batch_norm(self, x):
        return x - x.mean()


def test_a_forward_that_only_looks_as_if_it_could_be_synchronized_raises_when_it_trains():
    layer = convert_sync_batchnorm(NeverReaches(3))
    with pytest.raises(RuntimeError, match="forward of NeverReaches normalized without super"):
        layer(torch.randn(2, 3, 4, 4))


bnorm = F.batch_norm


def by_a_helper(layer, x):
    return bnorm(x, layer.running_mean, layer.running_var, layer.weight, layer.bias, layer.training, layer.momentum)


class ThroughAHelper(nn.BatchNorm2d):
    @torch.autocast("cpu", enabled=False)
    def forward(self, x):
        return sum([by_a_helper(self, part) for part in [x]])


def test_a_decorated_forward_a_helper_and_another_name_of_the_function_are_followed():
    layer = convert_sync_batchnorm(ThroughAHelper(3))
    layer(torch.randn(2, 3, 4, 4))
    assert layer.num_batches_tracked == 1


def test_a_forward_replaced_on_the_instance_is_refused():
    layer = nn.BatchNorm2d(3)
    layer.forward = layer.forward
    with pytest.raises(TypeError, match="its forward was replaced on the instance"):
        convert_sync_batchnorm(nn.Sequential(layer))


def test_a_wrong_number_of_channels_is_an_error_in_a_subclass_too():
    with pytest.raises(RuntimeError, match="expected 4 channels"):
        convert_sync_batchnorm(AddsNothing(4))(torch.randn(3, 1, 2, 2))


def test_the_switches_show_in_a_repr_that_the_subclass_has_overridden():
    assert repr(convert_sync_batchnorm(CallsSuper(3)).freeze()) == "SyncCallsSuper(mine, frozen=stats+affine)"


def test_a_layer_that_was_lazy_has_the_attributes_of_a_converted_one():
    """Compiled code notices their change only if they were there before."""
    layer, other = convert_sync_batchnorm(nn.LazyBatchNorm2d()), convert_sync_batchnorm(nn.BatchNorm2d(3))
    layer(torch.randn(2, 3, 4, 4))
    assert vars(layer).keys() - {"_infer_parameters"} >= vars(other).keys()


def check_lazy():
    model = convert_sync_batchnorm(nn.Sequential(nn.LazyBatchNorm2d(dtype=torch.float64)))
    assert [report.status for report in conversion_report(model)] == ["waiting"]
    plain = nn.BatchNorm2d(3, dtype=torch.float64)
    input = make_batch((7, 3, 4, 4))[0]
    output = model(input.split([3, 4])[dist.get_rank()])  # the very first forward is synchronized
    assert max_error(output, plain(input).split([3, 4])[dist.get_rank()]) < 1e-12
    assert type(model[0]) is SyncBatchNorm
    assert max_error(model[0].running_var, plain.running_var) < 1e-13
    assert type(revert_sync_batchnorm(model)[0]) is nn.BatchNorm2d


def test_a_lazy_layer_waits_for_its_width_and_is_then_synchronized(ranks):
    """torch's converter makes it a layer of width 0."""
    ranks(2, check_lazy)


def test_a_lazy_layer_can_be_reverted_before_it_has_seen_anything():
    layer = revert_sync_batchnorm(convert_sync_batchnorm(nn.LazyBatchNorm1d()))
    assert type(layer) is nn.LazyBatchNorm1d
    assert layer(torch.randn(4, 3)).shape == (4, 3)


def test_the_report_says_what_every_layer_is_and_why():
    model = nn.Sequential(
        nn.BatchNorm2d(3), SyncBatchNorm(3), OwnMaths(3), nn.GroupNorm(1, 3), nn.InstanceNorm2d(3), nn.ReLU()
    )
    before = [(report.name, report.kind, report.status) for report in conversion_report(model)]
    assert before == [
        ("0", "BatchNorm2d", "convertible"),
        ("1", "SyncBatchNorm", "built"),
        ("2", "OwnMaths", "refused"),
        ("3", "GroupNorm", "other"),
        ("4", "InstanceNorm2d", "other"),
    ]
    convert_sync_batchnorm(model, exclude="2")
    assert conversion_report(model)[0].status == "converted"
