"""`fuse` in layers that apply their activation in a forward of their own, as timm's densenet or regnet have them."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from syncbn import convert_sync_batchnorm, fuse, revert_sync_batchnorm


class BatchNormAct2d(nn.BatchNorm2d):
    """Base class, children and steps as timm's: its own bookkeeping, `F.batch_norm`, then `drop`, then `act`."""

    def __init__(self, num_features, act=None, drop=None, **options):
        super().__init__(num_features, **options)
        self.drop = nn.Identity() if drop is None else drop
        self.act = nn.ReLU(inplace=True) if act is None else act

    def forward(self, x):
        torch._assert(x.ndim == 4, "expected 4D input")
        rate = 0.0 if self.momentum is None else self.momentum
        if self.training and self.track_running_stats and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
            rate = 1.0 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
        is_tracked = not self.training or self.track_running_stats
        mean, var = (self.running_mean, self.running_var) if is_tracked else (None, None)
        by_batch = self.training or (self.running_mean is None and self.running_var is None)
        x = F.batch_norm(x, mean, var, self.weight, self.bias, by_batch, rate, self.eps)
        return self.act(self.drop(x))


class CallsSuper(nn.BatchNorm1d):
    def __init__(self, num_features):
        super().__init__(num_features)
        self.activation = nn.LeakyReLU()

    def forward(self, x):
        return self.activation(super().forward(x))


def converted(layer, *more, dtype=torch.float64):
    torch.manual_seed(0)
    conv = nn.Conv1d(3, 4, 1) if isinstance(layer, nn.BatchNorm1d) else nn.Conv2d(3, 4, 1)
    return convert_sync_batchnorm(nn.Sequential(conv, layer, *more).to(dtype))


def check_same(model, plain):
    shape = (6, 3, 5) if isinstance(model[1], nn.BatchNorm1d) else (6, 3, 5, 5)
    for mode in (True, False):
        input = torch.randn(shape, dtype=torch.float64)
        results = []
        for one in (model.train(mode), plain.train(mode)):
            one.zero_grad()
            output = one(input)
            output.square().sum().backward()
            results.append((output.detach(), [parameter.grad.clone() for parameter in one.parameters()]))
        torch.testing.assert_close(*results, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(model.state_dict(), plain.state_dict())
    assert list(model.state_dict()) == list(plain.state_dict())


LAYERS = {
    "relu": lambda: BatchNormAct2d(4),
    "silu": lambda: BatchNormAct2d(4, nn.SiLU(inplace=True)),
    "leaky_relu": lambda: BatchNormAct2d(4, nn.LeakyReLU()),
    "cumulative": lambda: BatchNormAct2d(4, momentum=None),
    "untracked": lambda: BatchNormAct2d(4, track_running_stats=False),
    "no affine": lambda: BatchNormAct2d(4, affine=False),
    "super": lambda: CallsSuper(4),
}


@pytest.mark.parametrize("name", LAYERS)
def test_the_layer_normalizes_and_activates_in_one_and_reverts_to_what_it_was(name):
    original = LAYERS[name]()
    before = set(original.__dict__)
    children = dict(original.named_children())
    model = converted(original)
    plain, state = copy.deepcopy(model), copy.deepcopy(model.state_dict())
    [outcome] = fuse(model)
    assert (outcome.reason, outcome.residual) == ("", False)
    assert outcome.activation == {"super": "leaky_relu"}.get(name, name if name in ("silu", "leaky_relu") else "relu")
    torch.testing.assert_close(model.state_dict(), state, rtol=0, atol=0)  # looking at the forward changes nothing
    assert f"activation={outcome.activation}" in repr(model[1])
    for same in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        check_same(same, copy.deepcopy(plain))
        assert fuse(same)[0].reason == f"has an activation already: {outcome.activation}"
    plain.load_state_dict(model.state_dict())
    revert_sync_batchnorm(model)
    assert set(model[1].__dict__) == before
    assert dict(model[1].named_children()) == children
    check_same(model, revert_sync_batchnorm(plain))


def test_a_layer_that_serves_in_two_places_is_fused_once():
    layer = BatchNormAct2d(4)
    model = converted(layer, nn.Conv2d(4, 4, 1), layer)
    plain = copy.deepcopy(model)
    assert [outcome.activation for outcome in fuse(model)] == ["relu"]
    check_same(model, plain)


def test_lean_is_said_not_to_be():
    [outcome] = fuse(converted(BatchNormAct2d(4, nn.LeakyReLU())), memory="lean")
    assert (outcome.activation, outcome.memory) == ("leaky_relu", "default")
    assert "a forward of its own" in outcome.memory_reason


class AddsNothing(nn.BatchNorm2d):
    """Its forward is torch's."""

    memory, activation = "its own", "its own"


def test_a_subclass_without_a_forward_is_fused_as_torchs_class_is():
    model = converted(AddsNothing(4), nn.ReLU())
    plain = copy.deepcopy(model)
    assert fuse(model)[0].activation == "relu"
    assert isinstance(model[2], nn.Identity)
    check_same(model, plain)
    assert (model[1].memory, model[1].activation) == ("its own", "its own")
    revert_sync_batchnorm(model)
    assert [type(child) for child in model] == [nn.Conv2d, AddsNothing, nn.ReLU]


def own(forward, **children):
    """A layer of a class of its own with this forward; a ReLU `act` among its children."""
    layer = type("Own", (nn.BatchNorm2d,), {"forward": forward})(4)
    for name, child in {"act": nn.ReLU(), **children}.items():
        setattr(layer, name, child)
    return layer


def normalized(layer, x):
    return nn.BatchNorm2d.forward(layer, x)


def after_the_activation(self, x):
    return self.act(normalized(self, x)) * 2


def before_the_activation(self, x):
    return self.act(normalized(self, x) + 1)


def in_place_before_the_activation(self, x):
    return self.act(normalized(self, x).add_(1.0))


def in_place_after_the_activation(self, x):
    return self.act(normalized(self, x)).add_(1.0)


def in_training_alone(self, x):
    y = normalized(self, x)
    return self.act(y) if self.training else y


def twice(self, x):
    return self.act(self.act(normalized(self, x)))


def has_a_switch(self, x, activate=True):
    return self.act(normalized(self, x)) if activate else normalized(self, x)


def reads_a_switch(self, x):
    return self.act(normalized(self, x)) if self.activate else normalized(self, x)


def throws_a_coin(self, x):
    return self.act(normalized(self, x)) if torch.rand(1) < 2 else x


def never(self, x):
    return normalized(self, x)


def fails(self, x):
    return self.act(normalized(self, x)) if x.size(2) == 77 else normalized(self, x).missing


LEFT = {
    "identity": (lambda: BatchNormAct2d(4, nn.Identity()), "no activation among its children"),
    "dropout": (lambda: BatchNormAct2d(4, drop=nn.Dropout(0.1)), r"cannot be fused: drop \(Dropout\), act \(ReLU\)"),
    "other": (lambda: BatchNormAct2d(4, nn.Hardswish()), r"cannot be fused: act \(Hardswish\)"),
    "slope": (lambda: BatchNormAct2d(4, nn.LeakyReLU(0.2)), "cannot be fused"),
    "after": (lambda: own(after_the_activation), "does more than to normalize and apply act"),
    "before": (lambda: own(before_the_activation), "does more than"),
    "in place before": (lambda: own(in_place_before_the_activation), "does more than"),
    "in place after": (lambda: own(in_place_after_the_activation), "does more than"),
    "training": (lambda: own(in_training_alone), "does more than"),
    "twice": (lambda: own(twice), "does more than"),
    "argument": (lambda: own(has_a_switch), "optional arguments"),
    "switch": (lambda: own(reads_a_switch, activate=True), r"reads self\.activate"),
    "coin": (lambda: own(throws_a_coin), "calls rand"),
    "never": (lambda: own(never), "does more than"),
    "fails": (lambda: own(fails), "could not be run"),
}


@pytest.mark.parametrize("name", LEFT)
def test_what_cannot_be_fused_is_left_and_told(name):
    make, reason = LEFT[name]
    model = converted(make())
    state, attributes = copy.deepcopy(model.state_dict()), dict(model[1].__dict__)
    children = list(model.modules())
    [outcome] = fuse(model)
    assert outcome.activation is None
    with pytest.raises(AssertionError, match=reason):
        raise AssertionError(outcome.reason)
    assert outcome.reason.startswith(f"is a {type(model[1]).__name__}, which has a forward of its own")
    torch.testing.assert_close(model.state_dict(), state, rtol=0, atol=0)
    assert model[1].__dict__ == attributes
    assert list(model.modules()) == children


def test_activations_with_hooks_and_outputs_that_are_changed_in_place_are_left():
    model = converted(BatchNormAct2d(4))
    model[1].act.register_forward_hook(lambda *_: None)
    assert "its activation act has hooks" in fuse(model)[0].reason
    leaky = BatchNormAct2d(4, nn.LeakyReLU())
    assert "changed in place" in fuse(converted(leaky, nn.Dropout(inplace=True)))[0].reason
    assert "changed in place" in fuse(convert_sync_batchnorm(BatchNormAct2d(4, nn.LeakyReLU())))[0].reason
    assert fuse(convert_sync_batchnorm(BatchNormAct2d(4)))[0].activation == "relu"


def test_a_layer_that_was_not_converted_is_told_to_be():
    assert "convert_sync_batchnorm comes first" in fuse(nn.Sequential(BatchNormAct2d(4)))[0].reason
