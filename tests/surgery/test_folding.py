"""Functions that fold batch normalization into the layer in front of it must not lose an activation in silence."""

import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_conv_bn_weights, fuse_linear_bn_eval

from syncbn import SyncBatchNorm, convert_sync_batchnorm, fuse, revert_sync_batchnorm


def make_fused(activation=nn.ReLU, norm=nn.BatchNorm2d):
    """A fused model in evaluation mode whose normalization is not the identity."""
    torch.manual_seed(0)
    model = convert_sync_batchnorm(nn.Sequential(nn.Conv2d(3, 4, 3), norm(4), activation()))
    model(torch.randn(8, 3, 6, 6) + 3)
    assert fuse(model)[0].activation is not None
    return model.eval()


def by_torch(conv, bn):
    return fuse_conv_bn_eval(conv, bn)


def by_torchs_vectors(conv, bn):
    """Whatever its name: it hands the vectors to torch's function."""
    vectors = (bn.running_mean, bn.running_var, bn.eps, bn.weight, bn.bias)
    return fuse_conv_bn_weights(conv.weight, conv.bias, *vectors)


def folded(conv, bn):
    """What all of them compute, under the names that follow."""
    scale = bn.weight / torch.sqrt(bn.running_var + bn.eps)
    return conv.weight * scale.reshape(-1, 1, 1, 1), (conv.bias - bn.running_mean) * scale + bn.bias


OTHERS = {
    "mmcv.cnn.utils.fuse_conv_bn": "_fuse_conv_bn",
    "mmengine.model.efficient_conv_bn_eval": "efficient_conv_bn_eval_forward",
    "ultralytics.utils.torch_utils": "fuse_conv_and_bn",
    "yolov5.utils": "fuse_deconv_and_bn",
    "timm.models.byobnet": "_fuse_bn_tensor",
    "timm.models.levit": "fuse",
    "repvgg": "switch_to_deploy",
    "a.b": "fold_bn",
    "a.c": "merge_bn",
    "a.d": "absorb_bn",
    "a.e": "reparameterize",
}


def named(module, name):
    """`folded` as a function of this name in this module."""
    code = folded.__code__.replace(co_name=name, co_qualname=name)
    return type(folded)(code, {"__name__": module, "torch": torch})


@pytest.mark.parametrize(
    "fold", [by_torch, by_torchs_vectors, folded, *(named(*one) for one in OTHERS.items())], ids=lambda f: f.__name__
)
def test_folding_a_layer_that_fuse_has_given_an_activation_is_refused_and_after_revert_it_is_right(fold):
    model, input = make_fused(), torch.randn(2, 3, 6, 6) + 3
    expected = model(input)
    with pytest.raises(TypeError, match=r"would fold a SyncBatchNorm with activation='relu'.*revert_sync_batchnorm"):
        fold(*model[:2])
    revert_sync_batchnorm(model)
    made = fold(*model[:2])
    conv = made if isinstance(made, nn.Module) else lambda input: nn.functional.conv2d(input, *made)
    torch.testing.assert_close(model[2](conv(input)), expected)


def test_the_message_names_the_function():
    with pytest.raises(TypeError, match=r"torch\.nn\.utils\.fusion\.fuse_linear_bn_eval would fold"):
        fuse_linear_bn_eval(nn.Linear(3, 4).eval(), SyncBatchNorm(4, activation="silu").eval())


def test_a_layer_without_an_activation_is_folded_as_ever():
    model, input = convert_sync_batchnorm(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))), torch.randn(2, 3, 6, 6)
    model(input)
    torch.testing.assert_close(fuse_conv_bn_eval(*model.eval())(input), model(input))


def fused_statistics(layer):
    """A function of such a name that does not fold."""
    return layer.running_mean / layer.eps


def test_everybody_else_reads_and_sets_what_a_layer_has():
    layer = make_fused()[1]
    assert fused_statistics(layer).shape == (4,)
    fuse_eps = lambda: layer.eps  # noqa: E731
    assert fuse_eps() == getattr(layer, "eps") == layer.__dict__["eps"] == 1e-5  # noqa: B009
    layer.eps = 1e-3
    assert (layer.eps, layer.__dict__["eps"]) == (1e-3, 1e-3)
    assert "eps=0.001" in repr(layer)
    scale = (layer.running_var + layer.eps).rsqrt()  # a test that computes what is right may do so
    assert torch.isfinite(scale).all()


class NormAct(nn.BatchNorm2d):
    def __init__(self, num_features):
        super().__init__(num_features)
        self.activation = nn.ReLU()

    def forward(self, input):
        return self.activation(super().forward(input))


def test_a_subclass_that_fuse_has_given_an_activation_is_refused_too():
    with pytest.raises(TypeError, match="fold a SyncNormAct with activation='relu'"):
        fuse_conv_bn_eval(*make_fused(nn.Identity, NormAct)[:2])


def quantization_fusers():
    quantization = pytest.importorskip("torch.ao.quantization")
    quantize_fx = pytest.importorskip("torch.ao.quantization.quantize_fx")
    optimization = pytest.importorskip("torch.fx.experimental.optimization")
    input = torch.randn(2, 3, 6, 6)
    return [
        optimization.fuse,
        quantize_fx.fuse_fx,
        lambda model: quantization.fuse_modules(model, [["0", "1"]]),
        lambda model: quantization.fuse_modules(model, [["0", "1", "2"]]),
        lambda model: quantization.fuse_modules_qat(model.train(), [["0", "1"]]).eval(),
        lambda model: quantize_fx.prepare_fx(model, quantization.QConfigMapping(), (input,)),
    ]


@pytest.mark.parametrize("number", range(6))
def test_the_fusers_of_fx_and_torch_ao_raise_or_leave_the_layer(number):
    """They go by exact classes, or trace."""
    model, input = make_fused(), torch.randn(2, 3, 6, 6) + 3
    expected = model(input)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.ao is deprecated
        try:
            made = quantization_fusers()[number](model)
        except Exception:  # each has an error of its own
            made = model.eval()
        torch.testing.assert_close(made(input), expected)
        assert torch.equal(expected.relu(), expected)
        revert_sync_batchnorm(model.eval())
        torch.testing.assert_close(quantization_fusers()[number](model)(input), expected)
