"""torch's own cases for BatchNorm1d, 2d and 3d, run against our layer."""

import warnings

import pytest
import torch
from torch import nn

from syncbn import SyncBatchNorm, convert_sync_batchnorm


@pytest.fixture(scope="module", params=[nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d], ids=lambda kind: kind.__name__)
def info(request):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's test helpers warn about optional packages when they are imported
        from torch.testing._internal.common_modules import module_db  # for seconds: not while tests are collected

    return next(info for info in module_db if info.module_cls is request.param)


def cases(info, training):
    torch.manual_seed(0)
    arguments = (info, "cpu", torch.float64, False, training)
    return info.module_inputs_func(*arguments)


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("converted", [True, False], ids=["converted", "built"])
def test_inputs_give_the_same_outputs_gradients_and_buffers(info, training, converted):
    inputs = cases(info, training)
    assert len(inputs) >= 6
    for case in inputs:
        args, kwargs = case.constructor_input.args, case.constructor_input.kwargs
        theirs = info.module_cls(*args, **kwargs).double().train(training)
        ours = convert_sync_batchnorm(info.module_cls(*args, **kwargs)) if converted else SyncBatchNorm(*args, **kwargs)
        ours = ours.double().train(training)
        [input] = case.forward_input.args
        leaves = [input.clone().requires_grad_() for _ in range(2)]
        outputs = [layer(leaf) for layer, leaf in zip((ours, theirs), leaves, strict=True)]
        torch.testing.assert_close(*outputs, rtol=1e-10, atol=1e-10)
        for output in outputs:
            output.sin().sum().backward()
        torch.testing.assert_close(leaves[0].grad, leaves[1].grad, rtol=1e-9, atol=1e-10)
        for parameter, other in zip(ours.parameters(), theirs.parameters(), strict=True):
            torch.testing.assert_close(parameter.grad, other.grad, rtol=1e-9, atol=1e-10)
        if len(input) == 0 and training and theirs.track_running_stats:
            # The one difference: torch's counts an empty batch and lets its statistics decay; for us it did not happen.
            fresh = info.module_cls(*args, **kwargs).double()
            assert all(torch.equal(ours.state_dict()[key], value) for key, value in fresh.state_dict().items())
            continue
        for buffer, other in zip(ours.buffers(), theirs.buffers(), strict=True):
            torch.testing.assert_close(buffer, other, rtol=1e-12, atol=1e-12)


def test_error_inputs_raise_torchs_errors(info):
    if info.module_error_inputs_func is None:
        pytest.skip("torch has no such cases before 2.13")
    errors = info.module_error_inputs_func(info, "cpu", torch.float64, False, True)
    assert errors
    for case in errors:
        constructor, forward = case.module_error_input.constructor_input, case.module_error_input.forward_input
        layer = SyncBatchNorm(*constructor.args, **constructor.kwargs)
        with pytest.raises(case.error_type, match=case.error_regex):
            layer(*forward.args)
