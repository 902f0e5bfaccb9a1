"""Surgery after somebody else's: classes that torch has put above a layer's own, wrappers, exchanged forwards."""

import copy
import pickle
import warnings

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

from syncbn import SyncBatchNorm, convert_sync_batchnorm, freeze, fuse, revert_sync_batchnorm
from syncbn.nn.injected import own_class
from syncbn.surgery.conversion_report import conversion_report


class Activated(nn.BatchNorm2d):
    def forward(self, input):
        return F.relu(super().forward(input))


class Doubled(nn.Module):
    def forward(self, weight):
        return weight * 2

    def right_inverse(self, weight):
        return weight / 2


class Block(nn.Module):
    """A module that gets a forward of `fuse`."""

    def __init__(self, norm=nn.BatchNorm2d):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 4, 3), norm(4)
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, input):
        return F.leaky_relu(self.bn(self.conv(input)))


def sequential(norm=nn.BatchNorm2d):
    return nn.Sequential(nn.Conv2d(3, 4, 3), norm(4), nn.LeakyReLU())


def layer_of(model):
    return model.bn if isinstance(model, Block) else model[1]


def parametrized(module):
    parametrize.register_parametrization(module, "scale" if isinstance(module, Block) else "weight", Doubled())
    return module


def one_step(model):
    """Output and gradient of the bias, from the same input every time."""
    input = torch.randn(4, 3, 6, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    model.zero_grad()
    output = model(input)
    output.square().sum().backward()
    return output.detach(), layer_of(model).bias.grad.clone()


def check_same(model, expected):
    torch.testing.assert_close(one_step(model), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("norm", [nn.BatchNorm2d, Activated])
@pytest.mark.parametrize("when", ["before", "after", "fused"])
def test_a_parametrized_layer_is_converted_reverted_copied_and_bared_as_any_other(norm, when):
    model = sequential(norm).double()
    layer = layer_of(model)
    if when == "before":
        expected = one_step(sequential_like(parametrized(layer), model))
        convert_sync_batchnorm(model)
    else:
        convert_sync_batchnorm(model)
        expected = one_step(sequential_like(parametrized(layer), model))
    assert type(layer).__name__ == f"ParametrizedSync{'BatchNorm' if norm is nn.BatchNorm2d else 'Activated'}"
    if when == "fused":
        fuse(model)
    check_same(model, expected)
    check_same(copy.deepcopy(model), expected)
    assert [report.status for report in conversion_report(model)] == ["converted"]
    revert_sync_batchnorm(model)
    assert type(layer).__name__ == f"Parametrized{norm.__name__}"
    assert type(layer).__bases__ == (norm,)
    check_same(model, expected)
    check_same(copy.deepcopy(model), expected)
    with pytest.raises(RuntimeError, match="only supported through state_dict"):
        pickle.dumps(model)
    parametrize.remove_parametrizations(layer, "weight")
    assert type(layer) is norm
    check_same(model, expected)
    pickle.loads(pickle.dumps(model))


def sequential_like(layer, model):
    return nn.Sequential(model[0], layer, nn.LeakyReLU())


@pytest.mark.parametrize("norm", [nn.BatchNorm2d, Activated])
def test_removing_a_parametrization_that_was_there_before_leaves_the_converted_layer(norm):
    model = sequential(norm).double()
    parametrized(layer_of(model))
    convert_sync_batchnorm(model)
    expected = one_step(model)
    parametrize.remove_parametrizations(layer_of(model), "weight")
    assert isinstance(layer_of(model), SyncBatchNorm)
    assert type(layer_of(model)) is own_class(type(layer_of(model)))
    check_same(model, expected)
    assert type(layer_of(revert_sync_batchnorm(model))) is norm
    check_same(model, expected)


def test_a_copy_of_a_converted_parametrized_layer_shares_its_group():
    """torch's own deepcopy of such a class copies everything, and groups cannot be copied."""
    layer = parametrized(nn.BatchNorm2d(3))

    class Group:
        def __deepcopy__(self, memo):
            raise AssertionError("a group was copied")

    group = Group()
    assert copy.deepcopy(convert_sync_batchnorm(layer, group)).process_group is group


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_fused_module_may_be_parametrized_or_the_other_way_round(when):
    model = convert_sync_batchnorm(Block().double())
    expected = one_step(model)
    if when == "before":
        parametrized(model)
    assert fuse(model)[0].reason == ""
    if when == "after":
        parametrized(model)
    check_same(model, expected)
    check_same(copy.deepcopy(model), expected)
    if when == "before":  # torch gives back the class below, which is the fused one
        parametrize.remove_parametrizations(model, "scale")
        check_same(model, expected)
    revert_sync_batchnorm(model)
    assert own_class(type(model)) is Block
    assert type(layer_of(model)) is nn.BatchNorm2d
    check_same(model, expected)


def check_composable():
    from torch.distributed._composable.replicate import replicate
    from torch.distributed.fsdp import FSDPModule, fully_shard

    for apply, name in ((fully_shard, "FSDP"), (replicate, "DDP")):
        for make, when in COMPOSED:
            torch.manual_seed(0)
            model = make().double()
            model.register_parameter("scale", None)  # DDP wants every parameter to be used
            layer = layer_of(model)
            if when == "layer, converted":
                apply(layer)
            convert_sync_batchnorm(model)
            if when == "model, fused":
                apply(model)
            if "fused" in when:
                assert fuse(model)[0].activation == "leaky_relu"
            if when in ("converted, layer", "fused, model"):
                apply(layer if "layer" in when else model)
            one_step_sharded(model)
            expected = one_step_sharded(model.eval())
            revert_sync_batchnorm(model)
            torch.testing.assert_close(one_step_sharded(model), expected)
            wrapped = layer if "layer" in when else model
            assert type(wrapped).__name__ == name + ("BatchNorm2d" if "layer" in when else type(make()).__name__)
            assert isinstance(wrapped, FSDPModule) == (name == "FSDP")
            assert own_class(type(layer)) is nn.BatchNorm2d


COMPOSED = [
    (sequential, "layer, converted"),
    (sequential, "converted, layer"),
    (sequential, "fused, model"),
    (Block, "fused, model"),
    (Block, "model, fused"),
]


def one_step_sharded(model):
    torch.manual_seed(dist.get_rank())
    output = model(torch.randn(4, 3, 6, 6, dtype=torch.float64))
    output.square().sum().backward()
    return output.detach()


def test_fully_shard_and_replicate_stay_on_what_is_converted_fused_and_reverted(ranks):
    ranks(2, check_composable)


def test_pruned_weight_normed_and_orthogonal_layers_are_converted_and_reverted():
    for change in (
        lambda layer: prune.random_unstructured(layer, "weight", amount=0.5),
        lambda layer: parametrizations.weight_norm(layer),
        lambda layer: parametrizations.spectral_norm(layer),
        lambda layer: layer.register_forward_hook(lambda _, __, output: output * 2),
    ):
        for first in (True, False):
            model = sequential().double()
            if first:
                change(layer_of(model))
                expected = one_step(model.eval())
                convert_sync_batchnorm(model)
            else:
                convert_sync_batchnorm(model)
                change(layer_of(model))
                expected = one_step(model.eval())
            check_same(model, expected)
            revert_sync_batchnorm(model)
            assert own_class(type(layer_of(model))) is nn.BatchNorm2d
            check_same(model, expected)


ConvertedActivated = type(convert_sync_batchnorm(Activated(1)))


def _fused_block():
    block = convert_sync_batchnorm(Block())
    fuse(block)
    return type(block)


FusedBlock = _fused_block()


class OfAConvertedClass(ConvertedActivated):
    pass


class OfAFusedClass(FusedBlock):
    pass


@pytest.mark.parametrize("copy_of", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))])
def test_subclasses_of_generated_classes_are_copied_and_pickled_and_not_reverted(copy_of):
    layer = OfAConvertedClass(3)
    copied = copy_of(layer)
    assert type(copied) is OfAConvertedClass
    input = torch.randn(2, 3, 4, 4)
    assert torch.equal(copied(input), layer(input))
    model = nn.Sequential(convert_sync_batchnorm(nn.BatchNorm2d(3)), convert_sync_batchnorm(Activated(3)))
    model[1].__class__ = OfAConvertedClass
    with pytest.raises(ValueError, match="1: its class is OfAConvertedClass, whose own behaviour Activated would lose"):
        revert_sync_batchnorm(model)
    assert type(model[0]) is SyncBatchNorm
    block = convert_sync_batchnorm(Block())
    fuse(block)
    block.__class__ = OfAFusedClass
    assert type(copy_of(block)) is OfAFusedClass
    with pytest.raises(ValueError, match="the module was changed after fuse: its class is now OfAFusedClass"):
        revert_sync_batchnorm(block)
    assert block.bn.activation == "leaky_relu"


def replace_the_identity(model):
    model[2] = nn.Dropout(0.1)


def remove_the_first(model):
    del model[0]


def replace_the_forward(model):
    model[1].forward = model[1].forward


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (replace_the_identity, "2 is no longer the Identity"),
        (remove_the_first, "2 is no longer the Identity"),
        (replace_the_forward, "1: its forward was replaced on the instance"),
    ],
)
def test_what_revert_would_lose_is_refused_and_nothing_has_changed(change, message):
    model = convert_sync_batchnorm(sequential())
    fuse(model)
    change(model)
    layer = next(child for child in model if isinstance(child, SyncBatchNorm))
    modules = list(model)
    with pytest.raises(ValueError, match=message):
        revert_sync_batchnorm(model)
    assert list(model) == modules
    assert layer.activation == "leaky_relu"


def test_a_fused_module_with_a_forward_of_its_instance_is_refused():
    model = nn.Sequential(convert_sync_batchnorm(Block()), Block())
    fuse(model, match="0")
    model[0].forward = model[0].forward  # as accelerate's hooks do
    convert_sync_batchnorm(model, match="1")
    with pytest.raises(ValueError, match="0 was changed after fuse: its forward was replaced on the instance"):
        revert_sync_batchnorm(model)
    assert type(model[1].bn) is SyncBatchNorm


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # Dynamo looks at it
def test_a_compiled_model_notices_that_it_was_converted_fused_and_reverted():
    """Dynamo does not notice an attribute that is new in `__dict__`: it went on without the activation."""
    torch._dynamo.reset()
    model = sequential().double()
    expected = one_step(model)
    model.compile(backend="eager")
    for change in (convert_sync_batchnorm, fuse, revert_sync_batchnorm):
        change(model)
        check_same(model, expected)
    assert type(model[1]) is nn.BatchNorm2d


def test_a_layer_that_is_compiled_after_fuse_is_found_by_revert():
    model = convert_sync_batchnorm(sequential().double())
    expected = one_step(model)
    fuse(model)
    compiled = nn.Sequential(*model)  # what follows does not run it
    model[1] = torch.compile(model[1], backend="eager")
    revert_sync_batchnorm(model)
    assert type(compiled[1]) is nn.BatchNorm2d
    check_same(nn.Sequential(model[0], compiled[1], model[2]), expected)


@pytest.mark.parametrize("wrap", [nn.DataParallel, torch.optim.swa_utils.AveragedModel, torch.compile])
def test_inside_of_wrappers(wrap):
    model = wrap(sequential())
    layer = next(child for child in model.modules() if isinstance(child, nn.BatchNorm2d))
    convert_sync_batchnorm(model)
    assert fuse(model)[0].name == "1"
    revert_sync_batchnorm(model)
    assert type(layer) is nn.BatchNorm2d


def test_a_layer_that_torch_jit_has_compiled_is_an_error_and_may_be_left_out():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit is deprecated
        model = nn.Sequential(nn.BatchNorm2d(4), torch.jit.script(sequential()))
        with pytest.raises(TypeError, match=r"1\.1 is a BatchNorm2d that torch\.jit has compiled.*exclude='1\.1'"):
            convert_sync_batchnorm(model)
        assert type(model[0]) is nn.BatchNorm2d
        assert type(convert_sync_batchnorm(model, exclude="1")[0]) is SyncBatchNorm


def test_layers_inside_of_quantization_aware_modules():
    quantization = pytest.importorskip("torch.ao.quantization")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.ao is deprecated
        model = quantization.fuse_modules_qat(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)), [["0", "1"]])
        model.qconfig = quantization.get_default_qat_qconfig("x86")
        quantization.prepare_qat(model, inplace=True)
        input = torch.randn(4, 3, 6, 6)
        expected = copy.deepcopy(model)(input)
        convert_sync_batchnorm(model)
        torch.testing.assert_close(copy.deepcopy(model)(input), expected)
        assert "no activation" in fuse(model)[0].reason or "reads self." in fuse(model)[0].reason
        revert_sync_batchnorm(model)
        assert type(model[0].bn) is nn.BatchNorm2d
        torch.testing.assert_close(model(input), expected)


def test_frozen_switches_and_parametrizations_go_together():
    model = convert_sync_batchnorm(sequential().double())
    parametrized(model[1])
    freeze(model)
    before = copy.deepcopy(model.state_dict())
    model(torch.randn(4, 3, 6, 6, dtype=torch.float64))
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    revert_sync_batchnorm(model.eval())
    assert model[1].parametrizations.weight.original.requires_grad
