"""Who is calling: somebody else's converter, an autograd function, activation checkpointing."""

import torch
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_weights
from torch.utils.checkpoint import checkpoint

from syncbn.nn.call_stack import folding_function, foreign_converter, function_context, is_inside


class Layer:
    @property
    def width(self):
        return foreign_converter()


def convert_sync_batchnorm(layer):
    return layer.width


def test_a_converter_is_known_by_its_function_s_name_and_module():
    assert convert_sync_batchnorm(Layer()) == f"{__name__}.convert_sync_batchnorm"
    assert Layer().width is None


def test_our_own_converter_is_none_of_somebody_else_s():
    namespace = {"__name__": "syncbn.surgery.anything"}
    exec("def convert_sync_batchnorm(layer):\n    return layer.width\n", namespace)
    assert namespace["convert_sync_batchnorm"](Layer()) is None


class Folded:
    def __init__(self):
        self.running_var = 1.0

    @property
    def eps(self):
        return folding_function()


def fuse_the_two(layer):
    return layer.running_var, layer.eps


def hands_over(layer):
    return fuse_conv_bn_weights, layer.eps


def refuse_something(layer):
    return layer.eps


def a_monitor(layer):
    return layer.running_var, layer.eps


def test_a_function_that_folds_is_known_by_its_name_and_what_it_reads_or_by_what_it_calls():
    assert fuse_the_two(Folded())[1] == f"{__name__}.fuse_the_two"
    assert hands_over(Folded())[1] == f"{__name__}.hands_over"
    assert refuse_something(Folded()) is None
    assert a_monitor(Folded())[1] is None
    namespace = {"__name__": "syncbn.surgery.anything"}
    exec("def fuse(layer):\n    return layer.running_var, layer.eps\n", namespace)
    assert namespace["fuse"](Folded())[1] is None


class Around(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, seen):
        seen += [function_context("forward") is ctx, function_context("backward") is None]
        ctx.seen = seen
        return x * 2

    @staticmethod
    def backward(ctx, grad):
        ctx.seen += [function_context("backward") is ctx, function_context("forward") is None]
        return grad * 2, None


def test_the_context_is_that_of_the_function_around():
    seen = []
    Around.apply(torch.ones(2, requires_grad=True), seen).sum().backward()
    assert seen == [True, True, True, True]
    assert function_context("forward") is None


def test_code_under_a_checkpoint_is_inside_of_it_and_other_code_is_not():
    seen = []

    class Looks(nn.Module):
        def forward(self, x):
            seen.append(is_inside("torch.utils.checkpoint"))
            return x * 2

    checkpoint(Looks(), torch.ones(2, requires_grad=True), use_reentrant=False)
    Looks()(torch.ones(2))
    assert seen == [True, False]
