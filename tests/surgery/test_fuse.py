"""`fuse` and its undoing: the same numbers and keys, and a reason for everything that is left."""

import copy
import operator
import pickle
from collections import OrderedDict

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from syncbn import SyncBatchNorm, convert_sync_batchnorm, freeze, fuse, revert_sync_batchnorm
from syncbn.training.models.resnet import ResidualBlock, ResnetSmall
from syncbn.training.models.unet import UnetSmall


def step(model, input):
    """Output, and gradients by name."""
    model.zero_grad()
    output = model(input)
    output.square().sum().backward()
    return output.detach(), {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def check_same(model, plain, input):
    for change in (nn.Module.train, nn.Module.eval):
        change(model), change(plain)
        torch.testing.assert_close(step(model, input), step(plain, input), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(model.state_dict(), plain.state_dict())
    assert list(model.state_dict()) == list(plain.state_dict())


MODELS = {
    "resnet": (lambda: ResnetSmall(1, 10, 4, 2, 2), 9, 10),
    "unet": (lambda: UnetSmall(1, 3, 4, 1), 6, 6),
}


@pytest.mark.parametrize("name", MODELS)
def test_the_models_of_the_service_are_fused_and_taken_apart_again(name):
    make, num_fused, num_layers = MODELS[name]
    model = convert_sync_batchnorm(make().double())
    plain = copy.deepcopy(model)
    parameters = list(model.parameters())
    reports = fuse(model)
    assert [len(reports), sum(not report.reason for report in reports)] == [num_layers, num_fused]
    assert all((report.activation == "relu") == (report.reason == "") for report in reports)
    assert all(one is other for one, other in zip(parameters, model.parameters(), strict=True))
    input = torch.randn(4, 1, 8, 8, dtype=torch.float64)
    for same in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        check_same(same, copy.deepcopy(plain), input)
    plain.load_state_dict(model.state_dict())
    assert not [report for report in fuse(model) if not report.reason]  # there is nothing left to do
    assert revert_sync_batchnorm(model) is model
    assert str(model) == str(revert_sync_batchnorm(plain.train(model.training)))
    check_same(model, plain, input)


def test_a_block_does_its_addition_in_the_layer_and_a_copy_is_a_model_of_its_own():
    block = convert_sync_batchnorm(ResidualBlock(3, 5, 2))
    reports = {report.name: report for report in fuse(block)}
    assert reports["bn2"].residual
    assert not reports["bn1"].residual
    assert reports["shortcut.bn"].reason == "no activation that could be fused follows it"
    assert isinstance(block, ResidualBlock)
    copied = copy.deepcopy(block)
    copied(torch.randn(4, 3, 6, 6))
    assert int(copied.bn2.num_batches_tracked) == 1
    assert int(block.bn2.num_batches_tracked) == 0


class Block(nn.Module):
    """Calls `self.bn` as `how` says."""

    def __init__(self, how, layer=None, **children):
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 1)
        self.bn = SyncBatchNorm(3) if layer is None else layer
        for name, child in children.items():
            setattr(self, name, child)
        type(self).forward = how


def block(how, **children):
    """A block of a class of its own."""
    return type("Block", (Block,), {})(how, **children)


def add_in_place(self, x):
    y = self.bn(self.conv(x))
    y += x
    return F.relu(y, inplace=True)


FUSED = {
    "relu": lambda self, x: F.relu(self.bn(self.conv(x))),
    "in place": lambda self, x: F.relu(self.bn(self.conv(x)), inplace=True),
    "method": lambda self, x: self.bn(self.conv(x)).relu(),
    "torch": lambda self, x: torch.relu(self.bn(self.conv(x))),
    "leaky": lambda self, x: F.leaky_relu(self.bn(self.conv(x))),
    "silu": lambda self, x: F.silu(self.bn(self.conv(x))),
    "add": lambda self, x: F.silu(self.bn(self.conv(x)) + x),
    "add reversed": lambda self, x: F.relu(x + self.bn(self.conv(x))),
    "iadd": lambda self, x: F.relu(operator.iadd(self.bn(self.conv(x)), x)),
    "torch.add": lambda self, x: F.leaky_relu(torch.add(x, self.bn(self.conv(x)))),
    "add in place": add_in_place,
    "two calls of conv": lambda self, x: self.conv(F.relu(self.bn(self.conv(x)))),
}


@pytest.mark.parametrize("name", FUSED)
def test_what_follows_a_layer_in_a_forward(name):
    model = block(FUSED[name]).double()
    plain = copy.deepcopy(model)
    [report] = fuse(model)
    assert report.reason == ""
    assert report.residual == ("add" in name)
    check_same(model, plain, torch.randn(4, 3, 5, 5, dtype=torch.float64))


def in_place_into_the_input(self, x):
    x += self.bn(self.conv(x))
    return F.relu(x)


def in_place_by_a_method(self, x):
    return F.relu(self.conv(x).add_(self.bn(self.conv(x))))


def adds_it_to_itself(self, x):
    y = self.bn(x)
    return F.relu(y + y)


def sets_an_attribute(self, x):
    self.seen = self.bn(x)
    return F.relu(self.seen)


def branches_on_the_mode(self, x):
    return F.relu(F.dropout(self.bn(x), 0.1, self.training))


def branches_on_values(self, x):
    return F.relu(self.bn(x)) if x.sum() > 0 else x


def has_an_option(self, x, mask=None):
    return F.relu(self.bn(x)) if mask is None else x


def uses_it_twice(self, x):
    y = self.bn(x)
    return F.relu(y) + y


def uses_the_sum_twice(self, x):
    y = self.bn(self.conv(x)) + x
    return F.relu(y) + y


def in_a_context(self, x):
    with torch.no_grad():
        y = self.conv(x)
    return F.relu(self.bn(y))


def throws_a_coin(self, x):
    return F.relu(self.bn(x)) if torch.rand(1) < 0.5 else x


def helper(module, x):
    return F.dropout(x, 0.1, module.training)


LEFT = {
    "context": (in_a_context, "has a with statement"),
    "wrapped": (torch.no_grad()(lambda self, x: F.relu(self.bn(x))), "wraps its forward"),
    "coin": (throws_a_coin, "calls rand"),
    "helper": (lambda self, x: helper(self, F.relu(self.bn(x))), "reads self.training"),
    "in place into the input": (in_place_into_the_input, "changes a tensor in place"),
    "in place by a method": (in_place_by_a_method, "added in place to something else"),
    "sets an attribute": (sets_an_attribute, "sets seen"),
    "mode": (branches_on_the_mode, "reads self.training"),
    "values": (branches_on_values, "cannot be traced"),
    "option": (has_an_option, "optional arguments"),
    "output used twice": (uses_it_twice, "its output is used several times"),
    "sum used twice": (uses_the_sum_twice, "the sum is used several times"),
    "two calls": (lambda self, x: F.relu(self.bn(F.relu(self.bn(x)))), "is used in several places"),
    "other slope": (lambda self, x: F.leaky_relu(self.bn(x), 0.2), "no activation"),
    "other activation": (lambda self, x: F.gelu(self.bn(x)), "no activation"),
    "number": (lambda self, x: F.relu(self.bn(x) + 1.0), "not another activation"),
    "product": (lambda self, x: F.relu(self.bn(x) * x), "no activation"),
    "itself": (adds_it_to_itself, "is added to itself"),
    "scaled": (lambda self, x: F.relu(torch.add(self.bn(x), x, alpha=2)), "not another activation"),
    "no activation": (lambda self, x: self.bn(x), "no activation"),
    "residual": (lambda self, x: F.relu(self.bn(x, residual=x)), "called with more than its input"),
    "output in place": (lambda self, x: F.leaky_relu(self.bn(x)).mul_(2.0), "output is changed in place"),
    "output in place by torch": (lambda self, x: F.dropout(F.leaky_relu(self.bn(x)), inplace=True), "in place"),
    "input used elsewhere": (lambda self, x: F.relu(self.bn(x) + x), "its input is used elsewhere"),
}


@pytest.mark.parametrize("name", LEFT)
def test_what_cannot_be_fused_is_left_and_told(name):
    how, reason = LEFT[name]
    model = block(how)
    before = set(model.__dict__)
    [report] = fuse(model)
    assert report.activation is None
    assert reason in report.reason
    assert type(model).__name__ == "Block"
    assert model.bn.activation is None
    assert set(model.__dict__) == before


def test_of_two_layers_that_are_added_one_does_the_addition():
    how = lambda self, x: F.relu(self.bn(self.conv(x)) + self.other(self.conv(x)))  # noqa: E731
    model = block(how, other=SyncBatchNorm(3)).double()
    plain = copy.deepcopy(model)
    reports = {report.name: report for report in fuse(model)}
    assert reports["bn"].residual
    assert reports["other"].reason == "what it is added to does the addition"
    check_same(model, plain, torch.randn(4, 3, 5, 5, dtype=torch.float64))


def sequential(*modules):
    return nn.Sequential(nn.Conv2d(3, 3, 1), *modules)


def reason_of(model, **options):
    [report] = fuse(model, **options)
    return report.reason


def test_layers_and_activations_with_hooks_are_left():
    for place in (1, 2):
        model = sequential(SyncBatchNorm(3), nn.ReLU())
        model[place].register_forward_hook(lambda *_: None)
        assert "hooks" in reason_of(model)
        assert isinstance(model[2], nn.ReLU)
    model = sequential(SyncBatchNorm(3), nn.ReLU())
    model[1].register_forward_pre_hook(lambda *_: None)  # it sees the same input
    assert reason_of(model) == ""


def test_an_activation_that_serves_several_places_goes_on_doing_so():
    relu = nn.ReLU(inplace=True)
    model = nn.Sequential(sequential(SyncBatchNorm(3), relu), nn.Conv2d(3, 3, 1), relu).double()
    plain = copy.deepcopy(model)
    assert reason_of(model) == ""
    assert model[2] is relu
    check_same(model, plain, torch.randn(2, 3, 4, 4, dtype=torch.float64))
    revert_sync_batchnorm(model)
    assert model[0][2] is model[2] is relu


def test_layers_of_other_classes_shared_ones_and_those_with_an_activation_are_left():
    assert "convert_sync_batchnorm comes first" in reason_of(sequential(nn.BatchNorm2d(3), nn.ReLU()))

    class NormAct(nn.BatchNorm2d):
        def forward(self, input):
            return super().forward(input).relu()

    converted = convert_sync_batchnorm(sequential(NormAct(3), nn.ReLU()))
    assert "is a SyncNormAct, which has a forward of its own" in reason_of(converted)
    assert "has an activation already: silu" in reason_of(sequential(SyncBatchNorm(3, activation="silu"), nn.ReLU()))
    layer = SyncBatchNorm(3)
    assert "several places" in reason_of(sequential(layer, nn.ReLU(), layer, nn.ReLU()))
    assert "no module was found that calls it" in reason_of(SyncBatchNorm(3))


def test_only_what_is_selected_is_fused_and_a_pattern_that_selects_nothing_is_an_error():
    model = nn.Sequential(OrderedDict(a=sequential(SyncBatchNorm(3), nn.ReLU()),
                                      b=sequential(SyncBatchNorm(3), nn.SiLU())))  # fmt: skip
    assert [report.name for report in fuse(model, match="b")] == ["b.1"]
    assert isinstance(model.a[2], nn.ReLU)
    assert [report.activation for report in fuse(model, exclude="b")] == ["relu"]
    with pytest.raises(ValueError, match="selects no module"):
        fuse(model, match="c.*")


def test_a_layer_that_another_module_calls_is_left():
    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = sequential(SyncBatchNorm(3), nn.ReLU())

        def forward(self, x):
            return self.inner[1](x) + self.inner(x)

    assert "several places" in reason_of(Outer())


def test_reverting_a_fused_layer_alone_is_an_error_and_changes_nothing():
    model = convert_sync_batchnorm(sequential(nn.BatchNorm2d(3), nn.ReLU()))
    fuse(model)
    with pytest.raises(ValueError, match="has no activation="):
        revert_sync_batchnorm(model[1])
    assert model[1].activation == "relu"
    revert_sync_batchnorm(model.eval())
    assert [type(module) for module in model] == [nn.Conv2d, nn.BatchNorm2d, nn.ReLU]
    assert not model[2].training


def test_built_layers_are_taken_apart_too_and_frozen_ones_are_fused():
    model = freeze_all(sequential(SyncBatchNorm(3), nn.ReLU()).double())
    plain = copy.deepcopy(model)
    assert reason_of(model) == ""
    input = torch.randn(2, 3, 4, 4, dtype=torch.float64)
    torch.testing.assert_close(model(input), plain(input))
    revert_sync_batchnorm(model)
    assert model[1].activation is None
    assert isinstance(model[2], nn.ReLU)


def freeze_all(model):
    freeze(model)
    return model


def test_a_fused_block_compiles_in_one_graph():
    torch._dynamo.reset()
    model = convert_sync_batchnorm(ResidualBlock(3, 3, 1).double())
    plain = copy.deepcopy(model)
    fuse(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    input = torch.randn(2, 3, 4, 4, dtype=torch.float64)
    torch.testing.assert_close(step(compiled, input)[0], step(plain, input)[0])


def add_after(self, x):
    return F.leaky_relu(self.bn(self.conv(x))) + x


LEAN = {
    "leaky": (FUSED["leaky"], ""),
    "added after": (add_after, ""),
    "relu": (FUSED["relu"], "does not tell what went into relu"),
    "silu": (FUSED["silu"], "does not tell what went into silu"),
    "add": (FUSED["torch.add"], "does not tell what was added"),
}


@pytest.mark.parametrize("name", LEAN)
def test_lean_is_what_can_be_and_the_rest_is_fused_as_ever(name):
    how, reason = LEAN[name]
    model = block(how).double()
    plain = copy.deepcopy(model)
    [report] = fuse(model, memory="lean")
    assert report.reason == ""
    assert reason in report.memory_reason
    assert [report.memory, model.bn.memory] == ["default" if reason else "lean"] * 2
    check_same(model, plain, torch.randn(4, 3, 5, 5, dtype=torch.float64))
    revert_sync_batchnorm(model)
    assert model.bn.memory == "default"


def test_a_module_that_changes_the_output_in_place_leaves_a_leaky_relu_where_it_is():
    assert "changed in place" in reason_of(sequential(SyncBatchNorm(3), nn.LeakyReLU(), nn.Dropout(inplace=True)))
    assert reason_of(sequential(SyncBatchNorm(3), nn.ReLU(), nn.Dropout(inplace=True))) == ""


def test_lean_layers_of_a_converted_model_are_plain_ones_again_after_reverting():
    plain = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.LeakyReLU(inplace=True), nn.Conv2d(4, 3, 1))
    model = convert_sync_batchnorm(copy.deepcopy(plain).double())
    before = set(model[1].__dict__)
    [report] = fuse(model, memory="lean")
    assert report.memory == "lean"
    input = torch.randn(4, 3, 5, 5, dtype=torch.float64)
    for same in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        check_same(same, convert_sync_batchnorm(copy.deepcopy(plain).double()), input)
    assert list(model.state_dict()) == list(plain.state_dict())
    revert_sync_batchnorm(model)
    assert str(model) == str(plain)
    assert set(model[1].__dict__) == before - {"process_group", "_original_class", "activation", "memory", "_eps"}


def test_a_layer_that_was_built_lean_stays_so_and_is_left_where_it_could_not():
    model = sequential(SyncBatchNorm(3, memory="lean"), nn.LeakyReLU())
    assert fuse(model)[0].memory == "lean"
    revert_sync_batchnorm(model)
    assert [model[1].memory, model[1].activation] == ["lean", None]
    assert "is lean, and its output does not tell" in reason_of(sequential(SyncBatchNorm(3, memory="lean"), nn.ReLU()))


def test_weights_that_begin_at_zero_keep_the_input_and_another_word_is_an_error():
    model = sequential(SyncBatchNorm(16), nn.LeakyReLU())
    nn.init.zeros_(model[1].weight)
    [report] = fuse(model, memory="lean")
    assert "too many of its weights are 0" in report.memory_reason
    with pytest.raises(ValueError, match="expected default or lean, got 'less'"):
        fuse(model, memory="less")
